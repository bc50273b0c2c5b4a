"""What Z-Image's published models are: sizes, schedule, guidance, and what plans count."""

from dataclasses import replace

from mrflow.model_info import FLUX, Architecture, Capabilities, Footprint, LatentSpace, ModelInfo, Shift

TEXT_TOKENS = 64  # of a usual prompt in its template, filled up to a multiple of 32
CAN = Capabilities(positions=True, cache=True, lora=True, together=True, attention=True)

# In bfloat16: parameters x 2, counted on the meta device. Text: Qwen3-4B without its head, whose 36 layers may visit.
_FOOTPRINT = Footprint(
    rest=2 * 364_791_104,
    modulation=2 * 127_307_520,
    modulation_pair=2 * 7_895_040,
    blocks=2 * 5_662_810_112,
    block_pair=2 * 353_925_632,
    autoencoder=2 * 83_819_683,
    text=2 * 388_958_720,
    text_layers=2 * 36 * 100_930_816,
    text_pair=2 * 2 * 100_930_816,
)

TURBO = ModelInfo(
    "z-image-turbo",
    LatentSpace("flux1"),  # its autoencoder is FLUX.1's, so its latents mean the same
    Shift.fixed(3.0),
    native_steps=8,
    staged_steps=9,
    sigma=3 / 11,
    architecture=Architecture(3840, 0, 32, 2560, TEXT_TOKENS, 6_154_908_736),
    upscale=FLUX.upscale,
    upscale_flops=FLUX.upscale_flops,
    encode=FLUX.encode,
    decode=FLUX.decode,
    footprint=_FOOTPRINT,
    capabilities=CAN,
)
"""Z-Image-Turbo: distilled to 8 evaluations in one pass, without guidance.

MrFlow's scripts draw 9 steps and refine from strength 0.11 of 9: from the last of nine even levels, 1/9, which the
factor of 3 shifts to 3/11.
"""
UNDISTILLED = replace(
    TURBO, name="z-image", shift=Shift.fixed(6.0), cfg=5.0, native_steps=50, staged_steps=12, sigma=0.12
)
"""Z-Image before its distillation: the published scale of 4 counts from the conditional branch, ours from the other."""

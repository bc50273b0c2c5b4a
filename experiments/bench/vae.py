"""C10: are decoding and encoding with the FLUX autoencoder as fast as with diffusers' AutoencoderKL?

Published widths, the same random weights, one picture, float32. Ours runs as `mrflow.load` sets it up: weights and
activations in channels_last. Outputs are compared first, to 1e-5.

    python -m experiments.bench.vae --sizes 128 256
"""

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments.bench.forward import scatter
from experiments.bench.protocol import FAST, Row, paired, publish
from mrflow.models.flux.vae import VaeFlux
from mrflow.models.flux.weights import FLUX_AUTOENCODER

CHANNELS = (128, 256, 512, 512)
LIMIT = 1e-5
Call = Callable[[], Tensor]


def autoencoder(channels: tuple[int, ...]) -> Any:  # noqa: ANN401
    """diffusers' autoencoder with FLUX's settings."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        layers_per_block=2,
        latent_channels=16,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def both(folder: Path) -> tuple[Any, VaeFlux]:
    """diffusers' autoencoder with random weights, and ours with the same."""
    from diffusers.utils.logging import set_verbosity_error

    set_verbosity_error()
    theirs: Any = autoencoder(CHANNELS).eval()
    scatter(theirs)
    theirs.save_pretrained(folder)
    ours = FLUX_AUTOENCODER.prepare(folder).read().eval()
    for p in ours.parameters():
        if p.ndim == 4 and p.shape[-1] > 1:
            p.data = p.data.contiguous(memory_format=torch.channels_last)
    return theirs, ours


def calls(theirs: Any, ours: VaeFlux, side: int) -> dict[str, tuple[Call, Call]]:  # noqa: ANN401
    """Reference and ours for each direction, between pictures in [0, 1] and normalised latents."""
    g = torch.Generator().manual_seed(1)
    pixels, z = torch.rand(1, 3, side, side, generator=g), torch.randn(1, 16, side // 8, side // 8, generator=g)
    scale, shift = theirs.config.scaling_factor, theirs.config.shift_factor

    @torch.no_grad()
    def decode_theirs() -> Tensor:
        out: Tensor = theirs.decode(z / scale + shift, return_dict=False)[0] / 2 + 0.5
        return out

    @torch.no_grad()
    def decode_ours() -> Tensor:
        return ours.decode(z.contiguous(memory_format=torch.channels_last)).contiguous()

    @torch.no_grad()
    def encode_theirs() -> Tensor:
        out: Tensor = (theirs.encode(2 * pixels - 1).latent_dist.mode() - shift) * scale
        return out

    @torch.no_grad()
    def encode_ours() -> Tensor:
        return ours.encode(pixels.contiguous(memory_format=torch.channels_last)).contiguous()

    return {"decode": (decode_theirs, decode_ours), "encode": (encode_theirs, encode_ours)}


def main() -> None:
    """Print a table and write every sample."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", type=int, default=(128, 256), help="sides in pixels")
    parser.add_argument("--fast", action="store_true", help="64 pixels, bars relaxed by 5 %%")
    parser.add_argument("--repeats", type=int, help="unless said, what the time of a call asks for")
    args = parser.parse_args()
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        theirs, ours = both(Path(folder))
        for side in (64,) if args.fast else args.sizes:
            for name, (reference, call) in calls(theirs, ours, side).items():
                runs = paired(reference, call, repeats=args.repeats, limit=LIMIT)
                notes = {"difference": f"{runs.error:.1e}"}
                rows.append(Row(f"{name} {side} px, float32", runs, FAST if args.fast else 1.0, notes=notes))
    publish("vae", rows)


if __name__ == "__main__":
    main()

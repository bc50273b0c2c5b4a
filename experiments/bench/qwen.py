"""C2, C9: is a guided step of Qwen-Image, and its single-frame autoencoder, cheaper than diffusers with equal weights?

Four two-stream blocks, random weights, one picture, prompts of 50 and 6 tokens. The reference is what QwenImagePipeline
does in a step: a forward for the prompt and one for the negative. Ours is one packed pass; rotations and embedded text
are made once a chain, modulations count. The autoencoder is the published one (or half as wide with --fast), one frame.
Outputs are compared first: 1e-5 in float32; in bfloat16 1.5e-2, or no further from float32 than the reference is.

    python -m experiments.bench.qwen --fast
"""

import argparse
import tempfile
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from experiments.bench.forward import LIMITS, scatter
from experiments.bench.protocol import Row, paired, publish
from mrflow.models.fields import ModulationTables
from mrflow.models.qwen.field import QwenField, qwen_step
from mrflow.models.qwen.weights import QWEN_AUTOENCODER, QWEN_TRANSFORMER

TEXTS = (50, 6)
LEVEL = 0.86332


class Size(NamedTuple):
    """A transformer and its grid of tokens; bars are for float32 and bfloat16."""

    heads: int
    axes: tuple[int, int, int]
    context: int
    grid: tuple[int, int]
    bars: tuple[float, float]


SIZES = {
    "tiny": Size(4, (8, 12, 12), 128, (16, 16), (1.20, 1.20)),
    "small": Size(6, (8, 28, 28), 512, (16, 16), (1.15, 1.10)),
    "mid": Size(8, (16, 56, 56), 3584, (32, 32), (1.15, 1.10)),
}


def step_rows(name: str, dtypes: Sequence[torch.dtype], repeats: int | None) -> list[Row]:
    """One guided step at one size."""
    from diffusers import QwenImageTransformer2DModel
    from diffusers.utils.logging import set_verbosity_error

    set_verbosity_error()
    size, rows = SIZES[name], list[Row]()
    make: Any = QwenImageTransformer2DModel
    theirs = make(
        patch_size=2,
        in_channels=64,
        out_channels=16,
        num_layers=4,
        attention_head_dim=sum(size.axes),
        num_attention_heads=size.heads,
        joint_attention_dim=size.context,
        axes_dims_rope=size.axes,
    ).eval()
    scatter(theirs)
    g = torch.Generator().manual_seed(7)
    h, w = size.grid
    x = torch.randn(1, 16, 2 * h, 2 * w, generator=g)
    words = [torch.randn(1, length, size.context, generator=g) for length in TEXTS]

    def reference(dtype: torch.dtype) -> Callable[[], Tensor]:
        from mrflow.protocols.tokens import pack

        tokens, level = pack(x).to(dtype), torch.tensor([1000 * LEVEL]).to(dtype) / 1000
        net = theirs.to(dtype)

        def call() -> Tensor:
            with torch.no_grad():
                outs = [
                    net(
                        hidden_states=tokens,
                        timestep=level,
                        encoder_hidden_states=word.to(dtype),
                        encoder_hidden_states_mask=None,
                        img_shapes=[[(1, h, w)]],
                        return_dict=False,
                    )[0]
                    for word in words
                ]
            return torch.cat(outs)

        return call

    oracle = reference(torch.float32)()
    with tempfile.TemporaryDirectory() as folder:
        for dtype in dtypes:
            call = reference(dtype)
            theirs.save_pretrained(folder)
            net = QWEN_TRANSFORMER.prepare(folder, dtype=dtype, fuse=True).read().eval().requires_grad_(False)  # noqa: FBT003

            def ours(net: Any = net) -> Tensor:  # noqa: ANN401
                from mrflow.protocols.tokens import pack

                with torch.no_grad():
                    return pack(field_of(net)(x, LEVEL))

            kept: dict[int, QwenField] = {}

            def field_of(net: Any, kept: dict[int, QwenField] = kept) -> QwenField:  # noqa: ANN401
                if id(net) not in kept:
                    kept[id(net)] = QwenField(
                        net,
                        [[word[0]] for word in words],
                        step=lambda *a, key=None: qwen_step(net, *a, key=key),
                        table=ModulationTables(
                            lambda levels: net.tables([torch.full((1,), level) for level in levels]), None
                        ),
                    )
                return kept[id(net)]

            runs = paired(
                call, ours, repeats=repeats, limit=LIMITS[dtype], oracle=None if dtype == torch.float32 else oracle
            )
            case = f"guided step, {name}, {str(dtype).removeprefix('torch.')}"
            bar = size.bars[dtype == torch.bfloat16]
            rows.append(Row(case, runs, bar, "cpu", {"difference": f"{runs.error:.1e}"}))
    return rows


def vae_rows(sides: Sequence[int], *, half: bool, repeats: int | None) -> list[Row]:
    """The autoencoder, decoding and encoding."""
    from diffusers import AutoencoderKLQwenImage

    make: Any = AutoencoderKLQwenImage
    theirs = make(base_dim=48 if half else 96).eval()
    with torch.no_grad():
        g = torch.Generator().manual_seed(3)
        for name, p in theirs.named_parameters():
            noise = torch.randn(p.shape, generator=g)
            p.copy_(1 + 0.1 * noise if name.endswith("gamma") else noise * max(1, p[0].numel()) ** -0.5)
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        vae = QWEN_AUTOENCODER.prepare(folder).read().eval().requires_grad_(False)  # noqa: FBT003
        for p in vae.parameters():
            p.data = p.data.contiguous(memory_format=torch.channels_last) if p.ndim == 4 else p.data.clone()
    mean = torch.tensor(vae.params.mean).view(1, -1, 1, 1, 1)
    std = torch.tensor(vae.params.std).view(1, -1, 1, 1, 1)
    rows: list[Row] = []
    for side in sides:
        z, pixels = torch.randn(1, 16, side // 8, side // 8), torch.rand(1, 3, side, side)

        def decode(z: Tensor = z) -> Tensor:
            with torch.no_grad():
                out: Tensor = theirs.decode(z[:, :, None] * std + mean).sample[:, :, 0]
                return out

        def our_decode(z: Tensor = z) -> Tensor:
            with torch.no_grad():
                return (2 * vae.decode(z.contiguous(memory_format=torch.channels_last)) - 1).clamp(-1, 1)

        def encode(pixels: Tensor = pixels) -> Tensor:
            with torch.no_grad():
                out: Tensor = ((theirs.encode(2 * pixels[:, :, None] - 1).latent_dist.mode() - mean) / std)[:, :, 0]
                return out

        def our_encode(pixels: Tensor = pixels) -> Tensor:
            with torch.no_grad():
                return vae.encode(pixels.contiguous(memory_format=torch.channels_last))

        width = "half as wide, " if half else ""
        for what, reference, ours in (("decode", decode, our_decode), ("encode", encode, our_encode)):
            runs = paired(reference, ours, repeats=repeats, limit=1e-5)
            note = {"difference": f"{runs.error:.1e}"}
            rows.append(Row(f"{what} {side} px, {width}one frame, float32", runs, 2.0, "cpu", note))
    return rows


def main() -> None:
    """Print a table and write every sample."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fast", action="store_true", help="tiny and small in float32, the autoencoder half as wide")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, help="default: all, with --fast tiny and small")
    parser.add_argument("--pictures", nargs="+", type=int, help="sides in pixels (default: 128 256, with --fast 128)")
    parser.add_argument("--repeats", type=int, help="unless said, what the time of a call asks for")
    args = parser.parse_args()
    names = args.sizes or (("tiny", "small") if args.fast else tuple(SIZES))
    pictures = args.pictures or ((128,) if args.fast else (128, 256))
    dtypes = (torch.float32,) if args.fast else (torch.float32, torch.bfloat16)
    rows = [row for name in names for row in step_rows(name, dtypes, args.repeats)]
    rows += vae_rows(pictures, half=args.fast, repeats=args.repeats)
    publish("qwen", rows)


if __name__ == "__main__":
    main()

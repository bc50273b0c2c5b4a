"""C1: is one step of the FLUX transformer cheaper than diffusers' FluxTransformer2DModel with the same weights?

Two double and four single blocks, random weights, one picture. The reference is one call as FluxPipeline makes it; ours
is one step as a chain makes it: rotations and embedded text are made once a chain, modulations count. `apart` keeps
the projections as diffusers' files hold them (what loading on a CPU gives), `fused` joins them (as BFL's files are).
Outputs are compared first: 1e-5 in float32; in bfloat16 1.5e-2, or no further from float32 than the reference is.

A processor with bfloat16 instructions is made to do without by the environment, for both sides: ONEDNN_MAX_CPU_ISA,
MKL_ENABLE_INSTRUCTIONS, ATEN_CPU_CAPABILITY as AVX2, AVX2, avx2, or with AVX-512 as AVX512_CORE, AVX512, avx512.

    python -m experiments.bench.forward --fast
    python -m experiments.bench.forward --sizes mid-256 mid-1024 --repeats 15
"""

import argparse
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from experiments.bench.protocol import FAST, Clock, Row, paired, publish
from mrflow.models.fields import step
from mrflow.models.flux.transformer import Flux, image_ids
from mrflow.models.flux.weights import load_flux
from mrflow.models.wide import widen

CHANNELS = 64
WAYS = ("apart", "fused")
LIMITS = {torch.float32: 1e-5, torch.bfloat16: 1.5e-2}


class Size(NamedTuple):
    """A transformer and what it is given; bars are for float32 and bfloat16."""

    heads: int
    axes: tuple[int, int, int]
    context: int
    pooled: int
    grid: tuple[int, int]
    text: int
    bars: tuple[float, float]


SIZES = {
    "tiny": Size(4, (8, 12, 12), 128, 64, (16, 16), 32, (1.20, 1.20)),
    "small": Size(6, (8, 28, 28), 512, 64, (16, 16), 64, (1.15, 1.10)),
    "mid-256": Size(8, (16, 56, 56), 4096, 768, (16, 16), 128, (1.15, 1.10)),
    "mid-1024": Size(8, (16, 56, 56), 4096, 768, (32, 32), 128, (1.15, 1.10)),
    "mid-4096": Size(8, (16, 56, 56), 4096, 768, (64, 64), 128, (1.15, 1.10)),
}
FEW = ("tiny", "small")
SEVERAL = ("tiny", "small", "mid-256", "mid-1024")


def scatter(module: nn.Module, seed: int = 3) -> None:
    """Random values everywhere, no parameter zero, outputs of order 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if p.ndim > 1:
                p.copy_(noise * p[0].numel() ** -0.5)
            else:
                p.copy_(0.3 * noise + (0.7 if "norm" in name and name.endswith("weight") else 0.2))


def theirs_of(size: Size) -> nn.Module:
    """diffusers' transformer of that size, random."""
    from diffusers import FluxTransformer2DModel
    from diffusers.utils.logging import set_verbosity_error

    set_verbosity_error()
    net: Any = FluxTransformer2DModel(
        in_channels=CHANNELS,
        num_layers=2,
        num_single_layers=4,
        attention_head_dim=sum(size.axes),
        num_attention_heads=size.heads,
        joint_attention_dim=size.context,
        pooled_projection_dim=size.pooled,
        guidance_embeds=True,
        axes_dims_rope=size.axes,
    )
    scatter(net)
    module: nn.Module = net.eval()
    return module


def inputs(size: Size) -> dict[str, Tensor]:
    """What a step is given, in float32."""
    g = torch.Generator().manual_seed(7)
    return {
        "tokens": torch.randn(1, size.grid[0] * size.grid[1], CHANNELS, generator=g),
        "context": torch.randn(1, size.text, size.context, generator=g),
        "pooled": torch.randn(1, size.pooled, generator=g),
        "sigma": torch.tensor([0.86332]),
        "guidance": torch.tensor([3.5]),
    }


def reference_call(
    net: Callable[..., Any], size: Size, given: dict[str, Tensor], dtype: torch.dtype
) -> Callable[[], Tensor]:
    """One step as FluxPipeline calls it."""
    value = {k: v.to(dtype) if k in ("tokens", "context", "pooled") else v for k, v in given.items()}
    time = (1000 * value["sigma"]).to(dtype)
    places = image_ids(*size.grid).to(dtype), torch.zeros(size.text, 3, dtype=dtype)

    def call() -> Tensor:
        with torch.no_grad():
            out: Tensor = net(
                hidden_states=value["tokens"],
                timestep=time / 1000,
                guidance=value["guidance"],
                pooled_projections=value["pooled"],
                encoder_hidden_states=value["context"],
                txt_ids=places[1],
                img_ids=places[0],
                return_dict=False,
            )[0]
            return out

    return call


def our_call(flow: Flux, size: Size, given: dict[str, Tensor]) -> Callable[[], Tensor]:
    """One step as a chain makes it."""
    with torch.no_grad():
        rope = flow.rope(image_ids(*size.grid), torch.zeros(size.text, 3))
        text = flow.embed_text(given["context"])

    def call() -> Tensor:
        with torch.no_grad():
            (table,) = flow.tables([given["sigma"]], given["guidance"], given["pooled"])
            return step(flow, given["tokens"], text, rope.cos, rope.sin, table)

    return call


def compared(
    name: str,
    *,
    dtypes: Sequence[torch.dtype],
    ways: Sequence[str] = WAYS,
    threads: int = 1,
    repeats: int | None = None,
    relax: float = 1.0,
) -> list[Row]:
    """Rows of one size."""
    size, rows = SIZES[name], list[Row]()
    with tempfile.TemporaryDirectory() as folder:
        theirs: Any = theirs_of(size)
        given = inputs(size)
        oracle = reference_call(theirs, size, given, torch.float32)()
        for dtype in dtypes:
            theirs = theirs.to(dtype)
            where = Path(folder) / str(dtype)
            theirs.save_pretrained(where)
            nets = {way: load_flux(where, dtype=dtype, fuse=way == "fused") for way in ways}
            reference = reference_call(theirs, size, given, dtype)
            for way, net in nets.items():
                widen(net)  # as a model on a CPU does
                runs = paired(
                    reference,
                    our_call(net.eval().requires_grad_(False), size, given),  # noqa: FBT003
                    repeats=repeats,
                    threads=threads,
                    limit=LIMITS[dtype],
                    oracle=None if dtype == torch.float32 else oracle,
                )
                bar = relax * size.bars[dtype == torch.bfloat16]
                case = f"{name}, {str(dtype).removeprefix('torch.')}, {way}"
                clock: Clock = "cpu" if threads == 1 else "wall"
                rows.append(Row(case, runs, bar, clock, {"difference": f"{runs.error:.1e}"}))
    return rows


def main() -> None:
    """Print a table and write every sample."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fast", action="store_true", help="tiny and small in float32, bars relaxed by 5 %%")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=SEVERAL)
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16"), default=("float32", "bfloat16"))
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, help="unless said, what the time of a call asks for")
    args = parser.parse_args()
    sizes, dtypes = (FEW, ("float32",)) if args.fast else (args.sizes, args.dtypes)
    rows = [
        row
        for name in sizes
        for row in compared(
            name,
            dtypes=[getattr(torch, d) for d in dtypes],
            ways=args.ways,
            threads=args.threads,
            repeats=args.repeats,
            relax=FAST if args.fast else 1.0,
        )
    ]
    publish("forward", rows, threads=args.threads)


if __name__ == "__main__":
    main()

"""How many kernels is a step, and how many bytes do those move that are no matrix product? Counted without a GPU.

The networks stand on the meta device at full size, and every operator that a step dispatches is counted: matrix
products (convolutions among them), attention, and the rest, each with the bytes of its inputs and outputs, read and
written once. "plain" are the definitions with a transformer's norms taken apart, an upper bound for eager torch; the
copies that CUDA makes around an autoencoder's group norms are not among them. "fused" are the kernels of
`mrflow.models.kernels`, of which each call is one kernel.

    python -m experiments.bench.kernels
"""

import argparse
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mrflow.checkpoints.blueprint import blueprint
from mrflow.models.fields import step
from mrflow.models.flux.transformer import Flux, FluxParams
from mrflow.models.flux.vae import VaeFlux, VaeParams
from mrflow.models.kernels.ops import FUSED, fused_norm_silu
from mrflow.models.kl import NormSilu, channels_last, norm_silu
from mrflow.models.layers import PLAIN, Ops
from mrflow.models.qwen.field import qwen_step
from mrflow.models.qwen.transformer import QwenImage, QwenParams
from mrflow.models.qwen.vae import QwenVaeParams, VaeQwen

PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "linear", "_addmm_activation", "convolution")
NOTHING = ("empty", "empty_like", "new_empty", "new_empty_strided", "empty_strided", "detach", "lift_fresh")
FLUX, QWEN = FluxParams(), QwenParams()
NORMS = (norm_silu, fused_norm_silu)
WORDS = (6, 50)  # prompts of the two branches of Qwen-Image's guidance


@dataclass
class Counts:
    """Calls by kind ("product", "attention", "rest") and by operator; bytes of the rest, by operator."""

    kernels: Counter[str] = field(default_factory=Counter[str])
    names: Counter[str] = field(default_factory=Counter[str])
    bytes: Counter[str] = field(default_factory=Counter[str])

    @property
    def total(self) -> int:
        """All kernels."""
        return sum(self.kernels.values())

    @property
    def gigabytes(self) -> float:
        """Moved by what is neither product nor attention."""
        return sum(self.bytes.values()) / 1e9


class Counting(TorchDispatchMode):
    """Counts what is dispatched inside. Views and allocations are no kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = Counts()

    def __torch_dispatch__(
        self,
        func: Any,  # noqa: ANN401
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name == "convolution" and args[0].is_contiguous(memory_format=torch.channels_last):
            out = out.contiguous(memory_format=torch.channels_last)  # as on a GPU; the meta device forgets it
        if func.is_view or name in NOTHING or name in ("_unsafe_view", "_reshape_alias"):
            return out
        kind = "product" if name in PRODUCTS else "attention" if name == "attention" else "rest"
        self.counts.kernels[kind] += 1
        self.counts.names[name] += 1
        if kind == "rest":
            self.counts.bytes[name] += moved(args, kwargs or {}, out, written=func._schema.is_mutable)
        return out


def moved(args: Sequence[Any], kwargs: Mapping[str, Any], out: Any, *, written: bool) -> int:  # noqa: ANN401
    """Bytes of the tensors that are read and those that are written; a buffer that is written in part counts as that.

    A kernel that writes into a larger buffer (`turned`) writes as much as it reads of its first argument.
    """
    tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    outs = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
    if written and not outs:
        *tensors, _ = tensors
        outs = tensors[:1]
    return sum(t.numel() * t.element_size() for t in (*tensors, *outs))


@torch.library.custom_op("mrflow_bench::attention", mutates_args=())
def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention, counted as one kernel, whose output lies as flash attention's does: tokens before heads."""
    raise NotImplementedError


@attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.empty_like(q.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)


@contextmanager
def counting() -> Iterator[Counts]:
    """What runs inside is counted."""
    with torch.no_grad(), Counting() as mode:
        yield mode.counts


def meta(net: torch.nn.Module, ops: Ops) -> Any:  # noqa: ANN401
    """The network in bfloat16, with these functions between its products."""
    net = net.to(torch.bfloat16)
    net.attention, net.ops = attention, ops  # type: ignore[assignment]  # pyright: ignore
    return net


def flux_step(ops: Ops, pixels: int, *, params: FluxParams = FLUX, text: int = 512) -> Counts:
    """One step of FLUX.1-dev for one picture of this many pixels a side."""
    with blueprint():
        net = meta(Flux(params), ops)
        n = (pixels // 16) ** 2
        tokens, words = torch.empty(1, n, params.in_channels), torch.empty(1, text, params.hidden, dtype=torch.bfloat16)
        cos = torch.empty(text + n, params.head // 2)
        vectors = 12 * params.double_blocks + 3 * params.single_blocks + 2
        table = torch.empty(1, vectors, params.hidden, dtype=torch.bfloat16)
        with counting() as counts:
            step(net, tokens, words, cos, cos, table)
    return counts


def qwen_guided(ops: Ops, pixels: int, *, params: QwenParams = QWEN, texts: tuple[int, int] = WORDS) -> Counts:
    """One guided step of Qwen-Image: two branches with prompts of these lengths in one pass."""
    with blueprint():
        net = meta(QwenImage(params), ops)
        n, d = (pixels // 16) ** 2, params.hidden
        tokens = torch.empty(1, 2 * n, params.in_channels)
        words = torch.empty(1, sum(texts), d, dtype=torch.bfloat16)
        cos = torch.empty(sum(texts) + 2 * n, params.head // 2)
        table = torch.empty(1, 12 * params.double_blocks + 2, d, dtype=torch.bfloat16)
        with counting() as counts:
            qwen_step(net, tokens, words, cos, cos, table, key=(n, texts))
    return counts


def decoded(norms: NormSilu, pixels: int, kind: type[VaeFlux | VaeQwen] = VaeFlux) -> Counts:
    """One picture decoded by a family's autoencoder, in bfloat16, channels last."""
    with blueprint():
        vae: VaeFlux | VaeQwen = VaeFlux(VaeParams()) if kind is VaeFlux else VaeQwen(QwenVaeParams())
        channels_last(vae.to(torch.bfloat16)).use(norms)
        side = pixels // vae.params.downscale
        z = torch.empty(1, vae.params.latent, side, side).contiguous(memory_format=torch.channels_last)
        with patch.object(torch.nn.functional, "scaled_dot_product_attention", attention), counting() as counts:
            vae.decode(z)
    return counts


def block(kind: str, ops: Ops, pixels: int = 1024) -> Counts:
    """What one more block of a kind ("single", "double") adds to FLUX's step; the last single block does less."""
    doubles, singles = 1 + (kind == "double"), 1 + (kind == "single")
    few = FluxParams(double_blocks=1, single_blocks=1)
    made = [flux_step(ops, pixels, params=p) for p in (few, replace(few, double_blocks=doubles, single_blocks=singles))]
    out = Counts()
    for name in ("kernels", "names", "bytes"):
        getattr(out, name).update({k: v - getattr(made[0], name)[k] for k, v in getattr(made[1], name).items()})
    return out


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    print("| step | functions | kernels | products | attention | other | GB moved by others |")
    print("|---|---|--:|--:|--:|--:|--:|")
    rows: list[tuple[str, Callable[[Ops], Counts]]] = [
        ("FLUX single block, 1024 px", lambda ops: block("single", ops)),
        ("FLUX double block, 1024 px", lambda ops: block("double", ops)),
        *((f"FLUX, {px} px", lambda ops, px=px: flux_step(ops, px)) for px in (512, 1024)),
        *((f"Qwen-Image, guided, {px} px", lambda ops, px=px: qwen_guided(ops, px)) for px in (512, 1024)),
        *(
            (f"{name} autoencoder, decode 1024 px", lambda ops, kind=kind: decoded(NORMS[ops is FUSED], 1024, kind))
            for name, kind in (("FLUX", VaeFlux), ("Qwen-Image", VaeQwen))
        ),
    ]
    for label, make in rows:
        for name, ops in (("plain", PLAIN), ("fused", FUSED)):
            c = make(ops)
            kinds = " | ".join(str(c.kernels[k]) for k in ("product", "attention", "rest"))
            print(f"| {label} | {name} | {c.total} | {kinds} | {c.gigabytes:.1f} |", flush=True)


if __name__ == "__main__":
    main()

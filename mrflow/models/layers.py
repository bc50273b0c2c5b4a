"""What the transformers share: attention, rotary positions, sinusoidal and MLP embeddings, norms, modulation."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Generic, NamedTuple, TypeVar, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

EPS = 1e-6
SINUSOID = 256  # channels of the embedding of level and guidance
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
M = TypeVar("M", bound=nn.Module)


class Blocks(nn.ModuleList, Generic[M]):
    """A list of modules that knows their type."""

    def __iter__(self) -> Iterator[M]:
        return cast("Iterator[M]", super().__iter__())


def attention(
    q: Float[Tensor, "b h n d"], k: Float[Tensor, "b h m d"], v: Float[Tensor, "b h m d"]
) -> Float[Tensor, "b h n d"]:
    """softmax(q k' / sqrt(d)) v, not causal, no mask."""
    return F.scaled_dot_product_attention(q, k, v)


class Rope(NamedTuple):
    """Rotation tables, float32: a row for each token, a column for each pair of channels."""

    cos: Float[Tensor, "n half"]
    sin: Float[Tensor, "n half"]


class TokenMerge(NamedTuple):
    """How image tokens are merged: `down` to fewer, `up` back again; rotations of text and merged tokens, per item."""

    down: Callable[[Tensor], Tensor]
    up: Callable[[Tensor], Tensor]
    rope: Rope
    text: int


Merge = Callable[[Tensor], TokenMerge]
"""From a block's modulated image tokens (b, l, d) to how they are merged there."""


def rope_tables(ids: Float[Tensor, "n axes"], axes: Sequence[int], *, theta: float) -> Rope:
    """cos and sin of position * theta^(-2j / dim), for each axis in turn; angles in float64 (float32 on MPS)."""
    dtype = torch.float32 if ids.device.type == "mps" else torch.float64
    parts: list[Tensor] = []
    for axis, dim in enumerate(axes):
        exponents = torch.arange(0, dim, 2, dtype=dtype, device=ids.device) / dim
        parts.append(ids[:, axis, None].to(dtype) * theta**-exponents)
    angles = torch.cat(parts, -1)
    return Rope(angles.cos().float(), angles.sin().float())


def apply_rope(x: Float[Tensor, "*b n d"], rope: Rope) -> Float[Tensor, "*b n d"]:
    """Each pair (x_2j, x_2j+1) turned by its angle, in float32, given back in the dtype of x."""
    pairs = x.float().view(*x.shape[:-1], -1, 2)
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        # The same products as one complex multiplication: 3 to 6 times as fast on a CPU, but opaque to the compiler.
        turned = torch.view_as_real(torch.view_as_complex(pairs) * torch.complex(rope.cos, rope.sin))
        return turned.flatten(-2).to(x.dtype)
    first, second = pairs.unbind(-1)
    even = torch.addcmul(first * rope.cos, second, rope.sin, value=-1)
    odd = torch.addcmul(second * rope.cos, first, rope.sin)
    return torch.stack((even.to(x.dtype), odd.to(x.dtype)), -1).flatten(-2)  # rounded first: half the bytes


def frequencies(half: int, device: torch.device) -> Float[Tensor, " half"]:
    """10000^(-k / half) for k below half, float32."""
    return torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device=device) / half)


def sinusoid(x: Float[Tensor, " b"], width: int = SINUSOID) -> Float[Tensor, "b width"]:
    """[cos(x f), sin(x f)] with the frequencies f of `width` / 2 channels; float32."""
    angles = x.float()[:, None] * frequencies(width // 2, x.device)
    return torch.cat((angles.cos(), angles.sin()), -1)


class SplitLinear(nn.Module):
    """A linear whose rows lie in several matrices, as in files that keep q, k and v apart: joining them would copy."""

    def __init__(self, width: int, rows: Sequence[int], *, bias: bool = True) -> None:
        super().__init__()
        self.parts = Blocks[nn.Linear](nn.Linear(width, count, bias=bias) for count in rows)

    def forward(self, x: Float[Tensor, "*b i"]) -> Float[Tensor, "*b o"]:
        """All rows, one part after another."""
        return torch.cat([part(x) for part in self.parts], -1)


def project(
    layer: nn.Module, x: Float[Tensor, "b n i"], rows: Sequence[int], *, first: Sequence[int] | None = None
) -> list[Tensor]:
    """What a fused linear gives, cut into groups of `rows` output channels: views, or the parts as they were made.

    `first` says, for each group, from which token on it is wanted.
    """
    first = first or (0,) * len(rows)
    if isinstance(layer, SplitLinear):
        return [part(x[:, at:]) for part, at in zip(layer.parts, first, strict=True)]
    return [part[:, at:] for part, at in zip(layer(x).split(list(rows), -1), first, strict=True)]


class Embedder(nn.Module):
    """Linear, SiLU, linear to `out` channels (default: `hidden`)."""

    def __init__(self, width: int, hidden: int, out: int | None = None) -> None:
        super().__init__()
        self.in_layer = nn.Linear(width, hidden)
        self.out_layer = nn.Linear(hidden, out or hidden)

    def forward(self, x: Float[Tensor, "b i"]) -> Float[Tensor, "b d"]:
        """One vector an item."""
        y: Tensor = self.out_layer(F.silu(self.in_layer(x)))
        return y


class RMSNorm(nn.Module):
    """x / sqrt(mean x^2 + eps) * scale over the last axis; `late` rounds to the dtype before the scale multiplies."""

    def __init__(self, width: int, *, late: bool = False, eps: float = EPS) -> None:
        super().__init__()
        self.late, self.eps = late, eps
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b d"]:
        """The same shape."""
        return (rms_late if self.late else rms)(x, self.scale, self.eps)


class QKNorm(nn.Module):
    """One RMS norm for queries, one for keys, over a head's channels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query_norm, self.key_norm = RMSNorm(width), RMSNorm(width)

    @property
    def scales(self) -> tuple[Tensor, Tensor]:
        """Of queries, and of keys: (head,) each."""
        return self.query_norm.scale, self.key_norm.scale


class QKV(NamedTuple):
    """One stream's queries (of its last tokens, or all), keys and values, and the scales of the first two's norms."""

    q: Float[Tensor, "b m h d"]
    k: Float[Tensor, "b n h d"]
    v: Float[Tensor, "b n h d"]
    q_scale: Float[Tensor, " d"]
    k_scale: Float[Tensor, " d"]


def modulated(
    x: Float[Tensor, "b n d"], shift: Float[Tensor, "m 1 d"], scale: Float[Tensor, "m 1 d"]
) -> Float[Tensor, "b n d"]:
    """LN(x) * scale + shift; the norm has no parameters, and `scale` is one plus what the network gives."""
    return torch.addcmul(shift, F.layer_norm(x, (x.shape[-1],), eps=EPS), scale)


def gated(x: Float[Tensor, "b n d"], gate: Float[Tensor, "m 1 d"], change: Float[Tensor, "b n d"]) -> Tensor:
    """x + gate * change, (b, n, d)."""
    return torch.addcmul(x, gate, change)


def gated_norm(x: Tensor, gate: Tensor, change: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """`gated`, and the modulated norm of what it gives."""
    return (x := gated(x, gate, change)), modulated(x, shift, scale)


def joint_heads(
    streams: Sequence[QKV], rope: Rope, eps: float = EPS, *, late: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Normed and turned queries and keys, and values, of all streams in turn: (b, n, heads, head) each.

    Each stream is turned, and rounded, before it is put beside the others. `rope`: (n, half) or (b, n, half). `late`
    says that a norm is rounded before its scale multiplies.
    """
    norm = rms_late if late else rms
    at, parts = 0, cast("list[tuple[Tensor, Tensor, Tensor]]", [])
    for q, k, v, *scales in streams:
        at += k.shape[1]
        turns = [Rope(*(table[..., at - x.shape[1] : at, None, :] for table in rope)) for x in (q, k)]
        q, k = (norm(x, s, eps) for x, s in zip((q, k), scales, strict=True))
        parts.append((apply_rope(q, turns[0]), apply_rope(k, turns[1]), v))
    q, k, v = parts[0] if len(parts) == 1 else (torch.cat(same, 1) for same in zip(*parts, strict=True))
    return q, k, v


def gelu_beside(out: Float[Tensor, "b n d"], inner: Float[Tensor, "b n m"]) -> Float[Tensor, "b n e"]:
    """What attention gives, and GELU (tanh form) of an MLP's first half, side by side: (b, n, d + m)."""
    return torch.cat((out, F.gelu(inner, approximate="tanh")), -1)


def linear_gelu(layer: nn.Module, x: Float[Tensor, "*b i"]) -> Float[Tensor, "*b o"]:
    """GELU (tanh form) of what a linear gives."""
    return F.gelu(layer(x), approximate="tanh")


def rms(x: Float[Tensor, "*b d"], weight: Float[Tensor, " d"], eps: float) -> Float[Tensor, "*b d"]:
    """x / sqrt(mean x^2 + eps) times the weight, rounded to its dtype once."""
    return F.rms_norm(x, weight.shape, weight.to(x.dtype), eps)


def rms_late(x: Float[Tensor, "*b d"], weight: Float[Tensor, " d"], eps: float) -> Float[Tensor, "*b d"]:
    """x / sqrt(mean x^2 + eps), rounded to its dtype, times the weight."""
    return F.rms_norm(x, (x.shape[-1],), None, eps) * weight


def rms_scaled(x: Tensor, weight: Tensor, scale: Float[Tensor, "m 1 d"], eps: float) -> Float[Tensor, "b n d"]:
    """`rms_late` times a scale of each item."""
    return rms_late(x, weight, eps) * scale


def rms_gated(
    x: Float[Tensor, "b n d"], gate: Float[Tensor, "m 1 d"], change: Tensor, weight: Tensor, eps: float
) -> Float[Tensor, "b n d"]:
    """x + gate * `rms_late` of a change."""
    return torch.addcmul(x, gate, rms_late(change, weight, eps))


class Ops(NamedTuple):
    """What blocks do between their matrix products, and in one that GELU follows. These are the definitions; others
    stand in on a GPU (`kernels`)."""

    norm: Callable[[Tensor, Tensor, Tensor], Tensor] = modulated
    gated: Callable[[Tensor, Tensor, Tensor], Tensor] = gated
    gated_norm: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]] = gated_norm
    joint_heads: Callable[..., tuple[Tensor, Tensor, Tensor]] = joint_heads
    gelu_beside: Callable[[Tensor, Tensor], Tensor] = gelu_beside
    rms_scaled: Callable[[Tensor, Tensor, Tensor, float], Tensor] = rms_scaled
    rms_gated: Callable[[Tensor, Tensor, Tensor, Tensor, float], Tensor] = rms_gated
    linear_gelu: Callable[[nn.Module, Tensor], Tensor] = linear_gelu


PLAIN = Ops()

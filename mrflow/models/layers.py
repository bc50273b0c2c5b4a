"""What the transformers share: attention, rotary positions, sinusoidal and MLP embeddings, norms, modulation."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Generic, NamedTuple, TypeVar, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from mrflow.errors import PlanError

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


class Merged(NamedTuple):
    """How image tokens are merged: `down` to fewer, `up` back again; rotations of text and merged tokens, per item."""

    down: Callable[[Tensor], Tensor]
    up: Callable[[Tensor], Tensor]
    rope: Rope
    text: int


Merge = Callable[[Tensor], Merged]
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
    else:
        first, second = pairs.unbind(-1)
        even = torch.addcmul(first * rope.cos, second, rope.sin, value=-1)
        odd = torch.addcmul(second * rope.cos, first, rope.sin)
        turned = torch.stack((even, odd), -1)
    return turned.flatten(-2).to(x.dtype)


def frequencies(half: int, device: torch.device) -> Float[Tensor, " half"]:
    """10000^(-k / half) for k below half, float32."""
    return torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device=device) / half)


def sinusoid(x: Float[Tensor, " b"], width: int = SINUSOID) -> Float[Tensor, "b width"]:
    """[cos(x f), sin(x f)] with the frequencies f of `width` / 2 channels; float32."""
    angles = x.float()[:, None] * frequencies(width // 2, x.device)
    return torch.cat((angles.cos(), angles.sin()), -1)


class SplitLinear(nn.Module):
    """A linear whose rows lie in several matrices, as in files that keep q, k and v apart: joining them would copy."""

    def __init__(self, width: int, rows: Sequence[int]) -> None:
        super().__init__()
        self.parts = Blocks[nn.Linear](nn.Linear(width, count) for count in rows)

    def forward(self, x: Float[Tensor, "*b i"]) -> Float[Tensor, "*b o"]:
        """All rows, one part after another."""
        return torch.cat([part(x) for part in self.parts], -1)


def project(layer: nn.Module, x: Float[Tensor, "*b i"], rows: Sequence[int]) -> list[Tensor]:
    """What a fused linear gives, cut into groups of `rows` output channels: views, or the parts as they were made."""
    if isinstance(layer, SplitLinear):
        return [part(x) for part in layer.parts]
    return list(layer(x).split(list(rows), -1))


class Embedder(nn.Module):
    """Linear, SiLU, linear."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.in_layer = nn.Linear(width, hidden)
        self.out_layer = nn.Linear(hidden, hidden)

    def forward(self, x: Float[Tensor, "b i"]) -> Float[Tensor, "b d"]:
        """One vector an item."""
        y: Tensor = self.out_layer(F.silu(self.in_layer(x)))
        return y


class RMSNorm(nn.Module):
    """x / sqrt(mean x^2 + eps) * scale over the last axis; `late` rounds to the dtype before the scale multiplies."""

    def __init__(self, width: int, *, late: bool = False) -> None:
        super().__init__()
        self.late = late
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b d"]:
        """The same shape."""
        if self.late:
            return F.rms_norm(x, (x.shape[-1],), None, EPS) * self.scale
        return F.rms_norm(x, (x.shape[-1],), self.scale, EPS)


class QKNorm(nn.Module):
    """One RMS norm for queries, one for keys, over a head's channels."""

    def __init__(self, width: int, *, late: bool = False) -> None:
        super().__init__()
        self.query_norm = RMSNorm(width, late=late)
        self.key_norm = RMSNorm(width, late=late)

    def forward(
        self, q: Float[Tensor, "*b d"], k: Float[Tensor, "*c d"]
    ) -> tuple[Float[Tensor, "*b d"], Float[Tensor, "*c d"]]:
        """The same shapes."""
        return self.query_norm(q), self.key_norm(k)


def modulated(
    x: Float[Tensor, "b n d"], shift: Float[Tensor, "m 1 d"], scale: Float[Tensor, "m 1 d"]
) -> Float[Tensor, "b n d"]:
    """LN(x) * scale + shift; the norm has no parameters, and `scale` is one plus what the network gives."""
    return torch.addcmul(shift, F.layer_norm(x, (x.shape[-1],), eps=EPS), scale)


class Folded(nn.Module):
    """In the place of a linear whose results were made beforehand."""

    def __init__(self, width: int, rows: int) -> None:
        super().__init__()
        self.in_features, self.out_features = width, rows

    def forward(self, x: Tensor) -> Tensor:
        """Never."""
        raise PlanError("this model was loaded with fold=chain: its modulation weights were not read")

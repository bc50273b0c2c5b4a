"""What transformers are built of: two-stream blocks, modulation, the final layer, packing into tokens."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import cast

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from mrflow.errors import PlanError
from mrflow.models.layers import PLAIN, QKV, Attention, Merge, Ops, QKNorm, Rope, SplitLinear, modulated, project

FP16_MAX = 65504.0
ONE_BY_ONE = ("cpu",)  # devices whose modulations are the same bits for one level as for several


class TransformerParams:
    """What the parameters of every transformer of these blocks have in common; their dataclasses add the fields."""

    hidden: int
    heads: int
    axes: tuple[int, ...]
    mlp_ratio: float
    out_channels: int

    def __post_init__(self) -> None:
        if self.hidden % self.heads:
            raise PlanError(f"hidden ({self.hidden}) must be a multiple of heads ({self.heads})")
        if any(axis % 2 for axis in self.axes) or sum(self.axes) != self.head:
            raise PlanError(f"axes must be even and sum to hidden / heads = {self.head}, got {self.axes}")

    @property
    def head(self) -> int:
        """Channels of one head."""
        return self.hidden // self.heads

    @property
    def mlp(self) -> int:
        """Inner width of the MLPs."""
        return int(self.hidden * self.mlp_ratio)


class Modulate(nn.Module):
    """The linear that gives one stream of one block its shift, scale and gate vectors."""

    def __init__(self, hidden: int, vectors: int) -> None:
        super().__init__()
        self.lin = nn.Linear(hidden, vectors * hidden)


def fused_linear(width: int, rows: tuple[int, ...], *, split: bool, bias: bool = True) -> nn.Module:
    """One linear for several projections; `split` keeps its matrices apart."""
    return SplitLinear(width, rows, bias=bias) if split else nn.Linear(width, sum(rows), bias=bias)


class StreamAttention(nn.Module):
    """The parameters of one stream's attention; `stream` and `proj` stand before and after the joint attention."""

    def __init__(self, p: TransformerParams, *, split: bool) -> None:
        super().__init__()
        self.heads, self.rows = p.heads, (p.hidden,) * 3
        self.qkv = fused_linear(p.hidden, self.rows, split=split)
        self.norm = QKNorm(p.head)
        self.proj = nn.Linear(p.hidden, p.hidden)

    def stream(self, x: Float[Tensor, "b n d"]) -> QKV:
        """Queries, keys and values, each of shape (b, n, heads, head), and the scales of their norms."""
        q, k, v = (part.unflatten(-1, (self.heads, -1)) for part in project(self.qkv, x, self.rows))
        return QKV(q, k, v, *self.norm.scales)


def attended(attend: Attention, q: Tensor, k: Tensor, v: Tensor) -> Float[Tensor, "b n e"]:
    """Attention over (b, n, heads, head), which an `Attention` is given as (b, heads, n, head); heads side by side."""
    return attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2).flatten(2)


class MLP(nn.Sequential):
    """Linear, GELU (tanh form), linear."""

    def __init__(self, p: TransformerParams) -> None:
        super().__init__(nn.Linear(p.hidden, p.mlp), nn.GELU(approximate="tanh"), nn.Linear(p.mlp, p.hidden))

    def forward(self, input: Float[Tensor, "*b d"], ops: Ops = PLAIN) -> Float[Tensor, "*b d"]:
        """The same shape."""
        out: Tensor = self[2](ops.linear_gelu(self[0], input))
        return out


def clip_fp16(x: Tensor) -> Tensor:
    """x, clipped to the largest finite value in float16, as in the reference (FLUX's streams leave its range)."""
    return x.clip(-FP16_MAX, FP16_MAX) if x.dtype == torch.float16 else x


class DoubleStreamBlock(nn.Module):
    """Image and text with parameters of their own, and one attention over both."""

    def __init__(self, p: TransformerParams, *, split: bool) -> None:
        super().__init__()
        self.img_mod, self.txt_mod = Modulate(p.hidden, 6), Modulate(p.hidden, 6)
        self.img_attn, self.txt_attn = StreamAttention(p, split=split), StreamAttention(p, split=split)
        self.img_mlp, self.txt_mlp = MLP(p), MLP(p)

    def forward(
        self,
        img: Float[Tensor, "b l d"],
        txt: Float[Tensor, "b t d"],
        rope: Rope,
        vectors: tuple[Tensor, ...],
        attend: Attention,
        *,
        last: bool = False,
        merge: Merge | None = None,
        ops: Ops = PLAIN,
    ) -> tuple[Float[Tensor, "b l d"], Float[Tensor, "b u d"]]:
        """Both streams after the block; `vectors`: (shift, scale, gate) x (attention, MLP) of image, then text.

        The text stream comes back empty from a block that is the `last` to have one. With `merge`, attention works on
        merged image tokens.
        """
        shift1, scale1, gate1, shift2, scale2, gate2 = vectors[:6]
        tshift1, tscale1, tgate1, tshift2, tscale2, tgate2 = vectors[6:]
        theirs = self.txt_attn.stream(ops.norm(txt, tshift1, tscale1))
        x = ops.norm(img, shift1, scale1)
        merged = merge(x) if merge is not None else None
        if merged is not None:
            x, rope = merged.down(x), merged.rope
        out = attended(attend, *ops.joint_heads((theirs, self.img_attn.stream(x)), rope))
        t = txt.shape[1]

        seen = out[:, t:] if merged is None else merged.up(out[:, t:])
        img, x = ops.gated_norm(img, gate1, self.img_attn.proj(seen), shift2, scale2)
        img = ops.gated(img, gate2, self.img_mlp(x, ops))
        if last:
            return img, txt[:, :0]
        txt, x = ops.gated_norm(txt, tgate1, self.txt_attn.proj(out[:, :t]), tshift2, tscale2)
        return img, clip_fp16(ops.gated(txt, tgate2, self.txt_mlp(x, ops)))


class FinalLayer(nn.Module):
    """The last modulated norm and the linear to patches: of its `vectors`, made of `given` channels (default: hidden).

    `scale_first` says that the modulation's rows are (scale, shift), as diffusers' files have them: then those can stay
    mapped, and the two vectors are exchanged instead of the matrix's halves.
    """

    scale_first = False

    def __init__(self, p: TransformerParams, *, given: int | None = None, vectors: int = 2) -> None:
        super().__init__()
        self.linear = nn.Linear(p.hidden, p.out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(given or p.hidden, vectors * p.hidden))


def tables(
    modulators: Iterable[nn.Module], vectors: Sequence[Float[Tensor, "b d"]], hidden: int, *, scale_first: bool
) -> list[Float[Tensor, "b m d"]]:
    """Modulation vectors from what each level starts from: (shift, 1 + scale, gate) each time, the last no gate.

    Each linear serves all levels; on a CPU in one product each, for the same bits. `scale_first` is the final layer's.
    """
    rows: list[list[Tensor]] = [[] for _ in vectors]
    for linear in modulators:
        groups = [[v] for v in vectors] if vectors[0].device.type in ONE_BY_ONE else [list(vectors)]
        for row, part in zip(rows, (p for g in groups for p in linear(torch.cat(g)).chunk(len(g))), strict=True):
            row.append(part)
    out: list[Tensor] = []
    for row in rows:
        if scale_first:
            row[-1] = torch.cat(tuple(reversed(row[-1].chunk(2, -1))), -1)
        table = rearrange(torch.cat(row, -1), "b (m d) -> b m d", d=hidden)
        table[:, 1::3] += 1
        out.append(table)
    return out


class Transformer(nn.Module, ABC):
    """What caches, adapters and offloading need of a network. Streams are (items, tokens, width)."""

    params: TransformerParams
    attention: Attention
    ops: Ops = PLAIN
    wide: bool = False
    embedder: str = "img_in"
    final_layer: FinalLayer

    @property
    def dtype(self) -> torch.dtype:
        """What its weights are kept in, and products are made in."""
        return cast("nn.Linear", self.get_submodule(self.embedder)).weight.dtype

    @property
    def stream_dtype(self) -> torch.dtype:
        """What streams and modulations are kept in between the products: `dtype`, or float32 where it is `wide`."""
        return torch.float32 if self.wide else self.dtype

    @abstractmethod
    def stack(self) -> list[nn.Module]:
        """All blocks in the order they run."""

    @abstractmethod
    def modulators(self) -> Iterator[nn.Module]:
        """The linears that make modulation vectors."""

    def embed_image(self, tokens: Float[Tensor, "b l i"]) -> Float[Tensor, "b l d"]:
        """The image stream of packed latents, of any floating dtype."""
        image: Tensor = self.get_submodule(self.embedder)(tokens.to(self.stream_dtype))
        return image

    def modulated_input(self, img: Tensor, modulation: Tensor) -> Tensor:
        """The embedded image as the first block's modulated norm sees it."""
        return modulated(img, modulation[:, 0:1], modulation[:, 1:2])

    @abstractmethod
    def some_blocks(
        self,
        img: Tensor,
        txt: Tensor,
        rope: Rope,
        modulation: Tensor,
        start: int,
        stop: int,
        *,
        merge: Callable[[str, int], Merge | None] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Both streams after the blocks from `start` to before `stop`."""

    def head(self, img: Float[Tensor, "b l d"], modulation: Float[Tensor, "m v d"]) -> Float[Tensor, "b l o"]:
        """The velocity's tokens, in the network's dtype."""
        shift, scale = modulation[:, -2:].unsqueeze(2).unbind(1)
        velocity: Tensor = self.final_layer.linear(self.ops.norm(img, shift, scale))
        return velocity

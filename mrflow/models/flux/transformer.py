"""The FLUX.1 transformer, top to bottom. Parameter names and fused layouts are those of BFL's checkpoints."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from mrflow.errors import PlanError
from mrflow.models.blocks import (
    DoubleStreamBlock,
    FinalLayer,
    Modulate,
    Transformer,
    TransformerParams,
    attended,
    clip_fp16,
    fused_linear,
    tables,
)
from mrflow.models.layers import (
    PLAIN,
    QKV,
    SINUSOID,
    Attention,
    Blocks,
    Embedder,
    Merge,
    Ops,
    QKNorm,
    Rope,
    attention,
    project,
    rope_tables,
    sinusoid,
)


@dataclass(frozen=True)
class FluxParams(TransformerParams):
    """Sizes of a FLUX transformer; the defaults are FLUX.1-dev's. `axes` are a head's channels for each axis."""

    in_channels: int = 64
    out_channels: int = 64
    context: int = 4096
    pooled: int = 768
    hidden: int = 3072
    heads: int = 24
    axes: tuple[int, ...] = (16, 56, 56)
    mlp_ratio: float = 4.0
    double_blocks: int = 19
    single_blocks: int = 38
    guidance: bool = True
    theta: float = 10000.0


def image_ids(h: int, w: int, *, device: torch.device | str | None = None) -> Float[Tensor, "l 3"]:
    """Positions (0, row, column) of an h x w grid of tokens, counted from 0, row by row."""
    ids = torch.zeros(h, w, 3, device=device)
    ids[..., 1] = torch.arange(h, device=device)[:, None]
    ids[..., 2] = torch.arange(w, device=device)
    return ids.flatten(0, 1)


def rows_alone(x: Tensor) -> bool:
    """Whether products of these rows (b, n, d) alone have the bits they have among others: not of few, nor of half."""
    return x.device.type != "cpu" or (x.dtype == torch.float32 and x.shape[1] >= 64)


class SingleBlock(nn.Module):
    """Attention and MLP side by side on the joint sequence: one linear in, one out."""

    def __init__(self, p: FluxParams, *, split: bool) -> None:
        super().__init__()
        self.heads, self.rows = p.heads, (p.hidden, p.hidden, p.hidden, p.mlp)
        self.linear1 = fused_linear(p.hidden, self.rows, split=split)
        self.linear2 = nn.Linear(p.hidden + p.mlp, p.hidden)
        self.norm = QKNorm(p.head)
        self.modulation = Modulate(p.hidden, 3)

    def forward(
        self,
        x: Float[Tensor, "b n d"],
        rope: Rope,
        vectors: tuple[Tensor, ...],
        attend: Attention,
        *,
        text: int = 0,
        last: bool = False,
        merge: Merge | None = None,
        ops: Ops = PLAIN,
    ) -> Float[Tensor, "b m d"]:
        """The joint sequence after the block, of which the `last` gives the image alone; `vectors`: shift, scale, gate.

        Text that nobody reads any more is left out where `rows_alone` allows. With `merge` it works on merged image
        tokens; `text` ones stand before them.
        """
        first = text if last and rows_alone(x[:, text:]) else 0
        shift, scale, gate = vectors
        given = ops.norm(x, shift, scale)
        merged = merge(given[:, text:]) if merge is not None else None
        if merged is not None:
            given, rope = torch.cat((given[:, :text], merged.down(given[:, text:])), 1), merged.rope
        *qkv, inner = project(self.linear1, given, self.rows, first=(first, 0, 0, first))
        q, k, v = (part.unflatten(-1, (self.heads, -1)) for part in qkv)
        out = attended(attend, *ops.joint_heads((QKV(q, k, v, *self.norm.scales),), rope))
        change: Tensor = self.linear2(ops.gelu_beside(out, inner))
        if merged is not None:
            change = torch.cat((change[:, : text - first], merged.up(change[:, text - first :])), 1)
        x = clip_fp16(ops.gated(x[:, first:], gate, change))
        return x[:, text - first :] if last else x


class Flux(Transformer):
    """v(x, sigma): image tokens and what steers them to the velocity d x / d sigma.

    `attention` is the function that every block calls; put another in its place to change it (b h n d each). `split`
    keeps the fused projections as the separate matrices that diffusers' files hold, so that those can stay mapped.
    """

    params: FluxParams  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(self, params: FluxParams, *, split: bool = False) -> None:
        super().__init__()
        self.params = p = params  # pyright: ignore[reportIncompatibleVariableOverride]
        self.attention: Attention = attention
        self.img_in = nn.Linear(p.in_channels, p.hidden)
        self.txt_in = nn.Linear(p.context, p.hidden)
        self.time_in = Embedder(SINUSOID, p.hidden)
        self.vector_in = Embedder(p.pooled, p.hidden)
        self.guidance_in = Embedder(SINUSOID, p.hidden) if p.guidance else None
        double = (DoubleStreamBlock(p, split=split) for _ in range(p.double_blocks))
        self.double_blocks = Blocks[DoubleStreamBlock](double)
        self.single_blocks = Blocks[SingleBlock](SingleBlock(p, split=split) for _ in range(p.single_blocks))
        self.final_layer = FinalLayer(p)
        self.final_layer.scale_first = split

    def forward(
        self,
        tokens: Float[Tensor, "b l i"],
        ids: Float[Tensor, "l 3"],
        context: Float[Tensor, "b t c"],
        context_ids: Float[Tensor, "t 3"],
        pooled: Float[Tensor, "b p"],
        sigma: Float[Tensor, " b"],
        guidance: Float[Tensor, " b"] | None,
        *,
        modulation: Float[Tensor, "b m d"] | None = None,
        rope: Rope | None = None,
    ) -> Float[Tensor, "b l o"]:
        """The velocity in the network's dtype; `modulation` and `rope` are used instead of being computed, if given."""
        if modulation is None:
            (modulation,) = self.tables([sigma], guidance, pooled)
        rope = rope or self.rope(ids, context_ids)
        img, txt = self.embed_image(tokens), self.embed_text(context)
        img, _ = self.some_blocks(img, txt, rope, modulation, 0, len(self.stack()))
        return self.head(img, modulation)

    def rope(self, ids: Float[Tensor, "l 3"], context_ids: Float[Tensor, "t 3"]) -> Rope:
        """Rotations of the joint sequence, text first."""
        return rope_tables(torch.cat((context_ids, ids)), self.params.axes, theta=self.params.theta)

    def tables(
        self, sigmas: Sequence[Float[Tensor, " b"]], guidance: Float[Tensor, " b"] | None, pooled: Float[Tensor, "b p"]
    ) -> list[Float[Tensor, "b m d"]]:
        """Every modulation vector at several levels, in order: (shift, 1 + scale, gate) each time, the last no gate.

        They depend on nothing else, so a chain can have them made before.
        """
        vectors = [self.conditioning_vector(sigma, guidance, pooled) for sigma in sigmas]
        made = tables(self.modulators(), vectors, self.params.hidden, scale_first=self.final_layer.scale_first)
        return [table.to(self.stream_dtype) for table in made]

    def stack(self) -> list[nn.Module]:
        """All blocks in the order they run."""
        return [*self.double_blocks, *self.single_blocks]

    def modulators(self) -> Iterator[nn.Module]:
        """The linears that make modulation vectors, in the order of use."""
        for block in self.double_blocks:
            yield from (block.img_mod.lin, block.txt_mod.lin)
        for single in self.single_blocks:
            yield single.modulation.lin
        yield self.final_layer.adaLN_modulation[1]

    def conditioning_vector(
        self, sigma: Float[Tensor, " b"], guidance: Float[Tensor, " b"] | None, pooled: Float[Tensor, "b p"]
    ) -> Float[Tensor, "b d"]:
        """SiLU of the sum of the embeddings of level, guidance and pooled text: what every modulation starts from.

        The reference rounds 1000 sigma to the working dtype, divides by 1000 and multiplies again in it (in bfloat16
        863.32 becomes 864, guidance 3.5 becomes 3504): so do we (diffusers `pipeline_flux.py`, `transformer_flux.py`).
        """
        dtype = self.dtype
        time = (1000 * sigma.float()).to(dtype) / 1000 * 1000
        vector = self.time_in(sinusoid(time, SINUSOID).to(dtype))
        if self.guidance_in is not None:
            if guidance is None:
                raise PlanError("this transformer has a guidance embedding: give `guidance`, one value an item")
            vector = vector + self.guidance_in(sinusoid(1000 * guidance.to(dtype), SINUSOID).to(dtype))
        elif guidance is not None:
            raise PlanError("this transformer has no guidance embedding: `guidance` must be None")
        return F.silu(vector + self.vector_in(pooled.to(dtype)))

    def embed_text(self, context: Float[Tensor, "b t c"]) -> Float[Tensor, "b t d"]:
        """The text stream; it does not depend on the level."""
        text: Tensor = self.txt_in(context.to(self.stream_dtype))
        return text

    def some_blocks(
        self,
        img: Float[Tensor, "b l d"],
        txt: Float[Tensor, "b t d"],
        rope: Rope,
        modulation: Float[Tensor, "b m d"],
        start: int,
        stop: int,
        *,
        merge: Callable[[str, int], Merge | None] | None = None,
    ) -> tuple[Float[Tensor, "b l d"], Float[Tensor, "b u d"]]:
        """Both streams after the blocks from `start` to before `stop`, counted through both kinds.

        The last of all leaves the text empty. `rope` has a row for each token of text, then of image. `merge` says, for
        the n-th block of a kind ("double", "single"), how it merges image tokens.
        """
        vectors = modulation.unsqueeze(2).unbind(1)
        doubles = len(self.double_blocks)
        for i, block in enumerate(self.double_blocks):
            if start <= i < stop:
                how = merge("double", i) if merge is not None else None
                img, txt = block(img, txt, rope, vectors[12 * i : 12 * i + 12], self.attention, merge=how, ops=self.ops)
        if stop <= max(start, doubles):
            return img, txt
        x = torch.cat((txt, img), 1)
        count = doubles + len(self.single_blocks)
        for i, single in enumerate(self.single_blocks, doubles):
            if start <= i < stop:
                at = 9 * doubles + 3 * i
                how = merge("single", i - doubles) if merge is not None else None
                own, last = vectors[at : at + 3], i == count - 1
                x = single(x, rope, own, self.attention, text=txt.shape[1], last=last, merge=how, ops=self.ops)
        text = txt.shape[1] if stop < count else 0
        return x[:, text:], x[:, :text]

"""The Z-Image transformer (arXiv 2511.22699), top to bottom: one stream of text and image, refined apart before.

Parameter names are those of the published single files where the parts are linears; diffusers' are in `weights.py`.
The second stream of our interface is the text, then the tokens that fill the image up to a whole number of 32.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from mrflow.models.blocks import FinalLayer, Transformer, TransformerParams, attended, clip_fp16, fused_linear
from mrflow.models.layers import (
    PLAIN,
    QKV,
    SINUSOID,
    Attention,
    Blocks,
    Embedder,
    Merge,
    Ops,
    RMSNorm,
    Rope,
    attention,
    project,
    rope_tables,
    sinusoid,
)

EPS = 1e-5  # of every norm but the last
WHOLE = 32  # text and image are filled up to a multiple of so many tokens


@dataclass(frozen=True)
class ZImageParams(TransformerParams):
    """Sizes of a Z-Image transformer; the defaults are the published ones.

    `mlp_ratio` counts three matrices as two; `level` and `time` are the outer and inner width of the level's embedding.
    """

    in_channels: int = 64
    out_channels: int = 64
    context: int = 2560
    hidden: int = 3840
    heads: int = 30
    axes: tuple[int, ...] = (32, 48, 48)
    mlp_ratio: float = 4.0
    layers: int = 30
    refiners: int = 2
    theta: float = 256.0
    level: int = 256
    time: int = 1024

    @property
    def mlp(self) -> int:
        """Inner width of the gated MLPs."""
        return round(self.hidden * self.mlp_ratio * 2 / 3)


def missing_tokens(tokens: int) -> int:
    """Tokens that are missing to a whole number of 32."""
    return -tokens % WHOLE


def positions_zimage(h: int, w: int, text: int, *, device: torch.device | str | None = None) -> Float[Tensor, "n 3"]:
    """Positions (order, row, column) of `text` tokens, of what fills the image up, and of an h x w grid: text counts
    from 1, the image lies one behind its end, the filling at the origin (diffusers `patchify_and_embed`).
    """
    out = torch.zeros(text + missing_tokens(h * w) + h * w, 3, device=device)
    out[:text, 0] = torch.arange(1, text + 1, device=device)
    grid = out[len(out) - h * w :].view(h, w, 3)
    grid[..., 0] = text + 1
    grid[..., 1], grid[..., 2] = torch.arange(h, device=device)[:, None], torch.arange(w, device=device)
    return out


class GatedMlp(nn.Module):
    """w2 (SiLU(w1 x) * w3 x), without biases."""

    def __init__(self, p: ZImageParams) -> None:
        super().__init__()
        self.w1, self.w3 = (nn.Linear(p.hidden, p.mlp, bias=False) for _ in range(2))
        self.w2 = nn.Linear(p.mlp, p.hidden, bias=False)

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        """Each token by itself."""
        out: Tensor = self.w2(F.silu(self.w1(x)) * self.w3(x))
        return out


class SelfAttention(nn.Module):
    """Attention without biases, with norms of queries and keys."""

    def __init__(self, p: ZImageParams, *, split: bool) -> None:
        super().__init__()
        self.heads, self.rows = p.heads, (p.hidden,) * 3
        self.qkv = fused_linear(p.hidden, self.rows, split=split, bias=False)
        self.q_norm, self.k_norm = (RMSNorm(p.head, late=True, eps=EPS) for _ in range(2))
        self.out = nn.Linear(p.hidden, p.hidden, bias=False)

    def forward(self, x: Float[Tensor, "b n d"], rope: Rope, attend: Attention, ops: Ops = PLAIN) -> Tensor:
        """Every token attends to all; (b, n, d)."""
        q, k, v = (part.unflatten(-1, (self.heads, -1)) for part in project(self.qkv, x, self.rows))
        stream = QKV(q, k, v, self.q_norm.scale, self.k_norm.scale)
        out: Tensor = self.out(attended(attend, *ops.joint_heads((stream,), rope, EPS, late=True)))
        return out


class Block(nn.Module):
    """Attention and a gated MLP, each between two norms; modulated by scale and gate, or not at all."""

    def __init__(self, p: ZImageParams, *, split: bool, modulated: bool = True) -> None:
        super().__init__()
        self.attention = SelfAttention(p, split=split)
        self.feed_forward = GatedMlp(p)
        self.attention_norm1, self.attention_norm2, self.ffn_norm1, self.ffn_norm2 = (
            RMSNorm(p.hidden, late=True, eps=EPS) for _ in range(4)
        )
        self.adaLN_modulation = nn.Sequential(*([nn.Linear(p.level, 4 * p.hidden)] if modulated else []))

    def forward(
        self,
        x: Float[Tensor, "b n d"],
        rope: Rope,
        vectors: Sequence[Tensor] | None,
        attend: Attention,
        *,
        text: int = 0,
        merge: Merge | None = None,
        ops: Ops = PLAIN,
    ) -> Float[Tensor, "b n d"]:
        """The sequence after the block; `vectors` are 1 + scale and tanh(gate) of attention, then of the MLP.

        With `merge` both work on merged image tokens, which are those behind the first `text` ones.
        """
        scale1, gate1, scale2, gate2 = vectors or (x.new_ones(1, 1, x.shape[-1]),) * 4
        norms = (self.attention_norm1, self.attention_norm2, self.ffn_norm1, self.ffn_norm2)
        before1, after1, before2, after2 = (norm.scale for norm in norms)
        given, down, up = ops.rms_scaled(x, before1, scale1, EPS), None, None
        if merge is not None:
            merged = merge(given[:, text:])
            down, up, rope = merged.down, merged.up, behind(merged.rope, merged.text - text)
        change = on_image(up, self.attention(on_image(down, given, text), rope, attend, ops), text)
        x = ops.rms_gated(x, gate1, change, after1, EPS)
        given = ops.rms_scaled(x, before2, scale2, EPS)
        change = on_image(up, self.feed_forward(on_image(down, given, text)), text)
        return clip_fp16(ops.rms_gated(x, gate2, change, after2, EPS))


def on_image(f: Callable[[Tensor], Tensor] | None, x: Float[Tensor, "b n d"], text: int) -> Float[Tensor, "b m d"]:
    """The sequence with `f` of its tokens behind the first `text` ones."""
    return x if f is None else torch.cat((x[:, :text], f(x[:, text:])), 1)


def behind(rope: Rope, start: int) -> Rope:
    """The rotations of tokens from `start` on."""
    return Rope(rope.cos[..., start:, :], rope.sin[..., start:, :])


class ZImage(Transformer):
    """v(x, sigma): image tokens and text states to the velocity d x / d sigma.

    `attention` and `split` are as in `Flux`. Inside a token of the image the channel is the fastest index.
    """

    embedder = "x_embedder"
    params: ZImageParams  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(self, params: ZImageParams, *, split: bool = False) -> None:
        super().__init__()
        self.params = p = params  # pyright: ignore[reportIncompatibleVariableOverride]
        self.attention: Attention = attention
        self.x_embedder = nn.Linear(p.in_channels, p.hidden)
        self.cap_embedder = nn.Sequential(RMSNorm(p.context, late=True, eps=EPS), nn.Linear(p.context, p.hidden))
        self.t_embedder = Embedder(SINUSOID, p.time, p.level)
        self.x_pad_token, self.cap_pad_token = (nn.Parameter(torch.zeros(1, p.hidden)) for _ in range(2))
        self.context_refiner = Blocks[Block](Block(p, split=split, modulated=False) for _ in range(p.refiners))
        self.noise_refiner = Blocks[Block](Block(p, split=split) for _ in range(p.refiners))
        self.layers = Blocks[Block](Block(p, split=split) for _ in range(p.layers))
        self.final_layer = FinalLayer(p, given=p.level, vectors=1)

    def rope(self, places: Float[Tensor, "n 3"]) -> Rope:
        """Rotations of tokens at these positions."""
        return rope_tables(places, self.params.axes, theta=self.params.theta)

    def tables(self, sigmas: Sequence[Float[Tensor, " b"]]) -> list[Float[Tensor, "b m d"]]:
        """Every modulation vector at several levels: 1 + scale and tanh(gate) twice a block, 1 + scale at the end."""
        *blocks, last = self.modulators()
        vectors = [self.conditioning_vector(sigma) for sigma in sigmas]
        rows = [[linear(vector) for vector in vectors] for linear in blocks]  # each serves all levels, then the next
        rows.append([last(F.silu(vector)) for vector in vectors])
        joined = (torch.cat(row, -1).to(self.stream_dtype) for row in zip(*rows, strict=True))
        out = [row.unflatten(-1, (-1, self.params.hidden)) for row in joined]
        for table in out:
            table[:, 1::2] = table[:, 1::2].tanh()
            table[:, ::2] += 1
        return out

    def stack(self) -> list[nn.Module]:
        """The blocks of every evaluation in the order they run; the text's refiners run once for all."""
        return [*self.noise_refiner, *self.layers]

    def modulators(self) -> Iterator[nn.Module]:
        """The linears that make modulation vectors, in the order of use."""
        for block in (*self.noise_refiner, *self.layers):
            yield block.adaLN_modulation[0]
        yield self.final_layer.adaLN_modulation[1]

    def conditioning_vector(self, sigma: Float[Tensor, " b"]) -> Float[Tensor, "b e"]:
        """The embedded level, counted from noise and rounded as in the pipeline: what every modulation starts from."""
        time = (1000 - 1000 * sigma.float()) / 1000 * 1000
        return self.t_embedder(sinusoid(time, SINUSOID).to(self.dtype))  # type: ignore[no-any-return]

    def embed_text(self, context: Sequence[Float[Tensor, "_ c"]]) -> Float[Tensor, "b n d"]:
        """The refined text of each item, filled up to a multiple of 32, alike for all; no level changes it."""
        own = [self.cap_embedder(states.to(self.stream_dtype)) for states in context]
        rows = [torch.cat((states, self.cap_pad_token.expand(missing_tokens(len(states)), -1))) for states in own]
        text = torch.stack(rows)
        rope = self.rope(positions_zimage(0, 0, text.shape[1], device=text.device))
        for block in self.context_refiner:
            text = block(text, rope, None, self.attention, ops=self.ops)
        return text

    def fill(self, text: Float[Tensor, "b n d"], image: int) -> Float[Tensor, "b m d"]:
        """What goes before `image` tokens: the text, and what fills the image up."""
        return torch.cat((text, self.x_pad_token.expand(len(text), missing_tokens(image), -1)), 1)

    def modulated_input(self, img: Float[Tensor, "b l d"], modulation: Float[Tensor, "m v d"]) -> Tensor:
        """The embedded image as the first block's attention takes it."""
        return torch.mul((*self.noise_refiner, *self.layers)[0].attention_norm1(img), modulation[:, 0:1])

    def some_blocks(
        self,
        img: Float[Tensor, "b l d"],
        txt: Float[Tensor, "b t d"],
        rope: Rope,
        modulation: Float[Tensor, "m v d"],
        start: int,
        stop: int,
        *,
        merge: Callable[[str, int], Merge | None] | None = None,
    ) -> tuple[Float[Tensor, "b l d"], Float[Tensor, "b t d"]]:
        """Both streams after the blocks from `start` to before `stop`; `merge` as in `Flux`, all "single"."""
        vectors = modulation.unsqueeze(2).unbind(1)
        x, t = torch.cat((txt, img), 1), txt.shape[1]
        apart = t - missing_tokens(img.shape[1])  # the text, which the image's refiners do not see
        for i, block in enumerate((*self.noise_refiner, *self.layers)):
            if start <= i < stop:
                how = merge("single", i) if merge is not None else None
                own = vectors[4 * i : 4 * i + 4]
                lead = apart if i < len(self.noise_refiner) else 0
                turn, rest = behind(rope, lead), t - lead
                seen = block(x[:, lead:], turn, own, self.attention, text=rest, merge=how, ops=self.ops)
                x = torch.cat((x[:, :lead], seen), 1) if lead else seen
        return x[:, t:], x[:, :t]

    def head(self, img: Float[Tensor, "b l d"], modulation: Float[Tensor, "m v d"]) -> Float[Tensor, "b l o"]:
        """The image stream to the velocity: the network itself gives its negative."""
        norm = F.layer_norm(img, (img.shape[-1],), eps=1e-6)
        return torch.neg(self.final_layer.linear(norm * modulation[:, -1:]))

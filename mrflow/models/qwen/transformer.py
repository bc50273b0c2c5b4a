"""The Qwen-Image transformer, top to bottom: two-stream blocks only, and modulations that depend on the level alone.

Parameter names are those of `flux.py` where the parts are the same; diffusers' names are in `weights.py`.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from mrflow.errors import PlanError
from mrflow.models.blocks import DoubleStreamBlock, FinalLayer, Transformer, TransformerParams, clip_fp16, tables
from mrflow.models.layers import (
    SINUSOID,
    Attention,
    Blocks,
    Embedder,
    Merge,
    RMSNorm,
    Rope,
    attention,
    frequencies,
    rope_tables,
)

MAX_POSITION = 4096  # the reference's tables of text positions end there


@dataclass(frozen=True)
class QwenParams(TransformerParams):
    """Sizes of a Qwen-Image transformer; the defaults are the published ones."""

    in_channels: int = 64
    out_channels: int = 64
    context: int = 3584
    hidden: int = 3072
    heads: int = 24
    axes: tuple[int, ...] = (16, 56, 56)
    mlp_ratio: float = 4.0
    double_blocks: int = 60
    theta: float = 10000.0


def positions_qwen(h: int, w: int, text: int, *, device: torch.device | str | None = None) -> Float[Tensor, "n 3"]:
    """Positions of `text` tokens, then of an h x w grid, on the axes (frame, row, column).

    Rows and columns are counted from the middle, an odd grid has one more below zero; text goes on along the diagonal
    from max(h // 2, w // 2) (diffusers `QwenEmbedRope` with scale_rope).

    Raises:
        PlanError: text positions go beyond the reference's tables.
    """
    start = max(h // 2, w // 2)
    if start + text > MAX_POSITION:
        raise PlanError(f"{text} text tokens beside a grid of {h}x{w} go beyond position {MAX_POSITION}")
    words = torch.arange(start, start + text, dtype=torch.float32, device=device)[:, None].expand(text, 3)
    grid = torch.zeros(h, w, 3, device=device)
    grid[..., 1] = torch.arange(h // 2 - h, h // 2, device=device)[:, None]
    grid[..., 2] = torch.arange(w // 2 - w, w // 2, device=device)
    return torch.cat((words, grid.flatten(0, 1)))


def packed_attention(
    q: Float[Tensor, "1 h n d"],
    k: Float[Tensor, "1 h n d"],
    v: Float[Tensor, "1 h n d"],
    *,
    texts: Sequence[int],
    image: int,
    attend: Attention = attention,
) -> Float[Tensor, "1 h n d"]:
    """Attention within each item of one long sequence: all texts (of these lengths), then all images.

    Neighbours with texts of one length are attended to together; nothing is padded or masked.
    """
    by_token = [x.transpose(1, 2)[0] for x in (q, k, v)]  # (n, h, d), as blocks make them
    out = torch.empty_like(by_token[0])
    text_at, image_at = 0, sum(texts)
    for length, group in groupby(texts):
        count = len(list(group))
        spans = (slice(text_at, text_at + count * length), slice(image_at, image_at + count * image))
        parts = [torch.cat([x[span].unflatten(0, (count, -1)) for span in spans], 1).transpose(1, 2) for x in by_token]
        mixed = attend(parts[0], parts[1], parts[2]).transpose(1, 2)
        for span, part in zip(spans, mixed.split((length, image), 1), strict=True):
            out[span] = part.flatten(0, 1)
        text_at, image_at = spans[0].stop, spans[1].stop
    return out[None].transpose(1, 2)


class QwenImage(Transformer):
    """v(x, sigma): image tokens and text states to the velocity d x / d sigma.

    `attention` is the function that every block calls, `split` keeps projections apart: see `Flux`.
    """

    params: QwenParams  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(self, params: QwenParams, *, split: bool = False) -> None:
        super().__init__()
        self.params = p = params  # pyright: ignore[reportIncompatibleVariableOverride]
        self.attention: Attention = attention
        self.img_in = nn.Linear(p.in_channels, p.hidden)
        self.txt_norm = RMSNorm(p.context, late=True)
        self.txt_in = nn.Linear(p.context, p.hidden)
        self.time_in = Embedder(SINUSOID, p.hidden)
        double = (DoubleStreamBlock(p, split=split) for _ in range(p.double_blocks))
        self.double_blocks = Blocks[DoubleStreamBlock](double)
        self.final_layer = FinalLayer(p)
        self.final_layer.scale_first = split

    def rope(self, places: Float[Tensor, "n 3"]) -> Rope:
        """Rotations of tokens at these positions."""
        return rope_tables(places, self.params.axes, theta=self.params.theta)

    def tables(self, sigmas: Sequence[Float[Tensor, " b"]]) -> list[Float[Tensor, "b m d"]]:
        """Every modulation vector at several levels; they depend on nothing else, so all prompts share them."""
        vectors = [self.conditioning_vector(sigma) for sigma in sigmas]
        made = tables(self.modulators(), vectors, self.params.hidden, scale_first=self.final_layer.scale_first)
        return [table.to(self.stream_dtype) for table in made]

    def stack(self) -> list[nn.Module]:
        """All blocks in the order they run."""
        return list(self.double_blocks)

    def modulators(self) -> Iterator[nn.Module]:
        """The linears that make modulation vectors, in the order of use."""
        for block in self.double_blocks:
            yield block.img_mod.lin
            yield block.txt_mod.lin
        yield self.final_layer.adaLN_modulation[1]

    def conditioning_vector(self, sigma: Float[Tensor, " b"], embedder: Embedder | None = None) -> Float[Tensor, "b d"]:
        """SiLU of the embedded level: what every modulation starts from.

        As in the reference, 1000 sigma is rounded to the working dtype and divided by 1000 in it; the sinusoid is that
        times its frequencies, times 1000, in float32 (diffusers `pipeline_qwenimage.py`, `embeddings.py`). `embedder`
        stands in for the network's own, on another device.
        """
        level = (1000 * sigma.float()).to(self.dtype) / 1000
        angles = 1000 * (level.float()[:, None] * frequencies(SINUSOID // 2, sigma.device))
        embedded = torch.cat((angles.cos(), angles.sin()), -1)
        return F.silu((embedder or self.time_in)(embedded.to(self.dtype)))

    def embed_text(self, context: Float[Tensor, "b t c"]) -> Float[Tensor, "b t d"]:
        """The text stream; it does not depend on the level."""
        text: Tensor = self.txt_in(self.txt_norm(context.to(self.stream_dtype)))
        return text

    def some_blocks(
        self,
        img: Float[Tensor, "b l d"],
        txt: Float[Tensor, "b t d"],
        rope: Rope,
        modulation: Float[Tensor, "m v d"],
        start: int,
        stop: int,
        *,
        attend: Attention | None = None,
        merge: Callable[[str, int], Merge | None] | None = None,
    ) -> tuple[Float[Tensor, "b l d"], Float[Tensor, "b u d"]]:
        """Both streams after the blocks from `start` to before `stop`; the last of all leaves the text empty.

        `merge` as for `Flux`.
        """
        vectors = modulation.unsqueeze(2).unbind(1)
        last = len(self.double_blocks) - 1
        for i, block in enumerate(self.double_blocks):
            if start <= i < stop:
                own = vectors[12 * i : 12 * i + 12]
                how = merge("double", i) if merge is not None else None
                img, txt = block(img, txt, rope, own, attend or self.attention, last=i == last, merge=how, ops=self.ops)
                img = clip_fp16(img)
        return img, txt

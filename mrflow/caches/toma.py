"""ToMA (arXiv 2509.10918): image tokens that are alike are merged before a block's work and parted after it."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol, runtime_checkable

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from mrflow._checks import check_whole, is_number, require
from mrflow.caches.base import Cache
from mrflow.caches.clock import Clock, Evaluation, Rule
from mrflow.cost import forward_flops
from mrflow.display.notes import add_forwards
from mrflow.errors import PlanError
from mrflow.model_info import ModelInfo
from mrflow.models.layers import Merge, Rope, TokenMerge
from mrflow.protocols.pieces import Pieces, TransformerStep


@runtime_checkable
class MergingPieces(Pieces, Protocol):
    """Pieces whose blocks can merge image tokens."""

    def merged(
        self,
        img: Tensor,
        txt: Tensor,
        cos: Tensor,
        sin: Tensor,
        table: Tensor,
        merge: Callable[[str, int], Merge | None],
    ) -> tuple[Tensor, Tensor]:
        """Both streams after all blocks, of which the n-th of a kind ("double", "single") merges as `merge` says."""
        ...


@dataclass(frozen=True)
class ToMA(Cache):
    """Merges the share `ratio` of the image tokens away, in each `every`-th evaluation, but for the first blocks.

    In each tile of at most `tile` x `tile` tokens some are destinations: greedily those that raise the sum over all
    tokens of the largest cosine to a destination (facility location). Every token is shared among the destinations by a
    softmax of `sharpness` times its cosine to them; a merged token is the weighted mean of its shares, and gives the
    same shares back. It has its destination's rotary position. Destinations are chosen in the first merged block of
    each kind, for each picture by itself; the first `skip` blocks of each kind are not merged. Text is not merged, nor
    what comes after a two-stream block's attention.

    Not a cache: every evaluation is computed, with less in it. It stands in the same slot because it, too, is a way to
    open a model's field. The published setting for FLUX.1 is the default; its tiles are 4 x 4 tokens at 1024 pixels.
    """

    ratio: float = 0.5
    tile: int = 4
    every: int = 3
    skip: int = 5
    sharpness: float = 1000.0

    def __post_init__(self) -> None:
        require(is_number(self.ratio) and 0 <= self.ratio < 1, "ratio", "from 0 to below 1", self.ratio)
        for name, value, least in (("tile", self.tile, 1), ("every", self.every, 1), ("skip", self.skip, 0)):
            check_whole(name, value, least)
        require(is_number(self.sharpness) and self.sharpness > 0, "sharpness", "above 0", self.sharpness)

    def rule(self, info: ModelInfo, sigmas: Sequence[float]) -> Rule:
        """Every evaluation is computed."""

        def always(look: Evaluation) -> bool:
            return True

        return always

    def share(self, info: ModelInfo, tokens: int) -> float:
        """What an evaluation costs on the average, as a part of a whole one; choosing and merging are not counted."""
        a = info.architecture
        if a is None:
            return 1.0
        d, t, left = a.hidden, a.text_tokens, tokens - self._gone(tokens)
        pairs = {n: (t + n) ** 2 for n in (tokens, left)}
        whole = forward_flops(info, tokens)
        double = (6 + 2) * d * d * (tokens - left) + 4 * d * (pairs[tokens] - pairs[left])
        single = (8 + 4 * a.mlp_ratio) * d * d * (tokens - left) + 4 * d * (pairs[tokens] - pairs[left])
        saved = max(0, a.double_blocks - self.skip) * double + max(0, a.single_blocks - self.skip) * single
        return 1 - saved / whole / self.every if whole else 1.0

    def _gone(self, tokens: int) -> int:
        """Tokens that are merged away, where the grid is of whole tiles."""
        per_tile = self.tile**2
        return tokens // per_tile * math.floor(per_tile * self.ratio)

    def make_step(self, pieces: Pieces, clock: Clock, info: ModelInfo) -> TransformerStep:
        """The step that merges.

        Raises:
            PlanError: the blocks cannot merge.
        """
        if not isinstance(pieces, MergingPieces):
            raise PlanError(
                "token merging works inside mrflow's own blocks; load FLUX.1 or Qwen-Image with mrflow.load"
            )
        return _Step(self, pieces, clock, info)


class _Step:
    """One field's step."""

    def __init__(self, toma: ToMA, pieces: MergingPieces, clock: Clock, info: ModelInfo) -> None:
        self.toma, self.pieces, self.clock, self.info, self.index = toma, pieces, clock, info, 0

    def __call__(
        self, tokens: Tensor, text: Tensor, cos: Tensor, sin: Tensor, table: Tensor, /, *, key: object = None
    ) -> Tensor:
        """The velocity's tokens."""
        p = self.pieces
        img, size = p.embed(tokens), tokens.shape[1]
        merging = self.toma.ratio > 0 and self.index % self.toma.every == 0
        if merging:
            found: dict[str, TokenMerge] = {}
            merge = partial(self._merge, found, Rope(cos, sin))
            img, _ = p.merged(img, text, cos, sin, table, merge)
        else:
            img, _ = p.run(img, text, cos, sin, table, 0, p.count)
        self.index += 1
        add_forwards("ToMA", len(tokens), len(tokens), len(tokens) * self.toma.share(self.info, size), tokens=size)
        return p.head(img, table)

    def _merge(self, found: dict[str, TokenMerge], rope: Rope, kind: str, number: int) -> Merge | None:
        """How block `number` of a kind merges its image tokens; None where it does not."""
        if number < self.toma.skip:
            return None

        def merge(x: Tensor) -> TokenMerge:
            if kind not in found:
                grid = self.clock.grid
                assert grid is not None
                found[kind] = chosen(x, grid, rope, self.toma)
            return found[kind]

        return merge


def chosen(x: Float[Tensor, "b l d"], grid: tuple[int, int], rope: Rope, toma: ToMA) -> TokenMerge:
    """How tokens on a grid are merged and parted."""
    h, w = grid
    th, tw = (max(n for n in range(1, toma.tile + 1) if side % n == 0) for side in (h, w))
    split = "b (y i x j) d -> b (y x) (i j) d"
    sizes = {"y": h // th, "x": w // tw, "i": th, "j": tw}
    tiles = rearrange(x, split, **sizes)
    n = th * tw
    k = n - math.floor(n * toma.ratio)
    unit = torch.nn.functional.normalize(tiles.float(), dim=-1)
    likeness = unit @ unit.transpose(-1, -2)  # (b, tiles, n, n)
    where = destinations(likeness, k)
    rows = likeness.gather(2, where[..., None].expand(-1, -1, -1, n))  # (b, tiles, k, n)
    shares = (toma.sharpness * rows).softmax(2)
    towards = (shares / shares.sum(3, keepdim=True).clamp(min=1e-12)).to(x.dtype)
    back = shares.transpose(2, 3).to(x.dtype)

    def down(y: Tensor) -> Tensor:
        out: Tensor = (towards @ rearrange(y, split, **sizes)).flatten(1, 2)
        return out

    def up(y: Tensor) -> Tensor:
        parted = back @ y.unflatten(1, (-1, k))
        out: Tensor = rearrange(parted, "b (y x) (i j) d -> b (y i x j) d", **sizes)
        return out

    text = len(rope.cos) - h * w
    index = rearrange(torch.arange(h * w, device=x.device), "(y i x j) -> (y x) (i j)", **sizes)
    spots = index[None].expand(len(x), -1, -1).gather(2, where).flatten(1)  # (b, merged tokens)

    def turned(table: Tensor) -> Tensor:
        ours = table[text:][spots]
        return torch.cat((table[:text].expand(len(x), -1, -1), ours), 1)

    return TokenMerge(down, up, Rope(turned(rope.cos), turned(rope.sin)), text)


def destinations(likeness: Float[Tensor, "b t n n"], k: int) -> Tensor:
    """k of the n tokens of each tile (b, t, k), in order, by greedy facility location.

    The first has the largest sum of likenesses; each next one raises the sum over all tokens of the largest likeness
    to a chosen one the most. Two tokens that are each other's nearest often raise it alike: the earlier one is taken,
    whatever the last digits say, so that a picture does not depend on the batch it is made in.
    """
    earlier = 1e-5 * torch.arange(likeness.shape[-1], device=likeness.device)
    picked = [(likeness.sum(-1) - earlier).argmax(-1)]
    best = likeness.gather(2, picked[0][..., None, None].expand(-1, -1, 1, likeness.shape[-1]))[:, :, 0]
    taken = torch.zeros_like(best, dtype=torch.bool).scatter_(2, picked[0][..., None], value=True)
    for _ in range(k - 1):
        gain = (likeness - best[:, :, None]).clamp(min=0).sum(-1).masked_fill(taken, -1.0)
        picked.append((gain - earlier).argmax(-1))
        row = likeness.gather(2, picked[-1][..., None, None].expand(-1, -1, 1, likeness.shape[-1]))[:, :, 0]
        best = torch.maximum(best, row)
        taken.scatter_(2, picked[-1][..., None], value=True)
    out: Tensor = torch.stack(picked, 2).sort(2).values
    return out

"""A large tensor through a network in overlapping tiles, blended where they overlap."""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from mrflow.errors import PlanError


def in_tiles(
    f: Callable[[Tensor], Tensor],
    x: Tensor,
    *,
    tile: int,
    overlap: int,
    margin: int | None = None,
    up: int = 1,
    down: int = 1,
) -> Tensor:
    """f(x) for x of shape (b, c, h, w), made of tiles of `tile` cells a side that overlap by `overlap`.

    f changes sides by up / down; tile and overlap must be multiples of `down`. Of an overlap, the `margin` nearest to a
    tile's own border (default: a third) is not used, and over what is between the margins one tile fades into the
    next: exact for a network that reaches no farther than the margin.

    Raises:
        PlanError: the tile does not exceed the overlap, the overlap not both margins, or a size does not divide.
    """
    if tile <= overlap or overlap < 0 or tile % down or overlap % down:
        raise PlanError(f"tile ({tile}) must exceed overlap ({overlap}), both multiples of {down}")
    if margin is not None and not 0 <= 2 * margin <= overlap:
        raise PlanError(f"overlap ({overlap}) must hold a margin ({margin}) at both of its ends")
    h, w = x.shape[-2:]
    begins = windows(h, w, tile, tile, overlap, down)
    edge = overlap * up // down
    return blend(
        (f(x[..., top : top + tile, left : left + tile]) for top, left in begins),
        [(top * up // down, left * up // down) for top, left in begins],
        (h * up // down, w * up // down),
        edge=edge,
        unused=edge // 3 if margin is None else margin * up // down,
    )


def blend(
    parts: Iterable[Tensor], begins: Sequence[tuple[int, int]], size: tuple[int, int], *, edge: int, unused: int
) -> Tensor:
    """Tiles (b, c, h, w) that begin at `begins` (row, column) as one tensor of `size`, each weighted by its `ramp`.

    Raises:
        PlanError: there are no tiles.
    """
    out: Tensor | None = None
    total: Tensor | None = None
    for (i, j), y in zip(begins, parts, strict=True):
        if out is None or total is None:
            out = y.new_zeros(*y.shape[:2], *size)
            total = y.new_zeros(1, 1, *size)
        rows = ramp(y.shape[-2], edge, unused, first=i == 0, last=i + y.shape[-2] == size[0], like=y)
        columns = ramp(y.shape[-1], edge, unused, first=j == 0, last=j + y.shape[-1] == size[1], like=y)
        weight = rows[:, None] * columns
        here = (..., slice(i, i + y.shape[-2]), slice(j, j + y.shape[-1]))
        out[here] += y * weight
        total[here] += weight
    if out is None or total is None:
        raise PlanError(f"nothing to tile in {size}")
    return out.div_(total)


def windows(h: int, w: int, tall: int, wide: int, overlap: int, step: int = 1) -> list[tuple[int, int]]:
    """Where tiles of tall x wide cells begin on a grid of h x w, as (row, column), row by row."""
    return [(top, left) for top in starts(h, tall, overlap, step) for left in starts(w, wide, overlap, step)]


def starts(side: int, tile: int, overlap: int, step: int) -> list[int]:
    """Where tiles begin: every tile - overlap, the last moved back so that it ends with the side."""
    if side <= tile:
        return [0]
    last = side - tile
    last -= last % step
    begins = list(range(0, last, tile - overlap))
    return [*begins, last]


def ramp(length: int, edge: int, unused: int, *, first: bool, last: bool, like: Tensor) -> Tensor:
    """Weights along one side of a tile: 0 over `unused`, rising, then 1 over `unused`; but 1 at a true border."""
    weights = like.new_ones(length)
    if edge > length:
        edge, unused = length, min(unused, length // 3)
    rising = edge - 2 * unused
    slope = like.new_ones(edge)
    slope[:unused] = 0
    slope[unused : unused + rising] = torch.arange(1, rising + 1, device=like.device) / (rising + 1)
    if not first:
        weights[:edge] = slope
    if not last:
        weights[length - edge :] = torch.minimum(weights[length - edge :], slope.flip(0))
    return weights

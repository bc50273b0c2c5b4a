"""Refinement in overlapping tiles, for pictures larger than a model's attention or memory is made for."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from einops import rearrange
from torch import Tensor

from mrflow._checks import is_whole, require
from mrflow.backbone import Backbone, Condition, FieldOptions, Positions
from mrflow.errors import PlanError
from mrflow.flow import Velocity
from mrflow.guidance import Guidance
from mrflow.model_info import Capabilities, ModelInfo
from mrflow.spec import Latents
from mrflow.tiling import blend, windows


@dataclass(frozen=True)
class Tiles:
    """Tiles of `size` pixels, (height, width) or one number, that overlap by `overlap` pixels.

    At every evaluation each tile's velocity is computed by itself, and where tiles overlap it is their weighted mean:
    MultiDiffusion (arXiv 2302.08113, eq. 5, whose least squares this mean solves), with weights that fall linearly
    towards a tile's own border. So all tiles are integrated together, and memory is that of one tile.

    `positions` says where a tile's tokens lie for the network: "global", where they lie in the whole picture, or
    "local", as if the tile were a picture of its own. Every tile is given the whole prompt: at high noise levels each
    would draw it again, so tiles are for refinement.

    Raises:
        PlanError: a size is not a whole number above 0, or the overlap is not smaller than half a tile.
    """

    size: int | tuple[int, int] = 1024
    overlap: int = 256
    positions: Literal["global", "local"] = "global"

    def __post_init__(self) -> None:
        sides = self.sides
        right = len(sides) == 2 and all(is_whole(side, 1) for side in sides)
        require(right, "a tile's size", "pixels a side, or (height, width)", self.size)
        right = is_whole(self.overlap, 0) and 2 * self.overlap <= min(sides)
        require(right, "a tile's overlap", "from 0 to half of its smaller side, in pixels", self.overlap)
        require(self.positions in ("global", "local"), "a tile's positions", '"global" or "local"', self.positions)

    @property
    def sides(self) -> tuple[int, ...]:
        """Height and width in pixels."""
        return self.size if isinstance(self.size, tuple) else (self.size, self.size)

    def layout(self, spec: Latents) -> "Layout":
        """The tiles of these latents, in tokens; one for all where the picture is no larger than a tile.

        Raises:
            PlanError: size or overlap are not whole tokens.
        """
        unit, patch = spec.space.downscale * spec.space.patch, spec.space.patch
        for name, side in (("size", max(self.sides)), ("size", min(self.sides)), ("overlap", self.overlap)):
            if side % unit:
                near = max(unit, round(side / unit) * unit)
                raise PlanError(f"a tile's {name} of {side} pixels is not a multiple of {unit}; try {near}")
        h, w = spec.height // patch, spec.width // patch
        tall, wide = (min(side // unit, whole) for side, whole in zip(self.sides, (h, w), strict=True))
        begins = windows(h, w, tall, wide, self.overlap // unit)
        return Layout(h, w, tall, wide, self.overlap // unit, tuple(begins), local=self.positions == "local")


@dataclass(frozen=True)
class Layout:
    """Tiles of tall x wide tokens on a grid of height x width, with the (row, column) where each begins."""

    height: int
    width: int
    tall: int
    wide: int
    overlap: int
    begins: tuple[tuple[int, int], ...]
    local: bool = False

    def tile(self, spec: Latents) -> Latents:
        """The latents of one tile."""
        return replace(spec, height=self.tall * spec.space.patch, width=self.wide * spec.space.patch)

    @property
    def places(self) -> Positions:
        """Where the tokens of all tiles lie, one tile behind the other."""
        one = torch.cartesian_prod(torch.arange(self.tall), torch.arange(self.wide)).view(-1, 2).float()
        if self.local:
            return Positions(one.repeat(len(self.begins), 1), self.tall, self.wide, len(self.begins))
        at = torch.cat([one + torch.tensor(begin) for begin in self.begins])
        return Positions(at, self.height, self.width, len(self.begins))

    def field(self, inner: Velocity, patch: int) -> Velocity:
        """The field over the whole grid, of one over `places`."""
        begins = [(i * patch, j * patch) for i, j in self.begins]
        size = (self.height * patch, self.width * patch)

        def velocity(x: Tensor, sigma: float) -> Tensor:
            tiles = (x[..., i : i + self.tall * patch, j : j + self.wide * patch] for i, j in begins)
            row = torch.cat([rearrange(t, "b c (h p) (w q) -> b c p (h w q)", p=patch, q=patch) for t in tiles], -1)
            parts = inner(row, sigma).chunk(len(begins), -1)
            back = (rearrange(v, "b c p (h w q) -> b c (h p) (w q)", h=self.tall, q=patch) for v in parts)
            return blend(back, begins, size, edge=self.overlap * patch, unused=0)

        return velocity


class InTiles(Guidance):
    """`inner` in tiles: every evaluation is one of each tile. Made by a stage for its own use; no chain holds it."""

    def __init__(self, inner: Guidance, layout: Layout) -> None:
        self.inner, self.layout = inner, layout

    @property
    def passes(self) -> int:
        return self.inner.passes

    @property
    def needs(self) -> Capabilities:
        return self.inner.needs

    def evals(self, points: Sequence[float]) -> int:
        return self.inner.evals(points) * len(self.layout.begins)

    def field(
        self, model: Backbone, cond: Condition, negative: Condition | None, options: FieldOptions = FieldOptions()
    ) -> Velocity:
        options = replace(options, positions=self.layout.places)
        return self.layout.field(self.inner.field(model, cond, negative, options), model.info.space.patch)


def check_tiles(tiles: object, model: ModelInfo, *, cache: object, policy: object) -> None:
    """Refuse what cannot be beside tiles.

    Raises:
        PlanError: they are no `Tiles`, the model draws on whole grids only, or a cache or a policy is set.
    """
    if not isinstance(tiles, Tiles):
        raise PlanError(f"tiles takes Tiles(size, overlap), got {tiles!r}")
    model.require(Capabilities(positions=True))
    if cache is not None or model.cache is not None:
        raise PlanError("a cache remembers one picture's evaluations, not those of tiles; leave out the cache or tiles")
    if policy is not None:
        raise PlanError("a policy is followed over the whole picture; leave out the policy or tiles")

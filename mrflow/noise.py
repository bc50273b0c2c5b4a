"""Where a stage's random numbers come from. Always drawn on the CPU in float32, so every device sees the same ones."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated

import torch
from torch import Tensor

from mrflow._checks import Bound, Checked, check_whole
from mrflow.errors import PlanError


class Noise(Checked, ABC):
    """A source of standard normal tensors, one item of a batch at a time."""

    @abstractmethod
    def __call__(self, seeds: Sequence[int], shape: tuple[int, ...], *, scope: str, draw: int) -> Tensor:
        """A CPU float32 tensor of `shape`, whose first axis is the items with these seeds.

        `scope` names the use (stage kind and which of that kind), `draw` counts draws within the stage.
        """


@dataclass(frozen=True)
class PerItem(Noise):
    """A generator of its own for each (item seed, stage kind, n-th use of that kind, draw).

    Item 3 of a batch gets the noise of the single picture with that seed; adding a stage of another kind moves
    nobody's noise; a ladder's second `Reinject` does not repeat the first.
    """

    def __call__(self, seeds: Sequence[int], shape: tuple[int, ...], *, scope: str, draw: int) -> Tensor:
        out = torch.empty(shape)
        for item, seed in enumerate(seeds):
            digest = hashlib.sha256(f"{seed}/{scope}/{draw}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
            torch.randn(shape[1:], generator=generator, out=out[item])
        return out


@dataclass(frozen=True)
class Stream(Noise):
    """The published procedure's draws: one generator an item, seeded with seed + `offset`, `skip` draws passed over.

    Official MrFlow: offset 0 for the first stage; offset 1 for refinement, whose posterior noise comes first (skip 0)
    and whose injected noise second (skip 1). Draws before it must have had this draw's shape.
    """

    offset: int = 0
    skip: int = field(default=0, kw_only=True)

    def __post_init__(self) -> None:
        if self.skip < 0:
            raise PlanError(f"skip must not be negative, got {self.skip}")

    def __call__(self, seeds: Sequence[int], shape: tuple[int, ...], *, scope: str, draw: int) -> Tensor:
        out = torch.empty(shape)
        for item, seed in enumerate(seeds):
            generator = torch.Generator().manual_seed(seed + self.offset)
            for _ in range(self.skip + draw + 1):
                torch.randn(shape[1:], generator=generator, out=out[item])
        return out


@dataclass(frozen=True)
class Nested(Noise):
    """The noise of a picture `factor` times as large, block by block: the mean of factor x factor cells, times factor.

    A mean of n independent standard normals has standard deviation 1 / sqrt(n), so each cell is standard normal again,
    and cells stay independent. The low-resolution stage then begins with the coarse part of what native sampling of the
    same seed begins with.
    """

    factor: Annotated[int, Bound(check_whole, 1, 16)] = 2
    inner: Noise = field(default=PerItem(), kw_only=True)

    def __call__(self, seeds: Sequence[int], shape: tuple[int, ...], *, scope: str, draw: int) -> Tensor:
        k = self.factor
        large = self.inner(seeds, (*shape[:-2], k * shape[-2], k * shape[-1]), scope=scope, draw=draw)
        return torch.nn.functional.avg_pool2d(large, k).mul_(k)

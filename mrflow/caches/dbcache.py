"""DBCache: the first blocks are always computed, and what they add says whether the others may be left out."""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import ceil
from typing import Annotated

from torch import Tensor

from mrflow._checks import Bound, check_number, check_whole
from mrflow.caches.base import Cache, difference, interpolate
from mrflow.caches.clock import Evaluation, Rule
from mrflow.caches.extrapolate import Extrapolation, Predictor, Series
from mrflow.model_info import ModelInfo

# Share of evaluations after the warm-up that are computed, by threshold: from the speed-ups that cache-dit publishes
# for FLUX.1-dev at 50 steps (S: F4 W4 MC4 0.12, 2.66x; M: F1 W4 MC6 0.24, 3.94x; F: F1 W8 I2 MC8 0.8, 5.72x).
COMPUTED = ((0.0, 1.0), (0.12, 0.27), (0.24, 0.17), (0.8, 0.10), (1.0, 0.0))


@dataclass(frozen=True)
class DualBlock(Cache):
    """What DBCache and DMD share: which blocks always run, and when the others do; the fields are DBCache's.

    Computed are warm-up evaluations (each `every`-th of the first `warmup`), those after `limit` cached ones in a row
    or `most` in all, and those where the front's change differs by `threshold` or more from what it was when last
    computed: mean |r_prev - r| / mean |r_prev|. A threshold of 1 or more never differs.
    """

    threshold: Annotated[float, Bound(check_number, 0)] = 0.08
    front: Annotated[int, Bound(check_whole, 1)] = field(default=8, kw_only=True)
    back: Annotated[int, Bound(check_whole, 0)] = field(default=0, kw_only=True)
    warmup: Annotated[int, Bound(check_whole, 0)] = field(default=8, kw_only=True)
    every: Annotated[int, Bound(check_whole, 1)] = field(default=1, kw_only=True)
    limit: Annotated[int | None, Bound(check_whole, 0)] = field(default=None, kw_only=True)
    most: Annotated[int | None, Bound(check_whole, 0)] = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.extrapolation()

    @abstractmethod
    def extrapolation(self) -> Predictor:
        """Of what the blocks between added."""

    def span(self, blocks: int) -> tuple[int, int]:
        """Between front and back."""
        return min(self.front, blocks), max(self.front, blocks - self.back)

    def rule(self, info: ModelInfo, sigmas: Sequence[float]) -> Rule:
        """Similarity of the front's change."""
        before = list[Tensor]()
        row = cached = 0

        def due(look: Evaluation) -> bool:
            nonlocal row, cached
            if self.threshold == 0:
                return True
            warm = look.index < self.warmup and look.index % self.every == 0
            full = (self.limit is not None and row >= self.limit) or (self.most is not None and cached >= self.most)
            if self.threshold >= 1:
                computed = warm or full or look.index == 0
            else:
                change = look.change()
                computed = warm or full or not before or not difference(change, before[0]) < self.threshold
                if computed:
                    before[:] = [change]
            row, cached = (0, cached) if computed else (row + 1, cached + 1)
            return computed

        return due

    def estimate(self, evaluations: int) -> int:
        """Warm-up, then a share by threshold, at least what `limit` and `most` force."""
        warm = ceil(min(self.warmup, evaluations) / self.every)
        rest = evaluations - warm
        share = interpolate(COMPUTED, self.threshold)
        if self.limit is not None:
            share = max(share, 1 / (self.limit + 1))
        computed = warm + round(share * rest)
        return computed if self.most is None else max(computed, evaluations - self.most)


@dataclass(frozen=True)
class DBCache(DualBlock):
    """Dual-block cache (cache-dit): the first `front` and last `back` blocks always run; what those between added is
    reused while the front's change differs by less than `threshold` from what it was when they were last computed.

    Of the first `warmup` evaluations each `every`-th is computed; at most `limit` in a row and `most` in all are cached
    (None: no limit). `front=1, warmup=0` is the first-block cache. Blocks of both kinds count as one list.

    With `order` above 0 what is cached is extrapolated over steps instead of reused (DB-Taylor; see `Extrapolation`).
    Published for FLUX.1-dev at 50 steps: DBCache(0.2, front=1, warmup=4, limit=4, order=1) takes 3.23 times fewer
    operations, (0.8, front=1, warmup=8, every=2, limit=8, order=1) 5.72 times.
    """

    order: int = field(default=0, kw_only=True)
    series: Series = field(default="newton", kw_only=True)

    def extrapolation(self) -> Extrapolation:
        """Of what the blocks between added."""
        return Extrapolation(self.order, self.series)

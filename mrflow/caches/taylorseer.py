"""TaylorSeer, lite: a feature is computed every few steps and extrapolated over the others."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Literal, get_args

from mrflow._checks import Bound, check_whole
from mrflow.caches.base import Cache
from mrflow.caches.clock import Evaluation, Feature, Rule
from mrflow.caches.extrapolate import Extrapolation, Series
from mrflow.errors import PlanError
from mrflow.model_info import ModelInfo

Of = Literal["output", "velocity"]


@dataclass(frozen=True)
class TaylorSeer(Cache):
    """TaylorSeer (Liu et al. 2025, arXiv 2503.06923), lite: the first `warmup` evaluations are computed, then every
    `interval`-th; between them one feature is extrapolated, in steps, by a curve of degree `order`.

    `of`: the image stream after the last block, so that the final layer still sees the level ("output"), or the
    velocity itself ("velocity", as diffusers' lite mode). `series` as for `Extrapolation`.
    """

    interval: Annotated[int, Bound(check_whole, 1)] = 6
    order: int = field(default=1, kw_only=True)
    warmup: Annotated[int, Bound(check_whole, 1)] = field(default=3, kw_only=True)
    of: Of = field(default="output", kw_only=True)
    series: Series = field(default="newton", kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_of(self.of)
        self.extrapolation()

    def feature(self) -> Feature:
        """What is extrapolated."""
        return self.of

    def extrapolation(self) -> Extrapolation:
        """The curve."""
        return Extrapolation(self.order, self.series)

    def rule(self, info: ModelInfo, sigmas: Sequence[float]) -> Rule:
        """A fixed cadence: 0, 1, 2, 8, 14, 20, ... as published."""

        def due(look: Evaluation) -> bool:
            return regular(look.index, self.interval, self.warmup)

        return due


def regular(index: int, interval: int, warmup: int) -> bool:
    """Whether evaluation `index` is among the first `warmup` or a whole number of intervals after the last of them."""
    return index < warmup or (index - warmup + 1) % interval == 0


def check_of(of: str) -> None:
    """Refuse what is no `Of`.

    Raises:
        PlanError: naming those there are.
    """
    if of not in get_args(Of):
        raise PlanError(f"of must be one of {', '.join(get_args(Of))}, got {of!r}")

"""What a feature will be at a later step, from what it was at computed ones: weights for a sum. Pure, floats only."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import factorial
from typing import Literal, Protocol, get_args

import numpy as np
from numpy.typing import NDArray

from mrflow._checks import check_whole
from mrflow.errors import PlanError

Series = Literal["newton", "taylor"]
Gram = Callable[[], NDArray[np.float64]]
"""Inner products of the kept features, (features, features), in float64; computed when called."""


class Predictor(Protocol):
    """How kept features become the one that is used: as a sum with weights."""

    @property
    def keep(self) -> int:
        """How many computed features are remembered, the newest."""
        ...

    def weights(self, steps: Sequence[int], at: int, *, total: int = 0, gram: Gram | None = None) -> tuple[float, ...]:
        """One weight for each of the features computed at `steps` (rising), for the one at `at`.

        `total`: evaluations of the whole integration, 0 where it was not announced. `gram`: asked where the weights
        depend on the features themselves.
        """
        ...


@dataclass(frozen=True)
class Extrapolation:
    """The curve of degree `order` through the newest order + 1 computed features; 0 repeats the last one.

    `newton` is that polynomial, exact for features that are one. `taylor` is the published series (TaylorSeer, arXiv
    2503.06923): sum_i D_i x^i / i! with D_0 = F and D_{i+1} = (D_i(t) - D_i(t_prev)) / (t - t_prev), t counted in
    steps. The two agree up to order 1; from order 2 on the published one is not exact even for quadratics.
    """

    order: int = 0
    series: Series = "newton"

    def __post_init__(self) -> None:
        check_whole("order", self.order, 0)
        if self.order > 4:
            raise PlanError(f"order must be at most 4, got {self.order}: higher ones only amplify rounding")
        if self.series not in get_args(Series):
            raise PlanError(f"series must be one of {', '.join(get_args(Series))}, got {self.series!r}")

    @property
    def keep(self) -> int:
        """The points that fix the curve."""
        return self.order + 1

    def weights(self, steps: Sequence[int], at: int, *, total: int = 0, gram: Gram | None = None) -> tuple[float, ...]:
        """Weights of the features computed at `steps` (rising, the newest order + 1 of them) for the one at `at`."""
        if self.series == "newton" or len(steps) < 3:
            return lagrange_weights(steps, at)
        return taylor(steps, at)


def lagrange_weights(steps: Sequence[int], at: int) -> tuple[float, ...]:
    """Weights of values at `steps` in the polynomial through them, read at `at`."""
    weights: list[float] = []
    for i, own in enumerate(steps):
        weight = 1.0
        for j, other in enumerate(steps):
            if j != i:
                weight *= (at - other) / (own - other)
        weights.append(weight)
    return tuple(weights)


def taylor(steps: Sequence[int], at: int) -> tuple[float, ...]:
    """Weights of values at `steps` in the published series of backward differences, read at `at`."""
    count, past = len(steps), list[list[float]]()
    for k in range(count):
        factors = [[float(i == k) for i in range(count)]]  # D_i at steps[k], each as weights of the values
        for before in past:
            newest = factors[-1]
            gap = steps[k] - steps[k - 1]
            factors.append([(a - b) / gap for a, b in zip(newest, before, strict=True)])
        past = factors
    x = at - steps[-1]
    return tuple(sum(d[i] * x**n / factorial(n) for n, d in enumerate(past)) for i in range(count))

"""At which size is half of the detail legible: where a rising curve through the means crosses one half."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import isotonic_regression  # type: ignore[import-untyped]

HALF = 0.5
Curve = Mapping[float, Mapping[str, Sequence[float]]]
"""By size: the scores of each caption's pictures."""


@dataclass(frozen=True)
class Crossing:
    """A size with its 95 % interval; infinite where no size reaches one half, 0 where the smallest does."""

    size: float
    low: float
    high: float

    def text(self, scale: float, digits: int, ends: tuple[float, float]) -> str:
        """The size times `scale`, such as pixels of the side; `ends` are the smallest and the largest asked for."""

        def one(value: float) -> str:
            if value == 0:
                return f"< {ends[0] * scale:.{digits}f}"
            return f"> {ends[1] * scale:.{digits}f}" if math.isinf(value) else f"{value * scale:.{digits}f}"

        return f"{one(self.size)} [{one(self.low)}, {one(self.high)}]"


def crossing(curve: Curve, *, draws: int = 2000, seed: int = 0) -> Crossing:
    """Where legibility reaches one half.

    Means at each size are made to rise with size (isotonic least squares, weighted by captions; Robertson, Wright and
    Dykstra 1988, section 1.2) and joined in the logarithm of size. Percentile bootstrap over the captions of each size.
    """
    rng = np.random.default_rng(seed)
    sizes = np.array(sorted(curve))
    means = [np.array([np.mean(values) for values in curve[size].values()]) for size in sizes]
    weights = np.array([len(each) for each in means], dtype=np.float64)
    found = np.array(
        [_cross(sizes, np.array([rng.choice(m, len(m)).mean() for m in means]), weights) for _ in range(draws)]
    )
    low, high = (float(np.quantile(found, q, method="nearest")) for q in (0.025, 0.975))
    return Crossing(_cross(sizes, np.array([m.mean() for m in means]), weights), low, high)


def _cross(sizes: NDArray[np.float64], means: NDArray[np.float64], weights: NDArray[np.float64]) -> float:
    rising: NDArray[np.float64] = isotonic_regression(means, weights=weights).x
    if rising[0] >= HALF:
        return 0.0
    if rising[-1] < HALF:
        return math.inf
    above = int(np.argmax(rising >= HALF))
    part = (HALF - rising[above - 1]) / (rising[above] - rising[above - 1])
    a, b = np.log(sizes[above - 1]), np.log(sizes[above])
    return float(np.exp(a + part * (b - a)))

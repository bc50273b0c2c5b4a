"""Spectrum: the last block's output is forecast by a curve through all that was computed, at growing distances."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated

import numpy as np

from mrflow._checks import Bound, Checked, check_number, check_whole
from mrflow.caches.base import Cache
from mrflow.caches.clock import Evaluation, Feature, Rule
from mrflow.caches.extrapolate import Gram, lagrange_weights
from mrflow.caches.taylorseer import Of, check_of
from mrflow.errors import PlanError
from mrflow.model_info import ModelInfo

STEPS = 50  # of the published runs: what the curve's axis is where the number of steps was not announced


@dataclass(frozen=True)
class Spectrum(Cache):
    """Spectrum (Han et al. 2026, arXiv 2603.01623): the features of all computed evaluations are fitted by Chebyshev
    polynomials of the step, with ridge regression, and the fit is read at the evaluations between.

    Computed are the first `warmup` evaluations, then one at the end of each window: windows are `window`, `window` +
    `growth`, ... evaluations long, rounded down (appendix B.1). The published 50 steps of FLUX.1-dev take 14
    evaluations at the default, 10 with `growth=3`. The last one is not computed.

    The curve: tau = 2 step / steps - 1, columns T_0(tau) ... T_degree(tau), coefficients (X^T X + ridge I)^-1 X^T F.
    `mix` of it, and 1 - mix of the straight line through the newest two, which the authors' code added later (they
    advise 0.5 to 1). The ridge draws the forecast towards zero, by about 2 % after five evaluations; without it
    (`ridge=0`) features that are polynomials of the degree are met exactly.

    `of` as for `TaylorSeer`. Memory: one feature for each computed evaluation of a branch.
    """

    window: Annotated[float, Bound(check_number, 1)] = 2.0
    growth: Annotated[float, Bound(check_number, 0)] = 0.75
    warmup: Annotated[int, Bound(check_whole, 1)] = field(default=5, kw_only=True)
    degree: int = field(default=4, kw_only=True)
    ridge: float = field(default=0.1, kw_only=True)
    mix: float = field(default=1.0, kw_only=True)
    of: Of = field(default="output", kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_of(self.of)
        if self.ridge == 0 and self.warmup <= self.degree:
            raise PlanError(
                f"without a ridge a curve of degree {self.degree} needs warmup={self.degree + 1} or more, "
                f"got {self.warmup}; or give ridge=0.1"
            )
        self.extrapolation()

    def feature(self) -> Feature:
        """What is forecast."""
        return self.of

    def extrapolation(self) -> "Chebyshev":
        """The curve."""
        return Chebyshev(self.degree, self.ridge, self.mix)

    def rule(self, info: ModelInfo, sigmas: Sequence[float]) -> Rule:
        """A fixed list of evaluations: 0 to 4, 6, 8, 11, 15, 20, 25, 31, 38, 46, ... by default."""
        windows = row = 0

        def due(look: Evaluation) -> bool:
            nonlocal windows, row
            if look.index < self.warmup:
                return True
            row += 1
            if row < math.floor(self.window + windows * self.growth + 1e-9):
                return False
            windows, row = windows + 1, 0
            return True

        return due


@dataclass(frozen=True)
class Chebyshev(Checked):
    """Weights of all computed features in the curve that is fitted to them."""

    degree: Annotated[int, Bound(check_whole, 0)]
    ridge: Annotated[float, Bound(check_number, 0)]
    mix: Annotated[float, Bound(check_number, 0, 1)]

    @property
    def keep(self) -> int:
        """As many as the published buffer holds."""
        return 100

    def weights(self, steps: Sequence[int], at: int, *, total: int = 0, gram: Gram | None = None) -> tuple[float, ...]:
        """x (X^T X + ridge I)^-1 X^T, blended with the line; the only feature where there is but one."""
        if len(steps) == 1:
            return (1.0,)
        tau = 2 * np.array([*steps, at]) / (total or STEPS) - 1
        basis = np.polynomial.chebyshev.chebvander(tau, self.degree)
        ridge = math.sqrt(self.ridge) * np.eye(self.degree + 1)
        curve = basis[-1] @ np.linalg.pinv(np.concatenate((basis[:-1], ridge)))[:, : len(steps)]
        line = np.array([*[0.0] * (len(steps) - 2), *lagrange_weights(steps[-2:], at)])
        return tuple(map(float, self.mix * curve + (1 - self.mix) * line))

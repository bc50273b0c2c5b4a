"""Solvers that add noise."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor

from mrflow import flow
from mrflow._checks import check_number
from mrflow.errors import PlanError
from mrflow.flow import Velocity
from mrflow.schedules import check_sigmas, shift
from mrflow.solvers.base import History, StochasticSolver, combine


@dataclass(frozen=True)
class StochasticEuler(StochasticSolver):
    """Euler after a rise of the noise, which keeps the marginal (arXiv 2206.00364, alg. 2, in flow form): order 1.

    A step from a level below 1 first raises sigma / (1 - sigma) by the factor exp(`churn` (sigma - to)) with fresh
    noise: in all exp(churn) from 1 to 0, however many steps there are, so finer schedules converge. Too much churn for
    too few steps leaves too little variance, which looks flat and blurred; `variance` says how much.
    """

    churn: float = 1.0

    def __post_init__(self) -> None:
        check_number("churn", self.churn, 0.0, 50.0)

    def variance(self, sigmas: Sequence[float]) -> float:
        """The variance at the last of the levels over the true one, for unit Gaussian data and its exact velocity.

        Closed form: a rise is `flow.raise_noise`; an Euler step from s by h multiplies x by 1 + h (2 s - 1) / m(s),
        with m(s) = s^2 + (1 - s)^2 the true variance.

        Raises:
            PlanError: the levels are not in [0, 1] and falling.
        """

        def true(s: float) -> float:
            return s * s + (1.0 - s) ** 2

        levels = check_sigmas(sigmas)
        have = true(levels[0])
        for sigma, to in pairwise(levels):
            at = sigma if sigma == 1.0 else shift(sigma, self.churn * (sigma - to))
            if sigma < 1.0:
                kept = (1.0 - at) / (1.0 - sigma)
                have = kept**2 * have + at**2 - (kept * sigma) ** 2
            have *= (1.0 + (to - at) * (2.0 * at - 1.0) / true(at)) ** 2
        return have / true(levels[-1])

    def step(
        self, v: Velocity, x: Tensor, sigma: float, to: float, past: History, *, noise: Tensor | None = None
    ) -> tuple[Tensor, History]:
        if noise is None:
            raise PlanError("StochasticEuler.step needs noise; give integrate(..., noise=...)")
        if sigma < 1.0 and self.churn > 0.0:
            raised = shift(sigma, self.churn * (sigma - to))
            x, sigma = flow.raise_noise(x, noise, sigma, raised), raised
        return combine(x, to - sigma, (1.0,), (v(x, sigma),)), ()

"""Solvers that add noise."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from mrflow import flow
from mrflow._checks import Bound, check_number, check_whole
from mrflow.errors import PlanError
from mrflow.flow import Velocity
from mrflow.schedules.base import check_sigmas, shift
from mrflow.solvers.base import History, StochasticSolver, combine, half_log_snr
from mrflow.solvers.exponential import add_changes, near


@dataclass(frozen=True)
class StochasticEuler(StochasticSolver):
    """Euler after a rise of the noise, which keeps the marginal (arXiv 2206.00364, alg. 2, in flow form): order 1.

    A step from a level below 1 first raises sigma / (1 - sigma) by the factor exp(`churn` (sigma - to)) with fresh
    noise: in all exp(churn) from 1 to 0, however many steps there are, so finer schedules converge. Too much churn for
    too few steps leaves too little variance, which looks flat and blurred; `variance` says how much.
    """

    pointwise: ClassVar[bool] = True

    churn: Annotated[float, Bound(check_number, 0.0, 50.0)] = 1.0

    def variance(self, sigmas: Sequence[float]) -> float:
        """The variance at the last of the levels over the true one, for unit Gaussian data and its exact velocity.

        Closed form: a rise is `flow.raise_noise`; an Euler step from s by h multiplies x by 1 + h (2 s - 1) / m(s),
        with m(s) = s^2 + (1 - s)^2 the true variance.

        Raises:
            PlanError: the levels are not in [0, 1] and falling.
        """

        def true(s: float) -> float:
            return s * s + (1.0 - s) ** 2

        sigmas = check_sigmas(sigmas)
        have = true(sigmas[0])
        for sigma, to in pairwise(sigmas):
            at = sigma if sigma == 1.0 else shift(sigma, self.churn * (sigma - to))
            if sigma < 1.0:
                kept = (1.0 - at) / (1.0 - sigma)
                have = kept**2 * have + at**2 - (kept * sigma) ** 2
            have *= (1.0 + (to - at) * (2.0 * at - 1.0) / true(at)) ** 2
        return have / true(sigmas[-1])

    def step(
        self, v: Velocity, x: Tensor, sigma: float, to: float, past: History, *, noise: Tensor | None = None
    ) -> tuple[Tensor, History]:
        if noise is None:
            raise PlanError("StochasticEuler.step needs noise; give integrate(..., noise=...)")
        if sigma < 1.0 and self.churn > 0.0:
            raised = shift(sigma, self.churn * (sigma - to))
            x, sigma = flow.raise_noise(x, noise, sigma, raised), raised
        return combine(x, to - sigma, (1.0,), (v(x, sigma),)), ()


@dataclass(frozen=True)
class SASolver(StochasticSolver):
    """SA-Solver, the stochastic Adams method (Xue et al. 2023, arXiv 2309.05019), on clean estimates D.

    `tau` is how stochastic a step is, 0 the ODE and 1 the reverse SDE; it holds in steps from sigmas in (`low`,
    `high`].
    With h the step in lambda = log((1 - s) / s), s the sigma, SA-Predictor is

        x' = (s' / s) e^(-tau^2 h) x + (1 - s') h (1 + tau^2) sum w_j D_j + s' sqrt(1 - e^(-2 tau^2 h)) z

    with the exponential weights of `mrflow.solvers.exponential` at -(1 + tau^2) h through the last `solver_order`
    estimates. SA-Corrector makes the step again, with the same noise, once the estimate at its end is there, through
    `corrector` of them with that one (0: it does not); that costs nothing. The step to 0 is the estimate itself. The
    reference code changes weights through two estimates by a term of order h^3; this does not.
    """

    pointwise: ClassVar[bool] = True

    tau: Annotated[float, Bound(check_number, 0.0, 10.0)] = 1.0
    solver_order: Annotated[int, Bound(check_whole, 1, 3)] = 2
    corrector: Annotated[int, Bound(check_whole, 0, 3)] = 2
    low: Annotated[float, Bound(check_number, 0.0, 1.0)] = 0.0
    high: Annotated[float, Bound(check_number, 0.0, 1.0)] = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.low < self.high:
            raise PlanError(f"noise is added between two levels, low < high, got low {self.low!r}, high {self.high!r}")

    def step(
        self, v: Velocity, x: Tensor, sigma: float, to: float, past: History, *, noise: Tensor | None = None
    ) -> tuple[Tensor, History]:
        if noise is None:
            raise PlanError("SASolver.step needs noise; give integrate(..., noise=...)")
        now = (sigma, flow.denoised(x, v(x, sigma), sigma))
        known = (*past[2:], now)
        if past and self.corrector and past[0][0] < 1.0:
            (begun, start), (_, drawn) = past[:2]
            x = self._made(start, begun, sigma, known[-self.corrector :], drawn)
        out = self._made(x, sigma, to, known[-self.solver_order :], noise)
        return out, ((sigma, x), (sigma, noise), *known[1 - max(self.solver_order, self.corrector, 2) :])

    def _made(self, x: Tensor, sigma: float, to: float, through: History, noise: Tensor) -> Tensor:
        """The step from sigma, through the estimates at these levels."""
        base = through[-1][1]
        if to == 0.0:
            return base
        square = self.tau**2 if self.low < sigma <= self.high else 0.0
        if sigma == 1.0:  # an infinite step in lambda: all noise is new, or none is
            return torch.lerp(base, noise if square else x, to)
        h, rate = half_log_snr(to) - half_log_snr(sigma), 1.0 + square
        out = combine(to / sigma * math.exp(-square * h) * x, 1.0 - to, (-math.expm1(-rate * h),), (base,))
        out = add_changes(out, (1.0 - to) * rate, sigma, to, base, near(through), factor=-rate)
        return combine(out, to, (math.sqrt(-math.expm1(-2.0 * square * h)),), (noise,))

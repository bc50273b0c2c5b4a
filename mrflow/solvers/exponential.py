"""Exponential integrators: the linear part of the flow is solved exactly, a polynomial stands for the network.

In the half log-SNR lambda = log((1 - sigma) / sigma) the flow is d(x / (1 - sigma)) / d lambda = -(x / (1 - sigma) - D)
with D the clean estimate, or d(x / (1 - sigma)) / d lambda = -e^-lambda E with E the noise estimate (DPM-Solver++,
arXiv 2211.01095, in flow form). For a step h = lambda' - lambda both solutions are Euler's step plus an integral of
what the estimates change (phi_k: Hochbruck & Ostermann, Exponential integrators, Acta Numerica 2010, sec. 2):

    x' = x + (sigma' - sigma) v + (1 - sigma') h sum w_j (D_j - D),   sum w_j r_j^k = k! phi_{k+1}(-h),
    x' = x + (sigma' - sigma) v -      sigma'  h sum w_j (E_j - E),   sum w_j r_j^k = k! phi_{k+1}(h),

where estimate j was made at lambda + r_j h. At sigma 1 and 0 lambda is infinite, and steps even in sigma do not shrink
in lambda next to either: integrated from 1 or to 0, these methods have order 2 at most, whatever their order between.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor

from mrflow import flow
from mrflow._checks import Bound, check_whole
from mrflow.errors import PlanError
from mrflow.flow import Velocity
from mrflow.solvers.base import History, Solver, combine, half_log_snr
from mrflow.solvers.multistep import lagrange
from mrflow.solvers.runge_kutta import MIDPOINT, RALSTON, runge_kutta


@dataclass(frozen=True)
class DEIS(Solver):
    """DEIS in log rho (Zhang & Chen 2022, arXiv 2204.13902, sec. 3): noise estimates, extrapolated.

    The integral over rho = sigma / (1 - sigma) of the polynomial in log rho through the last `solver_order` noise
    estimates, as in diffusers' `DEISMultistepScheduler`. One evaluation a step. Euler in the first step, so that the
    order of the whole is 2 at most, and in the step to 0; an estimate at sigma 1 is infinitely far away and left out.
    """

    pointwise: ClassVar[bool] = True
    order_at_ends: ClassVar[float] = 2.0
    solver_order: Annotated[int, Bound(check_whole, 1, 3)] = 2

    def step(self, v: Velocity, x: Tensor, sigma: float, to: float, past: History) -> tuple[Tensor, History]:
        now = v(x, sigma)
        past = (*past, (sigma, flow.to_noise(x, now, sigma)))[-self.solver_order :]
        out = combine(x, to - sigma, (1.0,), (now,))
        if to > 0.0 and sigma < 1.0:
            out = add_changes(out, -to, sigma, to, past[-1][1], near(past), factor=1.0)
        return out, past


@dataclass(frozen=True)
class RES2M(Solver):
    """The refined exponential solver, multistep, order 2 (Zhang et al. 2023, arXiv 2308.02157): `res_2m`.

    The line through the last two clean estimates, integrated with its exponential weight; DPM-Solver++(2M) takes phi_1
    / 2 for phi_2. One evaluation a step. Euler in the first step and in the step to 0.
    """

    pointwise: ClassVar[bool] = True
    order_at_ends: ClassVar[float] = 2.0

    def step(self, v: Velocity, x: Tensor, sigma: float, to: float, past: History) -> tuple[Tensor, History]:
        clean = flow.denoised(x, v(x, sigma), sigma)
        past = (*past, (sigma, clean))
        out = torch.lerp(clean, x, to / sigma)
        if to > 0.0 and sigma < 1.0:
            out = add_changes(out, 1.0 - to, sigma, to, clean, near(past), factor=-1.0)
        return out, past[-1:]


@dataclass(frozen=True)
class RES2S(Solver):
    """The refined exponential solver, one step, order 2 (arXiv 2308.02157, sec. 3): `res_2s`, c2 = 1/2 in lambda.

    The exponential Runge-Kutta method of Hochbruck & Ostermann (2005, SIAM J. Numer. Anal. 43), b2 = phi_2 / c2.
    From sigma 1 and to 0, where lambda is infinite, the step is the midpoint rule's in sigma.
    """

    pointwise: ClassVar[bool] = True
    evals: ClassVar[int] = 2
    order_at_ends: ClassVar[float] = 2.0

    def step(self, v: Velocity, x: Tensor, sigma: float, to: float, past: History) -> tuple[Tensor, History]:
        if sigma == 1.0 or to == 0.0:
            return runge_kutta(MIDPOINT, v, x, sigma, to), ()
        h = half_log_snr(to) - half_log_snr(sigma)
        first = flow.denoised(x, v(x, sigma), sigma)
        second = _stage(v, x, sigma, h, 0.5, first, ())
        return _weighted(x, sigma, to, h, first, ((2.0 * phi(2, -h), second),)), ()


@dataclass(frozen=True)
class RES3S(Solver):
    """The refined exponential solver, one step, order 3 (arXiv 2308.02157, sec. 3): `res_3s`, c2 = 1/2, c3 = 1.

    Hochbruck & Ostermann (2005), with 2 (g c2 + c3) = 3 (g c2^2 + c3^2), so g = 4, b2 = g b3,
    b3 = phi_2 / (g c2 + c3), a32 = g c2 phi_2(-c2 h) + c3^2 / c2 phi_2(-c3 h). From sigma 1 and to 0, where lambda is
    infinite, the step is Ralston's of order 3 in sigma.
    """

    pointwise: ClassVar[bool] = True
    evals: ClassVar[int] = 3
    order_at_ends: ClassVar[float] = 2.0

    def step(self, v: Velocity, x: Tensor, sigma: float, to: float, past: History) -> tuple[Tensor, History]:
        if sigma == 1.0 or to == 0.0:
            return runge_kutta(RALSTON, v, x, sigma, to), ()
        h = half_log_snr(to) - half_log_snr(sigma)
        first = flow.denoised(x, v(x, sigma), sigma)
        second = _stage(v, x, sigma, h, 0.5, first, ())
        third = _stage(v, x, sigma, h, 1.0, first, ((2.0 * phi(2, -h / 2.0) + 2.0 * phi(2, -h), second),), to=to)
        last = phi(2, -h) / 3.0
        return _weighted(x, sigma, to, h, first, ((4.0 * last, second), (last, third))), ()


@dataclass(frozen=True)
class UniPC(Solver):
    """UniPC, the unified predictor-corrector (Zhao et al. 2023, arXiv 2302.04867, sec. 3), on clean estimates.

    UniP extrapolates the last `solver_order` estimates; once the estimate at its end is there, UniC makes the step
    again with it, which costs nothing and raises the order by one. Both are the exponential weights of this file, but
    for two of the paper's short cuts: UniP-2 and UniC-1 take a1 = 1/2 with B(h) = h ("bh1") or e^h - 1 ("bh2", on clean
    estimates 1 - e^-h). The flow form is that of diffusers' `UniPCMultistepScheduler`: sigma 1 counts as 1 - 1e-6
    in lambda, the step to 0 has order 1. (diffusers also gives the step before that one at most order 2 where
    `lower_order_final` is on.) One evaluation a step.
    """

    pointwise: ClassVar[bool] = True
    order_at_ends: ClassVar[float] = 2.0
    solver_order: Annotated[int, Bound(check_whole, 1, 3)] = 2
    variant: Literal["bh1", "bh2"] = "bh2"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.variant not in ("bh1", "bh2"):
            raise PlanError(f"a variant of UniPC is 'bh1' or 'bh2', got {self.variant!r}")

    def step(self, v: Velocity, x: Tensor, sigma: float, to: float, past: History) -> tuple[Tensor, History]:
        clean = flow.denoised(x, v(x, sigma), sigma)
        estimates: History = ((sigma, clean),)
        if past:
            (before, start), *older = past  # the corrected state before this one, and the estimates up to there
            x = self._made(start, before, sigma, tuple(older), (sigma, clean))
            estimates = (*older, *estimates)[-self.solver_order :]
        out = self._made(x, sigma, to, estimates)
        return out, ((sigma, x), *estimates)

    def _made(
        self,
        x: Tensor,
        sigma: float,
        to: float,
        estimates: History,
        end: tuple[float, Tensor] | None = None,
    ) -> Tensor:
        """The step from the newest of the estimates, and with the one at its end where that is known."""
        newest = estimates[-1][1]
        out = torch.lerp(newest, x, to / sigma)
        if to == 0.0:
            return out
        through = (*estimates, end) if end else estimates
        if len(through) != 2:
            return add_changes(out, 1.0 - to, sigma, to, newest, through, factor=-1.0)
        here, there = half_log_snr(min(sigma, ALMOST)), half_log_snr(to)
        level, other = end or estimates[0]
        b = there - here if self.variant == "bh1" else -math.expm1(here - there)
        r = (half_log_snr(min(level, ALMOST)) - here) / (there - here)
        return torch.add(out, other - newest, alpha=(1.0 - to) * b * 0.5 / r)


ALMOST = 1.0 - 1e-6  # what sigma 1 counts as in lambda, in diffusers' UniPC


def phi(k: int, z: float) -> float:
    """phi_k(z), k from 0: e^z, then (phi_{k-1}(z) - 1 / (k - 1)!) / z, by its series where that would cancel."""
    if abs(z) < 1.0:
        return sum(z**j / math.factorial(j + k) for j in range(20))
    value = math.exp(z)
    for i in range(k):
        value = (value - 1.0 / math.factorial(i)) / z
    return value


def exponential_weights(nodes: Sequence[float], z: float) -> list[float]:
    """w with sum w_j p(r_j) = integral over t from 0 to 1 of e^(z (1 - t)) p(t), for p through as many nodes r."""
    moments = [math.factorial(k) * phi(k + 1, z) for k in range(len(nodes))]
    return [sum(c * m for c, m in zip(poly, moments, strict=True)) for poly in lagrange(nodes)]


def add_changes(
    out: Tensor, scale: float, sigma: float, to: float, base: Tensor, estimates: History, *, factor: float
) -> Tensor:
    """`out` with scale h sum w_j (E_j - base) added, for the step from `sigma` to `to` and weights at z = factor h."""
    lambdas = [half_log_snr(min(sigma, ALMOST)) for sigma in (sigma, to, *(sigma for sigma, _ in estimates))]
    h = lambdas[1] - lambdas[0]
    weights = exponential_weights([(each - lambdas[0]) / h for each in lambdas[2:]], factor * h)
    for weight, (_, estimate) in zip(weights, estimates, strict=True):
        if estimate is not base:
            out = torch.add(out, estimate - base, alpha=scale * h * weight)
    return out


def near(past: History) -> History:
    """Without what was made at sigma 1, infinitely far away: the polynomial's limit."""
    return tuple((level, estimate) for level, estimate in past if level < 1.0)


def _weighted(
    x: Tensor, sigma: float, to: float, h: float, first: Tensor, others: Sequence[tuple[float, Tensor]]
) -> Tensor:
    out = torch.lerp(first, x, to / sigma)
    for weight, other in others:
        out = torch.add(out, other - first, alpha=(1.0 - to) * h * weight)
    return out


def _stage(
    v: Velocity,
    x: Tensor,
    sigma: float,
    h: float,
    c: float,
    first: Tensor,
    others: Sequence[tuple[float, Tensor]],
    to: float | None = None,
) -> Tensor:
    """The clean estimate at lambda + c h, where a step of the estimates so far ends."""
    if to is None:
        to = 1.0 / (1.0 + math.exp(half_log_snr(sigma) + c * h))
    return flow.denoised(end := _weighted(x, sigma, to, h, first, others), v(end, to), to)

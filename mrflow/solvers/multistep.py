"""Multistep methods: polynomials through what was asked before."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mrflow import flow
from mrflow.flow import Velocity
from mrflow.solvers.base import History, Solver, combine, half_log_snr


@dataclass(frozen=True)
class AB2(Solver):
    """Adams-Bashforth of order 2 for uneven steps: the line through the last two velocities, integrated.

    One evaluation a step. The first step is Euler's, whose local error h^2 keeps the order at 2.
    """

    pointwise: ClassVar[bool] = True

    def step(self, v: Velocity, x: Tensor, sigma: float, to: float, past: History) -> tuple[Tensor, History]:
        past = (*past, (sigma, v(x, sigma)))
        return _adams(x, to, past), past[-1:]


@dataclass(frozen=True)
class AB3(Solver):
    """Adams-Bashforth of order 3 for uneven steps: the parabola through the last three velocities, integrated.

    One evaluation a step, two in the first: it is a midpoint step, the second is AB2's; their local errors h^3 keep the
    order at 3.
    """

    pointwise: ClassVar[bool] = True

    def step(self, v: Velocity, x: Tensor, sigma: float, to: float, past: History) -> tuple[Tensor, History]:
        now = v(x, sigma)
        if not past:
            half = (to - sigma) / 2.0
            middle = v(combine(x, half, (1.0,), (now,)), sigma + half)
            return combine(x, to - sigma, (1.0,), (middle,)), ((sigma, now),)
        past = (*past, (sigma, now))
        return _adams(x, to, past), past[-2:]


@dataclass(frozen=True)
class DPMpp2M(Solver):
    """DPM-Solver++(2M) (Lu et al. 2022, arXiv 2211.01095, alg. 2) in flow form; its history holds clean estimates.

    x' = (to / sigma) x + (1 - to / sigma) D, D = D_i + h / (2 h_last) (D_i - D_last), with steps h measured in the half
    log-SNR lambda = log((1 - sigma) / sigma), as diffusers' flow `DPMSolverMultistepScheduler` does; k-diffusion's
    `sample_dpmpp_2m` measures them in -log(sigma), which differs on flow levels. In the limits D is D_i: after sigma 1
    (h_last infinite) and to 0 (h infinite, where the extrapolation diverges), as in the first step. Exact where the
    clean estimate does not change. Order 2; all the way to 0 the error falls as log(n) / n^2, since the last steps do
    not shrink in lambda.
    """

    pointwise: ClassVar[bool] = True

    def step(self, v: Velocity, x: Tensor, sigma: float, to: float, past: History) -> tuple[Tensor, History]:
        clean = flow.denoised(x, v(x, sigma), sigma)
        target = clean
        if past and to > 0.0 and past[-1][0] < 1.0:
            before, last = past[-1]
            ratio = (half_log_snr(to) - half_log_snr(sigma)) / (half_log_snr(sigma) - half_log_snr(before))
            target = torch.lerp(last, clean, 1.0 + ratio / 2.0)
        return torch.lerp(target, x, to / sigma), ((sigma, clean),)


def _adams(x: Tensor, to: float, past: History) -> Tensor:
    # The integral, from the newest level to `to`, of the polynomial through the past velocities.
    newest = past[-1][0]
    weights = _adams_weights(to - newest, [sigma - newest for sigma, _ in past])
    return combine(x, 1.0, weights, [velocity for _, velocity in past])


def _adams_weights(h: float, nodes: Sequence[float]) -> list[float]:
    # Integral from 0 to h of each Lagrange polynomial.
    return [sum(c * h ** (k + 1) / (k + 1) for k, c in enumerate(poly)) for poly in lagrange(nodes)]


def lagrange(nodes: Sequence[float]) -> list[list[float]]:
    """The coefficients, constant first, of each polynomial that is 1 at its node and 0 at the others."""
    polys: list[list[float]] = []
    for i, own in enumerate(nodes):
        poly = [1.0]
        for j, other in enumerate(nodes):
            if j != i:
                up, down = [0.0, *poly], [*poly, 0.0]
                poly = [(u - other * d) / (own - other) for u, d in zip(up, down, strict=True)]
        polys.append(poly)
    return polys

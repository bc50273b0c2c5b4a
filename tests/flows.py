"""Flows that are known in closed form, and every solver with its order."""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from mrflow.flow import Velocity
from mrflow.solvers import (
    AB2,
    AB3,
    DEIS,
    RES2M,
    RES2S,
    RES3S,
    RK4,
    DPMpp2M,
    Euler,
    Heun,
    Midpoint,
    SASolver,
    Solver,
    StochasticEuler,
    UniPC,
)

ORDERS: list[tuple[Solver, int]] = [
    (Euler(), 1),
    (Heun(), 2),
    (Midpoint(), 2),
    (RK4(), 4),
    (AB2(), 2),
    (AB3(), 3),
    (DPMpp2M(), 2),
]
DETERMINISTIC = [solver for solver, _ in ORDERS]
EXPONENTIAL: list[tuple[Solver, int]] = [
    (UniPC(1), 2),
    (UniPC(), 3),
    (UniPC(variant="bh1"), 3),
    (UniPC(3), 4),
    (DEIS(1), 1),
    (DEIS(), 2),
    (DEIS(3), 2),
    (RES2M(), 2),
    (RES2S(), 2),
    (RES3S(), 3),
]
STOCHASTIC = [StochasticEuler(churn=1.5), SASolver(), SASolver(0.5, 3, 3), SASolver(1.0, 1, 0, high=0.8)]
ALL = [*DETERMINISTIC, *(solver for solver, _ in EXPONENTIAL), *STOCHASTIC]
X = torch.tensor([-1.5, -0.4, 0.1, 0.8, 2.0], dtype=torch.float64)


def name(value: object) -> str:
    return type(value).__name__


def gaussian(mean: float, std: float) -> Velocity:
    """Data N(mean, std^2): x at sigma is N((1 - sigma) mean, (1 - sigma)^2 std^2 + sigma^2)."""

    def velocity(x: Tensor, sigma: float) -> Tensor:
        variance = (1 - sigma) ** 2 * std**2 + sigma**2
        slope = (sigma - (1 - sigma) * std**2) / variance  # of E[eps | x] - E[x0 | x] in x
        return slope * (x - (1 - sigma) * mean) - mean

    return velocity


def gaussian_map(x: Tensor, sigma: float, to: float, mean: float, std: float) -> Tensor:
    """The flow keeps the standard score."""

    def spread(s: float) -> float:
        return math.sqrt((1 - s) ** 2 * std**2 + s**2)

    return (x - (1 - sigma) * mean) / spread(sigma) * spread(to) + (1 - to) * mean


def mixture(x: Tensor, sigma: float) -> Tensor:
    """Data 0.3 N(-1, 0.5^2) + 0.7 N(0.8, 0.6^2): velocities of the parts, weighted by how likely each made x."""
    parts = ((0.3, -1.0, 0.5), (0.7, 0.8, 0.6))
    weights: list[Tensor] = []
    velocities: list[Tensor] = []
    for share, mean, std in parts:
        spread = math.sqrt((1 - sigma) ** 2 * std**2 + sigma**2)
        weights.append(share / spread * torch.exp(-0.5 * ((x - (1 - sigma) * mean) / spread) ** 2))
        velocities.append(gaussian(mean, std)(x, sigma))
    stacked = torch.stack(weights)
    return (stacked * torch.stack(velocities)).sum(0) / stacked.sum(0)


def point(x0: Tensor) -> Velocity:
    """All data at x0: no number at sigma 0."""
    return lambda x, sigma: (x - x0) / sigma


def steady(degree: int) -> Velocity:
    """A velocity that is a power of sigma alone."""
    return lambda x, sigma: torch.full_like(x, sigma**degree)


def order(error: Callable[[int], float], counts: Sequence[int]) -> float:
    """Minus the slope of log error over log steps, fitted."""
    slope, _ = np.polyfit(np.log(counts), np.log([error(n) for n in counts]), 1)
    return -float(slope)

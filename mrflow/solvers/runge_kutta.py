"""Runge-Kutta methods in sigma: what is asked within a step is forgotten after it."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from mrflow.flow import Velocity
from mrflow.solvers.base import History, Solver, combine


@dataclass(frozen=True)
class Euler(Solver):
    """x + h v, order 1, with h = to - sigma. Exact where the clean estimate does not change."""

    pointwise: ClassVar[bool] = True

    def step(self, v: Velocity, x: Tensor, sigma: float, to: float, past: History) -> tuple[Tensor, History]:
        return combine(x, to - sigma, (1.0,), (v(x, sigma),)), ()


@dataclass(frozen=True)
class Heun(Solver):
    """x + h (v1 + v2) / 2, v2 at the end of an Euler step: order 2 (Karras et al. 2022, arXiv 2206.00364, alg. 1).

    A step to 0 is Euler's: its local error h^2 is that of the whole integration, so the order stays 2.
    """

    pointwise: ClassVar[bool] = True
    evals: ClassVar[int] = 2

    def step(self, v: Velocity, x: Tensor, sigma: float, to: float, past: History) -> tuple[Tensor, History]:
        return runge_kutta(_EULER if to == 0.0 else _HEUN, v, x, sigma, to), ()


@dataclass(frozen=True)
class Midpoint(Solver):
    """x + h v(x + h/2 v1, sigma + h/2): order 2. Its second evaluation lies half-way, so every step is alike."""

    pointwise: ClassVar[bool] = True
    evals: ClassVar[int] = 2

    def step(self, v: Velocity, x: Tensor, sigma: float, to: float, past: History) -> tuple[Tensor, History]:
        return runge_kutta(MIDPOINT, v, x, sigma, to), ()


@dataclass(frozen=True)
class RK4(Solver):
    """x + h (v1 + 2 v2 + 2 v3 + v4) / 6: the classical Runge-Kutta method of order 4 (Kutta 1901).

    A step to 0 is Ralston's of order 3 (1962), which stays above 0: its local error h^4 keeps the whole order at 4.
    """

    pointwise: ClassVar[bool] = True
    evals: ClassVar[int] = 4

    def step(self, v: Velocity, x: Tensor, sigma: float, to: float, past: History) -> tuple[Tensor, History]:
        return runge_kutta(RALSTON if to == 0.0 else _RK4, v, x, sigma, to), ()


@dataclass(frozen=True)
class Tableau:
    """An explicit Runge-Kutta method: stage i lies at node i, reached by row i; the step is made of `weights`."""

    nodes: tuple[float, ...]
    rows: tuple[tuple[float, ...], ...]
    weights: tuple[float, ...]


_EULER = Tableau((0.0,), ((),), (1.0,))
_HEUN = Tableau((0.0, 1.0), ((), (1.0,)), (0.5, 0.5))
MIDPOINT = Tableau((0.0, 0.5), ((), (0.5,)), (0.0, 1.0))
RALSTON = Tableau((0.0, 0.5, 0.75), ((), (0.5,), (0.0, 0.75)), (2 / 9, 1 / 3, 4 / 9))
_RK4 = Tableau((0.0, 0.5, 0.5, 1.0), ((), (0.5,), (0.0, 0.5), (0.0, 0.0, 1.0)), (1 / 6, 1 / 3, 1 / 3, 1 / 6))


def runge_kutta(method: Tableau, v: Velocity, x: Tensor, sigma: float, to: float) -> Tensor:
    """One step of a method from `sigma` to `to`."""
    stages: list[Tensor] = []
    for node, row in zip(method.nodes, method.rows, strict=True):
        at = to if node == 1.0 else sigma + node * (to - sigma)
        stages.append(v(combine(x, to - sigma, row, stages), at))
    return combine(x, to - sigma, method.weights, stages)

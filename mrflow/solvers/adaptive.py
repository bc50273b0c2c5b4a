"""Embedded pairs that choose their steps by a tolerance. The picture decides what they cost; a plan estimates it."""

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from mrflow._checks import Bound, check_number
from mrflow.errors import PlanError
from mrflow.flow import Velocity
from mrflow.schedules.base import Sigmas, check_sigmas
from mrflow.solvers.base import History, Solver, combine, integrate


@dataclass(frozen=True)
class Pair:
    """An explicit Runge-Kutta method with `error`, its difference from another one, of order `low`, in the same stages.

    With `reuses`, the last stage lies at the end of the step and is the first of the next one.
    """

    nodes: tuple[float, ...]
    rows: tuple[tuple[float, ...], ...]
    weights: tuple[float, ...]
    error: tuple[float, ...]
    low: int
    reuses: bool = True


BOGACKI_SHAMPINE = Pair(
    (0.0, 0.5, 0.75, 1.0),
    ((), (0.5,), (0.0, 0.75), (2 / 9, 1 / 3, 4 / 9)),
    (2 / 9, 1 / 3, 4 / 9, 0.0),
    (2 / 9 - 7 / 24, 1 / 3 - 1 / 4, 4 / 9 - 1 / 3, -1 / 8),
    2,
)
BELOW_THE_END = Pair(
    (0.0, 0.5, 0.75), ((), (0.5,), (0.0, 0.75)), (2 / 9, 1 / 3, 4 / 9), (2 / 9, -2 / 3, 4 / 9), 2, reuses=False
)
DORMAND_PRINCE = Pair(
    (0.0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0),
    (
        (),
        (1 / 5,),
        (3 / 40, 9 / 40),
        (44 / 45, -56 / 15, 32 / 9),
        (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
        (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
        (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
    ),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84, 0.0),
    (71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40),
    4,
)


@dataclass(frozen=True)
class AdaptiveSolver(Solver):
    """A solver that takes as many steps between the levels of its schedule as `tolerance` asks for.

    A step stands where the root mean square over the picture of error / (1 + |x|) is at most `tolerance`; its length
    then changes by 0.9 (tolerance / error)^(1 / p), within 0.2 and 5 (Hairer, Norsett & Wanner, Solving ODEs I, II.4).
    A schedule of one step, `Explicit((1.0, 0.0))`, leaves all to it; the first step is at most 0.25. Each picture of a
    batch has steps of its own, so the field must take one picture. `points` and a plan are estimates: those of a known
    mixture of two Gaussians.

    `zero=True` says that the field may be asked for at sigma 0, which a model must allow (`Capabilities(zero=True)`).
    Otherwise the last step, to 0, is Ralston's of order 3, which stays above it, with the midpoint rule beside it.
    """

    tolerance: Annotated[float, Bound(check_number, 1e-10, 1.0)] = 1e-3
    zero: bool = field(default=False, kw_only=True)
    estimated: ClassVar[bool] = True

    @property
    @abstractmethod
    def pair(self) -> Pair:
        """The method and its companion."""

    @property
    def at_zero(self) -> bool:
        return self.zero

    def points(self, sigmas: Sequence[float]) -> tuple[float, ...]:
        """Where it asks on a mixture that is known in closed form: an estimate, unlike that of other solvers."""
        return _estimate(self, check_sigmas(sigmas))

    def step(self, v: Velocity, x: Tensor, sigma: float, to: float, past: History) -> tuple[Tensor, History]:
        lengths = past[0][1].tolist() if past else [min(sigma - to, 0.25)] * len(x)
        known = past[1][1].split(1) if len(past) > 1 else [None] * len(x)
        each = [
            self._across(v, item, sigma, to, length, now)
            for item, length, now in zip(x.split(1), lengths, known, strict=True)
        ]
        velocities = [now for _, _, now in each if now is not None]
        kept: History = ((to, torch.tensor([length for _, length, _ in each], dtype=torch.float64, device="cpu")),)
        if len(velocities) == len(each):
            kept = (*kept, (to, torch.cat(velocities)))
        return torch.cat([item for item, _, _ in each]), kept

    def _across(
        self, v: Velocity, x: Tensor, sigma: float, to: float, length: float, now: Tensor | None
    ) -> tuple[Tensor, float, Tensor | None]:
        """One picture from sigma to `to`: the state there, the next step's length, the velocity where it is known."""
        at, last = sigma, math.inf  # `last`: the longest step to 0 that is worth trying
        while at > to:
            left = at - to
            ends = left <= length * 1.01
            pair, final = self.pair, False
            if to == 0.0 and not self.zero and ends:
                if left > last * 1.01:
                    length, ends = left - last, False
                else:
                    pair, final = BELOW_THE_END, True
            goal = to if ends else at - length
            if not ends and at - goal < 1e-7:
                raise PlanError(
                    f"{self!r} needs steps shorter than 1e-7 at sigma {at:g}: the field jumps there, or the "
                    "tolerance is below its rounding; give a larger tolerance"
                )
            if now is None:
                now = v(x, at)
            stages = [now]
            for node, row in zip(pair.nodes[1:], pair.rows[1:], strict=True):
                level = goal if node == 1.0 else at + node * (goal - at)
                stages.append(v(combine(x, goal - at, row, stages), level))
            end = combine(x, goal - at, pair.weights, stages)
            wrong = combine(torch.zeros_like(x), goal - at, pair.error, stages) / (
                1.0 + torch.maximum(x.abs(), end.abs())
            )
            error = float(wrong.square().mean().sqrt()) / self.tolerance
            if not math.isfinite(error):
                return end, length, None  # the loop says which step it was
            factor = min(5.0, max(0.2, 0.9 * error ** (-1.0 / (pair.low + 1)))) if error > 0.0 else 5.0
            if error <= 1.0:
                if not ends or factor < 1.0:
                    length = (at - goal) * factor  # a step that was cut short by `to` says little of a longer one
                x, at, now = end, goal, stages[-1] if pair.reuses else None
            elif final:
                last = left * min(factor, 1.0)
            else:
                length = (at - goal) * min(factor, 1.0)
        return x, length, now


@dataclass(frozen=True)
class BogackiShampine(AdaptiveSolver):
    """The pair 3(2) of Bogacki & Shampine (1989): three evaluations a step, the fourth is the next step's first.

    For the other settings see `AdaptiveSolver`.
    """

    evals: ClassVar[int] = 3

    @property
    def pair(self) -> Pair:
        """The method and its companion."""
        return BOGACKI_SHAMPINE


@dataclass(frozen=True)
class DormandPrince(AdaptiveSolver):
    """The pair 5(4) of Dormand & Prince (1980), "dopri5": six evaluations a step, the seventh is the next one's first.

    For the other settings see `AdaptiveSolver`.
    """

    evals: ClassVar[int] = 6

    @property
    def pair(self) -> Pair:
        """The method and its companion."""
        return DORMAND_PRINCE


@lru_cache(maxsize=256)
def _estimate(solver: AdaptiveSolver, sigmas: Sigmas) -> tuple[float, ...]:
    """Where it asks for the field of data at -1 or 1, each with deviation 0.2, in one picture of 16 numbers."""
    seen: list[float] = []

    def mixture(x: Tensor, sigma: float) -> Tensor:
        seen.append(sigma)
        signal = 1.0 - sigma
        variance = (signal * 0.2) ** 2 + sigma**2
        mean = torch.tanh(signal * x / variance)  # of -1 and 1, weighted by how likely each made x
        return (sigma - signal * 0.2**2) / variance * (x - signal * mean) - mean

    data = torch.tensor([-1.2, -0.9, 0.8, 1.1], dtype=torch.float64, device="cpu")
    noise = torch.tensor([-1.5, -0.4, 0.3, 1.2], dtype=torch.float64, device="cpu")
    x = ((1.0 - sigmas[0]) * data[:, None] + sigmas[0] * noise).reshape(1, -1)
    integrate(solver, mixture, x, sigmas)
    return tuple(seen)

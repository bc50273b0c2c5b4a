"""How the velocity is integrated from one noise level to the next, and the loop that does it, which exists once.

Solvers are frozen and hold nothing: what a multistep solver remembers goes through `step` as `History`. A solver
evaluates the velocity at noise level 0, where a model was hardly trained and (x - x0) / sigma is 0/0, only if it was
told that it may (`Solver.at_zero`).
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from mrflow import flow
from mrflow._checks import Checked
from mrflow.errors import NonFiniteError, PlanError, PromiseError
from mrflow.flow import Velocity
from mrflow.schedules.base import Sigmas, check_sigmas

History = tuple[tuple[float, Tensor], ...]
"""What a solver remembers: (sigma, tensor), newest last; the velocity there, unless the solver says otherwise."""


class Solver(Checked, ABC):
    """One step of integration. Write your own: a frozen dataclass with `step`, and `evals` where it is not 1."""

    evals: ClassVar[int] = 1
    """Evaluations of a full step; `points` has the exact number for a schedule, with its first and last steps."""

    order_at_ends: ClassVar[float] = math.inf
    """The most its order can be where an integration begins at sigma 1 or goes to 0; 2 for steps in log-SNR."""

    estimated: ClassVar[bool] = False
    """Whether the picture decides how often it asks, so that `points` is an estimate."""

    pointwise: ClassVar[bool] = False
    """Whether a step does the same with every value, wherever it lies in x, which may then be packed into tokens."""

    @property
    def at_zero(self) -> bool:
        """Whether it was told that it may ask for the field at sigma 0; a solver that never does needs no telling."""
        return False

    @abstractmethod
    def step(self, v: Velocity, x: Tensor, sigma: float, to: float, past: History) -> tuple[Tensor, History]:
        """The state at `to`, from `x` at `sigma`, and the history for the next step. Does not change `x`."""

    def points(self, sigmas: Sequence[float]) -> tuple[float, ...]:
        """Every noise level at which `integrate` evaluates the velocity, in order.

        Found by integrating a single number, so it cannot differ from what a run does.
        """
        return _points(self, check_sigmas(sigmas))


class StochasticSolver(Solver):
    """A solver that adds noise. It never draws any: `integrate` hands it one tensor for each step."""

    @abstractmethod
    def step(
        self, v: Velocity, x: Tensor, sigma: float, to: float, past: History, *, noise: Tensor | None = None
    ) -> tuple[Tensor, History]:
        """As `Solver.step`, with Gaussian `noise` of the shape of x."""


@dataclass(frozen=True)
class Step:
    """What `integrate` tells after a step: number `index` (from 1) of `steps`, from `sigma` to `to`.

    `x` is the state at `to`; `denoised` is the clean estimate there, from the newest velocity (x itself at 0).
    """

    index: int
    steps: int
    sigma: float
    to: float
    x: Tensor
    denoised: Tensor


NOWHERE = (
    "no solver may ask for the field at sigma 0 unless it was told so, nor outside [0, 1]: in a step to 0 (`to == 0`) "
    "take points above it, as Heun takes Euler's step"
)


def integrate(
    solver: Solver,
    velocity: Velocity,
    x: Tensor,
    sigmas: Sequence[float],
    *,
    on_step: Callable[[Step], None] | None = None,
    on_evaluation: Callable[[float], None] | None = None,
    noise: Callable[[], Tensor] | None = None,
    facts: Sequence[str] = (),
) -> Tensor:
    """The state at the last of `sigmas`, from `x` at the first: d x / d sigma = velocity(x, sigma).

    The state is float32 (float64 where `x` is). `noise` is called once for each step of a `StochasticSolver` and never
    for another solver. `on_evaluation` is told the sigma of each evaluation. `facts` (a dtype, a model's name) are
    added to the text of a NonFiniteError.

    Raises:
        PlanError: the levels are not in [0, 1] and falling, `x` holds no floating-point numbers, noise is missing, or
            the solver asks for the field at sigma 0 without having been told that it may.
        PromiseError: the velocity or the noise has another shape than `x`.
        NonFiniteError: NaN or infinity after a step; on a GPU once all steps were asked for.
    """
    sigmas = check_sigmas(sigmas)
    if not x.is_floating_point():
        raise PlanError(f"a state must hold floating-point numbers, got {x.dtype}; call x.float()")
    if isinstance(solver, StochasticSolver) and noise is None:
        raise PlanError(f"{solver!r} adds noise; give integrate(..., noise=...), a function that draws it")
    x = x if x.dtype == torch.float64 else x.float()
    steps = len(sigmas) - 1
    past: History = ()
    newest: list[Tensor] = []
    check = FiniteCheck()

    def checked(x: Tensor, sigma: float) -> Tensor:
        if not 0 < sigma <= 1 and not (sigma == 0 and solver.at_zero):
            raise PlanError(f"{solver!r} asks for the field at sigma {sigma:g}; {NOWHERE}")
        if on_evaluation is not None:
            on_evaluation(sigma)
        newest[:] = [_like(x, velocity(x, sigma), "the velocity")]
        return newest[0]

    for index in range(1, steps + 1):
        sigma, to = sigmas[index - 1], sigmas[index]
        if isinstance(solver, StochasticSolver):
            assert noise is not None
            x, past = solver.step(checked, x, sigma, to, past, noise=_like(x, noise(), "the noise"))
        else:
            x, past = solver.step(checked, x, sigma, to, past)
        check.step(x, f"after step {index} of {steps} ({', '.join((f'sigma {sigma:g} -> {to:g}', *facts))})")
        if on_step is not None:
            on_step(Step(index, steps, sigma, to, x, flow.denoised(x, newest[0], to)))
    check.end()
    return x


class FiniteCheck:
    """Refuses states that hold NaN or infinity: on a CPU after each step, elsewhere once `end` is called.

    To read a number from a GPU is to wait for everything that was asked of it. So each state's largest magnitude, which
    NaN and infinity go through, stays there until the last step was asked for.
    """

    def __init__(self) -> None:
        self.waiting: list[tuple[Tensor, str]] = []

    def step(self, x: Tensor, where: str) -> None:
        """Look at a state, or remember to; `where` says which it is, for the error.

        Raises:
            NonFiniteError: "NaN" or "infinity", and `where`.
        """
        if x.device.type != "cpu":
            self.waiting.append((torch.linalg.vector_norm(x, math.inf), where))
        elif not flow.finite(x):
            _refuse(bool(torch.isnan(x).any()), where)

    def end(self) -> None:
        """Read what was remembered.

        Raises:
            NonFiniteError: as `step`, of the first state that is not finite.
        """
        if not self.waiting:
            return
        norms, places = zip(*self.waiting, strict=True)
        for norm, where in zip(torch.stack(norms).tolist(), places, strict=True):
            if not math.isfinite(norm):
                _refuse(math.isnan(norm), where)


def _refuse(nan: bool, where: str) -> None:  # noqa: FBT001
    raise NonFiniteError(f"{'NaN' if nan else 'infinity'} {where}")


@lru_cache(maxsize=1024)
def _points(solver: Solver, sigmas: Sigmas) -> tuple[float, ...]:
    seen: list[float] = []

    def still(x: Tensor, sigma: float) -> Tensor:
        seen.append(sigma)
        return torch.zeros_like(x)

    zero = torch.zeros((), device="cpu")
    integrate(solver, still, zero, sigmas, noise=lambda: zero)
    return tuple(seen)


def _like(x: Tensor, other: Tensor, what: str) -> Tensor:
    if other.shape != x.shape:
        raise PromiseError(f"{what} must have the state's shape {tuple(x.shape)}, got {tuple(other.shape)}")
    return other.to(x.dtype)


def combine(x: Tensor, h: float, weights: Sequence[float], velocities: Sequence[Tensor]) -> Tensor:
    """x + h (w1 v1 + w2 v2 + ...), the terms without weight left out."""
    for weight, velocity in zip(weights, velocities, strict=True):
        if weight != 0.0:
            x = torch.add(x, velocity, alpha=h * weight)
    return x


def half_log_snr(sigma: float) -> float:
    """lambda = log((1 - sigma) / sigma), as log1p so that levels next to 1 keep their digits."""
    return math.log1p(-sigma) - math.log(sigma)

"""How the velocity is integrated from one noise level to the next, and the loop that does it, which exists once.

Solvers are frozen and hold nothing: what a multistep solver remembers goes through `step` as `History`. No solver
evaluates the velocity at noise level 0, where a model was hardly trained and (x - x0) / sigma is 0/0.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor

from mrflow import flow
from mrflow._checks import check_number, check_whole
from mrflow.errors import NonFiniteError, PlanError, PromiseError
from mrflow.flow import Velocity
from mrflow.schedules import Sigmas, check_sigmas, shift

History = tuple[tuple[float, Tensor], ...]
"""What a solver remembers: (sigma, tensor), newest last; the velocity there, unless the solver says otherwise."""


class Solver(ABC):
    """One step of integration. Write your own: a frozen dataclass with `step`, and `evals` where it is not 1."""

    evals: ClassVar[int] = 1
    """Evaluations of a full step; `points` has the exact number for a schedule, with its first and last steps."""

    @abstractmethod
    def step(self, v: Velocity, x: Tensor, sigma: float, to: float, past: History) -> tuple[Tensor, History]:
        """The state at `to`, from `x` at `sigma`, and the history for the next step. Does not change `x`."""

    def points(self, sigmas: Sequence[float]) -> tuple[float, ...]:
        """Every noise level at which `integrate` evaluates the velocity, in order.

        Found by integrating a single number, so it cannot differ from what a run does.
        """
        return _points(self, check_sigmas(sigmas))

    def evals_for(self, steps: int, *, to_zero: bool = True) -> int:
        """Exact number of evaluations of this many steps, of a schedule that ends at 0 or (cut) above it."""
        check_whole("steps", steps, 1)
        whole = steps if to_zero else steps + 1
        return len(self.points([(whole - i) / whole for i in range(steps + 1)]))


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


NOWHERE = "no solver may ask for the field at sigma 0, nor outside (0, 1]"


def integrate(
    solver: Solver,
    velocity: Velocity,
    x: Tensor,
    sigmas: Sequence[float],
    *,
    on_step: Callable[[Step], None] | None = None,
    noise: Callable[[], Tensor] | None = None,
    facts: Sequence[str] = (),
) -> Tensor:
    """The state at the last of `sigmas`, from `x` at the first: d x / d sigma = velocity(x, sigma).

    The state is float32 (float64 where `x` is). `noise` is called once for each step of a `StochasticSolver` and never
    for another solver. `facts` (a dtype, a model's name) are added to the text of a NonFiniteError.

    Raises:
        PlanError: the levels are not in [0, 1] and falling, `x` holds no floating-point numbers, noise is missing, or
            the solver asks for the field at sigma 0.
        PromiseError: the velocity or the noise has another shape than `x`.
        NonFiniteError: NaN or infinity after a step.
    """
    levels = check_sigmas(sigmas)
    if not x.is_floating_point():
        raise PlanError(f"a state must hold floating-point numbers, got {x.dtype}; call x.float()")
    if isinstance(solver, StochasticSolver) and noise is None:
        raise PlanError(f"{solver!r} adds noise; give integrate(..., noise=...), a function that draws it")
    x = x if x.dtype == torch.float64 else x.float()
    steps = len(levels) - 1
    past: History = ()
    newest: list[Tensor] = []

    def checked(x: Tensor, sigma: float) -> Tensor:
        if not 0 < sigma <= 1:
            raise PlanError(f"{solver!r} asks for the field at sigma {sigma:g}; {NOWHERE}")
        newest[:] = [_like(x, velocity(x, sigma), "the velocity")]
        return newest[0]

    for index in range(1, steps + 1):
        sigma, to = levels[index - 1], levels[index]
        if isinstance(solver, StochasticSolver):
            assert noise is not None
            x, past = solver.step(checked, x, sigma, to, past, noise=_like(x, noise(), "the noise"))
        else:
            x, past = solver.step(checked, x, sigma, to, past)
        if not flow.finite(x):
            what = "NaN" if bool(torch.isnan(x).any()) else "infinity"
            where = ", ".join((f"sigma {sigma:g} -> {to:g}", *facts))
            raise NonFiniteError(f"{what} after step {index} of {steps} ({where})")
        if on_step is not None:
            on_step(Step(index, steps, sigma, to, x, flow.denoised(x, newest[0], to)))
    return x


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


@dataclass(frozen=True)
class Euler(Solver):
    """x + h v, order 1, with h = to - sigma. Exact where the clean estimate does not change."""

    def step(self, v: Velocity, x: Tensor, sigma: float, to: float, past: History) -> tuple[Tensor, History]:
        return _combine(x, to - sigma, (1.0,), (v(x, sigma),)), ()


@dataclass(frozen=True)
class Heun(Solver):
    """x + h (v1 + v2) / 2, v2 at the end of an Euler step: order 2 (Karras et al. 2022, arXiv 2206.00364, alg. 1).

    A step to 0 is Euler's: its local error h^2 is that of the whole integration, so the order stays 2.
    """

    evals: ClassVar[int] = 2

    def step(self, v: Velocity, x: Tensor, sigma: float, to: float, past: History) -> tuple[Tensor, History]:
        return _runge_kutta(_EULER if to == 0.0 else _HEUN, v, x, sigma, to), ()


@dataclass(frozen=True)
class Midpoint(Solver):
    """x + h v(x + h/2 v1, sigma + h/2): order 2. Its second evaluation lies half-way, so every step is alike."""

    evals: ClassVar[int] = 2

    def step(self, v: Velocity, x: Tensor, sigma: float, to: float, past: History) -> tuple[Tensor, History]:
        return _runge_kutta(_MIDPOINT, v, x, sigma, to), ()


@dataclass(frozen=True)
class RK4(Solver):
    """x + h (v1 + 2 v2 + 2 v3 + v4) / 6: the classical Runge-Kutta method of order 4 (Kutta 1901).

    A step to 0 is Ralston's of order 3 (1962), which stays above 0: its local error h^4 keeps the whole order at 4.
    """

    evals: ClassVar[int] = 4

    def step(self, v: Velocity, x: Tensor, sigma: float, to: float, past: History) -> tuple[Tensor, History]:
        return _runge_kutta(_RALSTON if to == 0.0 else _RK4, v, x, sigma, to), ()


@dataclass(frozen=True)
class AB2(Solver):
    """Adams-Bashforth of order 2 for uneven steps: the line through the last two velocities, integrated.

    One evaluation a step. The first step is Euler's, whose local error h^2 keeps the order at 2.
    """

    def step(self, v: Velocity, x: Tensor, sigma: float, to: float, past: History) -> tuple[Tensor, History]:
        past = (*past, (sigma, v(x, sigma)))
        return _adams(x, to, past), past[-1:]


@dataclass(frozen=True)
class AB3(Solver):
    """Adams-Bashforth of order 3 for uneven steps: the parabola through the last three velocities, integrated.

    One evaluation a step, two in the first: it is a midpoint step, the second is AB2's; their local errors h^3 keep the
    order at 3.
    """

    def step(self, v: Velocity, x: Tensor, sigma: float, to: float, past: History) -> tuple[Tensor, History]:
        now = v(x, sigma)
        if not past:
            half = (to - sigma) / 2.0
            middle = v(_combine(x, half, (1.0,), (now,)), sigma + half)
            return _combine(x, to - sigma, (1.0,), (middle,)), ((sigma, now),)
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

    def step(self, v: Velocity, x: Tensor, sigma: float, to: float, past: History) -> tuple[Tensor, History]:
        clean = flow.denoised(x, v(x, sigma), sigma)
        target = clean
        if past and to > 0.0 and past[-1][0] < 1.0:
            before, last = past[-1]
            ratio = (_lambda(to) - _lambda(sigma)) / (_lambda(sigma) - _lambda(before))
            target = torch.lerp(last, clean, 1.0 + ratio / 2.0)
        return torch.lerp(target, x, to / sigma), ((sigma, clean),)


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
        return _combine(x, to - sigma, (1.0,), (v(x, sigma),)), ()


@dataclass(frozen=True)
class _Tableau:
    """An explicit Runge-Kutta method: stage i lies at node i, reached by row i; the step is made of `weights`."""

    nodes: tuple[float, ...]
    rows: tuple[tuple[float, ...], ...]
    weights: tuple[float, ...]


_EULER = _Tableau((0.0,), ((),), (1.0,))
_HEUN = _Tableau((0.0, 1.0), ((), (1.0,)), (0.5, 0.5))
_MIDPOINT = _Tableau((0.0, 0.5), ((), (0.5,)), (0.0, 1.0))
_RALSTON = _Tableau((0.0, 0.5, 0.75), ((), (0.5,), (0.0, 0.75)), (2 / 9, 1 / 3, 4 / 9))
_RK4 = _Tableau((0.0, 0.5, 0.5, 1.0), ((), (0.5,), (0.0, 0.5), (0.0, 0.0, 1.0)), (1 / 6, 1 / 3, 1 / 3, 1 / 6))


def _runge_kutta(method: _Tableau, v: Velocity, x: Tensor, sigma: float, to: float) -> Tensor:
    stages: list[Tensor] = []
    for node, row in zip(method.nodes, method.rows, strict=True):
        at = to if node == 1.0 else sigma + node * (to - sigma)
        stages.append(v(_combine(x, to - sigma, row, stages), at))
    return _combine(x, to - sigma, method.weights, stages)


def _combine(x: Tensor, h: float, weights: Sequence[float], velocities: Sequence[Tensor]) -> Tensor:
    for weight, velocity in zip(weights, velocities, strict=True):
        if weight != 0.0:
            x = torch.add(x, velocity, alpha=h * weight)
    return x


def _adams(x: Tensor, to: float, past: History) -> Tensor:
    # The integral, from the newest level to `to`, of the polynomial through the past velocities.
    newest = past[-1][0]
    weights = _adams_weights(to - newest, [sigma - newest for sigma, _ in past])
    return _combine(x, 1.0, weights, [velocity for _, velocity in past])


def _adams_weights(h: float, nodes: Sequence[float]) -> list[float]:
    # Integral from 0 to h of each Lagrange polynomial, whose coefficients are multiplied out factor by factor.
    weights: list[float] = []
    for i, own in enumerate(nodes):
        poly = [1.0]
        for j, other in enumerate(nodes):
            if j != i:
                up, down = [0.0, *poly], [*poly, 0.0]
                poly = [(u - other * d) / (own - other) for u, d in zip(up, down, strict=True)]
        weights.append(sum(c * h ** (k + 1) / (k + 1) for k, c in enumerate(poly)))
    return weights


def _lambda(sigma: float) -> float:
    # log of (1 - sigma) / sigma, as log1p so that levels next to 1 keep their digits
    return math.log1p(-sigma) - math.log(sigma)

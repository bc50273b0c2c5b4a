"""Which noise levels are visited: tuples of plain floats that fall from `start` to exactly 0.

A schedule lays a grid on [0, 1] and `start` *scales* it: every level is multiplied by `start`, so one grid serves
sampling (start 1) and refinement (start 0.12). `cut` *ends* a schedule early. No tensors, no models.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import Annotated

from mrflow._checks import Bound, Checked, check_number, check_whole, require
from mrflow.errors import PlanError
from mrflow.model_info import ModelInfo, Shift
from mrflow.schedules.quantiles import beta_grid

Sigmas = tuple[float, ...]
"""Noise levels, falling strictly; n steps are n + 1 levels."""

MAX_STEPS = 1000


def shift(s: float, mu: float) -> float:
    """The exponential shift e^mu / (e^mu + 1/s - 1) (Esser et al. 2024, arXiv 2403.03206, eq. 23; FLUX `time_shift`).

    Adds mu to the logit of s, so shifts compose by adding their mu.
    """
    check_within("a noise level", s, 0.0, 1.0)
    check_number("mu", mu)
    if s in (0.0, 1.0):
        return float(s)
    if mu >= 0:
        return s / (s + (1.0 - s) * math.exp(-mu))
    return s * math.exp(mu) / (s * math.exp(mu) + 1.0 - s)


def shift_static(s: float, k: float) -> float:
    """The static shift k s / (1 + (k - 1) s): the exponential one with mu = ln k (arXiv 2403.03206, eq. 23)."""
    check_within("a noise level", s, 0.0, 1.0)
    check_number("a shift factor", k)
    require(k > 0, "a shift factor", "above 0", k)
    return float(s) if s in (0.0, 1.0) else k * s / (k * s + 1.0 - s)


def shift_linear(s: float, mu: float) -> float:
    """The "linear" shift mu / (mu + 1/s - 1) of diffusers' `time_shift_type`: a static shift whose factor is mu."""
    return shift_static(s, mu)


def stretch(sigmas: Sequence[float], terminal: float) -> Sigmas:
    """The schedule with its last level before 0 at `terminal`: 1 - (1 - s) (1 - terminal) / (1 - s_last).

    Levels 1 and 0 stay (diffusers `stretch_shift_to_terminal`, used by Qwen-Image). Where 1 is the last level before 0
    there is nothing to stretch (the reference gives 0/0 there).
    """
    sigmas = check_sigmas(sigmas)
    check_between("terminal", terminal, 0.0, 1.0)
    if sigmas[-1] != 0.0:
        raise PlanError(f"only a schedule that ends at 0 can be stretched, this one ends at {sigmas[-1]:g}")
    last = sigmas[-2]
    if last == 1.0:
        return sigmas
    ratio = (1.0 - terminal) / (1.0 - last)
    return check_sigmas([*(1.0 - (1.0 - s) * ratio for s in sigmas[:-2]), float(terminal), 0.0])


def cut(sigmas: Sequence[float], stop: float) -> Sigmas:
    """The schedule ended early: its levels above `stop`, then `stop`."""
    sigmas = check_sigmas(sigmas)
    check_number("stop", stop)
    if not sigmas[-1] <= stop < sigmas[0]:
        raise PlanError(f"stop must be from {sigmas[-1]:g} to below {sigmas[0]:g} (this schedule), got {stop!r}")
    return (*(s for s in sigmas if s > stop), float(stop))


def check_sigmas(sigmas: Sequence[float]) -> Sigmas:
    """The same levels as a tuple of floats.

    Raises:
        PlanError: fewer than two levels, one that is not a number in [0, 1], or one not below the level before it.
    """
    if len(sigmas) < 2:
        raise PlanError(f"a schedule needs at least two noise levels, got {tuple(sigmas)!r}; one step is (1.0, 0.0)")
    for i, s in enumerate(sigmas):
        if type(s) is not float or not 0.0 <= s <= 1.0:  # most are right, and are checked several times a run
            check_within(f"noise level {i + 1} of {len(sigmas)}", s, 0.0, 1.0)
    sigmas = tuple(float(s) for s in sigmas)
    for i in range(1, len(sigmas)):
        if not sigmas[i] < sigmas[i - 1]:
            raise PlanError(
                f"noise levels must fall strictly, but level {i + 1} of {len(sigmas)} is {sigmas[i]!r} "
                f"after {sigmas[i - 1]!r}"
            )
    return sigmas


def check_within(what: str, value: float, low: float, high: float) -> None:
    """Refuse what is no number from low to high."""
    check_number(what, value)
    check_number(what, value, low, high)


def check_between(what: str, value: float, low: float, high: float) -> None:
    """Refuse what is no number above low and below high."""
    check_number(what, value)
    require(low < value < high, what, f"above {low:g} and below {high:g}", value)


Steps = Annotated[int, Bound(check_whole, 1, MAX_STEPS)]


class Schedule(Checked, ABC):
    """A way to choose noise levels. Write your own: a frozen dataclass with this one method."""

    @abstractmethod
    def __call__(self, start: float, tokens: int, model: ModelInfo) -> Sigmas:
        """Levels that fall strictly from `start` to exactly 0, for a picture of this many image tokens."""


@dataclass(frozen=True)
class Linear(Schedule):
    """Even steps: start (1 - i / steps)."""

    steps: Steps

    def __call__(self, start: float, tokens: int, model: ModelInfo) -> Sigmas:
        return scale(_even(self.steps), start)


@dataclass(frozen=True)
class Shifted(Schedule):
    """Even steps bent by a resolution-dependent shift; None is the model's own curve, with its kind and terminal.

    start stretch(shift(1 - i / steps, mu(tokens)), terminal), as diffusers FlowMatchEulerDiscreteScheduler does; with
    `last`, the even grid from 1 ends there before 0. One step is (start, 0), also with a terminal.
    """

    steps: Steps
    shift: Shift | None = field(default=None, kw_only=True)

    def __call__(self, start: float, tokens: int, model: ModelInfo) -> Sigmas:
        return scale(_shifted(self.steps, tokens, model.shift if self.shift is None else self.shift), start)


@dataclass(frozen=True)
class Explicit(Schedule):
    """Levels as given, ending in 0. Where they begin at 1 they are a unit grid, scaled by `start` like any other.

    Otherwise they must begin at `start` itself.
    """

    sigmas: Sigmas

    def __post_init__(self) -> None:
        sigmas = check_sigmas(self.sigmas)
        if sigmas[-1] != 0.0:
            raise PlanError(f"explicit levels must end in 0, got {sigmas}; try {(*sigmas, 0.0)}")
        object.__setattr__(self, "sigmas", sigmas)

    def __call__(self, start: float, tokens: int, model: ModelInfo) -> Sigmas:
        _check_start(start)
        if self.sigmas[0] == start:
            return self.sigmas
        unit = tuple(s / self.sigmas[0] for s in self.sigmas)
        if self.sigmas[0] != 1.0:
            raise PlanError(
                f"explicit levels begin at {self.sigmas[0]!r} but are asked to begin at {start!r}; "
                f"try Explicit({scale(unit, start)})"
            )
        return scale(unit, start)


@dataclass(frozen=True)
class DirectSigma(Schedule):
    """The official MrFlow refinement: linspace(start, 0, steps + 1), with no shift and no terminal.

    With `mu` None this is `Linear`, under the name that the official code uses. A `mu` bends it as the ComfyUI node of
    the same repository does: start shift(1 - i / steps, mu); `DirectSigma.comfyui` gives that node's mu.
    """

    steps: Steps
    mu: Annotated[float | None, Bound(check_within, -20.0, 20.0)] = field(default=None, kw_only=True)

    @staticmethod
    def comfyui(steps: int) -> "DirectSigma":
        """The ComfyUI node's own schedule: mu = 0.25 (steps - 1)."""
        check_whole("steps", steps, 1, MAX_STEPS)
        return DirectSigma(steps, mu=0.25 * (steps - 1))

    def __call__(self, start: float, tokens: int, model: ModelInfo) -> Sigmas:
        mu = 0.0 if self.mu is None else self.mu
        return scale((shift(s, mu) for s in _even(self.steps)), start)


@dataclass(frozen=True)
class Karras(Schedule):
    """Even steps in sigma^(1/rho), from 1 to `low`, then 0 (Karras et al. 2022, arXiv 2206.00364, eq. 5).

    Applied to flow levels as they are, as diffusers `use_karras_sigmas` does. `low` None is the last level before 0 of
    the model's own curve at this many steps.
    """

    steps: Steps
    rho: Annotated[float, Bound(check_within, 1.0, 100.0)] = field(default=7.0, kw_only=True)
    low: Annotated[float | None, Bound(check_between, 0.0, 1.0)] = field(default=None, kw_only=True)

    def __call__(self, start: float, tokens: int, model: ModelInfo) -> Sigmas:
        n = self.steps
        if n == 1:
            return scale((1.0, 0.0), start)
        low = _shifted(n, tokens, model.shift)[-2] if self.low is None else self.low
        end = low ** (1.0 / self.rho)
        sigmas = ((1.0 + i / (n - 1) * (end - 1.0)) ** self.rho for i in range(1, n - 1))
        return scale((1.0, *sigmas, low, 0.0), start)


@dataclass(frozen=True)
class Beta(Schedule):
    """Quantiles of the beta distribution at 1 - i / steps, without a shift (Lee et al. 2024, arXiv 2407.12173).

    alpha = beta = 1 is `Linear`; below 1, steps gather at both ends. ComfyUI's "beta" takes these quantiles of the
    model's shifted table, which is `WithShift(Beta(steps))` up to the table's rounding. diffusers' `use_beta_sigmas`
    takes those at 1 - i / (steps - 1) of the way from `low`, the last level before 0 of the shifted schedule, to 1:
    `Beta(steps, low=Shifted(steps)(1.0, tokens, model)[-2])`. `low` does nothing in one step.
    """

    steps: Steps
    alpha: Annotated[float, Bound(check_within, 0.25, 100.0)] = field(default=0.6, kw_only=True)
    beta: Annotated[float, Bound(check_within, 0.25, 100.0)] = field(default=0.6, kw_only=True)
    low: Annotated[float | None, Bound(check_between, 0.0, 1.0)] = field(default=None, kw_only=True)

    def __call__(self, start: float, tokens: int, model: ModelInfo) -> Sigmas:
        if self.low is not None and self.steps > 1:
            low, grid = self.low, beta_grid(self.steps - 1, float(self.alpha), float(self.beta))
            return scale((*(low + q * (1.0 - low) for q in grid), 0.0), start)
        return scale(beta_grid(self.steps, float(self.alpha), float(self.beta)), start)


@dataclass(frozen=True)
class LogitNormal(Schedule):
    """Quantiles at 1 - i / steps of the logit-normal density that flow models are trained with, without a shift.

    sigmoid(mean + std z), z the normal quantile (arXiv 2403.03206, eq. 19): steps lie where training looked. Where
    training or sampling shifted its levels as well, that is `WithShift(LogitNormal(steps))`; a shift by mu is the same
    as mu added to `mean`.
    """

    steps: Steps
    mean: Annotated[float, Bound(check_within, -5.0, 5.0)] = field(default=0.0, kw_only=True)
    std: Annotated[float, Bound(check_within, 0.01, 8.0)] = field(default=1.0, kw_only=True)

    def __call__(self, start: float, tokens: int, model: ModelInfo) -> Sigmas:
        normal, n = NormalDist(), self.steps
        logits = (self.mean - self.std * normal.inv_cdf(i / n) for i in range(1, n))
        return scale((1.0, *(1.0 / (1.0 + math.exp(-z)) for z in logits), 0.0), start)


@dataclass(frozen=True)
class Cosine(Schedule):
    """The cosine schedule in flow form, without a shift: tan(a) / (1 + tan(a)), a = pi/2 (1 - i / steps).

    The "CosMap" of arXiv 2403.03206, eq. 21: its signal-to-noise ratio is that of alpha = cos, sigma = sin.
    """

    steps: Steps

    def __call__(self, start: float, tokens: int, model: ModelInfo) -> Sigmas:
        angles = (math.pi / 2 * s for s in _even(self.steps)[1:-1])
        return scale((1.0, *(math.sin(a) / (math.sin(a) + math.cos(a)) for a in angles), 0.0), start)


@dataclass(frozen=True)
class WithShift(Schedule):
    """Another schedule's levels bent by a resolution-dependent shift; None is the model's own curve.

    start stretch(shift(s, mu(tokens)), terminal) of every level s that `inner` has from 1: `WithShift(Linear(n))` is
    `Shifted(n)`, but for a curve's `last`, which is of even grids alone.
    """

    inner: Schedule
    shift: Shift | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.inner, Schedule):
            raise PlanError(f"WithShift bends a schedule, such as WithShift(Beta(12)), got {self.inner!r}")
        if self.shift is not None and not isinstance(self.shift, Shift):
            raise PlanError(
                f"a shift is a Shift, such as Shift.fixed(3.0), or None for the model's own, got {self.shift!r}"
            )

    def __call__(self, start: float, tokens: int, model: ModelInfo) -> Sigmas:
        grid = self.inner(1.0, tokens, model)
        return scale(_bend(grid, tokens, model.shift if self.shift is None else self.shift), start)


@dataclass(frozen=True)
class FlowMap(Schedule):
    """pi-Flow's levels (Chen et al. 2025, arXiv 2510.14974; LakonLab `flow_map_sde.py`).

    shift_static(1 - i / (steps - 1 + final_step), shift), then 0: the last step has `final_step` of a full step's
    length before the shift. 4 steps with final_step 1: 1, 0.9057, 0.7619, 0.5161, 0.
    """

    steps: Steps
    shift: Annotated[float, Bound(check_within, 0.001, 1000.0)] = field(default=3.2, kw_only=True)
    final_step: Annotated[float, Bound(check_within, 0.001, 1.0)] = field(default=0.5, kw_only=True)

    def __call__(self, start: float, tokens: int, model: ModelInfo) -> Sigmas:
        whole = self.steps - 1 + self.final_step
        raw = ((self.steps - 1 - i + self.final_step) / whole for i in range(self.steps))
        return scale((*(shift_static(r, self.shift) for r in raw), 0.0), start)


def _even(steps: int) -> Sigmas:
    return tuple((steps - i) / steps for i in range(steps + 1))


def _shifted(steps: int, tokens: int, curve: Shift) -> Sigmas:
    grid = _even(steps)
    if curve.last is not None and steps > 1:
        grid = (*(1.0 - (1.0 - curve.last) * (i / (steps - 1)) for i in range(steps - 1)), curve.last, 0.0)
    return _bend(grid, tokens, curve)


def _bend(grid: Sigmas, tokens: int, curve: Shift) -> Sigmas:
    check_whole("tokens", tokens, 1)
    mu = curve.mu(tokens, steps=len(grid) - 1)
    bend = shift if curve.kind == "exponential" else shift_linear
    sigmas = tuple(bend(s, mu) for s in grid)
    return sigmas if curve.terminal is None else stretch(sigmas, curve.terminal)


def scale(unit: Iterable[float], start: float) -> Sigmas:
    """A unit grid times `start`.

    Raises:
        PlanError: two of the levels are the same.
    """
    _check_start(start)
    sigmas = tuple(start * s for s in unit)
    for i in range(1, len(sigmas)):
        if not sigmas[i] < sigmas[i - 1]:
            raise PlanError(
                f"these settings give level {i} and level {i + 1} of {len(sigmas)} the same value {sigmas[i]!r}; "
                "take fewer steps or a milder curve"
            )
    return sigmas


def _check_start(start: float) -> None:
    check_number("start", start)
    require(0.0 < start <= 1.0, "start", "above 0 and at most 1", start)

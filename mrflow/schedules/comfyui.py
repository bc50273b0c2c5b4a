"""Schedules of other programs, by their names there: ComfyUI's and, of RES4LYF, `bong_tangent`."""

import math
from dataclasses import dataclass, field
from typing import Annotated, Literal

from mrflow._checks import Bound, check_whole
from mrflow.errors import PlanError
from mrflow.model_info import ModelInfo, Shift
from mrflow.schedules.base import Schedule, Sigmas, Steps, check_between, check_within, scale, shift, shift_static
from mrflow.schedules.quantiles import beta_grid

Name = Literal["simple", "sgm_uniform", "beta", "linear_quadratic", "kl_optimal", "bong_tangent"]
TABLED = ("simple", "sgm_uniform", "beta")


@dataclass(frozen=True)
class ComfyUI(Schedule):
    """A schedule as ComfyUI makes it for a flow model, by its name there ("bong_tangent": as RES4LYF does).

    ComfyUI keeps a table of the noise levels of i / `table`, i from 1, shifted as the model is (10,000 entries for
    FLUX, 1,000 for models with a static shift); `shift` None is the model's own curve, without a terminal. Of these

    - "simple" takes every (table / steps)-th from the top, counted down and rounded: `Shifted(steps)` up to the table;
    - "beta" the nearest to the quantiles of Beta(0.6, 0.6) at 1 - i / steps (arXiv 2407.12173), each once, so that many
      steps of a short table become fewer: `WithShift(Beta(steps))` up to the table;
    - "sgm_uniform" none: it shifts even steps from 1 to the lowest *shifted* level, without that one.

    The others are `LinearQuadratic`, `KLOptimal` from 1 to the table's lowest level, and `BongTangent`.
    """

    name: Name
    steps: Steps
    table: Annotated[int, Bound(check_whole, 2, 1_000_000)] = field(default=10_000, kw_only=True)
    shift: Shift | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        names = (*TABLED, "linear_quadratic", "kl_optimal", "bong_tangent")
        if self.name not in names:
            raise PlanError(f"ComfyUI makes the schedules {', '.join(names)}, got {self.name!r}")
        if self.shift is not None and not isinstance(self.shift, Shift):
            raise PlanError(
                f"a shift is a Shift, such as Shift.fixed(3.0), or None for the model's own, got {self.shift!r}"
            )

    def __call__(self, start: float, tokens: int, model: ModelInfo) -> Sigmas:
        if self.name == "linear_quadratic":
            return LinearQuadratic(self.steps)(start, tokens, model)
        if self.name == "bong_tangent":
            return BongTangent(self.steps)(start, tokens, model)
        curve, n = model.shift if self.shift is None else self.shift, self.table
        mu = curve.mu(tokens, steps=self.steps)
        bend = shift if curve.kind == "exponential" else shift_static
        if self.name == "kl_optimal":
            return KLOptimal(self.steps, low=bend(1 / n, mu))(start, tokens, model)
        if self.name == "simple":
            grid = [(n - int(i * (n / self.steps))) / n for i in range(self.steps)]
        elif self.name == "sgm_uniform":
            low = bend(1 / n, mu)
            grid = [1.0 - (1.0 - low) * i / self.steps for i in range(self.steps)]
        else:
            entries = (round(q * (n - 1)) for q in beta_grid(self.steps, 0.6, 0.6)[:-1])
            grid = [(entry + 1) / n for entry in dict.fromkeys(entries)]
        return scale((*(bend(level, mu) for level in grid), 0.0), start)


@dataclass(frozen=True)
class LinearQuadratic(Schedule):
    """A line that falls to 1 - `threshold` in the first `linear` steps (None: half), then a parabola to 0 (Mochi).

    The parabola goes on with the line's slope: from a step k of the line on, 1 - (threshold / linear) i - q (i -
    linear)^2 with q so that step `steps` is at 0. ComfyUI's "linear_quadratic"; no shift.
    """

    steps: Steps
    threshold: Annotated[float, Bound(check_between, 0.0, 1.0)] = field(default=0.025, kw_only=True)
    linear: Annotated[int | None, Bound(check_whole, 1)] = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.linear is not None and self.linear >= self.steps:
            raise PlanError(f"linear must leave steps for the parabola, got {self.linear} of {self.steps}")
        if self.steps > 1:
            line, slope, bend = self._curve()
            if slope + 2 * bend * (self.steps - line) <= 0:
                raise PlanError(
                    f"a line that falls by {self.threshold:g} in {line} of {self.steps} steps is too steep for a "
                    "parabola that goes on to 0; take a smaller threshold"
                )

    def _curve(self) -> tuple[int, float, float]:
        """Steps of the line, its slope, the parabola's coefficient."""
        line = self.steps // 2 if self.linear is None else self.linear
        slope = self.threshold / line
        return line, slope, (1.0 - slope * self.steps) / (self.steps - line) ** 2

    def __call__(self, start: float, tokens: int, model: ModelInfo) -> Sigmas:
        n = self.steps
        if n == 1:
            return scale((1.0, 0.0), start)
        line, slope, bend = self._curve()
        return scale((*(1.0 - slope * i - bend * max(0, i - line) ** 2 for i in range(n)), 0.0), start)


@dataclass(frozen=True)
class KLOptimal(Schedule):
    """tan of even steps in atan, from 1 to `low`, then 0: ComfyUI's "kl_optimal" (Align Your Steps, arXiv 2404.14507).

    tan((1 - a) atan(1) + a atan(low)), a = i / (steps - 1): optimal for Gaussian data in that paper's bound. No shift.
    """

    steps: Steps
    low: Annotated[float, Bound(check_between, 0.0, 1.0)] = field(default=0.01, kw_only=True)

    def __call__(self, start: float, tokens: int, model: ModelInfo) -> Sigmas:
        last, top, bottom = self.steps - 1, math.atan(1.0), math.atan(self.low)
        sigmas = (math.tan((1 - i / last) * top + i / last * bottom) for i in range(1, last))
        return scale((1.0, *sigmas, self.low, 0.0) if last else (1.0, 0.0), start)


@dataclass(frozen=True)
class BongTangent(Schedule):
    """Two arctangents that meet at `middle`: RES4LYF's "bong_tangent".

    Of steps + 2 places, the first ones up to m = the mean of the pivots' places go from 1 to `middle`, the others from
    there to 0, each along atan(-slope 40 / (steps + 2) (i - pivot)), i its place in its part, stretched to its ends. A
    pivot is a share of all places. No shift.
    """

    steps: Steps
    middle: Annotated[float, Bound(check_between, 0.0, 1.0)] = field(default=0.5, kw_only=True)
    pivots: tuple[float, float] = field(default=(0.6, 0.6), kw_only=True)
    slopes: tuple[float, float] = field(default=(0.2, 0.2), kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        for each in self.pivots:
            check_between("a pivot", each, 0.0, 1.0)
        for each in self.slopes:
            check_within("a slope", each, 1e-6, 1e3)

    def __call__(self, start: float, tokens: int, model: ModelInfo) -> Sigmas:
        if self.steps == 1:
            return scale((1.0, 0.0), start)
        places = self.steps + 2
        first = int((places * self.pivots[0] + places * self.pivots[1]) / 2)
        if not 2 <= first <= places - 2:
            raise PlanError(
                f"the pivots leave no step for one of both parts of {self.steps} steps; take more steps, or pivots "
                "nearer to 0.5"
            )
        steep = [slope / (places / 40) for slope in self.slopes]
        upper = _tangent(first, steep[0], int(places * self.pivots[0]), 1.0, self.middle)
        lower = _tangent(places - first, steep[1], int(places * self.pivots[1]) - first, self.middle, 0.0)
        return scale((*upper[:-1], *lower), start)


def _tangent(count: int, slope: float, pivot: int, top: float, bottom: float) -> list[float]:
    raw = [math.atan(-slope * (i - pivot)) for i in range(count)]
    inner = [(each - raw[-1]) / (raw[0] - raw[-1]) * (top - bottom) + bottom for each in raw[1:-1]]
    return [top, *inner, bottom]

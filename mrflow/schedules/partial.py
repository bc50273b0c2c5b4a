"""Parts of a schedule, for samplers that change resolution on the way: the grid is laid once and shared out."""

from dataclasses import dataclass, field

from mrflow._checks import check_whole
from mrflow.errors import PlanError
from mrflow.model_info import ModelInfo
from mrflow.schedules.base import Schedule, Sigmas
from mrflow.spec import Latents


@dataclass(frozen=True)
class Part(Schedule):
    """The steps from number `first` to before `last` of a grid (None: to its end).

    A part that does not begin the grid begins at the level that its stage is given, in place of the grid's own: after a
    transition the state may hold more noise than the grid foresaw. `size`, (height, width) in pixels, is what the grid
    is laid for; None is the stage's own size. With `clean` the last step goes to 0 instead: an Euler step there leaves
    the clean estimate x - sigma v, which a transition may enlarge and noise again.
    """

    schedule: Schedule
    first: int = 0
    last: int | None = None
    size: tuple[int, int] | None = field(default=None, kw_only=True)
    clean: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        for name, value in (("first", self.first), ("last", self.last)):
            if value is not None:
                check_whole(name, value, 0, wanted="a whole number of steps from 0")
        if self.last is not None and self.last <= self.first:
            raise PlanError(f"a part needs at least one step, got first {self.first}, last {self.last}")

    def __call__(self, start: float, tokens: int, model: ModelInfo) -> Sigmas:
        grid = whole_grid(self.schedule, self.size, tokens, model, start=start if self.first == 0 else 1.0)
        last = len(grid) - 1 if self.last is None else self.last
        if last > len(grid) - 1 or self.first >= last:
            raise PlanError(f"the grid has {len(grid) - 1} steps, and this part wants {self.first} to {last}")
        sigmas = (start, *grid[self.first + 1 : last + 1])
        if self.clean:
            sigmas = (*sigmas[:-1], 0.0)
        if len(sigmas) > 1 and not sigmas[1] < start:
            raise PlanError(
                f"the latents hold noise of level {start:g}, and step {self.first + 1} of the grid goes to "
                f"{sigmas[1]:g}: begin the part later"
            )
        return sigmas


@dataclass(frozen=True)
class Level:
    """The noise level of a grid after `step` steps, for a stage that is told a level: `Reinject(Level(grid, 8))`.

    `size`, (height, width) in pixels, is what the grid is laid for; None is the size of what the stage is given.
    """

    schedule: Schedule
    step: int
    size: tuple[int, int] | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        check_whole("step", self.step, 0, wanted="a whole number from 0")

    def of(self, spec: Latents, model: ModelInfo) -> float:
        """The level, for latents of this size."""
        grid = whole_grid(self.schedule, self.size, spec.tokens, model)
        if self.step >= len(grid):
            raise PlanError(f"the grid has {len(grid) - 1} steps, and its level after step {self.step} is asked for")
        return grid[self.step]


def whole_grid(
    schedule: Schedule, size: tuple[int, int] | None, tokens: int, model: ModelInfo, *, start: float = 1.0
) -> Sigmas:
    """A whole grid, for a picture of `size` pixels or, without one, of this many tokens."""
    return schedule(start, tokens if size is None else model.tokens(*size), model)

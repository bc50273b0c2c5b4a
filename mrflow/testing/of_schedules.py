"""The laws of schedules."""

import math
from collections.abc import Iterator
from itertools import pairwise, product

from mrflow.model_info import FLUX, QWEN, ModelInfo
from mrflow.schedules import Schedule, Sigmas
from mrflow.testing.laws import LawBroken, Laws, demand
from mrflow.testing.toy import TOY

Case = tuple[float, int, ModelInfo]
CASES: tuple[Case, ...] = tuple(
    (start, tokens, model) for model, start, tokens in product((FLUX, QWEN, TOY), (1.0, 0.6, 0.12), (16, 1024, 6889))
)


SCHEDULE_LAWS = Laws("schedule", "the convention of `mrflow.schedules`")


def check_schedule(schedule: Schedule) -> None:
    """Hold a schedule to the laws of schedules in `LAWS`, for three models, starts at and below 1, three sizes.

    Raises:
        LawBroken: naming the law, the model and the start. PlanError: the schedule refuses a start.
    """
    SCHEDULE_LAWS.hold(schedule)


def _cases(schedule: Schedule) -> Iterator[tuple[Sigmas, float, str]]:
    for start, tokens, model in CASES:
        yield schedule(start, tokens, model), start, f"from {start} on {model.name} at {tokens} tokens"


@SCHEDULE_LAWS.law("floats", "sigma_i in R, i = 0..n, n >= 1")
def _floats(schedule: Schedule) -> None:
    """Levels are a tuple of at least two finite Python floats."""
    for sigmas, _, where in _cases(schedule):
        ok = (
            isinstance(sigmas, tuple)
            and len(sigmas) >= 2
            and all(type(s) is float and math.isfinite(s) for s in sigmas)
        )
        demand(ok, f"{where}: levels must be a tuple of at least two finite Python floats, got {sigmas[:4]!r}")


@SCHEDULE_LAWS.law("start", "sigma_0 = start")
def _start(schedule: Schedule) -> None:
    """The first level is the start."""
    for sigmas, start, where in _cases(schedule):
        demand(abs(sigmas[0] - start) <= 1e-9, f"{where}: begins at {sigmas[0]}")


@SCHEDULE_LAWS.law("zero", "sigma_n = 0", "arXiv 2209.03003: the flow ends in the data, x(0) = x0")
def _zero(schedule: Schedule) -> None:
    """The last level is exactly 0, the clean picture."""
    for sigmas, _, where in _cases(schedule):
        demand(sigmas[-1] == 0.0, f"{where}: ends at {sigmas[-1]}, not at exactly 0")


@SCHEDULE_LAWS.law("falls", "sigma_(i+1) < sigma_i", "arXiv 2206.00364, alg. 1: t_0 > t_1 > ... > t_N = 0")
def _falls(schedule: Schedule) -> None:
    """Every level is below the one before it."""
    for sigmas, _, where in _cases(schedule):
        for index, (a, b) in enumerate(pairwise(sigmas)):
            if not b < a:
                raise LawBroken(f"{where}: does not fall strictly, level {index + 2} is {b} after {a}")


@SCHEDULE_LAWS.law("pure", "s(a) = s(a)")
def _pure(schedule: Schedule) -> None:
    """The same arguments give the same levels."""
    for case in CASES:
        demand(schedule(*case) == schedule(*case), f"from {case[0]} on {case[2].name}: two calls differ")


@SCHEDULE_LAWS.law("scales", "sigma_i(start) = start sigma_i(1)")
def _scales(schedule: Schedule) -> None:
    """One grid serves every start: all levels are multiplied by it."""
    for start, tokens, model in CASES:
        unit, sigmas = schedule(1.0, tokens, model), schedule(start, tokens, model)
        where = f"from {start} on {model.name} at {tokens} tokens"
        demand(len(unit) == len(sigmas), f"{where}: {len(sigmas)} levels, but {len(unit)} from 1")
        for u, s in zip(unit, sigmas, strict=True):
            if not abs(s - start * u) <= 1e-9:
                raise LawBroken(f"{where}: a level is {s}, and scaled from 1 it is {start * u}")


@SCHEDULE_LAWS.law("steps", "|sigma| = n + 1")
def _steps(schedule: Schedule) -> None:
    """A schedule with `steps` n has n + 1 levels."""
    steps = getattr(schedule, "steps", None)
    if isinstance(steps, int):
        for sigmas, _, where in _cases(schedule):
            demand(len(sigmas) == steps + 1, f"{where}: {len(sigmas) - 1} steps, and {steps} are said")

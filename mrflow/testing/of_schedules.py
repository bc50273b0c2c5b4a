"""The laws of schedules."""

import math
from collections.abc import Iterator
from itertools import pairwise, product

from mrflow.model_info import FLUX, QWEN, ModelInfo
from mrflow.schedules import Schedule, Sigmas
from mrflow.testing.laws import Law, LawBroken, demand
from mrflow.testing.toy import TOY

Case = tuple[float, int, ModelInfo]
CASES: tuple[Case, ...] = tuple(
    (start, tokens, model) for model, start, tokens in product((FLUX, QWEN, TOY), (1.0, 0.6, 0.12), (16, 1024, 6889))
)


def check_schedule(schedule: Schedule) -> None:
    """Hold a schedule to the laws of schedules in `LAWS`, for three models, starts at and below 1, three sizes.

    Raises:
        LawBroken: naming the law, the model and the start. PlanError: the schedule refuses a start.
    """
    for law in SCHEDULE_LAWS:
        law.hold(schedule)


def _cases(schedule: Schedule) -> Iterator[tuple[Sigmas, float, str]]:
    for start, tokens, model in CASES:
        yield schedule(start, tokens, model), start, f"from {start} on {model.name} at {tokens} tokens"


def _floats(schedule: Schedule) -> None:
    for sigmas, _, where in _cases(schedule):
        ok = (
            isinstance(sigmas, tuple)
            and len(sigmas) >= 2
            and all(type(s) is float and math.isfinite(s) for s in sigmas)
        )
        demand(ok, f"{where}: levels must be a tuple of at least two finite Python floats, got {sigmas[:4]!r}")


def _start(schedule: Schedule) -> None:
    for sigmas, start, where in _cases(schedule):
        demand(abs(sigmas[0] - start) <= 1e-9, f"{where}: begins at {sigmas[0]}")


def _zero(schedule: Schedule) -> None:
    for sigmas, _, where in _cases(schedule):
        demand(sigmas[-1] == 0.0, f"{where}: ends at {sigmas[-1]}, not at exactly 0")


def _falls(schedule: Schedule) -> None:
    for sigmas, _, where in _cases(schedule):
        for index, (a, b) in enumerate(pairwise(sigmas)):
            if not b < a:
                raise LawBroken(f"{where}: does not fall strictly, level {index + 2} is {b} after {a}")


def _pure(schedule: Schedule) -> None:
    for case in CASES:
        demand(schedule(*case) == schedule(*case), f"from {case[0]} on {case[2].name}: two calls differ")


def _scales(schedule: Schedule) -> None:
    for start, tokens, model in CASES:
        unit, sigmas = schedule(1.0, tokens, model), schedule(start, tokens, model)
        where = f"from {start} on {model.name} at {tokens} tokens"
        demand(len(unit) == len(sigmas), f"{where}: {len(sigmas)} levels, but {len(unit)} from 1")
        for u, s in zip(unit, sigmas, strict=True):
            if not abs(s - start * u) <= 1e-9:
                raise LawBroken(f"{where}: a level is {s}, and scaled from 1 it is {start * u}")


def _steps(schedule: Schedule) -> None:
    steps = getattr(schedule, "steps", None)
    if isinstance(steps, int):
        for sigmas, _, where in _cases(schedule):
            demand(len(sigmas) == steps + 1, f"{where}: {len(sigmas) - 1} steps, and {steps} are said")


_CONVENTION = "the convention of `mrflow.schedules`"
SCHEDULE_LAWS: tuple[Law, ...] = (
    Law(
        "schedule", "floats", "Levels are a tuple of at least two finite Python floats.",
        "sigma_i in R, i = 0..n, n >= 1", _CONVENTION, _floats,
    ),
    Law(
        "schedule", "start", "The first level is the start.", "sigma_0 = start", _CONVENTION, _start,
    ),
    Law(
        "schedule", "zero", "The last level is exactly 0, the clean picture.", "sigma_n = 0",
        "arXiv 2209.03003: the flow ends in the data, x(0) = x0", _zero,
    ),
    Law(
        "schedule", "falls", "Every level is below the one before it.", "sigma_(i+1) < sigma_i",
        "arXiv 2206.00364, alg. 1: t_0 > t_1 > ... > t_N = 0", _falls,
    ),
    Law(
        "schedule", "pure", "The same arguments give the same levels.", "s(a) = s(a)", _CONVENTION, _pure,
    ),
    Law(
        "schedule", "scales", "One grid serves every start: all levels are multiplied by it.",
        "sigma_i(start) = start sigma_i(1)", _CONVENTION, _scales,
    ),
    Law(
        "schedule", "steps", "A schedule with `steps` n has n + 1 levels.", "|sigma| = n + 1", _CONVENTION, _steps,
    ),
)  # fmt: skip

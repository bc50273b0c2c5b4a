"""Argument checks, once: a value is what it should be, or PlanError says what that is and what was given."""

import errno
import math
import os
import sys
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import TypeGuard, cast, get_args, get_type_hints

from mrflow.errors import PlanError


def is_whole(value: object, low: float = -math.inf, high: float = math.inf) -> TypeGuard[int]:
    """Whether it is an int from `low` to `high`; True and False are no numbers."""
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def is_number(value: object, low: float = -math.inf, high: float = math.inf) -> TypeGuard[float]:
    """Whether it is a finite number from `low` to `high` that a float holds; True and False are no numbers."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) <= sys.float_info.max and low <= value <= high  # of NaN, all comparisons are false


def require(right: bool, name: str, wanted: str, value: object) -> None:  # noqa: FBT001
    """Refuse what is not right.

    Raises:
        PlanError: "name must be wanted, got value".
    """
    if not right:
        raise PlanError(f"{name} must be {wanted}, got {value!r}")


def check_sides(name: str, given: object, default: tuple[int, int] | None = None) -> tuple[int, int]:
    """A (height, width) in pixels; one number is a square's, None is `default` where there is one.

    Raises:
        PlanError: it is neither.
    """
    if given is None and default is not None:
        return default
    both = (given, given) if is_whole(given, 1) else given
    right = isinstance(both, tuple | list) and len(both) == 2 and all(is_whole(side, 1) for side in both)
    require(right, name, "(height, width) in pixels, or one number for a square", given)
    height, width = cast("Sequence[int]", both)
    return height, width


def check_whole(name: str, value: object, low: int, high: int | None = None, *, wanted: str = "") -> None:
    """Refuse what is no whole number from `low` to `high`; `wanted` says so in better words.

    Raises:
        PlanError: naming it.
    """
    usual = f"a whole number of at least {low}" if high is None else f"a whole number from {low} to {high}"
    require(is_whole(value, low, math.inf if high is None else high), name, wanted or usual, value)


def check_number(name: str, value: object, low: float | None = None, high: float | None = None) -> None:
    """Refuse what is no finite number from `low` to `high`.

    Raises:
        PlanError: naming it.
    """
    wanted = "a finite number" if low is None else f"a finite number of at least {low:g}"
    if low is not None and high is not None:
        wanted = f"from {low:g} to {high:g}"
    require(
        is_number(value, -math.inf if low is None else low, math.inf if high is None else high), name, wanted, value
    )


class Bound:
    """What a field of a `Checked` is held to, in its type: `Annotated[float, Bound(check_number, 0.0, 1.0)]`.

    `check` is given the field's name, or another `name`, its value, and what follows.
    """

    def __init__(self, check: Callable[..., object], *args: float, name: str = "") -> None:
        self.check, self.args, self.name = check, args, name

    def __repr__(self) -> str:
        return f"{self.check.__name__.removeprefix('check_')}{self.args}"


class Checked:
    """A base of dataclasses whose fields are checked as their types say; None is, where the type has it."""

    def __post_init__(self) -> None:
        for name, held, optional in _held(type(self)):  # type: ignore[arg-type]  # mypy: a class is hashable
            value = getattr(self, name)
            if value is not None or not optional:
                held.check(held.name or name, value, *held.args)


@cache
def _held(cls: type) -> list[tuple[str, Bound, bool]]:
    return [
        (name, held, type(None) in get_args(hint.__origin__))
        for name, hint in get_type_hints(cls, include_extras=True).items()
        for held in getattr(hint, "__metadata__", ())
        if isinstance(held, Bound)
    ]


MAX_SEED = 2**63 - 1


def check_seed(seed: object) -> int:
    """A seed that a generator takes, or PlanError."""
    if not is_whole(seed, 0, MAX_SEED - 1):
        raise PlanError(f"a seed must be a whole number from 0 to {MAX_SEED - 1}, got {seed!r}")
    return seed


def check_path(name: str, value: object) -> Path:
    """The path that `value` is, if a file system can hold it; nothing need be there.

    Raises:
        PlanError: it is no text or Path, empty, too long, or holds what no name of a file can.
    """
    require(isinstance(value, str | Path) and value != "", name, "a path, as text or pathlib.Path", value)
    path, shown = Path(str(value)), ascii(str(value)[:60])
    try:
        path.lstat()
    except ValueError:  # NUL, and characters that are no text
        raise PlanError(f"{name} holds characters that no name of a file can: {shown}") from None
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise PlanError(
                f"{name} is longer than the file system takes ({len(os.fsencode(path))} bytes): {shown}..."
            ) from None
    return path

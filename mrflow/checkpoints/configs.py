"""Configurations from outside, of models, schedulers, text encoders and adapters: bounded, and every value by its type.

A configuration is a file, or text in a checkpoint's metadata. It is read under limits of size, depth and count; its
numbers are finite. What is then asked of it is asked by type and range, and anything else is one `WeightsError` that
names the file, the setting and what was expected.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, cast

from mrflow._checks import is_number, is_whole
from mrflow.errors import ResourceError, WeightsError
from mrflow.records.files import parse_table, read_regular

MAX_BYTES, MAX_DEPTH, MAX_VALUES = 64 << 20, 32, 1_000_000
MAX_NUMBER = 1 << 63


class Config(Mapping[str, Any]):
    """Settings by name; `where` begins the errors."""

    def __init__(self, table: Mapping[str, Any], where: object) -> None:
        self.table, self.where = table, where

    def __getitem__(self, name: str) -> Any:  # noqa: ANN401
        return self.table[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.table)

    def __len__(self) -> int:
        return len(self.table)

    def _given(self, name: str, usual: object) -> Any:  # noqa: ANN401
        value = self.table.get(name)
        return usual if value is None else value

    def number(self, name: str, usual: float | None = None, *, low: float = -1e6, high: float = 1e6) -> float:
        """A finite number from `low` to `high`; `usual` where the setting is not there, or null.

        Raises:
            WeightsError: it is something else, or not there and nothing is usual.
        """
        value = self._given(name, usual)
        if not is_number(value, low, high):
            self._refuse(name, f"a number from {low:g} to {high:g}", value)
        return float(value)

    def whole(self, name: str, usual: int | None = None, *, low: int = 1, high: int = 1 << 24) -> int:
        """A whole number from `low` to `high`; else as `number`."""
        value = self._given(name, usual)
        if not is_whole(value, low, high):
            self._refuse(name, f"a whole number from {low} to {high}", value)
        return value

    def flag(self, name: str) -> bool:
        """True or false, 1 and 0 included; false where the setting is not there; else as `number`."""
        value = self._given(name, usual=False)
        if value not in (True, False):
            self._refuse(name, "true or false", value)
        return bool(value)

    def word(self, name: str, usual: str, allowed: Sequence[str]) -> str:
        """One of the words; `usual` where the setting is not there; else as `number`."""
        value = self._given(name, usual)
        if value not in allowed:
            self._refuse(name, " or ".join(allowed), value)
        return cast("str", value)

    def numbers(self, name: str, usual: Sequence[float] | None = None, *, count: int) -> tuple[float, ...]:
        """So many finite numbers; else as `number`."""
        value = self._given(name, usual)
        if not isinstance(value, list | tuple) or len(cast("Sequence[Any]", value)) != count:
            self._refuse(name, f"a list of {count} numbers", value)
        found = cast("Sequence[Any]", value)
        if not all(is_number(each, -1e6, 1e6) for each in found):
            self._refuse(name, f"a list of {count} numbers", value)
        return tuple(float(each) for each in found)

    def wholes(self, name: str, usual: Sequence[int] | None = None, *, most: int) -> tuple[int, ...]:
        """From one to `most` whole numbers of 1 to 65536; else as `number`."""
        value = self._given(name, usual)
        found = cast("Sequence[Any]", value) if isinstance(value, list | tuple) else ()
        if not (0 < len(found) <= most and all(is_whole(each, 1, 1 << 16) for each in found)):
            self._refuse(name, f"a list of at most {most} whole numbers from 1", value)
        return tuple(found)

    def _refuse(self, name: str, wanted: str, value: object) -> NoReturn:
        got = "nothing" if value is None else repr(value)[:80]
        raise WeightsError(f"{self.where}: {name} must be {wanted}, got {got}")


def read_config(path: Path) -> Config:
    """The table that a JSON file holds.

    Raises:
        WeightsError: it is missing, no table, or beyond a limit. ResourceError: it cannot be read.
    """
    try:
        data = read_regular(path.resolve(), most=MAX_BYTES)
    except FileNotFoundError:
        raise WeightsError(f"{path} does not exist") from None
    except ValueError as error:
        raise WeightsError(f"{path} cannot be used: {error}") from None
    except (OSError, RuntimeError) as error:  # a circle of links is a RuntimeError
        raise ResourceError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    return parse_config(data, path)


def parse_config(data: bytes | str, where: object) -> Config:
    """The table that JSON text is.

    Raises:
        WeightsError: it is none, nests deeper than `MAX_DEPTH`, holds more than `MAX_VALUES` values, or numbers that
            are not finite or beyond `MAX_NUMBER`.
    """
    try:
        table = parse_table(data.encode("utf-8", "surrogatepass") if isinstance(data, str) else data)
    except ValueError as error:
        raise WeightsError(f"{where} is not JSON that can be used: {error}") from None
    _check(table, where)
    return Config(table, where)


def _check(table: Mapping[str, Any], where: object) -> None:
    level: list[Any] = [table]
    count = 0
    for _ in range(MAX_DEPTH):
        inside: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                inside += cast("dict[str, Any]", value).values()
            elif isinstance(value, list):
                inside += value
            elif isinstance(value, int | float) and not abs(value) < MAX_NUMBER:
                raise WeightsError(f"{where} holds the number {str(value)[:40]}, beyond any that a setting has")
        level = inside
        count += len(level)
        if count > MAX_VALUES:
            raise WeightsError(f"{where} holds more than {MAX_VALUES} values")
        if not level:
            return
    raise WeightsError(f"{where} nests its values more than {MAX_DEPTH} deep")

"""A recorded stage in words for people: its name and its settings. From plain data alone, so it needs no torch."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, cast

USUAL: Mapping[str, object] = {"stop": 0.0}  # what a setting is worth no word at
DEEPEST = 12


def stage_text(stage: object) -> tuple[str, str]:
    """The name and the settings of a stage as `encode_chain` writes it: `("Sample", "128x128, Shifted(12 steps)")`.

    What is left at nothing (no cache, no adapter, the usual noise) is not named. Data of another form give its text.
    """
    if not isinstance(stage, Mapping):
        return str(stage), ""
    own = cast("Mapping[str, Any]", stage)
    return _name(own), ", ".join(_settings(own, 0))


def _name(own: Mapping[str, Any]) -> str:
    """`TeaCache` of `caches.TeaCache`, `Mine` of `file:Mine`."""
    return str(own.get("type", "?")).replace(":", ".").rpartition(".")[2]


def _settings(own: Mapping[str, Any], depth: int) -> Iterator[str]:
    if "height" in own and "width" in own:
        yield f"{own['height']}x{own['width']}"
    for name, value in own.items():
        if name in ("type", "height", "width") or "sha256" in name or value == USUAL.get(name, ()):
            continue
        if value is None or value is False or value in ("", []) or value == {"type": "PerItem"}:
            continue
        yield _setting(name.replace("_", " "), value, depth)


def _setting(name: str, value: object, depth: int) -> str:
    if value is True:
        return name
    if name == "size" and isinstance(value, Sequence) and not isinstance(value, str):
        return "x".join(_value(v, depth) for v in value)
    if isinstance(value, Mapping) and "type" in value:
        return _value(cast("object", value), depth)
    if name == "steps" and not isinstance(value, list):
        return f"{value} step{'' if value == 1 else 's'}"
    return f"{name} {_value(value, depth)}"


def _value(value: object, depth: int) -> str:
    if depth > DEEPEST:
        return "..."
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, str):
        return value.replace("\\", "/").rpartition("/")[2] or value  # of a file its name
    if isinstance(value, Mapping):
        own = cast("Mapping[str, Any]", value)
        inner = ", ".join(_settings(own, depth + 1))
        if "type" not in own:
            return f"({inner})"
        return f"{_name(own)}({inner})" if inner else _name(own)
    if isinstance(value, Sequence):
        each = cast("Sequence[object]", value)
        if len(each) > 8:
            return f"{', '.join(_value(v, depth + 1) for v in each[:6])}, ... ({len(each)} in all)"
        return ", ".join(_value(v, depth + 1) for v in each)
    return str(value)


def describe_stage(stage: object) -> tuple[str, str]:
    """`stage_text` of a stage itself: of a frozen dataclass of settings."""
    return stage_text(_plain(stage))


def _plain(value: object) -> object:
    if is_dataclass(value) and not isinstance(value, type):
        own = {f.name: _plain(getattr(value, f.name)) for f in fields(value) if f.init}
        return {"type": type(value).__name__, **own}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in cast("Sequence[object]", value)]
    return value if isinstance(value, str | int | float | Mapping) or value is None else str(value)

"""Chains as plain data and back, so that a picture can carry how it was made and be made again.

A stage or slot is written as its type's name and its fields: `Sample` or `caches.TeaCache`, the public name, and
`module:QualName` for a type outside mrflow. Only mrflow's own types are read back unless the caller names others: a
record is data from outside, and never decides what is imported.
"""

import dataclasses
import hashlib
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path, PurePath
from typing import cast

import mrflow
from mrflow.errors import ChainError, RecordError, WeightsError
from mrflow.machine.failures import passes
from mrflow.records import sources
from mrflow.records.files import known_file
from mrflow.stage import AnyChain, AnyStage, Chain, Stage

ROOMS = ("caches",)  # public modules whose types a chain may hold; all others are names of mrflow itself
Plain = None | bool | int | float | str | list["Plain"] | dict[str, "Plain"]


def encode(value: object) -> Plain:
    """Plain data for a stage, a slot, or a value in one of their fields.

    Raises:
        RecordError: the value is neither plain nor a frozen dataclass of such values.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        return {str(k): encode(v) for k, v in cast(Mapping[object, object], value).items()}
    if isinstance(value, Sequence):
        return [encode(v) for v in cast(Sequence[object], value)]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        own = getattr(value, "to_record", None)  # a class may say what of its fields belongs into a record
        plain = (
            own() if own is not None else {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if f.init}
        )
        fields = {name: encode(each) for name, each in plain.items()}
        return {"type": name_of(type(value)), **fields}
    raise RecordError(
        f"{type(value).__name__} cannot be written into a record; make it a frozen dataclass of plain fields"
    )


@cache
def name_of(cls: type) -> str:
    """What a record calls a type: `Sample`, `caches.TeaCache`, or `module:QualName` outside mrflow.

    Raises:
        RecordError: a type of mrflow that is not public.
    """
    if cls.__module__.split(".")[0] != "mrflow":
        return f"{cls.__module__}:{cls.__qualname__}"
    names = (cls.__qualname__, *(f"{room}.{cls.__qualname__}" for room in ROOMS))
    found = next((name for name in names if public(name) is cls), None)
    if found is None:
        raise RecordError(f"{cls.__qualname__} is not a public name of mrflow, so a record cannot name it")
    return found


def public(name: str) -> object:
    """What a public name of mrflow stands for, None if there is none; only listed modules are imported."""
    room, _, own = name.rpartition(".")
    if room:
        return getattr(getattr(mrflow, room), own, None) if room in ROOMS else None
    return getattr(mrflow, own) if own in dir(mrflow) else None


def decode(data: object, types: Iterable[type] = ()) -> object:
    """The value that `encode` wrote. `types` are classes outside mrflow that may be made.

    A file that the data names is taken from those that the user gave (`known_files`), never from the path or the hub
    address that the data says.

    Raises:
        RecordError: the data names a type that is not allowed, is unknown, or does not take these fields; it is
            nested too deeply. WeightsError: it names a file that was not given, or another than the one given.
    """
    own = [t for t in types if ":" in name_of(t)]
    allowed = {t.__qualname__: t for t in own}  # the file may have been run by itself: its module's name may differ
    allowed |= {name_of(t): t for t in own}
    return _decode(data, allowed)


MAX_DEPTH = 32
FILES = ("path", "options", "weights")  # the fields that name files, in types that say what of them is recorded


def _decode(data: object, allowed: Mapping[str, type], depth: int = 0) -> object:
    if depth > MAX_DEPTH:
        raise RecordError(f"the record is nested more than {MAX_DEPTH} deep")
    if isinstance(data, list):
        return tuple(_decode(v, allowed, depth + 1) for v in cast(list[object], data))
    if not isinstance(data, dict):
        return data
    fields = dict(cast(dict[str, object], data))
    name = fields.pop("type", None)
    if not isinstance(name, str):
        raise RecordError("the record holds an object without a type")
    cls = _type(name, allowed)
    known = {f.name for f in dataclasses.fields(cls) if f.init}
    if unknown := sorted(set(fields) - known):
        raise RecordError(f"the record gives {name} the unknown field {unknown[0]!r}; was it made by a newer mrflow?")
    values = {k: _decode(v, allowed, depth + 1) for k, v in fields.items()}
    if hasattr(cls, "to_record"):
        values |= {k: _given(values[k]) for k in FILES if k in values}
    try:
        return cls(**values)
    except WeightsError:
        raise  # a file that was given is another one, or broken
    except BaseException as error:  # the values are from outside, and the class may be anyone's
        if passes(error):
            raise
        raise RecordError(f"the record's {name} cannot be made: {error or type(error).__name__}") from None


def _given(name: object) -> str:
    """The path of a file that a record names and the user gave."""
    last = PurePath(name).name if isinstance(name, str) else ""
    found = known_file(last)
    if found is None:
        raise WeightsError(f"{last or name!r} is not here: say where it is, --file FILE or files=[file]")
    return str(found)


def _type(name: str, allowed: Mapping[str, type]) -> type:
    module, colon, qualname = name.partition(":")
    found: object = allowed.get(name) or allowed.get(qualname) if colon else public(name)
    if isinstance(found, type) and dataclasses.is_dataclass(found):
        return found
    if not colon or module.split(".")[0] == "mrflow":
        raise RecordError(f"this mrflow has no {name}; the picture was made by another version")
    raise RecordError(
        f"the picture was made with {qualname} from {module}; name its file, --with FILE, or pass "
        f"that class: replay(..., types=[{qualname}])"
    )


def encode_chain(chain: AnyChain) -> list[Plain]:
    """A chain as plain data."""
    return [encode(stage) for stage in chain]


def decode_chain(data: object, types: Iterable[type] = ()) -> AnyChain:
    """The chain that `encode_chain` wrote."""
    stages = decode(data, types)
    if not isinstance(stages, tuple) or not all(isinstance(s, Stage) for s in cast(tuple[object, ...], stages)):
        raise RecordError("the record's chain is not a list of stages")
    try:
        return Chain(cast(tuple[AnyStage, ...], stages))
    except ChainError as error:
        raise RecordError(f"the record's chain does not fit together: {error}") from None


def fingerprint(value: object) -> str:
    """A text that changes when a stage does: its settings and, for a class outside mrflow, its whole file.

    Raises:
        RecordError: a slot neither is a frozen dataclass nor names its own `fingerprint`.
    """
    parts = [repr(encode(value)), *sources_of(value).values()]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def sources_of(value: object) -> dict[str, str]:
    """For every class outside mrflow in a stage or slot, by its name, what tells its code (`records.sources`)."""
    own = [cls for cls in _classes(value) if not cls.__module__.startswith("mrflow.")]
    return {sources.identity_of(cls): sources.digest_of(cls) for cls in own}


def files_of(value: object) -> tuple[dict[str, str], list[str]]:
    """What a chain needs besides mrflow: by module the files of its own types, and the files that its fields name."""
    modules = {cls.__module__ for cls in _classes(value) if not cls.__module__.startswith("mrflow.")}
    own = {name: str(getattr(sys.modules.get(name), "__file__", None) or "") for name in sorted(modules)}
    inside = Path(__file__).parents[1]
    used = dict.fromkeys(path.absolute() for path in _paths(value) if inside not in path.absolute().parents)
    return {name: os.path.abspath(file) for name, file in own.items() if file}, [str(path) for path in used]


def _paths(value: object) -> Iterable[Path]:
    """The files that fields of stages and slots name."""
    if isinstance(value, list | tuple):
        for each in cast(Sequence[object], value):
            yield from _paths(each)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for f in dataclasses.fields(value):
            inner = getattr(value, f.name)
            if isinstance(inner, str | PurePath):
                with suppress(OSError, ValueError):
                    if str(inner) and (path := Path(inner).expanduser()).is_file():
                        yield path
            else:
                yield from _paths(inner)


def _classes(value: object) -> Iterable[type]:
    if isinstance(value, list | tuple):
        for each in cast(Sequence[object], value):
            yield from _classes(each)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield type(value)
        for f in dataclasses.fields(value):
            yield from _classes(getattr(value, f.name))

"""The code behind a user's class, told by the content of its files.

What a stage does depends on more than its own lines: helpers, constants and base classes, in its file and in files
beside it. So the whole file counts, and every file of the same folder that it imports, directly or through others.
"""

import hashlib
import inspect
import os
import sys
import sysconfig
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from types import ModuleType

from mrflow.errors import MrflowError, RecordError
from mrflow.records.files import digest

_known: dict[str, str] = {}


def know(digests: Mapping[str, str]) -> None:
    """Take digests of classes whose files are not here: another process, which has them, computed these."""
    _known.update(digests)


def identity_of(cls: type) -> str:
    """What tells a class from others, across processes."""
    return f"{cls.__module__}:{cls.__qualname__}"


def digest_of(cls: type) -> str:
    """A text that changes when a class outside mrflow does, or anything in its own files that it may use.

    Raises:
        RecordError: there is no source, as for a class that was typed into an interpreter.
    """
    if identity_of(cls) in _known:
        return _known[identity_of(cls)]
    found: dict[str, str] = {}
    for base in cls.__mro__:
        if base.__module__.split(".")[0] == "mrflow" or _of_python(base.__module__):
            continue
        module = sys.modules.get(base.__module__)
        files = [] if module is None else [file for file, _ in own_files(module)]
        try:
            if files:
                found |= {file: digest(Path(file)) for file in files}
            else:
                found[identity_of(base)] = inspect.getsource(base)
        except (OSError, TypeError, MrflowError):
            raise RecordError(f"the source of {cls.__qualname__} cannot be read, so results cannot be cached") from None
    top = (
        os.path.commonpath([os.path.dirname(file) for file in found])
        if found and all(map(os.path.isabs, found))
        else ""
    )
    named = sorted((os.path.relpath(name, top) if top else name, text) for name, text in found.items())
    return hashlib.sha256(repr(named).encode()).hexdigest()


def own_files(module: ModuleType) -> list[tuple[str, ModuleType]]:
    """The file of a module, and those in or below its folder that it imports, each with its module."""
    return _own_files(module.__name__, id(module))


@lru_cache(maxsize=64)
def _own_files(name: str, _: int) -> list[tuple[str, ModuleType]]:
    start = sys.modules[name]
    first = _file(start)
    if first is None:
        return []
    folder, found, waiting = os.path.dirname(first) + os.sep, {first: start}, [start]
    if "site-packages" in first:  # a library is told by the file that holds the class
        return [(first, start)]
    while waiting:
        for module in _modules_in(vars(waiting.pop()).values()):
            file = _file(module)
            if file is not None and file.startswith(folder) and file not in found:
                found[file] = module
                waiting.append(module)
    return list(found.items())


def _modules_in(values: Iterable[object]) -> Iterable[ModuleType]:
    for value in list(values):
        module = value if isinstance(value, ModuleType) else sys.modules.get(str(getattr(value, "__module__", "")))
        if isinstance(module, ModuleType) and module.__name__.split(".")[0] != "mrflow":
            yield module


def _file(module: ModuleType) -> str | None:
    file = getattr(module, "__file__", None)
    return os.path.realpath(file) if isinstance(file, str) and os.path.isfile(file) else None


@lru_cache(maxsize=256)
def _of_python(module: str) -> bool:
    """Whether a module comes with Python itself."""
    if module.split(".")[0] in sys.stdlib_module_names and module != "__main__":
        file = getattr(sys.modules.get(module), "__file__", None)
        return file is None or os.path.realpath(file).startswith(os.path.realpath(sysconfig.get_path("stdlib")))
    return False

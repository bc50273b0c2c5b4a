"""mrflow: rectified-flow sampling in stages. Sample low, upscale, reinject noise, refine; swap any of them.

Public names are listed in `mrflow/_api.py`. Each is loaded by itself when it is first asked for: `import mrflow` loads
nothing, and `mrflow.Shifted` no network.
"""

import sys

if sys.argv[:1] == ["-m"] and sys.path:  # `python -m mrflow` looks here first: no file here shall hide a module
    sys.path.append(sys.path.pop(0))

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mrflow._api import *  # noqa: F403

    __version__: str


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("mrflow")
    except PackageNotFoundError:  # a source tree that was never installed
        return "0+unknown"


def _public(package: str = "mrflow") -> dict[str, str]:
    """The module that each public name comes from, read from the text of `_api.py` so that none is loaded."""
    import ast
    from pkgutil import get_data

    text = get_data(package, "_api.py") or b""
    lines = [line for line in ast.parse(text).body if isinstance(line, ast.ImportFrom)]
    return {alias.name: line.module or "" for line in lines for alias in line.names}


def __getattr__(name: str) -> object:
    from importlib import import_module
    from importlib.util import find_spec

    if name == "__version__":
        globals()[name] = _version()
        return globals()[name]
    if not name.startswith("_"):
        if find_spec(f"mrflow.{name}") is not None:
            return import_module(f"mrflow.{name}")
        if module := _public().get(name):
            globals()[name] = getattr(import_module(module), name)  # the next use does not come here
            return globals()[name]
    raise AttributeError(f"module 'mrflow' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(_public())

"""mrflow: rectified-flow sampling in stages. Sample low, upscale, reinject noise, refine; swap any of them.

Public names are listed in `mrflow/_api.py` and come with their first use, so that `mrflow --help` does not load torch.
"""

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mrflow._api import *  # noqa: F403

try:
    __version__ = version("mrflow")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"


def __getattr__(name: str) -> object:
    from importlib import import_module
    from importlib.util import find_spec

    if not name.startswith("_"):
        if find_spec(f"mrflow.{name}") is not None:
            return import_module(f"mrflow.{name}")
        api = import_module("mrflow._api")
        if hasattr(api, name):
            globals()[name] = getattr(api, name)  # the next use does not come here
            return globals()[name]
    raise AttributeError(f"module 'mrflow' has no attribute {name!r}")


def __dir__() -> list[str]:
    from importlib import import_module

    return sorted(name for name in vars(import_module("mrflow._api")) if not name.startswith("_"))

"""The ablation engine: chains x prompts x draws into a folder of rows and pictures, and what they show.

Each public name of `_api.py` is loaded when it is first asked for, so that a report needs no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from mrflow import _public

if TYPE_CHECKING:
    from mrflow.sweep._api import *  # noqa: F403


def __getattr__(name: str) -> object:
    if module := _public("mrflow.sweep").get(name):
        globals()[name] = getattr(import_module(module), name)
        return globals()[name]
    raise AttributeError(f"module 'mrflow.sweep' has no attribute {name!r}")

"""Networks that are built to be filled from a file: without values, and without garbage collection meanwhile."""

import gc
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

FILLED = (torch.ones, torch.zeros)


class _SkipInit(TorchFunctionMode):
    """Inside, the functions of `torch.nn.init` give back the tensor as it is, and no tensor is made with values."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return (torch.empty if func in FILLED else func)(*args, **kwargs)


@contextmanager
def pause_collection() -> Generator[None]:
    """Inside, Python's cycles are not collected: a large network is many objects, none of which is garbage."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


@contextmanager
def blueprint() -> Generator[None]:
    """Inside, modules are built on the meta device: names and shapes alone, which no initialisation could fill."""
    with pause_collection(), torch.device("meta"), _SkipInit():
        yield

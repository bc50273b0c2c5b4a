"""Counts the bytes of all tensors that are alive at once while code runs: an oracle for predictions of memory."""

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class LiveBytes(TorchDispatchMode):
    """Inside, `now` counts what was made since and still lives, `peak` the most of it; older tensors count nothing.

    `cuda` adds the copies that torch makes there while a group norm is given channels-last values, and a convolution
    with such a weight others.
    """

    def __init__(self, *, cuda: bool = False) -> None:
        super().__init__()
        self.cuda = cuda
        self.now = self.peak = 0
        self._known: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inside = {id(t.untyped_storage()) for t in tree_iter((args, kwargs or {})) if isinstance(t, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for t in tree_iter(out):
            if isinstance(t, torch.Tensor):
                self._see(t.untyped_storage(), inside)
        if self.cuda and copied_on_cuda(func.overloadpacket.__name__, args[0]):
            self.peak = max(self.peak, self.now + args[0].nbytes)
        return out

    def _see(self, storage: Any, inside: set[int]) -> None:
        key, size = id(storage), storage.nbytes()
        if key in self._known or key in inside:
            return

        def gone(_: object) -> None:
            self.now -= size
            self._known.pop(key, None)

        self._known[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)


def copied_on_cuda(name: str, x: Any) -> bool:
    """Whether an operator copies its first argument into another layout before it works."""
    if name == "native_group_norm":
        return not x.is_contiguous()
    return name == "convolution" and x.shape[1] > 1 and not x.is_contiguous(memory_format=torch.channels_last)

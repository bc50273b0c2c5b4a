"""Working with a device that runs behind: copies to it that nobody waits for, and how long its work took."""

import time
from collections.abc import Callable
from typing import Protocol, cast

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on a device; to a GPU through page-locked memory, so that the copy is asked for and not waited for."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return pin_memory(tensor).to(device, non_blocking=True)
    return tensor.to(device)


def pin_memory(tensor: Tensor) -> Tensor:
    """A copy in page-locked memory, from which copies to a GPU run beside its work."""
    return tensor.pin_memory()


def synchronise(device: torch.device) -> None:
    """Wait until the device has done what it was asked."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


class Event(Protocol):
    """A moment in a device's queue of work, as `torch.cuda.Event` marks it."""

    def record(self) -> None: ...
    def elapsed_time(self, end_event: "Event") -> float: ...


def cuda_event() -> Event:
    """An event that knows its time."""
    return cast("Event", torch.cuda.Event(enable_timing=True))


class Stopwatch:
    """From its making to `stop`: seconds on the wall, and on CUDA those between two events in the device's queue.

    Wall time holds what the CPU does beside; a difference between the two is time in which the device waited for it.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        event: Callable[[], Event] = cuda_event,
        wait: Callable[[torch.device], None] = synchronise,
    ) -> None:
        self.device, self.event, self.wait = device, event, wait
        self.began = time.perf_counter()
        self.first = self._mark()

    def stop(self) -> tuple[float, float | None]:
        """Seconds on the wall once the device has done its work; seconds of its own, None but on CUDA."""
        last = self._mark()
        self.wait(self.device)
        wall = time.perf_counter() - self.began
        return wall, None if self.first is None or last is None else self.first.elapsed_time(last) / 1000

    def _mark(self) -> Event | None:
        if self.device.type != "cuda":
            return None
        (event := self.event()).record()
        return event

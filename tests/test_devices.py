"""Copies that nobody waits for and times of a device, with stand-ins for CUDA."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mrflow.machine import devices
from mrflow.machine.devices import Stopwatch, to_device
from mrflow.machine.hardware import machine

CUDA, CPU = torch.device("cuda"), torch.device("cpu")


class Recorded:
    """A tensor that tells what was done with it."""

    def __init__(self, device: torch.device, done: tuple[object, ...] = ()) -> None:
        self.device, self.done = device, done

    def pin_memory(self) -> "Recorded":
        return Recorded(self.device, (*self.done, "pinned"))

    def to(self, device: torch.device, **how: object) -> "Recorded":
        return Recorded(device, (*self.done, (device.type, how)))


@pytest.mark.parametrize(
    ("here", "there", "done"),
    [
        (CPU, CUDA, ("pinned", ("cuda", {"non_blocking": True}))),
        (CPU, CPU, (("cpu", {}),)),
        (CUDA, CUDA, (("cuda", {}),)),
        (CUDA, CPU, (("cpu", {}),)),
    ],
)
def test_only_copies_to_a_gpu_are_asynchronous(here: torch.device, there: torch.device, done: object) -> None:
    """From pageable memory such a copy would be waited for; to a CPU it must be."""
    given: Any = Recorded(here)
    assert to_device(given, there).done == done  # type: ignore[attr-defined]


def test_a_copy_on_one_device_is_none() -> None:
    x = torch.ones(3)
    assert to_device(x, CPU) is x


def test_a_gpu_is_timed_by_events_of_its_own_and_a_cpu_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    told, clock = list[str](), iter([100.0, 102.5])
    monkeypatch.setattr(devices.time, "perf_counter", lambda: next(clock))

    def event() -> Any:
        name = f"event {sum(t.startswith('made') for t in told)}"
        told.append(f"made {name}")
        return SimpleNamespace(record=lambda: told.append(f"{name} recorded"), elapsed_time=lambda end: 1500.0)

    watch = Stopwatch(CUDA, event=event, wait=lambda device: told.append(f"waited for {device}"))
    assert watch.stop() == (2.5, 1.5)
    assert told == ["made event 0", "event 0 recorded", "made event 1", "event 1 recorded", "waited for cuda"]
    clock = iter([1.0, 1.25])
    assert Stopwatch(CPU, event=event).stop() == (0.25, None)


@pytest.mark.parametrize(("count", "said"), [(1, "1 thread,"), (2, "2 threads,")])
def test_threads_of_a_machine(count: int, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: count)
    machine.cache_clear()
    assert f", {said}" in machine(CPU)
    machine.cache_clear()

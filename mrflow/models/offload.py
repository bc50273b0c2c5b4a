"""Where weights are: on the device all the time, in the phase that needs them, or block by block.

A `WeightGroup` keeps its tensors on the host and lends them to the device; going back copies nothing. Where host
and device are one (a CPU) nothing moves, but the ledger counts as if it did, so that predictions can be checked.
"""

import threading
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mrflow._checks import is_whole, require
from mrflow.checkpoints.safetensors import check_uncut
from mrflow.errors import PlanError
from mrflow.machine.devices import pin_memory
from mrflow.model_info import Offload

OFFLOADS: tuple[Offload, ...] = ("none", "phase", "block")


@dataclass(frozen=True)
class RuntimeOptions:
    """How a model runs, apart from what it computes.

    `offload`: weights stay on the device ("none"), leave it after their phase ("phase"), or visit it block by block
    ("block"). `fold` makes a schedule's modulations once, before its first step. `compile` compiles what blocks do
    between matrix products, with the dynamo backend of that name if it is one; otherwise `kernels` takes Triton's on
    CUDA. `graphs` replays each step as a CUDA graph. `tile` has the autoencoder work in tiles of so many latent cells;
    None: whole, and in tiles only when memory runs out. `compute="fp8"` rounds what 8-bit weights are multiplied with
    to 8 bits too; it alone changes pictures.
    """

    offload: Offload = "none"
    fold: bool = True
    compile: bool | str | Callable[..., Any] = False
    graphs: bool = True
    tile: int | None = None
    kernels: bool = True
    compute: Literal["fp8"] | None = None

    def __post_init__(self) -> None:
        if self.compile and self.offload == "block":
            raise PlanError("compile=True needs blocks that stay in place; use offload='none' or 'phase' with it")
        right = self.tile is None or (is_whole(self.tile, 16) and self.tile % 8 == 0)
        require(right, "tile", "a multiple of 8 latent cells, at least 16", self.tile)


class Ledger:
    """Bytes of weights that are on the device, and the most there were."""

    def __init__(self) -> None:
        self.now = self.peak = 0

    def add(self, count: int) -> None:
        """Count bytes that came (or, negative, went)."""
        self.now += count
        self.peak = max(self.peak, self.now)


class WeightGroup:
    """Tensors of some modules that visit the device together; those of the modules in `without` are not among them."""

    def __init__(
        self,
        modules: Iterable[nn.Module],
        device: torch.device,
        ledger: Ledger,
        *,
        without: Iterable[nn.Module] = (),
        pin: bool = False,
    ) -> None:
        self.device, self.ledger = device, ledger
        left = {id(t) for module in without for t in module_tensors(module)}
        found = {id(t): t for module in modules for t in module_tensors(module) if id(t) not in left}
        self.tensors = list(found.values())
        self.host = [pin_memory(t.data) if pin and device.type == "cuda" else t.data for t in self.tensors]
        self.bytes = sum(t.nbytes for t in self.host)
        self.here = False
        self.arrived: torch.cuda.Event | None = None

    def bring(self, stream: "torch.cuda.Stream | None" = None) -> None:
        """Put the tensors on the device; on a side stream if one is given, and then `arrived` tells when."""
        if self.here:
            return
        self.here = True
        self.ledger.add(self.bytes)
        if self.device.type == "cpu":
            return
        with torch.inference_mode(mode=False):  # parameters cannot take tensors made in inference mode
            if stream is None:
                for tensor, host in zip(self.tensors, self.host, strict=True):
                    tensor.data = host.to(self.device, non_blocking=True)
                return
            current = torch.cuda.current_stream(self.device)
            with torch.cuda.stream(stream):
                for tensor, host in zip(self.tensors, self.host, strict=True):
                    tensor.data = host.to(self.device, non_blocking=True)
                    tensor.data.record_stream(current)
                self.arrived = torch.cuda.Event()
                self.arrived.record(stream)

    def wait(self) -> None:
        """Make the device's current work wait for tensors that are still on their way."""
        if self.arrived is not None:
            torch.cuda.current_stream(self.device).wait_event(self.arrived)
            self.arrived = None

    def send_back(self) -> None:
        """Take the tensors off the device."""
        if not self.here:
            return
        self.here = False
        self.arrived = None
        self.ledger.add(-self.bytes)
        for tensor, host in zip(self.tensors, self.host, strict=True):
            tensor.data = host


class BlockOffloader:
    """Blocks that run one after another: each is on the device while it runs, and the next one is on its way."""

    def __init__(self, blocks: Sequence[tuple[nn.Module, WeightGroup]], device: torch.device) -> None:
        self.parts = [part for _, part in blocks]
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        for number, (module, _) in enumerate(blocks):
            module.register_forward_pre_hook(partial(self._enter, number))
            module.register_forward_hook(partial(self._leave, number))

    def _enter(self, number: int, *_: object) -> None:
        for part in self.parts[number : number + 2]:
            part.bring(self.stream)
        self.parts[number].wait()

    def _leave(self, number: int, *_: object) -> None:
        self.parts[number].send_back()

    def clear(self) -> None:
        """Take everything off the device: after an exception some may be left."""
        for part in self.parts:
            part.send_back()


class Phase:
    """What has to be on the device at the same time: parts that stay for the phase, offloaders that run in it."""

    def __init__(self, parts: Sequence[WeightGroup], offloaders: Sequence[BlockOffloader] = ()) -> None:
        self.parts, self.offloaders = parts, offloaders

    def bring(self) -> None:
        """Begin."""
        for part in self.parts:
            part.bring()

    def send_back(self) -> None:
        """End."""
        for offloader in self.offloaders:
            offloader.clear()
        for part in self.parts:
            part.send_back()


class OffloadManager:
    """Which phase is on the device. One thread at a time uses what moves; what never moves needs no waiting."""

    def __init__(self, phases: dict[str, Phase], *, moving: bool, files: Mapping[Path, int] | None = None) -> None:
        self.phases, self.moving, self.files = phases, moving, files or {}
        self.lock = threading.RLock()
        if not moving:
            for phase in phases.values():
                phase.bring()

    @contextmanager
    def using(self, name: str) -> Generator[None]:
        """Inside, the phase is on the device, and no other; files that weights are read from are whole.

        Raises:
            WeightsError: one was cut since it was opened.
        """
        check_uncut(self.files)
        if not self.moving:
            yield
            return
        with self.lock:
            for other, phase in self.phases.items():
                if other != name:
                    phase.send_back()
            self.phases[name].bring()
            yield


def watch(modules: Iterable[nn.Module], files: Mapping[Path, int]) -> None:
    """Hold mapped files against their sizes before each of these modules runs: see `check_whole`."""

    def check(*_: object) -> None:
        check_uncut(files)

    for module in modules if files else ():
        module.register_forward_pre_hook(check)


def module_tensors(module: nn.Module) -> Iterable[Tensor]:
    """Parameters and buffers."""
    yield from module.parameters()
    yield from module.buffers()


def check_offload(offload: str) -> Offload:
    """An offload mode, or PlanError."""
    for known in OFFLOADS:
        if offload == known:
            return known
    raise PlanError(f"offload must be {', '.join(OFFLOADS)}, got {offload!r}")

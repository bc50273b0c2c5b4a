"""What every network upscaler needs: device, precision, size rules, batches and tiles, memory."""

import copy
import os
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mrflow._checks import is_whole, require
from mrflow.display.notes import note
from mrflow.errors import NonFiniteError, PlanError, ResourceError, WeightsError
from mrflow.machine.failures import is_out_of_memory
from mrflow.protocols.upscaler import Upscaler
from mrflow.records.files import FileNamed
from mrflow.tiling import in_tiles

FADE = 16  # pixels over which one tile fades into the next
# The most of a tile's border that is thrown away, where a network reaches farther: in pixels that come in, or in cells
# of `multiple` pixels for a network that puts these together first. Measured on trained networks by
# `experiments.real.reach`.
MARGIN = 128
SMALLEST = 64  # tiles are not made smaller than this, in pixels beyond their overlap
SHARE = 0.8  # of the free memory that a prediction may fill

Precision = Literal["float32", "float16", "bfloat16"]
PRECISIONS = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class NetworkFacts:
    """What is known of a network.

    `multiple`, `minimum` and `square` are rules for the sides it takes: pictures are padded by reflection to keep them,
    and cut again. `reach` is how many pixels to each side an output pixel depends on (None: not known, or all of them);
    `tiles` says whether it may be given a picture in parts. `values` are alive at once per pixel that comes in, `flops`
    its operations; 0 where not known. `half` are the precisions below float32 that are known to be safe, best first.
    """

    scale: int
    multiple: int = 1
    minimum: int = 1
    square: bool = False
    reach: int | None = None
    tiles: bool = True
    values: float = 0.0
    flops: float = 0.0
    half: tuple[Precision, ...] = ()


@dataclass(eq=False)
class OpenedNetwork:
    """A network in memory. `call` runs it, `single` says that it takes one picture at a time."""

    net: nn.Module
    facts: NetworkFacts
    call: Callable[[nn.Module, Tensor], Tensor] = lambda net, x: net(x)
    single: bool = False
    placed: dict[tuple[torch.device, torch.dtype], nn.Module] = field(default_factory=dict)
    unsafe: set[torch.dtype] = field(default_factory=set)

    def on(self, device: torch.device, dtype: torch.dtype) -> nn.Module:
        """The network on a device, in a precision: copied there once."""
        key = (device, dtype)
        if key not in self.placed:
            first = next(self.net.parameters(), None)
            here = first is None or (first.device == device and first.dtype == dtype)
            self.placed[key] = self.net if here else copy.deepcopy(self.net).to(device, dtype).eval()
        return self.placed[key]


class Network(Upscaler):
    """An upscaler that is a network. Subclasses are frozen dataclasses that say how to open it.

    `tile` (pixels of the input, a side) asks for tiles of that size; None takes the whole picture where its predicted
    memory is free, else the largest tiles that fit, and smaller ones when memory runs out all the same. Tiles overlap
    by as far as the network reaches, at most 128 pixels and 16 in which they fade into each other. `dtype` is a
    precision; None is float32 on a CPU and, on a GPU, half where the network is known to be safe in it. A result of
    half precision that is not finite is made again in float32.
    """

    tile: int | None
    dtype: Precision | None

    @property
    @abstractmethod
    def network(self) -> OpenedNetwork:
        """The network, read once."""

    @property
    def facts(self) -> NetworkFacts:
        """What is known of it."""
        return self.network.facts

    @property
    def scale(self) -> int:
        """What it multiplies both sides by."""
        return self.facts.scale

    @property
    def flops_per_pixel(self) -> float:
        """Operations per pixel that comes in."""
        return self.facts.flops

    def overlap(self) -> tuple[int, int]:
        """How many pixels two tiles share, and how many of them at each tile's border are thrown away."""
        facts = self.facts
        m = facts.multiple
        margin = -(-min(MARGIN * m if facts.reach is None else facts.reach, MARGIN * m) // m) * m
        return 2 * margin + -(-FADE // m) * m, margin

    def __call__(self, pixels: Tensor) -> Tensor:
        """Enlarge, not clamped.

        Raises:
            ResourceError: even the smallest tiles do not fit into memory.
            NonFiniteError: it gave NaN or infinity in float32.
            WeightsError: it gave pictures of another size than its scale promises.
        """
        facts = self.facts
        h, w = pixels.shape[-2:]
        x = pad_to_multiple(pixels, facts).contiguous(memory_format=torch.channels_last)
        out = self._at(x, self._precision(pixels.device))
        s = facts.scale
        if out.shape != (len(x), 3, s * x.shape[-2], s * x.shape[-1]):
            raise WeightsError(f"{self!r} promised scale {s} but made {tuple(out.shape)} of {tuple(x.shape)}")
        return out[..., : s * h, : s * w].contiguous()

    def _precision(self, device: torch.device) -> torch.dtype:
        """What it computes in: as told, else half where that pays and is safe."""
        if self.dtype is not None:
            return PRECISIONS[self.dtype]
        half = self.facts.half
        return PRECISIONS[half[0]] if half and device.type == "cuda" else torch.float32

    def _at(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """In a precision, or in float32 where that overflows."""
        opened = self.network
        if dtype == torch.float32 or dtype in opened.unsafe:
            out = self._call_fitting(x, torch.float32)
            if not bool(torch.isfinite(out).all()):
                raise NonFiniteError(f"{self!r} gave NaN or infinity in float32; are its weights whole?")
            return out
        out = self._call_fitting(x, dtype)
        if bool(torch.isfinite(out).all()):
            return out
        opened.unsafe.add(dtype)
        note(f"{self!r} gave NaN or infinity in {dtype}; it works in float32 from now on".replace("torch.", ""))
        return self._at(x, torch.float32)

    def _call_fitting(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Whole or in tiles: what is predicted to fit, then smaller tiles while it does not."""
        tile, told = self._tile(x, dtype), False
        while True:
            try:
                return self._call_tiles(x, dtype, tile)
            except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is a RuntimeError
                if not is_out_of_memory(error):
                    raise
            # Outside the handler, where what the failed call had made is free again.
            smaller = self._smaller(x, tile)
            if smaller is None:
                raise ResourceError(
                    f"{self!r} ran out of memory at {x.shape[-2]}x{x.shape[-1]}, and smaller tiles cannot help"
                )
            tile = smaller
            if not told:
                told = True
                note(f"{type(self).__name__} ran out of memory at {x.shape[-2]}x{x.shape[-1]}; it works in tiles")
            if x.device.type == "cuda":
                torch.cuda.empty_cache()

    def _tile(self, x: Tensor, dtype: torch.dtype) -> int:
        """The tile's side that is predicted to fit."""
        facts, longest = self.facts, max(x.shape[-2:])
        if self.tile is not None:
            return max(self._least(), self.tile // facts.multiple * facts.multiple)
        free = free_memory(x.device)
        if not facts.values or not facts.tiles or free is None:
            return longest
        area = SHARE * free / (facts.values * dtype.itemsize)
        if area >= x.shape[-2] * x.shape[-1]:
            return longest
        return max(self._least(), min(longest, int(area**0.5) // facts.multiple * facts.multiple))

    def _least(self) -> int:
        m = self.facts.multiple
        least = max(self.overlap()[0] + SMALLEST, self.facts.minimum)
        return -(-least // m) * m

    def _smaller(self, x: Tensor, tile: int) -> int | None:
        """The next tile to try after one did not fit; None where there is none."""
        m = self.facts.multiple
        half = max(self._least(), min(tile, max(x.shape[-2:])) // 2 // m * m)
        return half if self.facts.tiles and half < min(tile, max(x.shape[-2:])) else None

    def _call_tiles(self, x: Tensor, dtype: torch.dtype, tile: int) -> Tensor:
        overlap, margin = self.overlap()
        if not self.facts.tiles or tile >= max(x.shape[-2:]):
            return self._call_batch(x, dtype)
        return in_tiles(
            lambda part: self._call_batch(part, dtype),
            x,
            tile=tile,
            overlap=overlap,
            margin=margin,
            up=self.facts.scale,
        )

    def _call_batch(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """The whole batch at once where that is predicted to fit, else one picture after another."""
        opened = self.network
        net = opened.on(x.device, dtype)
        free = free_memory(x.device)
        need = opened.facts.values * dtype.itemsize * x.shape[-2] * x.shape[-1] * len(x)
        if opened.single or (len(x) > 1 and free is not None and need > SHARE * free):
            return torch.cat([opened.call(net, item.to(dtype)).float() for item in x.split(1)])
        return opened.call(net, x.to(dtype)).float()


@dataclass(frozen=True)
class OneFile(FileNamed, Network):
    """A network whose weights are one file. A record names it without its folder, and its SHA-256.

    Raises:
        WeightsError: the file is missing, unsafe or broken.
    """

    path: str
    sha256: str = ""
    tile: int | None = None
    dtype: Precision | None = None

    def __post_init__(self) -> None:
        check_settings(self.tile, self.dtype)
        self.find_file("path", self.path)
        _ = self.network


def pad_to_multiple(pixels: Tensor, facts: NetworkFacts) -> Tensor:
    """Pictures padded at the bottom and the right to the sides that a network takes: by reflection as far as it goes,
    then by repeating the edge.
    """
    h, w = pixels.shape[-2:]
    tall, wide = (-(-max(side, facts.minimum) // facts.multiple) * facts.multiple for side in (h, w))
    if facts.square:
        tall = wide = max(tall, wide)
    down, right = tall - h, wide - w
    if not (down or right):
        return pixels
    x = F.pad(pixels, (0, min(right, w - 1), 0, min(down, h - 1)), mode="reflect")
    return F.pad(x, (0, wide - x.shape[-1], 0, tall - x.shape[-2]), mode="replicate")


def free_memory(device: torch.device) -> int | None:
    """Bytes that can be taken on a device now; None where that cannot be told."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    if device.type != "cpu":
        return None
    try:
        with open("/proc/meminfo") as f:
            for line in f:
                if line.startswith("MemAvailable:"):
                    return 1024 * int(line.split()[1])
    except (OSError, ValueError):
        pass
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None


def check_settings(tile: object, dtype: object) -> None:
    """Refuse a tile or a precision that cannot work."""
    require(tile is None or is_whole(tile, 16), "tile", "a whole number of pixels from 16, or None", tile)
    if dtype is not None and dtype not in PRECISIONS:
        raise PlanError(f"dtype must be one of {', '.join(PRECISIONS)}, or None, got {dtype!r}")

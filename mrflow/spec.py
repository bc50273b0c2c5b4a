"""What flows through a chain: a tensor and the facts about it. Facts hold no tensors: they compare, hash and print.

Sizes are always `height, width`. `Pixels` counts pixels, `Latents` counts latent cells.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Generic, TypeVar

from torch import Tensor

from mrflow._checks import check_whole, is_whole, require
from mrflow.errors import PlanError
from mrflow.model_info import LatentSpace

MAX_SIDE = 32768


class Spec(ABC):
    """The facts about one value. Subclass it (as a frozen dataclass) for a value of your own kind."""

    batch: int

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """The tensor's shape."""

    @abstractmethod
    def __str__(self) -> str:
        """A few words for plans and errors."""


@dataclass(frozen=True)
class Start(Spec):
    """Nothing yet: what a chain that makes pictures from prompts is given."""

    batch: int = 1

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.batch, 0)

    def __str__(self) -> str:
        return f"Start(batch={self.batch})"


@dataclass(frozen=True)
class Latents(Spec):
    """Latents of shape (batch, channels, height, width) that hold noise of level `sigma` (0: clean)."""

    batch: int
    height: int
    width: int
    space: LatentSpace
    sigma: float = 0.0

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.batch, self.space.channels, self.height, self.width)

    @property
    def tokens(self) -> int:
        """How many tokens the transformer sees."""
        return (self.height // self.space.patch) * (self.width // self.space.patch)

    def __str__(self) -> str:
        return f"Latents {self.height}x{self.width} sigma={self.sigma:.4g}"


@dataclass(frozen=True)
class Pixels(Spec):
    """Pictures of shape (batch, 3, height, width), float32 in [0, 1]."""

    batch: int
    height: int
    width: int

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.batch, 3, self.height, self.width)

    def __str__(self) -> str:
        return f"Pixels {self.height}x{self.width}"


S = TypeVar("S", bound=Spec, covariant=True)


@dataclass(frozen=True)
class State(Generic[S]):
    """The only thing that flows: a tensor (float32) and the facts about it."""

    spec: S
    data: Tensor


def check_size(height: int, width: int, space: LatentSpace) -> None:
    """Refuse a picture size that the model cannot make, and offer the nearest that it can.

    Raises:
        PlanError: a side is not a whole number, below one token, above MAX_SIDE, or not a multiple of a token.
    """
    for name, side in (("height", height), ("width", width)):
        require(is_whole(side), name, "a whole number of pixels", side)
        if not space.multiple <= side <= MAX_SIDE:
            raise PlanError(f"{name} must be from {space.multiple} to {MAX_SIDE} pixels, got {side}")
    m = space.multiple
    if height % m or width % m:
        near = tuple(max(m, m * math.floor(side / m + 0.5)) if side % m else side for side in (height, width))
        raise PlanError(f"size {height}x{width} is not a multiple of {m}; try {near[0]}x{near[1]}")


def size(aspect: str | float, *, megapixels: float = 1.0, multiple: int = 32) -> tuple[int, int]:
    """The (height, width) in pixels nearest to an aspect, "width:height" or width / height, and an area.

    A megapixel is 1024 x 1024 pixels. Sides are multiples of `multiple`: 32 lets a ladder begin at half the size for
    models whose tokens are 16 pixels a side, 64 at a quarter.

    Raises:
        PlanError: the aspect, the area or the multiple make no sense.
    """
    ratio = _ratio(aspect)
    check_whole("multiple", multiple, 1, 1024)
    if not (isinstance(megapixels, int | float) and 0 < megapixels <= MAX_SIDE**2 / 2**20):
        raise PlanError(f"megapixels must be above 0 to {MAX_SIDE**2 // 2**20}, got {megapixels!r}")
    area = megapixels * 2**20

    def near(side: float) -> set[int]:
        low = max(1, math.floor(side / multiple))
        return {low * multiple, (low + 1) * multiple}

    def off(candidate: tuple[int, int]) -> float:
        h, w = candidate
        return abs(math.log(w / h / ratio)) + abs(math.log(h * w / area))

    candidates = [(h, w) for h in near(math.sqrt(area / ratio)) for w in near(math.sqrt(area * ratio))]
    best = min(sorted(candidates), key=off)
    if max(best) > MAX_SIDE:
        raise PlanError(f"{best[0]}x{best[1]} is beyond {MAX_SIDE} pixels a side")
    return best


def _ratio(aspect: str | float) -> float:
    """Width over height."""
    try:
        if isinstance(aspect, str):
            width, _, height = aspect.partition(":")
            ratio = float(width) / float(height or 1)
        else:
            ratio = float(aspect)
    except (TypeError, ValueError, ZeroDivisionError):
        ratio = 0.0
    if not (math.isfinite(ratio) and 0.05 <= ratio <= 20):
        raise PlanError(f'an aspect is width:height, such as "16:9", or width / height from 0.05 to 20, got {aspect!r}')
    return ratio

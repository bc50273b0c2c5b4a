"""The upscaler slots: pixels to `scale` times the pixels, latents to `scale` times the latents."""

from abc import ABC, abstractmethod
from math import isfinite
from operator import index
from typing import SupportsIndex, cast

from torch import Tensor, float32, strided

from mrflow._checks import Checked
from mrflow.errors import NonFiniteError, PlanError, PromiseError


class Upscaler(Checked, ABC):
    """Enlarges pictures. Subclass it as a frozen dataclass, or with a `repr` that names the weights."""

    @property
    @abstractmethod
    def scale(self) -> int:
        """What it multiplies both sides by."""

    @property
    def flops_per_pixel(self) -> float:
        """Floating-point operations per pixel that comes in; 0 where not worth counting."""
        return 0.0

    @abstractmethod
    def __call__(self, pixels: Tensor) -> Tensor:
        """float32 (b, 3, h, w) in [0, 1] to (b, 3, scale h, scale w), on the same device; need not be clamped."""


class LatentUpscaler(ABC):
    """Enlarges clean latents. Subclass it as a frozen dataclass, or with a `repr` that names the weights.

    `space` is the name of the latents that it knows, as in `model.info.space.name`, `channels` theirs (None: not held).
    """

    space: str

    @property
    def channels(self) -> int | None:
        """Channels of the latents that it takes; a plan refuses others."""
        return None

    @property
    @abstractmethod
    def scale(self) -> int:
        """What it multiplies both sides by."""

    @property
    def flops_per_cell(self) -> float:
        """Floating-point operations per latent cell that comes in; 0 where not worth counting."""
        return 0.0

    @abstractmethod
    def __call__(self, latents: Tensor) -> Tensor:
        """float32 (b, c, h, w), normalised as the model's, to (b, c, scale h, scale w), on the same device."""


def passes_to(size: tuple[int, int], height: int, width: int, scale: int) -> int:
    """How often an upscaler of that scale runs until height x width is nowhere below `size`, both in its own units.

    Raises:
        PlanError: its scale is below 2, and `size` is larger.
    """
    passes = 0
    while height < size[0] or width < size[1]:
        if scale < 2:
            raise PlanError(f"an upscaler of scale {scale} cannot reach {size[0]}x{size[1]}")
        height, width, passes = height * scale, width * scale, passes + 1
    return passes


MOST = 64  # times the side, in one pass
BEYOND = 16.0  # what networks overshoot is less, with random weights too; what counts to 255 is far more


def scale_of(upscaler: object, kind: "type[Upscaler | LatentUpscaler]" = Upscaler) -> int:
    """The scale that an upscaler of this kind says.

    Raises:
        PlanError: it is none, or says no whole number from 1 to 64.
    """
    if not isinstance(upscaler, kind):
        name = upscaler.__name__ if isinstance(upscaler, type) else type(upscaler).__name__
        raise PlanError(f"an upscaler must be an instance of a subclass of mrflow.{kind.__name__}, got {name}")
    said: object = upscaler.scale
    try:
        scale = 0 if isinstance(said, bool) else index(cast("SupportsIndex", said))
    except TypeError:
        scale = 0
    if not 1 <= scale <= MOST:
        raise PlanError(f"{type(upscaler).__name__} says scale {said!r}; it must be a whole number from 1 to {MOST}")
    return scale


def apply_upscaler(upscaler: Upscaler | LatentUpscaler, x: Tensor) -> Tensor:
    """What an upscaler makes of pixels or latents (b, c, h, w), held against what it promises; without gradients.

    Raises:
        PromiseError: it made another shape than (b, c, scale h, scale w), something else than an ordinary float32
            tensor on the device of `x`, or pixels that count to 255. NonFiniteError: pixels that are NaN or infinite.
    """
    pixels, name = isinstance(upscaler, Upscaler), type(upscaler).__name__
    b, c, h, w = x.shape
    scale = scale_of(upscaler, Upscaler if pixels else LatentUpscaler)
    want, made = (b, c, scale * h, scale * w), cast("object", upscaler(x))
    if not isinstance(made, Tensor) or made.layout != strided:
        what = f"but one of layout {made.layout}" if isinstance(made, Tensor) else f"but {type(made).__name__}"
        raise PromiseError(f"{name} made no ordinary tensor {what}")
    if tuple(made.shape) != want:
        raise PromiseError(
            f"{name} says scale {scale}, so it must make {want} of {tuple(x.shape)}, but made {tuple(made.shape)}"
        )
    if made.dtype != float32 or made.device.type != x.device.type:
        raise PromiseError(f"{name} must make float32 on {x.device}, but made {made.dtype} on {made.device}")
    made = made.detach()
    if pixels:
        low, high = (float(end) for end in made.aminmax())
        if not (isfinite(low) and isfinite(high)):
            raise NonFiniteError(f"{name} made NaN or infinity")
        if low < -BEYOND or high > 1 + BEYOND:
            raise PromiseError(f"{name} made values from {low:g} to {high:g}; pixels lie in [0, 1]")
    return made

"""The upscaler slots: pixels to `scale` times the pixels, latents to `scale` times the latents."""

from abc import ABC, abstractmethod

from torch import Tensor

from mrflow.errors import PlanError, PromiseError


class Upscaler(ABC):
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


def enlarged(upscaler: Upscaler | LatentUpscaler, x: Tensor) -> Tensor:
    """What an upscaler makes of pixels or latents (b, c, h, w), held against its scale.

    Raises:
        PromiseError: it made another shape than (b, c, scale h, scale w).
    """
    b, c, h, w = x.shape
    want, made = (b, c, upscaler.scale * h, upscaler.scale * w), upscaler(x)
    if tuple(made.shape) != want:
        raise PromiseError(
            f"{type(upscaler).__name__} says scale {upscaler.scale}, so it must make {want} of {tuple(x.shape)}, "
            f"but made {tuple(made.shape)}"
        )
    return made

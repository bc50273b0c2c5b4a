"""The upscaler slot: pixels to `scale` times the pixels."""

from abc import ABC, abstractmethod

from torch import Tensor


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

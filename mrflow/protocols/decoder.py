"""The slot of decoders that others train: clean latents to pixels, in the place of a model's own."""

from abc import ABC, abstractmethod

from torch import Tensor


class Decoder(ABC):
    """Turns clean latents into pixels. Subclass it as a frozen dataclass, or with a `repr` that names the weights.

    `space` is the name of the latents that it knows, as in `model.info.space.name`.
    """

    space: str

    @property
    @abstractmethod
    def scale(self) -> int:
        """Pixels of a latent cell, per side: 8 as most models' own, 1 for a preview, 32 where it enlarges too."""

    @property
    def flops_per_pixel(self) -> float:
        """Floating-point operations per pixel that it makes; 0 where not worth counting."""
        return 0.0

    @abstractmethod
    def __call__(self, latents: Tensor) -> Tensor:
        """float32 (b, c, h, w), normalised as the model's, to (b, 3, scale h, scale w) around [0, 1], on one device."""

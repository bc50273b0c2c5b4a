"""Upscalers made of upscalers: each is one frozen dataclass, as one of your own would be."""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from mrflow._checks import check_number, check_whole
from mrflow.errors import PlanError
from mrflow.protocols.upscaler import Upscaler


@dataclass(frozen=True)
class Blend(Upscaler):
    """(1 - amount) of one upscaler and amount of another of the same scale."""

    first: Upscaler
    second: Upscaler
    amount: float = 0.5

    def __post_init__(self) -> None:
        if self.first.scale != self.second.scale:
            raise PlanError(
                f"two upscalers to blend must have one scale, got {self.first.scale} and {self.second.scale}"
            )
        check_number("amount", self.amount, 0.0, 1.0)

    @property
    def scale(self) -> int:
        """Their scale."""
        return self.first.scale

    @property
    def flops_per_pixel(self) -> float:
        """Both together."""
        return self.first.flops_per_pixel + self.second.flops_per_pixel

    def __call__(self, pixels: Tensor) -> Tensor:
        """Both, mixed."""
        return self.first(pixels).lerp(self.second(pixels), self.amount)


@dataclass(frozen=True)
class Around(Upscaler):
    """What is made of another upscaler and keeps its scale."""

    inner: Upscaler

    @property
    def scale(self) -> int:
        """The inner upscaler's."""
        return self.inner.scale

    @property
    def flops_per_pixel(self) -> float:
        """The inner upscaler's."""
        return self.inner.flops_per_pixel


@dataclass(frozen=True)
class Sharpen(Around):
    """An unsharp mask on what another upscaler gives: y + amount (y - mean of y over a square of 2 radius + 1)."""

    amount: float = 0.3
    radius: int = 1

    def __post_init__(self) -> None:
        check_number("amount", self.amount, 0.0, 10.0)
        check_whole("radius", self.radius, 1, 64, wanted="a whole number of pixels from 1 to 64")

    def __call__(self, pixels: Tensor) -> Tensor:
        """Enlarge, then sharpen."""
        y, r = self.inner(pixels), self.radius
        return y + self.amount * (y - F.avg_pool2d(F.pad(y, (r, r, r, r), mode="replicate"), 2 * r + 1, stride=1))


@dataclass(frozen=True)
class ColourMatch(Around):
    """Another upscaler's pictures with each channel's mean and standard deviation those of the picture that came in."""

    def __call__(self, pixels: Tensor) -> Tensor:
        """Enlarge, then match; a channel of one level stays one."""
        y = self.inner(pixels)
        mean, std = y.mean((2, 3), keepdim=True), y.std((2, 3), correction=0, keepdim=True)
        to_mean, to_std = pixels.mean((2, 3), keepdim=True), pixels.std((2, 3), correction=0, keepdim=True)
        return (y - mean) * (to_std / std.clamp_min(1e-6)) + to_mean


@dataclass(frozen=True)
class EightBit(Around):
    """Another upscaler between two roundings to 8 bits: what comes in is rounded, what goes out is cut off below.

    So does the published procedure, which hands PIL pictures from part to part; the stage `Quantise` does one of them.
    """

    def __call__(self, pixels: Tensor) -> Tensor:
        """Round, enlarge, cut off; clamped."""
        return quantise(self.inner(quantise(pixels.clamp(0, 1))).clamp(0, 1), truncate=True)


def quantise(pixels: Tensor, *, truncate: bool = False) -> Tensor:
    """round(255 x) / 255, or floor(255 x) / 255."""
    levels = pixels * 255
    return (levels.floor() if truncate else levels.round()) / 255

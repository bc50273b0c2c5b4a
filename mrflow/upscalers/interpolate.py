"""Interpolation, the honest baseline of every learned upscaler."""

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from mrflow._checks import Bound, check_whole
from mrflow.errors import PlanError
from mrflow.protocols.upscaler import Upscaler

Filter = Literal["nearest", "bilinear", "bicubic"]
Factor = Annotated[int, Bound(check_whole, 1, 16, name="an upscaler's factor")]


@dataclass(frozen=True)
class Interpolate(Upscaler):
    """Plain interpolation by a whole factor, the honest baseline of every learned upscaler."""

    factor: Factor = 2
    filter: Filter = "bicubic"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_filter(self.filter)

    @property
    def scale(self) -> int:
        """The factor."""
        return self.factor

    def __call__(self, pixels: Tensor) -> Tensor:
        """Interpolate, clamped to [0, 1]."""
        if self.filter == "nearest":
            return F.interpolate(pixels, scale_factor=self.factor, mode="nearest-exact")
        out = F.interpolate(pixels, scale_factor=self.factor, mode=self.filter, align_corners=False)
        return out.clamp(0, 1)


def check_filter(filter: object) -> None:
    """Refuse an unknown filter."""
    if filter not in ("nearest", "bilinear", "bicubic"):
        raise PlanError(f"filter must be nearest, bilinear or bicubic, got {filter!r}")


@dataclass(frozen=True)
class Lanczos(Upscaler):
    """Windowed-sinc interpolation with three lobes: sinc(x) sinc(x / 3) for |x| < 3, edges repeated."""

    factor: Factor = 2

    @property
    def scale(self) -> int:
        """The factor."""
        return self.factor

    def __call__(self, pixels: Tensor) -> Tensor:
        """Interpolate rows, then columns; clamped to [0, 1]."""
        b, c, h, w = pixels.shape
        kernel = _lanczos_phases(self.factor).to(pixels)
        x = F.pad(pixels.reshape(b * c, 1, h, w), (3, 3, 3, 3), mode="replicate")
        x = F.conv2d(x, kernel[:, None, :, None])  # (bc, factor, h + 1 rows, w + 6)
        x = x.transpose(1, 2).reshape(b * c, 1, -1, w + 6)
        x = F.conv2d(x, kernel[:, None, None, :]).permute(0, 2, 3, 1).reshape(b * c, -1, self.factor * (w + 1))
        first = (self.factor + 1) // 2  # outputs that lie before the first pixel's centre
        x = x[:, first : first + self.factor * h, first : first + self.factor * w]
        return x.reshape(b, c, self.factor * h, self.factor * w).clamp(0, 1)


def _lanczos_phases(factor: int) -> Tensor:
    """The six taps of each of the `factor` positions between two pixels; every row sums to 1."""
    shift = (torch.arange(factor, dtype=torch.float64) + (0.5 if factor % 2 == 0 else 0.0)) / factor
    x = torch.arange(-2, 4, dtype=torch.float64)[None, :] - shift[:, None]
    taps = torch.where(x.abs() < 3, torch.sinc(x) * torch.sinc(x / 3), torch.zeros_like(x))
    return taps / taps.sum(1, keepdim=True)

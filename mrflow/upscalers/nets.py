"""Super-resolution networks that BasicSR and Real-ESRGAN train: RRDBNet (ESRGAN) and SRVGGNetCompact.

Parameters have the names of today's BasicSR checkpoints; `mrflow/upscalers/weights.py` maps the older names to them.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

SLOPE = 0.2  # of the leaky rectifiers (arXiv 1809.00219, BasicSR rrdbnet_arch)
RESIDUAL = 0.2  # what a dense block's, and a whole RRDB's, change is multiplied by


@dataclass(frozen=True)
class RRDBParams:
    """Sizes of an RRDBNet. Pixels are put `unshuffle` to a side into channels first; `ups` doublings follow the trunk.

    Of a published net of scale 4 they are 1 and 2, of scale 2 they are 2 and 2, of scale 1 they are 4 and 2.
    """

    width: int = 64
    blocks: int = 23
    growth: int = 32
    unshuffle: int = 1
    ups: int = 2
    channels: int = 3

    @property
    def scale(self) -> int:
        """What sides are multiplied by."""
        return (1 << self.ups) // self.unshuffle

    @property
    def reach(self) -> int:
        """How many pixels of the input, to each side, an output pixel can depend on."""
        trunk = 15 * self.blocks + 2
        beyond = sum(1 / 2 ** (k + 1) for k in range(self.ups)) + 2 / 2**self.ups
        return self.unshuffle * (trunk + int(beyond) + 1)

    @property
    def flops(self) -> float:
        """Operations per pixel that comes in."""
        w, g = self.width, self.growth
        dense = sum((w + k * g) * g for k in range(4)) + (w + 4 * g) * w
        low = self.channels * self.unshuffle**2 * w + 3 * self.blocks * dense + w * w
        high = sum((4 << 2 * k) * w * w for k in range(self.ups)) + (1 << 2 * self.ups) * (w * w + w * self.channels)
        return 18 * (low + high) / self.unshuffle**2

    @property
    def values(self) -> float:
        """Values alive at once per pixel that comes in, at the most."""
        w, g = self.width, self.growth
        low = 4 * w + 2 * (w + 4 * g)
        high = (1 << 2 * self.ups) * (2 * w + self.channels + (w / 4 if self.ups else 0))
        return max(low, high) / self.unshuffle**2 + self.channels


class DenseBlock(nn.Module):
    """Five 3x3 convolutions, each of everything before it; a fifth of the last is added to what came in."""

    def __init__(self, width: int, growth: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, growth, 3, padding=1)
        self.conv2 = nn.Conv2d(width + growth, growth, 3, padding=1)
        self.conv3 = nn.Conv2d(width + 2 * growth, growth, 3, padding=1)
        self.conv4 = nn.Conv2d(width + 3 * growth, growth, 3, padding=1)
        self.conv5 = nn.Conv2d(width + 4 * growth, width, 3, padding=1)

    def forward(self, x: Float[Tensor, "b w y x"]) -> Float[Tensor, "b w y x"]:
        """The same shape."""
        seen = x
        for conv in (self.conv1, self.conv2, self.conv3, self.conv4):
            seen = torch.cat((seen, F.leaky_relu_(conv(seen), SLOPE)), 1)
        return torch.add(x, self.conv5(seen), alpha=RESIDUAL)


class RRDB(nn.Module):
    """Three dense blocks; a fifth of what they make is added to what came in."""

    def __init__(self, width: int, growth: int) -> None:
        super().__init__()
        self.rdb1, self.rdb2, self.rdb3 = (DenseBlock(width, growth) for _ in range(3))

    def forward(self, x: Float[Tensor, "b w y x"]) -> Float[Tensor, "b w y x"]:
        """The same shape."""
        return torch.add(x, self.rdb3(self.rdb2(self.rdb1(x))), alpha=RESIDUAL)


class RRDBNet(nn.Module):
    """ESRGAN's generator (arXiv 1809.00219), with pixel-unshuffle as in Real-ESRGAN (arXiv 2107.10833)."""

    def __init__(self, params: RRDBParams) -> None:
        super().__init__()
        self.params = params
        w = params.width
        self.conv_first = nn.Conv2d(params.channels * params.unshuffle**2, w, 3, padding=1)
        self.body = nn.Sequential(*(RRDB(w, params.growth) for _ in range(params.blocks)))
        self.conv_body = nn.Conv2d(w, w, 3, padding=1)
        for k in range(params.ups):
            self.add_module(f"conv_up{k + 1}", nn.Conv2d(w, w, 3, padding=1))
        self.conv_hr = nn.Conv2d(w, w, 3, padding=1)
        self.conv_last = nn.Conv2d(w, params.channels, 3, padding=1)

    def forward(self, pixels: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c y x"]:
        """Pictures in [0, 1], sides multiples of `unshuffle`, to `scale` times the sides; not clamped."""
        x = self.conv_first(F.pixel_unshuffle(pixels, self.params.unshuffle))
        x = x + self.conv_body(self.body(x))
        for k in range(self.params.ups):
            conv = self.get_submodule(f"conv_up{k + 1}")
            x = F.leaky_relu_(conv(F.interpolate(x, scale_factor=2, mode="nearest")), SLOPE)
        out: Tensor = self.conv_last(F.leaky_relu_(self.conv_hr(x), SLOPE))
        return out


@dataclass(frozen=True)
class CompactParams:
    """Sizes of an SRVGGNetCompact: `convs` layers of `width` between the first convolution and the last."""

    width: int = 64
    convs: int = 32
    scale: int = 4
    channels: int = 3

    @property
    def reach(self) -> int:
        """How many pixels of the input, to each side, an output pixel can depend on."""
        return self.convs + 2

    @property
    def flops(self) -> float:
        """Operations per pixel that comes in."""
        ends = self.channels * self.width * (1 + self.scale**2)
        return 18 * (ends + self.convs * self.width**2)

    @property
    def values(self) -> float:
        """Values alive at once per pixel that comes in, at the most."""
        out = self.channels * self.scale**2
        return self.channels + max(3 * self.width, self.width + out, 3 * out)


class SRVGGNetCompact(nn.Module):
    """Convolutions and rectifiers at the low resolution, one depth-to-space at the end (Real-ESRGAN's small nets)."""

    def __init__(self, params: CompactParams) -> None:
        super().__init__()
        self.params = params
        layers: list[nn.Module] = [nn.Conv2d(params.channels, params.width, 3, padding=1), nn.PReLU(params.width)]
        for _ in range(params.convs):
            layers += [nn.Conv2d(params.width, params.width, 3, padding=1), nn.PReLU(params.width)]
        layers.append(nn.Conv2d(params.width, params.channels * params.scale**2, 3, padding=1))
        self.body = nn.Sequential(*layers)

    def forward(self, pixels: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c y x"]:
        """Pictures in [0, 1] to `scale` times the sides, as a change of their nearest enlargement; not clamped."""
        change = F.pixel_shuffle(self.body(pixels), self.params.scale)
        return change.add_(F.interpolate(pixels, scale_factor=self.params.scale, mode="nearest"))

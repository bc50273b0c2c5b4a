"""The FLUX autoencoder (AutoencoderKL), any widths. Parameter names are Black Forest Labs', as in `flux.py`.

One file then means one set of names for the whole model, and both published layouts load without a copy: diffusers'
differs in names and in the shape of eight matrices only. Weights in `torch.channels_last` make every layer run so.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from mrflow.errors import PlanError
from mrflow.models.kl import KLAutoencoder, NormedModule, ResidualBlock

EPS = 1e-6


@dataclass(frozen=True)
class VaeParams:
    """Sizes of the autoencoder; the defaults are FLUX.1's. `channels` are the levels' widths, finest first."""

    channels: tuple[int, ...] = (128, 256, 512, 512)
    latent: int = 16
    blocks: int = 2
    scale: float = 0.3611
    shift: float = 0.1159
    groups: int = 32

    def __post_init__(self) -> None:
        if not self.channels or any(c % self.groups for c in self.channels):
            raise PlanError(f"channels must be multiples of groups ({self.groups}), got {self.channels}")

    @property
    def downscale(self) -> int:
        """Pixels per latent cell, per side."""
        return 1 << (len(self.channels) - 1)


class VaeFlux(KLAutoencoder[VaeParams]):
    """Pictures in [0, 1] to normalised latents, (z - shift) * scale, and back."""

    def __init__(self, params: VaeParams) -> None:
        super().__init__()
        self.params = params
        self.encoder, self.decoder = _Encoder(params), _Decoder(params)

    @property
    def dtype(self) -> torch.dtype:
        return self.encoder.conv_in.weight.dtype

    def encode_raw(self, x: Tensor) -> Tensor:
        moments: Tensor = self.encoder(x)
        return moments

    def decode_raw(self, z: Tensor) -> Tensor:
        pixels: Tensor = self.decoder(z)
        return pixels

    def normalise(self, z: Tensor) -> Tensor:
        return (z - self.params.shift) * self.params.scale

    def denormalise(self, latents: Tensor) -> Tensor:
        return latents / self.params.scale + self.params.shift


class _Encoder(NormedModule):
    """3 channels to mean and log-variance: residual blocks and a halving for each level, attention at the coarsest."""

    def __init__(self, p: VaeParams) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(3, p.channels[0], 3, padding=1)
        pairs = zip((p.channels[0], *p.channels[:-1]), p.channels, strict=True)
        self.down = nn.ModuleList(
            _Level(i, o, blocks=p.blocks, groups=p.groups, down=level + 1 < len(p.channels))
            for level, (i, o) in enumerate(pairs)
        )
        self.mid = _Middle(p.channels[-1], p.groups)
        self.norm_out = nn.GroupNorm(p.groups, p.channels[-1], eps=EPS)
        self.conv_out = nn.Conv2d(p.channels[-1], 2 * p.latent, 3, padding=1)

    def forward(self, x: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b c2 y x"]:
        """Mean, then log-variance, along the channels."""
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        y: Tensor = self.conv_out(self.norm_silu(self.norm_out, self.mid(x)))
        return y


class _Decoder(NormedModule):
    """The encoder's mirror, one residual block more a level. `up` is indexed as `down` is: finest first, run last."""

    def __init__(self, p: VaeParams) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(p.latent, p.channels[-1], 3, padding=1)
        self.mid = _Middle(p.channels[-1], p.groups)
        pairs = zip((*p.channels[1:], p.channels[-1]), p.channels, strict=True)
        self.up = nn.ModuleList(
            _Level(i, o, blocks=p.blocks + 1, groups=p.groups, up=level > 0) for level, (i, o) in enumerate(pairs)
        )
        self.norm_out = nn.GroupNorm(p.groups, p.channels[0], eps=EPS)
        self.conv_out = nn.Conv2d(p.channels[0], 3, 3, padding=1)

    def forward(self, z: Float[Tensor, "b c y x"]) -> Float[Tensor, "b 3 h w"]:
        """A picture, about [-1, 1]."""
        x = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            x = level(x)
        y: Tensor = self.conv_out(self.norm_silu(self.norm_out, x))
        return y


class _Level(nn.Module):
    """Residual blocks at one resolution, then a change of it where the level has one."""

    def __init__(self, width: int, out: int, *, blocks: int, groups: int, down: bool = False, up: bool = False) -> None:
        super().__init__()
        self.block = nn.ModuleList(_Residual(width if i == 0 else out, out, groups) for i in range(blocks))
        self.downsample = Downsample(out) if down else None
        self.upsample = Upsample(out) if up else None

    def forward(self, x: Float[Tensor, "b i h w"]) -> Float[Tensor, "b o y x"]:
        """Half, the same or twice the side."""
        for block in self.block:
            x = block(x)
        if self.downsample is not None:
            x = self.downsample(x)
        if self.upsample is not None:
            x = self.upsample(x)
        return x


class _Middle(nn.Module):
    """Residual block, attention, residual block."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.block_1 = _Residual(width, width, groups)
        self.attn_1 = SpatialAttention(width, groups)
        self.block_2 = _Residual(width, width, groups)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """The same shape."""
        y: Tensor = self.block_2(self.attn_1(self.block_1(x)))
        return y


class _Residual(ResidualBlock):
    """With group norms."""

    def __init__(self, width: int, out: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, width, eps=EPS)
        self.conv1 = nn.Conv2d(width, out, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, out, eps=EPS)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(width, out, 1) if width != out else None

    @property
    def shortcut(self) -> nn.Module | None:
        return self.nin_shortcut


class SpatialAttention(nn.Module):
    """x + proj(attention(norm(x))) over all positions, one head of all channels."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, width, eps=EPS)
        self.q, self.k, self.v = (nn.Conv2d(width, width, 1) for _ in range(3))
        self.proj_out = nn.Conv2d(width, width, 1)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """The same shape."""
        normed = self.norm(x)
        q, k, v = (rearrange(f(normed), "b c h w -> b 1 (h w) c") for f in (self.q, self.k, self.v))
        out = F.scaled_dot_product_attention(q, k, v)
        y: Tensor = self.proj_out(rearrange(out, "b 1 (h w) c -> b c h w", h=x.shape[2]))
        return y.add_(x)


class Downsample(nn.Module):
    """Half the side: a zero column on the right and a zero row below, then 3x3 with stride 2 and no padding."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c y x"]:
        """Half the side."""
        y: Tensor = self.conv(F.pad(x, (0, 1, 0, 1)))
        return y


class Upsample(nn.Module):
    """Twice the side: nearest neighbour, then 3x3."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c y x"]:
        """Twice the side."""
        y: Tensor = self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return y

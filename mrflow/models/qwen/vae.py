"""The Qwen-Image autoencoder for pictures: a causal video autoencoder, whose 3-D convolutions see one frame only.

Two zero frames stand before the first, so a 3 x 3 x 3 convolution of one frame is the 3 x 3 convolution of its last
temporal slice, exactly; everything that mixes frames is skipped. 35 % of the published parameters are left. Names are
diffusers' (`AutoencoderKLQwenImage`).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from mrflow.errors import PlanError
from mrflow.models.kl import ChannelNorm, KLAutoencoder, NormedModule, ResidualBlock

# Per channel of the published latents (hub config).
MEAN = (-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
        0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921)  # fmt: skip
STD = (2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
       3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160)  # fmt: skip


@dataclass(frozen=True)
class QwenVaeParams:
    """Sizes of the autoencoder; the defaults are Qwen-Image's. `channels` are the levels' widths, finest first."""

    channels: tuple[int, ...] = (96, 192, 384, 384)
    latent: int = 16
    blocks: int = 2
    mean: tuple[float, ...] = MEAN
    std: tuple[float, ...] = STD

    def __post_init__(self) -> None:
        if len(self.mean) != self.latent or len(self.std) != self.latent or min(self.std) <= 0:
            raise PlanError(f"mean and std must have {self.latent} values, std above 0; got {self.mean}, {self.std}")

    @property
    def downscale(self) -> int:
        """Pixels per latent cell, per side."""
        return 1 << (len(self.channels) - 1)


class VaeQwen(KLAutoencoder[QwenVaeParams]):
    """Pictures in [0, 1] to latents normalised per channel, (z - mean) / std, and back."""

    def __init__(self, params: QwenVaeParams) -> None:
        super().__init__()
        self.params = params
        self.encoder, self.decoder = _Encoder(params), _Decoder(params)
        self.quant_conv = nn.Conv2d(2 * params.latent, 2 * params.latent, 1)
        self.post_quant_conv = nn.Conv2d(params.latent, params.latent, 1)

    @property
    def dtype(self) -> torch.dtype:
        return self.quant_conv.weight.dtype

    def encode_raw(self, x: Tensor) -> Tensor:
        moments: Tensor = self.quant_conv(self.encoder(x))
        return moments

    def decode_raw(self, z: Tensor) -> Tensor:
        pixels: Tensor = self.decoder(self.post_quant_conv(z))
        return pixels

    def normalise(self, z: Tensor) -> Tensor:
        return (z - self._of(self.params.mean, z)) / self._of(self.params.std, z)

    def denormalise(self, latents: Tensor) -> Tensor:
        return latents * self._of(self.params.std, latents) + self._of(self.params.mean, latents)

    @staticmethod
    def _of(values: tuple[float, ...], like: Tensor) -> Tensor:
        return torch.tensor(values, device=like.device)[:, None, None]


class _Encoder(NormedModule):
    """3 channels to mean and log-variance; `down_blocks` is one flat list, as the files count it."""

    def __init__(self, p: QwenVaeParams) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(3, p.channels[0], 3, padding=1)
        blocks: list[nn.Module] = []
        width = p.channels[0]
        for level, out in enumerate(p.channels):
            for _ in range(p.blocks):
                blocks.append(_Residual(width, out))
                width = out
            if level + 1 < len(p.channels):
                blocks.append(Resample(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(out, out, 3, stride=2)))
        self.down_blocks = nn.ModuleList(blocks)
        self.mid_block = _Middle(width)
        self.norm_out = ChannelNorm(width)
        self.conv_out = nn.Conv2d(width, 2 * p.latent, 3, padding=1)

    def forward(self, x: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b c2 y x"]:
        """Before `quant_conv`."""
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        y: Tensor = self.conv_out(self.norm_silu(self.norm_out, self.mid_block(x)))
        return y


class _Decoder(NormedModule):
    """The way back, one residual block more a level; going up halves the channels."""

    def __init__(self, p: QwenVaeParams) -> None:
        super().__init__()
        widths = tuple(reversed(p.channels))
        self.conv_in = nn.Conv2d(p.latent, widths[0], 3, padding=1)
        self.mid_block = _Middle(widths[0])
        self.up_blocks = nn.ModuleList(
            Up(before if level == 0 else before // 2, out, p.blocks + 1, up=level + 1 < len(widths))
            for level, (before, out) in enumerate(zip((widths[0], *widths[:-1]), widths, strict=True))
        )
        self.norm_out = ChannelNorm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], 3, 3, padding=1)

    def forward(self, z: Float[Tensor, "b c y x"]) -> Float[Tensor, "b 3 h w"]:
        """A picture, about [-1, 1]."""
        x = self.mid_block(self.conv_in(z))
        for block in self.up_blocks:
            x = block(x)
        y: Tensor = self.conv_out(self.norm_silu(self.norm_out, x))
        return y


class Up(nn.Module):
    """Residual blocks at one resolution, then twice the side where there is another level."""

    def __init__(self, width: int, out: int, blocks: int, *, up: bool) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(_Residual(width if i == 0 else out, out) for i in range(blocks))
        steps = [Resample(Double(), nn.Conv2d(out, out // 2, 3, padding=1))] if up else []
        self.upsamplers = nn.ModuleList(steps)

    def forward(self, x: Float[Tensor, "b i h w"]) -> Float[Tensor, "b o y x"]:
        """The same or twice the side."""
        for block in (*self.resnets, *self.upsamplers):
            x = block(x)
        return x


class Resample(nn.Module):
    """A change of resolution and a convolution."""

    def __init__(self, change: nn.Module, conv: nn.Module) -> None:
        super().__init__()
        self.resample = nn.Sequential(change, conv)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b o y x"]:
        """Half or twice the side."""
        y: Tensor = self.resample(x)
        return y


class Double(nn.Module):
    """Twice the side, nearest neighbour."""

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c y x"]:
        """Every cell four times."""
        return F.interpolate(x, scale_factor=2.0, mode="nearest-exact")


class _Residual(ResidualBlock):
    """With norms over the channels."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = ChannelNorm(width), ChannelNorm(out)
        self.conv1 = nn.Conv2d(width, out, 3, padding=1)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(width, out, 1) if width != out else None

    @property
    def shortcut(self) -> nn.Module | None:
        return self.conv_shortcut


class Attention(nn.Module):
    """x + proj(attention(norm(x))) over all positions, one head of all channels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = ChannelNorm(width)
        self.to_qkv = nn.Conv2d(width, 3 * width, 1)
        self.proj = nn.Conv2d(width, width, 1)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """The same shape."""
        q, k, v = rearrange(self.to_qkv(self.norm(x)), "b (n c) h w -> n b 1 (h w) c", n=3)
        out = F.scaled_dot_product_attention(q, k, v)
        y: Tensor = self.proj(rearrange(out, "b 1 (h w) c -> b c h w", h=x.shape[2]))
        return y.add_(x)


class _Middle(nn.Module):
    """Residual block, attention, residual block."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.resnets = nn.ModuleList((_Residual(width, width), _Residual(width, width)))
        self.attentions = nn.ModuleList((Attention(width),))

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """The same shape."""
        y: Tensor = self.resnets[1](self.attentions[0](self.resnets[0](x)))
        return y

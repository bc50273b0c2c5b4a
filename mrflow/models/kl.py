"""What autoencoders with a Gaussian posterior share (Kingma & Welling 2014, arXiv 1312.6114): both ends, and blocks."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from mrflow.errors import PlanError


class VaeSizes(Protocol):
    """Sizes of an autoencoder."""

    @property
    def downscale(self) -> int:
        """Pixels per latent cell, per side."""
        ...


P = TypeVar("P", bound=VaeSizes)
N = TypeVar("N", bound=nn.Module)


def norm_silu(norm: nn.Module, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
    """SiLU of what a norm gives. This is the definition; another function stands in on a GPU (`kernels`)."""
    return F.silu(norm(x), inplace=True)


NormSilu = Callable[[nn.Module, Tensor], Tensor]


def channels_last(net: N) -> N:
    """The same net with its convolutions' weights channels-last, which is faster on most processors."""
    for p in net.parameters():
        if p.ndim == 4:
            p.data = p.data.contiguous(memory_format=torch.channels_last)
    return net


class NormedModule(nn.Module):
    """A module in which SiLU follows norms."""

    norm_silu: NormSilu = staticmethod(norm_silu)


class ChannelNorm(nn.Module):
    """x / |x| * sqrt(channels) * gamma over the channels; the length in float32."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width, 1, 1))

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """The same shape."""
        y: Tensor = F.normalize(x.float(), dim=1).to(x.dtype) * x.shape[1] ** 0.5 * self.gamma
        return y


class KLAutoencoder(nn.Module, ABC, Generic[P]):
    """Pictures in [0, 1] to normalised latents and back; both ends are float32."""

    params: P

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """What the network computes in."""

    @abstractmethod
    def encode_raw(self, x: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b c2 y x"]:
        """Mean, then log-variance, along the channels, of pictures in [-1, 1]."""

    @abstractmethod
    def decode_raw(self, z: Float[Tensor, "b c y x"]) -> Float[Tensor, "b 3 h w"]:
        """Pictures, about [-1, 1]."""

    @abstractmethod
    def normalise(self, z: Float[Tensor, "b c y x"]) -> Float[Tensor, "b c y x"]:
        """The encoder's latents as the transformer takes them."""

    @abstractmethod
    def denormalise(self, latents: Float[Tensor, "b c y x"]) -> Float[Tensor, "b c y x"]:
        """The way back."""

    def use(self, norm_silu: NormSilu) -> None:
        """Have this function make every norm that SiLU follows."""
        for module in self.modules():
            if isinstance(module, NormedModule):
                module.norm_silu = norm_silu

    def moments(self, pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b c2 y x"]:
        """Mean and log-variance of the posterior, one after the other along the channels, float32.

        Raises:
            PlanError: a side is no multiple of the downscale.
        """
        h, w = pixels.shape[-2:]
        m = self.params.downscale
        if h % m or w % m:
            raise PlanError(f"a picture's sides must be multiples of {m} to be encoded, got {h}x{w}")
        return self.encode_raw((2 * pixels - 1).to(self.dtype)).float()

    def posterior(
        self, moments: Float[Tensor, "b c2 y x"], noise: Float[Tensor, "b c y x"] | None = None
    ) -> Float[Tensor, "b c y x"]:
        """Normalised latents: the mode, or with standard normal `noise` a sample, mean + exp(logvar / 2) noise."""
        z, logvar = moments.chunk(2, 1)
        if noise is not None:
            z = torch.addcmul(z, (0.5 * logvar.clamp(-30.0, 20.0)).exp(), noise)
        return self.normalise(z)

    def encode(
        self, pixels: Float[Tensor, "b 3 h w"], noise: Float[Tensor, "b c y x"] | None = None
    ) -> Float[Tensor, "b c y x"]:
        """The mode of the posterior, or with standard normal `noise` a sample."""
        return self.posterior(self.moments(pixels), noise)

    def decode(self, latents: Float[Tensor, "b c y x"]) -> Float[Tensor, "b 3 h w"]:
        """Pictures, about [0, 1], not clamped."""
        return 0.5 * self.decode_raw(self.denormalise(latents).to(self.dtype)).float() + 0.5


class ResidualBlock(NormedModule):
    """x + conv(silu(norm(conv(silu(norm(x)))))), with a convolution of x where the width changes."""

    norm1: nn.Module
    norm2: nn.Module
    conv1: nn.Conv2d
    conv2: nn.Conv2d

    @property
    def shortcut(self) -> nn.Module | None:
        """What x itself goes through, under the name of the family's files."""
        raise NotImplementedError

    def forward(self, x: Float[Tensor, "b i h w"]) -> Float[Tensor, "b o h w"]:
        """The same resolution."""
        y: Tensor = self.conv1(self.norm_silu(self.norm1, x))
        y = self.conv2(self.norm_silu(self.norm2, y))
        shortcut = self.shortcut
        y += x if shortcut is None else shortcut(x)
        return y

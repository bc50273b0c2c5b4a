"""The small networks round the embedded model's transformer: autoencoder, text encoder, x2 super-resolution net."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn


class Residual(nn.Module):
    """x + conv(silu(conv(x))), 3x3, norm-free."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """The same shape."""
        change: Tensor = self.conv2(F.silu(self.conv1(x)))
        return x + change


class PocketAutoencoder(nn.Module):
    """Pictures to latents at 1/8 of the side with 16 channels, and back.

    The posterior is a Gaussian of fixed standard deviation `noise` round the encoder's output (the noise it was
    trained with), so `encode` can give its mode or a sample. Latents leave normalised per channel.
    """

    def __init__(self, *, width: int = 64, deep: int = 128, channels: int = 16, noise: float = 0.1) -> None:
        super().__init__()
        self.noise = noise
        self.encoder = nn.Sequential(
            nn.PixelUnshuffle(4),
            nn.Conv2d(48, width, 3, padding=1),
            Residual(width),
            nn.PixelUnshuffle(2),
            nn.Conv2d(4 * width, deep, 1),
            Residual(deep),
            Residual(deep),
            nn.SiLU(),
            nn.Conv2d(deep, channels, 3, padding=1),
        )
        self.decoder = nn.Sequential(
            nn.Conv2d(channels, deep, 3, padding=1),
            Residual(deep),
            Residual(deep),
            Residual(deep),
            nn.Conv2d(deep, 4 * width, 1),
            nn.PixelShuffle(2),
            Residual(width),
            Residual(width),
            nn.SiLU(),
            nn.Conv2d(width, 48, 3, padding=1),
            nn.PixelShuffle(4),
        )
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("std", torch.ones(channels))
        self.mean: Tensor
        self.std: Tensor

    def encode(self, pixels: Float[Tensor, "b 3 h w"], noise: Tensor | None = None) -> Float[Tensor, "b c y x"]:
        """Normalised latents of pictures in [0, 1]: the mode, or with standard normal `noise` a posterior sample."""
        z: Tensor = self.encoder(2 * pixels - 1)
        if noise is not None:
            z = z + self.noise * noise
        return (z - self.mean[:, None, None]) / self.std[:, None, None]

    def decode(self, latents: Float[Tensor, "b c y x"]) -> Float[Tensor, "b 3 h w"]:
        """Pictures, about [0, 1], not clamped."""
        z = latents * self.std[:, None, None] + self.mean[:, None, None]
        pixels: Tensor = self.decoder(z)
        return 0.5 * pixels + 0.5


class PocketTextEncoder(nn.Module):
    """Token ids to one vector a token and one for the whole caption: a small pre-norm transformer."""

    def __init__(self, *, vocabulary: int, length: int, width: int, layers: int = 2, heads: int = 4) -> None:
        super().__init__()
        self.tokens = nn.Embedding.from_pretrained(torch.randn(vocabulary, width), freeze=False)
        self.places = nn.Parameter(torch.zeros(length, width))
        self.blocks = nn.ModuleList(TextBlock(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)

    def forward(self, ids: Int[Tensor, "b t"]) -> tuple[Float[Tensor, "b t d"], Float[Tensor, "b d"]]:
        """Per-token states and their mean."""
        x = self.tokens(ids) + self.places
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        return x, x.mean(1)


class TextBlock(nn.Module):
    """Self-attention and MLP, pre-norm."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Float[Tensor, "b t d"]) -> Float[Tensor, "b t d"]:
        """The same shape."""
        b, t, d = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, d))
        change: Tensor = self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))
        return x + change


class CompactSR(nn.Module):
    """x2 super-resolution at half the input's resolution: space-to-depth, residual blocks, depth-to-space.

    Adds its correction to a bilinear enlargement, so an untrained net is bilinear.
    """

    def __init__(self, *, width: int = 48, blocks: int = 4) -> None:
        super().__init__()
        self.head = nn.Conv2d(12, width, 3, padding=1)
        self.body = nn.Sequential(*(Residual(width) for _ in range(blocks)))
        self.tail = nn.Conv2d(width, 48, 3, padding=1)

    def forward(self, pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 y x"]:
        """Pictures of twice the side; odd sides are padded by repeating the edge, and cut again."""
        h, w = pixels.shape[-2:]
        x = F.pad(pixels, (0, w % 2, 0, h % 2), mode="replicate") if h % 2 or w % 2 else pixels
        y = F.pixel_shuffle(self.tail(F.silu(self.body(self.head(F.pixel_unshuffle(x, 2))))), 4)
        return y[..., : 2 * h, : 2 * w] + F.interpolate(pixels, scale_factor=2, mode="bilinear", align_corners=False)


def tokenise(captions: Sequence[str], vocabulary: Sequence[str], length: int) -> tuple[Tensor, list[list[str]]]:
    """Token ids of shape (captions, length) and, for each caption, the words that found no place in them.

    Id 0 is padding. A word of capitals is spelled letter by letter; articles and fillers are left out.
    """
    index = {word: i for i, word in enumerate(vocabulary)}
    ids = torch.zeros(len(captions), length, dtype=torch.long)
    lost: list[list[str]] = []
    for row, caption in enumerate(captions):
        tokens: list[str] = []
        missing: list[str] = []
        for word in caption.replace(",", " ").replace(".", " ").split():
            if word.lower() in FILLERS:
                continue
            parts = list(word) if word.isalpha() and word.isupper() else [word.lower()]
            for part in parts:
                (tokens if part in index else missing).append(part)
        missing += tokens[length:]
        ids[row, : len(tokens[:length])] = torch.tensor([index[t] for t in tokens[:length]], dtype=torch.long)
        lost.append(missing)
    return ids, lost


FILLERS = frozenset(("a", "an", "the", "at", "on", "of", "in"))

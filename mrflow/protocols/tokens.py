"""Latents as tokens and back, and fields that can be asked in tokens."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol, runtime_checkable

import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from mrflow.flow import Velocity


def pack(latents: Float[Tensor, "b c y x"], *, patch: int = 2, channels_last: bool = False) -> Float[Tensor, "b l d"]:
    """Latents to tokens, row by row; inside a token the channel is the slowest index (or the fastest), then the row."""
    if channels_last:
        return rearrange(latents, "b c (h p) (w q) -> b (h w) (p q c)", p=patch, q=patch)
    # rearrange(latents, "b c (h p) (w q) -> b (h w) (c p q)"), 2.5 times as fast on a CPU.
    return F.pixel_unshuffle(latents, patch).flatten(2).transpose(1, 2).contiguous()


def unpack(
    tokens: Float[Tensor, "b l d"], h: int, w: int, *, patch: int = 2, channels_last: bool = False
) -> Float[Tensor, "b c y x"]:
    """Tokens of an h x w grid back to latents: the inverse of `pack`."""
    order = "b (h w) (p q c) -> b c (h p) (w q)" if channels_last else "b (h w) (c p q) -> b c (h p) (w q)"
    return rearrange(tokens, order, h=h, w=w, p=patch, q=patch)


@dataclass(frozen=True)
class TokenVelocity:
    """The velocities of packed latents, `ask(tokens, sigma)`, for h x w tokens of `patch` x `patch` latent cells."""

    ask: Velocity
    h: int
    w: int
    patch: int = 2
    channels_last: bool = False

    def __call__(self, tokens: Float[Tensor, "b l d"], sigma: float) -> Float[Tensor, "m l d"]:
        """As a field of latents, in tokens."""
        return self.ask(tokens, sigma)

    def pack(self, latents: Float[Tensor, "b c y x"]) -> Float[Tensor, "b l d"]:
        """Latents as it takes them."""
        return pack(latents, patch=self.patch, channels_last=self.channels_last)

    def unpack(self, tokens: Float[Tensor, "b l d"]) -> Float[Tensor, "b c y x"]:
        """The inverse of `pack`."""
        return unpack(tokens, self.h, self.w, patch=self.patch, channels_last=self.channels_last)

    def around(self, field: Velocity) -> Velocity:
        """A field of latents that is asked in these tokens, packed and unpacked each time."""
        return lambda tokens, sigma: self.pack(field(self.unpack(tokens), sigma))


@runtime_checkable
class TokenField(Protocol):
    """A velocity field that can work on packed latents, so that an integration packs once and not in every step."""

    def __call__(self, x: Tensor, sigma: float, /) -> Tensor:
        """Velocities of latents (b, c, height, width)."""
        ...

    def on_tokens(self, height: int, width: int) -> TokenVelocity | None:
        """The same velocities, to the bit, for packed latents of height x width cells; None where it cannot."""
        ...


def on_tokens(field: Velocity, height: int, width: int) -> TokenVelocity | None:
    """A field's velocities for packed latents of height x width cells; None where it has none."""
    return field.on_tokens(height, width) if isinstance(field, TokenField) else None


class PackedField(ABC):
    """The field of a network that takes tokens; a subclass says their velocities."""

    patch: int = 2
    channels_last: bool = False

    @abstractmethod
    def velocity(self, tokens: Tensor, sigma: float, h: int, w: int) -> Tensor:
        """The float32 velocities of packed latents, h x w tokens (b, h w, d)."""

    def __call__(self, x: Tensor, sigma: float) -> Tensor:
        """Velocities of latents (b, c, height, width), float32."""
        tokens = self.on_tokens(*x.shape[2:])
        return tokens.unpack(tokens(tokens.pack(x), sigma))

    def on_tokens(self, height: int, width: int) -> TokenVelocity:
        """As `TokenField`."""
        h, w = height // self.patch, width // self.patch
        return TokenVelocity(partial(self.velocity, h=h, w=w), h, w, self.patch, self.channels_last)


class PackedCall(PackedField):
    """A field by a function of tokens, sigma, and how many tokens are down and across."""

    def __init__(self, ask: Callable[[Tensor, float, int, int], Tensor], *, patch: int = 2) -> None:
        self.ask, self.patch = ask, patch

    def velocity(self, tokens: Tensor, sigma: float, h: int, w: int) -> Tensor:
        """What the function gives."""
        return self.ask(tokens, sigma, h, w)


@dataclass(frozen=True)
class CombinedField:
    """A field made of others by `combine`, in latents or, where all of them can, in tokens alike.

    `combine` is given the fields' velocities and gives its own. It treats every picture as a whole, or each of its
    values by itself: its tensors are (b, c, height, width) or (b, tokens, width).
    """

    combine: Callable[..., Velocity]
    fields: tuple[Velocity, ...]

    def __call__(self, x: Tensor, sigma: float) -> Tensor:
        """Velocities of latents (b, c, height, width)."""
        return self.combine(*self.fields)(x, sigma)

    def on_tokens(self, height: int, width: int) -> TokenVelocity | None:
        """As `TokenField`."""
        inner = [found for field in self.fields if (found := on_tokens(field, height, width)) is not None]
        if len(inner) < len(self.fields):
            return None
        return replace(inner[0], ask=self.combine(*(each.ask for each in inner)))

"""SeaCache: skip while the network's input, freed of the noise that the level accounts for, has changed little."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import ceil
from typing import Annotated, Literal, get_args

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from mrflow._checks import Bound, check_number, check_whole, require
from mrflow.caches.base import Cache, difference, interpolate
from mrflow.caches.clock import Evaluation, Rule
from mrflow.caches.extrapolate import Extrapolation
from mrflow.model_info import ModelInfo

Seen = Literal["input", "latents"]

# Speed-up claimed for FLUX.1-dev at 50 steps, by threshold: sglang#36471 (6572 to 2859 ms at 28.96 dB).
CLAIMED = ((0.0, 1.0), (0.3, 2.3))


@dataclass(frozen=True)
class SeaCache(Cache):
    """SeaCache (Chung et al. 2026, arXiv 2602.18993): reuse what all blocks added while a sum of changes of the
    filtered input is below `threshold`. Nothing is fitted to the model.

    The filter keeps, of each frequency, the share that is signal at this level (`wiener`), under the assumption that
    a picture's power falls as 1/|f|^power along each axis. The change is relative L1 since the evaluation before. The
    first `first` and last `last` evaluations are computed, and one after `limit` cached in a row (None: no limit).

    The defaults are those of images: `of="input"` filters the modulated input of the first block, power 2, plain reuse.
    diffusers' own hook (0.42.1), whose defaults are for video, filters the noisy latents:
    `SeaCache(0.25, of="latents", power=3.0, order=1, limit=2)`. `order` above 0 extrapolates over steps.
    """

    threshold: Annotated[float, Bound(check_number, 0)] = 0.3
    of: Seen = field(default="input", kw_only=True)
    power: Annotated[float, Bound(check_number, 0)] = field(default=2.0, kw_only=True)
    order: int = field(default=0, kw_only=True)
    first: Annotated[int, Bound(check_whole, 0)] = field(default=1, kw_only=True)
    last: Annotated[int, Bound(check_whole, 0)] = field(default=1, kw_only=True)
    limit: Annotated[int | None, Bound(check_whole, 1)] = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.of in get_args(Seen), "of", f"one of {', '.join(get_args(Seen))}", self.of)
        self.extrapolation()

    def extrapolation(self) -> Extrapolation:
        """Of what all blocks added."""
        return Extrapolation(self.order)

    def rule(self, info: ModelInfo, sigmas: Sequence[float]) -> Rule:
        """The accumulated change."""
        total, row, before = 0.0, 0, list[Tensor]()

        def due(look: Evaluation) -> bool:
            nonlocal total, row
            if self.threshold == 0:
                return True
            seen = wiener(self._latents(look), look.sigma, self.power)
            near = bool(before) and look.place >= self.first and not 0 < look.total <= look.place + self.last
            if near and (self.limit is None or row < self.limit):
                total += difference(seen, before[0])
                computed = not total < self.threshold
            else:
                computed = True
            before[:] = [seen]
            total, row = (0.0, 0) if computed else (total, row + 1)
            return computed

        return due

    def _latents(self, look: Evaluation) -> Tensor:
        """What is filtered: (channels, height, width)."""
        if self.of == "latents":
            return look.latents()[0]
        modulated = look.modulated_input()
        assert look.grid is not None
        return rearrange(modulated[0], "(h w) c -> c h w", h=look.grid[0])

    def estimate(self, evaluations: int) -> int:
        """From the one published speed-up, no more than `limit` allows; the two ends are always computed."""
        ends = min(evaluations, max(1, self.first) + self.last)
        least = ceil(evaluations / (1 + self.limit)) if self.limit is not None else 0
        return max(ends, least, round(evaluations / interpolate(CLAIMED, self.threshold)))


def wiener(x: Float[Tensor, "c h w"], sigma: float, power: float) -> Float[Tensor, "c h w"]:
    """The signal's estimate by a Wiener filter for x = (1 - sigma) signal + sigma noise, in float32.

    Along an axis with frequencies f the signal's power is 1 / |f|^power, so the gain is
    (1 - sigma) S / ((1 - sigma)^2 S + sigma^2); the gains of both axes are multiplied and divided by their mean
    (arXiv 2602.18993, equation 7).
    """
    sigma = min(max(sigma, 1e-6), 1 - 1e-6)
    gain = torch.ones((), device=x.device)
    for axis in (-2, -1):
        f = torch.fft.fftfreq(x.shape[axis], device=x.device)
        signal = 1 / (f.abs() ** power + 1e-16)
        along = (1 - sigma) * signal / ((1 - sigma) ** 2 * signal + sigma**2)
        gain = gain * (along[:, None] if axis == -2 else along)
    out: Tensor = torch.fft.ifft2(torch.fft.fft2(x.float()) * (gain / gain.mean())).real
    return out

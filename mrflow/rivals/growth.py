"""Noisy latents to more noisy latents, in the frequency domain."""

import math
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from mrflow._checks import is_number, require
from mrflow.errors import PlanError
from mrflow.model_info import ModelInfo
from mrflow.noise import Noise, PerItem
from mrflow.schedules import shift_static
from mrflow.spec import Latents, State
from mrflow.stage import Context, Stage
from mrflow.stages.decode import check_space
from mrflow.stages.lift import lifted_spec


@dataclass(frozen=True)
class Grow(Stage[Latents, Latents]):
    """SPEED's growth (arXiv 2605.18736): the picture's frequencies stay, new ones are filled with noise.

    The orthonormal DCT of the latents becomes the low corner of a larger one, whose rest is noise of level sigma; all
    is multiplied by kappa = r / (1 + (r - 1) sigma) for a ratio r of the sides. The embedding divides a smooth
    picture's amplitude by r and leaves noise as it is, so what comes out is on the flow's line again, at the level
    sigma' = kappa sigma: signal 1 - sigma', noise variance sigma'^2. In float32, whatever the model computes in.

    `size` is a picture size, (height, width) in pixels (default: twice the sides).
    """

    scope: ClassVar[str] = "Grow"
    size: tuple[int, int] | None = None
    noise: Noise = field(default=PerItem(), kw_only=True)

    def plan(self, spec: Latents, model: ModelInfo) -> Latents:
        """Latents of `size` at the level sigma'."""
        check_space(spec, model)
        large = lifted_spec(spec, self.size, model)
        return replace(large, sigma=shift_static(spec.sigma, large.height / spec.height))

    def apply(self, state: State[Latents], out: Latents, ctx: Context) -> Tensor:
        """Grow."""
        noise = ctx.noise(out.shape, source=self.noise)
        return grow(state.data, noise, state.spec.sigma)


def grow(x: Float[Tensor, "b c h w"], noise: Float[Tensor, "b c y x"], sigma: float) -> Float[Tensor, "b c y x"]:
    """`x` at noise level `sigma` on the larger grid of `noise` (standard normal), at level W_r(sigma)."""
    h, w = x.shape[-2:]
    height, width = noise.shape[-2:]
    ratio = math.sqrt(height * width / (h * w))
    kappa = ratio / (1 + (ratio - 1) * sigma)
    small = dct_matrix(h, x.device) @ x @ dct_matrix(w, x.device).T
    whole = sigma * noise  # the coefficients of white noise are white noise
    whole[..., :h, :w] = small
    out: Tensor = kappa * (dct_matrix(height, x.device).T @ whole @ dct_matrix(width, x.device))
    return out


@lru_cache(maxsize=32)
def dct_matrix(n: int, device: torch.device | None = None) -> Float[Tensor, "n n"]:
    """The orthonormal DCT-II: row k is sqrt(2 / n) cos(pi (2 i + 1) k / 2n), the first one sqrt(1 / n)."""
    i = torch.arange(n, dtype=torch.float64)
    rows = torch.cos(torch.pi * (2 * i + 1) * i[:, None] / (2 * n)) * (2 / n) ** 0.5
    rows[0] /= 2**0.5
    out: Tensor = rows.float().to(device)
    return out


@dataclass(frozen=True)
class PowerSpectrum:
    """The power spectrum A w^-beta of a model's clean latents, w in cycles per picture side.

    Published by SPEED (arXiv 2605.18736) for FLUX.1; ports use these numbers for Qwen-Image too, for lack of others.
    """

    amplitude: float = 203.615097
    beta: float = 1.915461

    def __post_init__(self) -> None:
        for name, value in (("amplitude", self.amplitude), ("beta", self.beta)):
            require(is_number(value) and value > 0, name, "above 0", value)

    def leave(self, frequency: float, delta: float) -> float:
        """The noise level below which a stage that holds frequencies up to this one should not go on.

        1 / (1 + sqrt(delta / (P (1 + P - delta)))) with P = A w^-beta: there the next frequencies begin to show.
        """
        if not 0 < delta < 1 or not frequency > 0:
            raise PlanError(f"delta must be in (0, 1) and frequency above 0, got {delta!r} and {frequency!r}")
        power = self.amplitude * frequency**-self.beta
        return 1 / (1 + math.sqrt(delta / (power * (1 + power - delta))))

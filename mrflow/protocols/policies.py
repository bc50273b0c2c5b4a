"""pi-Flow's policies: velocities in closed form, valid for a whole interval after one evaluation of the network.

Between two evaluations the flow is integrated in many small steps that ask the policy only (Chen et al. 2025, arXiv
2510.14974). All arithmetic is float32: some terms are differences of numbers of size 1 / sigma^2. With alpha = 1 -
sigma, a clean latent's distribution given (x, sigma) is what a policy describes.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from mrflow.errors import PlanError
from mrflow.flow import Velocity
from mrflow.schedules import shift_static

SMALLEST = 1e-6  # sigma is not divided by less


@runtime_checkable
class Policy(Protocol):
    """A velocity in closed form."""

    def __call__(self, x: Tensor, sigma: float) -> Tensor:
        """The velocity at (x, sigma)."""
        ...

    def denoised(self, x: Tensor, sigma: float) -> Tensor:
        """The clean latent that is aimed at from there."""
        ...


@runtime_checkable
class PolicyField(Protocol):
    """A field whose network gives policies: what a model's `field` is when its options name a pi-Flow adapter."""

    @property
    def shift(self) -> float:
        """The static shift between a policy's time and the noise level."""
        ...

    def policy(self, x: Tensor, sigma: float) -> Policy:
        """Ask the network: the policy that holds from (x, sigma) on."""
        ...

    def __call__(self, x: Tensor, sigma: float) -> Tensor:
        """The velocity where the network is asked."""
        ...


@dataclass(frozen=True, eq=False)
class GM:
    """A mixture of K Gaussians over the clean latent, updated by Bayes' rule as the noise falls (GMFlow).

    `means` are velocities at the source (x_s, sigma_s): component k has mean mu_k = x_s - sigma_s means_k and, for all
    alike, variance v = exp(2 logstd) sigma_s^2. At (x, sigma), with

        zeta = (alpha / sigma)^2 - (alpha_s / sigma_s)^2,  nu = alpha x / sigma^2 - alpha_s x_s / sigma_s^2,

    component k has mean m_k = (v nu + mu_k) / (v zeta + 1) and log-weight log w_k + sum over channels of mu_k (nu -
    zeta mu_k / 2) / (v zeta + 1), up to a constant: the ratio of the likelihoods at the two places. The velocity is
    (x - sum_k w_k m_k) / sigma.
    """

    means: Float[Tensor, "b k c h w"]
    logweights: Float[Tensor, "b k 1 h w"]
    logstd: Float[Tensor, "b 1 1 1 1"]
    x_s: Float[Tensor, "b c h w"]
    sigma_s: float

    def with_temperature(self, temperature: float) -> "GM":
        """A narrower mixture: weights to the power 1 / T, renormalised, and variance times T."""
        if temperature == 1.0:
            return self
        t = max(temperature, SMALLEST)
        weights = (self.logweights / t).log_softmax(1)
        return GM(self.means, weights, self.logstd + math.log(t) / 2, self.x_s, self.sigma_s)

    @cached_property
    def centres(self) -> Float[Tensor, "b k c h w"]:
        """mu_k."""
        return self.x_s[:, None] - self.sigma_s * self.means

    @cached_property
    def squares(self) -> Float[Tensor, "b k 1 h w"]:
        """The sum over channels of mu_k^2."""
        return self.centres.square().sum(2, keepdim=True)

    def __call__(self, x: Float[Tensor, "b c h w"], sigma: float) -> Float[Tensor, "b c h w"]:
        """The velocity at (x, sigma), sigma at most the source's."""
        return (x - self.denoised(x, sigma)) / max(sigma, SMALLEST)

    def denoised(self, x: Float[Tensor, "b c h w"], sigma: float) -> Float[Tensor, "b c h w"]:
        """The mixture's mean clean latent, given x at sigma."""
        s, s0, mu = max(sigma, SMALLEST), max(self.sigma_s, SMALLEST), self.centres
        variance = (2 * self.logstd).exp() * s0**2
        zeta = ((1 - sigma) / s) ** 2 - ((1 - self.sigma_s) / s0) ** 2
        nu = ((1 - sigma) / s**2 * x - (1 - self.sigma_s) / s0**2 * self.x_s)[:, None]
        scale = variance * zeta + 1
        gain = ((mu * nu).sum(2, keepdim=True) - 0.5 * zeta * self.squares) / scale
        weights = (self.logweights + gain).softmax(1)
        return (weights * ((variance * nu + mu) / scale)).sum(1)


@dataclass(frozen=True, eq=False)
class DX:
    """Clean latents at N points of the interval, interpolated ("grid"), or the coefficients of a polynomial.

    `outputs` are velocities at the source: x0_i = x_s - sigma_s outputs_i. Time is r, with sigma = W_shift(r). On a
    grid point i lies at r_d + i (r_s - r_d) / (N - 1), r_d = max(r_s - segment, 0); a polynomial is the sum of
    (r_s - r)^i x0_i.
    """

    outputs: Float[Tensor, "b n c h w"]
    x_s: Float[Tensor, "b c h w"]
    sigma_s: float
    shift: float
    segment: float
    polynomial: bool = False

    def __call__(self, x: Float[Tensor, "b c h w"], sigma: float) -> Float[Tensor, "b c h w"]:
        """The velocity at (x, sigma)."""
        return (x - self.denoised(x, sigma)) / max(sigma, SMALLEST)

    def denoised(self, x: Float[Tensor, "b c h w"], sigma: float) -> Float[Tensor, "b c h w"]:
        """The clean latent that is aimed at, wherever x is."""
        source, now = raw(self.sigma_s, self.shift), raw(sigma, self.shift)
        count = self.outputs.shape[1]
        if self.polynomial:
            weights = [(source - now) ** i for i in range(count)]
        elif count == 1:
            weights = [1.0]
        else:
            end = max(source - self.segment, 0.0)
            at = min(max((now - end) / max(source - end, SMALLEST), 0.0), 1.0) * (count - 1)
            weights = [max(0.0, 1.0 - abs(at - i)) for i in range(count)]
        row = torch.tensor(weights, dtype=torch.float32, device=self.x_s.device).view(1, -1, 1, 1, 1)
        return sum(weights) * self.x_s - self.sigma_s * (row * self.outputs).sum(1)


def raw(sigma: float, shift: float) -> float:
    """The time r of a noise level: sigma = W_shift(r)."""
    return shift_static(sigma, 1 / shift)


def substeps(sigma: float, to: float, *, shift: float, total: int = 128) -> int:
    """Steps of equal length in r between two levels: `total` would lead from 1 to 0, at least one."""
    return max(1, math.ceil((raw(sigma, shift) - raw(to, shift)) * total - 1e-6))


def follow(policy: Velocity, x: Tensor, sigma: float, to: float, *, shift: float, total: int = 128) -> Tensor:
    """The state at `to`, by Euler steps along a policy from `x` at `sigma`.

    Raises:
        PlanError: the levels do not fall.
    """
    if not 0 <= to < sigma <= 1:
        raise PlanError(f"a policy leads down, got {sigma!r} -> {to!r}")
    count = substeps(sigma, to, shift=shift, total=total)
    start, end = raw(sigma, shift), raw(to, shift)
    sigmas = [shift_static(start + (end - start) * i / count, shift) for i in range(1, count)]
    for now, after in zip((sigma, *sigmas), (*sigmas, to), strict=True):
        x = x + (after - now) * policy(x, now)
    return x


def automatic(steps: int) -> float:
    """pi-Flow's temperature for a number of evaluations: 0.1 (n - 1), between 0 and 1."""
    return min(1.0, max(0.0, 0.1 * (steps - 1)))

"""The convention, said once. Everything else calls this file.

The noise level is `sigma`: 1 is noise, 0 is clean. A rectified flow (Liu et al. 2022, arXiv 2209.03003; Lipman et al.
2022, arXiv 2210.02747) joins data x0 and noise eps by a straight line,

    x = (1 - sigma) x0 + sigma eps,        velocity = dx / dsigma = eps - x0,

so that x0 = x - sigma velocity and eps = x + (1 - sigma) velocity. Every function here is pure and works at any shape.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from mrflow.errors import PlanError

Velocity = Callable[[Tensor, float], Tensor]
"""A velocity field: (x, sigma) -> dx/dsigma, of the shape of x."""


def renoise(x0: Tensor, eps: Tensor, sigma: float) -> Tensor:
    """The point at `sigma` on the line from clean `x0` to noise `eps`: (1 - sigma) x0 + sigma eps."""
    return (1.0 - sigma) * x0 + sigma * eps


def denoised(x: Tensor, velocity: Tensor, sigma: float) -> Tensor:
    """The clean estimate x0 = x - sigma velocity."""
    return x - sigma * velocity


def to_noise(x: Tensor, velocity: Tensor, sigma: float) -> Tensor:
    """The noise estimate eps = x + (1 - sigma) velocity."""
    return x + (1.0 - sigma) * velocity


def raise_noise(x: Tensor, eps: Tensor, sigma: float, to: float) -> Tensor:
    """Move `x` from `sigma` up to `to` with fresh noise, keeping the marginal of the flow.

    x' = a x + b eps with a = (1 - to) / (1 - sigma), b^2 = to^2 - a^2 sigma^2: signal factor 1 - to, noise variance
    to^2 (Restart sampling, arXiv 2306.14878, in flow form). Needs 0 <= sigma <= to <= 1 and sigma < 1.
    """
    if not (0.0 <= sigma <= to <= 1.0) or sigma == 1.0:
        raise PlanError(f"noise can only be raised, from sigma below 1 to at most 1, got {sigma!r} -> {to!r}")
    scale = (1.0 - to) / (1.0 - sigma)
    return scale * x + math.sqrt(to**2 - (scale * sigma) ** 2) * eps


def double(x: Tensor) -> Tensor:
    """`x` in float64: where it is, or on the CPU where its device (MPS) has no float64."""
    return (x.cpu() if x.device.type == "mps" else x).double()


def finite(x: Tensor) -> bool:
    """Whether every number is finite: the sum tells at once; where it does not (it may overflow), all are looked at."""
    return math.isfinite(float(x.sum())) or bool(torch.isfinite(x).all())

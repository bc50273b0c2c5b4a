"""Numbers about pictures, as plain functions: one value for each item of a batch."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mrflow.errors import PlanError

if TYPE_CHECKING:
    from mrflow.backbone import Backbone


def round_trip_energy(model: "Backbone", latents: Tensor) -> Tensor:
    """How far latents (b, c, h, w) are from any picture's: the mean of (encode(decode(z)) - z) squared, shape (b).

    0 and up, lower is nearer; the encoder's mode. A lift whose energy is many times that of sampled latents has left
    the autoencoder's manifold (SelfLift-zero, arXiv 2609.02036, measures 1.4 for a lift over pixels and 19 for nearest
    latents, in units of native latents').
    """
    with torch.inference_mode():
        return (model.encode(model.decode(latents)) - latents).square().mean((1, 2, 3))


def psnr(pixels: Tensor, reference: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of pictures (b, 3, h, w) in [0, 1], shape (b); infinite for equal ones.

    Raises:
        PlanError: the shapes differ.
    """
    _same(pixels, reference)
    return -10 * (pixels.double() - reference.double()).square().mean((1, 2, 3)).log10().float()


def sharpness(pixels: Tensor) -> Tensor:
    """Variance of the Laplacian (4 neighbours) of the luma of pictures (b, 3, h, w) in [0, 1], shape (b).

    Higher is sharper, or noisier. Luma is 0.299 R + 0.587 G + 0.114 B (ITU-R BT.601).
    """
    luma = (pixels * pixels.new_tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1)
    inner = luma[:, 1:-1, 1:-1]
    around = luma[:, :-2, 1:-1] + luma[:, 2:, 1:-1] + luma[:, 1:-1, :-2] + luma[:, 1:-1, 2:]
    return (around - 4 * inner).var((1, 2), correction=0)


def _same(a: Tensor, b: Tensor) -> None:
    if a.shape != b.shape:
        raise PlanError(f"two pictures to compare must have one shape, got {tuple(a.shape)} and {tuple(b.shape)}")

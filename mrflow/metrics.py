"""Numbers about pictures, as plain functions: one value for each item of a batch."""

import torch
from torch import Tensor

from mrflow.backbone import Backbone
from mrflow.errors import PlanError
from mrflow.flow import double


def round_trip_energy(model: Backbone, latents: Tensor) -> Tensor:
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
    return -10 * (double(pixels) - double(reference)).square().mean((1, 2, 3)).log10().float()


def ssim(pixels: Tensor, reference: Tensor) -> Tensor:
    """Structural similarity of pictures (b, 3, h, w) in [0, 1], shape (b); at most 1, which equal pictures reach.

    Gaussian windows of 11 x 11 and standard deviation 1.5, K1 = 0.01, K2 = 0.03, over whole windows, the mean of the
    channels (Wang et al. 2004, IEEE TIP 13(4), equation 13).

    Raises:
        PlanError: the shapes differ, or a side is below 11 pixels.
    """
    _same(pixels, reference)
    if min(pixels.shape[-2:]) < 11:
        raise PlanError(f"SSIM needs sides of at least 11 pixels, got {tuple(pixels.shape[-2:])}")
    at = torch.arange(11, dtype=torch.float64) - 5
    window = torch.exp(-(at**2) / (2 * 1.5**2))
    x, y = double(pixels), double(reference)
    window = (window / window.sum()).to(x.device)

    def mean(x: Tensor) -> Tensor:
        flat = x.reshape(-1, 1, *x.shape[-2:])
        rows = torch.nn.functional.conv2d(flat, window.view(1, 1, 11, 1))
        return torch.nn.functional.conv2d(rows, window.view(1, 1, 1, 11)).view(*x.shape[:2], rows.shape[-2], -1)

    mx, my = mean(x), mean(y)
    vx, vy, both = mean(x * x) - mx * mx, mean(y * y) - my * my, mean(x * y) - mx * my
    c1, c2 = 0.01**2, 0.03**2
    like = (2 * mx * my + c1) * (2 * both + c2) / ((mx * mx + my * my + c1) * (vx + vy + c2))
    return like.mean((1, 2, 3)).float()


def power_ratio(pixels: Tensor, reference: Tensor, *, bands: int = 4) -> Tensor:
    """Power of the luma of pictures (b, 3, h, w) over a reference's in rings of spatial frequency, shape (b, bands).

    Ring i holds frequencies from i / (2 bands) to (i + 1) / (2 bands) cycles a pixel; the constant part is left out,
    and corners beyond 1/2. 1: as much detail; below: it was lost; above: noise or ringing. A floor of 1e-8 of the total
    keeps plain pictures finite.

    Raises:
        PlanError: the shapes differ.
    """
    _same(pixels, reference)

    def rings(x: Tensor) -> Tensor:
        x = double(x)
        luma = (x * x.new_tensor([0.299, 0.587, 0.114]).float().view(3, 1, 1)).sum(1)
        power = torch.fft.fft2(luma - luma.mean((1, 2), keepdim=True)).abs().square()
        h, w = luma.shape[-2:]
        rows, columns = torch.fft.fftfreq(h, device=x.device), torch.fft.fftfreq(w, device=x.device)
        radius = (rows[:, None] ** 2 + columns**2).sqrt()
        ring = (radius * 2 * bands).floor().long()
        sums = [(power * (ring == i)).sum((1, 2)) for i in range(bands)]
        return torch.stack(sums, 1) + 1e-8 * (h * w) ** 2

    return (rings(pixels) / rings(reference)).float()


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

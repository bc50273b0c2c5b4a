"""Can a tiny autoencoder (1/8 of the side, 16 channels) carry letters and faces, in latents that are easy to model?

Loss: L1 + L2 + gradient L1, a pull of the latents to mean 0 and variance 1, noise of standard deviation 0.1 on them,
and scale equivariance: the decoded 2x-averaged latents should be the 2x-averaged picture, which ties both resolutions.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from experiments.train_pocket.data import grid, pictures, unit
from experiments.train_pocket.loop import Loop, Run, cosine, finished, log
from mrflow.metrics import psnr
from mrflow.models.kl import channels_last
from mrflow.models.pocket.networks import PocketAutoencoder
from mrflow.scenes.grammar import FULL, World
from mrflow.scenes.hard import HardWorld

State = dict[str, Tensor]
CROP = 128  # of the side
SEEN = {128: 6000, 256: 2400}  # pictures of each size
HELD = 100  # to measure with


def gradient_l1(a: Tensor, b: Tensor) -> Tensor:
    """L1 between the horizontal and vertical differences of two pictures."""
    d = a - b
    return d.diff(dim=-1).abs().mean() + d.diff(dim=-2).abs().mean()


def distance(a: Tensor, b: Tensor) -> Tensor:
    """The reconstruction loss."""
    d = a - b
    return d.abs().mean() + 2 * d.square().mean() + 0.5 * gradient_l1(a, b)


def loaded(state: State, device: torch.device) -> PocketAutoencoder:
    """A trained autoencoder, ready to use."""
    net = PocketAutoencoder()
    net.load_state_dict(state)
    return net.to(device).eval()


def round_trip(net: PocketAutoencoder, x: Tensor) -> Tensor:
    """Pictures in [0, 1] encoded and decoded, in small batches; on the processor."""
    device = net.mean.device
    return torch.cat([net.decode(net.encode(part.to(device))).clamp(0, 1).cpu() for part in x.split(20)])


def sights(run: Run, world: World | HardWorld, seen: Mapping[int, int]) -> list[Tensor]:
    """The pictures of each size that it learns from."""
    images: list[Tensor] = []
    for i, (size, number) in enumerate(seen.items()):
        parts = ((world, 5 * number // 6, 2 * i + 1), (FULL, number // 6, 2 * i + 2))
        images.append(torch.cat([pictures(w, run.count(n), size, seed, pool=run.pool)[0] for w, n, seed in parts]))
        log.info("rendered %d pictures at %d px", len(images[-1]), size)
    return images


def train(
    run: Run,
    name: str,
    world: World | HardWorld,
    steps: int,
    start: State | None = None,
    *,
    seen: Mapping[int, int] = SEEN,
    crops: int = 3,
    noise: float = 0.1,
    equivariance: float = 0.25,
    rate: float = 1.5e-3,
    images: Sequence[Tensor] | None = None,
) -> State:
    """The autoencoder's weights, trained on `world` and a sixth of the full one; from `start`, or from nothing.

    A batch holds so many `crops` of 128 pixels of each size in `seen`, the smallest of which is that size itself.
    `noise` is the deviation of the noise on the latents, `equivariance` the weight of that part of the loss, `rate` the
    highest rate. `images` are the `sights`, where they were made before.
    """
    if (done := finished(run, name)) is not None:
        return done
    count, device = run.count, run.device
    images = sights(run, world, seen) if images is None else images
    images = [part.to(device) for part in images] if device.type == "cuda" else images
    torch.manual_seed(0)
    net = PocketAutoencoder(noise=noise)
    if start is not None:
        net.load_state_dict(start)
    net = channels_last(net.to(device))
    optimiser = torch.optim.AdamW(net.parameters(), lr=rate, weight_decay=0.01, betas=(0.9, 0.99))
    held = unit(pictures(world, 6, CROP, 99)[0]).to(device)

    def draw() -> Image.Image:
        return grid([held, net.decode(net.encode(held))])

    weights, crops = dict(net.named_parameters()), run.items(crops)
    loop = Loop(name, run, weights, [optimiser], count(steps), factor=cosine, draw=draw)
    for _ in loop:
        x = torch.cat([cropped(part, crops) for part in images])
        x = unit(x.to(device)).contiguous(memory_format=torch.channels_last)
        with run.autocast():
            z = net.encoder(2 * x - 1).float()
            seen_as = net.decode(z + net.noise * torch.randn_like(z)).float()
            pooled = net.decode(F.avg_pool2d(z[crops:], 2)).float() if equivariance else None
        mean, var = z.mean((0, 2, 3)), z.var((0, 2, 3))
        loss = distance(seen_as, x)
        if pooled is not None:
            loss = loss + equivariance * distance(pooled, F.avg_pool2d(x[crops:], 2))
        loop.learn(loss + 0.01 * (mean.square().mean() + (var - 1).square().mean()), items=len(x))
    with loop.averaged():
        parts = images[0][: count(2000)].split(50)
        z = torch.cat([net.encoder(2 * unit(part.to(device)) - 1) for part in parts])
        net.mean.copy_(z.mean((0, 2, 3)))
        net.std.copy_(z.std((0, 2, 3)))
        for size in seen:
            x = unit(pictures(world, count(HELD), size, 99, pool=run.pool)[0])
            log.info("%s: %.2f dB at %d px", name, psnr(round_trip(net, x), x).mean(), size)
    return loop.finish({"mean": net.mean, "std": net.std})


def cropped(images: Tensor, crops: int) -> Tensor:
    """So many of the pictures, cut at one place, whose sides are multiples of 8."""
    i, j = (8 * int(v) for v in torch.randint(0, (images.shape[-1] - CROP) // 8 + 1, (2,)))
    pick = torch.randint(len(images), (crops,)).to(images.device)
    return images[pick, :, i : i + CROP, j : j + CROP]

"""Can a tiny autoencoder (1/8 of the side, 16 channels) carry letters and faces, in latents that are easy to model?

Loss: L1 + L2 + gradient L1, a pull of the latents to mean 0 and variance 1, noise of standard deviation 0.1 on them,
and scale equivariance: the decoded 2x-averaged latents should be the 2x-averaged picture, which ties both resolutions.
"""

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from experiments.train_pocket.data import grid, pictures, unit
from experiments.train_pocket.loop import Loop, Run, cosine, finished, log
from mrflow.metrics import psnr
from mrflow.models.pocket.model import channels_last
from mrflow.models.pocket.networks import Autoencoder
from mrflow.scenes.grammar import FULL, World

State = dict[str, Tensor]
CROPS = 3  # of pictures of each size in a batch


def gradient_l1(a: Tensor, b: Tensor) -> Tensor:
    """L1 between the horizontal and vertical differences of two pictures."""
    d = a - b
    return d.diff(dim=-1).abs().mean() + d.diff(dim=-2).abs().mean()


def distance(a: Tensor, b: Tensor) -> Tensor:
    """The reconstruction loss."""
    d = a - b
    return d.abs().mean() + 2 * d.square().mean() + 0.5 * gradient_l1(a, b)


def loaded(state: State, device: torch.device) -> Autoencoder:
    """A trained autoencoder, ready to use."""
    net = Autoencoder()
    net.load_state_dict(state)
    return net.to(device).eval()


def round_trip(net: Autoencoder, x: Tensor) -> Tensor:
    """Pictures in [0, 1] encoded and decoded, in small batches; on the processor."""
    device = net.mean.device
    return torch.cat([net.decode(net.encode(part.to(device))).clamp(0, 1).cpu() for part in x.split(20)])


def train(
    run: Run,
    name: str,
    world: World,
    steps: int,
    start: State | None = None,
    *,
    noise: float = 0.1,
    equivariance: float = 0.25,
) -> State:
    """The autoencoder's weights, trained on `world` and a sixth of the full one; from `start`, or from nothing.

    `noise` is the deviation of the noise on the latents, `equivariance` the weight of that part of the loss.
    """
    if (done := finished(run, name)) is not None:
        return done
    count, device = run.count, run.device
    small = torch.cat([pictures(world, count(5000), 128, 1)[0], pictures(FULL, count(1000), 128, 2)[0]])
    large = torch.cat([pictures(world, count(2000), 256, 3)[0], pictures(FULL, count(400), 256, 4)[0]])
    log.info("rendered %d + %d pictures", len(small), len(large))
    torch.manual_seed(0)
    net = Autoencoder(noise=noise)
    if start is not None:
        net.load_state_dict(start)
    net = channels_last(net.to(device))
    optimiser = torch.optim.AdamW(net.parameters(), lr=1.5e-3, weight_decay=0.01, betas=(0.9, 0.99))
    held = unit(pictures(world, 6, 128, 99)[0]).to(device)

    def draw() -> Image.Image:
        return grid([held, net.decode(net.encode(held))])

    weights, crops = dict(net.named_parameters()), CROPS * run.batch
    loop = Loop(name, run, weights, [optimiser], count(steps), factor=cosine, draw=draw)
    for _ in loop:
        x = small[torch.randint(len(small), (crops,))]
        i, j = (int(v) for v in torch.randint(0, 17, (2,)))
        cut = large[torch.randint(len(large), (crops,))][..., 8 * i : 8 * i + 128, 8 * j : 8 * j + 128]
        x = unit(torch.cat([x, cut]).to(device)).contiguous(memory_format=torch.channels_last)
        z = net.encoder(2 * x - 1)
        mean, var = z.mean((0, 2, 3)), z.var((0, 2, 3))
        loss = distance(net.decode(z + net.noise * torch.randn_like(z)), x)
        if equivariance:
            pooled = F.avg_pool2d(z[crops:], 2)
            loss = loss + equivariance * distance(net.decode(pooled), F.avg_pool2d(x[crops:], 2))
        loop.learn(loss + 0.01 * (mean.square().mean() + (var - 1).square().mean()), items=len(x))
    with loop.averaged():
        parts = small[: count(2000)].split(50)
        z = torch.cat([net.encoder(2 * unit(part.to(device)) - 1) for part in parts])
        net.mean.copy_(z.mean((0, 2, 3)))
        net.std.copy_(z.std((0, 2, 3)))
        for size in (128, 256):
            x = unit(pictures(world, count(100), size, 99)[0])
            log.info("%s: %.2f dB at %d px", name, psnr(round_trip(net, x), x).mean(), size)
    return loop.finish({"mean": net.mean, "std": net.std})

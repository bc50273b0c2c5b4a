"""Can a tiny autoencoder (1/8 of the side, 16 channels) carry letters and faces, in latents that are easy to model?

Loss: L1 + L2 + gradient L1, a pull of the latents to mean 0 and variance 1, noise of standard deviation 0.1 on them,
and scale equivariance: the decoded 2x-averaged latents should be the 2x-averaged picture, which ties both resolutions.

    python -m experiments.train_pocket.autoencoder --minutes 12
"""

import argparse
import logging
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from experiments.train_pocket.data import pictures
from mrflow.models.pocket.model import channels_last
from mrflow.models.pocket.networks import Autoencoder
from mrflow.scenes.grammar import FULL, POCKET_1

log = logging.getLogger("autoencoder")
WORLDS = {"pocket-1": POCKET_1, "full": FULL}


def gradient_l1(a: Tensor, b: Tensor) -> Tensor:
    """L1 between the horizontal and vertical differences of two pictures."""
    d = a - b
    return d.diff(dim=-1).abs().mean() + d.diff(dim=-2).abs().mean()


def distance(a: Tensor, b: Tensor) -> Tensor:
    """The reconstruction loss."""
    d = a - b
    return d.abs().mean() + 2 * d.square().mean() + 0.5 * gradient_l1(a, b)


def main() -> None:
    """Train for a given time; checkpoints every two minutes, resumes where it finds one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=12.0)
    parser.add_argument("--out", type=Path, default=Path("runs/pocket/autoencoder.pt"))
    parser.add_argument("--world", choices=list(WORLDS), default="pocket-1")
    parser.add_argument("--start", type=Path, help="weights of another run to begin with")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    args.out.parent.mkdir(parents=True, exist_ok=True)

    world = WORLDS[args.world]
    small = torch.cat([pictures(world, 5000, 128, 1)[0], pictures(FULL, 1000, 128, 2)[0]])
    large = torch.cat([pictures(world, 2000, 256, 3)[0], pictures(FULL, 400, 256, 4)[0]])
    log.info("rendered %d + %d pictures", len(small), len(large))
    net = channels_last(Autoencoder())
    if args.start is not None:
        net.load_state_dict(torch.load(args.start, weights_only=True)["ema"])
    ema = Autoencoder()
    ema.load_state_dict(net.state_dict())
    optimiser = torch.optim.AdamW(net.parameters(), lr=1e-3, weight_decay=0.01, betas=(0.9, 0.99))
    done, step = 0.0, 0
    if args.out.exists():
        saved = torch.load(args.out, weights_only=True)
        net.load_state_dict(saved["net"])
        ema.load_state_dict(saved["ema"])
        optimiser.load_state_dict(saved["optimiser"])
        done, step = saved["seconds"], saved["step"]
    total, last_save, began = 60 * args.minutes, time.monotonic(), time.monotonic() - done

    def save() -> None:
        torch.save(
            {
                "net": net.state_dict(),
                "ema": ema.state_dict(),
                "optimiser": optimiser.state_dict(),
                "seconds": time.monotonic() - began,
                "step": step,
            },
            args.out,
        )

    while (elapsed := time.monotonic() - began) < total:
        rate = 1.5e-3 * min(1.0, (step + 1) / 100) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * elapsed / total)))
        for group in optimiser.param_groups:
            group["lr"] = rate
        x = small[torch.randint(len(small), (3,))]
        i, j = (int(v) for v in torch.randint(0, 17, (2,)))
        x = torch.cat([x, large[torch.randint(len(large), (3,))][..., 8 * i : 8 * i + 128, 8 * j : 8 * j + 128]])
        x = (x.float() / 255).contiguous(memory_format=torch.channels_last)
        z = net.encoder(2 * x - 1)
        mean, var = z.mean((0, 2, 3)), z.var((0, 2, 3))
        loss = distance(net.decode(z + net.noise * torch.randn_like(z)), x)
        pooled = F.avg_pool2d(z[3:], 2)
        loss = loss + 0.25 * distance(net.decode(pooled), F.avg_pool2d(x[3:], 2))
        loss = loss + 0.01 * (mean.square().mean() + (var - 1).square().mean())
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimiser.step()
        step += 1
        with torch.no_grad():
            torch._foreach_lerp_(list(ema.parameters()), list(net.parameters()), 0.01)
        if step % 100 == 0:
            log.info("step %d  %.0f s  loss %.4f  var %.2f", step, elapsed, loss.item(), var.mean().item())
        if time.monotonic() - last_save > 120:
            save()
            last_save = time.monotonic()
    with torch.no_grad():
        z = torch.cat([ema.encoder(2 * small[i : i + 50].float() / 255 - 1) for i in range(0, 2000, 50)])
        ema.mean.copy_(z.mean((0, 2, 3)))
        ema.std.copy_(z.std((0, 2, 3)))
    save()
    with torch.no_grad():
        for name, size in (("128", 128), ("256", 256)):
            x = pictures(world, 100, size, 99)[0].float() / 255
            mse = (ema.decode(ema.encode(x)).clamp(0, 1) - x).square().mean((1, 2, 3))
            log.info("PSNR at %s: %.2f dB", name, float((-10 * mse.log10()).mean()))


if __name__ == "__main__":
    main()

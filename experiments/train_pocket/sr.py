"""Is a small x2 net, trained on what the autoencoder really decodes, better than bicubic?

Pairs: a scene at 128 px through the autoencoder (its latents noised a little, as sampled ones are), and the same scene
drawn at 256 px. Loss: L1 + 0.3 gradient L1; in the last 40 % (--gan) a hinge GAN at weight 0.004 with a patch
discriminator.

    python -m experiments.train_pocket.sr --minutes 8
"""

import argparse
import logging
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from experiments.train_pocket.autoencoder import gradient_l1
from experiments.train_pocket.data import pictures
from mrflow.models.pocket.networks import Autoencoder, CompactSR
from mrflow.scenes.grammar import FULL, POCKET_1

log = logging.getLogger("sr")
WORLDS = {"pocket-1": POCKET_1, "full": FULL}


def discriminator() -> nn.Sequential:
    """Patches of 22 x 22 pixels to a score each."""
    return nn.Sequential(
        nn.Conv2d(3, 24, 4, 2, 1),
        nn.LeakyReLU(0.2),
        nn.Conv2d(24, 48, 4, 2, 1),
        nn.LeakyReLU(0.2),
        nn.Conv2d(48, 1, 4, 1, 1),
    )


def main() -> None:
    """Train for a given time, then print PSNR beside bicubic's."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--pairs", type=int, default=3000)
    parser.add_argument("--world", choices=list(WORLDS), default="pocket-1")
    parser.add_argument("--gan", type=float, default=0.6, help="share of the time before the GAN begins; 1: none")
    parser.add_argument("--start", type=Path, help="weights of another run to begin with")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("runs/pocket"))
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    auto = Autoencoder()
    auto.load_state_dict(torch.load(args.out / "autoencoder.pt", weights_only=True)["ema"])
    world = WORLDS[args.world]
    small, large = pictures(world, args.pairs, 128, 21)[0], pictures(world, args.pairs, 256, 21)[0]
    with torch.no_grad():
        chunks = []
        for i in range(0, len(small), 50):
            z = auto.encode(small[i : i + 50].float() / 255)
            chunks.append((auto.decode(z + 0.1 * torch.randn_like(z)).clamp(0, 1) * 255).round().byte())
        inputs = torch.cat(chunks)
    log.info("made %d pairs", len(inputs))
    net, ema, critic = CompactSR(), CompactSR(), discriminator()
    if args.start is not None:
        net.load_state_dict(torch.load(args.start, weights_only=True))
    ema.load_state_dict(net.state_dict())
    opt = torch.optim.AdamW(net.parameters(), lr=1e-3, betas=(0.9, 0.99))
    opt_d = torch.optim.AdamW(critic.parameters(), lr=3e-4, betas=(0.5, 0.9))
    began, total, step = time.monotonic(), 60 * args.minutes, 0
    train = len(inputs) - 100
    while (elapsed := time.monotonic() - began) < total:
        for group in opt.param_groups:
            group["lr"] = 1e-3 * min(1, (step + 1) / 100) * (0.02 + 0.49 * (1 + math.cos(math.pi * elapsed / total)))
        pick = torch.randint(train, (8,))
        i, j = (int(v) for v in torch.randint(0, 65, (2,)))
        x = inputs[pick][..., i : i + 64, j : j + 64].float() / 255
        y = large[pick][..., 2 * i : 2 * i + 128, 2 * j : 2 * j + 128].float() / 255
        out = net(x)
        loss = (out - y).abs().mean() + 0.3 * gradient_l1(out, y)
        adversarial = elapsed > args.gan * total
        if adversarial:
            loss = loss - 0.004 * critic(out).mean()
        opt.zero_grad()
        loss.backward()
        opt.step()
        if adversarial:
            real, fake = critic(y), critic(out.detach())
            loss_d = F.relu(1 - real).mean() + F.relu(1 + fake).mean()
            opt_d.zero_grad()
            loss_d.backward()
            opt_d.step()
        step += 1
        with torch.no_grad():
            torch._foreach_lerp_(list(ema.parameters()), list(net.parameters()), 0.01)
        if step % 200 == 0:
            log.info("step %d  %.0f s  loss %.4f", step, elapsed, loss.item())
    torch.save(ema.state_dict(), args.out / "sr.pt")
    with torch.no_grad():
        x, y = inputs[train:].float() / 255, large[train:].float() / 255
        bicubic = F.interpolate(x, scale_factor=2, mode="bicubic", align_corners=False).clamp(0, 1)
        for name, out in (("bicubic", bicubic), ("net", ema(x).clamp(0, 1))):
            log.info("PSNR %s: %.2f dB", name, float((-10 * (out - y).square().mean((1, 2, 3)).log10()).mean()))


if __name__ == "__main__":
    main()

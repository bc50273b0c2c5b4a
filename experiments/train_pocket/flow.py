"""How far does a rectified flow of the FLUX architecture get at width 128 on procedural scenes?

Trains the text encoder and the transformer together on cached latents: first at the low resolution, then at both.
sigma is logit-normal, shifted by the number of tokens as the model's schedules are; one caption in ten is dropped.

    python -m experiments.train_pocket.flow --low 45 --mixed 45
"""

import argparse
import logging
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.train_pocket.data import pictures
from experiments.train_pocket.muon import Muon
from mrflow.models.flux import Flux, image_ids, pack
from mrflow.models.pocket.model import FLUX_PARAMS, POCKET, TEXT_LENGTH, VOCABULARY, text_encoder
from mrflow.models.pocket.networks import Autoencoder, tokenise
from mrflow.scenes.grammar import FULL, POCKET_1, World, in_world

log = logging.getLogger("flow")
WORLDS = {"pocket-1": POCKET_1, "full": FULL}
SIZES = {128: 16000, 256: 5000}
BATCH = {128: 32, 256: 8}


class Trainee(nn.Module):
    """What is trained here."""

    def __init__(self) -> None:
        super().__init__()
        self.text = text_encoder()
        self.flow = Flux(FLUX_PARAMS)


def plain_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention whose backward is fast on a CPU at these lengths."""
    weights: Tensor = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)
    return weights @ v


def cached_latents(folder: Path, world: World) -> dict[int, tuple[Tensor, Tensor]]:
    """Latents (half precision) and caption ids at each size, made once."""
    path = folder / "latents.pt"
    if path.exists():
        saved: dict[int, tuple[Tensor, Tensor]] = torch.load(path, weights_only=True)
        return saved
    auto = Autoencoder()
    auto.load_state_dict(torch.load(folder / "autoencoder.pt", weights_only=True)["ema"])
    out = {}
    for size, count in SIZES.items():
        shot = folder / f"pictures_{size}.pt"
        images, captions = torch.load(shot, weights_only=True) if shot.exists() else pictures(world, count, size, 11)
        known = [i for i, caption in enumerate(captions) if in_world(world, caption)][:count]
        images, captions = images[known], [captions[i] for i in known]
        with torch.no_grad():
            chunks = [auto.encode(images[i : i + 50].float() / 255).half() for i in range(0, len(images), 50)]
        out[size] = (torch.cat(chunks), tokenise(captions, VOCABULARY, TEXT_LENGTH)[0])
        log.info("encoded %d pictures at %d", len(images), size)
    torch.save(out, path)
    return out


def optimisers(net: Trainee, rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for the rest."""
    matrices: list[Tensor] = []
    rest: list[Tensor] = []
    for name, p in net.named_parameters():
        inside = "blocks" in name and p.ndim == 2 and "mod" not in name
        (matrices if inside else rest).append(p)
    return [
        Muon(matrices, lr=rate),
        torch.optim.AdamW(rest, lr=rate, weight_decay=0.0, betas=(0.9, 0.99)),
    ]


def loss_at(net: Trainee, latents: Tensor, ids: Tensor) -> Tensor:
    """Mean squared error of the velocity at random noise levels."""
    b, _, h, w = latents.shape
    tokens = (h // 2) * (w // 2)
    s = torch.sigmoid(torch.randn(b))
    factor = math.exp(POCKET.shift.mu(tokens))
    sigma = factor * s / (1 + (factor - 1) * s)
    eps = torch.randn_like(latents)
    x = latents + sigma.view(b, 1, 1, 1) * (eps - latents)
    ids = torch.where(torch.rand(b, 1) < 0.1, torch.zeros_like(ids), ids)
    context, pooled = net.text(ids)
    velocity = net.flow(pack(x), image_ids(h // 2, w // 2), context, torch.zeros(ids.shape[1], 3), pooled, sigma, None)
    return F.mse_loss(velocity, pack(eps - latents))


def main() -> None:
    """Train for given times; checkpoints every three minutes, resumes where it finds one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--low", type=float, default=45.0, help="minutes at the low resolution alone")
    parser.add_argument("--mixed", type=float, default=45.0, help="minutes at both resolutions")
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument(
        "--high-share", type=float, default=0.5, help="share of steps at the high resolution, when mixed"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/pocket"))
    parser.add_argument("--world", choices=list(WORLDS), default="pocket-1")
    parser.add_argument("--start", type=Path, help="weights of another run to begin with")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    data = cached_latents(args.out, WORLDS[args.world])
    net, ema = Trainee(), Trainee()
    net.flow.reset(torch.Generator().manual_seed(args.seed))
    if args.start is not None:
        net.load_state_dict(torch.load(args.start, weights_only=True)["ema"])
    net.flow.attention = plain_attention
    ema.load_state_dict(net.state_dict())
    opts = optimisers(net, args.rate)
    total, low = 60 * (args.low + args.mixed), 60 * args.low
    done, step, seen = 0.0, 0, {128: 0, 256: 0}
    path = args.out / "flow.pt"
    if path.exists():
        saved = torch.load(path, weights_only=True)
        net.load_state_dict(saved["net"])
        ema.load_state_dict(saved["ema"])
        for opt, state in zip(opts, saved["opts"], strict=True):
            opt.load_state_dict(state)
        done, step, seen = saved["seconds"], saved["step"], saved["seen"]
        log.info("resumed at step %d, %.0f s", step, done)
    began, last_save, running = time.monotonic() - done, time.monotonic(), {128: 0.0, 256: 0.0}

    while (elapsed := time.monotonic() - began) < total:
        decay = min(1.0, (total - elapsed) / (0.3 * total))
        for opt in opts:
            for group in opt.param_groups:
                group["lr"] = args.rate * min(1.0, (step + 1) / 200) * (0.02 + 0.98 * decay)
        size = 256 if elapsed > low and torch.rand(()).item() < args.high_share else 128
        latents, ids = data[size]
        pick = torch.randint(len(latents), (BATCH[size],))
        loss = loss_at(net, latents[pick].float(), ids[pick])
        for opt in opts:
            opt.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        for opt in opts:
            opt.step()
        step += 1
        seen[size] += len(pick)
        running[size] = loss.item() if not running[size] else 0.98 * running[size] + 0.02 * loss.item()
        weight = 1 - min(0.998, (step + 1) / (step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(list(ema.parameters()), list(net.parameters()), weight)
        if step % 100 == 0:
            log.info("step %d  %.0f s  low %.4f  high %.4f  seen %s", step, elapsed, running[128], running[256], seen)
        if time.monotonic() - last_save > 180 or step == 1:
            save(path, net, ema, opts, time.monotonic() - began, step, seen)
            last_save = time.monotonic()
    save(path, net, ema, opts, time.monotonic() - began, step, seen)
    log.info("done: %d steps, seen %s", step, seen)


def save(
    path: Path,
    net: Trainee,
    ema: Trainee,
    opts: list[torch.optim.Optimizer],
    seconds: float,
    step: int,
    seen: dict[int, int],
) -> None:
    """Write a checkpoint whole or not at all."""
    state = {"net": net.state_dict(), "ema": ema.state_dict(), "opts": [o.state_dict() for o in opts]}
    torch.save({**state, "seconds": seconds, "step": step, "seen": seen}, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").replace(path)


if __name__ == "__main__":
    main()

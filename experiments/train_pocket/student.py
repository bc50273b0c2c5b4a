"""Can a small LoRA teach the embedded model to draw in a few steps without classifier-free guidance?

Piecewise reflow (PeRFlow; Yan et al. 2024, arXiv 2405.07510): the noise levels are cut into as many windows as the
student has steps. The teacher, guided as it is used, integrates each window in many steps; the student learns the
straight line between the window's ends. One Euler step a window is then exact where it learned well, and the guidance,
which doubles the teacher's cost, is in its weights. Text encoder and autoencoder stay the teacher's.

    python -m experiments.train_pocket.student --minutes 20
"""

import argparse
import logging
import random
import time
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor, nn

import mrflow as mf
from experiments.train_pocket.flow import plain_attention
from mrflow.io import write_bytes
from mrflow.models.flux import Flux, image_ids, pack
from mrflow.models.lora import Adapted, Change, grafted, targets
from mrflow.models.pocket.model import WEIGHTS, Pocket, load_pocket
from mrflow.scenes.grammar import FULL, POCKET_1, World, held_out, sample_scene

log = logging.getLogger("student")
WORLDS = {"pocket-1": POCKET_1, "full": FULL}
BATCH = {128: 48, 256: 12}
Pairs = tuple[Tensor, Tensor, Tensor]  # states (item, window end, ...), context, pooled


def window_levels(model: Pocket, size: int, windows: int) -> tuple[float, ...]:
    """Where windows begin and end: the student's own schedule."""
    return mf.Shifted(windows)(1.0, model.info.tokens(size, size), model.info)


@torch.inference_mode()
def teach(model: Pocket, world: World, size: int, count: int, windows: int, inner: int, seed: int) -> Pairs:
    """States of the guided teacher at the ends of all windows, for `count` captions of training."""
    rng, levels = random.Random(seed), window_levels(model, size, windows)
    fine = [hi + (lo - hi) * i / inner for hi, lo in pairwise(levels) for i in range(inner)]
    empty, side = model.condition([""]), size // 8
    states, contexts, pooleds = list[Tensor](), list[Tensor](), list[Tensor]()
    guidance = mf.CFG(model.info.cfg)
    generator = torch.Generator().manual_seed(seed)
    while sum(len(x) for x in states) < count:
        scenes = [sample_scene(world, rng) for _ in range(BATCH[size])]
        cond = model.condition([s.caption for s in scenes if not held_out(s.caption)])
        x = torch.randn(cond.batch, 16, side, side, generator=generator)
        found = [x]
        field = guidance.field(model, cond, empty)
        for i in range(windows):
            sigmas = (*fine[i * inner : (i + 1) * inner], levels[i + 1])
            x = mf.integrate(mf.Euler(), field, x, sigmas)
            found.append(x)
        states.append(torch.stack(found, 1).half())
        contexts.append(cond["context"].half())
        pooleds.append(cond["pooled"].half())
        log.info("%d px: %d of %d", size, sum(len(x) for x in states), count)
    return torch.cat(states).clone(), torch.cat(contexts).clone(), torch.cat(pooleds).clone()


def adapters(flow: Flux, rank: int) -> dict[str, Change]:
    """A zero change of every linear in the blocks and of the last one, ready to be trained."""
    out: dict[str, Change] = {}
    for target in {t.path: t for t in targets(flow).values()}.values():
        if not target.path.startswith(("double_blocks", "single_blocks", "final_layer")):
            continue
        rows = flow.get_submodule(target.path).out_features
        down = nn.Parameter(torch.randn(rank, target.width) / target.width**0.5)
        out[target.path] = Change(down, nn.Parameter(torch.zeros(int(str(rows)), rank)))
    return out


def loss_at(student: Flux, pairs: Pairs, pick: Tensor, levels: tuple[float, ...]) -> Tensor:
    """Mean squared error to the slope of a random window, at a random place on its straight line."""
    states, context, pooled = (part[pick].float() for part in pairs)
    window = torch.randint(len(levels) - 1, (len(pick),))
    # Half of the places are window beginnings, where the student's own steps ask.
    u = torch.where(torch.rand(len(pick)) < 0.5, torch.zeros(len(pick)), torch.rand(len(pick)))
    rows = torch.arange(len(pick))
    start, end = states[rows, window], states[rows, window + 1]
    high, low = (torch.tensor(levels)[window + i] for i in (0, 1))
    sigma = high + u * (low - high)
    x = torch.lerp(start, end, u.view(-1, 1, 1, 1))
    slope = (end - start) / (low - high).view(-1, 1, 1, 1)
    h, w = x.shape[-2] // 2, x.shape[-1] // 2
    velocity = student(pack(x), image_ids(h, w), context, torch.zeros(context.shape[1], 3), pooled, sigma, None)
    return F.mse_loss(velocity, pack(slope))


def main() -> None:
    """Teach once, then train for given minutes; both are kept, and resumed where they are found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--teacher", type=Path, default=WEIGHTS)
    parser.add_argument("--world", choices=list(WORLDS), default="pocket-1")
    parser.add_argument("--windows", type=int, default=2)
    parser.add_argument("--inner", type=int, default=6, help="steps of the teacher in a window")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--pairs", type=int, nargs=2, default=(4000, 1200), help="captions at 128 and at 256 px")
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--high-share", type=float, default=0.5, help="share of steps at 256 px")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("runs/student"))
    parser.add_argument("--export", type=Path, help="write the averaged adapter here, in half precision")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    model = load_pocket(args.teacher)
    flow = model._flow.requires_grad_(requires_grad=False)
    data: dict[int, Pairs] = {}
    for size, count in zip((128, 256), args.pairs, strict=True):
        path = args.out / f"pairs-{args.windows}-{size}.pt"
        if not path.exists():
            made = teach(model, WORLDS[args.world], size, count, args.windows, args.inner, size)
            torch.save(made, path.with_suffix(".tmp"))
            path.with_suffix(".tmp").replace(path)
        data[size] = torch.load(path, weights_only=True)
    changed = adapters(flow, args.rank)
    flow.attention = plain_attention
    student = grafted(
        flow, {p: Adapted(flow.get_submodule(p), c, dtype=flow.dtype, device="cpu") for p, c in changed.items()}
    )
    weights = {f"{path}.{name}": getattr(c, part) for path, c in changed.items() for name, part in NAMES}
    average = {name: p.detach().clone() for name, p in weights.items()}
    optimiser = torch.optim.AdamW(list(weights.values()), lr=args.rate, weight_decay=0.0, betas=(0.9, 0.99))
    done, step, path = 0.0, 0, args.out / f"student-{args.windows}.pt"
    if path.exists():
        saved = torch.load(path, weights_only=True)
        for name, p in weights.items():
            p.data.copy_(saved["weights"][name])
        average, done, step = saved["average"], saved["seconds"], saved["step"]
        optimiser.load_state_dict(saved["optimiser"])
    levels = {size: window_levels(model, size, args.windows) for size in data}
    began, last, total, running = time.monotonic() - done, time.monotonic(), 60 * args.minutes, {128: 0.0, 256: 0.0}

    def keep() -> None:
        now = {n: p.detach() for n, p in weights.items()}
        state: dict[str, object] = {"weights": now, "average": average, "optimiser": optimiser.state_dict()}
        state |= {"seconds": time.monotonic() - began, "step": step}
        torch.save(state, path.with_suffix(".tmp"))
        path.with_suffix(".tmp").replace(path)

    while (elapsed := time.monotonic() - began) < total:
        for group in optimiser.param_groups:
            group["lr"] = args.rate * min(1.0, (step + 1) / 100) * (0.02 + 0.98 * min(1.0, 2 * (1 - elapsed / total)))
        size = 256 if torch.rand(()).item() < args.high_share else 128
        loss = loss_at(student, data[size], torch.randint(len(data[size][0]), (BATCH[size],)), levels[size])
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(list(weights.values()), 1.0)
        optimiser.step()
        step += 1
        running[size] = loss.item() if not running[size] else 0.98 * running[size] + 0.02 * loss.item()
        weight = 1 - min(0.998, (step + 1) / (step + 10))
        torch._foreach_lerp_(list(average.values()), [p.detach() for p in weights.values()], weight)
        if step % 100 == 0:
            log.info("step %d  %.0f s  low %.4f  high %.4f", step, elapsed, running[128], running[256])
        if time.monotonic() - last > 180:
            keep()
            last = time.monotonic()
    keep()
    if args.export is not None:
        tensors = {name: value.half().contiguous() for name, value in average.items()}
        facts = {"teacher": model.info.version, "steps": str(args.windows), "trained": f"{step} steps"}
        write_bytes(args.export, save(tensors, metadata=facts))
        print(f"{args.export}: {args.export.stat().st_size / 1e6:.2f} MB, {step} steps")


NAMES = (("lora_A.weight", "down"), ("lora_B.weight", "up"))

if __name__ == "__main__":
    main()

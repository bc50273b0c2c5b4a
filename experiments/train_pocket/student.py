"""Can a small LoRA teach the embedded model to draw in a few steps without classifier-free guidance?

Piecewise reflow (PeRFlow; Yan et al. 2024, arXiv 2405.07510): the noise levels are cut into as many windows as the
student has steps. The teacher, guided as it is used, integrates each window in many steps; the student learns the
straight line between the window's ends. One Euler step a window is then exact where it learned well, and the guidance,
which doubles the teacher's cost, is in its weights. Text encoder and autoencoder stay the teacher's.

    python -m experiments.train_pocket.student --device cuda --out runs/student --export mine.safetensors
    python -m experiments.train_pocket.student --teacher FILE --world kept --shift 2 --export student.safetensors
"""

import argparse
import math
import random
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

import mrflow as mf
from experiments.train_pocket.autoencoder import State
from experiments.train_pocket.data import HARD_WORLDS, grid, start_log
from experiments.train_pocket.export import digest, write_once
from experiments.train_pocket.flow import SHOWN, plain_attention
from experiments.train_pocket.hard import SHOWN as HARD_SHOWN
from experiments.train_pocket.loop import Loop, Run, finished, flat_then_linear, keep_settings, log, save_whole
from mrflow.checkpoints.safetensors import read_header
from mrflow.errors import MrflowError
from mrflow.model_info import ModelInfo, Shift
from mrflow.models import choose_device
from mrflow.models.flux.transformer import Flux, image_ids
from mrflow.models.lora import AdaptedLinear, Change, graft, targets
from mrflow.models.pocket.model import WEIGHTS, Pocket, facts, load_pocket
from mrflow.protocols.tokens import pack
from mrflow.records.pictures import check_writable
from mrflow.scenes.grammar import World, held_out
from mrflow.scenes.hard import HardWorld, sample

WINDOWS, RANK, RATE = 2, 32, 2e-3
NAMES = (("lora_A.weight", "down"), ("lora_B.weight", "up"))
Pairs = tuple[Tensor, Tensor, Tensor]  # states (item, window end, ...), context, pooled


@dataclass(frozen=True)
class Lessons:
    """How many captions are taught at each size, how many make a batch there, and the steps, of which all sizes have
    the same share; the teacher takes `inner` steps in each window. With a `shift` windows have the same ends at every
    size, those that the student is used with."""

    captions: Mapping[int, int]
    batch: Mapping[int, int]
    steps: int
    inner: int = 4
    shift: Shift | None = None


LESSONS = Lessons({64: 2000, 128: 1500, 256: 600, 512: 200}, {64: 64, 128: 24, 256: 6, 512: 2}, 2400)


def in_use(counts: Mapping[int, int], info: ModelInfo) -> dict[int, int]:
    """Of counts by size those of the sizes that a model was trained at, up to the one it is used at."""
    return {size: count for size, count in counts.items() if size in info.sides and size <= max(info.size)}


def window_levels(model: Pocket, size: int, shift: Shift | None) -> tuple[float, ...]:
    """Where windows begin and end: the model's own schedule of so many steps, or that of another shift."""
    return mf.Shifted(WINDOWS, shift=shift)(1.0, model.info.tokens(size, size), model.info)


@torch.inference_mode()
def teach(
    model: Pocket, world: World | HardWorld, size: int, count: int, batch: int, inner: int, shift: Shift | None
) -> Pairs:
    """States of the guided teacher at the ends of all windows, for `count` captions of training."""
    rng, levels = random.Random(size), window_levels(model, size, shift)
    fine = [hi + (lo - hi) * i / inner for hi, lo in pairwise(levels) for i in range(inner)]
    empty, side = model.condition([""]), size // 8
    states, contexts, pooleds = list[Tensor](), list[Tensor](), list[Tensor]()
    guidance = mf.CFG(model.info.cfg)
    generator = torch.Generator().manual_seed(size)
    while sum(len(x) for x in states) < count:
        captions = [sample(world, rng).caption for _ in range(min(batch, 2 * count))]
        captions = [caption for caption in captions if not held_out(caption)]
        if not captions:
            continue
        cond = model.condition(captions)
        x = torch.randn(cond.batch, 16, side, side, generator=generator).to(model.device)
        found = [x]
        field = guidance.field(model, cond, empty)
        for i in range(WINDOWS):
            sigmas = (*fine[i * inner : (i + 1) * inner], levels[i + 1])
            x = mf.integrate(mf.Euler(), field, x, sigmas)
            found.append(x)
        states.append(torch.stack(found, 1).half().cpu())
        contexts.append(cond["context"].half().cpu())
        pooleds.append(cond["pooled"].half().cpu())
        log.info("taught %d of %d at %d px", sum(len(x) for x in states), count, size)
    return torch.cat(states).clone(), torch.cat(contexts).clone(), torch.cat(pooleds).clone()


def cached_pairs(run: Run, name: str, teacher: Pocket, world: World | HardWorld, lessons: Lessons) -> dict[int, Pairs]:
    """What the teacher does at each size, made once."""
    out: dict[int, Pairs] = {}
    for size, count in lessons.captions.items():
        path = run.folder / f"{name}-pairs-{size}.pt"
        if not path.exists():
            batch = run.items(lessons.batch[size])
            save_whole(teach(teacher, world, size, run.count(count), batch, lessons.inner, lessons.shift), path)
        out[size] = torch.load(path, weights_only=True)
    return out


def adapters(flow: Flux) -> dict[str, Change]:
    """A zero change of every linear in the blocks and of the last one, ready to be trained."""
    out: dict[str, Change] = {}
    for target in {t.path: t for t in targets(flow).values()}.values():
        if not target.path.startswith(("double_blocks", "single_blocks", "final_layer")):
            continue
        rows = flow.get_submodule(target.path).out_features
        down = torch.randn(RANK, target.width) / target.width**0.5
        up = torch.zeros(int(str(rows)), RANK)
        out[target.path] = Change(*(nn.Parameter(part.to(flow.img_in.weight.device)) for part in (down, up)))
    return out


def attach_adapters(flow: Flux) -> tuple[Flux, dict[str, Tensor]]:
    """The transformer with trainable pairs on top, whose own weights are frozen; and those pairs by PEFT's names."""
    flow.requires_grad_(requires_grad=False)
    changed = adapters(flow)
    dtype, device = flow.dtype, flow.img_in.weight.device
    grafts = {
        p: AdaptedLinear(flow.get_submodule(p), change, dtype=dtype, device=device) for p, change in changed.items()
    }
    student = graft(flow, grafts)
    if device.type == "cpu":
        student.attention = plain_attention
    return student, {f"{path}.{key}": getattr(change, part) for path, change in changed.items() for key, part in NAMES}


def loss_at(student: Flux, pairs: Pairs, pick: Tensor, levels: tuple[float, ...]) -> Tensor:
    """Mean squared error to the slope of a random window, at a random place on its straight line."""
    device = student.img_in.weight.device
    states, context, pooled = (part[pick].to(device).float() for part in pairs)
    window = torch.randint(len(levels) - 1, (len(pick),))
    # Half of the places are window beginnings, where the student's own steps ask.
    u = torch.where(torch.rand(len(pick)) < 0.5, torch.zeros(len(pick)), torch.rand(len(pick))).to(device)
    rows = torch.arange(len(pick))
    start, end = states[rows, window], states[rows, window + 1]
    high, low = (torch.tensor(levels)[window + i].to(device) for i in (0, 1))
    sigma = high + u * (low - high)
    x = torch.lerp(start, end, u.view(-1, 1, 1, 1))
    slope = (end - start) / (low - high).view(-1, 1, 1, 1)
    h, w = x.shape[-2] // 2, x.shape[-1] // 2
    places = image_ids(h, w, device=device), torch.zeros(context.shape[1], 3, device=device)
    velocity = student(pack(x), places[0], context, places[1], pooled, sigma, None)
    return F.mse_loss(velocity.float(), pack(slope))


def train(run: Run, name: str, world: World | HardWorld, lessons: Lessons, teacher: Path) -> State:
    """The adapter's tensors, in PEFT's layout."""
    if (done := finished(run, name)) is not None:
        return done
    torch.manual_seed(0)
    model = load_pocket(teacher, device=run.device)
    data = cached_pairs(run, name, model, world, lessons)
    levels = {size: window_levels(model, size, lessons.shift) for size in data}
    student, weights = attach_adapters(model.transformer)
    optimiser = torch.optim.AdamW(list(weights.values()), lr=RATE, weight_decay=0.0, betas=(0.9, 0.99))

    def draw() -> Image.Image:
        drawer = model.with_flow(student, "/student")
        student_alone = replace(mf.students.POCKET, lora=(), shift=lessons.shift or mf.students.POCKET.shift)
        chains = [mf.recipes.few(student_alone, size=model.info.size, steps=n) for n in (1, 2)]
        shown = HARD_SHOWN if isinstance(world, HardWorld) else SHOWN
        return grid([mf.run(chain, drawer, shown, seed=0).pixels.cpu() for chain in chains])

    loop = Loop(
        name,
        run,
        weights,
        [optimiser],
        run.count(lessons.steps),
        factor=flat_then_linear(0.5),
        decay=0.998,
        draw=draw,
    )
    for _ in loop:
        size = list(data)[int(torch.randint(len(data), ()))]
        pick = torch.randint(len(data[size][0]), (run.items(lessons.batch[size]),))
        with run.autocast():
            loss = loss_at(student, data[size], pick, levels[size])
        loop.learn(loss, f"{size} px", len(pick))
    return loop.finish()


def export(tensors: Mapping[str, Tensor], facts: Mapping[str, str], path: Path) -> None:
    """Write an adapter in half precision; its metadata are `facts`, such as the teacher's version, and a digest."""
    halves = {name: value.half().contiguous() for name, value in tensors.items()}
    write_once(path, halves, {**facts, "version": digest(halves)})


def said(teacher: str, lessons: Lessons, steps: int) -> dict[str, str]:
    """What a student's file says of itself."""
    shift = {} if lessons.shift is None else {"shift": f"{math.exp(lessons.shift.low):g}"}
    return {"teacher": teacher, "steps": str(WINDOWS), "trained": f"{steps} steps", **shift}


def main() -> None:
    """A student of any model file of this architecture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", type=Path, default=WEIGHTS)
    parser.add_argument("--world", choices=list(HARD_WORLDS), default="full")
    parser.add_argument("--shift", type=float, help="factor of the noise levels at every size (default: the model's)")
    parser.add_argument("--steps", type=int, default=LESSONS.steps)
    parser.add_argument("--batch", type=float, default=1.0, help="times as many in every batch; less on a processor")
    parser.add_argument("--scale", type=float, default=1.0, help="times as many captions and steps; 0.004 is a trial")
    parser.add_argument("--out", type=Path, default=Path("runs/student"))
    parser.add_argument("--export", type=Path, required=True, help="where the averaged adapter goes")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    if args.steps < 1:
        parser.error(f"--steps {args.steps} is out of range")
    try:
        shift = None if args.shift is None else Shift.fixed(args.shift)
        run = Run(args.out, choose_device(args.device), scale=args.scale, batch=args.batch)
        check_writable(args.export)
        if args.export.exists():
            read_header(args.export)  # it is replaced, or stays where it is the same; no other file is
        header = read_header(args.teacher)
        teacher = header.metadata.get("version", "")
        lessons = replace(LESSONS, steps=args.steps, captions=in_use(LESSONS.captions, facts(header)), shift=shift)
        keep_settings(run, repr((teacher, args.world, lessons, WINDOWS, RANK, RATE)))
    except MrflowError as error:
        parser.error(str(error))
    start_log(run.folder)
    tensors = train(run, "student", HARD_WORLDS[args.world], lessons, args.teacher)
    export(tensors, said(teacher, lessons, run.count(args.steps)), args.export)


if __name__ == "__main__":
    main()

"""Can a small flow learn a world that one forward cannot draw, on two processor cores?

Trains the autoencoder, the flow with the text encoder, and the super-resolution net of pocket-4, in this order, from
the embedded model's weights (`--lesson readable` leaves the autoencoder as it is). Scenes are rendered and encoded
once, in shards under --out. The run is made in pieces: the same command resumes from the last checkpoint, and after
the last step it writes NAME.safetensors. The rate is constant and falls over the last 30 % of the steps; `--steps` may
be raised later. `--finish` writes the weights of the last checkpoint.

    python -m experiments.train_pocket.hard --minutes 20 --threads 2 --bf16 --compile       # two cores
    python -m experiments.train_pocket.hard --minutes 7 --device cuda --workers 14 --batch 12 --shards 4
    python -m experiments.train_pocket.hard --lesson readable --steps 2 --batch 0.05 --shards 0.1 --out runs/trial
"""

import argparse
import logging
import math
import random
import re
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path

import torch
from torch import Tensor

from experiments.train_pocket import autoencoder, sr
from experiments.train_pocket.autoencoder import State, loaded
from experiments.train_pocket.data import KEPT, rendered, start_log, tensors_of, unit
from experiments.train_pocket.export import export
from experiments.train_pocket.flow import RATE, Trainee, drawn, losses_at, optimisers, plain_attention, prepare
from experiments.train_pocket.loop import Loop, PieceOver, Run, finished, flat_then_linear, keep_settings, save_whole
from mrflow.errors import MrflowError
from mrflow.model_info import Shift
from mrflow.models import choose_device
from mrflow.models.kl import channels_last
from mrflow.models.pocket.model import (
    BASE,
    HEAD,
    LONG_TEXT,
    NEWEST,
    SHIPPED,
    WIDTH,
    WORDS,
    open_pocket,
)
from mrflow.models.pocket.networks import tokenise
from mrflow.records.files import write_bytes
from mrflow.scenes.grammar import Scene, held_out
from mrflow.scenes.hard import HARD, KINDS, HardWorld, sample

log = logging.getLogger("train_pocket")
NAMES = (*KINDS, "older")  # all kinds of the older world are one
SHOWN = (
    "a red star at the top left, a blue ring at the middle right, a green heart at the bottom left, "
    "an orange cross at the top right",
    "a purple sign in 13% letters, CAT and DOG and SUN",
    "a blue sign in 8% letters, RED and FOX and HAT and PIE and JAM and KEY",
    "four 20% faces, happy sad winking surprised",
    "a 5x5 grid of green circles with a red star in row 2 column 4",
    "1/32 stripes with a black heart at the left",
    "a big red circle at the left on coarse dots",
)


@dataclass(frozen=True)
class Lesson:
    """Steps of the autoencoder (0: it stays) and of the super-resolution net; what the flow sees, for `high` pixels.

    Shards of so many scenes, and for each size their number, the batch and its share of the steps. `worlds` holds the
    sizes whose shards are of another world.
    """

    world: HardWorld
    autoencoder: int
    sr: int
    scenes: int
    shards: Mapping[int, int]
    batch: Mapping[int, int]
    share: Mapping[int, float]
    rate: float = RATE
    worlds: Mapping[int, HardWorld] = field(default_factory=dict)
    high: int = 256

    @property
    def low(self) -> int:
        """Pixels of the low stage."""
        return self.high // 2


BROAD = Lesson(HARD, 300, 600, 2000, {128: 12, 256: 8}, {128: 128, 256: 40}, {128: 0.45, 256: 0.55})
# In BROAD 6 % of the pictures at 128 px are signs that are kept there, of 1,500 different ones; after 7,400 steps a
# quarter of their letters was right.
READABLE_256 = replace(
    KEPT, letters={"13%": 3.0, "8%": 2.0}, faces={"20%": 1.0, "12%": 1.0}, periods={"1/16": 1.0, "1/32": 1.0}
)
READABLE = replace(
    BROAD,
    autoencoder=0,  # what it keeps at 128 px is what is shown
    shards={64: 4, 128: 14, 256: 2},
    batch={64: 192, 128: 128, 256: 40},
    share={64: 0.16, 128: 0.74, 256: 0.1},
    worlds={64: KEPT, 128: KEPT, 256: READABLE_256},
    high=128,
)
LESSONS = {"broad": BROAD, "readable": READABLE}
# Which letters a sign of 13 % has is decided above sigma 0.9 at 256 px, where the sampling schedule shifts by a factor
# of 2 and puts 7 % of the levels. Every other item is drawn with a factor of 7 (4 at 128 px).
SHIFTS = BASE.shift, Shift(math.log(4), math.log(7), 64, 256)
Shard = tuple[Tensor, Tensor, Tensor]


def scenes(world: HardWorld, count: int, seed: int) -> list[Scene]:
    """So many scenes, none of them held out."""
    rng, out = random.Random(seed), list[Scene]()
    while len(out) < count:
        scene = sample(world, rng)
        if not held_out(scene.caption):
            out.append(scene)
    return out


@torch.inference_mode()
def shard(run: Run, lesson: Lesson, auto: State, size: int, index: int) -> Shard:
    """Latents (half precision), caption ids and kinds of a shard's own scenes, made once."""
    path = run.folder / "shards" / f"{size}-{index:03d}.pt"
    if path.exists():
        saved: Shard = torch.load(path, weights_only=True)
        return saved
    found = scenes(lesson.worlds.get(size, lesson.world), max(1, round(run.scale * lesson.scenes)), 1000 * size + index)
    net = channels_last(loaded(auto, run.device))
    latents = list[Tensor]()
    for part in rendered(found, size, run.pool).split(50):
        images = unit(part.to(run.device)).contiguous(memory_format=torch.channels_last)
        latents.append(net.encode(images).half().cpu().contiguous())
    ids = tokenise([scene.caption for scene in found], WORDS, LONG_TEXT)[0]
    kinds = torch.tensor([NAMES.index(scene.kind) if scene.kind in KINDS else len(KINDS) for scene in found])
    out = torch.cat(latents), ids, kinds
    save_whole(out, path)
    log.info("encoded %d pictures at %d px: %s", len(found), size, path.name)
    return out


def cached(run: Run, lesson: Lesson, auto: State) -> dict[int, Shard]:
    """All shards of each size, put together."""
    out = dict[int, Shard]()
    for size, count in lesson.shards.items():
        parts = [shard(run, lesson, auto, size, i) for i in range(count)]
        latents, ids, kinds = (torch.cat(column) for column in zip(*parts, strict=True))
        out[size] = latents, ids, kinds
    return out


def start_from(name: str) -> tuple[Trainee, State, State]:
    """A pocket-4 with a shipped version's weights; that version's autoencoder and super-resolution net."""
    tensors = {key: t.float() for key, t in tensors_of(open_pocket(SHIPPED[name])).items()}
    torch.manual_seed(0)
    net = Trainee(WIDTH, HEAD, words=len(WORDS), length=LONG_TEXT)
    own = net.state_dict()
    for key, value in tensors.items():
        if key.startswith(("text.", "flow.")):
            own[key].copy_(value)

    def part(prefix: str) -> State:
        return {key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)}

    return net, part("autoencoder."), part("sr.")


def encoder(run: Run, lesson: Lesson, start: State) -> State:
    """The autoencoder, trained on from a start, or the start itself where the lesson has no steps for it."""
    if not lesson.autoencoder and finished(run, "autoencoder") is None:
        return start
    seen = {size: 1500 for size in lesson.share}
    steps, net = lesson.autoencoder, "autoencoder"
    return autoencoder.train(run, net, lesson.world, steps, start, seen=seen, crops=8, rate=7e-4)


def enlarger(run: Run, lesson: Lesson, auto: State, start: State) -> State:
    """The super-resolution net, trained on from a start, on what this autoencoder decodes."""
    low = min(lesson.share)
    return sr.train(run, "sr", lesson.world, lesson.sr, auto, sizes=(low,), pairs=800, start=start)


def loop_of(run: Run, lesson: Lesson, net: Trainee, auto: State, steps: int) -> Loop:
    """The steps of the flow, at the checkpoint if there is one."""
    sizes, info = tuple(lesson.share), replace(BASE, size=(lesson.high,) * 2, low=(lesson.low,) * 2)
    return Loop(
        "flow",
        run,
        dict(net.named_parameters()),
        optimisers(net, lesson.rate, torch.bfloat16 if run.bf16 else torch.float32),
        steps,
        factor=flat_then_linear(0.3),
        warmup=200,
        decay=0.998,
        draw=lambda: drawn(net, auto, run.device, info, sizes, SHOWN),
    )


def learn(run: Run, lesson: Lesson, net: Trainee, auto: State, steps: int, *, compiled: bool = False) -> Loop:
    """Train until the steps are done.

    Raises:
        PieceOver: the minutes are over before; a checkpoint is written.
    """
    data, device = cached(run, lesson, auto), run.device
    net = net.to(device)
    loop = loop_of(run, lesson, net, auto, steps)
    if device.type == "cpu" and compiled:
        net.flow.attention = plain_attention
        for block in net.flow.stack():
            block.compile(dynamic=False)
    else:
        prepare(net.flow)
    sizes, shares = tuple(lesson.share), torch.tensor(list(lesson.share.values()))
    for _ in loop:
        size = sizes[int(torch.multinomial(shares, 1))]
        latents, ids, kinds = data[size]
        pick = torch.randint(len(latents), (run.items(lesson.batch[size]),))
        with run.autocast():
            losses = losses_at(net, latents[pick].to(device).float(), ids[pick].to(device), *SHIFTS)
        loop.learn(losses.mean(), f"{size}", len(pick))
        for kind, name in enumerate(NAMES):  # what the log says of each kind
            here = losses.detach()[kinds[pick].to(device) == kind]
            if len(here):
                key = f"{size} {name}"
                loop.running[key] = torch.lerp(loop.running.get(key, here.mean()), here.mean(), 0.02)
    return loop


def begin_with(start: Path, folder: Path) -> None:
    """Copy another run's autoencoder and flow, unless the folder has its own."""
    for path in (start / "autoencoder.safetensors", start / "flow.pt"):
        if path.is_file() and not (folder / path.name).exists():
            write_bytes(folder / path.name, path.read_bytes())


def write(run: Run, name: str, lesson: Lesson, loop: Loop, auto: State, larger: State) -> Path:
    """The model's file, of the averaged weights."""
    path = run.folder / f"{name}.safetensors"
    flow = {key: value.float().cpu() for key, value in loop.average.items()}
    facts = {
        "cfg": "2",
        "size": f"{lesson.high}",
        "low": f"{lesson.low}",
        "sides": " ".join(map(str, lesson.share)),
        "steps": f"{loop.step}",
        "seen": str(loop.seen),
    }
    export(name, flow, auto, larger, path, facts)
    return path


def main() -> None:
    """Train a piece."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", default="pocket-4", help="of the version")
    parser.add_argument("--out", type=Path, default=Path("runs/pocket-4"), help="the folder of everything")
    parser.add_argument("--device", default="cpu", help="auto, cpu or cuda")
    parser.add_argument("--threads", type=int, help="of the processor")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="of this piece")
    parser.add_argument("--steps", type=int, default=12000, help="of all pieces together; may be raised later")
    parser.add_argument("--batch", type=float, default=1.0, help="times as many pictures in every batch")
    parser.add_argument("--rate", type=float, default=RATE, help="highest rate")
    parser.add_argument("--lesson", choices=LESSONS, default="broad", help="what is shown")
    parser.add_argument("--start", type=Path, help="a folder whose networks are trained on; it stays as it is")
    parser.add_argument("--shards", type=float, default=1.0, help="times as many scenes; may be raised later")
    parser.add_argument("--every", type=float, default=180.0, help="seconds between checkpoints")
    parser.add_argument("--grid", type=int, default=1000, help="steps between grids of pictures")
    parser.add_argument("--workers", type=int, default=0, help="processes that render")
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16 on a processor that is faster in it")
    parser.add_argument("--compile", action="store_true", help="compile the blocks on a processor too")
    parser.add_argument("--finish", action="store_true", help="write the file of the last checkpoint, train no more")
    args = parser.parse_args()
    if not re.fullmatch(r"[\w.-]+", args.name):
        parser.error(f"--name must be letters, digits, dots and dashes, got {args.name!r}")
    if args.steps < 1 or not args.rate > 0 or not args.shards > 0 or args.grid < 1:
        parser.error("--steps, --rate, --shards and --grid must be above 0")
    if args.workers < 0:
        parser.error(f"--workers {args.workers} is out of range")
    many = max(1.0, args.shards)
    lesson = LESSONS[args.lesson]
    lesson = replace(lesson, shards={size: round(many * n) for size, n in lesson.shards.items()}, rate=args.rate)
    if args.start and not (args.start / "flow.pt").is_file():
        parser.error(f"--start {args.start}: there is no flow.pt in it")
    try:
        run = Run(
            args.out,
            choose_device(args.device),
            scale=min(1.0, args.shards),
            batch=args.batch,
            every=args.every,
            grid=args.grid,
            pool=ProcessPoolExecutor(args.workers, get_context("spawn")) if args.workers else None,
            minutes=args.minutes,
            bf16=args.bf16,
        )
        keep_settings(run, repr(replace(lesson, shards={})))
        if args.start:
            begin_with(args.start, args.out)
    except MrflowError as error:
        parser.error(str(error))
    if args.threads:
        torch.set_num_threads(args.threads)
    start_log(args.out)
    net, auto, larger = start_from(NEWEST)
    if args.finish:
        auto, larger = finished(run, "autoencoder") or auto, finished(run, "sr") or larger
        loop = loop_of(run, lesson, net, auto, args.steps)
    else:
        try:
            auto = encoder(run, lesson, auto)
            loop = learn(run, lesson, net, auto, args.steps, compiled=args.compile)
            loop.save()
            larger = enlarger(run, lesson, auto, larger)
        except PieceOver as over:
            log.info("%s; the same command resumes", over)
            return
    log.info("made %s", write(run, args.name, lesson, loop, auto, larger))


if __name__ == "__main__":
    main()

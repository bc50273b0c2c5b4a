"""Can a small LoRA teach the embedded model another look of its world: a dim style, new shapes, a new alphabet?

Low-rank pairs on the transformer's linears, trained by the flow-matching loss on renderings in the look; text encoder
and autoencoder stay the model's. Captions that are held out stay held out. The same command resumes an interrupted run;
what it exports is an ordinary LoRA file, for `mrflow.load(FILE, lora=...)`.

    python -m experiments.train_pocket.finetune runes --model FILE --threads 2 --bf16    # 10 to 20 minutes
    python -m experiments.train_pocket.finetune dusk --model FILE --steps 2 --batch 0.1 --scale 0.01    # a trial
"""

import argparse
import random
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

import mrflow as mf
from experiments.train_pocket import flow
from experiments.train_pocket.autoencoder import State
from experiments.train_pocket.data import KEPT, grid, rendered, start_log, unit
from experiments.train_pocket.flow import Trainee, losses_at
from experiments.train_pocket.loop import (
    Loop,
    PieceOver,
    Run,
    finished,
    flat_then_linear,
    keep_settings,
    log,
    save_whole,
)
from experiments.train_pocket.student import attach_adapters, export, in_use
from mrflow.errors import MrflowError, WeightsError
from mrflow.models import choose_device
from mrflow.models.pocket.model import HEAD, WORDS, Pocket, facts, load_pocket, open_pocket, text_sizes
from mrflow.models.pocket.networks import tokenise
from mrflow.records.pictures import check_writable
from mrflow.scenes.grammar import Scene, held_out
from mrflow.scenes.hard import HardWorld, sample
from mrflow.scenes.looks import LOOKS, restyle

WORLDS: Mapping[str, HardWorld] = {  # what each look changes
    "dusk": replace(KEPT, plain=0.0),
    "shapes": replace(KEPT, plain=0.0, kinds={"objects": 2.0, "grid": 1.0, "texture": 1.0}),
    "runes": replace(KEPT, plain=0.0, kinds={"sign": 1.0}),
}
SHOWN = {
    "dusk": (
        "a red star at the top left, a blue ring at the middle right",
        "a green sign in 13% letters, CAT and DOG and SUN",
    ),
    "shapes": (
        "a red star at the top left, a blue ring at the middle right",
        "a 5x5 grid of green circles with a red star in row 2 column 4",
    ),
    "runes": ("a green sign in 13% letters, CAT and DOG and SUN", "a blue sign in 13% letters, RED and FOX and HAT"),
}
RATE = 1e-3


@dataclass(frozen=True)
class Lessons:
    """How many scenes there are at each size, how many make a batch there, and the steps, shared evenly by sizes.

    Of these sizes those are taught that the model was trained at, up to the one it is used at.
    """

    scenes: Mapping[int, int] = field(default_factory=lambda: {64: 2000, 128: 1500, 256: 750})
    batch: Mapping[int, int] = field(default_factory=lambda: {64: 64, 128: 32, 256: 10})
    steps: int = 1500


LESSONS = Lessons()


def scenes(look: str, count: int, seed: int) -> list[Scene]:
    """So many scenes in a look, none of them held out."""
    rng, out = random.Random(seed), list[Scene]()
    while len(out) < count:
        scene = sample(WORLDS[look], rng)
        if not held_out(scene.caption):
            out.append(restyle(scene, look))
    return out


@torch.inference_mode()
def taught(run: Run, model: Pocket, length: int, look: str, lessons: Lessons) -> dict[int, tuple[Tensor, Tensor]]:
    """Latents (half precision) and caption ids of the scenes at each size, made once."""
    path = run.folder / f"{look}-latents.pt"
    if not path.exists():
        out = dict[int, tuple[Tensor, Tensor]]()
        for size, count in lessons.scenes.items():
            found = scenes(look, run.count(count, 2), size)
            parts = rendered(found, size).split(50)
            latents = torch.cat([model.encode(unit(part).to(model.device)).half().cpu() for part in parts])
            out[size] = latents, tokenise([scene.caption for scene in found], WORDS, length)[0]
            log.info("encoded %d pictures at %d px", len(found), size)
        save_whole(out, path)
    saved: dict[int, tuple[Tensor, Tensor]] = torch.load(path, weights_only=True)
    return saved


def train(run: Run, look: str, lessons: Lessons, file: Path) -> State:
    """The adapter's tensors, in PEFT's layout.

    Raises:
        PieceOver: the minutes are over before; a checkpoint is written.
    """
    if (done := finished(run, look)) is not None:
        return done
    torch.manual_seed(0)
    header = open_pocket(file)
    model = load_pocket(file, device=run.device)
    words, length = text_sizes(header)
    data = taught(run, model, length, look, lessons)
    student, weights = attach_adapters(model.transformer)
    net = Trainee(model.transformer.params.hidden, HEAD, words=words, length=length)
    net.text, net.flow = model._text.requires_grad_(requires_grad=False), student
    optimiser = torch.optim.AdamW(list(weights.values()), lr=RATE, weight_decay=0.0, betas=(0.9, 0.99))

    def draw() -> Image.Image:
        drawer, sizes = model.with_flow(student, f"/{look}"), (model.info.low, model.info.size)
        chains = [mf.recipes.native(size=size, steps=flow.SHOWN_STEPS) for size in sizes]
        return grid([mf.run(chain, drawer, SHOWN[look], seed=0).pixels.cpu() for chain in chains])

    total = run.count(lessons.steps)
    loop = Loop(look, run, weights, [optimiser], total, factor=flat_then_linear(0.5), decay=0.99, draw=draw)
    first, began = loop.step, time.monotonic()
    for step in loop:
        size = list(data)[int(torch.randint(len(data), ()))]
        latents, ids = data[size]
        pick = torch.randint(len(latents), (run.items(lessons.batch[size]),))
        with run.autocast():
            losses = losses_at(net, latents[pick].to(run.device).float(), ids[pick].to(run.device), model.info.shift)
        loop.learn(losses.mean(), f"{size} px", len(pick))
        if step == first + 20:
            each = (time.monotonic() - began) / 20
            log.info("%.2f s a step: %.0f minutes for the other %d", each, each * (total - step) / 60, total - step)
        elif step == first:
            began = time.monotonic()
    return loop.finish()


def main() -> None:
    """One look of one model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("look", choices=LOOKS)
    parser.add_argument(
        "--model", type=Path, required=True, help="a file of pocket's weights that knows the hard world"
    )
    parser.add_argument("--out", type=Path, help="the folder (default: runs/transfer/MODEL)")
    parser.add_argument("--steps", type=int, default=LESSONS.steps)
    parser.add_argument("--batch", type=float, default=1.0, help="times as many pictures in every batch")
    parser.add_argument("--scale", type=float, default=1.0, help="times as many scenes and steps")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="of this piece")
    parser.add_argument("--threads", type=int, help="of the processor")
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16 on a processor that is faster in it")
    parser.add_argument("--device", default="cpu", help="auto, cpu or cuda")
    args = parser.parse_args()
    if args.steps < 1:
        parser.error(f"--steps {args.steps} is out of range")
    folder = args.out or Path("runs") / "transfer" / args.model.stem
    target = folder / f"{args.look}-lora.safetensors"
    try:
        device = choose_device(args.device)
        run = Run(
            folder / args.look,
            device,
            scale=args.scale,
            batch=args.batch,
            minutes=args.minutes,
            bf16=args.bf16,
            grid=500,
        )
        header = open_pocket(args.model)
        lessons = replace(LESSONS, steps=args.steps, scenes=in_use(LESSONS.scenes, facts(header)))
        words, _ = text_sizes(header)
        if words < len(WORDS):
            raise WeightsError(
                f"{args.model.name} knows {words} of the hard world's {len(WORDS)} words; take a pocket-4"
            )
        version = header.metadata.get("version", "")
        keep_settings(run, repr((version, args.look, lessons, WORLDS[args.look], RATE)))
        check_writable(target)
    except MrflowError as error:
        parser.error(str(error))
    if args.threads:
        torch.set_num_threads(args.threads)
    start_log(run.folder)
    try:
        tensors = train(run, args.look, lessons, args.model)
    except PieceOver as over:
        log.info("%s; the same command resumes", over)
        return
    export(tensors, {"model": version, "look": args.look, "trained": f"{run.count(args.steps)} steps"}, target)


if __name__ == "__main__":
    main()

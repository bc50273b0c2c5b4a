"""Trains a model of the older world from nothing: the recipe of pocket-3, which began with pocket-2's weights.

A recipe has one world or two: an easy one first, then the full one, which begins with the first's weights. In each:
autoencoder, flow with text encoder, super-resolution net. Then all parts go into NAME.safetensors, and a few-step
student is taught by it. Everything is under --out; what is there is not made again, and a part that was interrupted
goes on where it stopped. train.log keeps what was printed, grids/ what was drawn.

    python -m experiments.train_pocket --device cuda --workers 15     # eight minutes on an H200
    python -m experiments.train_pocket --scale 0.001 --out runs/trial
"""

import argparse
import re
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path

import torch

from experiments.train_pocket import autoencoder, flow, sr, student
from experiments.train_pocket.autoencoder import State
from experiments.train_pocket.data import WORLDS, start_log
from experiments.train_pocket.export import export
from experiments.train_pocket.flow import Course
from experiments.train_pocket.loop import Run, finished, keep_settings, log
from experiments.train_pocket.student import LESSONS, Lessons
from mrflow.errors import MrflowError
from mrflow.model_info import ModelInfo
from mrflow.models import choose_device
from mrflow.models.pocket.model import BASE, HEAD, WIDTH


@dataclass(frozen=True)
class Phase:
    """One world's training; numbers are steps, but for `seen`, the autoencoder's pictures of each size. The crops are
    those of a batch; `enlarged` are the sizes that the super-resolution net learns to double; `gan` as in sr.py."""

    world: str
    autoencoder: int
    seen: Mapping[int, int]
    flow: Course
    sr: int
    gan: float
    enlarged: tuple[int, ...] = (128,)
    autoencoder_crops: int = 3
    sr_crops: int = 8


@dataclass(frozen=True)
class Recipe:
    """All of one version."""

    phases: tuple[Phase, ...]
    lessons: Lessons
    info: ModelInfo
    width: int
    head: int


def two_sizes(low: int, both: int, share: float) -> Course:
    """128 px alone, then with 256 px; `share` is that of the larger."""
    return Course({128: 16000, 256: 5000}, {128: 32, 256: 8}, ((low, {128: 1.0}), (both, {128: 1 - share, 256: share})))


RECIPES = {
    "full": Recipe(
        phases=(
            Phase(
                "full",
                autoencoder=4000,
                seen={128: 6000, 256: 3000, 512: 1800},
                flow=Course(
                    pictures={128: 24000, 256: 30000, 512: 12000},
                    batch={128: 1536, 256: 512, 512: 128},
                    parts=(
                        (1800, {128: 0.4, 256: 0.6}),
                        (1800, {128: 0.15, 256: 0.45, 512: 0.4}),
                        (2900, {128: 0.12, 256: 0.33, 512: 0.55}),
                    ),
                ),
                sr=2000,
                gan=1.0,
                enlarged=(128, 256),
                autoencoder_crops=32,
                sr_crops=64,
            ),
        ),
        lessons=LESSONS,
        info=BASE,
        width=WIDTH,
        head=HEAD,
    ),
}


def main() -> None:
    """Run a recipe."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", choices=list(RECIPES), default=next(iter(RECIPES)))
    parser.add_argument("--name", help="of the version; without it, the recipe's")
    parser.add_argument("--out", type=Path, help="the folder of everything; without it, runs/ and the recipe's name")
    parser.add_argument("--device", default="cpu", help="auto, cpu or cuda")
    parser.add_argument("--batch", type=float, default=1.0, help="times as many pictures in every batch")
    parser.add_argument("--scale", type=float, default=1.0, help="of all counts of steps and pictures")
    parser.add_argument("--threads", type=int, help="of the processor")
    parser.add_argument(
        "--workers", type=int, default=0, help="processes that render, ahead of the training; they need memory"
    )
    parser.add_argument("--every", type=float, default=180.0, help="seconds between checkpoints")
    args = parser.parse_args()
    if args.workers < 0:
        parser.error(f"--workers {args.workers} is out of range")
    name = args.recipe if args.name is None else args.name
    if not re.fullmatch(r"[\w.-]+", name):
        parser.error(f"--name must be letters, digits, dots and dashes, got {name!r}")
    recipe, out = RECIPES[args.recipe], args.out or Path("runs") / args.recipe
    pool = ProcessPoolExecutor(args.workers, get_context("spawn")) if args.workers else None
    try:
        run = Run(out, choose_device(args.device), args.scale, args.batch, args.every, pool=pool)
        keep_settings(run, repr(recipe))
    except MrflowError as error:
        parser.error(str(error))
    if args.threads:
        torch.set_num_threads(args.threads)
    start_log(out)
    train(run, recipe, name)
    if pool is not None:
        pool.shutdown()


@dataclass(frozen=True)
class Parts:
    """Trained weights."""

    autoencoder: State
    flow: State
    sr: State


def phase_parts(run: Run, recipe: Recipe, phase: Phase, start: Parts | None) -> Parts:
    """Train one world's parts, from those of the world before."""
    world, here = WORLDS[phase.world], replace(run, folder=run.folder / phase.world)
    log.info("world %s, in %s", phase.world, here.folder)
    seen = autoencoder.sights(here, world, phase.seen) if finished(here, "autoencoder") is None else None
    drawn = finished(here, "flow") is not None or flow.latents_file(here, "flow").exists()
    images = None if drawn else flow.renders(here, world, phase.flow)
    auto = autoencoder.train(
        here,
        "autoencoder",
        world,
        phase.autoencoder,
        start.autoencoder if start else None,
        seen=phase.seen,
        crops=phase.autoencoder_crops,
        images=seen,
    )
    moved = flow.train(
        here,
        "flow",
        world,
        phase.flow,
        auto,
        info=recipe.info,
        width=recipe.width,
        head=recipe.head,
        start=start.flow if start else None,
        images=images,
    )
    larger = sr.train(
        here,
        "sr",
        world,
        phase.sr,
        auto,
        sizes=phase.enlarged,
        crops=phase.sr_crops,
        gan=phase.gan,
        start=start.sr if start else None,
    )
    return Parts(auto, moved, larger)


def train(run: Run, recipe: Recipe, name: str) -> tuple[Path, Path]:
    """Follow a recipe; gives the files of the model and of its student."""
    parts: Parts | None = None
    for phase in recipe.phases:
        parts = phase_parts(run, recipe, phase, parts)
    assert parts is not None
    model, adapter = run.folder / f"{name}.safetensors", run.folder / f"{name}-student.safetensors"
    facts = {
        "cfg": f"{recipe.info.cfg:g}",
        "recipe": repr(recipe.phases),
        "scale": f"{run.scale:g}",
        "batch": f"{run.batch:g}",
    }
    version = export(name, parts.flow, parts.autoencoder, parts.sr, model, facts)
    taught = student.train(run, "student", WORLDS[recipe.phases[-1].world], recipe.lessons, model)
    student.export(taught, student.said(version, recipe.lessons, run.count(recipe.lessons.steps)), adapter)
    log.info("made %s and %s", model, adapter)
    return model, adapter


if __name__ == "__main__":
    main()

"""Trains everything that is embedded in mrflow, and writes the files that it ships.

The recipe has two worlds: an easy one first, then the full one, which begins with the weights of the first. In each:
autoencoder, flow with text encoder, super-resolution net. Then all parts go into NAME.safetensors, and a few-step
student is taught by it. Everything is under --out; what is there is not made again, and a part that was interrupted
goes on where it stopped. train.log keeps what was printed, grids/ what was drawn.

    python -m experiments.train_pocket                       # about six hours on two cores
    python -m experiments.train_pocket --device cuda --batch 8 --out runs/on-gpu
    python -m experiments.train_pocket --scale 0.001 --out runs/trial
"""

import argparse
import math
import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from experiments.train_pocket import autoencoder, flow, sr, student
from experiments.train_pocket.autoencoder import State
from experiments.train_pocket.data import WORLDS, start_log
from experiments.train_pocket.export import export
from experiments.train_pocket.loop import Run, keep_settings, log
from mrflow.errors import MrflowError
from mrflow.models import choose_device
from mrflow.models.pocket.model import POCKET


@dataclass(frozen=True)
class Phase:
    """One world's training, in steps. `flow` is at the low resolution alone, then at both; `gan` as in sr.py."""

    world: str
    autoencoder: int
    flow: tuple[int, int]
    high_share: float
    sr: int
    gan: float


RECIPE = (
    Phase("pocket-1", autoencoder=1700, flow=(4100, 5100), high_share=0.7, sr=1300, gan=0.6),
    Phase("full", autoencoder=2600, flow=(7700, 8900), high_share=0.81, sr=2900, gan=1.0),
)


def main() -> None:
    """Run the recipe."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", default="pocket-2", help="of the version")
    parser.add_argument("--out", type=Path, default=Path("runs/pocket-2"), help="the folder of everything")
    parser.add_argument("--device", default="cpu", help="auto, cpu or cuda")
    parser.add_argument("--batch", type=int, default=1, help="times as many pictures in every batch")
    parser.add_argument("--scale", type=float, default=1.0, help="of all counts of steps and pictures")
    parser.add_argument("--threads", type=int, help="of the processor")
    parser.add_argument("--every", type=float, default=180.0, help="seconds between checkpoints")
    args = parser.parse_args()
    for name, fine in (("scale", 0 < args.scale < math.inf), ("batch", args.batch > 0), ("every", args.every >= 0)):
        if not fine:
            parser.error(f"--{name} {getattr(args, name)} is out of range")
    if not re.fullmatch(r"[\w.-]+", args.name):
        parser.error(f"--name must be letters, digits, dots and dashes, got {args.name!r}")
    try:
        run = Run(args.out, choose_device(args.device), args.scale, args.batch, args.every)
        keep_settings(run, [asdict(phase) for phase in RECIPE])
    except MrflowError as error:
        parser.error(str(error))
    if args.threads:
        torch.set_num_threads(args.threads)
    start_log(args.out)
    train(run, args.name)


@dataclass(frozen=True)
class Parts:
    """Trained weights."""

    autoencoder: State
    flow: State
    sr: State


def phase_parts(run: Run, phase: Phase, start: Parts | None) -> Parts:
    """Train one world's parts, from those of the world before."""
    world, here = WORLDS[phase.world], replace(run, folder=run.folder / phase.world)
    log.info("world %s, in %s", phase.world, here.folder)
    before = start.autoencoder if start else None
    auto = autoencoder.train(here, "autoencoder", world, phase.autoencoder, before)
    before = start.flow if start else None
    moved = flow.train(here, "flow", world, phase.flow, auto, high_share=phase.high_share, start=before)
    before = start.sr if start else None
    return Parts(auto, moved, sr.train(here, "sr", world, phase.sr, auto, gan=phase.gan, start=before))


def train(run: Run, name: str) -> tuple[Path, Path]:
    """Run the recipe; gives the files of the model and of its student."""
    first, *others = RECIPE
    parts = phase_parts(run, first, None)
    for phase in others:
        parts = phase_parts(run, phase, parts)
    model, adapter = run.folder / f"{name}.safetensors", run.folder / f"{name}-student.safetensors"
    facts = {"cfg": f"{POCKET.cfg:g}", "recipe": str(RECIPE), "scale": f"{run.scale:g}", "batch": str(run.batch)}
    version = export(name, parts.flow, parts.autoencoder, parts.sr, model, facts)
    taught = student.train(run, "student", WORLDS[RECIPE[-1].world], student.STEPS, model)
    student.export(taught, version, run.count(student.STEPS), adapter)
    log.info("made %s and %s; mrflow ships them from mrflow/models/pocket", model, adapter)
    return model, adapter


if __name__ == "__main__":
    main()

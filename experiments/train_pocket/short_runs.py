"""Model too small, latents too hard, or training too short? Short runs side by side, one thing changed in each.

Every run trains the flow from nothing on the easier world at 128 px, with the same batches of scenes and seeds, and
then draws held-out captions (12 guided steps). `ceiling` is the score of the captions' renders after the autoencoder.
Differences to the base are paired by caption, with 95 % bootstrap intervals over distinct captions; they know nothing
of the spread over training seeds. Runs that are done are not made again, and one that was interrupted goes on.

    python -m experiments.train_pocket.short_runs                  # all, about an hour and a half on one core
    python -m experiments.train_pocket.short_runs base wider       # some, and the table of all that are done
"""

import argparse
import json
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

import mrflow as mf
from experiments import pocket_scores
from experiments.pocket_scores import interval
from experiments.train_pocket import autoencoder, flow
from experiments.train_pocket.data import POCKET_1, rendered, start_log, unit
from experiments.train_pocket.loop import Run, keep_settings, part_file
from mrflow.checkpoints.safetensors import read_header
from mrflow.errors import MrflowError
from mrflow.models import choose_device
from mrflow.models.pocket.model import SMALL
from mrflow.records.pictures import write_bytes
from mrflow.scenes.grammar import held_out_captions, parse_caption
from mrflow.sweep import seed_of

SIZE, AUTOENCODER_STEPS, WIDTH, HEAD = 128, 1700, 128, 32
LATENTS = {"smooth": (0.1, 0.25), "plain": (0.06, 0.0)}  # noise and equivariance in the autoencoder's training
BASE = "base"


@dataclass(frozen=True)
class Arm:
    """What a run is made with. `jitter` moves objects by up to that fraction of the side."""

    steps: int = 1000
    width: int = WIDTH
    latents: str = "smooth"
    jitter: float = POCKET_1.jitter


ARMS = {
    BASE: Arm(),
    "longer": Arm(steps=2000),
    "wider": Arm(width=192),
    "plain-latents": Arm(latents="plain"),
    "free-places": Arm(jitter=0.08),
    "both": Arm(latents="plain", jitter=0.08),
}


def scores(images: NDArray[np.float32], captions: list[str]) -> list[float]:
    """Each picture against its caption."""
    return [row["overall"] for row in pocket_scores.table(images, list(captions))]


def arm(run: Run, name: str, captions: list[str]) -> None:
    """Train one run where it is not there, and write its scores beside it."""
    mine, place = ARMS[name], run.folder / f"{name}.json"
    if place.exists():
        return
    noise, equivariance = LATENTS[mine.latents]
    encoder = f"autoencoder-{mine.latents}"
    auto = autoencoder.train(run, encoder, POCKET_1, AUTOENCODER_STEPS, noise=noise, equivariance=equivariance)
    world = replace(POCKET_1, jitter=mine.jitter)
    course = flow.Course({SIZE: 16000}, {SIZE: 32}, ((mine.steps, {SIZE: 1.0}),))
    shared = f"{mine.latents}-{mine.jitter:g}"
    state = flow.train(run, name, world, course, auto, info=SMALL, width=mine.width, head=HEAD, shared=shared)
    net = flow.Trainee(mine.width, HEAD)
    net.load_state_dict(state)
    model = flow.backbone(net, auto, run.device, SMALL)
    chain = mf.recipes.native(size=(SIZE, SIZE), steps=12)
    drawn = pocket_scores.pictures(chain, model, captions, [seed_of(c, 0) for c in captions], batch=25)
    renders = unit(rendered([parse_caption(caption) for caption in captions], SIZE))
    with torch.inference_mode():
        back = autoencoder.round_trip(autoencoder.loaded(auto, run.device), renders)
    result = {
        "captions": captions,
        "scores": scores(drawn, captions),
        "ceiling": float(np.mean(scores(back.numpy(), captions))),
        "parameters": sum(p.numel() for p in net.parameters()),
        "seconds": float(read_header(part_file(run, name)).metadata["seconds"]),
    }
    write_bytes(place, json.dumps(result, indent=1).encode())


def table(run: Run) -> str:
    """A Markdown table of the runs that are done."""
    rng = np.random.default_rng(0)
    done = {name: json.loads(path.read_text()) for name in ARMS if (path := run.folder / f"{name}.json").exists()}
    head = "| run | steps of 32 | parameters | latents | places | seconds | ceiling | score | to the base, paired |"
    lines = [head, "|" + "---|" * 9]
    for name, row in done.items():
        mine, captions = ARMS[name], row["captions"]
        mean, low, high = interval(list(zip(captions, row["scores"], strict=True)), rng)
        paired = ""
        if name != BASE and BASE in done and done[BASE]["captions"] == captions:
            change = np.subtract(row["scores"], done[BASE]["scores"])
            paired = "{:+.2f} ({:+.2f} to {:+.2f})".format(*interval(list(zip(captions, change, strict=True)), rng))
        lines.append(
            f"| {name} | {run.count(mine.steps)} | {row['parameters'] / 1e6:.2f} M | {mine.latents} | "
            f"{100 * mine.jitter:g} % | {row['seconds']:.0f} | {row['ceiling']:.2f} | "
            f"{mean:.2f} ({low:.2f} to {high:.2f}) | {paired} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Make the runs that are named, and print the table of all that are done."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arms", nargs="*", metavar="run", help=f"of {', '.join(ARMS)}; all where none is named")
    parser.add_argument("--out", type=Path, default=Path("runs/short"), help="the folder of everything")
    parser.add_argument("--device", default="cpu", help="auto, cpu or cuda")
    parser.add_argument("--scale", type=float, default=1.0, help="of all counts of steps and pictures")
    parser.add_argument("--captions", type=int, default=150, help="held out, to score")
    parser.add_argument("--threads", type=int, help="of the processor")
    args = parser.parse_args()
    if unknown := set(args.arms) - set(ARMS):
        parser.error(f"no run is called {', '.join(sorted(unknown))}; there are {', '.join(ARMS)}")
    if not 0 < args.scale < math.inf or args.captions < 1:
        parser.error(f"--scale {args.scale} or --captions {args.captions} is out of range")
    try:
        run = Run(args.out, choose_device(args.device), args.scale)
        keep_settings(run, {"runs": {name: asdict(each) for name, each in ARMS.items()}, "captions": args.captions})
    except MrflowError as error:
        parser.error(str(error))
    if args.threads:
        torch.set_num_threads(args.threads)
    start_log(args.out)
    captions = held_out_captions(POCKET_1, args.captions)
    for name in args.arms or ARMS:
        arm(run, name, captions)
    print(table(run))


if __name__ == "__main__":
    main()

"""What of the hard world does a model draw, by size of detail, and what do the paths alone keep?

Held-out captions, the same number of each kind and size of detail. Rows that draw nothing: the truth (rendered), the
truth through the autoencoder, the truth through the staged path (rendered at half the side, autoencoder,
super-resolution, autoencoder), the mean of many renderings of a caption through the autoencoder (what one forward can
know), and the truth held against another caption of its kind. The last line counts only the sizes that the autoencoder
keeps. Rows that sample: one unguided forward, native, staged.
Each picture has a seed of its own, the same in all rows. Intervals of 95 % over captions as in sweeps. With --out, an
interrupted run goes on after the last size of detail that was done.

    python -m experiments.hard_scores --rows truth autoencoder "staged path" mean other     # minutes: no sampling
    python -m experiments.hard_scores --model runs/pocket-4/pocket-4.safetensors --captions 6 --out runs/hard.json
"""

import argparse
import json
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import mrflow as mf
from experiments.failures.details import DETAILS
from experiments.pocket_scores import by_caption, pictures, seeds_of
from experiments.train_pocket.data import rendered, unit
from mrflow.errors import MrflowError
from mrflow.models.pocket.model import SHIPPED, Pocket, facts, load_pocket, open_pocket
from mrflow.records.pictures import check_writable, write_bytes
from mrflow.scenes.hard import HARD, fill_hard, held_out_hard_captions, parse_hard
from mrflow.scenes.legible import READ_BY, hard_score
from mrflow.sweep import interval

Chain = mf.Chain[mf.Start, mf.Pixels]
DRAWS = 60  # renderings in a mean
DOSES = {
    **{f"{name} {size}": (d.kind, world) for name, d in DETAILS.items() for size, world in d.worlds.items()},
    "objects": ("objects", HARD),
}
SHOWN = 0.8  # of the truth through the autoencoder: sizes of detail that a picture of this size can show at all
PATHS = ("truth", "autoencoder", "staged path", "mean", "other")


def captions_of(dose: str, count: int, *, seed: int = 0) -> list[str]:
    """Held-out captions of one kind and size of detail."""
    kind, world = DOSES[dose]
    return held_out_hard_captions(world, count, kind=kind, seed=seed)


def others_of(dose: str, count: int) -> list[str]:
    """Captions of the same kind, of any size of detail."""
    return held_out_hard_captions(HARD, count, kind=DOSES[dose][0], seed=1)


def truths(captions: list[str], side: int, *, draw: int = 0) -> Tensor:
    """Each caption rendered once, (n, 3, side, side) in [0, 1]: the same draw at every side."""
    scenes = [
        fill_hard(parse_hard(text), HARD, random.Random(seed + draw))
        for text, seed in zip(captions, seeds_of(captions), strict=True)
    ]
    return unit(rendered(scenes, side))


def chains(size: int, steps: list[int]) -> dict[str, Chain]:
    """What samples: guided natively in so many steps, staged in so many and one."""
    whole, low = (size, size), (size // 2, size // 2)
    return {
        "one forward": mf.recipes.native(size=whole, steps=1, guidance=mf.CFG(1.0)),
        **{f"native {n}": mf.recipes.native(size=whole, steps=n) for n in steps},
        **{f"staged {n} + 1": mf.recipes.paper(low=low, size=whole, steps=n) for n in steps},
    }


@torch.inference_mode()
def images_of(row: str, model: Pocket, size: int, captions: list[str], steps: list[int]) -> NDArray[np.float32]:
    """A row's pictures of the captions, (n, 3, size, size)."""

    def through(x: Tensor) -> Tensor:
        return torch.cat([model.decode(model.encode(part.to(model.device))).clamp(0, 1).cpu() for part in x.split(8)])

    def enlarged(x: Tensor) -> Tensor:
        return torch.cat([model.upscaler(part.to(model.device)).clamp(0, 1).cpu() for part in x.split(8)])

    drawn: dict[str, Callable[[], Tensor]] = {
        "truth": lambda: truths(captions, size),
        "other": lambda: truths(captions, size),
        "autoencoder": lambda: through(truths(captions, size)),
        "staged path": lambda: through(enlarged(through(truths(captions, size // 2)))),
        "mean": lambda: through(torch.stack([truths(captions, size, draw=i) for i in range(DRAWS)]).mean(0)),
    }
    if row in drawn:
        return drawn[row]().numpy()
    return pictures(chains(size, steps)[row], model, captions, seeds_of(captions), 8)


def main() -> None:
    """Print a Markdown table: a line a size of detail and category, a column a row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=next(iter(SHIPPED.values())), help="a file of pocket's weights")
    parser.add_argument("--captions", type=int, default=20, help="of each size of detail")
    parser.add_argument("--size", type=int, help="of the side (default: the model's); the low stage's is half")
    parser.add_argument("--steps", type=int, nargs="+", default=[12], help="of native and staged sampling")
    parser.add_argument("--rows", nargs="+", help="(default: all)")
    parser.add_argument("--doses", nargs="+", help="sizes of detail, such as 'letters 8%%' (default: all)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--out", type=Path, help="a JSON file of all scores")
    args = parser.parse_args()
    try:
        args.size = args.size or facts(open_pocket(args.model)).size[0]
    except MrflowError as error:
        parser.error(str(error))
    rows, doses = [*PATHS, *chains(args.size, args.steps)], list(DOSES)
    for given, known in ((args.rows, rows), (args.doses, doses)):
        if unknown := set(given or ()) - set(known):
            parser.error(f"no row or size is called {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    if args.captions < 2 or args.size < 64 or args.size % 32:
        parser.error("--captions must be at least 2, --size a multiple of 32 from 64 on")
    if args.out is not None:
        check_writable(args.out)
    model = load_pocket(args.model, device=torch.device(args.device))
    print(f"{model.info.version}, {args.captions} captions a size of detail, {args.size} px\n", flush=True)
    rows, doses = args.rows or rows, args.doses or doses
    print(f"| detail | read | {' | '.join(rows)} |\n|{'---|' * (len(rows) + 2)}", flush=True)
    settings = [model.info.version, args.captions, args.size, rows]
    kept = _resumed(args.out, settings)
    for dose in doses:
        captions = captions_of(dose, args.captions)
        rest = [] if dose in kept else rows
        mine = kept.setdefault(dose, {})
        for row in rest:
            images = images_of(row, model, args.size, captions, args.steps)
            against = others_of(dose, args.captions) if row == "other" else captions
            mine[row] = [hard_score(image, caption) for image, caption in zip(images, against, strict=True)]
        print("\n".join(_lines(dose, captions, mine)), flush=True)
        if args.out is not None:
            write_bytes(args.out, json.dumps({"settings": settings, "scores": kept}).encode())
    print(_mean("all", {row: [kept[dose][row] for dose in doses] for row in rows}))
    if "autoencoder" in rows and (some := [d for d in doses if _overall(kept[d]["autoencoder"]) >= SHOWN]):
        print(_mean(f"shown: {', '.join(some)}", {row: [kept[dose][row] for dose in some] for row in rows}))


Scores = dict[str, dict[str, list[dict[str, float]]]]  # by size of detail and row, of each picture


def _resumed(path: Path | None, settings: list[object]) -> Scores:
    """What a file of the same settings has; one of others is begun anew."""
    if path is None or not path.is_file():
        return {}
    found = json.loads(path.read_text())
    return found["scores"] if found["settings"] == settings else {}


def _overall(scores: list[dict[str, float]]) -> float:
    return float(np.mean([each["overall"] for each in scores]))


def _mean(name: str, scores: dict[str, list[list[dict[str, float]]]]) -> str:
    """A line of means over sizes of detail."""
    return f"| {name} | overall | {' | '.join(f'{np.mean([*map(_overall, of)]):.2f}' for of in scores.values())} |"


def _lines(dose: str, captions: list[str], scores: dict[str, list[dict[str, float]]]) -> list[str]:
    """A line for each category that is read: means and their intervals over captions."""
    first = next(iter(scores.values()))[0]
    lines: list[str] = []
    for category in (c for c in READ_BY if c in first):
        found = [
            interval(by_caption([(c, s[category]) for c, s in zip(captions, row, strict=True)]), draws=4000, share=True)
            for row in scores.values()
        ]
        cells = " | ".join(f"{i:.2f}" for i in found)
        lines.append(f"| {dose} | {category} | {cells} |")
    return lines


if __name__ == "__main__":
    main()

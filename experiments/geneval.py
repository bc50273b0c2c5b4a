"""GenEval (arXiv 2310.11513): does a chain draw the objects, counts, colours and places that a prompt names?

`draw` makes the 553 prompts in exactly the layout that the official `evaluate_images.py` reads: FOLDER/00000/
metadata.jsonl and samples/0000.png to 0003.png, lossless, each with its mrflow record; run again, it goes on. `score`
reads what that script wrote (results.jsonl): the official score from counts, ours by slices, and what differences it
can resolve. `--against` holds a second run beside it, paired by prompt.

    python -m experiments.geneval draw runs/geneval/paper --model FLUX.1-dev --chain paper --sr RealESRGAN_x2plus.pth
    python -m experiments.geneval score results-paper.jsonl --against results-native.jsonl
"""

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from experiments.drawing import Task, draw, guarded, options, quantiles, read_lines, resampled, write_text
from mrflow.errors import PlanError
from mrflow.records.pictures import write_png

PROMPTS = Path(__file__).parent / "data" / "geneval.jsonl"
TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
# Things that are small in most photographs: the choice is ours.
SMALL = frozenset(
    [
        *(
            "fork",
            "knife",
            "spoon",
            "toothbrush",
            "scissors",
            "cell phone",
            "computer mouse",
            "tv remote",
            "book",
            "tie",
        ),
        *("sports ball", "baseball bat", "baseball glove", "frisbee", "wine glass", "hair drier", "kite", "bottle"),
        *("cup", "clock"),
    ]
)
DRAWS = 4000

Metadata = Mapping[str, Any]


def small(prompt: Metadata) -> bool:
    """Whether a prompt asks for a small thing."""
    return any(part["class"] in SMALL for part in prompt["include"])


def tagged(task: str, prompt: Metadata) -> bool:
    """Whether a prompt is of a task."""
    return bool(prompt["tag"] == task)


SLICES: dict[str, Callable[[Metadata], bool]] = {
    "small objects": small,
    "no small object": lambda p: not small(p),
    "four of a kind": lambda p: any(part["count"] == 4 for part in p["include"]),
    "a person": lambda p: any(part["class"] == "person" for part in p["include"]),
}


def prompts() -> list[dict[str, Any]]:
    """The 553 records, in the published order."""
    return read_lines(PROMPTS)


def tasks(folder: Path, samples: int) -> list[Task]:
    """Where each prompt's pictures go."""

    def done(place: Path) -> bool:
        return all((place / "samples" / f"{i:04d}.png").is_file() for i in range(samples))

    def keep(place: Path, prompt: Metadata, images: list[Image.Image], records: list[object]) -> None:
        (place / "samples").mkdir(parents=True, exist_ok=True)
        write_text(place / "metadata.jsonl", json.dumps(prompt) + "\n")
        for i, (image, record) in enumerate(zip(images, records, strict=True)):
            write_png(place / "samples" / f"{i:04d}.png", image, record)

    return [
        Task(f"{i:05d}", p["prompt"], partial(done, folder / f"{i:05d}"), partial(keep, folder / f"{i:05d}", p))
        for i, p in enumerate(prompts())
    ]


class Results:
    """Correct and all pictures of each prompt, by its text and conditions."""

    def __init__(self, rows: Sequence[Mapping[str, object]], source: object = "results") -> None:
        known = {json.dumps(p, sort_keys=True): p for p in prompts()}
        self.counts: dict[str, list[int]] = {}
        for number, row in enumerate(rows, 1):
            metadata, correct = row.get("metadata"), row.get("correct")
            table = json.loads(metadata) if isinstance(metadata, str) else metadata
            key = json.dumps(table, sort_keys=True)
            if key not in known:
                raise PlanError(f"{source}, line {number}: its metadata are none of GenEval's 553 prompts")
            if not isinstance(correct, bool | int):
                raise PlanError(f"{source}, line {number}: correct must be true or false, got {correct!r}")
            pair = self.counts.setdefault(key, [0, 0])
            pair[0] += int(correct)
            pair[1] += 1
        self.known = known
        missing = [t for t in TASKS if not self.of(partial(tagged, t))]
        if missing:
            raise PlanError(f"{source} has no picture of {', '.join(missing)}: the score is the mean of all six tasks")

    def of(self, chosen: Callable[[Metadata], bool]) -> list[str]:
        """The keys of prompts that are here and chosen."""
        return [key for key in self.counts if chosen(self.known[key])]

    def rate(self, keys: Sequence[str]) -> float:
        """Correct pictures over all pictures, as the official script counts them."""
        return sum(self.counts[k][0] for k in keys) / sum(self.counts[k][1] for k in keys)

    def table(self, keys: Sequence[str]) -> NDArray[np.float64]:
        """(prompts, 2): correct, all."""
        return np.array([self.counts[k] for k in keys], dtype=np.float64)

    def by_task(self) -> dict[str, list[str]]:
        """The keys of each task."""
        return {task: self.of(partial(tagged, task)) for task in TASKS}

    def overall(self) -> float:
        """The plain mean of the six task scores: the official score."""
        return sum(self.rate(keys) for keys in self.by_task().values()) / len(TASKS)


def spread(tables: Sequence[NDArray[np.float64]], rng: np.random.Generator) -> NDArray[np.float64]:
    """Bootstrap draws of the mean over groups of (sum of column 0 / sum of column 1), resampling prompts in each."""
    total = np.zeros(DRAWS)
    for table in tables:
        sums = table[resampled(len(table), DRAWS, rng)].sum(1)
        total += sums[:, 0] / sums[:, 1]
    return total / len(tables)


def standard_errors(results: Results) -> tuple[float, float]:
    """Of the overall score: pictures of a prompt taken as independent, and as one."""
    independent = together = 0.0
    for keys in results.by_task().values():
        rate, table = results.rate(keys), results.table(keys)
        independent += rate * (1 - rate) / table[:, 1].sum()
        together += rate * (1 - rate) / len(keys)
    return independent**0.5 / len(TASKS), together**0.5 / len(TASKS)


def report(results: Results, other: Results | None = None) -> list[str]:
    """Lines of Markdown."""
    rng = np.random.default_rng(0)
    groups = {**results.by_task(), **{name: results.of(f) for name, f in SLICES.items()}}
    rows = [(name, [keys]) for name, keys in groups.items() if keys]
    rows.insert(len(TASKS), ("overall", list(results.by_task().values())))
    head = "| task or slice | prompts | pictures | score [95 %] |"
    lines = [head + (" other | difference [95 %] | |" if other else ""), "|---" * (7 if other else 4) + "|"]
    for name, parts in rows:
        tables = [results.table(keys) for keys in parts]
        low, high = quantiles(spread(tables, rng))
        value = sum(results.rate(keys) for keys in parts) / len(parts)
        pictures = int(sum(t[:, 1].sum() for t in tables))
        line = f"| {name} | {sum(map(len, parts))} | {pictures} | {value:.4f} [{low:.4f}, {high:.4f}] |"
        lines.append(line + (compared(results, other, parts, rng) if other else ""))
    alone, together = standard_errors(results)
    lines += [
        "",
        f"Standard error of the overall score: {alone:.4f} if a prompt's pictures are independent, {together:.4f} if "
        f"they are alike. Two runs on different seeds are told apart from {2 * 2**0.5 * alone:.3f} to "
        f"{2 * 2**0.5 * together:.3f}; the paired column, on equal seeds, says what this pair shows.",
    ]
    return lines


def compared(a: Results, b: Results, parts: Sequence[Sequence[str]], rng: np.random.Generator) -> str:
    """b's score, and a - b paired by prompt."""
    shared = [[k for k in keys if k in b.counts] for keys in parts]
    if not all(shared):
        return " | | |"
    total = np.zeros(DRAWS)
    theirs = value = 0.0
    for keys in shared:
        x, y, pick = a.table(keys), b.table(keys), resampled(len(keys), DRAWS, rng)
        total += x[pick, 0].sum(1) / x[pick, 1].sum(1) - y[pick, 0].sum(1) / y[pick, 1].sum(1)
        theirs += b.rate(keys)
        value += a.rate(keys) - b.rate(keys)
    low, high = quantiles(total / len(shared))
    verdict = "better" if low > 0 else "worse" if high < 0 else "not shown"
    count = len(shared)
    return f" {theirs / count:.4f} | {value / count:+.4f} [{low:+.4f}, {high:+.4f}] | {verdict} |"


def main() -> int:
    """Draw, or print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    making = verbs.add_parser("draw", help="make the pictures")
    making.add_argument("folder", type=Path)
    options(making)
    scoring = verbs.add_parser("score", help="read the official script's results")
    scoring.add_argument("results", type=Path)
    scoring.add_argument("--against", type=Path)
    args = parser.parse_args()
    if args.verb == "draw":
        args.folder.mkdir(parents=True, exist_ok=True)
        return 4 if draw(tasks(args.folder, args.samples), args, args.folder / "errors.jsonl") else 0
    other = Results(read_lines(args.against), args.against) if args.against else None
    print("\n".join(report(Results(read_lines(args.results), cast(Path, args.results)), other)))
    return 0


if __name__ == "__main__":
    guarded(main)

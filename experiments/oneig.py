"""OneIG-Bench (arXiv 2506.07977): where does a chain lose text, faces and detail?

The prompts are CC BY-NC 4.0 and not part of mrflow: `draw` reads your copy (OneIG-Bench.csv) and writes exactly the
layout that the official scripts read, IMAGES/{anime,human,object,text,reasoning,multilingualism}/NAME/000.webp, a grid
of 2 x 2 pictures. The official grid is lossy by default; this one is lossless, and every picture lies beside it as a
PNG with its record, under TILES. Run again, it goes on.

`text` computes the official text score from what an OCR read (`--readings`, JSON lines of id, tile and text; or
`--ocr module:function`, which is given paths and returns texts), keeps the counts, and scores the slices of small text,
many words and long text, each with an interval over prompts.

    python -m experiments.oneig draw images --csv OneIG-Bench.csv --name paper --model Qwen-Image --sets text human
    python -m experiments.oneig text tiles --name paper --content scripts/text/text_content.csv --ocr my_ocr:read
"""

import argparse
import csv
import importlib
import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from experiments.drawing import Task, draw, guarded, options, quantiles, read_lines, resampled, write_text
from mrflow.errors import PlanError
from mrflow.records.pictures import write_bytes, write_png
from mrflow.sweep.metrics import edit_distance

FOLDERS = {"anime": "anime", "portrait": "human", "human": "human", "object": "object", "text": "text",
           "reasoning": "reasoning", "multilingual": "multilingualism"}  # fmt: skip
# Slices of the text set by the benchmark's own classes.
SLICES: dict[str, tuple[str, ...]] = {
    "many small words": ("ppt", "menu", "advertising", "long text"),
    "small text in scene": ("blackboard", "natural scene"),
    "long text": ("long text",),
    "large letters": ("poster", "artistic", "graffiti", "floating frame"),
}
FACES = ("group", "crowd", "people", "full-body", "full body", "standing")
DETAIL = ("texture", "jewel", "pattern", "embroider", "ornate", "intricate", "lace", "detailed")
DRAWS = 4000
KEPT = re.compile(r"[^A-Za-z0-9àâäéèêëîïôöùûüÿçœæÀÂÄÉÈÊËÎÏÔÖÙÛÜŸÇŒÆ\u4e00-\u9fff\s]")


@dataclass(frozen=True)
class Prompt:
    """One row of the benchmark's table."""

    folder: str
    id: str
    prompt: str
    kind: str


def prompts(path: Path) -> list[Prompt]:
    """The rows of OneIG-Bench.csv.

    Raises:
        PlanError: the file is missing, or lacks a column, or names a set that is not known.
    """
    out: list[Prompt] = []
    for number, row in enumerate(_table(path), 2):
        text = next((row[c] for c in ("prompt", "prompt_en", "prompt_cn", "prompt_zh") if row.get(c)), None)
        category = row.get("category", "").lower()
        folder = next((name for word, name in FOLDERS.items() if word in category), None)
        if not text or not row.get("id") or folder is None:
            raise PlanError(f"{path}, line {number}: category, id and prompt are needed, got {dict(row)}")
        out.append(Prompt(folder, row["id"].zfill(3), text, row.get("class", "")))
    return out


def _table(path: Path) -> list[dict[str, str]]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as f:
            return list(csv.DictReader(f))
    except OSError as error:
        raise PlanError(f"{path} cannot be read ({error.strerror}); see the hub, OneIG-Bench/OneIG-Bench") from None
    except (csv.Error, UnicodeDecodeError) as error:
        raise PlanError(f"{path} is not a table: {error}") from None


def tasks(rows: Sequence[Prompt], images: Path, tiles: Path, name: str, samples: int) -> list[Task]:
    """Where each prompt's grid and pictures go."""

    def keep(row: Prompt, pictures: list[Image.Image], records: list[object]) -> None:
        place = tiles / row.folder / name
        place.mkdir(parents=True, exist_ok=True)
        for i, (picture, record) in enumerate(zip(pictures, records, strict=True)):
            write_png(place / f"{row.id}-{i}.png", picture, record)
        (images / row.folder / name).mkdir(parents=True, exist_ok=True)
        write_bytes(images / row.folder / name / f"{row.id}.webp", webp(grid(pictures)))

    return [
        Task(f"{r.folder}/{r.id}", r.prompt, (images / r.folder / name / f"{r.id}.webp").is_file, partial(keep, r))
        for r in rows
    ]


def grid(pictures: Sequence[Image.Image]) -> Image.Image:
    """k x k pictures, row by row, as the official splitter cuts them."""
    side = round(len(pictures) ** 0.5)
    width, height = pictures[0].size
    sheet = Image.new("RGB", (side * width, side * height))
    for i, picture in enumerate(pictures):
        sheet.paste(picture, (i % side * width, i // side * height))
    return sheet


def webp(image: Image.Image) -> bytes:
    """Lossless, and exact."""
    from io import BytesIO

    buffer = BytesIO()
    image.save(buffer, "WEBP", lossless=True, exact=True)
    return buffer.getvalue()


# The official text score


@dataclass(frozen=True)
class Reading:
    """One picture's counts: edits to the wanted text, its characters, exact or not, words matched and wanted."""

    id: str
    tile: int
    edits: int
    characters: int
    exact: int
    matched: int
    words: int


def cleaned(text: str) -> str:
    """Letters, digits, French accents, CJK and single blanks: the benchmark's normalisation of both sides."""
    return re.sub(r"\s+", " ", KEPT.sub("", text)).strip()


def counted(id: str, tile: int, wanted: str, read: str) -> Reading:
    """The counts of one picture."""
    want, have = cleaned(wanted), cleaned(read)
    words = Counter(want.split())
    matched = sum((words & Counter(have.split())).values())
    edits = edit_distance(have, want)
    return Reading(id, tile, edits, len(want), int(edits == 0), matched, sum(words.values()))


def text_score(sums: NDArray[np.float64], most: int = 100) -> NDArray[np.float64]:
    """1 - min(M, ED) (1 - CR) (1 - WAC) / M from sums of (edits, exact, matched, words, pictures), shape (..., 5).

    M is 100 for English, 50 for Chinese. The three terms are averaged over the whole set before they are multiplied:
    the score of a slice is not the mean of its prompts' scores.
    """
    edits, exact, matched, words, pictures = np.moveaxis(sums, -1, 0)
    lost = np.minimum(most, edits / pictures) * (1 - exact / pictures) * (1 - matched / words)
    return np.asarray(1 - lost / most)


def clipped(reading: Reading) -> float:
    """Edits over characters, at most 1: a length-normalised distance, which no long prompt can carry alone."""
    return min(1.0, reading.edits / max(1, reading.characters))


def of_class(classes: Sequence[str], kind: str) -> bool:
    """Whether a prompt's class is one of those."""
    return any(word in kind.lower() for word in classes)


def report(readings: Sequence[Reading], kinds: Mapping[str, str], most: int) -> list[str]:
    """Lines of Markdown: the official score, then slices, with 95 % intervals over prompts."""
    rng = np.random.default_rng(0)
    lines = ["| slice | prompts | pictures | text score [95 %] | ED | CR | WAC | clipped distance |", "|---" * 8 + "|"]
    groups: dict[str, Callable[[str], bool]] = {"all": lambda _: True}
    groups |= {name: partial(of_class, classes) for name, classes in SLICES.items()}
    for name, chosen in groups.items():
        by_prompt: dict[str, list[Reading]] = {}
        for reading in readings:
            if chosen(kinds.get(reading.id, "")):
                by_prompt.setdefault(reading.id, []).append(reading)
        if not by_prompt:
            continue
        table = np.array(
            [
                [sum(getattr(r, f) for r in rs) for f in ("edits", "exact", "matched", "words")] + [len(rs)]
                for rs in by_prompt.values()
            ],
            dtype=np.float64,
        )
        sums = table.sum(0)
        low, high = quantiles(text_score(table[resampled(len(table), DRAWS, rng)].sum(1), most))
        far = float(np.mean([clipped(r) for rs in by_prompt.values() for r in rs]))
        edits, exact, matched, words, pictures = sums
        lines.append(
            f"| {name} | {len(table)} | {int(pictures)} | {float(text_score(sums, most)):.4f} [{low:.4f}, {high:.4f}] "
            f"| {edits / pictures:.2f} | {exact / pictures:.3f} | {matched / words:.3f} | {far:.3f} |"
        )
    return lines


def read_content(path: Path) -> dict[str, str]:
    """The wanted text of each prompt (the benchmark's text_content.csv)."""
    rows = _table(path)
    if not rows or not {"id", "text_content"} <= set(rows[0]):
        raise PlanError(f"{path} needs the columns id and text_content")
    return {row["id"].zfill(3): row["text_content"] for row in rows}


def plugged(name: str) -> Callable[[list[Path]], list[str]]:
    """The OCR function that `module:function` names."""
    module, _, function = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise PlanError(f"--ocr {name}: {error}") from None
    read: Callable[[list[Path]], list[str]] = found
    return read


def readings(args: argparse.Namespace, wanted: Mapping[str, str]) -> list[Reading]:
    """Counts from what was read, or from the OCR."""
    if args.readings:
        rows = read_lines(args.readings)
        texts = {(str(r["id"]).zfill(3), int(str(r["tile"]))): str(r["text"]) for r in rows}
    elif args.ocr:
        read, texts = plugged(args.ocr), {}
        for path in sorted((args.tiles / "text" / args.name).glob("*.png")):
            id, _, tile = path.stem.rpartition("-")
            texts[id, int(tile)] = read([path])[0]
    else:
        raise PlanError("say what reads the pictures: --readings FILE, or --ocr module:function")
    unknown = sorted({id for id, _ in texts} - set(wanted))
    if unknown:
        raise PlanError(f"no wanted text for {', '.join(unknown[:5])}: is --content of this benchmark?")
    if not texts:
        raise PlanError("there is nothing to score: no picture was read")
    missing = len(set(wanted) - {id for id, _ in texts})
    if missing:
        print(f"{missing} of {len(wanted)} prompts have no picture; the official script leaves them out silently")
    return [counted(id, tile, wanted[id], text) for (id, tile), text in sorted(texts.items())]


def main() -> int:
    """Draw, or print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    making = verbs.add_parser("draw", help="make the pictures")
    making.add_argument("images", type=Path)
    making.add_argument("--tiles", type=Path, help="folder of single pictures; beside IMAGES unless said")
    making.add_argument("--csv", type=Path, required=True)
    making.add_argument("--name", required=True, help="of the method, as the official scripts are told")
    making.add_argument("--sets", nargs="+", default=sorted(set(FOLDERS.values())))
    making.add_argument(
        "--slice", choices=("faces", "detail"), help="only prompts that speak of small faces, or of detail"
    )
    options(making)
    scoring = verbs.add_parser("text", help="the text score, from counts")
    scoring.add_argument("tiles", type=Path)
    scoring.add_argument("--name", default="")
    scoring.add_argument("--content", type=Path, required=True)
    scoring.add_argument("--csv", type=Path, help="OneIG-Bench.csv, for slices by class")
    scoring.add_argument("--readings", type=Path)
    scoring.add_argument("--ocr")
    scoring.add_argument("--mode", choices=("EN", "ZH"), default="EN")
    scoring.add_argument("--counts", type=Path, help="where to keep the counts, JSON lines")
    args = parser.parse_args()
    if args.verb == "draw":
        if round(args.samples**0.5) ** 2 != args.samples:
            raise PlanError(f"--samples must be a square (1, 4, 9) to fill the grid, got {args.samples}")
        words = {"faces": FACES, "detail": DETAIL}.get(args.slice or "", ())
        rows = [r for r in prompts(args.csv) if r.folder in args.sets]
        rows = [r for r in rows if not words or any(w in r.prompt.lower() for w in words)]
        args.images.mkdir(parents=True, exist_ok=True)
        tiles = args.tiles or args.images.with_name(f"{args.images.name}-tiles")
        made = tasks(rows, args.images, tiles, args.name, args.samples)
        return 4 if draw(made, args, args.images / "errors.jsonl") else 0
    wanted = read_content(args.content)
    kinds = {p.id: p.kind for p in prompts(args.csv) if p.folder == "text"} if args.csv else {}
    found = readings(args, wanted)
    if args.counts:
        write_text(args.counts, "".join(json.dumps(asdict(r)) + "\n" for r in found))
    print("\n".join(report(found, kinds, 100 if args.mode == "EN" else 50)))
    return 0


if __name__ == "__main__":
    guarded(main)

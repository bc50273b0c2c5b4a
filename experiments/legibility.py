"""From which height on is small text legible, after an autoencoder, a staged path, a refining step?

For any model that can be loaded. Pages of random words are drawn at known heights; every row sends them through a part
of the method and an OCR reads each word from its own box. No row samples a picture from noise: these are ceilings, what
the rest could at best keep. `picture` shows that the reader reads, `other` (each word held against another) that it
does not read what is not there.

    python -m experiments.legibility --model black-forest-labs/FLUX.1-dev --out runs/legibility-flux.json
    python -m experiments.legibility --model pocket --size 512 --heights 12 16 24 --pages 1 --ocr my_ocr:read

The reader is `experiments.real.reader:read_line` (`make test-real` installs it); `--ocr module:function` names another,
from an array (height, width, 3) of bytes to text. Run again with the same --out, it goes on.
"""

import argparse
import hashlib
import json
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

import mrflow as mf
from experiments.asking import exit_code
from experiments.failures.crossing import crossing
from mrflow.cli.parsing import upscaler as upscaler_of
from mrflow.errors import PlanError
from mrflow.models import info
from mrflow.records.pictures import check_writable, write_bytes
from mrflow.sweep import interval
from mrflow.sweep.metrics import edit_distance

Reader = Callable[[Any], str]
Box = tuple[int, int, int, int]
HEIGHTS = (6, 8, 10, 12, 16, 24, 32)
MARGIN, LINE = 0.06, 2.2  # of the side; of a letter's height, from one line to the next


@dataclass(frozen=True)
class Page:
    """Pixels (1, 3, side, side) in [0, 1], its words, and the box of each (left, top, right, bottom)."""

    pixels: Tensor
    words: tuple[str, ...]
    boxes: tuple[Box, ...]

    @property
    def prompt(self) -> str:
        """What a refining step is told."""
        return f"a pale page with dark printed text that reads: {' '.join(self.words[:24])}"


def page(side: int, height: int, number: int, font: Path | None = None) -> Page:
    """A page of random words whose capitals are `height` pixels high; equal arguments give equal pages.

    Raises:
        PlanError: no word fits.
    """
    rng = random.Random(1000 * height + number)
    face = _face(font, height)
    tint = tuple(rng.randint(215, 255) for _ in range(3))
    ink = tuple(rng.randint(0, 60) for _ in range(3))
    image = Image.new("RGB", (side, side), tint)
    draw, words, boxes = ImageDraw.Draw(image), list[str](), list[Box]()
    edge = round(MARGIN * side)
    y = edge + rng.randint(0, height)
    while y + 2 * height < side - edge:
        x = edge + rng.randint(0, 3 * height)
        while True:
            word = _word(rng)
            left, top, right, bottom = (int(v) for v in draw.textbbox((x, y), word, font=face))
            if right > side - edge:
                break
            draw.text((x, y), word, font=face, fill=ink)
            room = max(2, height // 4)
            words.append(word)
            boxes.append((left - room, top - room, right + room, bottom + room))
            x = right + 2 * height
        y += max(round(LINE * height), (side - 2 * edge) // 24)
    if not words:
        raise PlanError(f"no word of {height} px fits a picture of {side} px; give larger pictures or smaller heights")
    pixels = torch.tensor(np.asarray(image)).permute(2, 0, 1)[None].float() / 255
    return Page(pixels, tuple(words), tuple(boxes))


def _word(rng: random.Random) -> str:
    """Six to eight letters that can be said and mean nothing, so that no reader can guess them."""
    return "".join(rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(rng.choice((3, 4)))).capitalize()


def _face(font: Path | None, height: int) -> ImageFont.FreeTypeFont:
    """A font whose capital H is so many pixels high."""
    if font is None:
        import matplotlib

        font = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
    for size in range(height, 3 * height + 3):
        face = ImageFont.truetype(str(font), size)
        if (box := face.getbbox("H"))[3] - box[1] >= height:
            return face
    raise PlanError(f"{font} has no size in which a capital is {height} px high")


def smaller(pixels: Tensor, side: int) -> Tensor:
    """The picture at a lower resolution, as an ideal low stage would draw it."""
    small = torch.nn.functional.interpolate(pixels, (side, side), mode="bicubic", antialias=True, align_corners=False)
    return small.clamp(0, 1)


Route = tuple[bool, mf.Chain[mf.Pixels, mf.Pixels] | None]


def rows(size: int, upscaler: mf.Upscaler | None, sigma: float, steps: int) -> dict[str, Route]:
    """By label: whether it begins with the low picture, and what it is sent through."""
    whole = (size, size)
    through = mf.Encode() >> mf.Decode()
    refine = mf.Encode() >> mf.Reinject(sigma) >> mf.Refine(mf.DirectSigma(steps)) >> mf.Decode()
    larger = mf.Upscale(upscaler, whole)
    return {
        "picture": (False, None),
        "other": (False, None),
        "autoencoder": (False, through),
        "refined": (False, refine),
        "low, enlarged": (True, mf.Chain[mf.Pixels, mf.Pixels]((larger,))),
        "staged path": (True, through >> larger >> through),
        "staged path, refined": (True, through >> larger >> refine),
    }


def legible(pixels: Tensor, words: Sequence[str], boxes: Sequence[Box], read: Reader, *, shift: int = 0) -> list[float]:
    """1 - edits / letters of each word, at least 0, read from its own box; `shift` compares with another's word."""
    scores, side = list[float](), pixels.shape[-1]
    for i, (left, top, right, bottom) in enumerate(boxes):
        cut = pixels[..., max(top, 0) : min(bottom, side), max(left, 0) : min(right, side)]
        wide = round(48 * cut.shape[-1] / cut.shape[-2])
        line = torch.nn.functional.interpolate(cut, (48, wide), mode="bicubic", align_corners=False).clamp(0, 1)
        text = read((255 * line[0].permute(1, 2, 0)).round().byte().cpu().numpy())
        word = words[(i + shift) % len(words)]
        scores.append(max(0.0, 1 - edit_distance(text.replace(" ", "").lower(), word.lower()) / len(word)))
    return scores


def reader(name: str) -> Reader:
    """The function that `module:function` names.

    Raises:
        PlanError: it is not there.
    """
    module, _, function = name.partition(":")
    try:
        return cast(Reader, getattr(import_module(module), function))
    except (ImportError, AttributeError) as error:
        raise PlanError(f"--ocr {name}: {error}; give module:function, from an array of bytes to text") from None


def main(argv: Sequence[str] | None = None) -> int:
    """Print a Markdown table: a line a row, a column a height, and from where on half is legible."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="as for `mrflow generate`")
    parser.add_argument("--size", type=int, help="side in pixels (default: the model's)")
    parser.add_argument("--low", type=int, help="side of the low stage (default: half)")
    parser.add_argument("--heights", type=int, nargs="+", default=list(HEIGHTS), help="of capitals, in pixels")
    parser.add_argument("--pages", type=int, default=4, help="of each height")
    parser.add_argument("--rows", nargs="+", help="(default: all)")
    parser.add_argument("--sr", help="as for `mrflow generate` (default: the model's own)")
    parser.add_argument("--sigma", type=float, default=0.12, help="of the refining step")
    parser.add_argument("--refine-steps", type=int, default=1)
    parser.add_argument("--font", type=Path, help="a TrueType file (default: DejaVu Sans)")
    parser.add_argument("--ocr", default="experiments.real.reader:read_line", help="module:function")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--offload", default="none", choices=("none", "phase", "block"))
    parser.add_argument("--out", type=Path, help="a JSON file of all scores; it goes on from what it holds")
    args = parser.parse_args(argv)
    return exit_code(study, args)


def study(args: argparse.Namespace) -> None:
    """Everything that `main` does with checked options.

    Raises:
        MrflowError: an option cannot be; before a model is loaded.
    """
    read = reader(args.ocr)
    facts = info(args.model)
    size = args.size or facts.size[0]
    low = args.low or size // 2
    upscaler = upscaler_of(args.sr)
    if upscaler is not None and not isinstance(upscaler, mf.Upscaler):
        raise PlanError("--sr must enlarge pixels here, not latents")
    paths = rows(size, upscaler, args.sigma, args.refine_steps)
    if unknown := set(args.rows or ()) - set(paths):
        raise PlanError(f"no row is called {', '.join(sorted(unknown))}; there are {', '.join(paths)}")
    paths = {name: path for name, path in paths.items() if not args.rows or name in args.rows}
    for name, (small, chain) in paths.items():
        side = low if small else size
        if chain is not None and mf.plan(chain, facts, start=mf.Pixels(1, side, side)).out.shape[-1] != size:
            raise PlanError(f"{name} does not end at {size} px")
    pages = {h: [page(size, h, n, args.font) for n in range(args.pages)] for h in args.heights}
    asked = [args.model, size, low, args.pages, str(args.sr), args.sigma, args.refine_steps, args.ocr, str(args.font)]
    mark = hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:12]
    kept = _kept(args.out, mark)
    model = mf.load(args.model, device=args.device, offload=args.offload) if any(c for _, c in paths.values()) else None
    heads = " | ".join(f"{h} px ({100 * h / size:.1f} %, {h * low / size / 8:.2f} cells)" for h in pages)
    print(f"{facts.name}, {args.pages} pages a height, {size} px, low stage {low} px; cells of the low stage\n")
    print(f"| row | {heads} | half legible from |\n" + "|---" * (len(pages) + 2) + "|", flush=True)
    for name, (small, chain) in paths.items():
        cells, scores = list[str](), dict[float, dict[str, list[float]]]()
        for height, sheets in pages.items():
            for number, sheet in enumerate(sheets):
                key = f"{name} {height} {number}"
                if key not in kept:
                    drawn = _sent(sheet, chain, smaller(sheet.pixels, low) if small else sheet.pixels, model)
                    kept[key] = legible(drawn, sheet.words, sheet.boxes, read, shift=int(name == "other"))
                    if args.out is not None:
                        write_bytes(args.out, json.dumps({"mark": mark, "asked": asked, "scores": kept}).encode())
            scores[float(height)] = {str(n): kept[f"{name} {height} {n}"] for n in range(len(sheets))}
            found = interval(scores[float(height)], draws=4000, share=True)
            cells.append(f"{found:.2f}")
        ends = min(scores), max(scores)
        half = crossing(scores).text(1, 1, ends) if len(scores) > 1 else ""
        print(f"| {name} | {' | '.join(cells)} | {half} |", flush=True)


def _sent(
    sheet: Page, chain: mf.Chain[mf.Pixels, mf.Pixels] | None, pixels: Tensor, model: mf.Backbone | None
) -> Tensor:
    if chain is None or model is None:
        return sheet.pixels
    return mf.run(chain, model, sheet.prompt, start=pixels).pixels.cpu()


def _kept(out: Path | None, mark: str) -> dict[str, list[float]]:
    """What an earlier run with the same options kept.

    Raises:
        PlanError: the file is of other options, or is none of ours.
    """
    if out is None:
        return {}
    check_writable(out)
    if not out.exists():
        return {}
    try:
        found = json.loads(out.read_text("utf-8"))
        if found["mark"] == mark:
            return cast("dict[str, list[float]]", found["scores"])
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise PlanError(f"{out} holds something else than scores of these options; give another --out")


if __name__ == "__main__":
    sys.exit(main())

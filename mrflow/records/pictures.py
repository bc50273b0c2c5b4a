"""Pictures in and out, and the record that a picture carries.

The record is JSON in a PNG text chunk named "mrflow": the chain, model, prompt and seed that make the picture again.
Files appear under their final name only when complete.
"""

import json
import re
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import cast

import numpy as np
import torch
from PIL import Image, PngImagePlugin
from torch import Tensor

from mrflow._checks import check_whole, is_whole
from mrflow.errors import PlanError, RecordError
from mrflow.records.expressions import expression
from mrflow.records.files import check_writable as check_writable
from mrflow.records.files import parse_table
from mrflow.records.files import write_bytes as write_bytes
from mrflow.records.files import writing as writing
from mrflow.records.images import MAX_TEXT, SIGNATURE, chunks, image_bytes, png_text
from mrflow.records.images import read_image as read_image

KEY = "mrflow"
FORMAT = 1
GAP = 6  # pixels between the pictures of a strip
MOVING = {".gif": "GIF", ".webp": "WEBP", ".png": "PNG"}


class Images(list[Image.Image]):
    """PIL pictures; notebooks show them as one strip."""

    def __repr__(self) -> str:
        sizes = dict.fromkeys(f"{image.height}x{image.width}" for image in self)
        return f"<{len(self)} image{'' if len(self) == 1 else 's'}, {', '.join(sizes) or 'none'}>"

    def _repr_png_(self) -> bytes | None:
        """The strip; None where there is no picture."""
        return png(strip(self)) if self else None


def strip(images: Sequence[Image.Image], *, side: int = 256, across: int = 8, most: int = 32) -> Image.Image:
    """Pictures beside each other, each at most `side` pixels high and wide, `across` a row; at most `most` of them.

    Raises:
        PlanError: there is none.
    """
    if not images:
        raise PlanError("there is no picture to show")
    small = [image.convert("RGB") for image in images[:most]]
    for image in small:
        image.thumbnail((side, side))
    width, height = max(i.width for i in small) + GAP, max(i.height for i in small) + GAP
    columns = min(across, len(small))
    sheet = Image.new("RGB", (columns * width - GAP, -(-len(small) // columns) * height - GAP), "white")
    for number, image in enumerate(small):
        sheet.paste(image, (number % columns * width, number // columns * height))
    return sheet


def to_images(pixels: Tensor) -> Images:
    """PIL pictures of float (b, 3, h, w) in [0, 1], rounded to 8 bits."""
    array = (pixels.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return Images(Image.fromarray(np.ascontiguousarray(item)) for item in array)


def write_animation(path: Path, frames: Sequence[Image.Image], *, milliseconds: int = 120) -> None:
    """Frames of one size, each shown so long and the last for a second, as GIF, WebP or animated PNG, for ever.

    Raises:
        PlanError: there is no frame, the name ends otherwise, or a time makes no sense. ResourceError: it cannot be
        written.
    """
    kind = MOVING.get(path.suffix.lower())
    if kind is None:
        raise PlanError(f"an animation must end in {', '.join(MOVING)}, got {path.name!r}")
    check_whole("milliseconds", milliseconds, 1, 60_000)
    if not frames:
        raise PlanError("there is no frame to show")
    buffer, times = BytesIO(), [milliseconds] * (len(frames) - 1) + [max(1000, milliseconds)]
    frames[0].save(buffer, kind, save_all=True, append_images=frames[1:], duration=times, loop=0, lossless=True)
    write_bytes(path, buffer.getvalue())


def write_png(path: Path, image: Image.Image, record: object | None = None) -> None:
    """Write a PNG, with a record where one is given."""
    write_bytes(path, png(image, record))


def png(image: Image.Image, record: object | None = None, parameters: str = "") -> bytes:
    """A PNG file's bytes, with a record where one is given, and the text `parameters` that other programs read.

    Raises:
        RecordError: the record is larger than `read_record` reads.
    """
    info = PngImagePlugin.PngInfo()
    if record is not None:
        text = json.dumps(record, ensure_ascii=True, sort_keys=True)
        if len(text) > MAX_TEXT:
            raise RecordError(f"the record has {len(text)} bytes, more than the {MAX_TEXT} that are read again")
        info.add_itxt(KEY, text, zip=True)
    if parameters:
        info.add_text("parameters", parameters)  # Latin-1 where that holds it, as its readers expect, else UTF-8
    buffer = BytesIO()
    image.save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


def slug(text: str) -> str:
    """A file name's stem from a prompt: lower-case ASCII letters and digits, at most 40 of them."""
    words = re.findall(r"[a-z0-9]+", text.lower())
    return "-".join(words)[:40].strip("-") or "picture"


def batch_paths(path: Path, count: int) -> list[Path]:
    """`path` for one picture; `name-0.png`, `name-1.png`, ... for more."""
    return [path] if count == 1 else [path.with_stem(f"{path.stem}-{i}") for i in range(count)]


def read_record(path: str | Path) -> dict[str, object]:
    """The record that a PNG carries: plain data of the types that `make_record` writes, of finite numbers.

    Raises:
        ResourceError: the file cannot be read. RecordError: it carries no record, a broken one, or several.
    """
    return record_in(image_bytes(path, wrong=RecordError), path)


def record_in(data: bytes, path: str | Path) -> dict[str, object]:
    """`read_record` of a file's bytes; errors name its `path`.

    Raises:
        RecordError: as `read_record`.
    """
    if not data.startswith(SIGNATURE):
        raise RecordError(f"{path} is no PNG; records lie in the PNGs that mrflow saves")
    key, found = KEY.encode(), list[bytes]()
    try:
        texts = [chunk for chunk in chunks(data) if chunk.data.startswith(key + b"\0")]
    except ValueError:
        raise RecordError(f"{path} is not a whole PNG") from None
    try:
        found = [text[1] for chunk in texts if (text := png_text(chunk)) is not None]
        if len(found) > 1:
            raise ValueError(f"it carries {len(found)}")
        record = parse_table(found[0]) if found else None
        if record is not None and "unreplayable" not in record:
            check_record(record)
    except (ValueError, MemoryError) as error:
        raise RecordError(f"{path}: its mrflow record is broken ({error})") from None
    if record is None:
        raise RecordError(f"{path} carries no mrflow record; was it edited, or saved by another program?")
    if "unreplayable" in record:
        raise RecordError(f"{path}: {str(record['unreplayable'])[:1000]}")
    return record


TEXTS = ("mrflow", "torch", "model", "weights", "machine", "guidance", "shift", "prompt", "negative", "start")
STAGE_TEXTS = ("name", "out")
MOST_LEVELS = 52  # of a schedule, that people are shown


def check_record(record: dict[str, object]) -> None:
    """Hold a record from outside against the types that `make_record` writes.

    Raises:
        ValueError: a value has another type. RecordError: it was written by a newer mrflow.
    """
    version = record.get("format", FORMAT)
    if not _whole(version) or cast(int, version) > FORMAT:
        raise RecordError(f"its mrflow record has the format {version!r}; this mrflow reads up to {FORMAT}")
    for name in TEXTS:
        if not isinstance(record.get(name, ""), str):
            raise ValueError(f"{name} is no text")
    if not _whole(record.get("seed", 0)):
        raise ValueError("seed is no whole number")
    for name in ("stages", "chain", "notes", "size"):
        if not isinstance(record.get(name, []), list):
            raise ValueError(f"{name} is no list")
    for stage in cast(list[object], record.get("stages", [])):
        if not isinstance(stage, dict):
            raise ValueError("a stage is no table")  # data, no argument
        own = cast(dict[str, object], stage)
        texts = [own.get(name, "") for name in STAGE_TEXTS]
        numbers = [own.get("seconds", 0), own.get("nfe") or 0]
        notes, sigmas = own.get("notes", []), own.get("sigmas", [])
        if not (
            all(isinstance(text, str) for text in texts)
            and all(isinstance(number, int | float) for number in numbers)
            and isinstance(notes, list)
            and isinstance(sigmas, list)
            and all(isinstance(sigma, int | float) for sigma in cast(list[object], sigmas))
        ):
            raise ValueError("a stage holds values of other types")


def _whole(value: object) -> bool:
    return is_whole(value, 0, 2**64 - 1)


def describe_record(record: dict[str, object]) -> list[str]:
    """A record in lines for people: what was drawn, on what, and every stage with its settings and levels."""
    size = record.get("size")
    lines = [f"prompt    {record.get('prompt', '')}"]
    lines += [f"negative  {record['negative']}"] if record.get("negative") else []
    lines.append(f"seed      {record.get('seed', '')}")
    lines += [f"size      {'x'.join(map(str, cast(list[object], size)))}"] if isinstance(size, list) else []
    lines.append(f"model     {record.get('model', '')} {record.get('weights', '')}".rstrip())
    lines += [f"{key:<9} {record[key]} (the model's own)" for key in ("shift", "guidance") if record.get(key)]
    lines.append(f"made by   mrflow {record.get('mrflow', '?')}, torch {record.get('torch', '?')}")
    lines += [f"made on   {record['machine']}"] if record.get("machine") else []
    stages = cast(list[dict[str, object]], record.get("stages") or [])
    chain = cast(list[object], record.get("chain") or [])
    name, out = (max((len(str(stage.get(key, ""))) for stage in stages), default=0) for key in ("name", "out"))
    for number, stage in enumerate(stages, 1):
        lines.append(
            f"{number:>3}  {stage.get('name', '')!s:<{name}}  {stage.get('out', '')!s:<{out}}"
            f" {cast(float, stage.get('seconds', 0)):7.3f} s  {stage.get('nfe') or ''}".rstrip()
        )
        lines += [f"     {expression(chain[number - 1], full=True)}"] if number <= len(chain) else []
        sigmas = cast(list[float], stage.get("sigmas") or [])
        shown = [f"{sigma:.4g}" for sigma in sigmas]
        if len(shown) > MOST_LEVELS:
            shown = [*shown[: MOST_LEVELS - 1], "...", shown[-1]]
        steps = f"{len(sigmas) - 1} step{'' if len(sigmas) == 2 else 's'}"
        lines += [f"     {steps}, sigma {' '.join(shown)}"] if shown else []
        lines += [f"     {text}" for text in cast(list[object], stage.get("notes") or [])]
    return lines

"""Pictures in and out, and the record that a picture carries.

The record is JSON in a PNG text chunk named "mrflow": the chain, model, prompt and seed that make the picture again.
Files appear under their final name only when complete.
"""

import json
import re
from collections.abc import Iterable
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from PIL import Image, PngImagePlugin
from torch import Tensor

from mrflow._checks import is_whole
from mrflow.errors import PlanError, RecordError, ResourceError
from mrflow.images import MAX_FILE, MAX_TEXT, SIGNATURE, chunks, png_text
from mrflow.images import read_image as read_image
from mrflow.records.chains import decode_chain, encode_chain
from mrflow.records.files import check_writable as check_writable
from mrflow.records.files import parse_table, read_regular
from mrflow.records.files import write_bytes as write_bytes
from mrflow.records.files import writing as writing
from mrflow.spec import Start
from mrflow.stage import AnyChain

if TYPE_CHECKING:
    from mrflow.backbone import Backbone
    from mrflow.runner import Result

KEY = "mrflow"
FORMAT = 1


def to_images(pixels: Tensor) -> list[Image.Image]:
    """PIL pictures of float (b, 3, h, w) in [0, 1], rounded to 8 bits."""
    array = (pixels.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(np.ascontiguousarray(item)) for item in array]


def write_png(path: Path, image: Image.Image, record: object | None = None) -> None:
    """Write a PNG, with a record where one is given."""
    write_bytes(path, png(image, record))


def png(image: Image.Image, record: object | None = None) -> bytes:
    """A PNG file's bytes, with a record where one is given.

    Raises:
        RecordError: the record is larger than `read_record` reads.
    """
    info = PngImagePlugin.PngInfo()
    if record is not None:
        text = json.dumps(record, ensure_ascii=True, sort_keys=True)
        if len(text) > MAX_TEXT:
            raise RecordError(f"the record has {len(text)} bytes, more than the {MAX_TEXT} that are read again")
        info.add_itxt(KEY, text, zip=True)
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


def save_result(result: "Result", path: Path) -> list[Path]:
    """Write a result's pictures as PNGs with their records, over what has these names."""
    for each, data in (files := result_files(result, path)).items():
        write_bytes(each, data)
    return list(files)


def result_files(result: "Result", path: Path) -> dict[Path, bytes]:
    """A result's pictures as PNGs with their records, by the names that they are to have.

    Raises:
        PlanError: the name is no PNG's. ResourceError: the folder takes no file.
    """
    if path.suffix.lower() != ".png":
        raise PlanError(f"{path.name} should end in .png: only a PNG keeps every bit and the record")
    paths = batch_paths(path, len(result.seeds))
    check_writable(path)
    files: dict[Path, bytes] = {}
    for item, (each, image) in enumerate(zip(paths, result.images, strict=True)):
        try:
            files[each] = png(image, make_record(result, item))
        except RecordError as error:
            files[each] = png(image, {"format": FORMAT, "unreplayable": str(error)[:1000]})
    return files


def make_record(result: "Result", item: int = 0) -> dict[str, object]:
    """Plain data that makes picture `item` of a result again, and what each stage of its batch cost."""
    from mrflow import __version__

    info = result.plan.model
    record: dict[str, object] = {
        "format": FORMAT,
        "mrflow": __version__,
        "torch": torch.__version__,
        "model": info.name,
        "weights": info.version,
        "prompt": result.prompts[item],
        "negative": result.negative,
        "seed": result.seeds[item],
        "size": list(result.spec.shape[-2:]),
        "chain": encode_chain(result.chain),
        "stages": [
            {"name": s.name, "out": str(s.spec), "seconds": round(s.seconds, 6), "nfe": s.nfe, "cached": s.cached}
            | ({"notes": list(s.notes)} if s.notes else {})
            for s in result.stages
        ],
        "batch": len(result.seeds),
        "condition_seconds": round(result.condition_seconds, 6),
        "peak_bytes": result.peak_bytes,
    }
    if result.notes:
        record["notes"] = list(result.notes)
    if not isinstance(result.plan.rows[0].spec, Start):
        record["start"] = str(result.plan.rows[0].spec)
    return record


def read_record(path: str | Path) -> dict[str, object]:
    """The record that a PNG carries: plain data of the types that `make_record` writes, of finite numbers.

    Raises:
        ResourceError: the file cannot be read. RecordError: it carries no record, a broken one, or several.
    """
    try:
        data = read_regular(Path(path).resolve(), most=MAX_FILE)
    except OSError as error:
        raise ResourceError(f"{path} cannot be read: {error.strerror or error}") from None
    except (ValueError, RuntimeError) as error:
        raise RecordError(f"{path} cannot be read: {error}") from None
    if not data.startswith(SIGNATURE):
        raise RecordError(f"{path} is not a whole PNG")
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


TEXTS = ("mrflow", "torch", "model", "weights", "prompt", "negative", "start")
STAGE_TEXTS = ("name", "out")


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
        notes = own.get("notes", [])
        if not (
            all(isinstance(text, str) for text in texts)
            and all(isinstance(number, int | float) for number in numbers)
            and isinstance(notes, list)
        ):
            raise ValueError("a stage holds values of other types")


def _whole(value: object) -> bool:
    return is_whole(value, 0, 2**64 - 1)


def recorded_model(record: dict[str, object]) -> str:
    """The file of the embedded model that made a picture: a record is data from outside, and loads no other.

    Raises:
        RecordError: the picture was made by a model that does not come with mrflow.
    """
    from mrflow.models.pocket.model import shipped

    name = str(record.get("model", "pocket"))
    if (file := shipped(name, str(record.get("weights")))) is None:
        raise RecordError(f"the picture was made by {name}, which is not embedded; give it: --model or replay(model=)")
    return str(file)


def describe_record(record: dict[str, object]) -> list[str]:
    """A record in lines for people."""
    lines = [
        f"prompt    {record.get('prompt', '')}",
        f"seed      {record.get('seed', '')}",
        f"model     {record.get('model', '')} {record.get('weights', '')}".rstrip(),
        f"made by   mrflow {record.get('mrflow', '?')}, torch {record.get('torch', '?')}",
    ]
    if record.get("negative"):
        lines.insert(1, f"negative  {record['negative']}")
    stages = record.get("stages")
    for number, stage in enumerate(cast(list[dict[str, object]], stages) if isinstance(stages, list) else [], 1):
        lines.append(
            f"{number:>3}  {stage.get('name', '')!s:<9} {stage.get('out', '')!s:<32}"
            f" {cast(float, stage.get('seconds', 0)):7.3f} s  {stage.get('nfe') or ''}".rstrip()
        )
        notes = stage.get("notes")
        lines += [f"     {text}" for text in cast(list[object], notes)] if isinstance(notes, list) else []
    return lines


def replay(
    path: str | Path,
    *,
    model: "Backbone | None" = None,
    types: Iterable[type] = (),
    start: Tensor | None = None,
    files: Iterable[str | Path] = (),
) -> "Result":
    """Make a picture again from the record it carries; the same pixels on the same versions and device.

    A picture that was made in a batch may differ by rounding (one level of 255): it is made again alone.

    `model` is the loaded model where it is not embedded; `types` are the classes of your own that its chain uses;
    `start` the pixels that it began with, where it did not begin with noise; `files` the files (or folders of them) of
    the super-resolution networks and adapters that it used: a record holds their names and SHA-256, not their places.

    Raises:
        RecordError: there is no record, or this model is not the one that made the picture.
    """
    from mrflow.models import load
    from mrflow.records.files import known_files
    from mrflow.runner import run

    record = read_record(path)
    files = tuple(files)
    with known_files(files):
        chain: AnyChain = decode_chain(record.get("chain"), types)
    prompt, seed, negative, name = (record.get(k) for k in ("prompt", "seed", "negative", "model"))
    if not (isinstance(prompt, str) and isinstance(seed, int) and isinstance(negative, str) and isinstance(name, str)):
        raise RecordError(f"{path}: its record lacks the prompt, seed, negative or model")
    if "start" in record and start is None:
        raise RecordError(f"{path} was made from a picture ({record['start']}); give it, --start FILE or start=")
    backbone = load(recorded_model(record)) if model is None else model
    weights = record.get("weights")
    if backbone.info.name != name or backbone.info.version != weights:
        raise RecordError(
            f"{path} was made by {name} {weights}, but the model given is {backbone.info.name} {backbone.info.version}"
        )
    with known_files(files):
        return run(chain, backbone, prompt, seed=seed, negative=negative, start=start)


CHECKPOINTS = (".safetensors", ".json", ".pth", ".pt", ".ckpt", ".bin", ".param")  # how checkpoints' names end


def inspect_file(path: str | Path) -> list[str]:
    """What a file or folder is, in lines: how a PNG was made, or what a checkpoint holds."""
    where = Path(path)
    if where.is_dir() or where.suffix in CHECKPOINTS:
        from mrflow.models.describe import describe

        return describe(where)
    return describe_record(read_record(where))

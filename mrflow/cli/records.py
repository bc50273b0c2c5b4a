"""The verbs for what is there already: inspect, replay."""

import json

import numpy as np
import typer
from rich.console import Console
from torch import Tensor

from mrflow.cli.display import width, wrapped
from mrflow.cli.options import refuse
from mrflow.cli.parsing import free_path, load_model, own_types, save_free
from mrflow.cli.verbs import InspectOptions, ReplayOptions
from mrflow.models.digests import verify
from mrflow.notes import printable
from mrflow.records.files import cache_folder
from mrflow.records.pictures import read_image, read_record, to_images
from mrflow.records.replay import inspect_file, is_checkpoint, recorded_model, replay
from mrflow.result import result_files

DIFFERENT = 4


def inspect(err: Console, asked: InspectOptions) -> None:
    """Read a file's record, or its headers, or all of it."""
    file = asked.file
    if asked.verify:
        lines = list(verify(file, cache_folder()))
    elif asked.as_json and not is_checkpoint(file):
        typer.echo(json.dumps(read_record(file), indent=2))
        return
    else:
        lines = inspect_file(file)
    if asked.as_json:
        typer.echo(json.dumps({"path": str(file), "lines": lines}, indent=2))
    else:
        typer.echo("\n".join(wrapped(map(printable, lines), width())))


def replay_picture(err: Console, asked: ReplayOptions) -> None:
    """Draw a picture again, and compare it with the first if that was asked."""
    picture, out, force = asked.picture, asked.out, asked.force
    writes = not asked.check or out is not None
    refuse(force and not writes, "--force", "beside --check, which writes nothing without --out")
    default = picture.parent / f"{picture.stem}-replay{picture.suffix}"
    target = free_path(out, default, 1, force) if writes else None
    record = read_record(picture)
    types = [kind for each in asked.own or () for kind in own_types(each)]
    pixels = read_image(asked.start) if asked.start is not None else None
    before = read_image(picture) if asked.check else None
    backbone = load_model(asked.model or recorded_model(record), asked.loading)
    result = replay(picture, model=backbone, types=types, start=pixels, files=asked.file or ())
    said: dict[str, object] = {"paths": [], "seconds": result.seconds}
    if target is not None:
        paths = save_free(lambda path: result_files(result, path), target, out, default, 1, force)
        said["paths"] = [str(path) for path in paths]
        err.print(f"made again in {result.seconds:.2f} s")
    if before is not None:
        said |= pixel_difference(before, result.pixels)
    if asked.as_json:
        typer.echo(json.dumps(said))
    else:
        for path in said["paths"] if isinstance(said["paths"], list) else ():
            typer.echo(path)
        if before is not None:
            typer.echo(f"{picture}: {difference_text(said)}")
    if before is not None and not said["same"]:
        raise SystemExit(DIFFERENT)


def pixel_difference(before: Tensor, after: Tensor) -> dict[str, object]:
    """How two pictures (1, 3, h, w) in [0, 1] differ in their 8 bits: pixels that do, the largest step, the PSNR in dB.

    Sizes alone where these differ.
    """
    if before.shape != after.shape:
        sizes = [f"{t.shape[-2]}x{t.shape[-1]}" for t in (before, after)]
        return {"same": False, "sizes": sizes}
    a, b = (np.asarray(to_images(t)[0], dtype=float) for t in (before, after))  # rounded as they are saved
    apart = np.abs(a - b)
    error = float(np.square(apart).mean())
    return {
        "same": not error,
        "pixels": int((apart.max(-1) > 0).sum()),
        "of": apart[..., 0].size,
        "levels": int(apart.max()),
        "psnr": round(float(10 * np.log10(255**2 / error)), 2) if error else None,
    }


def difference_text(said: dict[str, object]) -> str:
    """A difference for people."""
    if said["same"]:
        return f"the same {said['of']} pixels"
    if "sizes" in said:
        before, after = said["sizes"] if isinstance(said["sizes"], list) else ("", "")
        return f"it is {before}, its record makes {after}: it was scaled or cut"
    return (
        f"{said['pixels']} of {said['of']} pixels differ, by at most {said['levels']} of 255 levels, "
        f"PSNR {said['psnr']} dB"
    )

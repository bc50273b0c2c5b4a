"""The verbs for what is there already: inspect, replay."""

import json
import os
from pathlib import Path

import numpy as np
import typer
from rich.console import Console
from torch import Tensor

from mrflow._checks import check_path, is_whole
from mrflow.cli.display import width, wrap
from mrflow.cli.options import refuse
from mrflow.cli.parsing import free_path, load_model, own_types, save_free
from mrflow.cli.verbs import InspectOptions, ReplayOptions
from mrflow.display.notes import counted, printable
from mrflow.errors import PlanError, ResourceError
from mrflow.models import published_models
from mrflow.models.digests import verify
from mrflow.models.pocket.model import embedded_file
from mrflow.records.files import cache_folder
from mrflow.records.pictures import read_image, read_record, to_images
from mrflow.records.replay import inspect_file, is_checkpoint, model_of_record, replay
from mrflow.result import result_files
from mrflow.sweep.rows import Row
from mrflow.sweep.store import Store
from mrflow.sweep.summary import load_rows

DIFFERENT = 4
MOST_CHAINS = 20  # that are listed


def inspect(err: Console, asked: InspectOptions) -> None:
    """Read a file's record, or its headers, or all of it."""
    file = named_file(asked.file)
    folder = sweep_folder(file)
    refuse(asked.verify and folder is not None, "--verify", "with a sweep: it looks at its pictures when it goes on")
    if folder is not None:
        lines = sweep_lines(folder)
    elif asked.verify:
        lines = list(verify(file, cache_folder()))
    elif asked.as_json and not is_checkpoint(file):
        typer.echo(json.dumps(read_record(file), indent=2))
        return
    else:
        lines = inspect_file(file)
    if asked.as_json:
        typer.echo(json.dumps({"path": str(file), "lines": lines}, indent=2))
    else:
        typer.echo("\n".join(wrap(map(printable, lines), width())))


def named_file(file: Path) -> Path:
    """What there is of a name: the file or folder, else the file of the embedded model that is called so.

    Raises:
        PlanError: it names a model whose files are elsewhere. ResourceError: there is nothing of that name.
    """
    if os.path.lexists(check_path("the file", file)):
        return file
    if inside := embedded_file(str(file)):
        return inside
    known = published_models()
    if str(file) in (*known, *(facts.name for facts in known.values())):
        raise PlanError(
            f"{file} is the name of a model, whose files are not here: `mrflow plan --model {file}` says what is known "
            "of it without them; inspect takes the file or folder that holds it"
        )
    raise ResourceError(
        f"{file} cannot be read: there is no such file; inspect takes a PNG that mrflow made, a checkpoint, the folder "
        "of a model or of a sweep, or pocket, the embedded model"
    )


def sweep_folder(file: Path) -> Path | None:
    """The folder of the sweep that a folder or a JSON file is, or belongs to; None where there is none."""
    if not file.is_dir() and file.suffix != ".json":
        return None
    return next((each for each in (file, *file.absolute().parents[:3]) if (each / "sweep.json").is_file()), None)


def sweep_lines(folder: Path) -> list[str]:
    """What a sweep's folder holds: its chains and how many of their rows are there, what failed, what to run next."""
    said, rows = Store(folder).manifest(), list[Row]()
    why = None
    try:
        rows, _ = load_rows(folder)
    except PlanError as error:
        why = str(error)
    chains = dict.fromkeys([*said.get("chains", {}), *(row.chain for row in rows)])
    failed = [row for row in rows if not row.done]
    whole = said.get("rows")
    left = f", {max(0, whole - len(rows))} to make" if is_whole(whole, 0) else ""
    count = f"{counted(len(rows) - len(failed), 'row')} done, {len(failed)} failed{left}"
    by = f" by {said['model']}" if "model" in said else ""
    lines = [f"{folder.resolve().name}: a sweep of {counted(len(chains), 'chain')}{by}; {count}"]
    for label in list(chains)[:MOST_CHAINS]:
        mine = [row for row in rows if row.chain == label]
        bad = sum(not row.done for row in mine)
        lines.append(f"chain     {label}: {counted(len(mine) - bad, 'row')} done" + (f", {bad} failed" if bad else ""))
    lines += [f"          ... and {len(chains) - MOST_CHAINS} more"] if len(chains) > MOST_CHAINS else []
    lines += [f"error     {failed[0].chain}, {failed[0].prompt[:60]!r}: {failed[0].error}"] if failed else []
    if why is not None:
        return [*lines, f"problem   {why}"]
    return [*lines, f"next      mrflow report {folder} (a page), mrflow sweep export {folder} --to csv (a table)"]


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
    backbone = load_model(asked.model or model_of_record(record), asked.loading)
    result = replay(picture, model=backbone, types=types, start=pixels, files=asked.file or ())
    said: dict[str, object] = {"paths": [], "seconds": result.seconds}
    if target is not None:
        paths = save_free(lambda path: result_files(result, path), target, out, default, 1, force)
        said["paths"] = [str(path) for path in paths]
        err.print(f"reproduced in {result.seconds:.2f} s")
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

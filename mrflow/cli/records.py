"""The verbs for what is there already: inspect, replay."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mrflow.cli.display import console, width, wrapped
from mrflow.cli.options import Json, ModelOptions, refuse
from mrflow.cli.parsing import free_path, own_types, save_free
from mrflow.notes import printable

if TYPE_CHECKING:
    from torch import Tensor

DIFFERENT = 4


def inspect(
    file: Annotated[Path, typer.Argument(help="A PNG that mrflow made, or a checkpoint.")],
    as_json: Json = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Read a model's files whole and compare them with what is known of them.")
    ] = False,
) -> None:
    """Say what a file is: how a picture was made, what a checkpoint holds."""
    from mrflow.records.pictures import read_record
    from mrflow.records.replay import inspect_file, is_checkpoint

    with console():
        if verify:
            from mrflow.models.digests import verify as whole
            from mrflow.records.files import cache_folder

            lines = list(whole(file, cache_folder()))
        elif as_json and not is_checkpoint(file):
            typer.echo(json.dumps(read_record(file), indent=2))
            return
        else:
            lines = inspect_file(file)
        if as_json:
            typer.echo(json.dumps({"path": str(file), "lines": lines}, indent=2))
        else:
            typer.echo("\n".join(wrapped(map(printable, lines), width())))


def replay(
    picture: Annotated[Path, typer.Argument(help="A PNG that mrflow made.")],
    options: ModelOptions,
    out: Annotated[
        Path | None, typer.Option("--out", help="File to write (default: the picture's name with -replay).")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite a file that exists.")] = False,
    check: Annotated[
        bool, typer.Option("--check", help="Compare with the picture's own pixels; write a file only with --out.")
    ] = False,
    own: Annotated[
        list[Path] | None, typer.Option("--with", help="A Python file with stages of your own it used; repeatable.")
    ] = None,
    model: Annotated[str | None, typer.Option("--model", help="The weights, where the model is not embedded.")] = None,
    start: Annotated[Path | None, typer.Option("--start", help="The picture it began with, if it did.")] = None,
    file: Annotated[
        list[Path] | None,
        typer.Option("--file", help="The file of a network or adapter it used, or its folder."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Make a picture again from the record it carries."""
    from mrflow.records.pictures import read_image, read_record
    from mrflow.records.replay import recorded_model
    from mrflow.records.replay import replay as again
    from mrflow.result import result_files

    with console() as err:
        writes = not check or out is not None
        refuse(force and not writes, "--force", "beside --check, which writes nothing without --out")
        default = picture.parent / f"{picture.stem}-replay{picture.suffix}"
        target = free_path(out, default, 1, force) if writes else None
        record = read_record(picture)
        types = [kind for each in own or () for kind in own_types(each)]
        pixels = read_image(start) if start is not None else None
        before = read_image(picture) if check else None
        backbone = options.load(model or recorded_model(record))
        result = again(picture, model=backbone, types=types, start=pixels, files=file or ())
        said: dict[str, object] = {"paths": [], "seconds": result.seconds}
        if target is not None:
            paths = save_free(lambda path: result_files(result, path), target, out, default, 1, force)
            said["paths"] = [str(path) for path in paths]
            err.print(f"made again in {result.seconds:.2f} s")
        if before is not None:
            said |= difference(before, result.pixels)
        if as_json:
            typer.echo(json.dumps(said))
        else:
            for path in said["paths"] if isinstance(said["paths"], list) else ():
                typer.echo(path)
            if before is not None:
                typer.echo(f"{picture}: {difference_text(said)}")
        if before is not None and not said["same"]:
            raise SystemExit(DIFFERENT)


def difference(before: "Tensor", after: "Tensor") -> dict[str, object]:
    """How two pictures (1, 3, h, w) in [0, 1] differ in their 8 bits: pixels that do, the largest step, the PSNR in dB.

    Sizes alone where these differ.
    """
    import numpy as np

    from mrflow.records.pictures import to_images

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


def difference_text(said: "dict[str, object]") -> str:
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

"""The verbs for super-resolution networks: sr add, sr list."""

import json
from pathlib import Path
from typing import Annotated

import typer

from mrflow.cli.display import console, width, wrapped
from mrflow.cli.options import Json, with_options
from mrflow.errors import PlanError

networks = typer.Typer(help="Super-resolution networks by a short name.", no_args_is_help=True)


@networks.command("add")
@with_options
def sr_add(
    file: Annotated[Path, typer.Argument(help="A checkpoint that you have: .pth, .safetensors or ncnn's .param.")],
    name: Annotated[
        str | None, typer.Option("--name", help="Which it is (default: recognised by the file's name).")
    ] = None,
    as_json: Json = False,
) -> None:
    """Keep a network's file, so that --sr realesrgan-x4, anime or video finds it."""
    from mrflow.upscalers import shelf

    with console():
        word, path = shelf.add(file, name)
        known = shelf.KNOWN[word]
        if as_json:
            typer.echo(json.dumps({"name": word, "title": known.title, "licence": known.licence, "path": str(path)}))
        else:
            typer.echo(f"--sr {word}: {known.title} ({known.licence}), kept as {path}")


@networks.command("list")
@with_options
def sr_list(as_json: Json = False) -> None:
    """Say which networks have short names, and which are here."""
    from mrflow.upscalers import shelf

    rows: list[dict[str, str | None]] = []
    with console():
        for word, known in shelf.KNOWN.items():
            try:
                path: str | None = str(shelf.found(word))
            except PlanError:
                path = None
            rows.append({"name": word, "title": known.title, "licence": known.licence, "path": path})
            where = path or f"not here: mrflow sr add {known.file} (from {known.source})"
            if not as_json:
                typer.echo("\n".join(wrapped([f"{word}: {known.title}, {known.licence}; {where}"], width())))
        if as_json:
            typer.echo(json.dumps(rows))

"""The verbs for super-resolution networks: sr add, sr list."""

import json

import typer
from rich.console import Console

from mrflow.cli.display import width, wrap
from mrflow.cli.verbs import AddOptions, ListOptions
from mrflow.errors import PlanError
from mrflow.upscalers import shelf


def add_network(err: Console, asked: AddOptions) -> None:
    """Keep the file."""
    word, path = shelf.add(asked.file, asked.name)
    known = shelf.KNOWN[word]
    if asked.as_json:
        typer.echo(json.dumps({"name": word, "title": known.title, "licence": known.licence, "path": str(path)}))
    else:
        typer.echo(f"--sr {word}: {known.title} ({known.licence}), kept as {path}")


def list_networks(err: Console, asked: ListOptions) -> None:
    """Say of each network where it is."""
    rows: list[dict[str, str | None]] = []
    for word, known in shelf.KNOWN.items():
        try:
            path: str | None = str(shelf.find_network(word))
        except PlanError:
            path = None
        rows.append({"name": word, "title": known.title, "licence": known.licence, "path": path})
        where = path or f"not here: mrflow sr add {known.file} (from {known.source})"
        if not asked.as_json:
            typer.echo("\n".join(wrap([f"{word}: {known.title}, {known.licence}; {where}"], width())))
    if asked.as_json:
        typer.echo(json.dumps(rows))

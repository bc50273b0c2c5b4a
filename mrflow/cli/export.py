"""The verb `mrflow sweep export`: the rows of a sweep for other programs."""

import json

import typer
from rich.console import Console

from mrflow.cli.verbs import ExportOptions
from mrflow.display.notes import counted
from mrflow.errors import PlanError
from mrflow.records.files import check_writable
from mrflow.sweep.datasets import write_dataset
from mrflow.sweep.summary import load_rows
from mrflow.sweep.tables import write_csv, write_parquet

KINDS = {"csv": ".csv", "parquet": ".parquet", "hf": ""}


def export(err: Console, asked: ExportOptions) -> None:
    """Write the rows."""
    to, folder = asked.to, asked.folder
    if to not in KINDS:
        raise PlanError(f"--to takes {', '.join(KINDS)}, got {to!r}")
    name = folder.resolve().name
    target = asked.out or folder.resolve().parent / f"{name}-export{KINDS[to]}"
    rows, _ = load_rows(folder)
    if to == "hf":
        count = write_dataset(rows, folder, target)
    else:
        check_writable(target)
        count = len(rows)
        (write_csv if to == "csv" else write_parquet)(rows, target)
    err.print(counted(count, "row"))
    typer.echo(json.dumps({"path": str(target), "rows": count}) if asked.as_json else target)

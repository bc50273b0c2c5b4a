"""The verb report: the page of a sweep. It works without torch."""

import json

import typer
from rich.console import Console

from mrflow.cli.options import refuse
from mrflow.cli.verbs import ReportOptions
from mrflow.display.notes import counted
from mrflow.errors import PlanError
from mrflow.records.files import check_writable
from mrflow.sweep.plots import write_plots
from mrflow.sweep.report import write_report
from mrflow.sweep.store import Store
from mrflow.sweep.summary import load_rows, summarise
from mrflow.sweep.tables import write_csv, write_parquet


def report_sweep(err: Console, asked: ReportOptions) -> None:
    """Write the page, and what was asked beside it."""
    folder, link = asked.folder, asked.link
    refuse(asked.metric is not None and not asked.plots, "--metric", "without --plots")
    rows, reference = load_rows(folder)
    target = asked.out or folder / "report.html"
    if target.suffix.lower() not in (".html", ".htm"):
        raise PlanError(f"--out must end in .html, got {target.name!r}")
    if link and target.resolve().parent != folder.resolve():
        raise PlanError(f"with --link the page must lie in {folder}, beside the pictures: leave out --out")
    check_writable(target)
    write_report(folder, target, title=asked.title, link=link, loaded=(rows, reference))
    made = [target]
    if asked.table:
        made.append(target.with_suffix(".csv"))
        write_csv(rows, made[-1])
    if asked.parquet:
        made.append(target.with_suffix(".parquet"))
        write_parquet(rows, made[-1])
    if asked.plots:
        summary = summarise(rows, reference, Store(folder).manifest())
        made += write_plots(summary, target.with_suffix(""), metric=asked.metric)
    bad = sum(not row.done for row in rows)
    err.print(f"{counted(len(rows), 'row')}, {bad} failed; {target.stat().st_size / 1e6:.1f} MB")
    if asked.as_json:
        typer.echo(json.dumps({"paths": [str(path) for path in made], "rows": len(rows), "failed": bad}))
    else:
        for path in made:
            typer.echo(path)

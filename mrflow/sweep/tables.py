"""The rows of a sweep as a table: CSV, Parquet, a folder that the datasets library loads; and its methods as text."""

import csv
from collections.abc import Sequence
from io import BytesIO, StringIO
from pathlib import Path
from typing import Any

from mrflow.errors import PlanError
from mrflow.records.files import write_bytes
from mrflow.sweep.rows import Row
from mrflow.sweep.statistics import number
from mrflow.sweep.summary import metrics_of

COLUMNS = (
    "chain", "prompt", "draw", "seed", "status", "error", "seconds", "nfe", "flops", "peak_bytes", "batch", "timed",
    "device", "machine", "model", "weights", "picture", "key",
)  # fmt: skip


def table(rows: Sequence[Row]) -> tuple[list[str], list[list[Any]]]:
    """Column names and one line a row: its facts, tags (`tag.x`), metrics (`metric.x`) and seconds of stages."""
    tags = sorted({t for r in rows for t in r.tags})
    metrics = metrics_of(rows)
    stages = list(dict.fromkeys(f"{i}-{s['name']}" for r in rows for i, s in enumerate(r.stages, 1)))
    names = [*COLUMNS, *(f"tag.{t}" for t in tags), *(f"metric.{m}" for m in metrics)]
    names += [f"seconds.{s}" for s in stages]
    lines: list[list[Any]] = []
    for row in rows:
        took = {f"{i}-{s['name']}": s["seconds"] for i, s in enumerate(row.stages, 1)}
        line = [getattr(row, c) for c in COLUMNS]
        line += [row.tags.get(t) for t in tags] + [number(row, m) for m in metrics] + [took.get(s) for s in stages]
        lines.append(line)
    return names, lines


def write_csv(rows: Sequence[Row], out: Path) -> None:
    """The table as CSV; a text that a spreadsheet would take for a formula is quoted with an apostrophe."""
    names, lines = table(rows)
    text = StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(names)

    def plain(value: object) -> object:
        return f"'{value}" if isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r") else value

    writer.writerows([plain(v) for v in line] for line in lines)
    write_bytes(out, text.getvalue().encode("utf-8", "backslashreplace"))


def write_parquet(rows: Sequence[Row], out: Path) -> None:
    """The table as Parquet (extra `[sweep]`).

    Raises:
        PlanError: pyarrow is not installed.
    """
    try:
        import pyarrow as arrow  # type: ignore[import-untyped]  # pyright: ignore
        import pyarrow.parquet as parquet  # type: ignore[import-untyped]  # pyright: ignore
    except ImportError as error:
        raise PlanError(
            f"Parquet needs pyarrow, which cannot be imported ({error}): pip install 'mrflow[sweep]'"
        ) from None
    names, lines = table(rows)
    columns = list(zip(*lines, strict=True)) if lines else [()] * len(names)
    whole = arrow.table(dict(zip(names, (list(c) for c in columns), strict=True)))
    buffer = BytesIO()
    parquet.write_table(whole, buffer)
    write_bytes(out, buffer.getvalue())

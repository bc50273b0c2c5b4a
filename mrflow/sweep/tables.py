"""The rows of a sweep as a table: CSV, Parquet, a folder that the datasets library loads; and its methods as text."""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from io import BytesIO, StringIO
from pathlib import Path
from typing import Any

from mrflow.display import html
from mrflow.errors import PlanError
from mrflow.records.files import write_bytes
from mrflow.sweep.aims import Scale
from mrflow.sweep.rows import Row
from mrflow.sweep.statistics import caveat, group_rows, interval, is_share, number, values
from mrflow.sweep.store import Store
from mrflow.sweep.summary import load_rows, metrics_of, scales
from mrflow.sweep.timing import speedup

COLUMNS = (
    "chain", "prompt", "draw", "seed", "status", "error", "seconds", "nfe", "flops", "peak_bytes", "batch", "timed",
    "device", "machine", "model", "weights", "picture", "key",
)  # fmt: skip


MOST = 4  # metrics beside each other
WAYS = {"higher": " ↑", "lower": " ↓", "one": " → 1"}


@dataclass(frozen=True)
class Table:
    """The methods of a sweep in numbers: print it, or let a notebook show it."""

    heads: tuple[str, ...]
    lines: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        return self.text()

    def text(self, columns: int | None = None) -> str:
        """The table in lines, a method each; where these are longer than `columns`, a number each."""
        text = self._lines()
        if columns is None or max(map(len, text.splitlines()[: 2 + len(self.lines)])) <= columns:
            return text
        width = max(map(len, self.heads[1:]))
        pairs = [(line[0], [c for c in zip(self.heads[1:], line[1:], strict=True) if c[1]]) for line in self.lines]
        return "\n".join(
            (
                *(line for label, cells in pairs for line in (label, *(f"  {h:<{width}}  {c}" for h, c in cells))),
                *self.notes,
            )
        )

    def _lines(self) -> str:
        widths = [max(map(len, column)) for column in zip(self.heads, *self.lines, strict=True)]

        def line(cells: Sequence[str]) -> str:
            return "| " + " | ".join(f"{c:<{w}}" for c, w in zip(cells, widths, strict=True)) + " |"

        rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
        return "\n".join((line(self.heads), rule, *map(line, self.lines), *self.notes))

    def __repr__(self) -> str:
        return f"<{len(self.lines)} methods: {', '.join(self.heads[1:])}>"

    def _repr_html_(self) -> str:
        """For notebooks."""
        return html.html_table(self.heads, self.lines) + "".join(f"<p>{escape(note)}</p>" for note in self.notes)


def table(folder: str | Path, *metrics: str) -> Table:
    """Each method of a sweep: its rows, the means of metrics with 95 % intervals, its measured speed-up.

    Metrics default to the whole ones (no parts), at most four. Arrows say which way is better.

    Raises:
        PlanError: it is no sweep's folder, has no rows yet, or none of its rows has such a metric.
    """
    rows, reference = load_rows(folder)
    known = metrics_of(rows)
    if missing := [name for name in metrics if name not in known]:
        raise PlanError(f"no row of {folder} has the metric {missing[0]!r}; there are {', '.join(known) or 'none'}")
    chosen = metrics or tuple([name for name in known if "." not in name][:MOST])
    which = scales(rows, Store(folder).manifest())
    chains, notes = group_rows(rows, lambda r: r.chain), dict[str, None]()
    base = chains.get(reference, [])
    lines: list[tuple[str, ...]] = []
    for label, mine in chains.items():
        failed = sum(not row.done for row in mine)
        cells = [label, f"{len(mine)}" + (f" ({failed} failed)" if failed else "")]
        cells += [_cell(mine, metric, notes) for metric in chosen]
        fast = speedup(base, mine) if base and not any(row.rendered for row in mine) else None
        cells.append("" if fast is None else f"{fast:.2f}")
        lines.append(tuple(cells))
    heads = ("method", "rows", *(f"{m}{_unit(which[m])}" for m in chosen), f"speed-up over {reference or 'none'} ↑")
    return Table(heads, tuple(lines), tuple(notes))


def _unit(known: Scale) -> str:
    return (f", {known.unit}" if known.unit else "") + WAYS.get(known.aim or "", "")


def _cell(rows: Sequence[Row], metric: str, notes: dict[str, None]) -> str:
    """A mean with its interval; what must be known of the interval goes into the notes."""
    found, share = values(rows, metric), is_share(metric)
    if not found:
        return ""
    whole = interval(found, draws=2000, share=share)
    said = caveat(found, whole, share=share)
    if said:
        notes.setdefault(f"* {said}")
    return f"{whole:.3f}" + (" *" if said else "")


def flat(rows: Sequence[Row]) -> tuple[list[str], list[list[Any]]]:
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
    names, lines = flat(rows)
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
    names, lines = flat(rows)
    columns = list(zip(*lines, strict=True)) if lines else [()] * len(names)

    def typed(name: str, column: tuple[Any, ...]) -> Any:  # noqa: ANN401
        """A column; one without values has the type that it has in other sweeps: their tables can be joined."""
        kind = arrow.float64() if name.startswith(("metric.", "seconds")) else arrow.string()
        return arrow.array(list(column), kind if all(value is None for value in column) else None)

    whole = arrow.table({name: typed(name, column) for name, column in zip(names, columns, strict=True)})
    buffer = BytesIO()
    parquet.write_table(whole, buffer)
    write_bytes(out, buffer.getvalue())

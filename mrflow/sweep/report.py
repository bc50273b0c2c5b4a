"""What a sweep's folder shows: one HTML file that opens from disk, a table, plots.

Everything is computed here, once; the page only draws it. Prompts and errors are data from outside: they go into the
page as JSON and onto it as text, never as markup.
"""

import base64
import csv
import json
import logging
import math
import os
import stat
import struct
from collections.abc import Mapping, Sequence
from importlib import resources
from io import BytesIO, StringIO
from pathlib import Path
from typing import Any, cast

import numpy as np

from mrflow.errors import PlanError
from mrflow.records.files import read_regular, write_bytes
from mrflow.sweep.aims import BUILT_IN, COSTS, Aim, aim
from mrflow.sweep.rows import Row, row_key, seed_of
from mrflow.sweep.statistics import (
    MIN_PROMPTS,
    Comparison,
    Interval,
    by_pair,
    differences,
    family,
    grouped,
    interval,
    is_share,
    number,
    paired,
    pareto,
    values,
)
from mrflow.sweep.store import Store, read
from mrflow.sweep.timing import seconds, speedup

log = logging.getLogger(__name__)

MAX_BYTES = 200_000_000  # of embedded pictures; browsers become slow beyond
EMBED_ROWS, MAX_PAGE = 2000, 9_000_000  # with more rows, a page of so many bytes holds as many pictures as go in
SHOWN = 24  # pictures a chain that are shown as its worst
SIGNATURE = b"\x89PNG\r\n\x1a\n"
COLUMNS = (
    "chain", "prompt", "draw", "seed", "status", "error", "seconds", "nfe", "flops", "peak_bytes", "batch", "timed",
    "device", "model", "weights", "picture", "key",
)  # fmt: skip


def load(folder: str | Path) -> tuple[list[Row], str]:
    """The rows of a folder, and the label of its reference chain ("" where it has none).

    Where the folder was filled with several models, those of the one that ran last; a warning names the others. A chain
    that was changed under its label, a changed negative prompt and other versions of the packages leave rows behind,
    which are left out likewise.

    Raises:
        PlanError: it is no sweep's folder, or has no rows yet.
    """
    rows = read(folder)
    if not rows:
        raise PlanError(f"{folder} has no rows yet; run mrflow sweep first")
    said = Store(folder).manifest()
    mine = [row for row in rows if row.weights == said.get("weights")]
    if mine and len(mine) < len(rows):
        others = sorted({row.weights for row in rows} - {mine[0].weights})
        log.warning("%d rows of other weights are left out: %s", len(rows) - len(mine), ", ".join(others))
        rows = mine
    mine = [row for row in rows if _current(row, said)]
    if len(mine) < len(rows):
        log.warning("%d rows of other settings or versions are left out", len(rows) - len(mine))
        rows = mine
    if not rows:
        raise PlanError(f"{folder} has no rows of the settings that it has now; run mrflow sweep first")
    order = {label: place for place, label in enumerate(said.get("chains", {}))}
    rows.sort(key=lambda r: (order.get(r.chain, len(order)), r.prompt, r.draw))
    reference = said.get("reference")
    known = {row.chain for row in rows}
    return rows, reference if isinstance(reference, str) and reference in known else ""


def _current(row: Row, said: Mapping[str, Any]) -> bool:
    """Whether a row is what the sweep that ran last would make under this label."""
    chain = cast("dict[str, str]", said.get("prints", {})).get(row.chain)
    if row.seed != seed_of(row.prompt, row.draw):  # drawn when prompts still shared their noise
        return False
    if chain is None or not {"negative", "versions"} <= said.keys():
        return True
    return row.key == row_key(chain, row.model, row.weights, row.prompt, said["negative"], row.seed, said["versions"])


def metrics_of(rows: Sequence[Row]) -> list[str]:
    """The metrics that rows have: `score` first, then whole ones, then parts of others."""
    names = {name for row in rows for name in row.metrics}
    return sorted(names, key=lambda n: (n != "score", "." in n, n))


def summarise(rows: Sequence[Row], reference: str, *, draws: int = 4000) -> dict[str, Any]:
    """All numbers of the page, without pictures.

    Comparisons of the table of methods, over all metrics, are one family; those of a tag's table are one each. Rows
    that begin with the truth are yardsticks: they have no speed-up, and are not compared.
    """
    by_chain = grouped(rows, lambda r: r.chain)
    metrics = metrics_of(rows)
    tags = sorted({tag for row in rows for tag in row.tags})
    base = by_chain.get(reference, [])
    parts = {
        (label, tag): grouped((r for r in mine if tag in r.tags), lambda r, t=tag: r.tags[t])  # type: ignore[misc]
        for label, mine in by_chain.items()
        for tag in tags
    }
    yardsticks = {label for label, mine in by_chain.items() if any(r.rendered for r in mine)}
    others = {label: mine for label, mine in by_chain.items() if label != reference and label not in yardsticks}
    whole, whole_size = _family({(label, ""): mine for label, mine in others.items()}, base, metrics, draws)
    by_tag = {
        tag: _family({(label, v): p for label in others for v, p in parts[label, tag].items()}, base, metrics, draws)
        for tag in tags
    }
    chains: list[dict[str, Any]] = []
    for label, mine in by_chain.items():
        done = [r for r in mine if r.done]
        groups: dict[str, Any] = {
            tag: {
                value: {"metrics": _means(part, metrics, draws), "compare": by_tag[tag][0].get((label, value), {})}
                for value, part in parts[label, tag].items()
            }
            for tag in tags
        }
        chains.append(
            {
                "label": label,
                "n": len(mine),
                "failed": len(mine) - len(done),
                "nfe": done[0].nfe if done else None,
                "flops": done[0].flops if done else None,
                "peak": max((r.peak_bytes for r in done), default=0) or None,
                "seconds": _plain(seconds(done)),
                "speedup": _plain(speedup(base, mine)) if base and label not in yardsticks else None,
                "metrics": _means(mine, metrics, draws),
                "compare": whole.get((label, ""), {}),
                "groups": groups,
            }
        )
    first = rows[0]
    return {
        "model": first.model,
        "weights": first.weights,
        "reference": reference,
        "metrics": metrics,
        "tags": tags,
        "families": {"": whole_size, **{tag: size for tag, (_, size) in by_tag.items()}},
        "enough": MIN_PROMPTS,
        "chains": chains,
        "done": sum(r.done for r in rows),
        "failed": sum(not r.done for r in rows),
    }


def _plain(found: Interval | None) -> dict[str, Any] | None:
    if found is None:
        return None
    return {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in found.__dict__.items()}


def _mean(rows: Sequence[Row], metric: str, draws: int) -> dict[str, Any] | None:
    found = values(rows, metric)
    return _plain(interval(found, draws=draws, share=is_share(metric))) if found else None


def _means(rows: Sequence[Row], metrics: Sequence[str], draws: int) -> dict[str, Any]:
    found = {metric: _mean(rows, metric, draws) for metric in metrics}
    return {metric: value for metric, value in found.items() if value is not None}


Place = tuple[str, str]  # a chain's label and a tag's value
VERDICTS = {"higher": "higher", "lower": "lower", "no difference shown": "none", "too few prompts": "few"}


def _family(
    parts: Mapping[Place, Sequence[Row]], base: Sequence[Row], metrics: Sequence[str], draws: int
) -> tuple[dict[Place, dict[str, Any]], int]:
    """Parts of chains against the same part of the reference, metric by metric; and how many tests that made."""
    found: dict[tuple[Place, str], Comparison] = {}
    for metric in metrics:
        theirs = by_pair(base, metric)
        for place, rows in parts.items():
            if between := differences(by_pair(rows, metric), theirs):
                found[place, metric] = paired(metric, between, draws=draws)
    out: dict[Place, dict[str, Any]] = {}
    size = 0
    for (place, metric), one in family(found).items():
        facts = {"verdict": VERDICTS[one.verdict], "p": one.adjusted}
        out.setdefault(place, {})[metric] = {**(_plain(one.difference) or {}), **facts}
        size = one.family
    return out, size


def page(folder: str | Path, *, title: str | None = None, link: bool = False, beside: bool = True) -> str:
    """The HTML of a sweep's folder; pictures are embedded as they are saved, or linked to.

    With more than `EMBED_ROWS` rows, as many pictures are embedded as the page may hold, the worst first; the others
    are shown where the page lies in the folder, `beside` them.

    Raises:
        PlanError: there are no rows, or the pictures would make the file too large to embed.
    """
    where = Path(folder)
    rows, reference = load(where)
    data = summarise(rows, reference)
    large = len(rows) > EMBED_ROWS
    data |= {"title": title or where.resolve().name, "folder": str(where), "linked": link or (large and beside)}
    there, items = _Pictures(where), dict[tuple[str, int], dict[str, Any]]()
    sizes: dict[str, list[int]] = {}
    embedded: list[tuple[float, str]] = []  # what to embed, by how soon it should be seen
    for place, row in _ranked(rows, data["metrics"][0] if data["metrics"] else "seconds"):
        item = items.setdefault(
            (row.prompt, row.draw),
            {"prompt": row.prompt, "draw": row.draw, "seed": row.seed, "tags": dict(row.tags), "cells": {}},
        )
        picture = there(row.picture)
        stages = [[name, there(path)] for name, path in row.stage_pictures]
        if row.picture is not None and row.chain not in sizes and picture is not None:
            sizes[row.chain] = _size(where / picture)
        cell: dict[str, Any] = {"seconds": _short(row.seconds)}
        cell |= {"metrics": {name: _short(value) for name, value in row.metrics.items()}} if row.metrics else {}
        cell |= {"picture": picture} if picture is not None else {}
        cell |= {"stages": stages} if stages else {}
        item["cells"][row.chain] = cell if row.done else {"error": row.error}
        embedded += [(place, name) for name in (picture, *(path for _, path in stages)) if name is not None]
    known: dict[str, Aim] = {**COSTS, **BUILT_IN, **cast("dict[str, Aim]", Store(where).manifest().get("aims", {}))}
    data["aims"] = {name: aim(name, known) for name in (*data["metrics"], *COSTS)}
    data |= {"items": list(items.values()), "sizes": sizes}
    text = _safe(data)
    pictures: dict[str, str] = {}
    if not link:
        left = max(0, MAX_PAGE - len(text) - len(_template())) if large else MAX_BYTES
        for _, name in sorted(embedded, key=lambda pair: pair[0]):
            raw = _png(where / name)
            if not raw:
                continue
            left -= len(raw) * 4 // 3 + len(name) + 40
            if left < 0:
                break
            pictures[name] = "data:image/png;base64," + base64.b64encode(raw).decode()
        if left < 0 and not large:
            raise PlanError(
                f"the pictures of {where} would make a file of more than {MAX_BYTES // 1_000_000} MB; "
                "--link refers to them instead (keep the file in the sweep's folder)"
            )
    before, _, after = _template().partition("/*DATA*/")
    return "".join((before, text[:-1], ', "pictures": ', _safe(pictures), "}", after))


def _safe(data: object) -> str:
    text = json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    # "</script>" and "<!--" inside a JSON string would end the element that holds it.
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _template() -> str:
    return resources.files("mrflow.sweep").joinpath("report.html").read_text("utf-8")


def _ranked(rows: Sequence[Row], metric: str) -> list[tuple[float, Row]]:
    """Every row in its order, with how soon its picture is wanted: the page shows the lowest of each chain first."""
    worst: dict[str, list[tuple[float, str]]] = {}
    for row in rows:
        if (value := number(row, metric)) is not None:
            worst.setdefault(row.chain, []).append((value, row.key))
    soon = {key for each in worst.values() for _, key in sorted(each)[:SHOWN]}
    return [(place if row.key in soon else place + len(rows), row) for place, row in enumerate(rows)]


def _short(value: float) -> float:
    """Six digits, which is more than the page shows."""
    return float(f"{value:.6g}")


class _Pictures:
    """Which pictures lie in a folder: regular files, to which no link leads out of it."""

    def __init__(self, where: Path) -> None:
        self._where, self._root = str(where), os.path.realpath(where)
        self._inside: dict[str, bool] = {}

    def __call__(self, name: str | None) -> str | None:
        """The name where there is such a picture, else None."""
        if name is None:
            return None
        path = f"{self._where}/{name}"
        room = os.path.dirname(path)
        if room not in self._inside:
            self._inside[room] = os.path.realpath(room).startswith(self._root + os.sep)
        try:
            return name if self._inside[room] and stat.S_ISREG(os.lstat(path).st_mode) else None
        except OSError:
            return None


def _png(path: Path) -> bytes:
    """A picture's file; empty where it is no PNG of a sensible size."""
    try:
        data = read_regular(path, most=MAX_BYTES)
    except (OSError, ValueError):
        return b""
    return data if data.startswith(SIGNATURE) else b""


def _size(path: Path) -> list[int]:
    """Width and height from a PNG's head."""
    try:
        with path.open("rb") as file:
            head = file.read(24)
    except OSError:
        head = b""
    return list(struct.unpack(">II", head[16:24])) if head.startswith(SIGNATURE) and len(head) == 24 else [1, 1]


def write_report(folder: str | Path, out: Path, *, title: str | None = None, link: bool = False) -> None:
    """Write the page.

    Raises:
        PlanError, ResourceError: as `page`; the file cannot be written.
    """
    beside = out.parent.resolve() == Path(folder).resolve()
    write_bytes(out, page(folder, title=title, link=link, beside=beside).encode("utf-8"))


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


TICKS = (0.1, 0.2, 0.3, 0.5, 0.8, 1, 2, 3, 5, 8, 12, 20, 30, 50, 80, 120, 200, 500, 1000)  # of speed-ups


def write_plots(summary: Mapping[str, Any], stem: Path, *, metric: str | None = None) -> list[Path]:
    """Quality against speed-up, and its parts by method where it has any, as PNG and SVG (extra `[sweep]`); the files.

    Raises:
        PlanError: matplotlib is not installed, or no chain has both a speed-up and the metric.
    """
    try:
        import matplotlib  # type: ignore[import-not-found,unused-ignore]  # pyright: ignore
    except ImportError as error:
        raise PlanError(
            f"plots need matplotlib, which cannot be imported ({error}): pip install 'mrflow[sweep]'"
        ) from None
    matplotlib.use("Agg")
    from matplotlib import pyplot  # type: ignore[import-not-found,unused-ignore]  # pyright: ignore

    chosen = metric or next(iter(summary["metrics"]), "")
    points = {
        c["label"]: (c["speedup"], c["metrics"][chosen])
        for c in summary["chains"]
        if c["speedup"] and chosen in c["metrics"]
    }
    if not points:
        raise PlanError(f"no method has both a speed-up and {chosen or 'a metric'}; a plot needs a reference chain")
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for i, (label, (fast, good)) in enumerate(points.items()):
        x, y = fast["mean"], good["mean"]
        reach = [_reach(v) for v in (fast, good)]
        axes.errorbar(
            x, y, xerr=np.abs(reach[0]), yerr=np.abs(reach[1]), fmt="osD^vP*X"[i // 10 % 8], label=label, markersize=5,
            capsize=0, elinewidth=1,
        )  # fmt: skip
    front = pareto({n: (-f["mean"], g["mean"]) for n, (f, g) in points.items()})
    axes.plot([points[n][0]["mean"] for n in front], [points[n][1]["mean"] for n in front], "--", color="0.6", zorder=0)
    axes.set(xscale="log", xlabel=f"speed-up over {summary['reference']}", ylabel=chosen)
    speeds = [fast["mean"] for fast, _ in points.values()]
    ticks = [t for t in TICKS if min(speeds) / 1.1 <= t <= max(speeds) * 1.2]
    axes.set_xticks(ticks, [f"{t:g}x" for t in ticks])
    axes.minorticks_off()
    figure.legend(loc="outside right upper", fontsize=8, frameon=False, ncols=-(-len(points) // 24))
    axes.grid(visible=True, alpha=0.25)
    out = _saved(figure, stem)
    pyplot.close(figure)
    base = chosen.split(".")[0]
    parts = [m for m in summary["metrics"] if m.startswith(f"{base}.")]
    if parts:
        figure, axes = pyplot.subplots(
            figsize=(2.5 + 0.9 * len(parts), 1 + 0.35 * len(summary["chains"])), layout="constrained"
        )
        cells = [[c["metrics"].get(m, {}).get("mean", np.nan) for m in parts] for c in summary["chains"]]
        axes.imshow(cells, cmap="Blues", aspect="auto")
        axes.set_xticks(range(len(parts)), [m.removeprefix(f"{base}.") for m in parts])
        axes.set_yticks(range(len(cells)), [c["label"] for c in summary["chains"]])
        spread = np.nanmin(cells), np.nanmax(cells)
        for i, row in enumerate(cells):
            for j, value in enumerate(row):
                dark = value > (spread[0] + spread[1]) / 2
                axes.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=8, color="w" if dark else "k")
        out += _saved(figure, stem.with_name(f"{stem.name}-categories"))
        pyplot.close(figure)
    return out


def _reach(found: Mapping[str, Any]) -> list[list[float]]:
    """How far an interval goes below and above its mean, for a plot; nowhere where there is none."""
    if found["low"] is None:
        return [[0.0], [0.0]]
    return [[found["mean"] - found["low"]], [found["high"] - found["mean"]]]


def _saved(figure: Any, stem: Path) -> list[Path]:  # noqa: ANN401
    out: list[Path] = []
    for ending in ("png", "svg"):
        buffer = BytesIO()
        figure.savefig(buffer, format=ending, dpi=160)
        path = stem.with_name(f"{stem.name}.{ending}")
        write_bytes(path, buffer.getvalue())
        out.append(path)
    return out

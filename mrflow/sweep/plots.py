"""Figures of a sweep: quality against speed-up, and the parts of a metric by method (extra `[sweep]`)."""

from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from mrflow.errors import PlanError
from mrflow.records.files import write_bytes
from mrflow.sweep.statistics import pareto

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

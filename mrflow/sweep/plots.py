"""Figures of a sweep: quality against speed-up, and the parts of a metric by method (extra `[sweep]`)."""

from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from mrflow.errors import PlanError
from mrflow.records.files import write_bytes
from mrflow.sweep.aims import NONE, Scale
from mrflow.sweep.statistics import pareto
from mrflow.sweep.styles import COLOURS, MARKERS

TICKS = (0.1, 0.2, 0.3, 0.5, 1, 2, 3, 5, 8, 12, 20, 30, 50, 80, 120, 200, 500, 1000)  # of speed-ups
BETTER = {"higher": "higher is better ↑", "lower": "lower is better ↓", "one": "1 is best", "uniform": "even is best"}
Ends = tuple[float, float, float]  # a mean, and where its interval begins and ends


def write_plots(summary: Mapping[str, Any], stem: Path, *, metric: str | None = None) -> list[Path]:
    """Quality against speed-up, and its parts by method where it has any, as PNG and SVG (extra `[sweep]`); the files.

    Axes say which way is better, by the metric's scale; what no other beats is joined only where it says one.

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
    known = _scale(summary, chosen)
    chains = [c for c in summary["chains"] if c["speedup"] and chosen in c["metrics"]]
    if not chains:
        raise PlanError(f"no method has both a speed-up and {chosen or 'a metric'}; a plot needs a reference chain")
    points = {c["label"]: (_ends(c["speedup"]), _ends(c["metrics"][chosen])) for c in chains}
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    axes.set(xscale="log", xlabel=f"speed-up over {summary['reference']}: faster is better →")
    axes.set_ylabel(axis_label(chosen, known))
    speeds = [fast[0] for fast, _ in points.values()]
    slowest, fastest = min(speeds) / 1.3, max(speeds) * 1.3
    axes.set_xlim(slowest, fastest)
    low, high = limits([good for _, good in points.values()], known)
    axes.set_ylim(low, high)
    for chain in chains:
        fast, good = points[chain["label"]]
        draw_point(axes, fast, good, COLOURS[chain["style"][0]], MARKERS[chain["style"][1]], label=chain["label"])
    front = front_of({label: (fast[0], good[0]) for label, (fast, good) in points.items()}, known)
    axes.plot([points[n][0][0] for n in front], [points[n][1][0] for n in front], "--", color="0.6", zorder=0)
    ticks = speed_ticks(slowest, fastest)
    axes.set_xticks(ticks, [f"{t:g}x" for t in ticks])
    axes.set_yticks([t for t in axes.get_yticks() if low <= t <= high and _inside(t, known)])
    axes.minorticks_off()
    figure.legend(loc="outside right upper", fontsize=8, frameon=False, ncols=-(-len(points) // 24))
    axes.grid(visible=True, alpha=0.25)
    out = _save(figure, stem)
    pyplot.close(figure)
    base = chosen.split(".")[0]
    parts = [m for m in summary["metrics"] if m.startswith(f"{base}.")]
    if parts:
        figure = _parts(summary, base, parts)
        out += _save(figure, stem.with_name(f"{stem.name}-categories"))
        pyplot.close(figure)
    return out


def _parts(summary: Mapping[str, Any], base: str, parts: Sequence[str]) -> Any:  # noqa: ANN401
    """A table of means, darker where they are better (higher, where neither way is better)."""
    from matplotlib import pyplot  # type: ignore[import-not-found,unused-ignore]  # pyright: ignore

    height = 1.4 + 0.35 * len(summary["chains"])
    figure, axes = pyplot.subplots(figsize=(2.5 + 0.9 * len(parts), height), layout="constrained")
    means = [[c["metrics"].get(m, {}).get("mean", np.nan) for m in parts] for c in summary["chains"]]
    known = [_scale(summary, m) for m in parts]
    good = np.array([[_good(s, v) for s, v in zip(known, row, strict=True)] for row in means])
    axes.imshow(good, cmap="Blues", aspect="auto")
    axes.set_xticks(range(len(parts)), [m.removeprefix(f"{base}.") for m in parts])
    axes.set_yticks(range(len(means)), [c["label"] for c in summary["chains"]])
    directed = all(s.goodness(0) is not None for s in known)
    figure.suptitle(f"{base}: darker is {'better' if directed else 'higher'}", fontsize=9)
    middle = (np.nanmin(good) + np.nanmax(good)) / 2
    for i, row in enumerate(means):
        for j, value in enumerate(row):
            colour = "w" if good[i, j] > middle else "k"
            axes.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=8, color=colour)
    return figure


def _good(known: Scale, value: float) -> float:
    found = known.goodness(value)
    return value if found is None else found


def _scale(summary: Mapping[str, Any], metric: str) -> Scale:
    said = summary.get("scales", {}).get(metric)
    return NONE if said is None else Scale(**said)


def front_of(points: Mapping[str, tuple[float, float]], known: Scale) -> list[str]:
    """The names whose (speed-up, value) no other beats in both, fastest first; none where no value is better."""
    good = {name: (-fast, known.goodness(value)) for name, (fast, value) in points.items()}
    return pareto({name: (cost, value) for name, (cost, value) in good.items() if value is not None})


def axis_label(name: str, known: Scale) -> str:
    """`stray, %: lower is better ↓`."""
    unit, better = f", {known.unit}" if known.unit else "", BETTER.get(known.aim or "")
    return f"{name}{unit}" + (f": {better}" if better else "")


def speed_ticks(slowest: float, fastest: float) -> list[float]:
    """Round speed-ups between two, three at the least."""
    ticks = [float(t) for t in TICKS if slowest <= t <= fastest]
    unit = 10.0 ** np.floor(np.log10(fastest - slowest))
    for step in (unit, unit / 2, unit / 5, unit / 10):
        if len(ticks) >= 3:
            break
        ticks = [float(i * step) for i in range(int(np.ceil(slowest / step)), int(fastest / step) + 1)]
    return ticks


def limits(values: Sequence[Ends], known: Scale) -> tuple[float, float]:
    """From where to where an axis goes: the means with room, and intervals as far as they do not dwarf them.

    It never goes further beyond the range that the number can have than marks need.
    """
    means = [mean for mean, *_ in values]
    least, most = min(means), max(means)
    room = most - least or abs(most) * 0.1 or 1.0
    low = max(min(low for _, low, _ in values), least - 1.5 * room)
    high = min(max(high for *_, high in values), most + 1.5 * room)
    margin = 0.04 * (high - low or room)
    low, high = low - margin, high + margin
    if known.low is not None:
        low = max(low, known.low - margin)
    if known.high is not None:
        high = min(high, known.high + margin)
    return low, high


def draw_point(axes: Any, x: Ends, y: Ends, colour: str, marker: str, *, label: str = "") -> None:  # noqa: ANN401
    """A point with its intervals on axes whose limits are set; an arrow where one goes on beyond them."""
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    axes.plot([max(x[1], left), min(x[2], right)], [y[0]] * 2, color=colour, lw=1, alpha=0.5)
    axes.plot([x[0]] * 2, [max(y[1], bottom), min(y[2], top)], color=colour, lw=1, alpha=0.5)
    ends = (
        (x[1] < left, left, y[0], "<"), (x[2] > right, right, y[0], ">"),
        (y[1] < bottom, x[0], bottom, "v"), (y[2] > top, x[0], top, "^"),
    )  # fmt: skip
    for beyond, at, height, arrow in ends:
        if beyond:
            axes.plot(at, height, arrow, color=colour, markersize=5, alpha=0.7, clip_on=False)
    inside = (min(max(x[0], left), right), min(max(y[0], bottom), top))
    axes.plot(*inside, marker, color=colour, markersize=6, label=label, linestyle="none", clip_on=False)


def _inside(value: float, known: Scale) -> bool:
    return (known.low is None or value >= known.low - 1e-9) and (known.high is None or value <= known.high + 1e-9)


def _ends(found: Mapping[str, Any]) -> Ends:
    """An interval from mean to mean where there is none."""
    mean = found["mean"]
    return (mean, mean, mean) if found["low"] is None else (mean, found["low"], found["high"])


def _save(figure: Any, stem: Path) -> list[Path]:  # noqa: ANN401
    out: list[Path] = []
    for ending in ("png", "svg"):
        buffer = BytesIO()
        figure.savefig(buffer, format=ending, dpi=160)
        path = stem.with_name(f"{stem.name}.{ending}")
        write_bytes(path, buffer.getvalue())
        out.append(path)
    return out

"""A figure of a study: score and stray paint against speed, a line for each method."""

from collections.abc import Callable, Collection
from pathlib import Path

from mrflow.sweep import Row, interval, values
from mrflow.sweep.statistics import grouped, is_share
from mrflow.sweep.timing import speedup

FLOOR, CLEAN = 0.8, 0.02  # of the plots; what lies below is marked at their lower edges


def speed_figure(
    rows: list[Row], reference: str, path: Path, method: Callable[[str], str], strong: Collection[str]
) -> None:
    """Score and stray paint, with intervals, against measured speed-up: a line a method, a mark an operating point.

    `method` is a label without its operating point; `strong` are the methods that are drawn with heavy lines.
    """
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot as plt

    plt.rcParams["svg.hashsalt"] = "mrflow"
    figure, (upper, lower) = plt.subplots(2, 1, figsize=(9, 8), layout="constrained", sharex=True)
    by_chain = grouped(rows, lambda r: r.chain)
    fast = {label: speedup(by_chain[reference], mine) for label, mine in by_chain.items()}
    for axes, metric, floor in ((upper, "score", FLOOR), (lower, "stray", CLEAN)):
        lines: dict[str, list[tuple[float, float, float, float]]] = {}
        for label, mine in by_chain.items():
            sooner, found = fast[label], interval(values(mine, metric), draws=4000, share=is_share(metric))
            if sooner is not None:
                lines.setdefault(method(label), []).append((sooner.mean, found.mean, found.low, found.high))
        for (name, points), mark in zip(lines.items(), "osD^vPX*hdp<>H8", strict=False):
            points.sort()
            x, y = [p[0] for p in points], [max(p[1], floor) for p in points]
            below = [v - min(v, max(p[2], floor)) for v, p in zip(y, points, strict=True)]
            above = [max(v, p[3]) - v for v, p in zip(y, points, strict=True)]
            heavy = name in strong
            axes.errorbar(
                x, y, (below, above), label=name, marker=mark, markersize=6 if heavy else 5,
                linewidth=2 if heavy else 1, elinewidth=0.6, alpha=1.0 if heavy else 0.75,
            )  # fmt: skip
            for at, v, *_ in points:
                if v < floor:
                    axes.annotate(f"{v:.2f}", (at, floor), (0, 6), textcoords="offset points", ha="center")
        axes.grid(alpha=0.25)
    upper.set(ylabel="score [95 %]", ylim=(FLOOR, 1.01))
    lower.set(ylabel="stray paint, % of a picture [95 %]", yscale="log", ylim=(CLEAN, 8))
    shares = (CLEAN, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)
    lower.set_yticks(shares, [f"{t:g}" for t in shares])
    lower.set(xscale="log", xlabel=f"speed-up over {reference}, measured")
    ticks = (1, 2, 3, 5, 8, 12, 20, 40)
    lower.set_xticks(ticks, [f"{t}x" for t in ticks])
    for axes in (upper, lower):
        axes.minorticks_off()
    upper.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False)
    figure.savefig(path, metadata={"Date": None})

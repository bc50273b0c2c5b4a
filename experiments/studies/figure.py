"""A figure of a study: what can be read, of all and of letters, against speed, a line for each method."""

from collections.abc import Callable, Collection
from pathlib import Path

from experiments.looks import looks
from experiments.studies.common import SCORE
from mrflow.sweep import Row, interval, values
from mrflow.sweep.aims import BUILT_IN
from mrflow.sweep.plots import axis_label
from mrflow.sweep.statistics import group_rows, is_share
from mrflow.sweep.timing import speedup


def speed_figure(
    rows: list[Row], reference: str, path: Path, method: Callable[[str], str], strong: Collection[str]
) -> None:
    """Both shares, with intervals, against measured speed-up: a line a method, a mark an operating point.

    `method` is a label without its operating point; `strong` are those that are drawn with heavy
    lines.
    """
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot as plt

    plt.rcParams["svg.hashsalt"] = "mrflow"
    figure, (upper, lower) = plt.subplots(2, 1, figsize=(9, 8), layout="constrained", sharex=True)
    by_chain = group_rows(rows, lambda r: r.chain)
    fast = {label: speedup(by_chain[reference], mine) for label, mine in by_chain.items()}
    for axes, metric in ((upper, SCORE), (lower, f"{SCORE}.letters")):
        lines: dict[str, list[tuple[float, float, float, float]]] = {}
        for label, mine in by_chain.items():
            sooner, found = fast[label], interval(values(mine, metric), draws=4000, share=is_share(metric))
            if sooner is not None:
                lines.setdefault(method(label), []).append((sooner.mean, found.mean, found.low, found.high))
        look = looks(lines)
        for name, points in lines.items():
            points.sort()
            colour, marker = look[name]
            x, y, low, high = zip(*points, strict=True)
            below = [v - to for v, to in zip(y, low, strict=True)]
            above = [to - v for v, to in zip(y, high, strict=True)]
            heavy = name in strong
            axes.errorbar(
                x, y, (below, above), label=name, color=colour, marker=marker, markersize=6 if heavy else 5,
                linewidth=2 if heavy else 1, elinewidth=0.6, alpha=1.0 if heavy else 0.75,
            )  # fmt: skip
        axes.grid(alpha=0.25)
        axes.set(ylabel=f"{axis_label(metric, BUILT_IN[SCORE])} [95 %]", ylim=(-0.01, 1.01))
    lower.set(xscale="log", xlabel=f"speed-up over {reference}, measured: faster is better →")
    ticks = (1, 2, 3, 5, 8, 12, 20, 40)
    lower.set_xticks(ticks, [f"{t}x" for t in ticks])
    for axes in (upper, lower):
        axes.minorticks_off()
    upper.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False)
    figure.savefig(path, metadata={"Date": None})

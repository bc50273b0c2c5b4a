"""The failure map: what is legible at which size of detail, a panel a kind, a line a method."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from experiments.failures.details import DETAILS
from experiments.failures.tables import CELL, curve
from experiments.looks import looks
from mrflow.sweep import Row, interval
from mrflow.sweep.statistics import group_rows

STRONG = ("native", "staged", "truth, staged path", "truth, autoencoder")
Curve = list[tuple[float, float, float, float]]
"""Of one method: size in % of the side, share read, and its interval's ends."""


def draw(rows: Sequence[Row], path: Path, *, size: int, low: int, methods: Sequence[str] | None = None) -> None:
    """Write the figure: share read against size in % of the side, with latent cells of the low stage above.

    `methods` are drawn beside the truth's two paths (dashed); all of the rows unless said.
    """
    chains = group_rows(rows, lambda r: r.chain)
    labels = [label for label in methods or chains if label in chains and label != "truth"]
    kinds = [name for name, d in DETAILS.items() if any(len(curve(chains[label], d)) > 1 for label in labels)]
    found = dict[str, dict[str, Curve]]()
    for name in kinds:
        shares = {label: sorted(curve(chains[label], DETAILS[name]).items()) for label in labels}
        spans = {k: [(100 * s, interval(v, draws=4000, share=True)) for s, v in each] for k, each in shares.items()}
        found[name] = {k: [(x, i.mean, i.low, i.high) for x, i in each] for k, each in spans.items() if each}
    plot(found, path, size=size, low=low)


def plot(curves: Mapping[str, Mapping[str, Curve]], path: Path, *, size: int, low: int) -> None:
    """Write the figure of curves by kind of detail and method."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot as plt

    plt.rcParams["svg.hashsalt"] = "mrflow"
    wide = 3.4 * len(curves)
    figure, panels = plt.subplots(1, len(curves), figsize=(wide, 4.4), layout="constrained", squeeze=False)
    look = looks(label for lines in curves.values() for label in lines)
    for axes, (name, lines) in zip(panels[0], curves.items(), strict=True):
        detail = DETAILS[name]
        for label, points in lines.items():
            x, y, below, above = zip(*points, strict=True)
            spread = [v - to for v, to in zip(y, below, strict=True)], [to - v for v, to in zip(y, above, strict=True)]
            colour, marker = look[label]
            axes.errorbar(
                x, y, spread, label=label, color=colour, marker=marker, markersize=4, elinewidth=0.6,
                linewidth=2 if label in STRONG else 1, linestyle="--" if label.startswith("truth") else "-",
            )  # fmt: skip
        axes.axhline(detail.chance, color="#999999", linewidth=0.8, linestyle=":")
        ticks = [100 * s for s in detail.sizes.values()]
        axes.set(xscale="log", ylim=(-0.02, 1.04), title=name, xlabel="% of the side")
        axes.set_xticks(ticks, [f"{t:.3g}" for t in ticks])
        axes.minorticks_off()
        axes.grid(alpha=0.25)
        upper = axes.secondary_xaxis("top")
        upper.set_xticks(ticks, [f"{t / 100 * low / CELL:.2g}" for t in ticks], fontsize=7)
        upper.minorticks_off()
        upper.set_xlabel("latent cells of the low stage", fontsize=8)
    panels[0][0].set_ylabel(f"share read at {size} px: higher is better ↑\n[95 %]; dotted: by chance")
    panels[0][-1].legend(loc="upper left", bbox_to_anchor=(1.02, 1.0), frameon=False, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)

"""The failure map: what is legible at which size of detail, a panel a kind, a line a method."""

from collections.abc import Sequence
from pathlib import Path

from experiments.failures.details import DETAILS
from experiments.failures.tables import CELL, curve
from mrflow.sweep import Row, interval
from mrflow.sweep.statistics import group_rows

STRONG = {"native": "#0072b2", "staged": "#d55e00", "truth, staged path": "#d55e00", "truth, autoencoder": "#0072b2"}
PALETTE = ("#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f", "#8c564b", "#bcbd22", "#17becf")


def draw(rows: Sequence[Row], path: Path, *, size: int, low: int, methods: Sequence[str] | None = None) -> None:
    """Write the figure: share read against size in % of the side, with latent cells of the low stage above.

    `methods` are drawn beside the truth's two paths (dashed); all of the rows unless said.
    """
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot as plt

    plt.rcParams["svg.hashsalt"] = "mrflow"
    chains = group_rows(rows, lambda r: r.chain)
    labels = [label for label in methods or chains if label in chains and label != "truth"]
    kinds = [name for name, d in DETAILS.items() if any(len(curve(chains[label], d)) > 1 for label in labels)]
    figure, panels = plt.subplots(1, len(kinds), figsize=(3.4 * len(kinds), 4.4), layout="constrained", squeeze=False)
    others = iter(PALETTE * 9)
    colours = {label: STRONG.get(label) or next(others) for label in labels}
    for axes, name in zip(panels[0], kinds, strict=True):
        detail = DETAILS[name]
        for label in labels:
            points = [
                (100 * s, interval(v, draws=4000, share=True)) for s, v in sorted(curve(chains[label], detail).items())
            ]
            if not points:
                continue
            x, y = [p[0] for p in points], [p[1].mean for p in points]
            spread = [p[1].mean - p[1].low for p in points], [p[1].high - p[1].mean for p in points]
            axes.errorbar(
                x, y, spread, label=label, color=colours[label], marker="o", markersize=4, elinewidth=0.6,
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
    panels[0][0].set_ylabel(f"share read at {size} px [95 %]; dotted: by chance")
    panels[0][-1].legend(loc="upper left", bbox_to_anchor=(1.02, 1.0), frameon=False, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)

"""Which method gives which quality for which speed: MrFlow, its rivals, distillation, and both at once?

Three operating points of each method. Caches and token merging are beside native sampling of 50 steps; transitions go
from 128 to 256 pixels; the student is the embedded model's own LoRA for few unguided steps.
"""

from pathlib import Path

import mrflow as mf
from experiments.studies.common import LOW, METRICS, MODEL, SIZE, captions, native, paper
from mrflow.caches import DBCache, DBTaylor, MagCache, TaylorSeer, TeaCache, ToMA
from mrflow.students import POCKET
from mrflow.sweep import Row, Sweep, interval, values
from mrflow.sweep.report import speedup
from mrflow.sweep.statistics import grouped

SPLITS = ((12, 6), (6, 3), (3, 2))  # steps before and after a change of resolution


def cached(cache: mf.caches.Cache) -> mf.Chain[mf.Start, mf.Pixels]:
    """Native sampling with a cache."""
    return mf.recipes.native(size=SIZE, steps=50, cache=cache)


chains = {
    "native 50": native(50),
    **{f"native {n}": native(n) for n in (12, 6, 4, 3, 2)},
    **{f"MrFlow {n} + 1": paper(n) for n in (12, 6, 3)},
    **{f"TeaCache {t:g}": cached(TeaCache(t)) for t in (0.1, 0.25, 0.6)},
    **{f"MagCache {t:g}": cached(MagCache(t, limit=9)) for t in (0.15, 0.4, 1.2)},
    **{f"DBCache {t:g}": cached(DBCache(t, front=1, warmup=2)) for t in (0.1, 0.2, 0.4)},
    **{f"DBTaylor {t:g}": cached(DBTaylor(t, front=1, warmup=2)) for t in (0.1, 0.2, 0.4)},
    **{f"TaylorSeer {n}": cached(TaylorSeer(n)) for n in (3, 6, 12)},
    **{f"ToMA {r:g}": cached(ToMA(r, every=1, skip=1)) for r in (0.25, 0.5, 0.75)},
    **{f"lift {a} + {b}": mf.recipes.lift(low=LOW, size=SIZE, steps=(a, b)) for a, b in SPLITS},
    **{f"SelfLift {a} + {b}": mf.recipes.selflift(low=LOW, size=SIZE, steps=(a, b)) for a, b in SPLITS},
    **{f"SPEED {a} + {b}": mf.recipes.speed(sizes=(LOW, SIZE), steps=(a, b)) for a, b in SPLITS},
    **{
        f"RALU {'+'.join(map(str, n))}": mf.recipes.ralu(size=SIZE, steps=n, shift=2.0)
        for n in ((5, 6, 7), (2, 3, 5), (1, 2, 3))
    },
    **{f"student {n}": mf.recipes.few(POCKET, size=SIZE, steps=n) for n in (4, 2, 1)},
    **{f"student {n} + 1": mf.recipes.stacked(POCKET, low=LOW, size=SIZE, steps=n) for n in (4, 2, 1)},
}
sweep = Sweep(chains, captions(), model=MODEL, metrics=METRICS)
FLOOR = 0.8  # of the plot; what lies below is marked at its lower edge


def method(label: str) -> str:
    """A label without its operating point."""
    if label.startswith("student"):
        return "student, then MrFlow" if "+" in label else "student"
    return label.partition(" ")[0]


def draw(rows: list[Row], reference: str, path: Path) -> None:
    """Score with its interval against measured speed-up: a line for each method, a mark for each operating point."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot as plt

    by_chain = grouped(rows, lambda r: r.chain)
    lines: dict[str, list[tuple[float, float, float, float]]] = {}
    for label, mine in by_chain.items():
        fast, good = speedup(by_chain[reference], mine, draws=4000), interval(values(mine, "score"), draws=4000)
        if fast is not None:
            lines.setdefault(method(label), []).append((fast.mean, good.mean, good.low, good.high))
    plt.rcParams["svg.hashsalt"] = "mrflow"
    figure, axes = plt.subplots(figsize=(9, 5), layout="constrained")
    for (name, points), mark in zip(lines.items(), "osD^vPX*hdp<>H8", strict=False):
        points.sort()
        x, y = [p[0] for p in points], [max(p[1], FLOOR) for p in points]
        bars = [
            [max(0.0, p[1] - max(p[2], FLOOR)) for p in points],
            [max(0.0, p[3] - max(p[1], FLOOR)) for p in points],
        ]
        strong = name in ("native", "MrFlow", "student", "student, then MrFlow")
        axes.errorbar(
            x, y, bars, label=name, marker=mark, markersize=6 if strong else 5, linewidth=2 if strong else 1,
            elinewidth=0.6, alpha=1.0 if strong else 0.75,
        )  # fmt: skip
        for fast_at, score, *_ in points:
            if score < FLOOR:
                axes.annotate(f"{score:.2f}", (fast_at, FLOOR), (0, 6), textcoords="offset points", ha="center", size=8)
    axes.set(xscale="log", xlabel=f"speed-up over {reference}, measured", ylabel="score [95 %]", ylim=(FLOOR, 1.0))
    ticks = (1, 2, 3, 5, 8, 12, 20, 40)
    axes.set_xticks(ticks, [f"{t}x" for t in ticks])
    axes.minorticks_off()
    axes.grid(alpha=0.25)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    figure.savefig(path, metadata={"Date": None})

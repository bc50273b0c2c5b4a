"""Which method gives which quality for which speed: MrFlow, its rivals, distillation, and both at once?

Three operating points of each method. Caches and token merging are beside native sampling of 50 steps; transitions go
from 64 to 128 pixels; the student is the embedded model's own LoRA for few unguided steps.
"""

from pathlib import Path

import mrflow as mf
from experiments.studies.common import LOW, METRICS, MODEL, SIZE, captions, native, paper
from experiments.studies.figure import speed_figure
from mrflow.caches import DMD, DBCache, MagCache, SeaCache, Spectrum, TaylorSeer, TeaCache, ToMA
from mrflow.students import POCKET
from mrflow.sweep import Row, Sweep

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
    **{f"DBTaylor {t:g}": cached(DBCache(t, front=1, warmup=2, order=1)) for t in (0.1, 0.2, 0.4)},
    **{f"TaylorSeer {n}": cached(TaylorSeer(n)) for n in (3, 6, 12)},
    **{f"SeaCache {t:g}": cached(SeaCache(t)) for t in (0.15, 0.3, 0.6)},
    **{f"Spectrum {g:g}": cached(Spectrum(growth=g)) for g in (0.25, 0.75, 3.0)},
    **{f"DMD {n}": cached(DMD(1.0, front=1, warmup=4, limit=n - 1)) for n in (3, 6, 12)},
    **{f"ToMA {r:g}": cached(ToMA(r, every=1, skip=1)) for r in (0.25, 0.5, 0.75)},
    **{f"lift {a} + {b}": mf.recipes.lift(low=LOW, size=SIZE, steps=(a, b)) for a, b in SPLITS},
    **{f"SelfLift {a} + {b}": mf.recipes.selflift(low=LOW, size=SIZE, steps=(a, b)) for a, b in SPLITS},
    **{f"SPEED {a} + {b}": mf.recipes.speed(sizes=(LOW, SIZE), steps=(a, b)) for a, b in SPLITS},
    **{
        f"RALU {'+'.join(map(str, n))}": mf.recipes.ralu(size=SIZE, steps=n, shift=2.0)
        for n in ((5, 6, 7), (2, 3, 5), (1, 2, 3))
    },
    **{f"JiT {'+'.join(map(str, n))}": mf.recipes.jit(size=SIZE, steps=n) for n in ((7, 4, 7), (4, 3, 4), (2, 2, 3))},
    **{
        f"Fresco {'+'.join(map(str, n))}": mf.recipes.fresco(size=SIZE, steps=n)
        for n in ((8, 4, 6), (5, 3, 4), (2, 2, 3))
    },
    **{f"student {n}": mf.recipes.few(POCKET, size=SIZE, steps=n) for n in (4, 2, 1)},
    **{f"student {n} + 1": mf.recipes.stacked(POCKET, low=LOW, size=SIZE, steps=n) for n in (4, 2, 1)},
}
sweep = Sweep(chains, captions(), model=MODEL, metrics=METRICS)


def method(label: str) -> str:
    """A label without its operating point."""
    if label.startswith("student"):
        return "student, then MrFlow" if "+" in label else "student"
    return label.partition(" ")[0]


def draw(rows: list[Row], reference: str, path: Path) -> None:
    """The figure."""
    speed_figure(rows, reference, path, method, ("native", "MrFlow", "student", "student, then MrFlow"))

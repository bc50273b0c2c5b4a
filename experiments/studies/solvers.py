"""Can a second-order solver, or another schedule, do with fewer low steps what Euler does with 12?"""

import mrflow as mf
from experiments.studies.common import METRICS, MODEL, captions, paper
from mrflow.sweep import Sweep

chains = {
    "euler 12": paper(12),
    **{f"euler {n}": paper(n) for n in (8, 4)},
    **{f"ab2 {n}": paper(n, solver=mf.AB2()) for n in (8, 4)},
    **{f"dpmpp2m {n}": paper(n, solver=mf.DPMpp2M()) for n in (8, 4)},
    **{f"heun {n}": paper(n, solver=mf.Heun()) for n in (4, 2)},
    **{f"linear {n}": paper(schedule=mf.Linear(n)) for n in (12, 8, 4)},
    **{f"cosine {n}": paper(schedule=mf.Cosine(n)) for n in (8, 4)},
}
sweep = Sweep(chains, captions(), model=MODEL, metrics=METRICS, seeds=(0,))

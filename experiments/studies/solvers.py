"""How near does a solver or a schedule come to the flow's own end with so few evaluations, and what is legible there?

The reference follows the flow to a tolerance; the same with ten times that tolerance says how far it can be trusted.
PSNR is to its picture of the same caption and noise. Numbers are evaluations (of guided forwards, two each).
"""

import mrflow as mf
from experiments.studies.common import METRICS, MODEL, captions, native
from mrflow.sweep import Psnr, Sweep

BUDGETS = (12, 8, 4)
chains = {
    "tolerance 1e-4": native(12, solver=mf.DormandPrince(1e-4)),
    "tolerance 1e-3": native(12, solver=mf.DormandPrince(1e-3)),
    **{f"Euler {n}": native(n) for n in (50, 24, *BUDGETS)},
    **{
        f"{type(solver).__name__} {n}": native(n, solver=solver)
        for solver in (mf.AB2(), mf.DPMpp2M(), mf.UniPC(), mf.DEIS())
        for n in BUDGETS
    },
    **{
        f"{type(solver).__name__} {n}": native(n // 2, solver=solver)
        for solver in (mf.Heun(), mf.Midpoint())
        for n in BUDGETS
    },
    **{
        f"{kind.__name__} {n}": native(n, schedule=kind(n))
        for kind in (mf.Linear, mf.Cosine, mf.Beta, mf.Karras)
        for n in BUDGETS
    },
}
METRICS = (*METRICS, Psnr())
sweep = Sweep(chains, captions(), model=MODEL, metrics=METRICS, seeds=(0,))

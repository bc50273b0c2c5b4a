"""How much noise should be reinjected, by category?"""

from experiments.studies.common import METRICS, MODEL, captions, native, paper
from mrflow.sweep import Sweep

chains = {
    "native 50": native(50),
    **{f"sigma {s:g}": paper(sigma=s) for s in (0.02, 0.05, 0.08, 0.12, 0.2, 0.3, 0.4, 0.5)},
}
sweep = Sweep(chains, captions(), model=MODEL, metrics=METRICS, seeds=(0,))

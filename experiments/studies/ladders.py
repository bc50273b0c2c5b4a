"""Do more rungs pay, or other sizes of the first?"""

import mrflow as mf
from experiments.studies.common import LOW, METRICS, MODEL, SIZE, captions, paper
from mrflow.sweep import Sweep

chains = {
    "128 256": paper(12),
    "96 256": mf.recipes.ladder([(96, 96), SIZE]),
    "160 256": mf.recipes.ladder([(160, 160), SIZE]),
    "192 256": mf.recipes.ladder([(192, 192), SIZE]),
    "64 128 256": mf.recipes.ladder([(64, 64), LOW, SIZE], sigmas=[0.4, 0.12]),
    "128 192 256": mf.recipes.ladder([LOW, (192, 192), SIZE]),
}
sweep = Sweep(chains, captions(), model=MODEL, metrics=METRICS, seeds=(0,))

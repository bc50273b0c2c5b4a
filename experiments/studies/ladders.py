"""Do more rungs pay, or other sizes of the first? The embedded model was trained at 64, 128 and 256 pixels."""

import mrflow as mf
from experiments.studies.common import METRICS, MODEL, captions
from mrflow.sweep import Sweep

RUNGS = ((64, 128), (32, 64, 128), (32, 128), (48, 128), (80, 128), (96, 128), (64, 96, 128))
chains = {" ".join(map(str, rungs)): mf.recipes.ladder([(side, side) for side in rungs]) for rungs in RUNGS}
sweep = Sweep(chains, captions(), model=MODEL, metrics=METRICS, seeds=(0,))

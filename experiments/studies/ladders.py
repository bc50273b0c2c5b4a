"""Do more rungs pay, or other sizes of the first? The embedded model was trained at 128, 256 and 512 pixels."""

import mrflow as mf
from experiments.studies.common import METRICS, MODEL, captions
from mrflow.sweep import Sweep

SIZES = (256, 256), (512, 512)  # of the control rows
RUNGS = ((256, 512), (128, 256, 512), (128, 512), (192, 512), (320, 512), (384, 512), (256, 384, 512))
chains = {" ".join(map(str, rungs)): mf.recipes.ladder([(side, side) for side in rungs]) for rungs in RUNGS}
sweep = Sweep(chains, captions(), model=MODEL, metrics=METRICS, seeds=(0,))

"""Where does classifier-free guidance pay: in the refining step, early, late, in the middle?"""

import mrflow as mf
from experiments.studies.common import METRICS, MODEL, captions, paper
from mrflow.models import info
from mrflow.sweep import Sweep

GUIDE = mf.CFG(info(MODEL).cfg)
chains = {
    "everywhere": paper(12),
    "low stage only": paper(12, refine_guidance=mf.Distilled()),
    "sigma above 0.5": paper(12, guidance=mf.Interval(GUIDE, 0.5, 1.0), refine_guidance=mf.Distilled()),
    "sigma below 0.5": paper(12, guidance=mf.Interval(GUIDE, 0.0, 0.5), refine_guidance=mf.Distilled()),
    "sigma 0.3 to 0.9": paper(12, guidance=mf.Interval(GUIDE, 0.3, 0.9), refine_guidance=mf.Distilled()),
    "nowhere": paper(12, guidance=mf.Distilled()),
}
sweep = Sweep(chains, captions(), model=MODEL, metrics=METRICS, seeds=(0,))

"""Where does staged sampling fail: words, faces, many things, dense texture; and is it layout or detail?

Layout is what the low-resolution stage decides, detail what the rest adds: native sampling at low resolution, enlarged,
has the layout alone; the encoder's round trip of a native picture with a refining step has the detail alone.
"""

import mrflow as mf
from experiments.studies.common import LOW, METRICS, MODEL, SIZE, captions, native, paper
from mrflow.sweep import Sweep

chains = {
    "native 50": native(50),
    "staged 12 + 1": paper(12),
    "low 50, enlarged": mf.Sample(*LOW, mf.Shifted(50)) >> mf.Decode() >> mf.Upscale(size=SIZE),
    "low 50, refined": paper(50),
    "native 50, refined": native(50) >> mf.Encode() >> mf.Reinject(0.12) >> mf.Refine(mf.DirectSigma(1)) >> mf.Decode(),
}
sweep = Sweep(chains, captions(), model=MODEL, metrics=METRICS, seeds=(0,))

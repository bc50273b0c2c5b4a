"""A first sweep: does staged sampling keep what native sampling draws, and is it faster? 3 chains x 60 captions.

mrflow sweep experiments/studies/first.py && mrflow report first-sweep
"""

import mrflow as mf
from mrflow.scenes.hard import HARD, held_out_hard_captions
from mrflow.sweep import Legible, Sharpness

kinds = {kind: held_out_hard_captions(HARD, 20, kind=kind) for kind in ("objects", "grid", "sign")}
size, low = (128, 128), (64, 64)
sweep = mf.Sweep(
    {
        "native 50": mf.recipes.native(size=size, steps=50),
        "staged 12 + 1": mf.recipes.paper(size=size, low=low),
        "native 6": mf.recipes.native(size=size, steps=6),
    },
    [mf.Prompt(text, {"kind": kind}) for kind, texts in kinds.items() for text in texts],
    metrics=[Legible(), Sharpness()],
)

"""A first sweep: does staged sampling keep what native sampling draws, and is it faster? 3 chains x 40 captions.

mrflow sweep experiments/studies/first.py && mrflow report first-sweep
"""

import mrflow as mf
from mrflow.scenes import FULL, held_out_captions
from mrflow.sweep import SceneScore, Sharpness

texts = list(dict.fromkeys(held_out_captions(FULL, 80)))[:40]
kinds = {text: "word" if " word " in text else "face" if " face " in text else "shapes" for text in texts}
size, low = (256, 256), (128, 128)
sweep = mf.Sweep(
    {
        "native 50": mf.recipes.native(size=size, steps=50),
        "staged 12 + 1": mf.recipes.paper(size=size, low=low),
        "native 6": mf.recipes.native(size=size, steps=6),
    },
    [mf.Prompt(text, {"kind": kinds[text]}) for text in texts],
    metrics=[SceneScore(), Sharpness()],
)

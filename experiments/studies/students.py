"""What does the few-step student keep of its teacher, and does one evaluation of it beat one of the teacher's?"""

import mrflow as mf
from experiments.studies.common import LOW, METRICS, MODEL, SIZE, captions, native, paper
from mrflow.students import POCKET
from mrflow.sweep import Sweep

chains = {
    "native 12": native(12),
    **{f"native {n}": native(n) for n in (4, 2, 1)},
    **{f"student {n}": mf.recipes.few(POCKET, size=SIZE, steps=n) for n in (4, 2, 1)},
    "student 2, the model's levels": mf.recipes.native(
        size=SIZE, schedule=mf.Shifted(2), guidance=mf.Distilled(), lora=POCKET.lora
    ),
    "12 + 1": paper(12),
    **{f"student {n} + 1": mf.recipes.stacked(POCKET, low=LOW, size=SIZE, steps=n) for n in (4, 2)},
}
sweep = Sweep(chains, captions(), model=MODEL, metrics=METRICS, seeds=(0,))

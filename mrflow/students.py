"""Few-step students of large models, as published: which adapter, how strong, how many steps, which levels, guidance.

`recipes.few(students.LIGHTNING_4)` draws with a student alone, `recipes.stacked(students.LIGHTNING_4, upscaler)` is
MrFlow with the student in its low-resolution stage. A student of your own is one `Student(...)`.
"""

from dataclasses import dataclass
from pathlib import Path

from mrflow._checks import check_whole
from mrflow.checkpoints.adapters import Lora, Loras, check_loras
from mrflow.guidance import Distilled, Guidance
from mrflow.model_info import Shift
from mrflow.schedules import Schedule, Shifted


@dataclass(frozen=True)
class Student:
    """How a few-step student is used. `shift` None is the model's own curve, `guidance` None the model's own."""

    steps: int
    lora: Loras = ()
    shift: Shift | None = None
    guidance: Guidance | None = None

    def __post_init__(self) -> None:
        check_whole("steps", self.steps, 1)
        object.__setattr__(self, "lora", check_loras(self.lora))

    def schedule(self, steps: int | None = None) -> Schedule:
        """The levels it was trained for, or those of another count of steps."""
        return Shifted(self.steps if steps is None else steps, shift=self.shift)


_HYPER = "ByteDance/Hyper-SD/Hyper-FLUX.1-dev-{}steps-lora.safetensors"
_LIGHTNING = "lightx2v/Qwen-Image-Lightning/Qwen-Image-Lightning-{}steps-V2.0.safetensors"
_LIGHTNING_SHIFT = Shift.fixed(3.0)  # whatever the resolution, and without Qwen-Image's terminal

HYPER_8 = Student(8, Lora(_HYPER.format(8), 0.125))
HYPER_16 = Student(16, Lora(_HYPER.format(16), 0.125))
TURBO_ALPHA = Student(8, Lora("alimama-creative/FLUX.1-Turbo-Alpha/diffusion_pytorch_model.safetensors"))
LIGHTNING_4 = Student(4, Lora(_LIGHTNING.format(4)), _LIGHTNING_SHIFT, Distilled())
LIGHTNING_8 = Student(8, Lora(_LIGHTNING.format(8)), _LIGHTNING_SHIFT, Distilled())
SCHNELL = Student(4)
"""FLUX.1-schnell is a checkpoint of its own, whose scheduler does not shift: load it and draw in 1 to 4 steps."""
_INSIDE = Path(__file__).parent / "models" / "pocket"
POCKET_4 = Student(2, Lora(str(_INSIDE / "pocket-4-student.safetensors")), Shift.fixed(2.0), Distilled())
"""The student of `mrflow.load("pocket-4")`, for 1 to 4 unguided steps (`experiments/train_pocket/student.py`).

At every size it takes the levels that it was taught with.
"""
POCKET = POCKET_4
"""The student of the newest embedded model, `mrflow.load("pocket")`; it belongs to no model of another width."""

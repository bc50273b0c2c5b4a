"""What the studies share: the captions with their tags, the sizes, the metrics."""

import mrflow as mf
from experiments.hard_scores import captions_of
from mrflow.models import info
from mrflow.models.pocket.model import NEWEST
from mrflow.sweep import Legible, Metric, Prompt, Sharpness

MODEL = NEWEST
SIZE, LOW = info(MODEL).size, info(MODEL).low
DOSES = ("letters 13%", "grid 5x5", "objects")  # of each kind the size of detail that the autoencoder keeps
SIGNS = {"higher": " ▲", "lower": " ▼", "no difference shown": "", "too few prompts": " †"}  # of verdicts, in tables
SCORE = "legible"
METRICS: tuple[Metric, ...] = (Legible(), Sharpness())


def captions(count: int = 24, *, seed: int = 0) -> list[Prompt]:
    """Different held-out captions of the hard world, so many of each size of detail, tagged by it."""
    return [Prompt(text, {"detail": dose}) for dose in DOSES for text in captions_of(dose, count, seed=seed)]


def native(steps: int, **settings: object) -> mf.Chain[mf.Start, mf.Pixels]:
    """Plain sampling."""
    return mf.recipes.native(size=SIZE, steps=steps, **settings)  # type: ignore[arg-type]


def paper(steps: int = 12, **settings: object) -> mf.Chain[mf.Start, mf.Pixels]:
    """Staged sampling at the model's sizes."""
    return mf.recipes.paper(low=LOW, size=SIZE, steps=steps, **settings)  # type: ignore[arg-type]

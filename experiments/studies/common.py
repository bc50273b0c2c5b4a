"""What the studies share: the captions with their tags, the sizes, the metrics."""

import mrflow as mf
from mrflow.models.pocket.model import NEWEST
from mrflow.scenes import FULL, held_out_captions, parse
from mrflow.sweep import Metric, Prompt, SceneScore, Sharpness, Stray

MODEL = NEWEST
SIZE, LOW = (256, 256), (128, 128)  # half of what it is used at: the same methods, at a fifth of the time
SIGNS = {"higher": " ▲", "lower": " ▼", "no difference shown": "", "too few prompts": " †"}  # of verdicts, in tables
METRICS: tuple[Metric, ...] = (SceneScore(), Stray(), Sharpness())


def captions(count: int = 48) -> list[Prompt]:
    """Different held-out captions, tagged by what they show and what is behind it."""
    texts = list(dict.fromkeys(held_out_captions(FULL, 4 * count)))[:count]
    return [Prompt(text, tags(text)) for text in texts]


def tags(caption: str) -> dict[str, str]:
    """The kind of scene, its size, its count, and the texture behind it."""
    scene = parse(caption)
    density = next((d for d in ("coarse", "medium", "fine") if f"on {d}" in caption), "plain")
    size = "big" if "big" in caption.split() else "small" if "small" in caption.split() else "unsaid"
    out = {"kind": scene.kind, "texture": density, "size": size}
    if scene.kind == "count":
        out["count"] = str(len(scene.objects))
    if scene.words:
        out["letters"] = str(len(scene.words[0].text))
    return out


def native(steps: int) -> mf.Chain[mf.Start, mf.Pixels]:
    """Plain sampling."""
    return mf.recipes.native(size=SIZE, steps=steps)


def paper(steps: int = 12, **settings: object) -> mf.Chain[mf.Start, mf.Pixels]:
    """Staged sampling at the model's sizes."""
    return mf.recipes.paper(low=LOW, size=SIZE, steps=steps, **settings)  # type: ignore[arg-type]

"""Which quality for which speed: fewer native steps, k + 1, k + 2, k + 3, latents lifted instead of pixels?"""

from pathlib import Path

import mrflow as mf
from experiments.studies.common import LOW, METRICS, MODEL, SIZE, captions, native, paper
from experiments.studies.figure import speed_figure
from mrflow.sweep import Row, Sweep

chains = {
    "native 50": native(50),
    **{f"native {n}": native(n) for n in (24, 12, 6, 4, 3, 2)},
    **{f"{n} + 1": paper(n) for n in (24, 12, 6, 3)},
    **{f"6 + {k}": paper(6, refine_steps=k) for k in (2, 3)},
    **{f"latent {f} 6 + 1": mf.recipes.latent(f, low=LOW, size=SIZE, steps=6) for f in ("nearest", "bicubic")},
}
sweep = Sweep(chains, captions(), model=MODEL, metrics=METRICS, seeds=(0, 1))


def method(label: str) -> str:
    """A label without its number of steps."""
    if label.startswith(("native", "latent")):
        return label.removesuffix(" 6 + 1").rstrip(" 0123456789")
    return "staged" if label.endswith("+ 1") else "staged, more refining steps"


def draw(rows: list[Row], reference: str, path: Path) -> None:
    """The figure."""
    speed_figure(rows, reference, path, method, ("native", "staged"))

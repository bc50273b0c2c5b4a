"""Which value of a number is the good one: what reports and statistics need to say better or worse."""

from collections.abc import Mapping
from typing import Literal

Aim = Literal["higher", "lower", "one", "uniform"]
"""More is better, less is better, 1 is best, or values should be spread evenly over [0, 1] (ranks in a known law)."""

COSTS: Mapping[str, Aim] = {"seconds": "lower", "nfe": "lower", "flops": "lower", "peak_bytes": "lower"}
BUILT_IN: Mapping[str, Aim] = {
    "score": "higher",
    "fit.psnr": "higher",
    "fit.boundary_iou": "higher",
    "fit.edge": "lower",
    "fit.corner": "one",
    "fit.glyph": "higher",
    "fit.glyph.right": "higher",
    "fit.expression": "higher",
    "fit.expression.right": "higher",
    "fit.spectrum": "lower",
    "fit.rank": "uniform",
    "legible": "higher",
    "stray": "lower",
    "psnr": "higher",
    "ssim": "higher",
    "spectrum": "one",
    "round_trip": "lower",
    "clip": "higher",
    "lpips": "lower",
    "text": "higher",
}
"""Those of the metrics that come with mrflow: said by the metrics themselves, and for folders that do not say."""


def own(name: str) -> Mapping[str, Aim]:
    """The part of `BUILT_IN` that a metric of mrflow gives: the number of that name, and the numbers below it."""
    return {key: aim for key, aim in BUILT_IN.items() if key == name or key.startswith(f"{name}.")}


def aim(name: str, aims: Mapping[str, Aim]) -> Aim | None:
    """That of a number, else of the nearest name that it is a part of (`score.text` of `score`); None where none is."""
    while name:
        if name in aims:
            return aims[name]
        name = name.rpartition(".")[0]
    return None

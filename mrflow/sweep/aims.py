"""What the values of a number mean: which are good, in which range they lie, in which unit. Reports follow it."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import isfinite
from typing import Any, Literal, cast, get_args

from mrflow.errors import PlanError

Aim = Literal["higher", "lower", "one", "uniform"]
"""More is better, less is better, 1 is best, or values should be spread evenly over [0, 1] (ranks in a known law)."""


@dataclass(frozen=True)
class Scale:
    """The aim of a number (None: neither direction is better), the least and largest value it can have, its unit.

    Raises:
        PlanError: there is no such aim, or the range is empty.
    """

    aim: Aim | None
    low: float | None = None
    high: float | None = None
    unit: str = ""

    def __post_init__(self) -> None:
        if self.aim is not None and self.aim not in get_args(Aim):
            raise PlanError(f"the aim of a number must be one of {', '.join(get_args(Aim))}, or None, got {self.aim!r}")
        if self.low is not None and self.high is not None and not self.low < self.high:
            raise PlanError(f"the range of a number needs low < high, got {self.low} to {self.high}")

    def goodness(self, value: float) -> float | None:
        """A number that is larger for better values; None where one value alone is neither good nor bad."""
        if self.aim == "one":
            return -abs(value - 1)
        return {"higher": value, "lower": -value}.get(self.aim or "")


NONE = Scale(None)
SHARE, ERROR = Scale("higher", 0, 1), Scale("lower", 0)
COSTS: Mapping[str, Scale] = {
    "seconds": Scale("lower", 0, unit="s"),
    "nfe": ERROR,
    "flops": Scale("lower", 0, unit="FLOP"),
    "peak_bytes": Scale("lower", 0, unit="B"),
}
BUILT_IN: Mapping[str, Scale] = {
    "score": SHARE,
    "fit.psnr": Scale("higher", 0, 60, "dB"),
    "fit.boundary_iou": SHARE,
    "fit.edge": Scale("lower", 0, 4, "pixels"),
    "fit.corner": Scale("one", 0),
    "fit.glyph": Scale("higher", -1, 1),
    "fit.glyph.right": SHARE,
    "fit.expression": Scale("higher", -1, 1),
    "fit.expression.right": SHARE,
    "fit.spectrum": ERROR,
    "fit.rank": Scale("uniform", 0, 1),
    "legible": SHARE,
    "stray": Scale("lower", 0, 100, "%"),
    "psnr": Scale("higher", high=100, unit="dB"),
    "ssim": Scale("higher", -1, 1),
    "spectrum": Scale("one", 0),
    "sharpness": Scale(None, 0),
    "round_trip": ERROR,
    "clip": Scale("higher", 0, 100),
    "lpips": ERROR,
    "text": SHARE,
}
"""Those of the metrics that come with mrflow: said by the metrics themselves, and for folders that do not say."""


def own(name: str) -> Mapping[str, Scale]:
    """The part of `BUILT_IN` that a metric of mrflow gives: the number of that name, and the numbers below it."""
    return {key: scale for key, scale in BUILT_IN.items() if key == name or key.startswith(f"{name}.")}


def as_scale(said: "Aim | Scale") -> Scale:
    """A scale from what a metric says: the word of an aim alone has no range and no unit."""
    return said if isinstance(said, Scale) else Scale(said)


def scale_for(name: str, scales: Mapping[str, Scale]) -> Scale:
    """That of a number, else of the nearest name that it is a part of (`score.text` of `score`), else `NONE`."""
    while name:
        if name in scales:
            return scales[name]
        name = name.rpartition(".")[0]
    return NONE


def to_plain(scales: Mapping[str, Scale]) -> dict[str, dict[str, Any]]:
    """Scales as data for sweep.json and the page."""
    return {name: asdict(each) for name, each in scales.items()}


def from_plain(data: object) -> dict[str, Scale]:
    """Scales from data of a folder, which may come from anywhere: what makes no sense is left out."""
    out: dict[str, Scale] = {}
    for name, said in cast("dict[str, Any]", data).items() if isinstance(data, dict) else ():
        each = {"aim": said} if isinstance(said, str) else said
        if not isinstance(each, dict):
            continue
        known = cast("dict[str, Any]", each)
        low, high, unit = known.get("low"), known.get("high"), known.get("unit", "")
        try:
            if all(v is None or (type(v) in (int, float) and isfinite(v)) for v in (low, high)) and type(unit) is str:
                out[name] = Scale(known.get("aim"), low, high, unit)
        except (PlanError, TypeError, OverflowError):
            continue
    return out

"""MagCache: skip while the size of what the blocks add is known to change little from step to step."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated

from mrflow._checks import Bound, check_number, check_whole, is_number, require
from mrflow.backbone import Backbone
from mrflow.caches.base import Cache, require_numbers
from mrflow.caches.calibrate import Calibration
from mrflow.caches.clock import Evaluation, Rule
from mrflow.errors import PlanError
from mrflow.guidance import Guidance
from mrflow.model_info import ModelInfo
from mrflow.schedules import Schedule, Shifted

_FLUX = (
    1.0, 1.21094, 1.11719, 1.07812, 1.0625, 1.03906, 1.03125, 1.03906, 1.02344, 1.03125, 1.02344, 0.98047, 1.01562,
    1.00781, 1.0, 1.00781, 1.0, 1.00781, 1.0, 1.0, 0.99609, 0.99609, 0.98047, 0.98828, 0.96484, 0.95703, 0.93359,
    0.89062,
)  # fmt: skip
RATIOS: dict[str, tuple[float, ...]] = {
    # Zehong-Ma/MagCache, 28 steps
    "flux1-dev": _FLUX,
    "flux1-schnell": _FLUX,
    # measured here, 12 steps at the size of the low stage: python -m experiments.caches
    "pocket": (1.0, 0.9819, 0.9572, 0.9571, 0.9532, 0.9497, 0.9421, 0.934, 0.9205, 0.9031, 0.885, 0.8937),
}
"""Known ratios by model, one a step."""


@dataclass(frozen=True)
class MagCache(Cache):
    """MagCache (Ma et al. 2025, arXiv 2506.09045): from ratios g_t = |R_t| / |R_{t-1}| of what the blocks add, known
    beforehand, the error of reusing R is counted as the sum of |1 - g g' ...|; R is reused while it is at most
    `threshold`, and at most `limit` times in a row. The first `retention` of the steps are computed.

    The rule never sees the picture: it is a fixed list of steps. `ratios` belong to a model and a schedule and are
    stretched to its number of steps by nearest neighbours; None: the known ones of FLUX and pocket. `calibrate`
    measures them.
    """

    threshold: Annotated[float, Bound(check_number, 0)] = 0.06
    limit: Annotated[int, Bound(check_whole, 0)] = field(default=3, kw_only=True)
    retention: float = field(default=0.2, kw_only=True)
    ratios: tuple[float, ...] | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(is_number(self.retention, 0, 1), "retention", "a share of the steps from 0 to 1", self.retention)
        if self.ratios is not None and not (self.ratios and all(r > 0 and math.isfinite(r) for r in self.ratios)):
            raise PlanError(f"ratios must be finite numbers above 0, one a step, got {self.ratios!r}")

    @staticmethod
    def calibrate(
        threshold: float,
        model: Backbone,
        prompts: Sequence[str],
        *,
        size: tuple[int, int] | None = None,
        schedule: Schedule = Shifted(28),
        guidance: Guidance | None = None,
        seed: int = 0,
        limit: int = 3,
        retention: float = 0.2,
    ) -> "MagCache":
        """A cache with ratios measured while `model` draws these prompts, each whole, at `size` (None: its low size).

        A step's ratio is the mean over tokens of |R_t| / |R_{t-1}|, then over prompts and branches of the guidance.

        Raises:
            PlanError: the model cannot be taken apart, or there are no prompts.
        """
        seen = Calibration(model, prompts, size, schedule, guidance, seed).observe()
        steps = [sum(step.ratio for step in at) / len(at) for at in zip(*seen, strict=False)]
        return MagCache(threshold, limit=limit, retention=retention, ratios=(1.0, *steps))

    def check(self, info: ModelInfo) -> None:
        """A model without known ratios needs its own."""
        self._ratios(info)

    def _ratios(self, info: ModelInfo) -> tuple[float, ...]:
        advice = f"measure them with MagCache.calibrate({self.threshold:g}, model, prompts) or give ratios="
        return require_numbers(self.ratios, RATIOS, info, "MagCache knows no ratios", advice)

    def rule(self, info: ModelInfo, sigmas: Sequence[float]) -> Rule:
        """The accumulated error."""
        known = self._ratios(info)
        ratios = nearest(known, len(sigmas) or len(known))
        first = int(self.retention * len(ratios) + 0.5)
        ratio, error, row, kept = 1.0, 0.0, 0, False

        def due(look: Evaluation) -> bool:
            nonlocal ratio, error, row, kept
            if look.place >= first:
                ratio *= ratios[look.place] if look.place < len(ratios) else 1.0
                error, row = error + abs(1.0 - ratio), row + 1
                if kept and self.threshold > 0 and error <= self.threshold and row <= self.limit:
                    return False
                ratio, error, row = 1.0, 0.0, 0
            kept = True
            return True

        return due


def nearest(values: Sequence[float], count: int) -> tuple[float, ...]:
    """`count` values, each the nearest of `values` at its share of the way."""
    if count == 1:
        return (values[-1],)
    return tuple(values[round(i * (len(values) - 1) / (count - 1))] for i in range(count))

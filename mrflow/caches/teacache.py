"""TeaCache: skip while the modulated input has changed little, by a polynomial fitted to the model."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated

import numpy as np
from torch import Tensor

from mrflow._checks import Bound, check_number
from mrflow.backbone import Backbone
from mrflow.caches.base import Cache, difference, interpolate, require_numbers
from mrflow.caches.calibrate import Calibration, fit_polynomial
from mrflow.caches.clock import Evaluation, Rule
from mrflow.errors import PlanError
from mrflow.guidance import Guidance
from mrflow.model_info import ModelInfo
from mrflow.schedules import Schedule, Shifted

COEFFICIENTS: dict[str, tuple[float, ...]] = {
    # ali-vilab/TeaCache, TeaCache4FLUX: 28 steps
    "flux1-dev": (498.651651, -283.781631, 55.8554382, -3.82021401, 0.264230861),
    # of the community (vLLM-Omni, VideoX-Fun); negative at both ends, hence |P|
    "qwen-image": (-450.0, 280.0, -45.0, 3.2, -0.02),
    # fitted here, 12 steps at the size of the low stage: python -m experiments.caches
    "pocket": (61.56, -12.54, 0.7153),
}
"""Known polynomials by model, highest power first."""

# Speed-ups claimed for FLUX.1-dev at 28 steps, by threshold (ali-vilab/TeaCache); 1.2: cache-dit's table, 50 steps.
CLAIMED = ((0.0, 1.0), (0.25, 1.5), (0.4, 1.8), (0.6, 2.0), (0.8, 2.25), (1.2, 5.56))


@dataclass(frozen=True)
class TeaCache(Cache):
    """TeaCache (Liu et al. 2024, arXiv 2411.19108): reuse what all blocks added, while a sum of |P(d)| is below
    `threshold`; d is the relative change of the modulated input of the first block since the evaluation before.

    The first and the last evaluation are computed. `coefficients` of P, highest power first, belong to a model and a
    schedule; None: the known ones of FLUX.1-dev, Qwen-Image and pocket. `calibrate` fits them for any model.
    """

    threshold: Annotated[float, Bound(check_number, 0)] = 0.25
    coefficients: tuple[float, ...] | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.coefficients is not None and not self.coefficients:
            raise PlanError("coefficients must be at least one number, the highest power first")

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
        degree: int = 4,
    ) -> "TeaCache":
        """A cache whose polynomial is fitted to how `model` draws these prompts.

        Each prompt is sampled whole at `size` (None: the model's own low size). The polynomial takes the change of the
        modulated input to that of the network's output, both relative L1, by least squares.

        Raises:
            PlanError: the model cannot be taken apart, or there are too few steps for the degree.
        """
        seen = Calibration(model, prompts, size, schedule, guidance, seed).observe()
        pairs = [(step.modulated_input, step.output) for track in seen for step in track]
        return TeaCache(threshold, coefficients=fit_polynomial(pairs, degree))

    def check(self, info: ModelInfo) -> None:
        """A model without known coefficients needs its own."""
        self._coefficients(info)

    def _coefficients(self, info: ModelInfo) -> tuple[float, ...]:
        advice = f"fit them with TeaCache.calibrate({self.threshold:g}, model, prompts) or give coefficients="
        return require_numbers(self.coefficients, COEFFICIENTS, info, "TeaCache knows no coefficients", advice)

    def rule(self, info: ModelInfo, sigmas: Sequence[float]) -> Rule:
        """The accumulated rule."""
        coefficients = self._coefficients(info)
        total, before = 0.0, list[Tensor]()

        def due(look: Evaluation) -> bool:
            nonlocal total
            if self.threshold == 0:
                return True
            modulated = look.modulated_input()
            if before and not look.last:
                total += abs(float(np.polyval(coefficients, difference(modulated, before[0]))))
                computed = not total < self.threshold
            else:
                computed = True
            before[:] = [modulated]
            if computed:
                total = 0.0
            return computed

        return due

    def estimate(self, evaluations: int) -> int:
        """From the speed-ups claimed for FLUX.1-dev at this threshold; the two ends are always computed."""
        return max(2, round(evaluations / interpolate(CLAIMED, self.threshold)))

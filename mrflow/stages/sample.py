"""Noise to latents: the sampling stage."""

from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from mrflow.errors import PlanError
from mrflow.model_info import ModelInfo
from mrflow.schedules import Schedule, Shifted, Sigmas, cut
from mrflow.spec import Latents, Start, State, check_size
from mrflow.stage import Context
from mrflow.stages.integrating import Integrating


@dataclass(frozen=True)
class Sample(Integrating[Start]):
    """Integrate the flow from noise (sigma 1) to `stop`, for a picture of height x width pixels.

    `stop` above 0 ends the schedule early and leaves noise of that level in. For the other settings see `Integrating`.
    """

    scope: ClassVar[str] = "Sample"
    height: int
    width: int
    schedule: Schedule = Shifted(12)
    stop: float = field(default=0.0, kw_only=True)

    def begin(self, spec: Start, model: ModelInfo) -> Latents:
        """Noise of the picture's size."""
        check_size(self.height, self.width, model.space)
        if not 0 <= self.stop < 1:
            raise PlanError(f"stop must be a noise level from 0 to below 1, got {self.stop!r}")
        scale = model.space.downscale
        return Latents(spec.batch, self.height // scale, self.width // scale, model.space, 1.0)

    def sigmas(self, begin: Latents, model: ModelInfo) -> Sigmas:
        """From 1 to `stop`."""
        sigmas = self.schedule(begin.sigma, begin.tokens, model)
        return cut(sigmas, self.stop) if self.stop else sigmas

    def apply(self, state: State[Start], out: Latents, ctx: Context) -> Tensor:
        """Draw noise and integrate."""
        return self.integrate(ctx.noise(out.shape, source=self.noise), out, ctx)

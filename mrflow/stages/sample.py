"""Noise to latents: the sampling stage."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from mrflow.adapters import Loras, PiFlow
from mrflow.caches.base import Cache
from mrflow.errors import PlanError
from mrflow.guidance import Guidance
from mrflow.noise import Noise, PerItem
from mrflow.schedules import Schedule, Shifted, Sigmas, cut
from mrflow.solvers import Euler, Solver
from mrflow.spec import Latents, ModelInfo, Start, State, check_size
from mrflow.stages.integrating import Integrating

if TYPE_CHECKING:
    from mrflow.runner import Context


@dataclass(frozen=True)
class Sample(Integrating[Start]):
    """Integrate the flow from noise (sigma 1) to `stop`, for a picture of height x width pixels.

    `guidance=None` is the model's own. `stop` above 0 ends the schedule early and leaves noise of that level in.
    `cache` leaves out evaluations (mrflow/caches), `lora` are adapters that are on in this stage
    alone. `policy` makes it pi-Flow: the network is asked once a level, and what it gives is followed in small steps.
    """

    scope: ClassVar[str] = "Sample"
    height: int
    width: int
    schedule: Schedule = Shifted(12)
    solver: Solver = field(default=Euler(), kw_only=True)
    guidance: Guidance | None = field(default=None, kw_only=True)
    stop: float = field(default=0.0, kw_only=True)
    noise: Noise = field(default=PerItem(), kw_only=True)
    cache: Cache | None = field(default=None, kw_only=True)
    lora: Loras = field(default=(), kw_only=True)
    policy: PiFlow | None = field(default=None, kw_only=True)

    def sigmas(self, model: ModelInfo) -> Sigmas:
        """The noise levels that the stage visits."""
        levels = self.schedule(1.0, model.tokens(self.height, self.width), model)
        return cut(levels, self.stop) if self.stop else levels

    def visited(self, spec: Start, model: ModelInfo) -> Sigmas:
        """Those of the schedule, from 1."""
        return self.sigmas(model)

    def plan(self, spec: Start, model: ModelInfo) -> Latents:
        """Latents of the picture's size, at the level where the schedule ends."""
        check_size(self.height, self.width, model.space)
        if not 0 <= self.stop < 1:
            raise PlanError(f"stop must be a noise level from 0 to below 1, got {self.stop!r}")
        self.check_settings(model)
        scale = model.space.downscale
        levels = self.sigmas(model)
        self.check_beginning(levels, 1.0)
        return Latents(spec.batch, self.height // scale, self.width // scale, model.space, levels[-1])

    def apply(self, state: State[Start], out: Latents, ctx: "Context") -> Tensor:
        """Draw noise and integrate."""
        return self.integrated(ctx.noise(out.shape, source=self.noise), self.sigmas(ctx.model.info), ctx)

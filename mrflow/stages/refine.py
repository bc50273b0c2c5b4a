"""Noisy latents to clean ones: the refinement stage."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from mrflow.adapters import Loras, PiFlow
from mrflow.caches.base import Cache
from mrflow.errors import PlanError
from mrflow.guidance import Guidance
from mrflow.noise import Noise, PerItem
from mrflow.schedules import DirectSigma, Schedule, Sigmas
from mrflow.solvers import Euler, Solver
from mrflow.spec import Latents, ModelInfo, State
from mrflow.stages.decode import check_space
from mrflow.stages.integrating import Integrating

if TYPE_CHECKING:
    from mrflow.runner import Context


@dataclass(frozen=True)
class Refine(Integrating[Latents]):
    """Integrate the flow from the level the latents hold down to 0. The level is said once, by what came before.

    `cache` leaves out evaluations (mrflow/caches), `lora` are adapters that are on in this stage
    alone. `policy` makes it pi-Flow: the network is asked once a level, and what it gives is followed in small steps.
    """

    scope: ClassVar[str] = "Refine"
    schedule: Schedule = DirectSigma(1)
    solver: Solver = field(default=Euler(), kw_only=True)
    guidance: Guidance | None = field(default=None, kw_only=True)
    noise: Noise = field(default=PerItem(), kw_only=True)
    cache: Cache | None = field(default=None, kw_only=True)
    lora: Loras = field(default=(), kw_only=True)
    policy: PiFlow | None = field(default=None, kw_only=True)

    def sigmas(self, spec: Latents, model: ModelInfo) -> Sigmas:
        """The noise levels that the stage visits."""
        return self.schedule(spec.sigma, spec.tokens, model)

    def visited(self, spec: Latents, model: ModelInfo) -> Sigmas:
        """Those of the schedule, from the level of the latents."""
        return self.sigmas(spec, model)

    def plan(self, spec: Latents, model: ModelInfo) -> Latents:
        """The same latents at the level where the schedule ends (0, but for a `Part`); refuses clean ones."""
        check_space(spec, model)
        if spec.sigma == 0:
            raise PlanError("latents are already clean (sigma 0); put Reinject(sigma=...) before Refine()")
        self.check_settings(model)
        levels = self.sigmas(spec, model)
        self.check_beginning(levels, spec.sigma)
        return Latents(spec.batch, spec.height, spec.width, spec.space, levels[-1])

    def apply(self, state: State[Latents], out: Latents, ctx: "Context") -> Tensor:
        """Integrate."""
        return self.integrated(state.data, self.sigmas(state.spec, ctx.model.info), ctx)

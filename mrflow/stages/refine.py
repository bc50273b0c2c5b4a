"""Noisy latents to clean ones: the refinement stage."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor

from mrflow.adapters import Lora, Loras, PiFlow, check_loras, check_policy, with_loras, with_policy
from mrflow.caches.base import Cache, check_cache
from mrflow.caches.cached import check_open
from mrflow.cost import sampling_work
from mrflow.errors import PlanError
from mrflow.guidance import Distilled, Guidance, own_guidance
from mrflow.noise import Noise, PerItem
from mrflow.schedules import DirectSigma, Schedule, Sigmas
from mrflow.solvers import Euler, Solver
from mrflow.spec import Latents, ModelInfo, State
from mrflow.stage import Stage, Work
from mrflow.stages.decode import check_space

if TYPE_CHECKING:
    from mrflow.backbone import Backbone
    from mrflow.runner import Context


@dataclass(frozen=True)
class Refine(Stage[Latents, Latents]):
    """Integrate the flow from the level the latents hold down to 0. The level is said once, by what came before.

    `cache` leaves out evaluations (mrflow/caches), `lora` are adapters that are on in this stage
    alone. `policy` makes it pi-Flow: the network is asked once a level, and what it gives is followed in small steps.
    """

    schedule: Schedule = DirectSigma(1)
    solver: Solver = field(default=Euler(), kw_only=True)
    guidance: Guidance | None = field(default=None, kw_only=True)
    noise: Noise = field(default=PerItem(), kw_only=True)
    cache: Cache | None = field(default=None, kw_only=True)
    lora: Loras = field(default=(), kw_only=True)
    policy: PiFlow | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        object.__setattr__(self, "lora", check_loras(self.lora))

    @property
    def adapters(self) -> tuple[Lora, ...]:
        """The adapters that are on in this stage."""
        return check_loras(self.lora)

    def sigmas(self, spec: Latents, model: ModelInfo) -> Sigmas:
        """The noise levels that the stage visits."""
        return self.schedule(spec.sigma, spec.tokens, model)

    def plan(self, spec: Latents, model: ModelInfo) -> Latents:
        """The same latents at the level where the schedule ends (0, but for a `Part`); refuses clean ones."""
        check_space(spec, model)
        if spec.sigma == 0:
            raise PlanError("latents are already clean (sigma 0); put Reinject(sigma=...) before Refine()")
        check_cache(self.cache, model)
        check_policy(self.policy, self.solver, self.guidance, self.cache)
        last = self.sigmas(spec, model)[-1]
        return Latents(spec.batch, spec.height, spec.width, spec.space, last)

    def work(self, spec: Latents, out: Latents, model: ModelInfo) -> Work:
        """Forwards: steps x evaluations x guidance passes, without those that a cache leaves out."""
        guidance = Distilled() if self.policy else self.guidance
        sigmas = self.sigmas(spec, model)
        return sampling_work(model, out, sigmas, self.solver, guidance, self.cache, self.adapters)

    def levels(self, spec: Latents, model: ModelInfo) -> tuple[float, ...]:
        """What the solver visits."""
        return self.solver.points(self.sigmas(spec, model))

    def check(self, model: "Backbone") -> None:
        """A cache needs a model that can be taken apart, an adapter one that it fits."""
        if self.policy is not None:
            with_policy(model, self.policy, self.adapters)
            return
        with_loras(model, self.adapters)
        if self.cache is not None:
            check_open(model)

    def apply(self, state: State[Latents], out: Latents, ctx: "Context") -> Tensor:
        """Integrate."""
        guidance = self.guidance or own_guidance(ctx.model.info)
        sigmas = self.sigmas(state.spec, ctx.model.info)
        if self.policy is not None:
            return ctx.follow(self.policy, state.data, sigmas, guidance=self.guidance, lora=self.adapters)
        return ctx.integrate(
            self.solver, guidance, state.data, sigmas, source=self.noise, cache=self.cache, lora=self.adapters
        )

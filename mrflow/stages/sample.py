"""Noise to latents: the sampling stage."""

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
from mrflow.schedules import Schedule, Shifted, Sigmas, cut
from mrflow.solvers import Euler, Solver
from mrflow.spec import Latents, ModelInfo, Start, State, check_size
from mrflow.stage import Stage, Work

if TYPE_CHECKING:
    from mrflow.backbone import Backbone
    from mrflow.runner import Context


@dataclass(frozen=True)
class Sample(Stage[Start, Latents]):
    """Integrate the flow from noise (sigma 1) to `stop`, for a picture of height x width pixels.

    `guidance=None` is the model's own. `stop` above 0 ends the schedule early and leaves noise of that level in.
    `cache` leaves out evaluations (mrflow/caches), `lora` are adapters that are on in this stage
    alone. `policy` makes it pi-Flow: the network is asked once a level, and what it gives is followed in small steps.
    """

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

    def __post_init__(self) -> None:
        object.__setattr__(self, "lora", check_loras(self.lora))

    @property
    def adapters(self) -> tuple[Lora, ...]:
        """The adapters that are on in this stage."""
        return check_loras(self.lora)

    def sigmas(self, model: ModelInfo) -> Sigmas:
        """The noise levels that the stage visits."""
        levels = self.schedule(1.0, model.tokens(self.height, self.width), model)
        return cut(levels, self.stop) if self.stop else levels

    def plan(self, spec: Start, model: ModelInfo) -> Latents:
        """Latents of the picture's size, at the level where the schedule ends."""
        check_size(self.height, self.width, model.space)
        if not 0 <= self.stop < 1:
            raise PlanError(f"stop must be a noise level from 0 to below 1, got {self.stop!r}")
        check_cache(self.cache, model)
        check_policy(self.policy, self.solver, self.guidance, self.cache)
        scale = model.space.downscale
        levels = self.sigmas(model)
        return Latents(spec.batch, self.height // scale, self.width // scale, model.space, levels[-1])

    def work(self, spec: Start, out: Latents, model: ModelInfo) -> Work:
        """Forwards: steps x evaluations x guidance passes, without those that a cache leaves out."""
        guidance = Distilled() if self.policy else self.guidance
        return sampling_work(model, out, self.sigmas(model), self.solver, guidance, self.cache, self.adapters)

    def levels(self, spec: Start, model: ModelInfo) -> tuple[float, ...]:
        """What the solver visits."""
        return self.solver.points(self.sigmas(model))

    def check(self, model: "Backbone") -> None:
        """A cache needs a model that can be taken apart, an adapter one that it fits."""
        if self.policy is not None:
            with_policy(model, self.policy, self.adapters)
            return
        with_loras(model, self.adapters)
        if self.cache is not None:
            check_open(model)

    def apply(self, state: State[Start], out: Latents, ctx: "Context") -> Tensor:
        """Draw noise and integrate."""
        guidance = self.guidance or own_guidance(ctx.model.info)
        levels = self.sigmas(ctx.model.info)
        noise = ctx.noise(out.shape, source=self.noise)
        if self.policy is not None:
            return ctx.follow(self.policy, noise, levels, guidance=self.guidance, lora=self.adapters)
        return ctx.integrate(
            self.solver, guidance, noise, levels, source=self.noise, cache=self.cache, lora=self.adapters
        )

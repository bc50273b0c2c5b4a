"""What the stages share that integrate the flow: their settings, what these cost, and the integration itself."""

from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import TypeVar

from torch import Tensor

from mrflow.backbone import Backbone, FieldOptions
from mrflow.caches.base import Cache, check_fits
from mrflow.checkpoints.adapters import Lora, Loras, PiFlow, check_loras
from mrflow.cost import sampling_work
from mrflow.display.notes import note
from mrflow.errors import PlanError
from mrflow.guidance import Distilled, Guidance, own_guidance
from mrflow.model_info import ModelInfo
from mrflow.noise import Noise, PerItem
from mrflow.schedules import Sigmas
from mrflow.solvers import Euler, Solver, StochasticEuler
from mrflow.spec import Latents, Spec
from mrflow.stage import Context, PlannedStage, Stage

ENOUGH = 0.75  # of the variance that Euler without churn leaves; below, a note says so
BEGINNING = 1e-5  # how far apart the levels may lie: rounding of float32
S = TypeVar("S", bound=Spec)


@dataclass(frozen=True, kw_only=True)
class Integrating(Stage[S, Latents]):
    """A stage that integrates the flow along the noise levels of a schedule.

    `guidance=None` is the model's own. `cache` leaves out evaluations (mrflow/caches), `lora` are adapters that are on
    in this stage alone. `policy` makes it pi-Flow: the network is asked once a level, and what it gives is followed in
    small steps.
    """

    solver: Solver = Euler()
    guidance: Guidance | None = None
    noise: Noise = PerItem()
    cache: Cache | None = None
    lora: Loras = ()
    policy: PiFlow | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "lora", check_loras(self.lora))

    @abstractmethod
    def begin(self, spec: S, model: ModelInfo) -> Latents:
        """The latents that the integration begins with. Raise PlanError where there are none to begin with."""

    @abstractmethod
    def sigmas(self, begin: Latents, model: ModelInfo) -> Sigmas:
        """The noise levels of the schedule, from where the stage begins to where it ends."""

    def plan(self, spec: S, model: ModelInfo) -> Latents:
        """The latents that it begins with, at the level where the schedule ends."""
        return self._end(spec, model)[0]

    def plan_row(self, spec: S, model: ModelInfo) -> PlannedStage:
        """The schedule is computed once, here."""
        out, sigmas = self._end(spec, model)
        guidance = Distilled() if self.policy else self.guidance_for(out, model)
        seen, parts = self.per_forward(out)
        work = sampling_work(model, seen, sigmas, self.solver, guidance, self.cache, self.adapters)
        points = self.solver.points(sigmas)
        return PlannedStage(type(self).__name__, spec, out, work, sigmas, points, seen.tokens, parts)

    def _end(self, spec: S, model: ModelInfo) -> tuple[Latents, Sigmas]:
        begin = self.begin(spec, model)
        self.check_settings(model)
        sigmas = self.sigmas(begin, model)
        self.check_beginning(sigmas, begin.sigma)
        return replace(begin, sigma=sigmas[-1]), sigmas

    @property
    def adapters(self) -> tuple[Lora, ...]:
        """The adapters that are on in this stage."""
        return check_loras(self.lora)

    @property
    def options(self) -> FieldOptions:
        """What this stage asks of the model's field."""
        return FieldOptions(cache=self.cache, loras=self.adapters, policy=self.policy)

    def check_settings(self, model: ModelInfo) -> None:
        """Refuse settings that cannot be for this model.

        Raises:
            PlanError: the model cannot do what they need, or they cannot be beside each other.
        """
        check_fits(self.cache, model)
        check_policy(self.policy, self.solver, self.guidance, self.cache)
        cache = self.cache or model.cache
        if self.solver.estimated and cache is not None:
            raise PlanError(
                f"{self.solver!r} chooses its sigmas while it runs, and {cache!r} must know them before; leave out one"
            )
        model.require(replace(self.options.needs, zero=self.solver.at_zero))

    def check_beginning(self, sigmas: Sigmas, at: float) -> None:
        """Refuse a schedule that does not begin at the noise level of what it is given.

        Raises:
            PlanError: it begins elsewhere; the text gives both levels.
        """
        if abs(sigmas[0] - at) > BEGINNING:
            raise PlanError(
                f"the schedule begins at sigma {sigmas[0]:.6g}, but what it is given holds noise of level {at:.6g}; "
                "make both the same"
            )

    def check(self, model: Backbone) -> None:
        """An adapter must fit the model."""
        model.check(self.options)

    def guidance_for(self, out: Latents, model: ModelInfo) -> Guidance:
        """The guidance that latents of this size are integrated with."""
        return self.guidance or own_guidance(model)

    def per_forward(self, out: Latents) -> tuple[Latents, int]:
        """What one forward is given of latents, and how many such forwards make the whole."""
        return out, 1

    def integrate(self, x: Tensor, out: Latents, ctx: Context) -> Tensor:
        """From the first of the planned levels to the last; churn that takes much of the variance is noted."""
        if self.policy is not None:
            return ctx.follow(self.policy, x, ctx.sigmas, guidance=self.guidance, lora=self.adapters)
        guidance = self.guidance_for(out, ctx.model.info)
        if isinstance(self.solver, StochasticEuler):
            kept = self.solver.variance(ctx.sigmas) / StochasticEuler(0.0).variance(ctx.sigmas)
            if kept < ENOUGH:
                note(
                    f"churn {self.solver.churn:g} in {len(ctx.sigmas) - 1} steps leaves {kept:.0%} of the variance "
                    "that no churn leaves: pictures turn flat and blurred; take less churn or more steps"
                )
        return ctx.integrate(self.solver, guidance, x, ctx.sigmas, source=self.noise, options=self.options)


def check_policy(policy: object, solver: Solver, guidance: Guidance | None, cache: object) -> None:
    """Refuse what a policy leaves no room for.

    Raises:
        PlanError: another solver than Euler, classifier-free guidance or a cache beside a policy.
    """
    if policy is None:
        return
    if not isinstance(policy, PiFlow):
        raise PlanError(f"policy takes PiFlow(path), got {policy!r}")
    if solver != Euler():
        raise PlanError(f"a policy is followed by small Euler steps; leave out solver={solver!r}")
    if not (guidance is None or isinstance(guidance, Distilled)):
        raise PlanError(f"a policy holds its teacher's guidance and is asked once; leave out guidance={guidance!r}")
    if cache is not None:
        raise PlanError("a policy asks the network too seldom for a cache to leave anything out")

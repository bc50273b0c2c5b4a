"""Noisy latents to clean ones: the refinement stage."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from mrflow.errors import PlanError
from mrflow.schedules import DirectSigma, Schedule, Sigmas
from mrflow.spec import Latents, ModelInfo, State
from mrflow.stages.decode import check_space
from mrflow.stages.integrating import Integrating

if TYPE_CHECKING:
    from mrflow.stage import Context


@dataclass(frozen=True)
class Refine(Integrating[Latents]):
    """Integrate the flow from the level the latents hold down to 0. The level is said once, by what came before.

    It ends at 0, but for a `Part` of a schedule. For the other settings see `Integrating`.
    """

    scope: ClassVar[str] = "Refine"
    schedule: Schedule = DirectSigma(1)

    def begin(self, spec: Latents, model: ModelInfo) -> Latents:
        """The latents that are given; refuses clean ones."""
        check_space(spec, model)
        if spec.sigma == 0:
            raise PlanError("latents are already clean (sigma 0); put Reinject(sigma=...) before Refine()")
        return spec

    def sigmas(self, begin: Latents, model: ModelInfo) -> Sigmas:
        """From the level of the latents."""
        return self.schedule(begin.sigma, begin.tokens, model)

    def apply(self, state: State[Latents], out: Latents, ctx: "Context") -> Tensor:
        """Integrate."""
        return self.integrate(state.data, ctx)

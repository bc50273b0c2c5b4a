"""Clean latents to noisy ones."""

from dataclasses import dataclass, field, replace
from typing import ClassVar

from torch import Tensor

from mrflow._checks import is_number, require
from mrflow.errors import PlanError
from mrflow.flow import renoise
from mrflow.model_info import ModelInfo
from mrflow.noise import Noise, PerItem
from mrflow.schedules.partial import Level
from mrflow.spec import Latents, State
from mrflow.stage import Context, Stage
from mrflow.stages.decode import check_space


@dataclass(frozen=True)
class Reinject(Stage[Latents, Latents]):
    """Mix in fresh noise: (1 - sigma) z + sigma eps, a point on the flow's own line (MrFlow, arXiv 2607.01642).

    `sigma` is a number, or the `Level` of a schedule after some steps.
    """

    scope: ClassVar[str] = "Reinject"
    sigma: float | Level
    noise: Noise = field(default=PerItem(), kw_only=True)

    def plan(self, spec: Latents, model: ModelInfo) -> Latents:
        """The same latents at `sigma`."""
        check_space(spec, model)
        sigma = self.sigma.of(spec, model) if isinstance(self.sigma, Level) else self.sigma
        require(is_number(sigma) and 0 < sigma <= 1, "sigma", "above 0 and at most 1", sigma)
        if spec.sigma != 0:
            raise PlanError(f"latents already hold noise (sigma {spec.sigma:g}); put Refine() before Reinject()")
        return replace(spec, sigma=float(sigma))

    def apply(self, state: State[Latents], out: Latents, ctx: Context) -> Tensor:
        """Mix."""
        return renoise(state.data, ctx.noise(out.shape, source=self.noise), out.sigma)

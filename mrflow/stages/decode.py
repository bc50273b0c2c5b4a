"""Latents to pixels."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from mrflow.cost import decode_flops
from mrflow.errors import PlanError
from mrflow.spec import Latents, ModelInfo, Pixels, State
from mrflow.stage import Stage, Work

if TYPE_CHECKING:
    from mrflow.stage import Context


@dataclass(frozen=True)
class Decode(Stage[Latents, Pixels]):
    """The model's decoder, on clean latents. Pixels stay float32 on the device: no 8-bit step."""

    scope: ClassVar[str] = "Decode"

    def plan(self, spec: Latents, model: ModelInfo) -> Pixels:
        """Pixels `downscale` times larger; refuses latents that still hold noise."""
        check_space(spec, model)
        if spec.sigma != 0:
            raise PlanError(f"latents still hold noise (sigma {spec.sigma:g}); put Refine() before Decode()")
        scale = model.space.downscale
        return Pixels(spec.batch, spec.height * scale, spec.width * scale)

    def work(self, spec: Latents, out: Pixels, model: ModelInfo) -> Work:
        """The decoder's arithmetic, where the model's facts tell it."""
        return Work(flops=spec.batch * decode_flops(model, out.height, out.width))

    def apply(self, state: State[Latents], out: Pixels, ctx: "Context") -> Tensor:
        """Decode."""
        return ctx.model.decode(state.data)


def check_space(spec: Latents, model: ModelInfo) -> None:
    """Refuse latents of another model: their shape may fit, their meaning does not."""
    if spec.space != model.space:
        raise PlanError(
            f"latents are of {spec.space.name}, the model {model.name} works in {model.space.name}; decode them with "
            f"their own model and Encode() with this one"
        )

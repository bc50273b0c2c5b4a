"""Latents to pixels."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from mrflow.cost import decode_flops
from mrflow.errors import PlanError, PromiseError
from mrflow.model_info import ModelInfo
from mrflow.protocols.decoder import Decoder
from mrflow.spec import Latents, Pixels, State
from mrflow.stage import Context, Stage, Work


@dataclass(frozen=True)
class Decode(Stage[Latents, Pixels]):
    """The model's decoder, or another of the same latents, on clean ones. Pixels stay float32: no 8-bit step.

    A `decoder` may be smaller than the model's (a tiny autoencoder), make fewer pixels (a preview) or more (one that
    was trained to enlarge, after which no `Upscale` is needed).
    """

    scope: ClassVar[str] = "Decode"
    decoder: Decoder | None = None

    def plan(self, spec: Latents, model: ModelInfo) -> Pixels:
        """Pixels `downscale` times larger, or the decoder's scale; refuses latents that still hold noise.

        Raises:
            PlanError: the latents hold noise, or the decoder knows others.
        """
        check_space(spec, model)
        if self.decoder is not None:
            check_known(self.decoder.space, spec, type(self.decoder).__name__)
        if spec.sigma != 0:
            raise PlanError(f"latents still hold noise (sigma {spec.sigma:g}); put Refine() before Decode()")
        scale = model.space.downscale if self.decoder is None else self.decoder.scale
        return Pixels(spec.batch, spec.height * scale, spec.width * scale)

    def work(self, spec: Latents, out: Pixels, model: ModelInfo) -> Work:
        """The decoder's arithmetic, where it is known."""
        if self.decoder is not None:
            return Work(flops=spec.batch * out.height * out.width * self.decoder.flops_per_pixel)
        return Work(flops=spec.batch * decode_flops(model, out.height, out.width))

    def apply(self, state: State[Latents], out: Pixels, ctx: Context) -> Tensor:
        """Decode."""
        if self.decoder is None:
            return ctx.model.decode(state.data)
        made = self.decoder(state.data)
        if tuple(made.shape) != out.shape:
            raise PromiseError(
                f"{type(self.decoder).__name__} says scale {self.decoder.scale}, so it must make {out.shape} of "
                f"{tuple(state.data.shape)}, but made {tuple(made.shape)}"
            )
        return made.clamp(0, 1)


def check_space(spec: Latents, model: ModelInfo) -> None:
    """Refuse latents of another model: their shape may fit, their meaning does not."""
    if spec.space != model.space:
        raise PlanError(
            f"latents are of {spec.space.name}, the model {model.name} works in {model.space.name}; decode them with "
            f"their own model and Encode() with this one"
        )


def check_known(space: str, spec: Latents, name: str) -> None:
    """Refuse a network that was trained on other latents: their shape may fit, their meaning does not.

    Raises:
        PlanError: naming both.
    """
    if space != spec.space.name:
        raise PlanError(f"{name} knows latents of {space!r}, and these are of {spec.space.name!r}")

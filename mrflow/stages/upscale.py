"""Pixels to more pixels."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from mrflow.backbone import Backbone
from mrflow.errors import PlanError
from mrflow.model_info import ModelInfo
from mrflow.protocols.upscaler import Upscaler, apply_upscaler, passes_to, scale_of
from mrflow.spec import MAX_SIDE, Pixels, State
from mrflow.stage import Context, Stage, Work
from mrflow.stages.lift import Sized, check_rise


@dataclass(frozen=True)
class Upscale(Sized, Stage[Pixels, Pixels]):
    """Super-resolution. `upscaler=None` is the model's own net.

    `size`, a (height, width) in pixels, asks for more or less than the upscaler's scale gives: the upscaler runs as
    often as it takes to reach it, and an antialiased bicubic resize takes off what is too much.
    """

    scope: ClassVar[str] = "Upscale"
    upscaler: Upscaler | None = None
    size: tuple[int, int] | None = None

    def scale(self, model: ModelInfo) -> int:
        """What one pass of the upscaler multiplies the sides by."""
        scale = scale_of(self.upscaler) if self.upscaler is not None else model.upscale
        if scale is None:
            raise PlanError(
                f"{model.name} has no super-resolution net of its own; name one, such as Upscale(Lanczos(2))"
            )
        return scale

    def passes(self, spec: Pixels, model: ModelInfo) -> int:
        """How often the upscaler runs."""
        return 1 if self.size is None else passes_to(self.size, spec.height, spec.width, self.scale(model))

    def plan(self, spec: Pixels, model: ModelInfo) -> Pixels:
        """Pixels of `size`, or `scale` times the sides."""
        scale = self.scale(model)
        height, width = self.size or (scale * spec.height, scale * spec.width)
        check_rise((spec.height, spec.width), (height, width), model)
        if max(height, width) > MAX_SIDE:
            raise PlanError(f"{height}x{width} is beyond {MAX_SIDE} pixels a side")
        return Pixels(spec.batch, height, width)

    def work(self, spec: Pixels, out: Pixels, model: ModelInfo) -> Work:
        """The upscaler's arithmetic, where it tells."""
        scale, flops = self.scale(model), 0.0
        for i in range(self.passes(spec, model)):
            height, width = spec.height * scale**i, spec.width * scale**i
            per_pixel = self.upscaler.flops_per_pixel if self.upscaler is not None else model.upscale_flops
            flops += spec.batch * height * width * per_pixel
        return Work(flops=flops)

    def check(self, model: Backbone) -> None:
        """The model must have a net of its own where none is named."""
        if self.upscaler is None and model.upscaler is None:
            raise PlanError(
                f"{model.info.name} was loaded without a super-resolution net; name one, such as Upscale(Lanczos(2))"
            )

    def apply(self, state: State[Pixels], out: Pixels, ctx: Context) -> Tensor:
        """Enlarge, then resize if the sizes still differ."""
        upscaler = self.upscaler or ctx.model.upscaler
        if upscaler is None:
            raise PlanError(f"{ctx.model.info.name} has no super-resolution net of its own")
        pixels = state.data
        for _ in range(self.passes(state.spec, ctx.model.info)):
            pixels = apply_upscaler(upscaler, pixels)
        return resize(pixels, out.height, out.width).clamp(0, 1)


def resize(pixels: Tensor, height: int, width: int) -> Tensor:
    """Antialiased bicubic resize of (b, 3, h, w) to the given size; the same tensor where it has that size."""
    if pixels.shape[-2:] == (height, width):
        return pixels
    from torch.nn.functional import interpolate

    return interpolate(pixels, size=(height, width), mode="bicubic", antialias=True, align_corners=False)

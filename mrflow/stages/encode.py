"""Pixels to clean latents."""

from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from mrflow.cost import encode_flops
from mrflow.model_info import ModelInfo
from mrflow.noise import Noise, PerItem
from mrflow.spec import Latents, Pixels, State, check_size
from mrflow.stage import Context, Stage, Work


@dataclass(frozen=True)
class Encode(Stage[Pixels, Latents]):
    """The model's encoder: the mode of its posterior, or a sample of it (what the published MrFlow does)."""

    scope: ClassVar[str] = "Encode"
    posterior: bool = field(default=False, kw_only=True)
    noise: Noise = field(default=PerItem(), kw_only=True)

    def plan(self, spec: Pixels, model: ModelInfo) -> Latents:
        """Latents `downscale` times smaller, sigma 0; refuses sizes that are not whole tokens."""
        check_size(spec.height, spec.width, model.space)
        scale = model.space.downscale
        return Latents(spec.batch, spec.height // scale, spec.width // scale, model.space)

    def work(self, spec: Pixels, out: Latents, model: ModelInfo) -> Work:
        """The encoder's arithmetic, where the model's facts tell it."""
        return Work(flops=spec.batch * encode_flops(model, spec.height, spec.width))

    def apply(self, state: State[Pixels], out: Latents, ctx: Context) -> Tensor:
        """Encode."""
        noise = ctx.noise(out.shape, source=self.noise) if self.posterior else None
        return ctx.model.encode(state.data, noise)

"""FLUX.1 as a backbone: text encoders, transformer and autoencoder behind the methods that stages use."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mrflow.backbone import Condition
from mrflow.errors import PlanError, WeightsError
from mrflow.flow import Velocity
from mrflow.models.base import DIRECT, LatentModel, count, encoded_once, footprint, shift_of
from mrflow.models.fields import FluxField, side_by_side, step
from mrflow.models.flux import Flux
from mrflow.models.memory import Ways
from mrflow.models.pieces import Opening
from mrflow.models.vae_flux import VaeFlux
from mrflow.places import Places
from mrflow.spec import FLUX, SCHNELL, Architecture, LatentSpace, ModelInfo
from mrflow.upscaler import Upscaler

if TYPE_CHECKING:
    from mrflow.models.text import ClipT5


class Flux1(LatentModel):
    """FLUX.1-dev, -schnell, or a model of their architecture. Build it with `mrflow.load`."""

    def __init__(
        self,
        *,
        flow: Flux,
        vae: VaeFlux,
        text: "ClipT5 | None",
        info: ModelInfo,
        device: torch.device,
        ways: Ways = DIRECT,
        upscaler: Upscaler | None = None,
    ) -> None:
        super().__init__(
            flow=flow, vae=vae, text=text, info=info, device=device, step=step, ways=ways, upscaler=upscaler
        )

    @property
    def _flow(self) -> Flux:
        assert isinstance(self._net, Flux)
        return self._net

    @property
    def transformer(self) -> Flux:
        """The network itself: `embed`, `blocks`, `head` and `attention` are open to wrappers."""
        return self._flow

    def condition(self, prompts: Sequence[str]) -> Condition:
        """T5 states (b, text tokens, context) and CLIP's pooled vector (b, pooled); equal prompts are encoded once."""
        from mrflow.models.text import ClipT5

        words, a = self._encoder(ClipT5), self._info.architecture
        assert a is not None

        def encode(different: list[str]) -> dict[str, Tensor]:
            with self._residency.using("text"):
                context, pooled = words(different, length=a.text_tokens)
            return {"context": context, "pooled": pooled}

        return Condition(encoded_once(prompts, encode))

    def field(
        self,
        cond: Condition,
        *,
        guidance: float | None = None,
        levels: Sequence[float] | None = None,
        step: Opening | None = None,
        places: Places | None = None,
    ) -> Velocity:
        """The velocity of the flow; with `levels`, the sigmas it will be asked for, their modulations come first.

        `step` is given the network's pieces and gives the step that is taken in the model's own place.
        """
        p = self._flow.params
        if guidance is not None and not p.guidance:
            raise PlanError(f"{self._info.name} has no guidance embedding; use CFG(scale)")
        context, pooled = self._checked(cond)
        value = self._info.guidance if guidance is None else guidance
        strength = None if value is None else torch.full((cond.batch,), value, device=self._device)
        announced = (levels or ()) if self._ways.fold else None
        own = self._step if step is None else step(self._pieces)
        using = partial(self._residency.using, "main")
        return FluxField(self._flow, context, pooled, strength, levels=announced, step=own, using=using, places=places)

    def together(
        self, conds: Sequence[Condition], *, levels: Sequence[float] | None = None, places: Places | None = None
    ) -> Callable[[Tensor, float], tuple[Tensor, ...]]:
        """The velocities for several conditions at once, from one pass over a larger batch."""
        return side_by_side(conds, partial(self.field, levels=levels, places=places))

    def steering(self, cond: Condition, sigma: float, *, guidance: float | None = None) -> Tensor:
        """What every modulation starts from at a level: (b, width)."""
        _, pooled = self._checked(cond)
        value = self._info.guidance if guidance is None else guidance
        level, strength = (
            None if v is None else torch.full((cond.batch,), v, device=self._device) for v in (sigma, value)
        )
        assert level is not None
        with self._residency.using("main"):
            return self._flow.steering(level, strength, pooled)

    def _checked(self, cond: Condition) -> tuple[Tensor, Tensor]:
        """The condition's tensors on the device, if they are of this model's sizes."""
        p = self._flow.params
        names = set(cond.tensors)
        if not {"context", "pooled"} <= names:
            raise PlanError(f"{self._info.name} needs a condition with context and pooled, got {sorted(names)}")
        context, pooled = cond["context"], cond["pooled"]
        fits = context.ndim == 3 and context.shape[-1] == p.context and context.shape[1] > 0
        if not fits or pooled.shape[1:] != (p.pooled,):
            raise PlanError(
                f"{self._info.name} needs context (batch, tokens, {p.context}) and pooled (batch, {p.pooled}), got "
                f"{tuple(context.shape)} and {tuple(pooled.shape)}; was the prompt encoded for another model?"
            )
        return context.to(self._device), pooled.to(self._device)


def flux1_info(
    flow: Flux, vae: VaeFlux, text: "ClipT5 | None", scheduler: Mapping[str, Any], *, version: str, path: object
) -> ModelInfo:
    """Facts of a loaded model: FLUX.1-dev's or -schnell's, told apart by the guidance embedding, with its own sizes."""
    p = flow.params
    base = FLUX if p.guidance else SCHNELL
    if p.in_channels != 4 * vae.params.latent or p.out_channels != p.in_channels:
        raise WeightsError(
            f"{path} takes {p.in_channels} channels a token and gives {p.out_channels}, its autoencoder has "
            f"{4 * vae.params.latent}: models with an image condition (Fill, Canny, Depth) are not supported"
        )
    assert base.architecture is not None
    architecture = Architecture(
        p.hidden, p.double_blocks, p.single_blocks, p.context, base.architecture.text_tokens, count(flow), p.mlp_ratio
    )
    return replace(
        base,
        space=LatentSpace("flux1", vae.params.latent, vae.params.downscale),
        shift=shift_of(scheduler, path) or base.shift,
        architecture=architecture,
        footprint=footprint(flow, vae, text),
        version=version,
    )

"""FLUX.1 as a backbone: text encoders, transformer and autoencoder behind the methods that stages use."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from mrflow.backbone import Condition, FieldOptions
from mrflow.errors import PlanError
from mrflow.flow import Velocity
from mrflow.machine.devices import to_device
from mrflow.models.flux.field import FluxField
from mrflow.models.flux.text import ClipT5
from mrflow.models.flux.transformer import Flux
from mrflow.models.latent_model import LatentModel, encoded_once
from mrflow.models.transformer_model import repeat, side_by_side
from mrflow.protocols.pieces import StepFactory


class Flux1(LatentModel):
    """FLUX.1-dev, -schnell, or a model of their architecture. Build it with `mrflow.load`."""

    @property
    def transformer(self) -> Flux:
        """The network itself: `embed_image`, `some_blocks`, `head` and `attention` are open to wrappers."""
        assert isinstance(self._net, Flux)
        return self._net

    def condition(self, prompts: Sequence[str]) -> Condition:
        """T5 states (b, text tokens, context) and CLIP's pooled vector (b, pooled); equal prompts are encoded once."""
        words, a = self._encoder(ClipT5), self._info.architecture
        assert a is not None

        def encode(different: list[str]) -> dict[str, Tensor]:
            with self._offload.using("text"):
                context, pooled = words(different, length=a.text_tokens)
            return {"context": context, "pooled": pooled}

        return Condition(encoded_once(prompts, encode))

    def make_field(self, cond: Condition, options: FieldOptions, step: StepFactory | None) -> Velocity:
        """The velocity of the flow; conditions beside are a larger batch."""
        p = self.transformer.params
        if options.guidance is not None and not p.guidance:
            raise PlanError(f"{self._info.name} has no guidance embedding; use CFG(scale)")
        if options.beside:
            cond = side_by_side(cond, options.beside)
        context, pooled = self._tensors(cond)
        value = self._info.guidance if options.guidance is None else options.guidance
        strength = None if value is None else torch.full((cond.batch,), value, device=self._device)
        field = FluxField(
            self.transformer,
            context,
            pooled,
            strength,
            sigmas=options.sigmas if self._runtime.fold else None,
            step=self._step if step is None else step(self._pieces),
            using=partial(self._offload.using, "main"),
            positions=options.positions,
        )
        return repeat(field, 1 + len(options.beside))

    def conditioning_vector(self, cond: Condition, sigma: float, *, guidance: float | None = None) -> Tensor:
        """What every modulation starts from at a level: (b, width)."""
        _, pooled = self._tensors(cond)
        value = self._info.guidance if guidance is None else guidance
        level, strength = (
            None if v is None else torch.full((cond.batch,), v, device=self._device) for v in (sigma, value)
        )
        assert level is not None
        with self._offload.using("main"):
            return self.transformer.conditioning_vector(level, strength, pooled)

    def _tensors(self, cond: Condition) -> tuple[Tensor, Tensor]:
        """The condition's tensors on the device, if they are of this model's sizes."""
        p = self.transformer.params
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
        return to_device(context, self._device), to_device(pooled, self._device)

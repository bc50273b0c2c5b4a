"""Z-Image as a backbone: text encoder, transformer and FLUX's autoencoder behind the methods that stages use."""

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mrflow.backbone import Condition, FieldOptions
from mrflow.errors import PlanError
from mrflow.flow import Velocity
from mrflow.models.encoders import padded
from mrflow.models.fields import ModulationTables, step
from mrflow.models.flux.vae import VaeFlux
from mrflow.models.latent_model import DIRECT, LatentModel, encoded_once
from mrflow.models.offload import RuntimeOptions
from mrflow.models.zimage.field import ZImageField, alike
from mrflow.models.zimage.transformer import ZImage
from mrflow.pieces import StepFactory
from mrflow.spec import ModelInfo
from mrflow.upscaler import Upscaler

if TYPE_CHECKING:
    from mrflow.models.zimage.text import ZImageText


class ZImageModel(LatentModel):
    """Z-Image, Turbo or not, or a model of its architecture. Build it with `mrflow.load`."""

    def __init__(
        self,
        *,
        flow: ZImage,
        vae: VaeFlux,
        text: "ZImageText | None",
        info: ModelInfo,
        device: torch.device,
        runtime: RuntimeOptions = DIRECT,
        upscaler: Upscaler | None = None,
    ) -> None:
        super().__init__(
            flow=flow, vae=vae, text=text, info=info, device=device, step=step, runtime=runtime, upscaler=upscaler
        )

    @property
    def _flow(self) -> ZImage:
        assert isinstance(self._net, ZImage)
        return self._net

    @property
    def transformer(self) -> ZImage:
        """The network itself: `embed_image`, `some_blocks`, `head` and `attention` are open to wrappers."""
        return self._flow

    def condition(self, prompts: Sequence[str]) -> Condition:
        """States (b, longest, width), zeros behind, and a mask (b, longest) of the text; equal prompts encoded once."""
        from mrflow.models.zimage.text import ZImageText

        words = self._encoder(ZImageText)

        def encode(different: list[str]) -> dict[str, Tensor]:
            with self._offload.using("text"):
                context, mask = padded(words(different))
            return {"context": context, "mask": mask}

        return Condition(encoded_once(prompts, encode))

    def opened(self, cond: Condition, options: FieldOptions, step: StepFactory | None) -> Velocity:
        """The velocity of the flow, branch by branch; texts that fill up to one length are a batch."""
        if options.guidance is not None:
            raise PlanError(f"{self._info.name} has no guidance embedding; use CFG(scale)")
        batch = cond.batch
        texts = [states for each in (cond, *options.beside) for states in self._states(each)]
        table = ModulationTables(self._tables, options.sigmas if self._runtime.fold else None)
        groups = [
            (
                rows,
                ZImageField(
                    self._flow,
                    [texts[i] for i in rows],
                    step=self._step if step is None else step(self._pieces),
                    table=table,
                    using=partial(self._offload.using, "main"),
                    positions=options.positions,
                ),
            )
            for rows in alike(texts)
        ]

        def velocity(x: Tensor, sigma: float) -> Tensor:
            if x.shape[0] != batch:
                raise PlanError(f"latents for {x.shape[0]} pictures met a condition for {batch}")
            out = torch.empty(len(texts), *x.shape[1:], device=x.device)
            for rows, field in groups:
                out[rows] = field(x[[i % batch for i in rows]], sigma)
            return out

        return velocity

    def conditioning_vector(self, cond: Condition, sigma: float, *, guidance: float | None = None) -> Tensor:
        """What every modulation starts from at a level: (b, width), alike for all items."""
        with self._offload.using("main"):
            vector = self._flow.conditioning_vector(torch.full((1,), sigma, device=self._device))
        return vector.expand(cond.batch, -1)

    def _tables(self, sigmas: Sequence[float]) -> list[Tensor]:
        """Modulations at these levels."""
        return self._flow.tables([torch.full((1,), sigma, device=self._device) for sigma in sigmas])

    def _states(self, cond: Condition) -> list[Tensor]:
        """Each item's own states, without padding."""
        width, names = self._flow.params.context, set(cond.tensors)
        if "context" not in names:
            raise PlanError(f"{self._info.name} needs a condition with context, got {sorted(names)}")
        context = cond["context"].to(self._device)
        if context.ndim != 3 or context.shape[-1] != width or context.shape[1] == 0:
            raise PlanError(
                f"{self._info.name} needs context (batch, tokens, {width}), got {tuple(context.shape)}; was the prompt "
                "encoded for another model?"
            )
        if "mask" not in names:
            return list(context)
        lengths = [int(n) for n in cond["mask"].sum(1)]
        if min(lengths) == 0:
            raise PlanError("a prompt's mask marks no text at all")
        return [item[:length] for item, length in zip(context, lengths, strict=True)]

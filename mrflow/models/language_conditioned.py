"""Models whose text is a language model's states of each prompt, as many as it has tokens."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from mrflow.backbone import Condition
from mrflow.errors import PlanError
from mrflow.machine.devices import to_device
from mrflow.models.encoders import pad_states
from mrflow.models.language import LanguageText
from mrflow.models.latent_model import LatentModel, encoded_once


@runtime_checkable
class LevelConditioned(Protocol):
    """A transformer whose modulations start from the noise level alone."""

    @property
    def params(self) -> Any:  # noqa: ANN401
        """Its sizes, `context` among them."""
        ...

    def conditioning_vector(self, sigma: Tensor, /) -> Tensor:
        """What every modulation starts from, of levels (b,): (b, width)."""
        ...


class LanguageConditioned(LatentModel):
    """A latent model with such a text encoder and such a transformer."""

    @property
    @abstractmethod
    def transformer(self) -> LevelConditioned:
        """The network itself."""

    def condition(self, prompts: Sequence[str]) -> Condition:
        """States (b, longest, width), zeros behind, and a mask (b, longest) of the text; equal prompts encoded once."""
        words = self._encoder(LanguageText)  # type: ignore[type-abstract]

        def encode(different: list[str]) -> dict[str, Tensor]:
            with self._offload.using("text"):
                context, mask = pad_states(words(different))
            return {"context": context, "mask": mask}

        return Condition(encoded_once(prompts, encode))

    def conditioning_vector(self, cond: Condition, sigma: float, *, guidance: float | None = None) -> Tensor:
        """What every modulation starts from at a level: (b, width), alike for all items."""
        with self._offload.using("main"):
            vector = self.transformer.conditioning_vector(torch.full((1,), sigma, device=self._device))
        return vector.expand(cond.batch, -1)

    def _states(self, cond: Condition) -> list[Tensor]:
        """Each item's own states, without padding."""
        width, names = self.transformer.params.context, set(cond.tensors)
        if "context" not in names:
            raise PlanError(f"{self._info.name} needs a condition with context, got {sorted(names)}")
        context = to_device(cond["context"], self._device)
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

"""One integration of FLUX: what does not change from step to step is made once."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mrflow.models.fields import ModulationTables, TransformerField
from mrflow.models.flux.transformer import Flux, image_ids
from mrflow.models.layers import Rope


class FluxField(TransformerField[Rope]):
    """The field of FLUX for T5 states (b, tokens, width), pooled vectors (b, width) and a guidance (b,) or none.

    Modulations of `sigmas`, the levels it will be asked for, are made at the first call; of another level when it is
    met. `sigmas=None` makes them anew in every call. `how` is for `TransformerField`.
    """

    def __init__(
        self,
        flow: Flux,
        context: Tensor,
        pooled: Tensor,
        guidance: Tensor | None,
        *,
        sigmas: Sequence[float] | None = (),
        **how: Any,  # noqa: ANN401
    ) -> None:
        self.flow, self.context, self.pooled, self.guidance = flow, context, pooled, guidance
        table = ModulationTables(self._tables, sigmas)
        super().__init__(len(context), device=context.device, table=table, **how)

    def embed(self) -> Tensor:
        """T5's states in the width of the stream."""
        return self.flow.embed_text(self.context)

    def place(self, text: Tensor, h: int, w: int, part: int) -> Rope:
        """Rotations of the joint sequence."""
        ids = image_ids(h, w, device=self.device)
        if self.positions is not None:
            ids[:, 1:] = self.positions.part(part).to(ids)
        return self.flow.rope(ids, ids.new_zeros(text.shape[1], 3))

    def ask(self, tokens: Tensor, text: Tensor, placed: Rope, table: Tensor, h: int, w: int) -> Tensor:
        """One step of the network."""
        return self.step(tokens, text, *placed, table, key=self.flow.attention)

    def _tables(self, sigmas: Sequence[float]) -> list[Tensor]:
        times = [torch.full((len(self.pooled),), sigma, device=self.pooled.device) for sigma in sigmas]
        return self.flow.tables(times, self.guidance, self.pooled)

"""One integration of FLUX: what does not change from step to step is made once."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from mrflow.backbone import Positions, join_parts, split_parts
from mrflow.errors import PlanError
from mrflow.models.fields import ModulationTables
from mrflow.models.flux.transformer import Flux, image_ids
from mrflow.models.layers import Rope
from mrflow.protocols.pieces import TransformerStep
from mrflow.protocols.tokens import PackedField


class FluxField(PackedField):
    """The velocity (x, sigma) -> d x / d sigma for fixed conditions.

    Embedded text and rotations are made at the first call and die with the field. So are the modulations of `sigmas`,
    the sigmas it will be asked for; of another level when it is met. `sigmas=None` makes them anew in every call.
    `using` is entered while the network works, so that its weights can be brought where they are needed. `positions`
    says where tokens lie that are no grid.
    """

    def __init__(
        self,
        flow: Flux,
        context: Tensor,
        pooled: Tensor,
        guidance: Tensor | None,
        *,
        sigmas: Sequence[float] | None = (),
        step: TransformerStep,
        using: Callable[[], AbstractContextManager[None]] = nullcontext,
        positions: Positions | None = None,
    ) -> None:
        self.positions = positions and positions.to(context.device)
        self.flow, self.context, self.pooled, self.guidance = flow, context, pooled, guidance
        self.step, self.using = step, using
        self.table = ModulationTables(self._tables, sigmas)
        self.text: Tensor | None = None
        self.ropes: dict[tuple[int, int, int], Rope] = {}

    def velocity(self, tokens: Tensor, sigma: float, h: int, w: int) -> Tensor:
        """The float32 velocities of h x w tokens (b, h w, d) at a level."""
        with self.using():
            text, table = self._prepare(len(tokens), sigma)
            outs = [
                self.step(part, text, *self._rope(h, part.shape[1] // h, i), table, key=self.flow.attention)
                for i, part in enumerate(split_parts(self.positions, tokens))
            ]
            return join_parts(outs).float()

    def _prepare(self, batch: int, sigma: float) -> tuple[Tensor, Tensor]:
        """The embedded text, and the modulations of a level."""
        if batch != len(self.context):
            raise PlanError(f"latents for {batch} pictures met a condition for {len(self.context)}")
        table = self.table(sigma)
        if self.text is None:
            self.text = self.flow.embed_text(self.context)
        return self.text, table

    def _rope(self, h: int, w: int, part: int) -> Rope:
        if (h, w, part) not in self.ropes:
            ids = image_ids(h, w, device=self.context.device)
            if self.positions is not None:
                ids[:, 1:] = self.positions.part(part).to(ids)
            self.ropes.clear()  # the newest alone: those of many parts are large
            self.ropes[h, w, part] = self.flow.rope(ids, ids.new_zeros(self.context.shape[1], 3))
        return self.ropes[h, w, part]

    def _tables(self, sigmas: Sequence[float]) -> list[Tensor]:
        times = [torch.full((len(self.pooled),), sigma, device=self.pooled.device) for sigma in sigmas]
        return self.flow.tables(times, self.guidance, self.pooled)

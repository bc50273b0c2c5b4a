"""One integration of FLUX: what does not change from step to step is made once."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from mrflow.backbone import Positions, in_parts
from mrflow.errors import PlanError
from mrflow.flow import Velocity
from mrflow.models.fields import ModulationTables
from mrflow.models.flux.transformer import Flux, image_ids
from mrflow.models.layers import Rope
from mrflow.pieces import Step
from mrflow.tokens import pack, unpack


class FluxField:
    """The velocity (x, sigma) -> d x / d sigma for fixed conditions.

    Embedded text and rotations are made at the first call and die with the field. So are the modulations of `levels`,
    the sigmas it will be asked for; of another level when it is met. `levels=None` makes them anew in every call.
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
        levels: Sequence[float] | None = (),
        step: Step,
        using: Callable[[], AbstractContextManager[None]] = nullcontext,
        positions: Positions | None = None,
    ) -> None:
        self.positions = positions and positions.to(context.device)
        self.flow, self.context, self.pooled, self.guidance = flow, context, pooled, guidance
        self.step, self.using = step, using
        self.table = ModulationTables(self._tables, levels)
        self.text: Tensor | None = None
        self.ropes: dict[tuple[int, int, int], Rope] = {}

    def __call__(self, x: Tensor, sigma: float) -> Tensor:
        """Latents (b, c, h, w) at a level to their velocity, float32."""
        with self.using():
            text, table = self._prepared(len(x), sigma)

            def one(part: Tensor, index: int) -> Tensor:
                h, w = part.shape[2] // 2, part.shape[3] // 2
                tokens = self.step(pack(part), text, *self._rope(h, w, index), table, key=self.flow.attention)
                return unpack(tokens.float(), h, w)

            return in_parts(self.positions, one, x)

    def on_tokens(self, h: int, w: int) -> Velocity | None:
        """The same velocities for packed latents (b, h w, d); None where `positions` are given."""

        def velocity(tokens: Tensor, sigma: float) -> Tensor:
            with self.using():
                text, table = self._prepared(len(tokens), sigma)
                return self.step(tokens, text, *self._rope(h, w, 0), table, key=self.flow.attention).float()

        return velocity if self.positions is None else None

    def _prepared(self, batch: int, sigma: float) -> tuple[Tensor, Tensor]:
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

    def _tables(self, levels: Sequence[float]) -> list[Tensor]:
        sigmas = [torch.full((len(self.pooled),), level, device=self.pooled.device) for level in levels]
        return self.flow.tables(sigmas, self.guidance, self.pooled)

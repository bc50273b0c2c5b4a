"""One integration of a FLUX-architecture transformer: what does not change from step to step is made once."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from mrflow.errors import PlanError
from mrflow.models.flux import Flux, image_ids, pack, unpack
from mrflow.models.layers import Rope


@runtime_checkable
class Step(Protocol):
    """Image tokens, the text stream, rotations and modulations to the velocity's tokens."""

    def __call__(
        self, tokens: Tensor, text: Tensor, cos: Tensor, sin: Tensor, table: Tensor, /, *, key: object = None
    ) -> Tensor:
        """`key` tells apart what shapes do not, for what is recorded per shape."""
        ...


def step(
    flow: Flux, tokens: Tensor, text: Tensor, cos: Tensor, sin: Tensor, table: Tensor, /, *, key: object = None
) -> Tensor:
    """The step itself: embed the image, all blocks, head."""
    return flow.head(flow.blocks(flow.embed_image(tokens), text, Rope(cos, sin), table), table)


class FluxField:
    """The velocity (x, sigma) -> d x / d sigma for fixed conditions.

    Embedded text and rotations are made at the first call and die with the field. So are the modulations of `levels`,
    the sigmas it will be asked for; of another level when it is met. `levels=None` makes them anew in every call.
    `using` is entered while the network works, so that its weights can be brought where they are needed.
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
    ) -> None:
        self.flow, self.context, self.pooled, self.guidance = flow, context, pooled, guidance
        self.levels, self.step, self.using = levels, step, using
        self.text: Tensor | None = None
        self.ropes: dict[tuple[int, int], Rope] = {}
        self.tables: dict[float, Tensor] = {}

    def __call__(self, x: Tensor, sigma: float) -> Tensor:
        """Latents (b, c, h, w) at a level to their velocity, float32."""
        if x.shape[0] != self.context.shape[0]:
            raise PlanError(f"latents for {x.shape[0]} pictures met a condition for {self.context.shape[0]}")
        with self.using():
            table = self._table(sigma)
            h, w = x.shape[2] // 2, x.shape[3] // 2
            if (h, w) not in self.ropes:
                ids = image_ids(h, w, device=x.device)
                self.ropes[h, w] = self.flow.rope(ids, ids.new_zeros(self.context.shape[1], 3))
            if self.text is None:
                self.text = self.flow.embed_text(self.context)
            tokens = self.step(pack(x), self.text, *self.ropes[h, w], table, key=self.flow.attention)
            return unpack(tokens.float(), h, w)

    def _table(self, sigma: float) -> Tensor:
        if sigma in self.tables:
            return self.tables[sigma]
        wanted = list(dict.fromkeys((sigma, *(self.levels or ()))))
        sigmas = [torch.full((len(self.pooled),), level, device=self.pooled.device) for level in wanted]
        tables = self.flow.tables(sigmas, self.guidance, self.pooled)
        if self.levels is not None:
            self.levels = ()
            self.tables.update(zip(wanted, tables, strict=True))
        return tables[0]

"""What the integrations of all transformers share: the step itself, and modulations that are made once."""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Generic, TypeVar

import torch
from torch import Tensor

from mrflow.backbone import Positions, join_parts, split_parts
from mrflow.errors import PlanError
from mrflow.models.blocks import Transformer
from mrflow.models.layers import Rope
from mrflow.protocols.pieces import TransformerStep
from mrflow.protocols.tokens import PackedField

Placed = TypeVar("Placed")


def step(
    net: Transformer, tokens: Tensor, text: Tensor, cos: Tensor, sin: Tensor, table: Tensor, /, *, key: object = None
) -> Tensor:
    """The step itself: embed the image, all blocks, head."""
    img, _ = net.some_blocks(net.embed_image(tokens), text, Rope(cos, sin), table, 0, len(net.stack()))
    return net.head(img, table)


class ModulationTables:
    """Modulations by level: of all announced `sigmas` when the first is asked for, of another one when it is met.

    `sigmas=None` makes them anew each time.
    """

    def __init__(self, make: Callable[[Sequence[float]], list[Tensor]], sigmas: Sequence[float] | None) -> None:
        self.make, self.sigmas = make, sigmas
        self.made: dict[float, Tensor] = {}

    def __call__(self, sigma: float) -> Tensor:
        """The modulations at a level."""
        if sigma in self.made:
            return self.made[sigma]
        wanted = list(dict.fromkeys((sigma, *(self.sigmas or ()))))
        tables = self.make(wanted)
        if self.sigmas is not None:
            self.sigmas = ()
            self.made.update(zip(wanted, tables, strict=True))
        return tables[0]


class TransformerField(PackedField, Generic[Placed]):
    """The velocities (x, sigma) -> d x / d sigma of a transformer for fixed conditions, each item's own.

    The text stream and what depends on the tokens' places are made at the first call and die with the field; `table`
    gives the modulations of a level. `using` is entered while the network works, so that its weights can be brought
    where they are needed. `positions` says where tokens lie that are no grid.
    """

    def __init__(
        self,
        items: int,
        *,
        device: torch.device,
        step: TransformerStep,
        table: ModulationTables,
        using: Callable[[], AbstractContextManager[None]] = nullcontext,
        positions: Positions | None = None,
    ) -> None:
        self.count, self.device, self.step, self.table, self.using = items, device, step, table, using
        self.positions = positions and positions.to(device)
        self.text: Tensor | None = None
        self.placed: dict[tuple[int, int, int], Placed] = {}

    @abstractmethod
    def embed(self) -> Tensor:
        """The text stream."""

    @abstractmethod
    def place(self, text: Tensor, h: int, w: int, part: int) -> Placed:
        """What depends on the places of h x w tokens, the n-th part of all."""

    @abstractmethod
    def ask(self, tokens: Tensor, text: Tensor, placed: Placed, table: Tensor, h: int, w: int) -> Tensor:
        """The velocities of packed latents (b, h w, d), or of one part of them."""

    def velocity(self, tokens: Tensor, sigma: float, h: int, w: int) -> Tensor:
        """The float32 velocities of h x w tokens (b, h w, d) at a level."""
        if len(tokens) != self.count:
            raise PlanError(f"latents for {len(tokens)} pictures met a condition for {self.count}")
        with self.using():
            table = self.table(sigma)
            if self.text is None:
                self.text = self.embed()
            outs: list[Tensor] = []
            for i, part in enumerate(split_parts(self.positions, tokens)):
                across = part.shape[1] // h
                if (h, across, i) not in self.placed:
                    self.placed.clear()  # the newest alone: those of many parts are large
                    self.placed[h, across, i] = self.place(self.text, h, across, i)
                outs.append(self.ask(part, self.text, self.placed[h, across, i], table, h, across).float())
            return join_parts(outs)

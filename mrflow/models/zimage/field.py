"""One integration of Z-Image: what does not change from step to step is made once."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from mrflow.backbone import Positions, join_parts, split_parts
from mrflow.models.fields import ModulationTables
from mrflow.models.layers import Rope
from mrflow.models.zimage.transformer import ZImage, missing_tokens
from mrflow.models.zimage.transformer import positions_zimage as grid_positions
from mrflow.protocols.pieces import TransformerStep
from mrflow.protocols.tokens import PackedField


class ZImageField(PackedField):
    """The velocity (x, sigma) -> d x / d sigma for texts that fill up to one length; of others the step is told them.

    Refined text and rotations are made at the first call and die with the field. `table` gives the modulations of a
    level, which serve all items. `using` is entered while the network works, so that its weights can be brought where
    they are needed. `positions` says where tokens lie that are no grid.
    """

    channels_last = True

    def __init__(
        self,
        net: ZImage,
        texts: Sequence[Tensor],
        *,
        step: TransformerStep,
        table: ModulationTables,
        using: Callable[[], AbstractContextManager[None]] = nullcontext,
        positions: Positions | None = None,
    ) -> None:
        self.net, self.texts, self.step, self.table, self.using = net, texts, step, table, using
        self.positions = positions and positions.to(texts[0].device)
        self.rows = {filled_length(texts[rows[0]]): rows for rows in alike(texts)}
        self.lengths = tuple(filled_length(text) for text in texts)
        self.refined: Tensor | None = None
        self.fixed: dict[tuple[int, int, int], tuple[Tensor, Rope]] = {}

    def velocity(self, tokens: Tensor, sigma: float, h: int, w: int) -> Tensor:
        """The float32 velocities of h x w tokens (b, h w, d) at a level."""
        with self.using():
            refined, table = self._prepare(sigma)
            parts = enumerate(split_parts(self.positions, tokens))
            outs = [self._one(part, refined, table, h, part.shape[1] // h, i) for i, part in parts]
            return join_parts(outs)

    def _prepare(self, sigma: float) -> tuple[Tensor, Tensor]:
        """The refined texts, and the modulations of a level."""
        table = self.table(sigma)
        if self.refined is None:
            self.refined = self._refine_text()
        return self.refined, table

    def _one(self, tokens: Tensor, refined: Tensor, table: Tensor, h: int, w: int, part: int) -> Tensor:
        """The velocities (b, h w, d) of packed latents (b, h w, d), or of one part of them."""
        if (h, w, part) not in self.fixed:
            self.fixed.clear()  # the newest alone: those of many parts are large
            self.fixed[h, w, part] = self.net.fill(refined, h * w), self._rope(h, w, part)
        text, rope = self.fixed[h, w, part]
        key = self.net.attention if len(set(self.lengths)) == 1 else (h * w, self.lengths)
        return self.step(tokens, text, *rope, table, key=key).float()

    def _refine_text(self) -> Tensor:
        """The refined texts; shorter ones are padded with zeros."""
        own = {n: self.net.embed_text([self.texts[i] for i in rows]) for n, rows in self.rows.items()}
        items = {i: t for n, rows in self.rows.items() for i, t in zip(rows, own[n], strict=True)}
        return torch.stack([F.pad(items[i], (0, 0, 0, max(own) - self.lengths[i])) for i in range(len(items))])

    def _rope(self, h: int, w: int, part: int) -> Rope:
        """Rotations of text, filling and image; of each item where texts differ in length: the image lies behind."""
        ropes: dict[int, Rope] = {}
        for n in self.rows:
            places = grid_positions(h, w, n, device=self.texts[0].device)
            if self.positions is not None:
                places[len(places) - h * w :, 1:] = self.positions.part(part).to(places)
            padding = places.new_zeros(max(self.rows) - n, 3)
            ropes[n] = self.net.rope(torch.cat((places[:n], padding, places[n:])))
        if len(ropes) == 1:
            return next(iter(ropes.values()))
        return Rope(*(torch.stack(tables) for tables in zip(*(ropes[n] for n in self.lengths), strict=True)))


def filled_length(text: Tensor) -> int:
    """Tokens of a text that is filled up."""
    return len(text) + missing_tokens(len(text))


def alike(texts: Sequence[Tensor]) -> list[list[int]]:
    """Which items' texts fill up to one length, shortest first."""
    lengths = [filled_length(text) for text in texts]
    return [[i for i, own in enumerate(lengths) if own == length] for length in sorted(set(lengths))]

"""One integration of Z-Image: what does not change from step to step is made once."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mrflow.models.fields import TransformerField
from mrflow.models.layers import Rope
from mrflow.models.zimage.transformer import ZImage, missing_tokens
from mrflow.models.zimage.transformer import positions_zimage as grid_positions


class ZImageField(TransformerField[tuple[Tensor, Rope]]):
    """The field of Z-Image for texts (tokens, width) that fill up to one length; of others the step is told them.

    Modulations serve all items. `how` is for `TransformerField`.
    """

    channels_last = True

    def __init__(self, net: ZImage, texts: Sequence[Tensor], **how: Any) -> None:  # noqa: ANN401
        super().__init__(len(texts), device=texts[0].device, **how)
        self.net, self.texts = net, texts
        self.rows = {filled_length(texts[rows[0]]): rows for rows in alike(texts)}
        self.lengths = tuple(filled_length(text) for text in texts)

    def embed(self) -> Tensor:
        """The refined texts; shorter ones are padded with zeros."""
        own = {n: self.net.embed_text([self.texts[i] for i in rows]) for n, rows in self.rows.items()}
        items = {i: t for n, rows in self.rows.items() for i, t in zip(rows, own[n], strict=True)}
        return torch.stack([F.pad(items[i], (0, 0, 0, max(own) - self.lengths[i])) for i in range(len(items))])

    def ask(self, tokens: Tensor, text: Tensor, placed: tuple[Tensor, Rope], table: Tensor, h: int, w: int) -> Tensor:
        """One step of the network."""
        before, rope = placed
        key = self.net.attention if len(set(self.lengths)) == 1 else (h * w, self.lengths)
        return self.step(tokens, before, *rope, table, key=key)

    def place(self, text: Tensor, h: int, w: int, part: int) -> tuple[Tensor, Rope]:
        """What goes before the image, and rotations of text, filling and image.

        Rotations of each item where texts differ in length: the image lies behind.
        """
        ropes: dict[int, Rope] = {}
        for n in self.rows:
            places = grid_positions(h, w, n, device=self.device)
            if self.positions is not None:
                places[len(places) - h * w :, 1:] = self.positions.part(part).to(places)
            padding = places.new_zeros(max(self.rows) - n, 3)
            ropes[n] = self.net.rope(torch.cat((places[:n], padding, places[n:])))
        before = self.net.fill(text, h * w)
        if len(ropes) == 1:
            return before, next(iter(ropes.values()))
        return before, Rope(*(torch.stack(tables) for tables in zip(*(ropes[n] for n in self.lengths), strict=True)))


def filled_length(text: Tensor) -> int:
    """Tokens of a text that is filled up."""
    return len(text) + missing_tokens(len(text))


def alike(texts: Sequence[Tensor]) -> list[list[int]]:
    """Which items' texts fill up to one length, shortest first."""
    lengths = [filled_length(text) for text in texts]
    return [[i for i, own in enumerate(lengths) if own == length] for length in sorted(set(lengths))]

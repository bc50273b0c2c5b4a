"""One integration of Qwen-Image: what does not change from step to step is made once."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import cast

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mrflow.backbone import Positions, join_parts, split_parts
from mrflow.errors import PlanError
from mrflow.models.fields import ModulationTables
from mrflow.models.layers import Rope
from mrflow.models.qwen.transformer import QwenImage, packed_attention
from mrflow.models.qwen.transformer import positions_qwen as grid_positions
from mrflow.protocols.pieces import TransformerStep
from mrflow.protocols.tokens import PackedField


def qwen_step(
    net: QwenImage, tokens: Tensor, text: Tensor, cos: Tensor, sin: Tensor, table: Tensor, /, *, key: object = None
) -> Tensor:
    """One step of Qwen-Image; a `key` of (image tokens, text lengths) says that items lie packed in one sequence."""
    attend = net.attention
    if isinstance(key, tuple):
        image, texts = cast("tuple[int, tuple[int, ...]]", key)
        attend = partial(packed_attention, texts=texts, image=image, attend=net.attention)
    img, _ = net.some_blocks(
        net.embed_image(tokens), text, Rope(cos, sin), table, 0, len(net.double_blocks), attend=attend
    )
    return net.head(img, table)


class QwenField(PackedField):
    """The velocities (x, sigma) -> d x / d sigma of every branch, for texts of any lengths, in one pass.

    `branches` holds, for each branch of a guidance, the states (tokens, width) of each item. Items whose texts are
    equally long are a batch; otherwise all lie in one sequence, and attention stays within each: no padding, no mask.
    Modulations depend on the level alone: one row serves all items. `positions` says where tokens lie that are no grid.
    `padded` makes a batch of all items, in their order: texts are padded with zeros, the step is told lengths.
    """

    def __init__(
        self,
        net: QwenImage,
        branches: Sequence[Sequence[Tensor]],
        *,
        sigmas: Sequence[float] | None = (),
        step: TransformerStep,
        tables: Callable[[Sequence[float]], list[Tensor]],
        using: Callable[[], AbstractContextManager[None]] = nullcontext,
        positions: Positions | None = None,
        padded: bool = False,
    ) -> None:
        self.net, self.branches, self.padded = net, branches, padded
        self.positions = positions and positions.to(branches[0][0].device)
        self.step, self.table, self.using = step, ModulationTables(tables, sigmas), using
        items = [item for branch in branches for item in branch]
        # Equal lengths side by side, so that attention may treat them as a batch.
        self.order = sorted(range(len(items)), key=lambda i: 0 if padded else len(items[i]))
        self.back = sorted(range(len(items)), key=lambda i: self.order[i])
        self.items = [items[i] for i in self.order]
        self.lengths = tuple(len(item) for item in self.items)
        self.text: Tensor | None = None
        self.ropes: dict[tuple[int, int, int], Rope] = {}

    @property
    def batched(self) -> bool:
        """Whether all texts are equally long."""
        return len(set(self.lengths)) == 1

    def velocity(self, tokens: Tensor, sigma: float, h: int, w: int) -> Tensor:
        """The float32 velocities (branches b, h w, d) of h x w tokens (b, h w, d) at a level, branch by branch."""
        with self.using():
            text, table = self._prepare(len(tokens), sigma)
            parts = enumerate(split_parts(self.positions, tokens))
            outs = [self._one(part, text, table, h, part.shape[1] // h, i) for i, part in parts]
            return join_parts(outs)

    def _prepare(self, batch: int, sigma: float) -> tuple[Tensor, Tensor]:
        """The embedded texts, and the modulations of a level."""
        if batch != len(self.branches[0]):
            raise PlanError(f"latents for {batch} pictures met a condition for {len(self.branches[0])}")
        table = self.table(sigma)
        if self.text is None:
            self.text = self._embedded()
        return self.text, table

    def _one(self, packed: Tensor, text: Tensor, table: Tensor, h: int, w: int, part: int) -> Tensor:
        """The velocities (branches b, h w, d) of packed latents (b, h w, d), or of one part of them."""
        if (h, w, part) not in self.ropes:
            self.ropes.clear()  # the newest alone: those of many parts are large
            self.ropes[h, w, part] = self._rope(h, w, part)
        tokens = torch.stack([packed[i % len(packed)] for i in self.order])  # (items, tokens, channels)
        key: object = self.net.attention
        if not self.batched:
            tokens = tokens if self.padded else tokens.flatten(0, 1)[None]
            key = (h * w, self.lengths)
        out = self.step(tokens, text, *self.ropes[h, w, part], table, key=key).float()
        items = out.view(len(self.order), h * w, -1).unbind()
        return torch.stack([items[i] for i in self.back])

    def _embedded(self) -> Tensor:
        """The text streams, a batch or one behind the other."""
        if self.batched or self.padded:
            return self.net.embed_text(pad_sequence(list(self.items), batch_first=True))
        return self.net.embed_text(torch.cat(list(self.items))[None])

    def _rope(self, h: int, w: int, part: int) -> Rope:
        """Rotations of each text in turn, then of each image; of one text and image where they are a batch."""
        device = self.items[0].device
        whole = self.net.rope(self._positions(h, w, part))
        if self.batched or self.padded:
            return whole
        start = max(self.lengths)
        rows = [torch.arange(length, device=device) for length in self.lengths]
        rows += [torch.arange(start, start + h * w, device=device)] * len(self.lengths)
        pick = torch.cat(rows)
        return Rope(whole.cos[pick], whole.sin[pick])

    def _positions(self, h: int, w: int, part: int) -> Tensor:
        """Positions of the longest text, then of one image: a grid, or tokens at their places on one."""
        text, given, device = max(self.lengths), self.positions, self.items[0].device
        if given is None:
            return grid_positions(h, w, text, device=device)
        grid = grid_positions(given.height, given.width, text, device=device)
        at = given.part(part)
        image = grid[text].repeat(len(at), 1)  # the first cell, from which positions count
        image[:, 1:] += at.to(image)
        return torch.cat((grid[:text], image))

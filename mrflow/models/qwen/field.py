"""One integration of Qwen-Image: what does not change from step to step is made once."""

from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mrflow.models.fields import TransformerField
from mrflow.models.layers import Rope
from mrflow.models.qwen.transformer import QwenImage, packed_attention
from mrflow.models.qwen.transformer import positions_qwen as grid_positions


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


class QwenField(TransformerField[Rope]):
    """The field of Qwen-Image for every branch of a guidance, with texts of any lengths, in one pass.

    `branches` holds, for each branch, the states (tokens, width) of each item; velocities come branch by branch. Items
    whose texts are equally long are a batch; otherwise all lie in one sequence, and attention stays within each: no
    padding, no mask. Modulations depend on the level alone: one row serves all items. `padded` makes a batch of all
    items, in their order: texts are padded with zeros, the step is told lengths. `how` is for `TransformerField`.
    """

    def __init__(
        self,
        net: QwenImage,
        branches: Sequence[Sequence[Tensor]],
        *,
        padded: bool = False,
        **how: Any,  # noqa: ANN401
    ) -> None:
        super().__init__(len(branches[0]), device=branches[0][0].device, **how)
        self.net, self.padded = net, padded
        items = [item for branch in branches for item in branch]
        # Equal lengths side by side, so that attention may treat them as a batch.
        self.order = sorted(range(len(items)), key=lambda i: 0 if padded else len(items[i]))
        self.back = sorted(range(len(items)), key=lambda i: self.order[i])
        self.items = [items[i] for i in self.order]
        self.lengths = tuple(len(item) for item in self.items)

    @property
    def batched(self) -> bool:
        """Whether all texts are equally long."""
        return len(set(self.lengths)) == 1

    def embed(self) -> Tensor:
        """The text streams, a batch or one behind the other."""
        if self.batched or self.padded:
            return self.net.embed_text(pad_sequence(list(self.items), batch_first=True))
        return self.net.embed_text(torch.cat(list(self.items))[None])

    def ask(self, tokens: Tensor, text: Tensor, placed: Rope, table: Tensor, h: int, w: int) -> Tensor:
        """One step for all branches, (branches b, h w, d)."""
        every = torch.stack([tokens[i % len(tokens)] for i in self.order])  # (items, tokens, channels)
        key: object = self.net.attention
        if not self.batched:
            every = every if self.padded else every.flatten(0, 1)[None]
            key = (h * w, self.lengths)
        out = self.step(every, text, *placed, table, key=key).float()
        items = out.view(len(self.order), h * w, -1).unbind()
        return torch.stack([items[i] for i in self.back])

    def place(self, text: Tensor, h: int, w: int, part: int) -> Rope:
        """Rotations of each text in turn, then of each image; of one text and image where they are a batch."""
        whole = self.net.rope(self._positions(h, w, part))
        if self.batched or self.padded:
            return whole
        start = max(self.lengths)
        rows = [torch.arange(length, device=self.device) for length in self.lengths]
        rows += [torch.arange(start, start + h * w, device=self.device)] * len(self.lengths)
        pick = torch.cat(rows)
        return Rope(whole.cos[pick], whole.sin[pick])

    def _positions(self, h: int, w: int, part: int) -> Tensor:
        """Positions of the longest text, then of one image: a grid, or tokens at their places on one."""
        text, given, device = max(self.lengths), self.positions, self.device
        if given is None:
            return grid_positions(h, w, text, device=device)
        grid = grid_positions(given.height, given.width, text, device=device)
        at = given.part(part)
        image = grid[text].repeat(len(at), 1)  # the first cell, from which positions count
        image[:, 1:] += at.to(image)
        return torch.cat((grid[:text], image))

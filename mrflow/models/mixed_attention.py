"""Guidance inside attention: image tokens go on with a mix of what they see under two conditions. One hook for all."""

import copy
from collections.abc import Sequence
from functools import partial
from typing import cast

import torch
from torch import Tensor

from mrflow.backbone import Mix
from mrflow.models.block_runner import BlockRunner
from mrflow.models.blocks import DoubleStreamBlock, Transformer
from mrflow.models.layers import Attention, Rope
from mrflow.protocols.pieces import Pieces


class MixedStep:
    """A step over items of the first condition, then as many of the other, whose attention is mixed.

    The first half holds the image, the other follows it beside a text stream of its own. A `key` of (image tokens, text
    lengths) says that texts are padded.
    """

    def __init__(self, pieces: Pieces, *, mix: Mix) -> None:
        assert isinstance(pieces, BlockRunner)
        self.net, self.mix = pieces.net, mix

    def __call__(
        self, tokens: Tensor, text: Tensor, cos: Tensor, sin: Tensor, table: Tensor, /, *, key: object = None
    ) -> Tensor:
        """Velocities of the image tokens; those of the first half are meant."""
        lengths = cast("tuple[int, Sequence[int]]", key)[1] if isinstance(key, tuple) else ()
        net = with_attention(
            self.net,
            partial(_mixed, attend=self.net.attention, mix=self.mix, image=tokens.shape[1], lengths=lengths),
        )
        table = one_image(net, table)
        img, _ = net.some_blocks(net.embed_image(tokens), text, Rope(cos, sin), table, 0, len(net.stack()))
        return net.head(img, table)


def one_image(net: Transformer, table: Tensor) -> Tensor:
    """Modulations that in two-stream blocks are the first half's for both halves' images, as in NAG's published code.

    Text is modulated by its own condition, and so is all in one-stream blocks. A table of one row serves all.
    """
    if len(table) == 1:
        return table
    rows, out = len(table) // 2, table.clone()
    for i in range(sum(isinstance(block, DoubleStreamBlock) for block in net.stack())):
        out[rows:, 12 * i : 12 * i + 6] = table[:rows, 12 * i : 12 * i + 6]
    return out


def with_attention(net: Transformer, attend: Attention) -> Transformer:
    """The same network, of the same blocks and weights, whose blocks call another attention."""
    other = copy.copy(net)
    other.attention = attend
    return other


def _mixed(
    q: Tensor, k: Tensor, v: Tensor, *, attend: Attention, mix: Mix, image: int, lengths: Sequence[int]
) -> Tensor:
    """Attention (2 b, heads, n, d), whose last `image` tokens of both halves are `mix` of their two outputs.

    `lengths` are those of each item's text at the beginning of the sequence, where texts are padded; nobody looks at
    the padding. Sequences of the image alone, as Z-Image has them, are shorter than the longest text and the image.
    """
    out = in_lengths(q, k, v, attend=attend, image=image, lengths=lengths)
    first, other = out[:, :, out.shape[2] - image :].chunk(2)
    one = mix(first, other)
    return torch.cat((out[:, :, : out.shape[2] - image], torch.cat((one, one))), 2)


def in_lengths(q: Tensor, k: Tensor, v: Tensor, *, attend: Attention, image: int, lengths: Sequence[int]) -> Tensor:
    """Attention to all keys but the padding of texts, for items of one length at a time."""
    longest, n = max(lengths, default=0), k.shape[2]
    if not lengths or n < longest + image:
        return attend(q, k, v)
    out = torch.empty_like(q)
    for length in sorted(set(lengths)):
        rows = [i for i, own in enumerate(lengths) if own == length]
        keep = torch.cat((torch.arange(length), torch.arange(longest, n))).to(k.device)
        out[rows] = attend(q[rows], k[rows][:, :, keep], v[rows][:, :, keep])
    return out

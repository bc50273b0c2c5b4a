"""A transformer's evaluation taken apart, for caches: they decide between the pieces which of them to run."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from mrflow.models.blocks import Transformer
from mrflow.models.cuda_graphs import CudaGraph, GraphPool
from mrflow.models.layers import Merge, Rope


class BlockRunner:
    """The pieces of one network, the same bits as the whole. With `graphs`, runs of blocks are replayed as CUDA graphs.

    One object serves all fields of a model, so that a graph is recorded once for its blocks and shapes.
    """

    def __init__(self, net: Transformer, *, graphs: GraphPool | None = None) -> None:
        self.net, self.graphs = net, graphs
        self.recorded: dict[tuple[int, int], CudaGraph] = {}

    @property
    def count(self) -> int:
        """Blocks of all kinds."""
        return len(self.net.stack())

    def embed(self, tokens: Tensor) -> Tensor:
        """The image stream."""
        return self.net.embed_image(tokens)

    def modulated_input(self, img: Tensor, table: Tensor) -> Tensor:
        """What the first block's image stream begins with: the modulated norm."""
        return self.net.modulated_input(img, table)

    def run(
        self, img: Tensor, txt: Tensor, cos: Tensor, sin: Tensor, table: Tensor, start: int, stop: int
    ) -> tuple[Tensor, Tensor]:
        """Both streams after the blocks from `start` to before `stop`."""
        if start >= stop:
            return img, txt
        if self.graphs is None:
            return self.net.some_blocks(img, txt, Rope(cos, sin), table, start, stop)
        graph = self.recorded.setdefault((start, stop), CudaGraph(partial(joint, self.net, start, stop), self.graphs))
        both = graph(img, txt, cos, sin, table, key=self.net.attention)
        return both[:, : img.shape[1]], both[:, img.shape[1] :]

    def merged(
        self,
        img: Tensor,
        txt: Tensor,
        cos: Tensor,
        sin: Tensor,
        table: Tensor,
        merge: Callable[[str, int], Merge | None],
    ) -> tuple[Tensor, Tensor]:
        """Both streams after all blocks, of which the n-th of a kind merges image tokens as `merge` says."""
        return self.net.some_blocks(img, txt, Rope(cos, sin), table, 0, self.count, merge=merge)

    def head(self, img: Tensor, table: Tensor) -> Tensor:
        """The velocity's tokens."""
        return self.net.head(img, table)


def joint(
    net: Transformer,
    start: int,
    stop: int,
    img: Tensor,
    txt: Tensor,
    cos: Tensor,
    sin: Tensor,
    table: Tensor,
    *,
    key: object = None,
) -> Tensor:
    """Some blocks as a function of tensors that gives one: image, then text. The `key` is the net's attention."""
    return torch.cat(net.some_blocks(img, txt, Rope(cos, sin), table, start, stop), 1)

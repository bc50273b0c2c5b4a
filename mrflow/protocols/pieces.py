"""A transformer's evaluation taken apart, as caches see it: its pieces, and the step that is made of them."""

from collections.abc import Callable
from typing import Protocol, runtime_checkable

from torch import Tensor


@runtime_checkable
class Pieces(Protocol):
    """A transformer's evaluation taken apart. Streams are (items, tokens, width); `table` holds the modulations."""

    @property
    def count(self) -> int:
        """Blocks."""
        ...

    def embed(self, tokens: Tensor) -> Tensor:
        """The image stream of packed latents."""
        ...

    def modulated_input(self, img: Tensor, table: Tensor) -> Tensor:
        """The embedded image as the first block's modulated norm sees it."""
        ...

    def run(
        self, img: Tensor, txt: Tensor, cos: Tensor, sin: Tensor, table: Tensor, start: int, stop: int
    ) -> tuple[Tensor, Tensor]:
        """Both streams after the blocks from `start` to before `stop`."""
        ...

    def head(self, img: Tensor, table: Tensor) -> Tensor:
        """The velocity's tokens."""
        ...


@runtime_checkable
class TransformerStep(Protocol):
    """Image tokens, the text stream, rotations and modulations to the velocity's tokens."""

    def __call__(
        self, tokens: Tensor, text: Tensor, cos: Tensor, sin: Tensor, table: Tensor, /, *, key: object = None
    ) -> Tensor:
        """`key` tells apart what shapes do not, for what is recorded per shape."""
        ...


StepFactory = Callable[[Pieces], TransformerStep]
"""Given a network's pieces, the step to take in the network's own place; it may remember what it likes."""

"""What the integrations of all transformers share: the step itself, and modulations that are made once."""

from collections.abc import Callable, Sequence

from torch import Tensor

from mrflow.models.blocks import Transformer
from mrflow.models.layers import Rope


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

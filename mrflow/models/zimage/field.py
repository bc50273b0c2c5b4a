"""One integration of Z-Image: what does not change from step to step is made once."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

from einops import rearrange
from torch import Tensor

from mrflow.backbone import Positions, in_parts
from mrflow.models.fields import ModulationTables
from mrflow.models.layers import Rope
from mrflow.models.zimage.transformer import ZImage, filling
from mrflow.models.zimage.transformer import positions as grid_positions
from mrflow.pieces import Step


class ZImageField:
    """The velocity (x, sigma) -> d x / d sigma for texts that fill up to one length.

    Refined text and rotations are made at the first call and die with the field. `table` gives the modulations of a
    level, which serve all items. `using` is entered while the network works, so that its weights can be brought where
    they are needed. `positions` says where tokens lie that are no grid.
    """

    def __init__(
        self,
        net: ZImage,
        texts: Sequence[Tensor],
        *,
        step: Step,
        table: ModulationTables,
        using: Callable[[], AbstractContextManager[None]] = nullcontext,
        positions: Positions | None = None,
    ) -> None:
        self.net, self.texts, self.step, self.table, self.using = net, texts, step, table, using
        self.positions = positions
        self.refined: Tensor | None = None
        self.fixed: dict[tuple[int, int, int], tuple[Tensor, Rope]] = {}

    def __call__(self, x: Tensor, sigma: float) -> Tensor:
        """Latents (b, c, h, w) at a level to their velocity, float32."""
        with self.using():
            table = self.table(sigma)
            if self.refined is None:
                self.refined = self.net.embed_text(self.texts)
            refined = self.refined
            return in_parts(self.positions, lambda part, index: self._one(part, refined, table, index), x)

    def _one(self, x: Tensor, refined: Tensor, table: Tensor, part: int) -> Tensor:
        h, w = x.shape[2] // 2, x.shape[3] // 2
        if (h, w, part) not in self.fixed:
            places = grid_positions(h, w, refined.shape[1], device=x.device)
            if self.positions is not None:
                places[len(places) - h * w :, 1:] = self.positions.part(part).to(places)
            self.fixed.clear()  # the newest alone: those of many parts are large
            self.fixed[h, w, part] = self.net.filled(refined, h * w), self.net.rope(places)
        text, rope = self.fixed[h, w, part]
        tokens = rearrange(x, "b c (h p) (w q) -> b (h w) (p q c)", p=2, q=2)
        out = self.step(tokens, text, *rope, table, key=self.net.attention).float()
        return rearrange(out, "b (h w) (p q c) -> b c (h p) (w q)", h=h, w=w, p=2, q=2)


def alike(texts: Sequence[Tensor]) -> list[list[int]]:
    """Which items' texts fill up to one length, shortest first."""
    lengths = [len(text) + filling(len(text)) for text in texts]
    return [[i for i, own in enumerate(lengths) if own == length] for length in sorted(set(lengths))]

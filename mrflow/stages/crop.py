"""Pixels to fewer pixels, cut off at the edges."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from mrflow._checks import check_whole
from mrflow.model_info import ModelInfo
from mrflow.spec import Pixels, State
from mrflow.stage import Context, Stage


@dataclass(frozen=True)
class Crop(Stage[Pixels, Pixels]):
    """The middle of a picture, `height` x `width` pixels of it."""

    scope: ClassVar[str] = "Crop"
    height: int
    width: int

    def plan(self, spec: Pixels, model: ModelInfo) -> Pixels:
        """Pixels of that size."""
        for name, side, have in (("height", self.height, spec.height), ("width", self.width, spec.width)):
            check_whole(name, side, 1, have, wanted=f"a whole number of pixels from 1 to the picture's {have}")
        return Pixels(spec.batch, self.height, self.width)

    def apply(self, state: State[Pixels], out: Pixels, ctx: Context) -> Tensor:
        """Cut."""
        top, left = (state.spec.height - self.height) // 2, (state.spec.width - self.width) // 2
        return state.data[:, :, top : top + self.height, left : left + self.width].contiguous()

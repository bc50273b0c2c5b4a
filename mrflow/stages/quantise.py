"""Pixels to 8 bits and back: the step between stages that the published scripts take, for those who want it."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from mrflow.model_info import ModelInfo
from mrflow.spec import Pixels, State
from mrflow.stage import Context, Stage
from mrflow.upscalers.composite import quantise


@dataclass(frozen=True)
class Quantise(Stage[Pixels, Pixels]):
    """Round pixels to the 256 levels of an 8-bit picture; `truncate` rounds down, as the published SR step does."""

    scope: ClassVar[str] = "Quantise"
    truncate: bool = False

    def plan(self, spec: Pixels, model: ModelInfo) -> Pixels:
        """The same facts."""
        return spec

    def apply(self, state: State[Pixels], out: Pixels, ctx: Context) -> Tensor:
        """floor(255 x) / 255 or round(255 x) / 255."""
        return quantise(state.data, truncate=self.truncate)

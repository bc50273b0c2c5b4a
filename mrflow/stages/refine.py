"""Noisy latents to clean ones: the refinement stage."""

from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from mrflow.errors import PlanError
from mrflow.guidance import Guidance
from mrflow.model_info import ModelInfo
from mrflow.schedules import DirectSigma, Schedule, Sigmas
from mrflow.spec import Latents, State
from mrflow.stage import Context
from mrflow.stages.decode import check_space
from mrflow.stages.integrating import Integrating
from mrflow.stages.tiles import InTiles, Tiles, check_tiles


@dataclass(frozen=True)
class Refine(Integrating[Latents]):
    """Integrate the flow from the level the latents hold down to 0. The level is said once, by what came before.

    It ends at 0, but for a `Part` of a schedule. `tiles=Tiles(1024, 256)` works in overlapping tiles of so many pixels:
    for pictures larger than the model knows, or than memory holds. For the other settings see `Integrating`.
    """

    scope: ClassVar[str] = "Refine"
    schedule: Schedule = DirectSigma(1)
    tiles: Tiles | None = field(default=None, kw_only=True)

    def begin(self, spec: Latents, model: ModelInfo) -> Latents:
        """The latents that are given; refuses clean ones."""
        check_space(spec, model)
        if spec.sigma == 0:
            raise PlanError("latents are already clean (sigma 0); put Reinject(sigma=...) before Refine()")
        return spec

    def sigmas(self, begin: Latents, model: ModelInfo) -> Sigmas:
        """From the level of the latents."""
        return self.schedule(begin.sigma, begin.tokens, model)

    def apply(self, state: State[Latents], out: Latents, ctx: Context) -> Tensor:
        """Integrate."""
        return self.integrate(state.data, out, ctx)

    def check_settings(self, model: ModelInfo) -> None:
        """As for all stages that integrate; tiles need a model whose tokens may lie anywhere."""
        super().check_settings(model)
        if self.tiles is not None:
            check_tiles(self.tiles, model, cache=self.cache, policy=self.policy)

    def guidance_for(self, out: Latents, model: ModelInfo) -> Guidance:
        """The guidance, in tiles where there are several."""
        guidance = super().guidance_for(out, model)
        if self.tiles is None or len((layout := self.tiles.layout(out)).begins) == 1:
            return guidance
        return InTiles(guidance, layout)

    def per_forward(self, out: Latents) -> tuple[Latents, int]:
        """A tile and their number, or all."""
        if self.tiles is None:
            return out, 1
        layout = self.tiles.layout(out)
        return layout.tile(out), len(layout.begins)

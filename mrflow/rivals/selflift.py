"""Clean latents to more latents, over latents and over pixels, mixed where the two disagree."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import interpolate

from mrflow._checks import is_number, require
from mrflow.cost import decode_flops, encode_flops
from mrflow.errors import PlanError
from mrflow.model_info import ModelInfo
from mrflow.spec import Latents, State
from mrflow.stage import Context, Stage, Work
from mrflow.stages.decode import check_space
from mrflow.stages.lift import lifted_spec


@dataclass(frozen=True)
class SelfLift(Stage[Latents, Latents]):
    """SelfLift-zero's lift (arXiv 2609.02036): z_lat + w (z_pix - z_lat), training-free and without an SR network.

    z_lat is the nearest-neighbour lift of the latents; z_pix their decoded picture, enlarged bicubically and encoded
    (the posterior's mode). Where they disagree most, in the `share` of cells with the largest mean |z_pix - z_lat| over
    channels, w rises from `low` to `high` with the disagreement; elsewhere w is 0.

    `size` is a picture size, (height, width) in pixels (default: twice the sides). Published shares: 0.4 for FLUX.2
    Klein, 0.3 for Z-Image-Turbo; a larger `low` is recommended for text.
    """

    scope: ClassVar[str] = "SelfLift"
    size: tuple[int, int] | None = None
    share: float = 0.4
    low: float = 0.5
    high: float = 1.0

    def __post_init__(self) -> None:
        require(is_number(self.share) and 0 < self.share <= 1, "share", "above 0 and at most 1", self.share)
        if not 0 <= self.low <= self.high <= 1:
            raise PlanError(f"weights must be in 0 <= low <= high <= 1, got {self.low!r} and {self.high!r}")

    def plan(self, spec: Latents, model: ModelInfo) -> Latents:
        """Clean latents of `size`."""
        check_space(spec, model)
        if spec.sigma > 0:
            raise PlanError(
                f"latents hold noise (sigma {spec.sigma:g}), and SelfLift takes a clean estimate: end the schedule "
                "before it with Part(..., clean=True)"
            )
        return lifted_spec(spec, self.size, model)

    def work(self, spec: Latents, out: Latents, model: ModelInfo) -> Work:
        """The decoder small, the encoder large."""
        per = model.space.downscale
        small, large = (per * spec.height, per * spec.width), (per * out.height, per * out.width)
        return Work(flops=spec.batch * (decode_flops(model, *small) + encode_flops(model, *large)))

    def apply(self, state: State[Latents], out: Latents, ctx: Context) -> Tensor:
        """Lift both ways and mix."""
        per = ctx.model.info.space.downscale
        lifted = interpolate(state.data, size=(out.height, out.width), mode="nearest-exact")
        pixels = ctx.model.decode(state.data)
        large = interpolate(pixels, size=(per * out.height, per * out.width), mode="bicubic", align_corners=False)
        return mix(lifted, ctx.model.encode(large.clamp(0, 1)), share=self.share, low=self.low, high=self.high)


def mix(
    lat: Float[Tensor, "b c h w"], pix: Float[Tensor, "b c h w"], *, share: float, low: float, high: float
) -> Float[Tensor, "b c h w"]:
    """lat + w (pix - lat), with w above 0 in the `share` of cells of each item where they disagree most.

    w rises from `low` to `high` with the disagreement; where all chosen cells disagree alike, as one cell does, it is
    `high`.
    """
    difference = pix - lat
    score = difference.abs().mean(1).flatten(1)  # (b, cells)
    count = max(1, round(share * score.shape[1]))
    top, where = score.topk(count, 1)
    least, most = top.min(1, keepdim=True).values, top.max(1, keepdim=True).values
    rise = torch.where(most > least, (top - least) / (most - least).clamp(min=1e-12), 1.0)
    weight = score.new_zeros(score.shape).scatter(1, where, low + (high - low) * rise)
    return lat + weight.view(len(lat), 1, *lat.shape[-2:]) * difference

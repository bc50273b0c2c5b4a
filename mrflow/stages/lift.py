"""Latents to more latents, without pixels."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor
from torch.nn.functional import interpolate

from mrflow.errors import PlanError
from mrflow.spec import Latents, ModelInfo, State, check_size
from mrflow.stage import Stage
from mrflow.upscalers.interpolate import Filter, check_filter

if TYPE_CHECKING:
    from mrflow.stage import Context


@dataclass(frozen=True)
class Lift(Stage[Latents, Latents]):
    """Clean latents interpolated to a picture size, (height, width) in pixels; twice the sides unless said.

    The baseline that needs neither autoencoder nor network. What it gives is no picture's latents: the autoencoder's
    round trip changes it many times more than it changes encoded pixels (`metrics.round_trip_energy`).
    """

    scope: ClassVar[str] = "Lift"
    size: tuple[int, int] | None = None
    filter: Filter = "bicubic"

    def __post_init__(self) -> None:
        check_filter(self.filter)

    def plan(self, spec: Latents, model: ModelInfo) -> Latents:
        """Latents of `size`, of the same noise level 0."""
        if spec.sigma > 0:
            raise PlanError(
                f"latents hold noise (sigma {spec.sigma:g}), and Lift takes clean ones: put Refine() before it"
            )
        return risen(spec, self.size, model)

    def apply(self, state: State[Latents], out: Latents, ctx: "Context") -> Tensor:
        """Interpolate."""
        size = (out.height, out.width)
        if self.filter == "nearest":
            return interpolate(state.data, size=size, mode="nearest-exact")
        return interpolate(state.data, size=size, mode=self.filter, align_corners=False)


def risen(spec: Latents, size: tuple[int, int] | None, model: ModelInfo) -> Latents:
    """Clean latents of a picture size, (height, width) in pixels; of twice the sides where none is said.

    Raises:
        PlanError: the model cannot make that size, or it is no rise from `spec`.
    """
    per = model.space.downscale
    height, width = size or (2 * per * spec.height, 2 * per * spec.width)
    check_size(height, width, model.space)
    check_rise((per * spec.height, per * spec.width), (height, width), model)
    return Latents(spec.batch, height // per, width // per, spec.space)


def check_rise(low: tuple[int, int], high: tuple[int, int], model: ModelInfo) -> None:
    """Refuse a larger size that is smaller, or of another aspect, and offer the nearest that would do.

    Raises:
        PlanError: `high` is below `low`, or its sides have another ratio.
    """
    (h, w), (height, width) = low, high
    if height < h or width < w:
        raise PlanError(f"{height}x{width} is smaller than what comes in ({h}x{w})")
    if height * w != width * h:
        near = nearest_rise(low, high, model.space.multiple)
        raise PlanError(f"{height}x{width} has another aspect than {h}x{w}; {near[0]}x{near[1]} would keep it")


def nearest_rise(low: tuple[int, int], high: tuple[int, int], multiple: int) -> tuple[int, int]:
    """The size nearest to `high` that has the aspect of `low`, and sides that are whole multiples."""
    from math import gcd, lcm

    common = gcd(*low)
    h, w = low[0] // common, low[1] // common
    step = lcm(multiple // gcd(multiple, h), multiple // gcd(multiple, w))
    count = max(1, round((high[0] / h + high[1] / w) / 2 / step))
    while count * step < common:
        count += 1
    return count * step * h, count * step * w

"""Latents to more latents, without pixels."""

from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor
from torch.nn.functional import interpolate

from mrflow._checks import check_sides
from mrflow.errors import PlanError
from mrflow.model_info import ModelInfo
from mrflow.protocols.upscaler import LatentUpscaler, apply_upscaler, passes_to, scale_of
from mrflow.spec import Latents, State, check_size
from mrflow.stage import Context, Stage, Work
from mrflow.stages.decode import check_known
from mrflow.upscalers.interpolate import Filter, check_filter


class Sized:
    """A stage to a `size` in pixels: a pair, or one number for a square."""

    size: tuple[int, int] | None

    def __post_init__(self) -> None:
        if self.size is not None:
            object.__setattr__(self, "size", check_sides("size", self.size))


@dataclass(frozen=True)
class Lift(Sized, Stage[Latents, Latents]):
    """Clean latents interpolated to a picture size, (height, width) in pixels (default: twice the sides).

    The baseline that needs neither autoencoder nor network. What it gives is no picture's latents: the autoencoder's
    round trip changes it many times more than it changes encoded pixels (`metrics.round_trip_energy`). An `upscaler`
    that was trained on such latents is run instead, as often as it takes to reach the size (default: once); `filter`
    then takes off what is too much.
    """

    scope: ClassVar[str] = "Lift"
    size: tuple[int, int] | None = None
    filter: Filter = "bicubic"
    upscaler: LatentUpscaler | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        check_filter(self.filter)
        super().__post_init__()

    def plan(self, spec: Latents, model: ModelInfo) -> Latents:
        """Latents of `size`, of the same noise level 0.

        Raises:
            PlanError: they hold noise, the size is none to rise to, or the upscaler knows other latents.
        """
        if spec.sigma > 0:
            raise PlanError(
                f"latents hold noise (sigma {spec.sigma:g}), and Lift takes clean ones: put Refine() before it"
            )
        if self.upscaler is None:
            return lifted_spec(spec, self.size, model)
        scale = scale_of(self.upscaler, LatentUpscaler)
        check_known(self.upscaler.space, spec, type(self.upscaler).__name__)
        channels = self.upscaler.channels
        if channels not in (None, spec.space.channels):
            raise PlanError(
                f"{type(self.upscaler).__name__} enlarges latents of {channels} channels; {model.name}'s have "
                f"{spec.space.channels}"
            )
        per = model.space.downscale * scale
        out = lifted_spec(spec, self.size or (per * spec.height, per * spec.width), model)
        passes_to((out.height, out.width), spec.height, spec.width, scale)
        return out

    def work(self, spec: Latents, out: Latents, model: ModelInfo) -> Work:
        """The upscaler's arithmetic, where it tells."""
        if (net := self.upscaler) is None:
            return Work()
        passes = passes_to((out.height, out.width), spec.height, spec.width, net.scale)
        cells = sum(spec.height * spec.width * net.scale ** (2 * i) for i in range(passes))
        return Work(flops=spec.batch * cells * net.flops_per_cell)

    def apply(self, state: State[Latents], out: Latents, ctx: Context) -> Tensor:
        """Enlarge."""
        x, size = state.data, (out.height, out.width)
        if self.upscaler is not None:
            for _ in range(passes_to(size, x.shape[-2], x.shape[-1], self.upscaler.scale)):
                x = apply_upscaler(self.upscaler, x)
        if tuple(x.shape[-2:]) == size:
            return x
        if self.filter == "nearest":
            return interpolate(x, size=size, mode="nearest-exact")
        return interpolate(x, size=size, mode=self.filter, align_corners=False, antialias=self.upscaler is not None)


def lifted_spec(spec: Latents, size: tuple[int, int] | None, model: ModelInfo) -> Latents:
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

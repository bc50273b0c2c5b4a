"""Noise to latents over three grids: coarse, then finer where there are edges, then fine (RALU)."""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from mrflow._checks import is_number, require
from mrflow.cost import decode_flops
from mrflow.errors import PlanError
from mrflow.guidance import own_guidance
from mrflow.model_info import ModelInfo
from mrflow.protocols.tokens import pack, unpack
from mrflow.rivals.shared import GrowingTokens, at_places
from mrflow.schedules import Sigmas, shift_static
from mrflow.solvers import Euler, Step
from mrflow.spec import Latents, Start, State
from mrflow.stage import Context, Work

Three = tuple[float, float, float]


@dataclass(frozen=True)
class SampleRegions(GrowingTokens):
    """Region-adaptive latent upsampling, RALU (arXiv 2507.08422): the coarse grid grows first where the edges are.

    In data time t = 1 - sigma, stage i takes `steps[i]` Euler steps to `ends[i]` (the last one to 1) on a grid bent by
    the static shift `shifts[i]`. Between stages each chosen token is replaced by four copies. Copies share their noise,
    so the time falls back to s = e / (z (1 - e) + e) and noise of covariance I - J / z^2 within each four (J all ones)
    makes the sum white again: the state is on the flow's line at s, with signal s and noise variance (1 - s)^2. The
    tokens that were not copied get independent noise to the same variance. After the first stage the `share` of tokens
    with the strongest edges is copied, after the second the rest.

    Edges are Sobel magnitudes of the decoded clean estimate's luminance, summed over each token's pixels; the published
    code uses Canny and needs OpenCV for it. Its noise variance is about 2.5 % too large where tokens are not copied;
    here it is exact. The default is the published "4x" setting, `RALU_7X` the faster one; `fit_shifts` makes others.
    """

    scope: ClassVar[str] = "SampleRegions"
    steps: tuple[int, int, int] = (5, 6, 7)
    ends: tuple[float, float] = (0.3, 0.45)
    shifts: Three = (5.019, 2.589, 2.226)
    z: float = 6.317
    share: float = 0.3

    def __post_init__(self) -> None:
        super().__post_init__()
        right = len(self.ends) == 2 and 0 < self.ends[0] < self.ends[1] < 1
        require(right, "ends", "two rising times between 0 and 1", self.ends)
        right = len(self.shifts) == 3 and all(is_number(h) and h > 0 for h in self.shifts)
        require(right, "shifts", "three factors above 0", self.shifts)
        if not is_number(self.z, 2):
            raise PlanError(f"z must be at least 2, got {self.z!r}: below, no noise makes four copies white")
        require(is_number(self.share) and 0 < self.share < 1, "share", "between 0 and 1", self.share)

    def sigmas(self, model: ModelInfo) -> tuple[Sigmas, Sigmas, Sigmas]:
        """The noise levels of each stage."""
        starts = (0.0, *(restart(e, self.z) for e in self.ends))
        one, two, three = (
            shift_steps(n, s, e, h)
            for n, s, e, h in zip(self.steps, starts, (*self.ends, 1.0), self.shifts, strict=True)
        )
        return one, two, three

    def chosen(self, coarse: int) -> int:
        """How many of the coarse tokens are copied first."""
        return max(1, math.floor(coarse * self.share))

    def work(self, spec: Start, out: Latents, model: ModelInfo) -> Work:
        """Forwards on each grid, and one decoding of the small picture."""
        decoding = Work(flops=spec.batch * decode_flops(model, self.height // 2, self.width // 2))
        return super().work(spec, out, model) + decoding

    def apply(self, state: State[Start], out: Latents, ctx: Context) -> Tensor:
        """Three integrations and two transitions."""
        guidance, patch = self.guidance or own_guidance(ctx.model.info), out.space.patch
        first, second, third = self.sigmas(ctx.model.info)
        h, w = out.height // (2 * patch), out.width // (2 * patch)  # coarse tokens
        last: list[Step] = []
        x = ctx.noise(out.shape, source=self.noise)[..., ::2, ::2].contiguous()
        x = ctx.integrate(Euler(), guidance, x, first, watch=last.append)
        order = edge_order(ctx.model.decode(last[-1].denoised), h, w)
        count = self.chosen(h * w)
        fine, rest = order[:, :count].sort(1).values, order[:, count:].sort(1).values

        tokens, width = pack(x, patch=patch), x.shape[1] * patch**2
        kept, copied = take(tokens, rest), take(tokens, fine)
        noise = ctx.noise((len(x), rest.shape[1] + 4 * count, width), source=self.noise, draw=1)
        mixed = renew(kept, copied, noise, self.ends[0], self.z)
        mixed = at_places(ctx, guidance, mixed, second, places_of(rest, fine, h, w), h, w, patch)

        kept, copied = mixed[:, rest.shape[1] :], mixed[:, : rest.shape[1]]
        noise = ctx.noise((len(x), 4 * h * w, width), source=self.noise, draw=2)
        both = renew(kept, copied, noise, self.ends[1], self.z)
        grid = both.new_empty((len(x), 4 * h * w, width))
        cells = torch.cat((children(fine, w), children(rest, w)), 1)
        grid.scatter_(1, cells[..., None].expand(-1, -1, width), both)
        return ctx.integrate(Euler(), guidance, unpack(grid, 2 * h, 2 * w, patch=patch), third)


Setting = tuple[tuple[int, int, int], tuple[float, float], Three, float, float]
RALU_4X: Setting = (5, 6, 7), (0.3, 0.45), (5.019, 2.589, 2.226), 6.317, 0.3
RALU_7X: Setting = (2, 3, 5), (0.2, 0.3), (8.141, 2.856, 2.193), 6.261, 0.1
"""The published settings: `SampleRegions(1024, 1024, *RALU_7X)`."""


def restart(end: float, z: float) -> float:
    """The data time at which a stage begins after copies at the time `end`: e / (z (1 - e) + e)."""
    return end / (z * (1 - end) + end)


def shift_steps(steps: int, start: float, end: float, factor: float) -> Sigmas:
    """Noise levels from data time `start` to `end`: even steps before the static shift by `factor`."""
    a, b = (shift_static(1 - t, 1 / factor) for t in (start, end))
    inner = (shift_static(a + (b - a) * i / steps, factor) for i in range(1, steps))
    return (1 - start, *inner, 1 - end)


def renew(
    kept: Float[Tensor, "b k d"],
    copied: Float[Tensor, "b m d"],
    noise: Float[Tensor, "b n d"],
    end: float,
    z: float,
) -> Float[Tensor, "b n d"]:
    """Tokens at data time `end`, with four copies of each in `copied`, at the restart's time; n = k + 4 m.

    Copies: s/e x + (1 - s) n', n' = g - (1 - sqrt(1 - 4 / z^2)) mean4(g), whose covariance is I - J / z^2. Kept tokens:
    s/e x + (1 - s) sqrt(1 - 1 / z^2) g.
    """
    s = restart(end, z)
    alone, groups = noise[:, : kept.shape[1]], rearrange(noise[:, kept.shape[1] :], "b (m k) d -> b m k d", k=4)
    groups = groups - (1 - math.sqrt(1 - 4 / z**2)) * groups.mean(2, keepdim=True)
    one = s / end * kept + (1 - s) * math.sqrt(1 - 1 / z**2) * alone
    four = s / end * copied[:, :, None] + (1 - s) * groups
    return torch.cat((one, four.flatten(1, 2)), 1)


def take(tokens: Float[Tensor, "b l d"], which: Int[Tensor, "b n"]) -> Float[Tensor, "b n d"]:
    """Some tokens of each item."""
    return tokens.gather(1, which[..., None].expand(-1, -1, tokens.shape[-1]))


def children(which: Int[Tensor, "b n"], width: int) -> Int[Tensor, "b m"]:
    """The four fine cells of each coarse cell, on a grid that is `width` coarse cells wide; m = 4 n."""
    row, column = 2 * (which // width), 2 * (which % width)
    cells = [(row + i) * 2 * width + column + j for i in (0, 1) for j in (0, 1)]
    return torch.stack(cells, 2).flatten(1)


def places_of(rest: Int[Tensor, "b k"], fine: Int[Tensor, "b m"], h: int, w: int) -> Float[Tensor, "b n 2"]:
    """Coarse positions: of the tokens that stay, then of four for each that was copied, half a cell apart."""
    cells = children(fine, w)
    halves = torch.stack((cells // (2 * w), cells % (2 * w)), -1) / 2
    return torch.cat((torch.stack((rest // w, rest % w), -1).float(), halves), 1)


def edge_order(pixels: Float[Tensor, "b 3 y x"], h: int, w: int) -> Int[Tensor, "b n"]:
    """The cells of an h x w grid, those with the strongest edges first: Sobel magnitudes of the luminance, summed."""
    weights = pixels.new_tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)
    grey = (pixels * weights).sum(1, keepdim=True)
    kernel = pixels.new_tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]])
    slopes = F.conv2d(F.pad(grey, (1, 1, 1, 1), mode="replicate"), torch.stack((kernel, kernel.T))[:, None])
    strength = F.adaptive_avg_pool2d(slopes.square().sum(1, keepdim=True).sqrt(), (h, w)).flatten(1)
    return strength.sort(dim=1, descending=True, stable=True).indices


def distance(steps: tuple[int, int, int], ends: tuple[float, float], shifts: Three, z: float, *, shift: float) -> float:
    """How far a setting's steps are from where native sampling, with its static shift, would spend them.

    RALU's NT-DM: the square root of the Jensen-Shannon divergence between two densities over data time: the native one,
    with the repeated stretches added, and the one of the stages.
    """
    t = np.linspace(0, 1, 1000)
    starts, stops = (0.0, *(restart(e, z) for e in ends)), (*ends, 1.0)

    def density(h: float, s: float, e: float) -> NDArray[np.float64]:
        inside = np.where((t >= s) & (t <= e), h / (1 + (h - 1) * t) ** 2, 0.0)
        out: NDArray[np.float64] = inside / max(inside.sum(), 1e-12)
        return out

    repeats = [(e - s, density(shift, s, e)) for s, e in zip(starts[1:], ends, strict=True)]
    target = density(shift, 0, 1) + sum((length * part for length, part in repeats), np.zeros_like(t))
    target = target / target.sum()
    found = sum(
        (n * density(h, s, e) for n, h, s, e in zip(steps, shifts, starts, stops, strict=True)), np.zeros_like(t)
    )
    found = found / found.sum()
    middle = (target + found) / 2

    def towards(p: NDArray[np.float64]) -> float:
        here = p > 0
        return float((p[here] * np.log(p[here] / middle[here])).sum())

    return math.sqrt(max(0.0, (towards(target) + towards(found)) / 2))


@lru_cache(maxsize=32)
def fit_shifts(
    steps: tuple[int, int, int], ends: tuple[float, float] = (0.3, 0.45), *, shift: float = 3.0
) -> tuple[Three, float]:
    """Shifts and z for other step counts: those with the least `distance`, found by a pattern search from (3, 3, 3), 3.

    The distance is flat near its minimum, so the numbers mean little by themselves.
    """
    point = [3.0, 3.0, 3.0, 3.0]
    bounds = [(0.5, 10.0)] * 3 + [(2.0, 100.0)]

    def value(p: list[float]) -> float:
        return distance(steps, ends, (p[0], p[1], p[2]), p[3], shift=shift)

    best, reach = value(point), 1.0
    while reach > 0.01:
        improved = False
        for axis, (least, most) in enumerate(bounds):
            for way in (1 + reach, 1 / (1 + reach)):
                trial = [*point]
                trial[axis] = min(most, max(least, trial[axis] * way))
                if (got := value(trial)) < best - 1e-9:
                    point, best, improved = trial, got, True
        if not improved:
            reach /= 2
    return (point[0], point[1], point[2]), point[3]

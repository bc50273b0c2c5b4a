"""Noise to latents where only some tokens go through the network at first (JiT)."""

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from mrflow._checks import is_number, require
from mrflow.backbone import Backbone, Condition, FieldOptions, Positions
from mrflow.flow import Velocity
from mrflow.guidance import Guidance, own_guidance
from mrflow.model_info import ModelInfo
from mrflow.protocols.tokens import pack, unpack
from mrflow.rivals.shared import ThreeStages, shared_out
from mrflow.schedules import Beta, Schedule, Sigmas
from mrflow.solvers import Euler, Step
from mrflow.spec import Latents, Start, State
from mrflow.stage import Context

SOFT = 0.4  # of the mean distance between anchors: the standard deviation of the blur, at least one token
CHUNK = 256  # tokens at once, in the search for the nearest anchors


@dataclass(frozen=True)
class SampleAnchors(ThreeStages):
    """Just-in-Time (arXiv 2603.10744): few anchor tokens drive the whole picture, more join, in the end all.

    `steps` are Euler steps of three stages, `shares` the parts of the tokens that go through the network in the first
    two. Between anchors their velocity is spread, S u + T(u): the nearest anchor's, blurred, while anchors keep their
    own exactly (the spatially approximated ODE and its augmented lifter). The first anchors are every second token of
    every second row and the picture's border, filled up at random. After a stage those tokens join whose
    neighbourhood's velocity varies most (3 x 3, mean over channels).

    A token that joins at the level sigma is put at y* = (1 - sigma) Phi(x0) + sigma eps, Phi(x0) the anchors' clean
    estimates spread as their velocities are, eps fresh noise: the marginal at sigma. The paper's micro-flow,
    dy/dt = (y* - y) / (T - t) until T, arrives there exactly, and nothing is evaluated on its way, so it is one step.
    (The published code goes a third of the way.)

    `schedule=None` is `Beta(n, alpha=1.4, beta=0.42, low=1 / n)`, the published code's default (its two presets say
    0.425, which moves no level by 0.004). The defaults are the published "4x" setting, `JIT_7X` the faster one.
    Departures: where there are fewer anchors than lattice and border, the lattice comes first; local variances repeat
    the picture's edge instead of zeros; blurs repeat instead of mirroring.
    """

    scope: ClassVar[str] = "SampleAnchors"
    steps: tuple[int, int, int] = (7, 4, 7)
    shares: tuple[float, float] = (0.35, 0.62)
    schedule: Schedule | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        right = len(self.shares) == 2 and all(map(is_number, self.shares)) and 0 < self.shares[0] < self.shares[1] < 1
        require(right, "shares", "two rising parts of the tokens, between 0 and 1", self.shares)

    def sigmas(self, model: ModelInfo) -> tuple[Sigmas, Sigmas, Sigmas]:
        """Those of one schedule, shared out."""
        total = sum(self.steps)
        chosen = self.schedule or Beta(total, alpha=1.4, beta=0.42, low=1 / total)
        grid = chosen(1.0, model.tokens(self.height, self.width), model)
        return shared_out(grid, self.steps)

    def tokens(self, model: ModelInfo) -> tuple[int, int, int]:
        """Tokens that go through the network in each stage."""
        whole = model.tokens(self.height, self.width)
        few, more = (max(1, math.floor(whole * share)) for share in self.shares)
        return few, max(few, more), whole

    def apply(self, state: State[Start], out: Latents, ctx: Context) -> Tensor:
        """Two integrations of anchors, item by item since each has its own, and one of all tokens."""
        guidance, patch = self.guidance or own_guidance(ctx.model.info), out.space.patch
        h, w = out.height // patch, out.width // patch
        first, second, third = self.sigmas(ctx.model.info)
        few, more, _ = self.tokens(ctx.model.info)
        x = ctx.noise(out.shape, source=self.noise)
        fresh = pack(ctx.noise(out.shape, source=self.noise, draw=1), patch=patch)
        order = pack(ctx.noise(out.shape, source=self.noise, draw=2), patch=patch)[..., 0]
        rows: list[Tensor] = []
        for i in range(len(x)):
            row, only, last = x[i : i + 1], ctx.only(i), list[Step]()
            spread = Spread(anchors(h, w, few, order[i]), h, w)
            for sigmas, count in ((first, more), (second, h * w)):
                row = only.integrate(Euler(), AtAnchors(guidance, spread), row, sigmas, watch=last.append)
                clean = pack(last[-1].denoised, patch=patch)
                velocity = (pack(row, patch=patch) - clean) / sigmas[-1]
                grown = Spread(add_anchors(velocity, spread, count), h, w)
                tokens = activate(pack(row, patch=patch), clean, fresh[i : i + 1], spread, grown, sigmas[-1])
                row, spread = unpack(tokens, h, w, patch=patch), grown
            rows.append(row)
        return ctx.integrate(Euler(), guidance, torch.cat(rows), third)


Setting = tuple[tuple[int, int, int], tuple[float, float]]
JIT_4X: Setting = (7, 4, 7), (0.35, 0.62)
JIT_7X: Setting = (4, 3, 4), (0.32, 0.6)
"""The published settings, 18 and 11 steps divided at 0.4 and 0.65: `SampleAnchors(1024, 1024, *JIT_7X)`."""


class Spread:
    """Anchors of an h x w grid of tokens, and how their values are spread over it: T in the paper, eq. of the lifter.

    Nearest anchor (the one listed first of equals), then a Gaussian blur of a deviation of 0.4 times the mean distance
    of anchors, at least one token, cut at three deviations; anchors keep their own values.
    """

    def __init__(self, at: Int[Tensor, " m"], h: int, w: int) -> None:
        self.at, self.h, self.w = at, h, w
        cells = torch.arange(h * w, device=at.device)
        rank = torch.arange(len(at), device=at.device)
        near = []
        for some in cells.split(CHUNK):
            down, across = some[:, None] // w - at // w, some[:, None] % w - at % w
            near.append(((down**2 + across**2) * len(at) + rank).argmin(1))
        self.near = torch.cat(near)
        deviation = max(1.0, SOFT * math.sqrt(h * w / len(at)))
        reach = math.ceil(3 * deviation)
        steps = torch.arange(-reach, reach + 1, device=at.device)
        kernel = torch.exp(-(steps**2) / (2 * deviation**2))
        self.kernel = kernel / kernel.sum()

    def __call__(self, values: Float[Tensor, "b m d"]) -> Float[Tensor, "b n d"]:
        """Values of anchors as values of all tokens."""
        grid = values[:, self.near].transpose(1, 2).unflatten(2, (self.h, self.w))
        reach = len(self.kernel) // 2
        grid = F.pad(grid.flatten(0, 1)[:, None], (reach, reach, reach, reach), mode="replicate")
        soft = F.conv2d(F.conv2d(grid, self.kernel[None, None, :, None]), self.kernel[None, None, None])
        out = soft.view(len(values), -1, self.h * self.w).transpose(1, 2).contiguous()
        out[:, self.at] = values
        return out


class AtAnchors(Guidance):
    """`inner` at some tokens, spread over all. Made by a stage for its own use; no chain holds it."""

    def __init__(self, inner: Guidance, spread: Spread) -> None:
        self.inner, self.spread = inner, spread

    @property
    def passes(self) -> int:
        return self.inner.passes

    def field(
        self, model: Backbone, cond: Condition, negative: Condition | None, options: FieldOptions = FieldOptions()
    ) -> Velocity:
        s, patch = self.spread, model.info.space.patch
        places = torch.stack((s.at // s.w, s.at % s.w), -1).float()
        inner = self.inner.field(model, cond, negative, replace(options, positions=Positions(places, s.h, s.w)))

        def velocity(x: Tensor, sigma: float) -> Tensor:
            row = unpack(pack(x, patch=patch)[:, s.at], 1, len(s.at), patch=patch)
            return unpack(s(pack(inner(row, sigma), patch=patch)), s.h, s.w, patch=patch)

        return velocity


def anchors(h: int, w: int, count: int, order: Float[Tensor, " n"]) -> Int[Tensor, " m"]:
    """The first anchors: every second token of every second row, then the border, then others, each in this order."""
    cells = torch.arange(h * w, device=order.device)
    row, column = cells // w, cells % w
    lattice = (row % 2 == 0) & (column % 2 == 0)
    border = (row == 0) | (row == h - 1) | (column == 0) | (column == w - 1)
    place = order.argsort().argsort()  # each token's place in the order
    late = torch.where(lattice, 0, torch.where(border, 1, 2))
    return (late * h * w + place).argsort()[:count].sort().values


def add_anchors(velocity: Float[Tensor, "1 n d"], spread: Spread, count: int) -> Int[Tensor, " m"]:
    """The anchors and, up to `count`, those other tokens around which the velocity varies most.

    Importance E_W[u u] - E_W[u] E_W[u] over a window W of 3 x 3 tokens, the mean over channels.
    """
    grid = velocity.transpose(1, 2).unflatten(2, (spread.h, spread.w))

    def mean(each: Tensor) -> Tensor:
        return F.avg_pool2d(F.pad(each, (1, 1, 1, 1), mode="replicate"), 3, stride=1)

    importance = (mean(grid.square()) - mean(grid).square()).mean(1).flatten()
    importance[spread.at] = math.inf
    return importance.sort(descending=True, stable=True).indices[:count].sort().values


def activate(
    y: Float[Tensor, "b n d"],
    clean: Float[Tensor, "b n d"],
    noise: Float[Tensor, "b n d"],
    spread: Spread,
    grown: Spread,
    sigma: float,
) -> Float[Tensor, "b n d"]:
    """The state with those tokens at y* that are anchors of `grown` and not yet of `spread`."""
    target = (1 - sigma) * spread(clean[:, spread.at]) + sigma * noise
    out = y.clone()
    new = grown.at[~torch.isin(grown.at, spread.at)]
    out[:, new] = target[:, new]
    return out

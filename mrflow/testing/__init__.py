"""Help for testing what you write against mrflow: a model whose flow is exact in closed form, and laws in one line.

from mrflow.testing import check_stage
def test_mine(): check_stage(Sharpen())
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from mrflow.backbone import Condition, FieldOptions
from mrflow.errors import PlanError
from mrflow.flow import Velocity
from mrflow.runner import run
from mrflow.schedules import Linear, Schedule
from mrflow.solvers import Solver, integrate
from mrflow.spec import FLUX, QWEN, Latents, LatentSpace, ModelInfo, Pixels, Shift, Spec, Start, State
from mrflow.stage import AnyChain, AnyStage
from mrflow.upscaler import Upscaler
from mrflow.upscalers import Interpolate

TOY = ModelInfo(
    "toy",
    LatentSpace("toy", channels=3, downscale=2, patch=2),
    Shift(0.0, 0.7, 64, 256),
    size=(64, 64),
    low=(32, 32),
    upscale=2,
)


class LawBroken(AssertionError):
    """A stage, solver or schedule does not keep a law that mrflow relies on."""


@dataclass(frozen=True)
class Mixture:
    """A mixture of isotropic Gaussians: means (k, d), one standard deviation, equal weights.

    For x = (1 - s) x0 + s eps each part is N((1 - s) m, v) with v = (1 - s)^2 std^2 + s^2, so that
    E[x0 | x] = m + (1 - s) std^2 (x - (1 - s) m) / v and E[eps | x] = s (x - (1 - s) m) / v are exact.
    """

    means: Tensor
    std: float

    def velocity(self, x: Tensor, sigma: float) -> Tensor:
        """E[eps - x0 | x] for x of shape (b, d)."""
        a = 1.0 - sigma
        var = a * a * self.std**2 + sigma * sigma
        rest = x[:, None] - a * self.means.to(x)  # (b, k, d)
        weights = (-rest.square().sum(-1) / (2 * var)).softmax(1)[..., None]
        each = (sigma - a * self.std**2) / var * rest - self.means.to(x)
        return (weights * each).sum(1)


class Toy:
    """A model in closed form: latents are a mixture of two plain colours that the prompt chooses, a little noisy.

    Latents are the 2x-averaged picture on [-1, 1]. Nothing is learned, so samplers can be held against the truth.
    """

    def __init__(self, *, std: float = 0.1, device: str = "cpu") -> None:
        if not std > 0:
            raise PlanError(f"std must be above 0, got {std!r}")
        self.std, self._device = std, torch.device(device)

    @property
    def info(self) -> ModelInfo:
        """Facts."""
        return TOY

    @property
    def device(self) -> torch.device:
        """Where it lives."""
        return self._device

    @property
    def upscaler(self) -> Upscaler:
        """Bilinear x2."""
        return Interpolate(2, "bilinear")

    def condition(self, prompts: Sequence[str]) -> Condition:
        """Two colours for each prompt, from its hash."""
        rows = [torch.tensor(list(hashlib.sha256(p.encode("utf-8", "replace")).digest()[:6])) for p in prompts]
        return Condition({"colours": (torch.stack(rows).float() / 127.5 - 1).view(-1, 2, 3).to(self._device)})

    def mixture(self, colours: Tensor, height: int, width: int) -> Mixture:
        """The distribution of latents of height x width cells for one prompt's (2, 3) colours."""
        means = colours[:, :, None, None].expand(2, 3, height, width).reshape(2, -1)
        return Mixture(means, self.std)

    def check(self, options: FieldOptions) -> None:
        """A closed form has nothing to take apart or to adapt.

        Raises:
            PlanError: options need more than a velocity.
        """
        self.info.require(options.needs)

    def field(self, cond: Condition, options: FieldOptions = FieldOptions()) -> Velocity:
        """The exact velocity."""
        self.check(options)
        colours = cond["colours"]

        def velocity(x: Tensor, sigma: float) -> Tensor:
            items = [
                self.mixture(c, x.shape[2], x.shape[3]).velocity(item.reshape(1, -1), sigma)
                for c, item in zip(colours, x, strict=True)
            ]
            return torch.cat(items).view_as(x)

        return velocity

    def encode(self, pixels: Tensor, noise: Tensor | None = None) -> Tensor:
        """Averaged 2 x 2 and put on [-1, 1]; a posterior sample has standard deviation 0.01."""
        z = 2 * F.avg_pool2d(pixels, 2) - 1
        return z if noise is None else z + 0.01 * noise

    def decode(self, latents: Tensor) -> Tensor:
        """Every cell twice a side."""
        return F.interpolate(0.5 * latents + 0.5, scale_factor=2, mode="nearest").clamp(0, 1)


def toy(*, std: float = 0.1) -> Toy:
    """A tiny model with an exact flow: instant, and right."""
    return Toy(std=std)


def check_stage(stage: AnyStage, *, spec: Spec | None = None, model: Toy | None = None) -> None:
    """Hold a stage to the laws: it keeps its promise, gives the same for the same seed, and a batch equals its items.

    `spec` is what it is given; a value of the kind it takes, unless said.

    Raises:
        LawBroken: naming the law. MrflowError: the plan refuses, or a promise is broken.
    """
    backbone = model or toy()
    given = spec or _given(stage, backbone.info)
    chain = AnyChain((stage,))
    planned = stage.plan(given, backbone.info)
    if stage.plan(given, backbone.info) != planned:
        raise LawBroken(f"{stage!r}: two plans for {given} differ; plan must depend on its arguments alone")
    generator = torch.Generator().manual_seed(0)
    data = torch.rand(given.shape, generator=generator)
    data = data if isinstance(given, Pixels) else 2 * data - 1
    kept = data.clone()
    prompts, seeds = [f"prompt {i}" for i in range(given.batch)], list(range(given.batch))

    def go(items: slice) -> Tensor:
        part = _with_batch(given, len(seeds[items]))
        start: State[Spec] = State(part, data[items])
        return run(chain, backbone, prompts[items], seed=seeds[items], start=start).data

    whole = go(slice(None))
    if not torch.equal(data, kept):
        raise LawBroken(f"{stage!r}: it changed the tensor it was given; work on a copy")
    if not torch.equal(whole, go(slice(None))):
        raise LawBroken(f"{stage!r}: two runs with one seed differ; draw noise with ctx.noise")
    for i in range(given.batch):
        error = float((go(slice(i, i + 1)) - whole[i : i + 1]).abs().max()) if whole.numel() else 0.0
        if error > 1e-4:
            raise LawBroken(f"{stage!r}: item {i} alone differs from item {i} of a batch by {error:.2g}")


def check_transition(stage: AnyStage, *, sigma: float = 0.6, size: tuple[int, int] = (8, 8)) -> None:
    """Hold a stage from noisy latents to larger ones to the law: what comes out is on the flow's line at its new level.

    Its plan says a level sigma'. From latents of `size` cells at `sigma`, a constant picture c must come out as
    (1 - sigma') c on the average, and pure noise as white noise of variance sigma'^2: the variance is held against that
    everywhere, and neighbours must not be correlated, within a group of copies or across.

    Raises:
        LawBroken: naming the law and what was measured.
    """
    backbone, batch = toy(), 96
    given = Latents(batch, *size, backbone.info.space, sigma)
    planned = stage.plan(given, backbone.info)
    if not isinstance(planned, Latents):
        raise LawBroken(f"{stage!r}: gives {planned}, and a transition gives latents")
    level, where = planned.sigma, f"{stage!r} from {size[0]}x{size[1]} at {sigma:g}"
    generator = torch.Generator().manual_seed(0)

    def go(data: Tensor, first: int) -> Tensor:
        seeds = list(range(first, first + batch))
        return run(AnyChain((stage,)), backbone, [""] * batch, seed=seeds, start=State(given, data)).data

    signal = float(go(torch.full(given.shape, 1.0 - sigma), 0).mean())
    if abs(signal - (1 - level)) > 0.02:
        raise LawBroken(f"{where}: a constant picture keeps {signal:.3f} of itself, not {1 - level:.3f}")
    noise = go(sigma * torch.randn(given.shape, generator=generator), batch) / level
    variance = noise.square().mean((0, 1))
    if abs(float(variance.mean()) - 1) > 0.03 or float((variance - 1).abs().max()) > 0.6:
        raise LawBroken(
            f"{where}: noise has {float(variance.mean()):.3f} of the variance {level:.3f}^2 on the average, from "
            f"{float(variance.min()):.2f} to {float(variance.max()):.2f} of it"
        )
    for down, across in ((0, 1), (1, 0), (1, 1), (0, 2), (2, 0)):
        for row in (0, 1):
            for column in (0, 1):
                here = noise[..., row : noise.shape[-2] - down : 2, column : noise.shape[-1] - across : 2]
                there = noise[..., row + down :: 2, column + across :: 2][..., : here.shape[-2], : here.shape[-1]]
                together = float((here * there).mean())
                if abs(together) > 0.05:
                    raise LawBroken(
                        f"{where}: noise {down} down and {across} across of cell ({row}, {column}) is correlated by "
                        f"{together:.2f}; it must be white"
                    )


def _given(stage: AnyStage, model: ModelInfo) -> Spec:
    takes = stage.takes
    if issubclass(takes, Pixels):
        return Pixels(2, 32, 32)
    if issubclass(takes, Start):
        return Start(2)
    if issubclass(takes, Latents):
        clean = Latents(2, 16, 16, model.space)
        try:
            stage.plan(clean, model)
        except PlanError:
            return Latents(2, 16, 16, model.space, 0.3)
        return clean
    raise PlanError(f"{type(stage).__name__} takes {takes.__name__}; say what it is given with spec=")


def _with_batch(spec: Spec, batch: int) -> Spec:
    return replace(spec, batch=batch)  # type: ignore[type-var]  # pyright: ignore


def check_schedule(schedule: Schedule) -> None:
    """Hold a schedule to the laws: begins at its start, falls strictly, ends at exactly 0, is made of floats.

    Raises:
        LawBroken: naming the law, the model and the start.
    """
    for model in (FLUX, QWEN, TOY):
        for start in (1.0, 0.6, 0.12):
            for tokens in (16, 1024, 6889):
                sigmas, where = schedule(start, tokens, model), f"{schedule!r} from {start} on {model.name}"
                if len(sigmas) < 2 or not all(isinstance(s, float) and math.isfinite(s) for s in sigmas):
                    raise LawBroken(f"{where}: levels must be at least two finite floats, got {sigmas[:4]}")
                if abs(sigmas[0] - start) > 1e-9:
                    raise LawBroken(f"{where}: begins at {sigmas[0]}")
                if sigmas[-1] != 0.0:
                    raise LawBroken(f"{where}: ends at {sigmas[-1]}, not at exactly 0")
                if any(b >= a for a, b in pairwise(sigmas)):
                    raise LawBroken(f"{where}: does not fall strictly")
                if schedule(start, tokens, model) != sigmas:
                    raise LawBroken(f"{where}: two calls differ")


def measured_order(solver: Solver, *, steps: Sequence[int] = (32, 64, 128)) -> float:
    """The order of convergence on the flow of a one-dimensional mixture from sigma 0.9 to 0.2.

    The exact solution keeps its quantile: F(x, sigma) is constant along the flow, with F the mixture's distribution
    function, because trajectories in one dimension never cross. It is solved for x by bisection.
    """
    centres, std = (-0.9, 0.7), 0.4
    mixture = Mixture(torch.tensor([[m] for m in centres], dtype=torch.float64), std)

    def quantile(x: float, s: float) -> float:
        spread = math.sqrt(2 * ((1 - s) ** 2 * std**2 + s * s))
        return sum(0.5 + 0.5 * math.erf((x - (1 - s) * m) / spread) for m in centres) / len(centres)

    begin, high, low = 0.55, 10.0, -10.0
    target = quantile(begin, 0.9)
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if quantile(middle, 0.2) < target else (low, middle)
    errors = []
    for n in steps:
        sigmas = [0.9 - 0.7 * i / n for i in range(n + 1)]
        x = torch.tensor([[begin]], dtype=torch.float64)
        errors.append(abs(float(integrate(solver, mixture.velocity, x, sigmas)) - low))
    return math.log(errors[0] / errors[-1]) / math.log(steps[-1] / steps[0])


def check_solver(solver: Solver, *, order: float) -> None:
    """Hold a solver to the laws: its order on an exact flow, and one step down to 0 on a point mass gives the point.

    Raises:
        LawBroken: naming the law and what was measured.
    """
    got = measured_order(solver)
    if not abs(got - order) < 0.35:
        raise LawBroken(f"{solver!r}: order {got:.2f} on the mixture's flow, not {order:g}")
    target = torch.tensor([[0.3, -0.7]], dtype=torch.float64)

    def towards(x: Tensor, sigma: float) -> Tensor:
        return (x - target) / sigma

    for levels in (Linear(1)(0.12, 1, TOY), Linear(4)(1.0, 1, TOY)):
        end = integrate(solver, towards, torch.ones_like(target), levels)
        if not torch.allclose(end, target, atol=1e-9):
            raise LawBroken(
                f"{solver!r}: a point mass is missed by {float((end - target).abs().max()):.2g} over {levels}"
            )

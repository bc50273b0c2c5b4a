"""A plug-in for each law that breaks it, and whose other settings break none."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from mrflow.backbone import Backbone, Condition, FieldOptions
from mrflow.caches import Cache, Evaluation, Rule
from mrflow.caches.clock import Clock
from mrflow.flow import Velocity
from mrflow.guidance import Distilled, Guidance
from mrflow.model_info import FLUX, ModelInfo
from mrflow.noise import Noise, PerItem
from mrflow.protocols.pieces import Pieces, TransformerStep
from mrflow.protocols.upscaler import Upscaler
from mrflow.rivals.growth import dct_matrix, grow
from mrflow.schedules import Schedule, Sigmas, shift_static
from mrflow.solvers import BogackiShampine, Euler, History, Pair, Solver, StochasticSolver
from mrflow.spec import Latents, State
from mrflow.stage import Context, Stage, Work
from mrflow.testing.toy import Toy


@dataclass(frozen=True)
class Even(Schedule):
    """Even steps that can be spoiled in one respect; unspoiled, it keeps all laws."""

    steps: int = 4
    begins: float = 1.0
    ends: float = 0.0
    extra: int = 0
    power: float = 0.0
    numpy: bool = False
    rises: bool = False
    counts: bool = False

    def __call__(self, start: float, tokens: int, model: ModelInfo) -> Sigmas:
        n = self.steps + self.extra
        sigmas = [start ** (1 + self.power * i / n) * (1 - i / n) for i in range(n + 1)]
        sigmas[0], sigmas[-1] = start * self.begins, self.ends
        if self.rises:
            sigmas[2] = sigmas[1]
        if self.counts:
            _laid.append(1)
            sigmas[1] -= 1e-6 * len(_laid)
        if self.numpy:
            from numpy import float64

            return tuple(float64(s) for s in sigmas)
        return tuple(sigmas)


_laid: list[int] = []


@dataclass(frozen=True)
class SpoiledEuler(Solver):
    """Euler with one thing wrong."""

    how: str = ""
    evals: ClassVar[int] = 1

    def step(self, v: Velocity, x: Tensor, sigma: float, to: float, past: History) -> tuple[Tensor, History]:
        h, now = to - sigma, v(x, sigma)
        if self.how == "half":
            return x + 0.5 * h * now, ()
        if self.how == "stops":
            return x + (max(to, 0.01) - sigma) * now, ()
        if self.how == "in place":
            return x.add_(now, alpha=h), ()
        if self.how == "batch":
            return x + h * (0.9 * now + 0.1 * now.mean(0, keepdim=True)), ()
        if self.how == "twice":
            v(x, sigma)
        if self.how == "holds":
            before = _stepped.get("v", now)
            _stepped["v"] = now.clone()
            return x + h * (1.01 * now - 0.01 * before if before.shape == now.shape else now), ()
        return x + h * now, ()


_stepped: dict[str, Tensor] = {}


@dataclass(frozen=True)
class EvenAB2(Solver):
    """Adams-Bashforth of order 2 with the weights 3/2 and -1/2 of even steps."""

    def step(self, v: Velocity, x: Tensor, sigma: float, to: float, past: History) -> tuple[Tensor, History]:
        now = v(x, sigma)
        before = past[-1][1] if past else now
        return x + (to - sigma) * (1.5 * now - 0.5 * before), ((sigma, now),)


@dataclass(frozen=True)
class Noisier(StochasticSolver):
    """Euler with noise added and none taken away."""

    def step(
        self, v: Velocity, x: Tensor, sigma: float, to: float, past: History, *, noise: Tensor | None = None
    ) -> tuple[Tensor, History]:
        assert noise is not None
        x = x + (to - sigma) * v(x, sigma)
        return x + (to * math.sqrt(sigma - to)) * noise, ()


@dataclass(frozen=True)
class Careless(BogackiShampine):
    """The pair whose companion is itself, so that it sees no error."""

    @property
    def pair(self) -> Pair:
        return replace(super().pair, error=(0.0,) * 4)


@dataclass(frozen=True)
class SpoiledReinjection(Stage[Latents, Latents]):
    """A stage that adds noise, with one thing wrong."""

    how: str = ""

    def plan(self, spec: Latents, model: ModelInfo) -> Latents:
        if self.how == "plan":
            _planned.append(1)
            return replace(spec, sigma=0.1 + 0.1 * (len(_planned) % 8))
        return replace(spec, sigma=0.5)

    def work(self, spec: Latents, out: Latents, model: ModelInfo) -> Work:
        return Work(nfe=40 if self.how == "forwards" else 0)

    def apply(self, state: State[Latents], out: Latents, ctx: Context) -> Tensor:
        x, noise = state.data, ctx.noise(state.data.shape)
        if self.how == "marginals":
            ctx.integrate(Euler(), Distilled(), x, (0.9, 0.5))
        if self.how == "level":
            return x.clone()
        if self.how == "seed":
            noise = torch.randn(x.shape)
        if self.how == "items":
            noise = noise.flip(0)
        if self.how == "in place":
            return x.mul_(0.5).add_(noise, alpha=0.5)
        x = 0.5 * x + 0.5 * noise
        return x.transpose(-1, -2) if self.how == "sides" else x


_planned: list[int] = []


@dataclass(frozen=True)
class SpoiledGrowth(Stage[Latents, Latents]):
    """Growth by two in the DCT's low corner, with one thing wrong."""

    how: str = ""

    def plan(self, spec: Latents, model: ModelInfo) -> Latents:
        return replace(spec, height=2 * spec.height, width=2 * spec.width, sigma=shift_static(spec.sigma, 2.0))

    def apply(self, state: State[Latents], out: Latents, ctx: Context) -> Tensor:
        x, sigma, noise = state.data, state.spec.sigma, ctx.noise(out.shape)
        if self.how in ("mean", "coarse"):
            (h, w), k = x.shape[-2:], 1 if self.how == "mean" else 2
            rest = sigma * ctx.noise(x.shape, draw=1)
            rest[..., :k, :k] = (dct_matrix(h) @ x @ dct_matrix(w).T)[..., :k, :k]
            x = dct_matrix(h).T @ rest @ dct_matrix(w)
        if self.how == "noise":
            noise = noise.clone()
            noise[..., 1::2] = noise[..., ::2]
        y = grow(x, noise, sigma)
        if self.how == "dim":
            return y - 0.2 * y.mean((-2, -1), keepdim=True)
        return y.flip(-2) if self.how == "upside down" else y


@dataclass(frozen=True)
class SpoiledGuidance(Guidance):
    """u + 2 (c - u), with one thing wrong."""

    how: str = ""

    @property
    def passes(self) -> int:
        return 1 if self.how == "passes" else 2

    def field(
        self, model: Backbone, cond: Condition, negative: Condition | None, options: FieldOptions = FieldOptions()
    ) -> Velocity:
        assert negative is not None
        c, u = model.field(cond, options), model.field(negative.repeat(cond.batch), options)

        def guided(x: Tensor, sigma: float) -> Tensor:
            one, other = c(x, sigma), u(x, sigma)
            if self.how == "items":
                one = 0.9 * one + 0.1 * one.mean(0, keepdim=True)
            if self.how == "in place":
                return one.mul_(2).sub_(other)
            out = (2.1 if self.how == "branches" else 2.0) * one - other
            if self.how == "holds":
                out = out + 0.01 * _guided.get("v", torch.zeros(())).mean()
                _guided["v"] = out
            return out

        return guided


_guided: dict[str, Tensor] = {}


@dataclass(frozen=True)
class SpoiledNoise(Noise):
    """`PerItem`, with one thing wrong."""

    how: str = ""

    def __call__(self, seeds: Sequence[int], shape: tuple[int, ...], *, scope: str, draw: int) -> Tensor:
        x = PerItem()(seeds, shape, scope=scope, draw=0 if self.how == "draws" else draw)
        if self.how == "global":
            torch.rand(())
        if self.how == "items":
            x = x.flip(0)
        if self.how == "uniform":
            x = 12**0.5 * (torch.special.ndtr(x) - 0.5)
        return x.double() if self.how == "kind" else x


@dataclass(frozen=True)
class SpoiledUpscaler(Upscaler):
    """Every pixel four times, with one thing wrong."""

    how: str = ""

    @property
    def scale(self) -> int:
        return 3 if self.how == "scale" else 2

    def __call__(self, pixels: Tensor) -> Tensor:
        if self.how == "in place":
            pixels.mul_(0.999)
        out = pixels.repeat_interleave(2, -1).repeat_interleave(2, -2)
        if self.how == "items":
            out = 0.9 * out + 0.1 * out.mean(0, keepdim=True)
        return out.flip(-1) if self.how == "mirror" else out


class SpoiledModel(Toy):
    """The toy, with one thing wrong."""

    def __init__(self, how: str = "") -> None:
        super().__init__()
        self.how = how

    def __repr__(self) -> str:
        return f"SpoiledModel({self.how!r})"

    def condition(self, prompts: Sequence[str]) -> Condition:
        return super().condition(prompts[:1] if self.how == "prompts" else prompts)

    def check(self, options: FieldOptions) -> None:
        if self.how != "refuses":
            super().check(options)

    def field(self, cond: Condition, options: FieldOptions = FieldOptions()) -> Velocity:
        inner = super().field(cond, options)

        def velocity(x: Tensor, sigma: float) -> Tensor:
            v = inner(x, sigma)
            if self.how == "velocity":
                x.mul_(1.01)
            return 0.9 * v + 0.1 * v.mean(0, keepdim=True) if self.how == "items" else v

        return velocity

    def decode(self, latents: Tensor) -> Tensor:
        return super().decode(latents) * (1.5 if self.how == "pictures" else 1.0)


@dataclass(frozen=True)
class SpoiledCache(Cache):
    """Every second evaluation, with one thing wrong."""

    how: str = ""

    def rule(self, info: ModelInfo, sigmas: Sequence[float]) -> Rule:
        if self.how == "holds":

            def third(look: Evaluation) -> bool:
                _asked.append(1)
                return len(_asked) % 3 == 0

            return third
        if self.how == "counted":  # all of them, once there is a picture
            return lambda look: look.index % 2 == 0 or look.grid is not None
        return lambda look: look.index % 2 == 0

    def span(self, blocks: int) -> tuple[int, int]:
        return (1, blocks + 1) if self.how == "span" else (0, blocks)

    def share(self, info: ModelInfo, tokens: int) -> float:
        return 0.0 if self.how == "share" else 1.0

    def make_step(self, pieces: Pieces, clock: Clock, info: ModelInfo) -> TransformerStep:
        inner = super().make_step(pieces, clock, info)
        if self.how == "remembers":
            return _opened.setdefault("step", inner)
        if self.how not in {"computed", "items"}:
            return inner

        def wrong(
            tokens: Tensor, text: Tensor, cos: Tensor, sin: Tensor, table: Tensor, /, *, key: object = None
        ) -> Tensor:
            out = inner(tokens, text, cos, sin, table, key=key)
            return 1.01 * out if self.how == "computed" else 0.9 * out + 0.1 * out.mean(0, keepdim=True)

        return wrong


_asked: list[int] = []


_opened: dict[str, TransformerStep] = {}


COUNTEREXAMPLES: dict[str, object] = {
    "schedule: floats": Even(numpy=True),
    "schedule: start": Even(begins=0.99),
    "schedule: zero": Even(ends=1e-6),
    "schedule: falls": Even(rises=True),
    "schedule: pure": Even(counts=True),
    "schedule: scales": Even(power=0.5),
    "schedule: steps": Even(extra=1),
    "solver: order": SpoiledEuler("half"),
    "solver: order on uneven levels": EvenAB2(),
    "solver: point mass": SpoiledEuler("stops"),
    "solver: untouched": SpoiledEuler("in place"),
    "solver: stateless": SpoiledEuler("holds"),
    "solver: items": SpoiledEuler("batch"),
    "solver: evaluations": SpoiledEuler("twice"),
    "solver: tolerance": Careless(),
    "solver: marginal": Noisier(),
    "stage: plan": SpoiledReinjection("plan"),
    "stage: untouched": SpoiledReinjection("in place"),
    "stage: promise": SpoiledReinjection("sides"),
    "stage: seed": SpoiledReinjection("seed"),
    "stage: items": SpoiledReinjection("items"),
    "stage: forwards": SpoiledReinjection("forwards"),
    "stage: level": SpoiledReinjection("level"),
    "stage: marginals": SpoiledReinjection("marginals"),
    "transition: signal": SpoiledGrowth("dim"),
    "transition: picture": SpoiledGrowth("upside down"),
    "transition: detail": SpoiledGrowth("coarse"),
    "transition: white": SpoiledGrowth("noise"),
    "guidance: same branches": SpoiledGuidance("branches"),
    "guidance: passes": SpoiledGuidance("passes"),
    "guidance: items": SpoiledGuidance("items"),
    "guidance: fresh": SpoiledGuidance("holds"),
    "guidance: untouched": SpoiledGuidance("in place"),
    "noise: kind": SpoiledNoise("kind"),
    "noise: normal": SpoiledNoise("uniform"),
    "noise: items": SpoiledNoise("items"),
    "noise: apart": SpoiledNoise("draws"),
    "noise: own generator": SpoiledNoise("global"),
    "upscaler: scale": SpoiledUpscaler("scale"),
    "upscaler: items": SpoiledUpscaler("items"),
    "upscaler: untouched": SpoiledUpscaler("in place"),
    "upscaler: coarse": SpoiledUpscaler("mirror"),
    "backbone: prompts": SpoiledModel("prompts"),
    "backbone: velocity": SpoiledModel("velocity"),
    "backbone: items": SpoiledModel("items"),
    "backbone: pictures": SpoiledModel("pictures"),
    "backbone: refuses": SpoiledModel("refuses"),
    "cache: fresh rule": SpoiledCache("holds"),
    "cache: span": SpoiledCache("span"),
    "cache: forecast": SpoiledCache("share"),
    "cache: computed": SpoiledCache("computed"),
    "cache: fresh memory": SpoiledCache("remembers"),
    "cache: counted": SpoiledCache("counted"),
    "cache: items": SpoiledCache("items"),
}
"""By the law that each breaks, and its check catches."""
SETTINGS: Mapping[str, Mapping[str, object]] = {
    "solver": {"order": 1},
    "solver: order on uneven levels": {"order": 2},
    "stage": {"spec": None, "model": None},
    "transition": {"sigma": 0.6, "size": (8, 8)},
    "guidance": {"model": None},
    "backbone": {"size": None},
    "cache": {"info": FLUX},
}
"""What a law, or each of its kind, is asked with."""

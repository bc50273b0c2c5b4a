"""Every demand of every law can be broken, and what it says then: the sentence, and the number that was measured."""

import ast
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor

import mrflow as mf
from mrflow.backbone import Backbone, Condition, FieldOptions
from mrflow.caches import Rule
from mrflow.caches.clock import Clock
from mrflow.display.notes import add_forwards
from mrflow.errors import PromiseError
from mrflow.flow import Velocity
from mrflow.model_info import FLUX, Forecast, ModelInfo
from mrflow.noise import Noise
from mrflow.protocols.pieces import Pieces, TransformerStep
from mrflow.protocols.upscaler import Upscaler
from mrflow.rivals.growth import grow
from mrflow.solvers import History
from mrflow.stage import Work
from mrflow.testing import (
    LAWS,
    Law,
    LawBroken,
    Toy,
    check_stage,
    check_transition,
    of_caches,
    of_schedules,
    of_slots,
    of_solvers,
    of_stages,
)
from tests.spoiled import COUNTEREXAMPLES, SETTINGS, Even, SpoiledCache, SpoiledGrowth

WORDS = {  # of each law's counterexample
    "schedule: floats": (
        "from 1.0 on flux1-dev at 16 tokens: levels must be a tuple of at least two finite Python floats, got "
        f"{tuple(np.float64(v) for v in (1.0, 0.75, 0.5, 0.25))!r}"
    ),
    "schedule: start": "from 1.0 on flux1-dev at 16 tokens: begins at 0.99",
    "schedule: zero": "from 1.0 on flux1-dev at 16 tokens: ends at 1e-06, not at exactly 0",
    "schedule: falls": "from 1.0 on flux1-dev at 16 tokens: does not fall strictly, level 3 is 0.75 after 0.75",
    "schedule: pure": "from 1.0 on flux1-dev: two calls differ",
    "schedule: scales": (
        "from 0.6 on flux1-dev at 16 tokens: a level is 0.42216421769337, and scaled from 1 it is 0.449999999999999"
    ),
    "schedule: steps": "from 1.0 on flux1-dev at 16 tokens: 5 steps, and 4 are said",
    "solver: order": "order -0.01 on the mixture's flow, not 1",
    "solver: order on uneven levels": "order 1.01 on uneven levels from sigma 1, not 2",
    "solver: point mass": "a point mass is missed by 0.14 over [0.12, 0.0]",
    "solver: untouched": "it changed the state it began with in place; make new tensors",
    "solver: stateless": "the same integration gives something else the second time",
    "solver: items": "item 0 alone differs from item 0 of a batch by 0.0043",
    "solver: evaluations": "a full step takes 2 evaluations, and `evals` says 1",
    "solver: tolerance": "its error is 1.4e+04 times its tolerance",
    "solver: marginal": (
        "it leaves 1.357 of the true variance in 64 steps from sigma 0.9 and 1.395 in 512; it must go to 1"
    ),
    "stage: plan": "two plans for Latents 16x24 sigma=0 differ; plan must depend on its arguments alone",
    "stage: untouched": (
        "stage 1 of 1, SpoiledReinjection(...): apply changed the tensor it was given; work on a copy"
    ),
    "stage: promise": (
        "it works for Latents 16x16 sigma=0, but not for Latents 16x24 sigma=0: stage 1 of 1, SpoiledReinjection(...) "
        "promised Latents 16x24 sigma=0.5 (2, 3, 16, 24) but made a tensor of shape (2, 3, 24, 16)"
    ),
    "stage: seed": "two runs with one seed differ; draw noise with ctx.noise",
    "stage: items": "item 0 alone differs from item 0 of a batch by 2.4",
    "stage: forwards": "its plan says 40 forwards a picture, and it made 0",
    "stage: level": "its plan says sigma 0.5, so that pictures differ by 0.500, and they differ by 0.002",
    "stage: marginals": (
        "asked at sigma 0.9, the model was given latents whose cells have 0.047 of the variance there, and whose sums "
        "over a picture have 17.92 of it"
    ),
    "transition: signal": "from 8x8 at 0.6: channel 0 of a constant picture comes out as 0.200, not 0.250",
    "transition: picture": (
        "from 8x8 at 0.6: channel 0 of a cosine of 1 half-waves down and 0 across comes out as -0.250, not 0.250"
    ),
    "transition: detail": (
        "from 8x8 at 0.6: channel 0 of a cosine of 0 half-waves down and 2 across comes out as -0.014, not 0.250"
    ),
    "transition: white": (
        "from 8x8 at 0.6: noise has 1.000 of the variance 0.750^2 on the average, from 0.170 to 1.830 of it"
    ),
    "guidance: same branches": "where both prompts are the same it is off the model's field by 0.35 at sigma 1",
    "guidance: passes": "5 evaluations take 10 passes, and `evals` says 5",
    "guidance: items": "item 0 alone differs from item 0 of a batch by 0.53",
    "guidance: fresh": "a second integration gives something else; what it remembers must lie in the field",
    "guidance: untouched": "it changed the state or a velocity in place; make new tensors",
    "noise: kind": "it gives torch.float64 (8, 4, 16, 24) on cpu, not float32 (8, 4, 16, 24) on the CPU",
    "noise: normal": "mean 0.001, variance 1.004, fourth moment 1.81; they must be 0, 1 and 3",
    "noise: items": "an item's noise depends on its neighbours in the batch",
    "noise: apart": "noise of two draws is correlated by 1.01",
    "noise: own generator": "it draws from the global generator; make one for each item",
    "cache: fresh rule": "a second rule decides differently; what it remembers must lie in the rule",
    "cache: span": "its span of 57 blocks is from 1 to 58",
    "cache: forecast": "a computed evaluation costs 0 of a whole one",
    "cache: computed": "SpoiledCache(how='computed') computes all blocks at sigma 1 and is off by 0.034",
    "cache: fresh memory": (
        "a second integration gives something else; what it remembers must lie in the step that it opens"
    ),
    "cache: counted": "the work of 5 whole evaluations is done, and 3 are forecast",
    "cache: items": "picture 0 alone differs from picture 0 of a batch by 0.058 of the largest",
    "upscaler: scale": "it makes torch.float32 (2, 3, 24, 40) of a 12x20 picture, and `scale` says 3",
    "upscaler: items": "item 0 alone differs from item 0 of a batch by 0.048",
    "upscaler: untouched": "it changed the picture that it was given; make a new tensor",
    "upscaler: coarse": "reduced to its old size, a smooth picture is off by 0.132 on the average",
    "backbone: prompts": "two prompts are encoded as 1",
    "backbone: velocity": "its field changed the latents in place",
    "backbone: items": "item 0 alone differs from item 0 of a batch by 0.39",
    "backbone: pictures": "decoded pixels must be clamped to [0, 1]",
    "backbone: refuses": "its facts say one condition at a time, and `check` takes two; call info.require",
}


# Plug-ins that break a law in another way than its counterexample does


@dataclass(frozen=True)
class Fixed(mf.Schedule):
    """These levels, whatever the start."""

    levels: object = (1.0, 0.0)

    def __call__(self, start: float, tokens: int, model: ModelInfo) -> tuple[float, ...]:
        return self.levels  # type: ignore[return-value]


@dataclass(frozen=True)
class Longer(mf.Schedule):
    """A step more from below 1."""

    def __call__(self, start: float, tokens: int, model: ModelInfo) -> tuple[float, ...]:
        return Even(4 if start == 1 else 5)(start, tokens, model)


@dataclass(frozen=True)
class Euler(mf.Solver):
    """Euler, with one thing wrong."""

    how: str = ""
    evals: ClassVar[int] = 1
    held: ClassVar[list[Tensor]] = []

    def points(self, sigmas: Sequence[float]) -> tuple[float, ...]:
        return tuple(sigmas[:-1]) if self.how != "points" else tuple(sigmas[1:])

    def step(self, v: Velocity, x: Tensor, sigma: float, to: float, past: History) -> tuple[Tensor, History]:
        now = v(x, sigma)
        if self.how == "velocity":
            return x + now.mul_(to - sigma), ()
        if self.how == "late" and sigma < 0.95:  # the state that it made itself
            return x.add_(now, alpha=to - sigma), ()
        if self.how == "shares":  # between integrations, reset where one begins
            if sigma >= 0.9:
                self.held.clear()
            self.held.append(now)
            now = now + 1e-3 * len(self.held)
        if self.how == "far" and (sigma, to) == (0.25, 0.0):
            now = 1.01 * now
        if self.how == "third":
            now = torch.cat((now[:2], now[2:] + 0.1)) if len(now) > 2 else now
        return x + (to - sigma) * now, ()


@dataclass(frozen=True)
class Wandering(mf.BogackiShampine):
    """Chooses its own steps, above where it begins."""

    def points(self, sigmas: Sequence[float]) -> tuple[float, ...]:
        return (1.5, 0.5)


@dataclass(frozen=True)
class Bad(mf.Stage[mf.Latents, mf.Latents]):
    """Adds noise, with one thing wrong."""

    how: str = ""

    def plan(self, spec: mf.Latents, model: ModelInfo) -> mf.Latents:
        return replace(spec, sigma=0.5)

    def evaluations(self, spec: mf.Latents, model: ModelInfo) -> tuple[float, ...]:
        return (0.8,) if self.how == "elsewhere" else ()

    def work(self, spec: mf.Latents, out: mf.Latents, model: ModelInfo) -> Work:
        return Work(nfe=1 if self.how == "elsewhere" else 0)

    def apply(self, state: mf.State[mf.Latents], out: mf.Latents, ctx: mf.Context) -> Tensor:
        x = 0.5 * state.data + 0.5 * ctx.noise(state.data.shape)
        if self.how == "elsewhere":
            ctx.integrate(mf.Euler(), mf.Distilled(), x, (0.9, 0.5))
        if self.how == "cropped":
            return x[..., :-1]
        if self.how == "last":
            return torch.cat((x[:1], x[1:] + 0.01))
        return x


@dataclass(frozen=True)
class Decodes(mf.Stage[mf.Latents, mf.Pixels]):
    """A stage that gives pictures."""

    def plan(self, spec: mf.Latents, model: ModelInfo) -> mf.Pixels:
        return mf.Pixels(spec.batch, 2 * spec.height, 2 * spec.width)

    def apply(self, state: mf.State[mf.Latents], out: mf.Pixels, ctx: mf.Context) -> Tensor:
        return torch.zeros(out.shape)


@dataclass(frozen=True)
class Grows(SpoiledGrowth):
    """Growth whose noise is wrong; where a square is added it is not linear, and known by samples alone."""

    def apply(self, state: mf.State[mf.Latents], out: mf.Latents, ctx: mf.Context) -> Tensor:
        y = grow(state.data, ctx.noise(out.shape), state.spec.sigma)
        if self.how == "pairs":
            y = y.clone()
            y[:, 1, 2, 3] = 0.8 * y[:, 1, 2, 2] + 0.6 * y[:, 1, 2, 3]
            return y
        if self.how == "loud":
            return 1.05 * y + 1e-3 * y.square()
        if self.how == "rows":
            lower = y[..., 8::2, :].repeat_interleave(2, -2)
            return torch.cat((y[..., :8, :], lower), -2) + 1e-3 * y.square()
        return y


@dataclass(frozen=True)
class Guides(mf.Guidance):
    """The prompt's own field, with one thing wrong."""

    how: str = ""

    @property
    def passes(self) -> int:
        return 1

    def evals(self, points: Sequence[float]) -> int:
        return 2 * len(points) if self.how == "twice" else len(points)

    def branches(self, points: Sequence[float]) -> tuple[tuple[float, ...], ...]:
        return (tuple(2 * p for p in points),) if self.how == "branches" else super().branches(points)

    def field(
        self, model: Backbone, cond: Condition, negative: Condition | None, options: FieldOptions = FieldOptions()
    ) -> Velocity:
        v = model.field(cond, options)

        def guided(x: Tensor, sigma: float) -> Tensor:
            if self.how == "twice":
                v(x, sigma)
            out = v(x, sigma)
            if self.how == "state":
                x.mul_(1.001)
            return torch.cat((out[:1], out[1:] + 0.01)) if self.how == "last" else out

        return guided


@dataclass(frozen=True)
class Noises(Noise):
    """`PerItem`, with one thing wrong."""

    how: str = ""
    calls: ClassVar[list[int]] = []

    def __call__(self, seeds: Sequence[int], shape: tuple[int, ...], *, scope: str, draw: int) -> Tensor:
        x = mf.PerItem()([0] * len(seeds) if self.how == "seeds" else seeds, shape, scope=scope, draw=draw)
        if self.how == "counts":
            self.calls.append(1)
            return x + len(self.calls)
        if self.how in ("1", "2", "3"):
            return 0.5**0.5 * (x + x.roll(1, int(self.how)))
        if self.how == "wide":
            return 1.05 * x
        if self.how == "off":
            return x + 0.05
        return x[:, :2] if self.how == "shape" else x


@dataclass(frozen=True)
class Caches(SpoiledCache):
    """Every second evaluation, with one thing wrong; `threshold` is nothing to it."""

    threshold: float = 0.1

    def forecast(self, info: ModelInfo, sigmas: Sequence[float], branch: Sequence[float]) -> Forecast:
        said = super().forecast(info, sigmas, branch)
        if self.how == "none":
            return replace(said, computed=0)
        if self.how == "short":
            return replace(said, asked=4, computed=2)
        return replace(said, computed=said.computed + 1) if self.how == "more" else said

    def share(self, info: ModelInfo, tokens: int) -> float:
        return 1.6 if self.how == "dear" else 1.0

    def rule(self, info: ModelInfo, levels: Sequence[float]) -> Rule:
        return super().rule(info, levels)

    def make_step(self, pieces: Pieces, clock: Clock, info: ModelInfo) -> TransformerStep:
        step = super().make_step(pieces, clock, info)

        def twice(*args: Tensor, key: object = None) -> Tensor:
            add_forwards(None, 1, 1, 0.0, tokens=0)
            return step(*args, key=key)

        return twice if self.how == "counts twice" else step


@dataclass(frozen=True)
class Ups(Upscaler):
    """Every pixel four times, with one thing wrong."""

    how: str = ""
    scale: ClassVar[int] = 2
    calls: ClassVar[list[int]] = []

    def __call__(self, pixels: Tensor) -> Tensor:
        out = pixels.repeat_interleave(2, -1).repeat_interleave(2, -2)
        if self.how == "counts":
            self.calls.append(1)
            return out + 1e-6 * len(self.calls)
        if self.how == "double":
            return out.double()
        if self.how == "last":
            return torch.cat((out[:1], out[1:] + 0.01))
        return out


class Model(Toy):
    """The toy, with one thing wrong."""

    def __init__(self, how: str = "") -> None:
        super().__init__()
        self.how, self.calls = how, 0

    def __repr__(self) -> str:
        return f"Model({self.how!r})"

    @property
    def info(self) -> ModelInfo:
        return replace(super().info, upscale=4) if self.how == "scale" else super().info

    def field(self, cond: Condition, options: FieldOptions = FieldOptions()) -> Velocity:
        inner = super().field(cond, options)
        self.calls += 1
        more = 1e-6 * self.calls if self.how == "counts" else 0.0

        def velocity(x: Tensor, sigma: float) -> Tensor:
            v = inner(x, sigma) + more
            if self.how == "last" and len(x) > 1:
                v[1:] += 0.1
            return v[:, :2] if self.how == "shape" else v / 0 if self.how == "infinite" else v

        return velocity

    def encode(self, pixels: Tensor, noise: Tensor | None = None) -> Tensor:
        out = super().encode(pixels, noise)
        return out[..., :-1] if self.how == "encode" else out

    def decode(self, latents: Tensor) -> Tensor:
        out = super().decode(latents)
        if self.how == "dark":
            return out - 0.5
        return out[..., :-1] if self.how == "decode" else out


MORE: list[tuple[str, object, str]] = [
    *(
        ("schedule: floats", Fixed(levels), f"from 1.0 on flux1-dev at 16 tokens: levels must be a tuple of at "
         f"least two finite Python floats, got {levels!r}")
        for levels in ((1.0,), [1.0, 0.0], (1.0, float("nan"), 0.0), (1, 0.0))
    ),
    ("schedule: start", Fixed(), "from 0.6 on flux1-dev at 16 tokens: begins at 1.0"),
    ("schedule: falls", Fixed((1.0, 0.5, 0.6, 0.0)),
     "from 1.0 on flux1-dev at 16 tokens: does not fall strictly, level 3 is 0.6 after 0.5"),
    ("schedule: scales", Longer(), "from 0.6 on flux1-dev at 16 tokens: 6 levels, but 5 from 1"),
    ("solver: point mass", Euler("far"), "a point mass is missed by 0.0042 over [1.0, 0.75, 0.5, 0.25, 0.0]"),
    ("solver: untouched", Euler("velocity"), "it changed the velocity at sigma 0.95 in place; make new tensors"),
    ("solver: untouched", Euler("late"), "it changed the state at sigma 0.799 in place; make new tensors"),
    ("solver: stateless", Euler("shares"),
     "another integration in between changes this one; what it remembers goes through `past`"),
    ("solver: items", Euler("third"), "item 2 alone differs from item 2 of a batch by 0.073"),
    ("solver: evaluations", Euler("points"),
     "it asks for the field at (0.9, 0.76, 0.6200000000000001, 0.4800000000000001, 0.3400000000000001), and "
     "its points say (0.76, 0.6200000000000001, 0.4800000000000001, 0.3400000000000001, 0.20000000000000007)"),
    ("solver: evaluations", Wandering(), "its points are (1.5, 0.5)"),
    ("stage: items", Bad("last"), "item 1 alone differs from item 1 of a batch by 0.01"),
    ("stage: forwards", Bad("elsewhere"), "its plan says evaluations at [0.8], and it asked at [0.9]"),
    ("transition: white", Decodes(), "it gives Pixels 16x16, and a transition gives latents"),
    ("transition: white", Grows("pairs"),
     "from 8x8 at 0.6: noise in cell (2, 2) of channel 1 and cell (2, 3) of channel 1 is correlated by 0.800, not "
     "white"),
    ("transition: white", Grows("loud"),
     "from 8x8 at 0.6: noise has 1.096 of the variance 0.750^2 on the average, from 0.84 to 1.36 of it"),
    ("transition: white", Grows("rows"),
     "from 8x8 at 0.6: noise 1 down and 0 across of cell (0, 0) is correlated by 0.51; it must be white"),
    ("guidance: passes", Guides("twice"), "10 passes are more than `passes` 1 a time"),
    ("guidance: passes", Guides("branches"),
     "fields are asked at [0.1, 0.3, 0.55, 0.8, 1.0], and `branches` says [0.2, 0.6, 1.1, 1.6, 2.0]"),
    ("guidance: items", Guides("last"), "item 1 alone differs from item 1 of a batch by 0.01"),
    ("guidance: untouched", Guides("state"), "it changed the state or a velocity in place; make new tensors"),
    ("noise: kind", Noises("shape"),
     "it gives torch.float32 (8, 2, 16, 24) on cpu, not float32 (8, 4, 16, 24) on the CPU"),
    ("noise: normal", Noises("wide"), "mean 0.002, variance 1.108, fourth moment 3.66; they must be 0, 1 and 3"),
    ("noise: normal", Noises("off"), "mean 0.051, variance 1.005, fourth moment 3.02; they must be 0, 1 and 3"),
    *(("noise: normal", Noises(str(axis)), f"neighbours along axis {axis} are correlated by {told}")
      for axis, told in ((1, 0.51), (2, 0.5), (3, 0.5))),
    ("noise: items", Noises("counts"), "the same seeds give other noise the second time"),
    ("noise: apart", Noises("seeds"), "noise of two seeds is correlated by 1.03"),
    ("cache: forecast", Caches("none"), "it forecasts 0 of 5 evaluations"),
    ("cache: forecast", Caches("short"), "it forecasts 2 of 4 evaluations"),
    ("cache: forecast", Caches("more"), "it forecasts 4 evaluations, and its rule computes 3"),
    ("cache: forecast", Caches("dear"), "a computed evaluation costs 1.6 of a whole one"),
    ("cache: computed", Caches(), "Caches(how='', threshold=0.0) has threshold 0 and leaves out blocks"),
    ("cache: counted", Caches("counts twice"), "3 of 5 evaluations are computed, and it counts 8 of 10"),
    ("upscaler: scale", Ups("double"), "it makes torch.float64 (2, 3, 24, 40) of a 12x20 picture, and `scale` says 2"),
    ("upscaler: untouched", Ups("counts"), "two calls differ"),
    ("backbone: prompts", Model("scale"), "`upscaler` has another scale than `info.upscale`"),
    ("backbone: velocity", Model("shape"),
     "the velocity of latents (2, 3, 8, 12) has shape (2, 2, 8, 12), or is not finite"),
    ("backbone: velocity", Model("infinite"),
     "the velocity of latents (2, 3, 8, 12) has shape (2, 3, 8, 12), or is not finite"),
    ("backbone: velocity", Model("counts"), "two fresh fields differ at the same latents"),
    ("backbone: items", Model("last"), "item 1 alone differs from item 1 of a batch by 0.1"),
    ("backbone: pictures", Model("encode"), "(16, 24) pixels encode to (2, 3, 8, 11), not (2, 3, 8, 12)"),
    ("backbone: pictures", Model("decode"), "they decode to (2, 3, 16, 23), not (2, 3, 16, 24)"),
    ("backbone: pictures", Model("dark"), "decoded pixels must be clamped to [0, 1]"),
]  # fmt: skip
NEVER = ("demand(torch.equal(r.data, kept), 'it changed the tensor it was given; work on a copy')",)
"""The runner sees it first; this holds where it does not look."""
BY_NAME = {f"{law.kind}: {law.name}": law for law in LAWS}


def say(name: str, subject: object) -> tuple[str, ast.Call]:
    """What a law says of a plug-in that breaks it, without the first words, and the demand that it did not meet."""
    law = BY_NAME[name]
    with pytest.raises(LawBroken) as caught:
        law.hold(subject, **SETTINGS.get(name, SETTINGS.get(law.kind, {})))
    start = f"{subject!r} breaks the law of {law.kind}s {law.name!r}: "
    assert str(caught.value).startswith(start)
    cause = caught.value.__context__
    assert cause is not None and cause.__traceback__ is not None
    frames, trace = [], cause.__traceback__
    while trace:
        frames.append((trace.tb_frame.f_code.co_filename, trace.tb_lineno))
        trace = trace.tb_next  # type: ignore[assignment]
    file, line = next((file, line) for file, line in reversed(frames) if Path(file).name.startswith("of_"))
    site = min((d for d in demands(file) if d.lineno <= line <= (d.end_lineno or 0)), key=lambda d: -d.lineno)
    return str(caught.value).removeprefix(start), site


@cache
def demands(file: str) -> tuple[ast.Call, ...]:
    """Every place in a file that demands something, or refuses outright."""
    tree = ast.parse(Path(file).read_text(encoding="utf-8"))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
    return tuple(c for c in calls if c.func.id in ("demand", "LawBroken"))  # type: ignore[attr-defined]


NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e[+-]\d+)?")


def same(got: str, want: str) -> bool:
    """The same words and whole numbers; others to 3 %, or to the last digit that is written."""
    if NUMBER.sub("#", got) != NUMBER.sub("#", want):
        return False
    pairs = zip(NUMBER.findall(got), NUMBER.findall(want), strict=True)

    def near(a: str, b: str) -> bool:
        if not {".", "e"} & {*b}:
            return a == b
        last = 10.0 ** -len(b.partition(".")[2]) if "e" not in b else 0.0
        return float(a) == pytest.approx(float(b), rel=0.03, abs=1.1 * last)

    return all(near(a, b) for a, b in pairs)


ROOMS: dict[ModuleType, tuple[str, ...]] = {
    of_schedules: ("schedule",),
    of_solvers: ("solver",),
    of_stages: ("stage", "transition"),
    of_caches: ("cache",),
    of_slots: ("guidance", "noise", "upscaler", "backbone"),
}


@cache
def broken(room: ModuleType) -> tuple[tuple[str, str, ast.Call], ...]:
    """Of each plug-in that breaks a law of this room: what is said, what should be, and the demand it did not meet."""
    own = [(name, COUNTEREXAMPLES[name], WORDS[name]) for name in BY_NAME]
    rows = [row for row in (*own, *MORE) if BY_NAME[row[0]].kind in ROOMS[room]]
    said = [(f"{subject!r}: ", f"{subject!r}: {want}", say(name, subject)) for name, subject, want in rows]
    return tuple((start + text, want, site) for start, want, (text, site) in said)


@pytest.mark.parametrize("room", ROOMS, ids=lambda room: room.__name__)
def test_whatever_breaks_a_law_is_caught_and_said(room: ModuleType) -> None:
    wrong = [(said, want) for said, want, _ in broken(room) if not same(said, want)]
    assert not wrong


@pytest.mark.parametrize("room", ROOMS, ids=lambda room: room.__name__)
def test_every_demand_is_missed_by_some_plug_in(room: ModuleType) -> None:
    missed = {site for *_, site in broken(room)}
    never = {ast.unparse(site) for site in demands(str(room.__file__)) if site not in missed}
    assert never <= {*NEVER}


@dataclass(frozen=True)
class Looks(mf.Stage[mf.Latents, mf.Latents]):
    """Notes what it is planned for, and for which model; `clean` makes it larger and leaves no noise."""

    clean: bool = False
    seen: ClassVar[list[tuple[int, int, ModelInfo]]] = []

    def plan(self, spec: mf.Latents, model: ModelInfo) -> mf.Latents:
        self.seen.append((spec.height, spec.width, model))
        return replace(spec, height=2 * spec.height, width=2 * spec.width, sigma=0.0) if self.clean else spec

    def apply(self, state: mf.State[mf.Latents], out: mf.Latents, ctx: mf.Context) -> Tensor:
        if self.clean:  # blocks of two keep the low cosines
            return state.data.repeat_interleave(2, -1).repeat_interleave(2, -2) / (1 - state.spec.sigma)
        return state.data.clone()


@pytest.mark.parametrize("law", of_stages.STAGE_LAWS, ids=lambda law: law.name)
def test_stages_are_held_to_laws_on_what_is_given(law: Law) -> None:
    Looks.seen.clear()
    model = mf.toy(positions=True)
    law.hold(Looks(), spec=mf.Latents(2, 12, 20, model.info.space, 0.3), model=model)
    assert {(height, width) for height, width, _ in Looks.seen} == {(12, 20)}
    assert all(info.capabilities == model.info.capabilities for *_, info in Looks.seen)


def test_a_transition_to_clean_latents_has_no_noise_that_could_be_white() -> None:
    check_transition(Looks(clean=True))


def test_the_noise_of_large_transitions_is_known_by_samples() -> None:
    law = BY_NAME["transition: white"]
    with pytest.raises(LawBroken) as large:
        law.hold(SpoiledGrowth("noise"), sigma=0.6, size=(16, 16))
    want = "from 16x16 at 0.6: noise has 0.997 of the variance 0.750^2 on the average, from 0.15 to 2.24 of it"
    assert same(str(large.value).partition("'white': ")[2], want), large.value


def test_a_model_of_unknown_sizes_has_57_blocks_to_a_cache() -> None:
    with pytest.raises(LawBroken, match="its span of 57 blocks is from 1 to 58"):
        BY_NAME["cache: span"].hold(SpoiledCache("span"), info=replace(FLUX, architecture=None))


def test_a_stage_that_breaks_its_promise_at_every_size_is_told_so_by_the_runner() -> None:
    with pytest.raises(PromiseError, match=r"promised Latents 16x24 .* but made a tensor of shape \(2, 3, 16, 23\)$"):
        check_stage(Bad("cropped"))

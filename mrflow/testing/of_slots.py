"""The laws of guidances, noises, upscalers and backbones."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mrflow._checks import check_sides
from mrflow.backbone import Backbone, Condition, FieldOptions, Wrapper
from mrflow.errors import PlanError
from mrflow.flow import Velocity
from mrflow.guidance import Guidance
from mrflow.noise import Noise
from mrflow.protocols.upscaler import Upscaler
from mrflow.testing.laws import Laws, demand
from mrflow.testing.toy import toy

POINTS = (1.0, 0.8, 0.55, 0.3, 0.1)
ALONE = "a picture depends on (chain, model, prompt, seed) alone: `mrflow.run`"


GUIDANCE_LAWS = Laws("guidance", "the contract of `mrflow.Guidance`", lambda *given, **how: _Guided(*given, **how))


def check_guidance(guidance: Guidance, *, model: Backbone | None = None) -> None:
    """Hold a guidance to the laws of guidances in `LAWS`, on `model` (default: the toy, which has no embedding).

    Raises:
        LawBroken: naming the law. PlanError: the guidance refuses the model.
    """
    GUIDANCE_LAWS.hold(guidance, model=model)


NOISE_LAWS = Laws("noise", "the contract of `mrflow.noise.Noise`")


def check_noise(noise: Noise) -> None:
    """Hold a source of noise to the laws of noises in `LAWS`.

    Raises:
        LawBroken: naming the law and what was measured.
    """
    NOISE_LAWS.hold(noise)


UPSCALER_LAWS = Laws("upscaler", "the contract of `mrflow.Upscaler`")


def check_upscaler(upscaler: Upscaler) -> None:
    """Hold an upscaler to the laws of upscalers in `LAWS`, on small pictures that are not square.

    Raises:
        LawBroken: naming the law and what was measured.
    """
    UPSCALER_LAWS.hold(upscaler)


BACKBONE_LAWS = Laws("backbone", "the contract of `mrflow.Backbone`", lambda *given, **how: _Model(*given, **how))


def check_backbone(model: Backbone, *, size: tuple[int, int] | None = None) -> None:
    """Hold a model to the laws of backbones in `LAWS`; `size` is a picture's (height, width) in pixels.

    The default is 4 tokens down and 6 across.

    Raises:
        LawBroken: naming the law and what was measured.
    """
    BACKBONE_LAWS.hold(model, size=size)


class Watched(Wrapper):
    """A model that tells of every evaluation of its fields: their options, the latents, sigma and the velocity."""

    def __init__(self, model: Backbone, tell: Callable[[FieldOptions, Tensor, float, Tensor], object]) -> None:
        super().__init__(model)
        self.tell = tell

    def field(self, cond: Condition, options: FieldOptions = FieldOptions()) -> Velocity:
        """The model's field, watched."""
        inner = self.model.field(cond, options)

        def watched(x: Tensor, sigma: float) -> Tensor:
            v = inner(x, sigma)
            self.tell(options, x, sigma, v)
            return v

        return watched


class _Guided:
    """A guidance on a model: both conditions, and latents."""

    def __init__(self, guidance: Guidance, model: Backbone | None) -> None:
        self.guidance, self.model = guidance, Watched(model or toy(), self.keep)
        self.asked: list[float] = []
        self.gave: list[tuple[Tensor, Tensor]] = []
        self.cond, self.negative = self.model.condition(["a", "b"]), self.model.condition([""])
        patch, channels = self.model.info.space.patch, self.model.info.space.channels
        shape = (2, channels, 4 * patch, 6 * patch)
        self.x = torch.randn(shape, generator=torch.Generator().manual_seed(0))

    def keep(self, options: FieldOptions, x: Tensor, sigma: float, v: Tensor) -> None:
        self.asked += [sigma] * (1 + len(options.beside))
        self.gave.append((v, v.clone()))

    def __call__(self, cond: Condition, negative: Condition | None, x: Tensor) -> list[Tensor]:
        field = self.guidance.field(self.model, cond, negative, FieldOptions(sigmas=POINTS))
        return [field(x, sigma).clone() for sigma in POINTS]


@GUIDANCE_LAWS.law("same branches", "c = u => u + w (c - u) = c", "Ho & Salimans 2022, arXiv 2207.12598")
def _same_branches(g: _Guided) -> None:
    """Where both prompts are the same, guidance changes nothing."""
    field = g.model.field(g.cond.item(0))
    for got, sigma in zip(g(g.cond.item(0), g.cond.item(0), g.x[:1]), POINTS, strict=True):
        error = float((got - field(g.x[:1], sigma)).abs().max())
        text = f"where both prompts are the same it is off the model's field by {error:.2g} at sigma {sigma:g}"
        demand(error < 1e-3, text)


@GUIDANCE_LAWS.law("passes", "evals = sum of |branch|", "what `plan` counts: `mrflow.Plan.nfe`")
def _passes(g: _Guided) -> None:
    """It asks the model as often, and where, as `evals` and `branches` say."""
    g(g.cond, g.negative, g.x)
    made, said = len(g.asked), g.guidance.evals(POINTS)
    demand(made == said, f"{len(POINTS)} evaluations take {made} passes, and `evals` says {said}")
    demand(made <= g.guidance.passes * len(POINTS), f"{made} passes are more than `passes` {g.guidance.passes} a time")
    asked = sorted(g.asked)
    branches = sorted(sigma for branch in g.guidance.branches(POINTS) for sigma in branch)
    demand(asked == branches, f"fields are asked at {asked}, and `branches` says {branches}")


@GUIDANCE_LAWS.law("items", "v(x)_i = v(x_i)", ALONE)
def _guidance_items(g: _Guided) -> None:
    """An item of a batch is what it is alone."""
    whole = g(g.cond, g.negative, g.x)
    for i in range(2):
        for got, both in zip(g(g.cond.item(i), g.negative, g.x[i : i + 1]), whole, strict=True):
            error = float((got - both[i : i + 1]).abs().max())
            demand(error < 1e-3, f"item {i} alone differs from item {i} of a batch by {error:.2g}")


@GUIDANCE_LAWS.law("fresh", "field() = field()")
def _guidance_fresh(g: _Guided) -> None:
    """Each integration has a field of its own."""
    one = g(g.cond, g.negative, g.x)
    g(g.cond, g.negative, -g.x)
    same = all(torch.equal(a, b) for a, b in zip(one, g(g.cond, g.negative, g.x), strict=True))
    demand(same, "a second integration gives something else; what it remembers must lie in the field")


@GUIDANCE_LAWS.law("untouched", "v' is a new tensor")
def _guidance_untouched(g: _Guided) -> None:
    """It changes no tensor that it is given."""
    kept = g.x.clone()
    g(g.cond, g.negative, g.x)
    same = torch.equal(g.x, kept) and all(torch.equal(now, then) for now, then in g.gave)
    demand(same, "it changed the state or a velocity in place; make new tensors")


SHAPE = (8, 4, 16, 24)


def _draw(noise: Noise, seeds: Sequence[int] = range(8), draw: int = 0) -> Tensor:
    return noise(list(seeds), (len(seeds), *SHAPE[1:]), scope="law/0", draw=draw)


@NOISE_LAWS.law("kind", "n in R^shape", "so that every device sees the same: `mrflow.noise`")
def _noise_kind(noise: Noise) -> None:
    """Noise is float32 of the shape asked for, on the CPU."""
    x = _draw(noise)
    ok = tuple(x.shape) == SHAPE and x.dtype == torch.float32 and x.device.type == "cpu"
    demand(ok, f"it gives {x.dtype} {tuple(x.shape)} on {x.device}, not float32 {SHAPE} on the CPU")


@NOISE_LAWS.law("normal", "E n = 0, E n n^T = I, E n^4 = 3", "x(1) ~ N(0, I): arXiv 2209.03003")
def _normal(noise: Noise) -> None:
    """Noise is standard normal and white."""
    x = _draw(noise, range(32)).double()
    mean, variance, fourth = float(x.mean()), float(x.var()), float(x.pow(4).mean())
    ok = abs(mean) < 0.03 and abs(variance - 1) < 0.05 and abs(fourth - 3) < 0.3
    demand(ok, f"mean {mean:.3f}, variance {variance:.3f}, fourth moment {fourth:.2f}; they must be 0, 1 and 3")
    for axis in (1, 2, 3):
        together = float((x.narrow(axis, 1, x.shape[axis] - 1) * x.narrow(axis, 0, x.shape[axis] - 1)).mean())
        demand(abs(together) < 0.05, f"neighbours along axis {axis} are correlated by {together:.2f}")


@NOISE_LAWS.law("items", "n(seeds)_i = n(seed_i)", ALONE)
def _noise_items(noise: Noise) -> None:
    """An item's noise depends on its seed alone."""
    x = _draw(noise)
    demand(torch.equal(x, _draw(noise)), "the same seeds give other noise the second time")
    same = all(torch.equal(_draw(noise, [i]), x[i : i + 1]) for i in (0, 3, 7))
    demand(same, "an item's noise depends on its neighbours in the batch")


@NOISE_LAWS.law("apart", "E n(a) n(b) = 0, a != b")
def _apart(noise: Noise) -> None:
    """Seeds and draws are independent."""
    one, two = _draw(noise, range(32)), _draw(noise, range(32), draw=1)
    for what, a, b in (("seeds", one[:-1], one[1:]), ("draws", one, two)):
        together = float((a * b).mean())
        demand(abs(together) < 0.05, f"noise of two {what} is correlated by {together:.2f}")


@NOISE_LAWS.law("own generator", "state' = state")
def _own_generator(noise: Noise) -> None:
    """The global generator is left alone."""
    before = torch.get_rng_state()
    _draw(noise)
    demand(torch.equal(torch.get_rng_state(), before), "it draws from the global generator; make one for each item")


def _picture(batch: int = 2) -> Tensor:
    return torch.rand(batch, 3, 12, 20, generator=torch.Generator().manual_seed(0))


def _up(upscaler: Upscaler, pixels: Tensor) -> Tensor:
    with torch.inference_mode():
        return upscaler(pixels)


@UPSCALER_LAWS.law("scale", "(h, w) -> (k h, k w)")
def _scale(upscaler: Upscaler) -> None:
    """Both sides are multiplied by `scale`, also where a picture is not square."""
    out, k = _up(upscaler, _picture()), upscaler.scale
    ok = tuple(out.shape) == (2, 3, 12 * k, 20 * k) and out.dtype == torch.float32
    demand(ok, f"it makes {out.dtype} {tuple(out.shape)} of a 12x20 picture, and `scale` says {k}")


@UPSCALER_LAWS.law("items", "u(x)_i = u(x_i)", ALONE)
def _upscaler_items(upscaler: Upscaler) -> None:
    """An item of a batch is what it is alone."""
    both, x = _up(upscaler, _picture()), _picture()
    for i in range(2):
        error = float((_up(upscaler, x[i : i + 1]) - both[i : i + 1]).abs().max())
        demand(error < 1e-3, f"item {i} alone differs from item {i} of a batch by {error:.2g}")


@UPSCALER_LAWS.law("untouched", "u(x) = u(x)")
def _upscaler_untouched(upscaler: Upscaler) -> None:
    """It does not change its input, and gives the same again."""
    x = _picture()
    kept = x.clone()
    one = _up(upscaler, x)
    demand(torch.equal(x, kept), "it changed the picture that it was given; make a new tensor")
    demand(torch.equal(one, _up(upscaler, x)), "two calls differ")


@UPSCALER_LAWS.law("coarse", "mean_k(u(x)) = x", "super-resolution leaves the low frequencies: arXiv 2607.01642")
def _coarse(upscaler: Upscaler) -> None:
    """A smooth picture, reduced again, is the picture."""
    down, across = torch.linspace(0.1, 0.9, 12)[:, None], torch.linspace(0.2, 0.7, 20)
    x = torch.stack((0.5 * down + 0.5 * across, 0.7 - 0.5 * down + 0 * across, 0.1 + across + 0 * down))[None]
    out = torch.nn.functional.avg_pool2d(_up(upscaler, x).clamp(0, 1), upscaler.scale)
    error = float((out - x).abs().mean())
    demand(error < 0.05, f"reduced to its old size, a smooth picture is off by {error:.3f} on the average")


class _Model:
    """A model with two prompts and latents that are not square."""

    def __init__(self, model: Backbone, size: tuple[int, int] | None) -> None:
        self.model, space = model, model.info.space
        self.size = check_sides("size", size, (4 * space.multiple, 6 * space.multiple))
        self.cond = model.condition(["a red circle", "a dog"])
        self.shape = (2, space.channels, self.size[0] // space.downscale, self.size[1] // space.downscale)
        self.x = torch.randn(self.shape, generator=torch.Generator().manual_seed(0)).to(model.device)

    def velocity(self, items: slice = slice(None), x: Tensor | None = None) -> Tensor:
        cond = self.cond if items == slice(None) else self.cond.item(items.start)
        with torch.inference_mode():
            return self.model.field(cond)((self.x if x is None else x)[items], 0.7)


@BACKBONE_LAWS.law("prompts", "|condition| = |prompts|")
def _prompts(m: _Model) -> None:
    """Each prompt is one item; the upscaler is the one that its facts name."""
    demand(m.cond.batch == 2, f"two prompts are encoded as {m.cond.batch}")
    net = m.model.upscaler
    demand(net is None or net.scale == m.model.info.upscale, "`upscaler` has another scale than `info.upscale`")


@BACKBONE_LAWS.law("velocity", "v(x, sigma) = E[eps - x0 | x]", "arXiv 2210.02747")
def _velocity(m: _Model) -> None:
    """A field is a function of the latents, finite and of their shape."""
    kept = m.x.clone()
    v = m.velocity()
    ok = v.shape == m.x.shape and bool(torch.isfinite(v).all())
    demand(ok, f"the velocity of latents {m.shape} has shape {tuple(v.shape)}, or is not finite")
    demand(torch.equal(m.x, kept), "its field changed the latents in place")
    demand(torch.equal(v, m.velocity()), "two fresh fields differ at the same latents")


@BACKBONE_LAWS.law("items", "v(x)_i = v(x_i)", ALONE)
def _backbone_items(m: _Model) -> None:
    """An item of a batch is what it is alone."""
    v = m.velocity()
    bound = 1e-3 * float(v.abs().max())
    for i in range(2):
        error = float((m.velocity(slice(i, i + 1)) - v[i : i + 1]).abs().max())
        demand(error <= bound, f"item {i} alone differs from item {i} of a batch by {error:.2g}")


@BACKBONE_LAWS.law("pictures", "(h, w) -> (h / downscale, w / downscale) -> (h, w)")
def _pictures(m: _Model) -> None:
    """Pictures become latents of its space and come back as pixels in [0, 1]."""
    pixels = torch.rand(2, 3, *m.size, generator=torch.Generator().manual_seed(0)).to(m.model.device)
    with torch.inference_mode():
        latents = m.model.encode(pixels)
        back = m.model.decode(latents)
    demand(tuple(latents.shape) == m.shape, f"{m.size} pixels encode to {tuple(latents.shape)}, not {m.shape}")
    demand(back.shape == pixels.shape, f"they decode to {tuple(back.shape)}, not {tuple(pixels.shape)}")
    demand(float(back.min()) >= 0 and float(back.max()) <= 1, "decoded pixels must be clamped to [0, 1]")


@BACKBONE_LAWS.law("refuses", "needs <= capabilities")
def _refuses(m: _Model) -> None:
    """`check` refuses what its facts say that it cannot."""
    if m.model.info.capabilities.together:
        return
    try:
        m.model.check(FieldOptions(beside=(m.model.condition(["a"]),)))
    except PlanError:
        return
    demand(kept=False, text="its facts say one condition at a time, and `check` takes two; call info.require")

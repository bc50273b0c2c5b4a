"""The laws of stages, and of those among them that are transitions between resolutions."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from mrflow.backbone import Backbone, Condition, FieldOptions
from mrflow.errors import PlanError, PromiseError
from mrflow.model_info import ModelInfo
from mrflow.noise import Noise, PerItem
from mrflow.runner import run
from mrflow.spec import Latents, Pixels, Spec, Start, State
from mrflow.stage import AnyChain, AnyStage, Context
from mrflow.testing.laws import Laws, demand
from mrflow.testing.of_slots import Watched
from mrflow.testing.toy import Toy, toy

LINE = "x = (1 - sigma) x0 + sigma eps: arXiv 2209.03003"
STAGE_LAWS = Laws("stage", "the contract of `mrflow.Stage`", lambda *given, **how: _Run(*given, **how))


def check_stage(stage: AnyStage, *, spec: Spec | None = None, model: Toy | None = None) -> None:
    """Hold a stage to the laws of stages in `LAWS`, on a toy model with an exact flow.

    `spec` is what it is given (default: a batch of two of the kind it takes, higher than wide if its plan agrees).

    Raises:
        LawBroken: naming the law. MrflowError: the plan refuses, or a promise is broken.
    """
    STAGE_LAWS.hold(stage, spec=spec, model=model)


def input_for(stage: AnyStage, model: ModelInfo) -> Spec:
    """A value that a stage takes: not square, where its plan agrees; clean, where its plan agrees.

    Raises:
        PlanError: it takes a kind of its own, or nothing that was tried.
    """
    takes, space = stage.takes, model.space
    sizes = ((16, 24), (16, 16))
    if issubclass(takes, Pixels):
        tried: list[Spec] = [Pixels(2, 2 * h, 2 * w) for h, w in sizes]
    elif issubclass(takes, Start):
        tried = [Start(2)]
    elif issubclass(takes, Latents):
        tried = [Latents(2, h, w, space, sigma) for h, w in sizes for sigma in (0.0, 0.3)]
    else:
        raise PlanError(f"{type(stage).__name__} takes {takes.__name__}; say what it is given with spec=")
    refused: PlanError | None = None
    for each in tried:
        try:
            stage.plan(each, model)
        except PlanError as error:
            refused = refused or error
        else:
            return each
    assert refused is not None
    raise refused


def with_batch(spec: Spec, batch: int) -> Spec:
    """The same facts for another batch."""
    return replace(spec, batch=batch)  # type: ignore[type-var]  # pyright: ignore


class _Run:
    """A stage, what it is given, and a run of it over some items of a batch."""

    def __init__(self, stage: AnyStage, spec: Spec | None, model: Toy | None) -> None:
        self.stage, self.model = stage, model or toy()
        self.spec = spec or input_for(stage, self.model.info)
        generator = torch.Generator().manual_seed(0)
        data = torch.rand(self.spec.shape, generator=generator)
        self.data = data if isinstance(self.spec, Pixels) else 2 * data - 1

    def __call__(self, items: slice = slice(None), model: Backbone | None = None) -> Tensor:
        seeds = list(range(self.spec.batch))[items]
        start: State[Spec] = State(with_batch(self.spec, len(seeds)), self.data[items])
        prompts = [f"prompt {i}" for i in seeds]
        return run(AnyChain((self.stage,)), model or self.model, prompts, seed=seeds, start=start).data


@STAGE_LAWS.law("plan", "plan(a) = plan(a)")
def _plan(r: _Run) -> None:
    """A plan depends on its arguments alone."""
    same = r.stage.plan(r.spec, r.model.info) == r.stage.plan(r.spec, r.model.info)
    demand(same, f"two plans for {r.spec} differ; plan must depend on its arguments alone")


@STAGE_LAWS.law("untouched", "x' is a new tensor")
def _untouched(r: _Run) -> None:
    """It does not change the tensor that it is given."""
    kept = r.data.clone()
    try:
        r()
    except PromiseError as broken:  # the runner looks too
        demand("changed the tensor" not in str(broken), str(broken))
        raise
    demand(torch.equal(r.data, kept), "it changed the tensor it was given; work on a copy")


@STAGE_LAWS.law("promise", "shape(apply) = plan.shape")
def _promise(r: _Run) -> None:
    """It makes what its plan says, also where a picture is not square."""
    try:
        r()
    except PromiseError as broken:
        if isinstance(r.spec, Start) or r.spec.shape[-1] == r.spec.shape[-2]:
            raise
        square = replace(r.spec, width=r.spec.shape[-2])  # type: ignore[type-var]  # pyright: ignore
        try:
            _Run(r.stage, square, r.model)()
        except PromiseError:
            raise broken from None
        demand(kept=False, text=f"it works for {square}, but not for {r.spec}: {broken}")


@STAGE_LAWS.law("seed", "apply(x, seed) = apply(x, seed)")
def _seed(r: _Run) -> None:
    """The same seed gives the same picture."""
    demand(torch.equal(r(), r()), "two runs with one seed differ; draw noise with ctx.noise")


@STAGE_LAWS.law("items", "apply(x)_i = apply(x_i)")
def _items(r: _Run) -> None:
    """An item of a batch is what it is alone."""
    whole = r()
    for i in range(r.spec.batch):
        error = float((r(slice(i, i + 1)) - whole[i : i + 1]).abs().max()) if whole.numel() else 0.0
        demand(error <= 1e-4, f"item {i} alone differs from item {i} of a batch by {error:.2g}")


def _parts(options: FieldOptions) -> int:
    return options.positions.parts if options.positions else 1


@STAGE_LAWS.law("forwards", "Work.nfe = forwards / batch", "the contract of `mrflow.Plan`")
def _forwards(r: _Run) -> None:
    """It asks the model as often, and at those noise levels, as its plan says."""
    row = r.stage.plan_row(r.spec, r.model.info)
    asked: list[float] = []  # once for each item

    def count(options: FieldOptions, x: Tensor, sigma: float, v: Tensor) -> None:
        asked.extend([sigma] * (len(x) * (1 + len(options.beside)) * _parts(options)))

    r(model=Watched(r.model, count))
    if not row.work.estimated:
        made = len(asked) / r.spec.batch
        demand(made == row.work.nfe, f"its plan says {row.work.nfe} forwards a picture, and it made {made:g}")
    if row.evaluations:
        at, said = set(asked), set(row.evaluations)
        demand(at == said, f"its plan says evaluations at {sorted(said)}, and it asked at {sorted(at)}")


STD = 0.002


class _Plain(Toy):
    """The toy with one colour instead of two: latents are that colour with noise of a known deviation."""

    def condition(self, prompts: Sequence[str]) -> Condition:
        """One colour for all prompts."""
        colour = torch.tensor([0.3, -0.2, 0.1]).expand(len(prompts), 2, 3)
        return Condition({"colours": colour.contiguous().to(self.device)})


def _on_plain(r: _Run) -> tuple[Tensor, Latents, Tensor, dict[float, list[Tensor]]]:
    """What a stage makes of a batch of plain pictures of deviation `STD` round one colour; its plan, the colour, and
    the latents, item by item, that the model was given at each level.
    """
    plain = _Plain(std=STD, positions=r.model.info.capabilities.positions)
    asked: dict[float, list[Tensor]] = {}

    def keep(options: FieldOptions, x: Tensor, sigma: float, v: Tensor) -> None:
        for part in x.chunk(_parts(options), -1):  # they may overlap
            asked.setdefault(sigma, []).extend(part)

    first = with_batch(r.spec, 32)
    out = r.stage.plan(first, plain.info)
    assert isinstance(out, Latents)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(first.shape, generator=generator)
    data = (0.5 + 0.01 * noise).clamp(0, 1)
    colour = plain.condition([""])["colours"][0, 0, :, None, None]
    if isinstance(first, Latents):
        clean = colour + STD * torch.randn(first.shape, generator=generator)
        data = (1 - first.sigma) * clean + first.sigma * noise
    start: State[Spec] = State(first, data)
    made = run(AnyChain((r.stage,)), Watched(plain, keep), [""] * 32, seed=list(range(32)), start=start).data
    return made, out, colour[..., 0], asked


def _deviation(sigma: float) -> float:
    return math.sqrt((1 - sigma) ** 2 * STD**2 + sigma**2)


@STAGE_LAWS.law("level", "Var x = (1 - sigma')^2 std^2 + sigma'^2", LINE)
def _level(r: _Run) -> None:
    """Latents hold the noise that the plan says."""
    if not issubclass(r.stage.gives, Latents):
        return
    made, out, *_ = _on_plain(r)
    got, want = float(made.var(0).mean().sqrt()), _deviation(out.sigma)
    ok = abs(got - want) < 0.03 + 0.06 * out.sigma
    demand(
        ok, f"its plan says sigma {out.sigma:g}, so that pictures differ by {want:.3f}, and they differ by {got:.3f}"
    )


@STAGE_LAWS.law(
    "marginals",
    "Var x_i = Var (sum x_i) / n = (1 - sigma)^2 std^2 + sigma^2 at every evaluation",
    LINE,
)
def _marginals(r: _Run) -> None:
    """Wherever it asks the model, the latents hold noise of that level, and white noise."""
    if not issubclass(r.stage.gives, Latents):
        return
    _, _, colour, asked = _on_plain(r)
    for sigma, rows in asked.items():
        cells = [(row.flatten(1) - (1 - sigma) * colour) / _deviation(sigma) for row in rows]
        each = torch.cat([row.flatten() for row in cells])
        sums = torch.stack([row.sum(1) / math.sqrt(row.shape[1]) for row in cells])
        text = (
            f"asked at sigma {sigma:.4g}, the model was given latents whose cells have "
            f"{float(each.square().mean()):.3f} of the variance there, and whose sums over a picture have "
            f"{float(sums.square().mean()):.2f} of it"
        )
        demand(abs(float(each.square().mean()) - 1) <= 0.06 and abs(float(sums.square().mean()) - 1) <= 0.6, text)


TRANSITION_LAWS = Laws("transition", LINE, lambda *given, **how: _Transition(*given, **how))


def check_transition(stage: AnyStage, *, sigma: float = 0.6, size: tuple[int, int] = (8, 8)) -> None:
    """Hold a stage from noisy latents to larger ones to the laws of transitions in `LAWS`.

    Its plan says a level sigma'. From latents of `size` cells (each at least 4) at `sigma`, pictures must come out as
    (1 - sigma') of themselves, the same way up, and pure noise as white noise of variance sigma'^2. Where the stage is
    linear in what it is given and in its noise, its covariance is computed exactly, from unit responses.

    Raises:
        LawBroken: naming the law and what was measured. PlanError: the stage refuses the latents.
    """
    TRANSITION_LAWS.hold(stage, sigma=sigma, size=size)


class _Transition:
    """A stage from latents to latents, as it is from `size` at `sigma`."""

    def __init__(self, stage: AnyStage, sigma: float, size: tuple[int, int], batch: int = 96) -> None:
        self.stage, self.model = stage, toy()
        self.given = Latents(batch, *size, self.model.info.space, sigma)
        planned = stage.plan(self.given, self.model.info)
        demand(isinstance(planned, Latents), f"it gives {planned}, and a transition gives latents")
        self.out: Latents = planned
        self.where = f"from {size[0]}x{size[1]} at {sigma:g}"

    def run(self, data: Tensor, first: int = 0) -> Tensor:
        """What comes out of `data`, with noise from seed `first` on."""
        seeds, given = list(range(first, first + len(data))), replace(self.given, batch=len(data))
        return run(AnyChain((self.stage,)), self.model, [""] * len(data), seed=seeds, start=State(given, data)).data

    def respond(self, data: Tensor, draws: Callable[[tuple[int, ...], int], Tensor]) -> Tensor:
        """What comes out of `data` where the n-th call for noise gives draws(shape, n)."""
        given = replace(self.given, batch=len(data))
        seeds, cond = tuple(range(len(data))), self.model.condition([""]).repeat(len(data))
        context = _Unit(self.model, cond, None, seeds, "law", draws=draws)
        with torch.inference_mode():
            return self.stage.apply(State(given, data.clone()), replace(self.out, batch=len(data)), context)

    def linear(self) -> list[tuple[int, ...]] | None:
        """The shapes of noise, without the batch, that it asks for where it is linear in data and noise; else None."""
        generator = torch.Generator().manual_seed(3)
        shapes: list[tuple[int, ...]] = []
        pair = torch.randn(2, *self.given.shape[1:], generator=generator)
        kept: dict[int, Tensor] = {}

        def draws(shape: tuple[int, ...], n: int) -> Tensor:
            if n not in kept:
                kept[n] = torch.randn(2, *shape[1:], generator=generator)
                shapes.append(shape[1:])
            one, two = kept[n]
            return torch.stack((one, two, one + two, torch.zeros_like(one)))

        data = torch.stack((pair[0], pair[1], pair[0] + pair[1], torch.zeros_like(pair[0])))
        one, two, both, none = self.respond(data, draws)
        near = torch.allclose(both + none, one + two, atol=1e-4, rtol=1e-4)
        return shapes if near else None

    def covariance(self, shapes: Sequence[tuple[int, ...]]) -> Tensor:
        """The covariance of a linear one's output, from white data of variance sigma^2 and white noise, exactly."""
        rows = math.prod(self.given.shape[1:])
        zero = self.respond(torch.zeros(1, *self.given.shape[1:]), lambda shape, n: torch.zeros(shape))
        unit = self.given.sigma * torch.eye(rows).view(rows, *self.given.shape[1:])
        all_responses = [self.respond(unit, lambda shape, n: torch.zeros(shape))]
        for index, shape in enumerate(shapes):
            count = math.prod(shape)
            hit = torch.eye(count).view(count, *shape)
            still = torch.zeros(count, *self.given.shape[1:])
            all_responses.append(
                self.respond(still, lambda shape, n, i=index, hit=hit: hit if n == i else torch.zeros(shape))  # type: ignore[misc]
            )
        response = (torch.cat(all_responses) - zero).flatten(1).double()
        return response.T @ response


@dataclass(frozen=True)
class _Unit(Context):
    """A context whose noise is chosen: `draws` gives that of the n-th call."""

    draws: Callable[[tuple[int, ...], int], Tensor] = field(default=lambda shape, n: torch.zeros(shape))
    called: list[tuple[int, ...]] = field(default_factory=list[tuple[int, ...]])

    def noise(self, shape: tuple[int, ...], *, source: Noise = PerItem(), draw: int = 0) -> Tensor:
        """What was chosen for this call."""
        self.called.append(tuple(shape))
        return self.draws(tuple(shape), len(self.called) - 1)


def _mode(k: int, m: int, height: int, width: int) -> Tensor:
    """The cosine of k half-waves down and m across, of amplitude 1, on a grid of any size."""
    down = torch.cos(torch.pi * k * (torch.arange(height) + 0.5) / height)
    across = torch.cos(torch.pi * m * (torch.arange(width) + 0.5) / width)
    return down[:, None] * across


def _kept(t: _Transition, k: int, m: int) -> list[tuple[float, float]]:
    """For each channel, what is left of a low mode, and what should be: (1 - sigma') of its amplitude."""
    channels, (h, w) = t.given.shape[1], t.given.shape[-2:]
    amplitudes = [(-0.6) ** c for c in range(channels)]
    picture = torch.stack([a * _mode(k, m, h, w) for a in amplitudes])
    made = t.run(((1 - t.given.sigma) * picture).expand(t.given.shape).contiguous()).mean(0)
    large = _mode(k, m, t.out.height, t.out.width)
    found = [float((made[c] * large).sum() / large.square().sum()) for c in range(channels)]
    return list(zip(found, [(1 - t.out.sigma) * a for a in amplitudes], strict=True))


@TRANSITION_LAWS.law("signal", "(1 - sigma) c -> (1 - sigma') c")
def _signal(t: _Transition) -> None:
    """A constant picture keeps the signal that the new level has."""
    for c, (got, want) in enumerate(_kept(t, 0, 0)):
        text = f"{t.where}: channel {c} of a constant picture comes out as {got:.3f}, not {want:.3f}"
        demand(abs(got - want) <= 0.03, text)


@TRANSITION_LAWS.law(
    "picture",
    "(1 - sigma) cos(pi k (i + 1/2) / n) -> (1 - sigma') cos(pi k (j + 1/2) / n'), k <= 1",
    LINE + "; DCT-II modes of both grids",
)
def _modes(t: _Transition) -> None:
    """Coarse structure stays where it is, in every channel."""
    for k, m in ((0, 1), (1, 0), (1, 1)):
        _demand_mode(t, k, m, 0.12)


@TRANSITION_LAWS.law("detail", "as `picture`, k = 2, to 35 %", LINE + "; DCT-II modes of both grids")
def _details(t: _Transition) -> None:
    """It keeps more of a picture than its coarse structure."""
    for k, m in ((0, 2), (2, 0), (2, 2)):
        _demand_mode(t, k, m, 0.35)


def _demand_mode(t: _Transition, k: int, m: int, off: float) -> None:
    for c, (got, want) in enumerate(_kept(t, k, m)):
        wave = f"a cosine of {k} half-waves down and {m} across"
        text = f"{t.where}: channel {c} of {wave} comes out as {got:.3f}, not {want:.3f}"
        demand(abs(got - want) <= 0.03 + off * abs(want), text)


@TRANSITION_LAWS.law("white", "sigma^2 A A^T + sum B_d B_d^T = sigma'^2 I, for x' = A x + sum B_d n_d")
def _white(t: _Transition) -> None:
    """Pure noise comes out as white noise of the new level."""
    level = t.out.sigma
    shapes = t.linear() if level > 0 and math.prod(t.out.shape[1:]) <= 2000 else None
    if shapes is not None:
        covariance = t.covariance(shapes) / level**2
        variance = covariance.diagonal()
        text = (
            f"{t.where}: noise has {float(variance.mean()):.3f} of the variance {level:.3f}^2 on the average, from "
            f"{float(variance.min()):.3f} to {float(variance.max()):.3f} of it"
        )
        demand(float((variance - 1).abs().max()) < 1e-3, text)
        across = (covariance - variance.diag()).abs()
        worst = int(across.argmax())
        pair = [_cell(i, t.out) for i in divmod(worst, len(across))]
        text = f"{t.where}: noise in {pair[0]} and {pair[1]} is correlated by {float(across.max()):.3f}, not white"
        demand(float(across.max()) < 1e-3, text)
    elif level > 0:
        _white_by_samples(t)


def _cell(index: int, out: Latents) -> str:
    channel, place = divmod(index, out.height * out.width)
    return f"cell {divmod(place, out.width)} of channel {channel}"


def _white_by_samples(t: _Transition) -> None:
    generator = torch.Generator().manual_seed(0)
    noise = t.run(t.given.sigma * torch.randn(t.given.shape, generator=generator), t.given.batch) / t.out.sigma
    variance = noise.square().mean((0, 1))
    text = (
        f"{t.where}: noise has {float(variance.mean()):.3f} of the variance {t.out.sigma:.3f}^2 on the average, from "
        f"{float(variance.min()):.2f} to {float(variance.max()):.2f} of it"
    )
    demand(abs(float(variance.mean()) - 1) <= 0.03 and float((variance - 1).abs().max()) <= 0.6, text)
    for down, across in ((0, 1), (1, 0), (1, 1), (0, 2), (2, 0)):
        for row in (0, 1):
            for column in (0, 1):
                here = noise[..., row : noise.shape[-2] - down : 2, column : noise.shape[-1] - across : 2]
                there = noise[..., row + down :: 2, column + across :: 2][..., : here.shape[-2], : here.shape[-1]]
                together = float((here * there).mean())
                text = (
                    f"{t.where}: noise {down} down and {across} across of cell ({row}, {column}) is correlated by "
                    f"{together:.2f}; it must be white"
                )
                demand(abs(together) <= 0.05, text)

"""Hypothesis strategies for property tests: schedules, levels, shifts, sizes, specs, chains, seeds, conditions, LoRAs.

from hypothesis import given
from mrflow.testing import strategies as some

@given(some.schedules(), some.starts)
def test_mine(schedule, start): ...

Needs the extra `mrflow[testing]`. Counterexamples shrink to what is simplest: few steps, `Linear`, start 1, small
pictures, levels with few digits, seed 0.
"""

from collections.abc import Sequence

import torch
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy

from mrflow._checks import MAX_SEED
from mrflow.backbone import Condition
from mrflow.checkpoints.adapters import Lora
from mrflow.guidance import CFG, Distilled, Guidance, Interval
from mrflow.model_info import FLUX, QWEN, SCHNELL, LatentSpace, ModelInfo, Shift
from mrflow.noise import Nested, Noise, PerItem, Stream
from mrflow.records.chains import encode_chain
from mrflow.runner import run
from mrflow.schedules import (
    Beta,
    Cosine,
    DirectSigma,
    Explicit,
    FlowMap,
    Karras,
    Linear,
    LogitNormal,
    Schedule,
    Shifted,
    WithShift,
)
from mrflow.solvers import AB2, AB3, RES2S, RK4, DPMpp2M, Euler, Heun, Midpoint, Solver, UniPC
from mrflow.spec import Latents, Pixels, Spec
from mrflow.stage import AnyChain, AnyStage
from mrflow.stages import Decode, Encode, Quantise, Refine, Reinject, Sample, Upscale
from mrflow.testing.toy import TOY, toy
from mrflow.upscalers import Lanczos

step_counts: SearchStrategy[int] = st.integers(1, 1000) | st.sampled_from([1, 2, 3, 999, 1000])
"""Numbers of steps, 1 to 1000, its ends more often."""

starts: SearchStrategy[float] = st.sampled_from([1.0, 0.12]) | st.floats(0.001, 1.0)
"""Levels that a schedule begins at, in (0, 1]; 1 and 0.12 (refinement) more often."""

sigmas: SearchStrategy[float] = st.floats(0.001, 0.999)
"""Noise levels that are neither clean nor noise alone."""

models: SearchStrategy[ModelInfo] = st.sampled_from([FLUX, SCHNELL, QWEN])
"""Facts of models, without weights."""

few_steps: SearchStrategy[int] = st.integers(1, 50)
"""Numbers of steps that people use."""

tokens: SearchStrategy[int] = st.integers(1, 20_000)
"""Image tokens of a picture."""

seeds: SearchStrategy[int] = st.integers(0, 9) | st.integers(0, MAX_SEED - 1)
"""Seeds that `run` takes."""

prompts: SearchStrategy[str] = st.sampled_from(["", "a cat", "the big blue word CAT"]) | st.text(max_size=40).filter(
    lambda text: text.isprintable()
)
"""Prompts: empty, plain, and any printable text."""

noises: SearchStrategy[Noise] = (
    st.just(PerItem())
    | st.builds(Stream, st.integers(0, 3), skip=st.integers(0, 2))
    | st.builds(Nested, st.integers(1, 4))
)
"""Sources of noise of every kind."""

solvers: SearchStrategy[Solver] = st.sampled_from(
    [Euler(), Heun(), Midpoint(), AB2(), AB3(), RK4(), DPMpp2M(), UniPC(), RES2S()]
)
"""Deterministic solvers."""


@st.composite
def shifts(draw: DrawFn) -> Shift:
    """Resolution-dependent curves as models have them, with and without a terminal; rising with the tokens.

    They are defined at every number of tokens: a linear one's factor stays above 0 down to a single token.
    """
    low, high = draw(st.floats(0.05, 2.0)), draw(st.floats(0.05, 2.0))
    terminal = draw(st.none() | st.floats(0.001, 0.5))
    if draw(st.sampled_from(["exponential", "linear"])) == "exponential":
        return Shift(low, max(low, high), terminal=terminal)
    return Shift(low, min(max(low, high), 14 * low), terminal=terminal, kind="linear")


@st.composite
def falling(draw: DrawFn, *, first: float | None = None, last: float | None = None) -> tuple[float, ...]:
    """Strictly falling noise levels in [0, 1], at least two, four digits each.

    They begin at `first` and end at `last` where these are given.
    """
    cells = draw(st.sets(st.integers(1, 9999), min_size=2, max_size=12))
    inner: Sequence[float] = sorted((c / 10000 for c in cells), reverse=True)
    head = () if first is None else (first,)
    tail = () if last is None else (last,)
    return (*head, *(s for s in inner if first is None or s < first), *tail)


@st.composite
def counted_schedules(draw: DrawFn, *, steps: SearchStrategy[int] = step_counts) -> tuple[Schedule, int]:
    """A schedule of any kind with settings from all over their ranges, and its number of steps."""
    n = draw(steps)
    made: list[SearchStrategy[Schedule]] = [
        st.just(Linear(n)),
        st.builds(Shifted, st.just(n), shift=st.none() | shifts()),
        st.builds(DirectSigma, st.just(n), mu=st.none() | st.floats(-20, 20)),
        st.just(DirectSigma(n)),
        st.builds(Karras, st.just(n), rho=st.floats(1, 100), low=st.none() | st.floats(0.001, 0.99)),
        st.builds(Beta, st.just(n), alpha=st.floats(0.25, 100), beta=st.floats(0.25, 100)),
        st.just(Beta(n)),
        st.builds(LogitNormal, st.just(n), mean=st.floats(-5, 5), std=st.floats(0.01, 8)),
        st.just(LogitNormal(n)),
        st.just(Cosine(n)),
        st.just(WithShift(Cosine(n))),
        st.builds(FlowMap, st.just(n), shift=st.floats(0.001, 1000), final_step=st.floats(0.001, 1)),
        st.just(FlowMap(n)),
        st.just(Explicit(tuple((n - i) / n for i in range(n + 1)))),
    ]
    return draw(st.one_of(made)), n


def schedules(*, steps: SearchStrategy[int] = step_counts) -> SearchStrategy[Schedule]:
    """Schedules of every kind.

    Extreme settings of many steps may leave no room between two levels in double precision; such a schedule raises
    PlanError when it is called. Up to 50 steps with `plain_schedules` none does.
    """
    return counted_schedules(steps=steps).map(lambda pair: pair[0])


@st.composite
def plain_schedules(draw: DrawFn, *, steps: SearchStrategy[int] = few_steps) -> Schedule:
    """Schedules of every kind with their default settings: none refuses a start, a size or a model."""
    make = draw(st.sampled_from([Linear, Shifted, DirectSigma, Karras, Beta, LogitNormal, Cosine, FlowMap]))
    made: Schedule = make(draw(steps))
    return made


@st.composite
def sizes(draw: DrawFn, *, space: LatentSpace = TOY.space, most: int = 8) -> tuple[int, int]:
    """(height, width) in pixels, never square, each side 1 to `most` (at least 2) tokens of the space."""
    height = draw(st.integers(1, most))
    width = draw(st.integers(1, most).filter(lambda w: w != height))
    return height * space.multiple, width * space.multiple


@st.composite
def specs(draw: DrawFn, *, space: LatentSpace = TOY.space) -> Spec:
    """Facts of pictures or latents that are not square, a batch of 1 to 3; latents clean or at any level."""
    batch, (height, width) = draw(st.integers(1, 3)), draw(sizes(space=space))
    if draw(st.booleans()):
        sigma = draw(st.just(0.0) | sigmas)
        return Latents(batch, height // space.downscale, width // space.downscale, space, sigma)
    return Pixels(batch, height, width)


@st.composite
def guidances(draw: DrawFn) -> Guidance:
    """Guidances of every kind that a model without an embedding takes."""
    cfg = st.builds(CFG, st.floats(1, 10), rescale=st.booleans())
    between = st.builds(Interval, cfg, st.floats(0, 0.4), st.floats(0.5, 1))
    return draw(st.one_of(st.just(Distilled()), cfg, between))


@st.composite
def chains(draw: DrawFn, *, model: ModelInfo = TOY) -> AnyChain:
    """Chains from a prompt to pixels that `plan` takes for this model: native, or upscaled and refined; not square."""
    height, width = draw(sizes(space=model.space))
    few = plain_schedules(steps=st.integers(1, 4))
    stages: list[AnyStage] = [Sample(height, width, draw(few), solver=draw(solvers)), Decode()]
    if draw(st.booleans()):
        stages += [Upscale(Lanczos(2)), Encode(), Reinject(draw(sigmas)), Refine(draw(few)), Decode()]
    if draw(st.booleans()):
        stages.append(Quantise())
    return AnyChain(tuple(stages))


@st.composite
def conditions(draw: DrawFn, *, batch: int | None = None) -> Condition:
    """Encoded prompts as any model's: one to three named tensors of small whole numbers that agree in batch."""
    items = batch or draw(st.integers(1, 3))
    names = draw(st.lists(st.sampled_from(["text", "pooled", "mask"]), min_size=1, unique=True))
    shapes = {name: (items, *draw(st.lists(st.integers(1, 4), min_size=1, max_size=2))) for name in names}
    tensors = {}
    for name, shape in shapes.items():
        count = torch.Size(shape).numel()
        values = draw(st.lists(st.integers(-4, 4), min_size=count, max_size=count))
        tensors[name] = torch.tensor(values, dtype=torch.float32).view(shape)
    return Condition(tensors)


def loras() -> SearchStrategy[Lora]:
    """LoRA values: a file's name, a strength from -100 to 100, a digest. The files need not exist."""
    names = st.from_regex(r"[a-z]{1,8}\.safetensors", fullmatch=True)
    strengths = st.sampled_from([1.0, 0.0, -1.0]) | st.floats(-100, 100)
    digests = st.binary(min_size=32, max_size=32).map(bytes.hex)
    return st.builds(Lora, names, strengths, skip_text=st.booleans(), sha256=digests)


def chain_records() -> SearchStrategy[list[object]]:
    """Chains as records hold them: plain data that `records.decode_chain` reads."""
    return chains().map(lambda chain: list(encode_chain(chain)))


@st.composite
def records(draw: DrawFn) -> dict[str, object]:
    """Whole records, as a PNG carries them: those of small runs of the toy (milliseconds each)."""
    chain = draw(chains())
    return run(chain, toy(), draw(prompts), seed=draw(seeds)).record()

"""Hypothesis strategies that several test files share."""

from collections.abc import Sequence

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy

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
from mrflow.spec import FLUX, QWEN, SCHNELL, ModelInfo, Shift

LAW = settings(deadline=None, derandomize=True)
"""For a property test: the same examples in every run, no time limit."""

FEW = settings(LAW, max_examples=25)
"""The same for a test whose examples are slow."""

step_counts: SearchStrategy[int] = st.integers(1, 1000) | st.sampled_from([1, 2, 3, 999, 1000])
starts: SearchStrategy[float] = st.floats(0.001, 1.0) | st.sampled_from([0.12, 1.0])
models: SearchStrategy[ModelInfo] = st.sampled_from([FLUX, SCHNELL, QWEN])
tokens: SearchStrategy[int] = st.integers(1, 20_000)
levels: SearchStrategy[float] = st.floats(0.001, 0.999)


@st.composite
def shifts(draw: DrawFn) -> Shift:
    """Resolution-dependent curves as models have them, with and without a terminal."""
    low, high = draw(st.floats(0.05, 2.0)), draw(st.floats(0.05, 2.0))
    terminal = draw(st.none() | st.floats(0.001, 0.5))
    kind = draw(st.sampled_from(["exponential", "linear"]))
    return Shift(low, max(low, high), terminal=terminal, kind="linear" if kind == "linear" else "exponential")


@st.composite
def falling(draw: DrawFn, *, first: float | None = None, last: float | None = None) -> tuple[float, ...]:
    """Strictly falling noise levels in [0, 1], at least two, no two closer than 1e-4; ends as told."""
    cells = draw(st.sets(st.integers(1, 9998), min_size=2, max_size=12))
    inner: Sequence[float] = sorted((c / 9999 for c in cells), reverse=True)
    head = () if first is None else (first,)
    tail = () if last is None else (last,)
    return (*head, *(s for s in inner if first is None or s < first), *tail)


@st.composite
def schedules(draw: DrawFn, *, steps: SearchStrategy[int] = step_counts) -> tuple[Schedule, int]:
    """Any schedule of the package with settings from all over their ranges, and its number of steps."""
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

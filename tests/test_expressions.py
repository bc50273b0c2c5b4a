"""Slots as text: the words of Python, read without being run, and written so that they are read again."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
from hypothesis import given, settings

import mrflow as mf
from mrflow.records.chains import encode
from mrflow.records.expressions import expression, names_of, parse
from mrflow.testing import strategies as some

KINDS: list[Any] = [mf.Solver, mf.Schedule, mf.Guidance, mf.caches.Cache]


@dataclass(frozen=True)
class Mine(mf.Solver):
    """A solver of a user's."""

    order: int

    def step(self, v: Any, x: Any, sigma: float, to: float, past: Any) -> Any:
        return x, past


@settings(max_examples=25, deadline=None)
@given(some.schedules(steps=some.few_steps), some.guidances(), some.chains())
def test_what_is_written_is_read_again(schedule: mf.Schedule, guidance: mf.Guidance, chain: Any) -> None:
    assert parse(expression(schedule), mf.Schedule) == schedule
    assert parse(expression(guidance, "mf."), mf.Guidance) == guidance
    for stage in chain:
        assert parse(expression(stage), mf.Stage) == stage
        assert expression(encode(stage)) == expression(stage)  # records hold the same


@pytest.mark.parametrize(
    "chain",
    [
        mf.recipes.paper(mf.Sharpen(mf.Lanczos(2), 0.2), sigma=0.2, solver=mf.Heun(), guidance=mf.CFG(3.0)),
        mf.recipes.paper(cache=mf.caches.DBCache(0.1, front=2), noise=mf.Nested()),
        mf.recipes.official(eight_bit=True),
        mf.recipes.ladder([(64, 64), (128, 128), (256, 256)]),
        mf.recipes.latent("nearest", schedule=mf.Shifted(4, shift=mf.Shift.fixed(3.0))),
    ],
)
def test_it_is_python_that_makes_the_same_chain(chain: Any) -> None:
    text = " >> ".join(expression(stage, "mf.") for stage in chain)
    assert eval(text, {"mf": mf}) == chain


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_public_type_of_a_kind_is_found(kind: Any) -> None:
    """Held against the modules, so that a slot that is added is known here by itself."""
    import inspect
    import sys

    modules = [m for name, m in list(sys.modules.items()) if name.startswith("mrflow.") and "testing" not in name]
    public = set(dir(mf)) | set(vars(mf.caches))
    made = {
        c.__name__
        for m in modules
        for c in vars(m).values()
        if inspect.isclass(c) and issubclass(c, kind) and not inspect.isabstract(c) and c.__name__ in public
    }
    assert made == set(names_of(kind)) and len(made) >= 3


def test_readings() -> None:
    levels = mf.Explicit(mf.Linear(1000)(1.0, 1, mf.FLUX))
    assert parse(expression(levels), mf.Schedule) == levels
    assert parse("Heun", mf.Solver) == mf.Heun()
    assert parse(" mf.Karras(12, rho=5) ", mf.Schedule) == mf.Karras(12, rho=5)
    assert parse("TeaCache", mf.caches.Cache) == parse("mf.caches.TeaCache()", mf.caches.Cache)
    assert parse("WithShift(Beta, Shift.fixed(3))", mf.Schedule, steps=7) == mf.WithShift(mf.Beta(7), mf.Shift.fixed(3))
    assert parse("Explicit([1, .5, 0])", mf.Schedule) == mf.Explicit((1.0, 0.5, 0.0))
    assert parse("Karras(8)", mf.Schedule, steps=7) == mf.Karras(8)
    own = {"Mine": Mine, "three": Mine(3)}
    assert parse("Mine(2)", mf.Solver, names=own) == Mine(2)
    assert parse("three", mf.Solver, names=own) == Mine(3)


def test_a_value_that_can_be_called_is_a_value() -> None:
    even = mf.Linear(3)
    names = {"even": even, "make": lambda: even, "part": partial(mf.Linear, 3)}
    for text in ("even", "make", "make()", "part"):
        assert parse(text, mf.Schedule, names=names) == even
    assert parse("WithShift(even)", mf.Schedule, names=names) == mf.WithShift(even)
    with pytest.raises(mf.PlanError, match="even is a value; leave out what follows it"):
        parse("even(3)", mf.Schedule, names=names)


@pytest.mark.parametrize(
    ("text", "kind", "said"),
    [
        ("heun", mf.Solver, "there is no solver 'heun'; did you mean Heun. There are .*AB3"),
        ("best", mf.Solver, "there is no solver 'best'; there are .*AB3"),
        ("Karras(12, rh=5)", mf.Schedule, r"Karras\(steps, \*, rho=7.0, low=None\): got an unexpected .* 'rh'"),
        ("Karras", mf.Schedule, "missing a required argument: 'steps'"),
        ("Karras(0)", mf.Schedule, "Karras: steps must be a whole number from 1"),
        ("Interval(3, 0.1, 0.2)", mf.Guidance, "inner must be a Guidance, got 3"),
        ("Sample(64, 64)", mf.Solver, "is no solver; there are .*AB2"),
        ("", mf.Solver, "write a name or a call"),
        ("Heun(", mf.Solver, "write a name or a call"),
        ("3", mf.Guidance, "'3' is no guidance; there are .*CFG"),
        ("__import__('os').getcwd()", mf.Solver, "there is no solver"),
        ("Heun.__class__", mf.Solver, "there is no solver"),
        ("Heun(*[1])", mf.Solver, "spread nothing"),
        ("CFG(1 + 1j)", mf.Guidance, "scale must be"),
        ("Karras([x for x in (1,)])", mf.Schedule, "is neither a name, a number"),
        ("Interval(" * 3000, mf.Guidance, "write a name or a call"),
    ],
)
def test_refusals(text: str, kind: Any, said: str) -> None:
    with pytest.raises(mf.PlanError, match=said):
        parse(text, kind)


def test_a_type_that_fails_is_said() -> None:
    def broken(n: int) -> Mine:
        raise ZeroDivisionError("no")

    with pytest.raises(mf.PlanError, match="ZeroDivisionError: no"):
        parse("broken(1)", mf.Solver, names={"broken": broken})
    with pytest.raises(mf.PlanError, match="is a value"):
        parse("three(1)", mf.Solver, names={"three": Mine(3)})

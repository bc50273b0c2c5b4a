"""Strategies give what they say, and shrink to what is simple."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import find, given, settings
from hypothesis import strategies as st

import mrflow as mf
from mrflow.backbone import Condition
from mrflow.model_info import FLUX, ModelInfo, Shift
from mrflow.records.chains import decode_chain, encode_chain
from mrflow.spec import Spec
from mrflow.testing import TOY
from mrflow.testing import strategies as some
from tests.strategies import FEW, LAW, law


@LAW
@given(some.chains())
def test_chains_plan_to_pixels_and_are_not_square(chain: mf.Chain) -> None:
    out = mf.plan(chain, TOY).out
    assert isinstance(out, mf.Pixels) and out.height != out.width


@FEW
@given(some.chains(), some.prompts, some.seeds)
def test_chains_run(chain: mf.Chain, prompt: str, seed: int) -> None:
    assert mf.run(chain, mf.toy(), prompt, seed=seed).pixels.shape[1] == 3


@LAW
@given(some.chain_records(), some.chains())
def test_records_of_chains_are_read_again(record: list[object], chain: mf.Chain) -> None:
    assert encode_chain(decode_chain(record)) == record
    assert decode_chain(encode_chain(chain)) == chain


@FEW
@given(some.records())
def test_whole_records_hold_their_chain(record: dict[str, object]) -> None:
    assert record["model"] == "toy" and len(decode_chain(record["chain"])) == len(record["stages"])  # type: ignore[arg-type]


@LAW
@given(some.falling(first=1.0, last=0.0), some.plain_schedules(), some.starts, some.tokens, some.models)
def test_levels_fall(sigmas: tuple[float, ...], schedule: mf.Schedule, start: float, n: int, model: ModelInfo) -> None:
    for each in (sigmas, schedule(start, n, model)):
        assert all(b < a for a, b in pairwise(each)) and each[-1] == 0


@LAW
@given(some.specs(space=FLUX.space))
def test_specs_are_not_square(spec: Spec) -> None:
    assert spec.shape[-1] != spec.shape[-2] and 1 <= spec.batch <= 3


@LAW
@given(some.conditions(), some.loras(), some.shifts(), some.guidances(), some.noises)
def test_values_are_taken(
    cond: Condition, lora: mf.Lora, shift: mf.Shift, guidance: mf.Guidance, noise: mf.Noise
) -> None:
    assert cond.item(0).batch == 1 and len(lora.sha256) == 64 and shift.mu(4096) > shift.mu(256) - 1e-12
    assert guidance.evals([0.5]) <= guidance.passes
    assert noise([1], (1, 3, 4, 6), scope="a/0", draw=0).shape == (1, 3, 4, 6)


def always(value: object) -> bool:
    return True


@pytest.mark.parametrize(
    ("strategy", "fails", "simplest"),
    [
        (some.schedules(), always, "Linear(steps=1)"),
        (some.starts, always, "1.0"),
        (some.falling(last=0.0), lambda s: len(s) > 3, "(0.0003, 0.0002, 0.0001, 0.0)"),
        (some.sizes(), always, "(4, 8)"),
        (some.seeds, always, "0"),
        (some.specs(), always, "Pixels(batch=1, height=4, width=8)"),
        (some.chains(), lambda c: len(c) > 3, None),
        (some.guidances(), always, "Distilled(value=None)"),
    ],
    ids=lambda value: "" if callable(value) else None,
)  # fmt: skip
def test_counterexamples_are_readable(strategy, fails: Callable[[object], bool], simplest: str | None) -> None:  # type: ignore[no-untyped-def]
    found = find(strategy, fails, settings=LAW)
    if simplest is None:  # the smallest chain that is upscaled
        assert found.stages[0] == mf.Sample(4, 8, mf.Linear(1))
    else:
        assert repr(found) == simplest


@LAW
@given(some.shifts(), some.few_steps, some.starts, some.tokens)
def test_shifts_are_defined_at_every_size(shift: Shift, steps: int, start: float, tokens: int) -> None:
    sigmas = mf.Shifted(steps, shift=shift)(start, tokens, TOY)
    assert len(sigmas) == steps + 1 and all(b < a for a, b in pairwise(sigmas))


@LAW
@given(some.falling(last=0.0))
def test_falling_levels_to_0_are_a_schedule(levels: tuple[float, ...]) -> None:
    assert mf.Explicit(levels)(levels[0], 16, TOY) == levels and levels[-1] == 0.0


@pytest.mark.parametrize(("profile", "same"), [("default", True), ("ci", True), ("nightly", False)])
def test_only_the_night_sees_new_examples(profile: str, same: bool) -> None:
    seen = list[int]()

    @settings(law(profile), max_examples=20, database=None)
    @given(st.integers())
    def drawn(number: int) -> None:
        seen.append(number)

    drawn()
    first = seen.copy()
    seen.clear()
    drawn()
    assert (seen == first) is same


def test_the_night_is_made_with_its_profile() -> None:
    makefile = (Path(__file__).parents[1] / "Makefile").read_text(encoding="utf-8")
    assert "HYPOTHESIS_PROFILE=nightly" in makefile.partition("\nnightly:")[2].partition("\n\n")[0]

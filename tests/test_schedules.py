"""Schedules against published lists, other implementations of the same distributions, and their laws."""

import importlib
import json
import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mrflow.errors import PlanError
from mrflow.model_info import FLUX, QWEN, SCHNELL, ModelInfo, Shift
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
    check_sigmas,
    cut,
    shift,
    shift_linear,
    shift_static,
    stretch,
)
from mrflow.schedules.base import scale
from tests.strategies import FEW, LAW, falling, models, schedules, sigmas, starts, step_counts, tokens

stats: Any = importlib.import_module("scipy.stats")
GOLDEN: dict[str, Any] = json.loads((Path(__file__).parent / "golden" / "schedules.json").read_text())
MODELS = {"flux1_dev": FLUX, "flux1_schnell": SCHNELL, "qwen_image": QWEN}
ROWS: list[dict[str, Any]] = GOLDEN["schedules"]


def close(got: tuple[float, ...], want: "list[float] | np.ndarray[Any, Any]", *, within: float = 5e-7) -> None:
    assert len(got) == len(want)
    assert max(abs(a - float(b)) for a, b in zip(got, want, strict=True)) <= within


# Published lists


def test_there_are_24_golden_lists() -> None:
    assert len(ROWS) == 24


@pytest.mark.parametrize("row", ROWS, ids=lambda r: f"{r['model']}-{r['height']}-{r['steps']}")
def test_golden_list(row: dict[str, Any]) -> None:
    model = MODELS[row["model"]]
    assert model.tokens(row["height"], row["width"]) == row["tokens"]
    close(Shifted(row["steps"])(1.0, row["tokens"], model), row["sigmas_f32"])


@pytest.mark.parametrize("row", GOLDEN["mu_table"], ids=lambda r: f"{r['model']}-{r['tokens']}")
def test_golden_mu(row: dict[str, Any]) -> None:
    assert MODELS[row["model"]].shift.mu(row["tokens"]) == pytest.approx(row["mu"], abs=1e-12)


@pytest.mark.parametrize("row", GOLDEN["direct_sigma_linear"])
def test_official_refinement(row: dict[str, Any]) -> None:
    close(DirectSigma(row["steps"])(row["first_sigma"], 4096, QWEN), row["sigmas_f32"])


@pytest.mark.parametrize("row", GOLDEN["direct_sigma_comfy"])
def test_comfyui_refinement(row: dict[str, Any]) -> None:
    assert DirectSigma.comfyui(row["steps"]).mu == row["mu"]
    close(DirectSigma.comfyui(row["steps"])(row["first_sigma"], 4096, QWEN), row["sigmas_f32"])


@pytest.mark.parametrize("final_step", ["0.5", "1.0"])
def test_flow_map(final_step: str) -> None:
    close(FlowMap(4, final_step=float(final_step))(1.0, 1024, FLUX), GOLDEN["flow_map"][final_step], within=1e-8)


def test_qwen_lightning() -> None:
    got = Shifted(4, shift=Shift.fixed(3.0))(1.0, 1024, QWEN)
    close(got, [1.0, 0.9, 0.75, 0.5, 0.0], within=1e-12)


# Other implementations


@pytest.mark.parametrize(
    ("alpha", "beta"), [(0.6, 0.6), (0.25, 0.25), (0.25, 100), (100, 0.3), (1, 1), (2, 5), (9, 0.5)]
)
@pytest.mark.parametrize("steps", [1, 2, 13, 1000])
def test_beta_is_the_quantile_of_scipy(alpha: float, beta: float, steps: int) -> None:
    want = stats.beta.ppf(1.0 - np.arange(steps + 1) / steps, alpha, beta)
    close(Beta(steps, alpha=alpha, beta=beta)(1.0, 1, FLUX), want, within=1e-11)


@pytest.mark.parametrize(("mean", "std"), [(0, 1), (0.5, 0.7), (-5, 8), (5, 0.01)])
@pytest.mark.parametrize("steps", [1, 2, 13, 1000])
def test_logit_normal_is_the_quantile_of_scipy(mean: float, std: float, steps: int) -> None:
    normal = stats.norm.ppf(1.0 - np.arange(steps + 1) / steps, mean, std)
    close(LogitNormal(steps, mean=mean, std=std)(1.0, 1, FLUX), 1 / (1 + np.exp(-normal)), within=1e-11)


@pytest.mark.parametrize("steps", [1, 4, 12, 20])
@pytest.mark.parametrize("mu", [0.0, 1.15, math.log(3.0)])
def test_shifted_quantiles_are_comfyui_s_beta(steps: int, mu: float) -> None:
    """ComfyUI `beta_scheduler`: entries of the model's table of shifted levels, at the rounded quantiles; then 0.

    The table of its flux sampling has 10,000 entries, shift((i + 1) / 10,000), which bounds the difference.
    """
    size = 10_000
    table = [shift((i + 1) / size, mu) for i in range(size)]
    entries = np.rint(stats.beta.ppf(1 - np.linspace(0, 1, steps, endpoint=False), 0.6, 0.6) * (size - 1))
    want = [*(table[int(i)] for i in entries), 0.0]
    got = WithShift(Beta(steps), Shift.fixed(math.exp(mu)))(1.0, 1, FLUX)
    close(got, want, within=1.5 * math.exp(mu) / size)
    if mu == 1.15 and steps == 12:  # without a shift it is another schedule
        assert max(abs(a - b) for a, b in zip(Beta(steps)(1.0, 1, FLUX), want, strict=True)) > 0.25


@pytest.mark.parametrize("steps", [2, 4, 12, 20])
@pytest.mark.parametrize("info", [FLUX, QWEN], ids=["flux", "qwen"])
def test_quantiles_above_the_last_level_are_diffusers_beta_sigmas(steps: int, info: ModelInfo) -> None:
    """`_convert_to_beta`: low + (1 - low) x quantiles at linspace(1, 0, steps), low the shifted schedule's last."""
    low = Shifted(steps)(1.0, 4096, info)[-2]
    want = [low + (1 - low) * float(stats.beta.ppf(1 - q, 0.6, 0.6)) for q in np.linspace(0, 1, steps)]
    close(Beta(steps, low=low)(1.0, 4096, info), [*want, 0.0], within=1e-11)
    close(Beta(steps, low=low)(0.5, 4096, info), [0.5 * s for s in [*want, 0.0]], within=1e-11)
    if steps == 12 and info is FLUX:
        assert low > 0.2 and Beta(1, low=low)(1.0, 4096, info) == (1.0, 0.0)


@pytest.mark.parametrize("info", [FLUX, QWEN], ids=["flux", "qwen"])
@pytest.mark.parametrize("steps", [1, 2, 12])
def test_a_shift_bends_any_schedule_as_it_does_the_even_one(steps: int, info: ModelInfo) -> None:
    for start in (1.0, 0.3):
        assert WithShift(Linear(steps))(start, 4096, info) == Shifted(steps)(start, 4096, info)
    bent = WithShift(LogitNormal(steps, mean=0.2), Shift.fixed(math.exp(0.7)))(1.0, 4096, info)
    close(bent, LogitNormal(steps, mean=0.9)(1.0, 4096, info), within=1e-12)
    levels = WithShift(Explicit((1.0, 0.5, 0.2, 0.0)))(1.0, 4096, info)
    assert len(levels) == 4 and levels[1] > 0.5  # both models' shifts rise


def test_a_shift_needs_a_schedule_and_a_shift() -> None:
    with pytest.raises(PlanError, match="bends a schedule"):
        WithShift(3)  # type: ignore[arg-type]  # pyright: ignore
    with pytest.raises(PlanError, match="a shift is a Shift"):
        WithShift(Linear(3), 3.0)  # type: ignore[arg-type]  # pyright: ignore
    with pytest.raises(PlanError, match="low must be above 0"):
        Beta(3, low=0.0)


def test_cosine_has_the_signal_to_noise_ratio_of_the_cosine_schedule() -> None:
    for i, s in enumerate(Cosine(20)(1.0, 1, FLUX)[1:-1], start=1):
        angle = math.pi / 2 * (1 - i / 20)
        assert (1 - s) / s == pytest.approx(math.cos(angle) / math.sin(angle), rel=1e-12)


@pytest.mark.parametrize("model", [FLUX, QWEN])
@pytest.mark.parametrize("steps", [2, 12])
def test_karras_is_that_of_diffusers(model: ModelInfo, steps: int) -> None:
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, use_karras_sigmas=True, shift_terminal=model.shift.terminal
    )
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=model.shift.mu(1024))
    close(Karras(steps)(1.0, 1024, model), scheduler.sigmas.numpy(), within=2e-6)


# Laws


@LAW
@given(schedules(), starts, tokens, models)
def test_every_schedule_falls_from_start_to_zero(
    made: tuple[Schedule, int], start: float, tokens: int, model: ModelInfo
) -> None:
    schedule, steps = made
    sigmas = schedule(start, tokens, model)
    assert len(sigmas) == steps + 1
    assert sigmas[0] == start
    assert sigmas[-1] == 0.0
    assert all(a > b for a, b in pairwise(sigmas))
    assert all(type(s) is float for s in sigmas)


@FEW
@given(schedules(), starts, tokens, models)
def test_start_scales(made: tuple[Schedule, int], start: float, tokens: int, model: ModelInfo) -> None:
    schedule, _ = made
    close(schedule(start, tokens, model), [start * s for s in schedule(1.0, tokens, model)], within=1e-15)


@pytest.mark.parametrize("kind", [Linear, Shifted, DirectSigma, Karras, Beta, LogitNormal, Cosine, FlowMap])
@pytest.mark.parametrize("model", [FLUX, SCHNELL, QWEN])
def test_a_thousand_steps_and_one(kind: type[Linear], model: ModelInfo) -> None:
    assert kind(1)(0.12, 4096, model) == (0.12, 0.0)
    assert len(set(kind(1000)(0.12, 4096, model))) == 1001


@LAW
@given(step_counts, starts)
def test_direct_sigma_is_linear(steps: int, start: float) -> None:
    sigmas = DirectSigma(steps)(start, 4096, QWEN)
    assert sigmas == Linear(steps)(start, 4096, QWEN)
    close(sigmas, np.linspace(start, 0.0, steps + 1), within=1e-15)


def test_a_shift_of_one_is_no_shift() -> None:
    assert Shifted(9)(1.0, 1024, SCHNELL) == Linear(9)(1.0, 1024, FLUX)


def test_beta_one_one_is_linear() -> None:
    close(Beta(50, alpha=1, beta=1)(1.0, 1, FLUX), list(Linear(50)(1.0, 1, FLUX)), within=1e-13)


@LAW
@given(sigmas, st.floats(-5, 5), st.floats(-5, 5))
def test_shifts_are_a_group(s: float, first: float, second: float) -> None:
    assert shift(shift(s, first), second) == pytest.approx(shift(s, first + second), rel=1e-9)
    assert shift(shift(s, first), -first) == pytest.approx(s, rel=1e-9)
    assert shift(s, 0.0) == pytest.approx(s, rel=1e-15)


@LAW
@given(sigmas, st.floats(-5, 5))
def test_shift_adds_mu_to_the_logit(s: float, mu: float) -> None:
    bent = shift(s, mu)
    assert math.log(bent / (1 - bent)) == pytest.approx(math.log(s / (1 - s)) + mu, abs=1e-9)


@LAW
@given(sigmas, st.floats(0.01, 100))
def test_three_names_of_one_shift(s: float, k: float) -> None:
    assert shift_static(s, k) == pytest.approx(shift(s, math.log(k)), rel=1e-12)
    assert shift_linear(s, k) == pytest.approx(k / (k + (1 / s - 1)), rel=1e-12)


@pytest.mark.parametrize("mu", [-1000.0, -3.0, 0.0, 3.0, 1000.0])
def test_shift_keeps_the_ends(mu: float) -> None:
    assert shift(0.0, mu) == 0.0
    assert shift(1.0, mu) == 1.0


def test_a_linear_shift_is_used_where_the_model_has_one() -> None:
    got = Shifted(4, shift=Shift(2.0, 2.0, kind="linear"))(1.0, 1024, FLUX)
    close(got, [1.0, 2 / (2 + 1 / 3), 2 / 3, 2 / 5, 0.0], within=1e-15)


@LAW
@given(falling(first=1.0, last=0.0), sigmas)
def test_stretch_is_linear_and_keeps_the_ends(sigmas: tuple[float, ...], terminal: float) -> None:
    got = stretch(sigmas, terminal)
    assert (got[0], got[-2], got[-1]) == (1.0, terminal, 0.0)
    ratios = [(1 - a) / (1 - b) for a, b in zip(got[1:-1], sigmas[1:-1], strict=True)]
    assert ratios == pytest.approx([ratios[0]] * len(ratios), rel=1e-6)


@LAW
@given(falling(first=1.0, last=0.0))
def test_stretch_to_where_it_is_changes_nothing(sigmas: tuple[float, ...]) -> None:
    close(stretch(sigmas, sigmas[-2]), list(sigmas), within=1e-15)


def test_stretch_of_one_step() -> None:
    assert stretch((1.0, 0.0), 0.02) == (1.0, 0.0)


@LAW
@given(falling(first=1.0, last=0.0), sigmas)
def test_cut_ends_at_stop_and_keeps_what_is_above(sigmas: tuple[float, ...], stop: float) -> None:
    got = cut(sigmas, stop)
    assert got[-1] == stop
    assert got[:-1] == tuple(s for s in sigmas if s > stop)
    assert cut(got, stop) == got
    assert cut(sigmas, 0.0) == sigmas


# Explicit levels


def test_explicit_levels() -> None:
    assert Explicit((0.12, 0.05, 0.0))(0.12, 4096, FLUX) == (0.12, 0.05, 0.0)
    assert Explicit((1.0, 0.5, 0.0))(0.12, 4096, FLUX) == (0.12, 0.06, 0.0)
    assert Explicit((1, 0))(1.0, 4096, FLUX) == (1.0, 0.0)


def test_explicit_levels_that_do_not_end_in_zero_are_told_how_to() -> None:
    with pytest.raises(PlanError, match=r"must end in 0, got \(1.0, 0.5\); try \(1.0, 0.5, 0.0\)"):
        Explicit((1.0, 0.5))


def test_explicit_levels_that_begin_elsewhere_are_told_where() -> None:
    with pytest.raises(PlanError, match=r"begin at 0.5 but .* begin at 0.12; try Explicit\(\(0.12, 0.06, 0.0\)\)"):
        Explicit((0.5, 0.25, 0.0))(0.12, 4096, FLUX)


@pytest.mark.parametrize(
    ("sigmas", "text"),
    [
        ((), "at least two noise levels"),
        ((1.0,), "at least two noise levels"),
        ((1.0, math.nan, 0.0), "noise level 2 of 3 must be a finite number, got nan"),
        ((math.inf, 0.0), "noise level 1 of 2 must be a finite number, got inf"),
        ((1.5, 0.0), "noise level 1 of 2 must be from 0 to 1, got 1.5"),
        ((1.0, -0.1), "noise level 2 of 2 must be from 0 to 1, got -0.1"),
        ((1.0, 0.5, 0.5, 0.0), "level 3 of 4 is 0.5 after 0.5"),
        ((0.5, 0.6, 0.0), "level 2 of 3 is 0.6 after 0.5"),
        ((True, 0.0), "noise level 1 of 2 must be a finite number, got True"),
    ],
)
def test_bad_levels(sigmas: tuple[float, ...], text: str) -> None:
    with pytest.raises(PlanError, match=text):
        check_sigmas(sigmas)
    with pytest.raises(PlanError, match=text):
        Explicit(sigmas)


# Refusals


@pytest.mark.parametrize("steps", [0, -1, 1001, True, 2.0, "3", None])
@pytest.mark.parametrize("kind", [Linear, Shifted, DirectSigma, Karras, Beta, LogitNormal, Cosine, FlowMap])
def test_bad_steps(kind: type[Linear], steps: int) -> None:
    with pytest.raises(PlanError, match="steps must be a whole number from 1 to 1000, got "):
        kind(steps)


@pytest.mark.parametrize("start", [0.0, -0.5, 1.01, math.nan, math.inf, True, "1"])
@pytest.mark.parametrize("schedule", [Linear(3), Shifted(3), Explicit((1.0, 0.0)), Karras(1), FlowMap(3)])
def test_bad_start(schedule: Schedule, start: float) -> None:
    with pytest.raises(PlanError, match=r"start must be (a finite number|above 0 and at most 1), got "):
        schedule(start, 1024, FLUX)


@pytest.mark.parametrize(
    ("kind", "settings", "text"),
    [
        (Karras, {"rho": 0.5}, "rho must be from 1 to 100, got 0.5"),
        (Karras, {"rho": math.nan}, "rho must be a finite number, got nan"),
        (Karras, {"low": 0.0}, "low must be above 0 and below 1, got 0.0"),
        (Karras, {"low": 1.0}, "low must be above 0 and below 1, got 1.0"),
        (Beta, {"alpha": 0.1}, "alpha must be from 0.25 to 100, got 0.1"),
        (Beta, {"beta": math.inf}, "beta must be a finite number, got inf"),
        (LogitNormal, {"mean": 9}, "mean must be from -5 to 5, got 9"),
        (LogitNormal, {"std": 0.0}, "std must be from 0.01 to 8, got 0.0"),
        (DirectSigma, {"mu": 50}, "mu must be from -20 to 20, got 50"),
        (FlowMap, {"shift": 0}, "shift must be from 0.001 to 1000, got 0"),
        (FlowMap, {"final_step": 1.5}, "final_step must be from 0.001 to 1, got 1.5"),
    ],
)
def test_bad_settings(kind: Callable[..., Schedule], settings: dict[str, float], text: str) -> None:
    with pytest.raises(PlanError, match=text):
        kind(4, **settings)


def test_bad_arguments_of_functions() -> None:
    with pytest.raises(PlanError, match=r"a noise level must be from 0 to 1, got 1.2"):
        shift(1.2, 0.5)
    with pytest.raises(PlanError, match="mu must be a finite number"):
        shift(0.5, math.nan)
    with pytest.raises(PlanError, match="a shift factor must be above 0, got 0"):
        shift_static(0.5, 0)
    with pytest.raises(PlanError, match=r"only a schedule that ends at 0 can be stretched, this one ends at 0.1"):
        stretch((1.0, 0.1), 0.02)
    with pytest.raises(PlanError, match="terminal must be above 0 and below 1, got 1"):
        stretch((1.0, 0.1, 0.0), 1)
    with pytest.raises(PlanError, match=r"stop must be from 0 to below 1 \(this schedule\), got 1.0"):
        cut((1.0, 0.5, 0.0), 1.0)
    with pytest.raises(PlanError, match=r"stop must be from 0.5 to below 1 \(this schedule\), got 0.2"):
        cut((1.0, 0.5), 0.2)


@pytest.mark.parametrize("tokens", [0, -3, 2.5, True])
def test_bad_tokens(tokens: int) -> None:
    with pytest.raises(PlanError, match="tokens must be a whole number of at least 1, got "):
        Shifted(4)(1.0, tokens, FLUX)


def test_a_curve_that_makes_two_levels_equal_is_refused() -> None:
    with pytest.raises(PlanError, match=r"the same value .* take fewer steps or a milder curve"):
        Shifted(1000, shift=Shift.fixed(1e30))(1.0, 1024, FLUX)


def test_settings_are_keyword_only() -> None:
    kinds: list[Callable[..., Schedule]] = [Shifted, DirectSigma, Karras, Beta, LogitNormal, FlowMap]
    for kind in kinds:
        with pytest.raises(TypeError, match="positional"):
            kind(4, 1.0)


def test_the_last_level_of_the_even_grid_is_where_it_ends_before_0() -> None:
    """Stable Diffusion 3's grid: even from 1 to `last`, then 0; the shift of mu = 0 leaves it alone."""
    curve = replace(Shift.fixed(1.0), last=0.1)
    close(Shifted(5, shift=curve)(1.0, 16, FLUX), [1.0, 0.775, 0.55, 0.325, 0.1, 0.0], within=1e-12)
    close(Shifted(2, shift=curve)(0.5, 16, FLUX), [0.5, 0.05, 0.0], within=1e-12)


def test_levels_that_meet_are_refused() -> None:
    with pytest.raises(PlanError, match=r"level 2 and level 3 of 4 the same value 0.25; take fewer steps"):
        scale((1.0, 0.5, 0.5, 0.0), 0.5)
    assert scale((1.0, 0.5, 0.25, 0.0), 0.5) == (0.5, 0.25, 0.125, 0.0)


@pytest.mark.parametrize("name", ["alpha", "beta"])
def test_the_beta_distributions_ends_are_bounded(name: str) -> None:
    with pytest.raises(PlanError, match=f"^{name} must be"):
        Beta(4, **{name: 0.2})
    Beta(4, **{name: 0.25})


def test_what_is_shifted_is_a_noise_level() -> None:
    with pytest.raises(PlanError, match="^a noise level must be"):
        shift_static(1.5, 3.0)

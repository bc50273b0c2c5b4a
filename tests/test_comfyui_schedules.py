"""ComfyUI's and RES4LYF's schedules against tables and formulas that are worked out here, in NumPy."""

import importlib
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import mrflow as mf
from mrflow.errors import PlanError
from mrflow.model_info import FLUX, Shift
from mrflow.schedules import BongTangent, ComfyUI, KLOptimal, LinearQuadratic, Schedule, Shifted
from mrflow.testing import check_schedule

beta: Any = importlib.import_module("scipy.stats").beta
TOKENS = 4096
MU = FLUX.shift.mu(TOKENS, steps=1)
STEPS = [1, 2, 3, 8, 20, 50]


def table(n: int = 10_000, mu: float = MU) -> Any:
    t = np.arange(1, n + 1) / n
    return math.exp(mu) / (math.exp(mu) + 1 / t - 1)


def levels(schedule: Schedule) -> tuple[float, ...]:
    return schedule(1.0, TOKENS, FLUX)


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("n", [1000, 10_000])
def test_simple_counts_down_the_table(steps: int, n: int) -> None:
    sigmas = table(n)
    want = [sigmas[-(1 + int(x * (len(sigmas) / steps)))] for x in range(steps)]
    np.testing.assert_allclose(levels(ComfyUI("simple", steps, table=n)), [*want, 0.0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("steps", STEPS)
def test_simple_is_shifted_up_to_the_table(steps: int) -> None:
    np.testing.assert_allclose(levels(ComfyUI("simple", steps)), levels(Shifted(steps)), rtol=0, atol=4e-4)


@pytest.mark.parametrize("steps", STEPS)
def test_sgm_uniform_shifts_even_steps_to_the_lowest_level(steps: int) -> None:
    times = np.linspace(1.0, table()[0], steps + 1)[:-1]
    want = math.exp(MU) / (math.exp(MU) + 1 / times - 1)
    np.testing.assert_allclose(levels(ComfyUI("sgm_uniform", steps)), [*want, 0.0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("steps", [*STEPS, 300])
@pytest.mark.parametrize("n", [100, 10_000])
def test_beta_takes_quantiles_of_the_table_once(steps: int, n: int) -> None:
    wanted = np.rint(beta.ppf(1 - np.linspace(0, 1, steps, endpoint=False), 0.6, 0.6) * (n - 1)).astype(int)
    want = [table(n)[i] for i in dict.fromkeys(wanted.tolist())]
    wrong = np.abs(np.array(levels(ComfyUI("beta", steps, table=n))) - [*want, 0.0])
    # the median lies half-way between two entries, and SciPy's is 1e-16 off it
    assert np.count_nonzero(wrong > 1e-12) <= (steps % 2 == 0)
    assert wrong.max() < 2 / n


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize(("threshold", "linear"), [(0.025, None), (0.02, 1), (0.04, 2)])
def test_linear_quadratic_is_its_polynomial(steps: int, threshold: float, linear: int | None) -> None:
    if steps <= (linear or 1):
        assert levels(LinearQuadratic(1)) == (1.0, 0.0)
        return
    line = linear or steps // 2
    # noise a i^2 + b i + c: through the line's end with the line's slope, and 1 at the last step
    rows = [[line**2, line, 1], [2 * line, 1, 0], [steps**2, steps, 1]]
    a, b, c = np.linalg.solve(rows, [threshold, threshold / line, 1.0])
    noise = [threshold * i / line if i < line else a * i**2 + b * i + c for i in range(steps)]
    got = levels(LinearQuadratic(steps, threshold=threshold, linear=linear))
    np.testing.assert_allclose(got, [*(1 - np.array(noise)), 0.0], rtol=0, atol=1e-9)


@pytest.mark.parametrize("steps", [2, 3, 8, 20])
def test_kl_optimal_is_even_in_the_arctangent(steps: int) -> None:
    low = table()[0]
    got = levels(ComfyUI("kl_optimal", steps))
    np.testing.assert_allclose(np.arctan(got[:-1]), np.linspace(math.pi / 4, math.atan(low), steps), rtol=0, atol=1e-12)
    assert got[-1] == 0.0
    assert levels(ComfyUI("kl_optimal", 1)) == (1.0, 0.0)
    assert levels(KLOptimal(steps, low=0.02))[-2] == 0.02


@pytest.mark.parametrize("steps", [2, 3, 6, 8, 20, 50])
@pytest.mark.parametrize(("pivots", "slopes"), [((0.6, 0.6), (0.2, 0.2)), ((0.5, 0.7), (0.1, 0.4))])
def test_bong_tangent_is_two_arctangents(steps: int, pivots: tuple[float, float], slopes: tuple[float, float]) -> None:
    def curve(count: int, slope: float, pivot: float, top: float, bottom: float) -> Any:
        falls = (2 / np.pi * np.arctan(-slope * (np.arange(count) - pivot)) + 1) / 2
        return (falls - falls[-1]) / (falls[0] - falls[-1]) * (top - bottom) + bottom

    n = steps + 2
    first = int((n * pivots[0] + n * pivots[1]) / 2)
    steep = [slope * 40 / n for slope in slopes]
    upper = curve(first, steep[0], int(n * pivots[0]), 1.0, 0.5)
    lower = curve(n - first, steep[1], int(n * pivots[1]) - first, 0.5, 0.0)
    got = levels(BongTangent(steps, pivots=pivots, slopes=slopes))
    np.testing.assert_allclose(got, [*upper[:-1], *lower], rtol=0, atol=1e-12)
    assert len(got) == steps + 1
    assert levels(ComfyUI("bong_tangent", steps)) == levels(BongTangent(steps))


def test_bong_tangent_in_eight_steps() -> None:
    """Worked out by hand: ten places, six above 0.5, arctangents of slope 0.8 about the sixth and the first of them."""
    want = [math.atan(0.8 * (6 - i)) for i in range(6)]
    upper = [0.5 + 0.5 * (w - want[-1]) / (want[0] - want[-1]) for w in want]
    want = [math.atan(-0.8 * i) for i in range(4)]
    lower = [0.5 * (w - want[-1]) / (want[0] - want[-1]) for w in want]
    np.testing.assert_allclose(levels(BongTangent(8)), [*upper[:-1], *lower], rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["simple", "sgm_uniform", "beta", "linear_quadratic", "kl_optimal", "bong_tangent"])
def test_they_keep_the_laws_of_schedules(name: Any) -> None:
    if name != "sgm_uniform":  # its lowest level is shifted twice, so curves that end next to 1 leave it no room
        check_schedule(ComfyUI(name, 8))
    check_schedule(ComfyUI(name, 8, shift=Shift.fixed(1.15), table=1000))


BAD: list[tuple[Callable[[], Schedule], str]] = [
    (lambda: ComfyUI("normal", 8), "ComfyUI makes the schedules simple, .*, got 'normal'"),  # type: ignore[arg-type]
    (lambda: ComfyUI("beta", 0), "steps must be"),
    (lambda: ComfyUI("beta", 8, table=1), "table must be"),
    (lambda: ComfyUI("beta", 8, shift=3.0), "shift is a Shift"),  # type: ignore[arg-type]
    (lambda: LinearQuadratic(4, linear=4), "linear must leave steps for the parabola, got 4 of 4"),
    (lambda: LinearQuadratic(20, linear=2, threshold=0.4), "falls by 0.4 in 2 of 20 steps is too steep"),
    (lambda: LinearQuadratic(4, threshold=1.0), "threshold must be above 0 and below 1"),
    (lambda: KLOptimal(4, low=0.0), "low must be above 0"),
    (lambda: BongTangent(4, middle=1.0), "middle must be above 0 and below 1"),
]


@pytest.mark.parametrize(("make", "text"), BAD)
def test_settings_are_checked(make: Callable[[], Schedule], text: str) -> None:
    with pytest.raises(PlanError, match=text):
        make()


def test_pivots_that_leave_no_step() -> None:
    with pytest.raises(PlanError, match="the pivots leave no step for one of both parts of 4 steps"):
        levels(BongTangent(4, pivots=(0.1, 0.1)))


def test_a_record_holds_them() -> None:
    record = mf.run(mf.Sample(32, 32, ComfyUI("beta", 3)) >> mf.Decode(), mf.toy(), "a").record()
    assert "ComfyUI" in str(record)

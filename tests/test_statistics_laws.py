"""Statistics beside closed forms and slow ones: the law of many sign flips, bounds of shares, words of caveats."""

import numpy as np
import pytest
from scipy import stats
from scipy.integrate import trapezoid

import mrflow as mf
from mrflow.sweep import compare, interval
from mrflow.sweep.significance import clopper_pearson, rule_of_three, sign_flip
from mrflow.sweep.statistics import SHARES, array, caveat, compare_differences, is_share, number
from tests.test_statistics import row


@pytest.mark.parametrize("shift", [0.02, 0.06, 0.1, 0.13])
def test_many_sign_flips_are_those_of_their_characteristic_function(shift: float) -> None:
    """P(|S| < b) = 2 / pi int sin(b t) / t prod cos(t x_i) dt, of which two terms are taken; at least 1 in 20,001."""
    x = np.random.default_rng(3).normal(shift, 1, 600)
    b, t = abs(x.sum()), np.linspace(1e-9, 0.35, 20_001)
    inside = 2 / np.pi * trapezoid(np.sin(b * t) / t * np.cos(t[:, None] * x).prod(1), t)
    assert sign_flip(list(x)) == pytest.approx(max(1 - inside, 1 / 20_001), abs=4e-6)


def test_all_sign_patterns_are_tried_where_there_are_no_more_than_are_drawn() -> None:
    """Up to mirror images five signs have 16 patterns; where 15 are drawn, the observed one is the 16th."""
    assert sign_flip([1.0] * 5, flips=16) == 2 / 32
    drawn = 16 * sign_flip([1.0, 2.0, 4.0, 8.0, -3.0], flips=15)
    assert drawn == round(drawn) >= 1


def test_the_observed_pattern_counts_however_small_it_is() -> None:
    assert sign_flip([5e-324]) == 1.0


@pytest.mark.parametrize("level", [0.8, 0.95, 0.99])
@pytest.mark.parametrize("count", [1, 2, 48, 300])
def test_what_none_of_so_many_allows(count: int, level: float) -> None:
    assert stats.binom.pmf(0, count, rule_of_three(count, level)) == pytest.approx(1 - level)


def test_a_share_that_cannot_be_says_so() -> None:
    with pytest.raises(mf.PlanError, match="0 <= hits <= count and count >= 1, got 3 of 2"):
        clopper_pearson(3, 2)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_a_share_without_spread_says_what_could_hide(value: float) -> None:
    groups = {str(i): [value] for i in range(48)}
    found = interval(groups, share=True, level=0.9)
    assert (found.low, found.high) == clopper_pearson(48 * int(value), 48, 0.9)
    assert (found.mean, found.units, found.pictures) == (value, 48, 48)
    kind = "failure" if value else "success"
    assert caveat(groups, found, share=True) == f"no {kind} in 48: up to 0.061 could hide"
    assert caveat(groups, found, share=False) == "all 48 prompts alike: no interval" or found.high > found.low


def test_a_share_with_spread_has_no_caveat() -> None:
    groups = {str(i): [float(i % 2)] for i in range(48)}
    assert caveat(groups, interval(groups, share=True), share=True) == ""


def test_level_and_draws_reach_the_interval() -> None:
    groups = {str(i): [v] for i, v in enumerate(np.random.default_rng(0).normal(0, 1, 30))}
    assert compare_differences("m", groups, level=0.7, draws=9, seed=5).difference == interval(
        groups, level=0.7, draws=9, seed=5
    )
    same = compare_differences("m", {str(i): [0.0] for i in range(30)}, level=0.7, share=True)
    assert (same.difference.low, same.difference.high) == (
        -clopper_pearson(0, 30, 0.7)[1],
        clopper_pearson(0, 30, 0.7)[1],
    )
    assert same.caveat == "equal in all 30: up to 0.095 could differ"


def test_a_comparison_is_judged_at_its_level_and_drawn_from_seed_0() -> None:
    """Of 20 prompts 14 are better by 1: p = 2 P(X >= 14) = 0.115 for a fair coin, a difference at 80 % alone."""
    a = [row(f"p{i}", 0, 1.0 if i < 14 else -1.0) for i in range(20)]
    b = [row(f"p{i}", 0, 0.0) for i in range(20)]
    found = compare(a, b, "m")
    p = 2 * float(stats.binom.sf(13, 20, 0.5))
    assert found.p == pytest.approx(p, abs=0.01) and found.verdict == "no difference shown"
    assert compare(a, b, "m", level=0.8).verdict == "higher"
    a = [row(f"p{i}", 0, value) for i, value in enumerate(np.random.default_rng(0).normal(0, 1, 20))]
    own, other = (compare(a, b, "m", draws=50, seed=seed).difference for seed in (0, 1))
    assert compare(a, b, "m", draws=50).difference == own != other


def test_pictures_without_the_tag_are_a_group() -> None:
    a, b = ([row(f"p{i}", 0, float(value), kind="x") for i in range(20)] for value in (1, 0))
    assert list(compare(a, b, "m", by="kind").groups) == ["x"] and list(compare(a, b, "m", by="size").groups) == [""]


def test_numbers_of_rows() -> None:
    one = row("p", 0, 0.5)
    assert (number(one, "m"), number(one, "seconds"), number(one, "other")) == (0.5, 2.0, None)
    assert number(row("p", 0, 0.5, status="failed"), "m") is None
    out = array(iter([1, 2]))
    assert out.dtype == np.float64 and list(out) == [1.0, 2.0]


def test_a_share_is_known_by_what_stands_before_the_dot() -> None:
    for name in SHARES:
        assert is_share(name) and is_share(f"{name}.colour") and not is_share(f"x{name}") and not is_share(f"m.{name}")

"""Extrapolation over steps against polynomials and the published recursion."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mrflow.caches import Extrapolation
from mrflow.caches.extrapolate import lagrange_weights, taylor

STEPS = st.lists(st.integers(0, 60), min_size=1, max_size=5, unique=True).map(sorted)
NUMBERS = st.lists(st.floats(-5, 5), min_size=5, max_size=5)


@given(STEPS, st.integers(1, 8), NUMBERS)
def test_newton_is_exact_for_polynomials_of_its_degree(steps: list[int], ahead: int, numbers: list[float]) -> None:
    curve = np.poly1d(numbers[: len(steps)])
    at = steps[-1] + ahead
    got = sum(w * curve(s) for w, s in zip(lagrange_weights(steps, at), steps, strict=True))
    scale = sum(abs(w * curve(s)) for w, s in zip(lagrange_weights(steps, at), steps, strict=True))
    assert got == pytest.approx(curve(at), abs=1e-9 * (1 + scale))


@given(STEPS, st.integers(1, 8), NUMBERS)
def test_taylor_is_the_published_recursion(steps: list[int], ahead: int, numbers: list[float]) -> None:
    """D_0 = F, D_{i+1} = (D_i(t) - D_i(t_prev)) / (t - t_prev), sum of D_i x^i / i!, feature by feature."""
    values = numbers[: len(steps)]
    factors: list[float] = []
    for k, value in enumerate(values):
        fresh = [value]
        for i in range(len(factors)):
            fresh.append((fresh[i] - factors[i]) / (steps[k] - steps[k - 1]))
        factors = fresh
    want = sum(d * ahead**i / math.factorial(i) for i, d in enumerate(factors))
    weights = taylor(steps, steps[-1] + ahead)
    scale = sum(abs(w * v) for w, v in zip(weights, values, strict=True))
    assert sum(w * v for w, v in zip(weights, values, strict=True)) == pytest.approx(want, abs=1e-9 * (1 + scale))
    assert sum(weights) == pytest.approx(1, abs=1e-6)  # constants stay


def test_the_two_series_agree_up_to_order_1_and_taylor_misses_quadratics() -> None:
    newton, published = Extrapolation(2), Extrapolation(2, "taylor")
    assert newton.weights((0, 5), 9) == published.weights((0, 5), 9) == pytest.approx((-0.8, 1.8))
    squares = [0.0, 25.0, 100.0]
    got = [sum(w * v for w, v in zip(e.weights((0, 5, 10), 12), squares, strict=True)) for e in (newton, published)]
    assert got == pytest.approx([144.0, 100 + 2 * 15 + 2 * 2])  # D_1 = 15, D_2 = 2

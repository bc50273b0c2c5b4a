"""Solvers against flows that are known in closed form: order, exactness, published form."""

import importlib
import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mrflow.model_info import FLUX
from mrflow.schedules import Linear, Shifted
from mrflow.solvers import (
    AB2,
    AB3,
    RK4,
    DPMpp2M,
    Euler,
    Heun,
    History,
    Midpoint,
    Solver,
    integrate,
)
from tests.flows import DETERMINISTIC, ORDERS, X, gaussian, gaussian_map, mixture, name, order, point, steady
from tests.strategies import FEW, LAW, falling

integrators: Any = importlib.import_module("scipy.integrate")


def grid(steps: int, *, stop: float) -> tuple[float, ...]:
    """Uneven levels from 1 to stop."""
    unit = Shifted(steps)(1.0, 1024, FLUX)
    return tuple(stop + (1.0 - stop) * s for s in unit)


def factor(solver: Solver, steps: int, stop: float) -> float:
    """What the error of a solver holds beside the power: DPM-Solver++(2M) has a logarithm when it goes to 0."""
    return math.log(steps) if isinstance(solver, DPMpp2M) and stop == 0.0 else 1.0


# Orders


@pytest.mark.parametrize("stop", [0.0, 0.2])
@pytest.mark.parametrize(("solver", "nominal"), ORDERS, ids=name)
def test_order_on_gaussian_data(solver: Solver, nominal: int, stop: float) -> None:
    exact = gaussian_map(X, 1.0, stop, 0.4, 0.7)

    def error(steps: int) -> float:
        got = integrate(solver, gaussian(0.4, 0.7), X, grid(steps, stop=stop))
        return float((got - exact).abs().max()) / factor(solver, steps, stop)

    # The midpoint rule's leading error vanishes where the standard deviation is the root of a parabola in sigma.
    expected = 3 if isinstance(solver, Midpoint) else nominal
    assert order(error, (80, 160, 320)) == pytest.approx(expected, abs=0.25)


@pytest.mark.parametrize(("solver", "nominal"), ORDERS, ids=name)
def test_order_on_a_mixture(solver: Solver, nominal: int) -> None:
    def field(sigma: float, x: "np.ndarray[tuple[int], np.dtype[np.float64]]") -> object:
        return mixture(torch.tensor(x), sigma).numpy()

    solved = integrators.solve_ivp(field, (1.0, 0.0), X.numpy(), method="DOP853", rtol=1e-13, atol=1e-13)
    exact = torch.tensor(solved.y[:, -1])

    def error(steps: int) -> float:
        # The root of the mean square: single trajectories may cross zero error.
        error = (integrate(solver, mixture, X, grid(steps, stop=0.0)) - exact).square().mean().sqrt()
        return float(error) / factor(solver, steps, 0.0)

    assert order(error, (80, 160, 320)) == pytest.approx(nominal, abs=0.25)


def test_better_orders_are_better() -> None:
    exact = gaussian_map(X, 1.0, 0.0, 0.4, 0.7)
    errors = {
        name(s): float((integrate(s, gaussian(0.4, 0.7), X, Linear(24)(1.0, 1, FLUX)) - exact).abs().max())
        for s in DETERMINISTIC
    }
    assert errors["RK4"] < errors["AB3"] < errors["AB2"] < errors["Euler"]
    assert max(errors["Heun"], errors["Midpoint"], errors["DPMpp2M"]) < errors["Euler"] / 4


# Exactness


@FEW
@given(falling(last=0.0), st.sampled_from(DETERMINISTIC))
def test_a_point_mass_is_reached(sigmas: tuple[float, ...], solver: Solver) -> None:
    """Where all data is one point its lines are straight, and every solver is exact."""
    x0 = torch.linspace(-2, 2, 5, dtype=torch.float64)
    got = integrate(solver, point(x0), X, sigmas)
    torch.testing.assert_close(got, x0, rtol=0, atol=1e-9)


@pytest.mark.parametrize("sigma", [1.0, 0.5, 0.12, 1e-3])
def test_one_euler_step_gives_the_point_mass_from_any_level(sigma: float) -> None:
    x0 = torch.tensor([0.3, -2.0, 11.0])
    got = integrate(Euler(), point(x0), torch.tensor([5.0, 0.0, -3.0]), (sigma, 0.0))
    torch.testing.assert_close(got, x0, rtol=0, atol=2e-6)


@LAW
@given(st.sampled_from([(Euler(), 0), (Heun(), 1), (Midpoint(), 1), (RK4(), 3)]), falling(), st.data())
def test_one_step_methods_integrate_polynomials(
    case: tuple[Solver, int], sigmas: tuple[float, ...], data: st.DataObject
) -> None:
    solver, highest = case
    degree = data.draw(st.integers(0, highest))
    change = (integrate(solver, steady(degree), X, sigmas) - X)[0].item()
    assert change == pytest.approx((sigmas[-1] ** (degree + 1) - sigmas[0] ** (degree + 1)) / (degree + 1), abs=1e-12)


@pytest.mark.parametrize(("solver", "highest"), [(Heun(), 0), (Midpoint(), 1), (RK4(), 2)], ids=name)
def test_the_step_to_zero_integrates_polynomials_of_one_degree_less(solver: Solver, highest: int) -> None:
    for degree in range(highest + 1):
        change = (integrate(solver, steady(degree), X, (0.7, 0.0)) - X)[0].item()
        assert change == pytest.approx(-(0.7 ** (degree + 1)) / (degree + 1), abs=1e-14)


@LAW
@given(st.sampled_from([(AB2(), 2), (AB3(), 3)]), st.sets(st.integers(1, 100), min_size=4, max_size=4), st.data())
def test_adams_integrates_the_polynomial_through_its_past(
    case: tuple[Solver, int], cells: set[int], data: st.DataObject
) -> None:
    solver, depth = case
    degree = data.draw(st.integers(0, depth - 1))
    *before, sigma, to = [c / 100 for c in sorted(cells, reverse=True)]
    v = steady(degree)
    past: History = tuple((s, v(X, s)) for s in before[-(depth - 1) :])
    got, _ = solver.step(v, X, sigma, to, past)
    want = (to ** (degree + 1) - sigma ** (degree + 1)) / (degree + 1)
    assert (got - X)[0].item() == pytest.approx(want, abs=1e-9)


def test_dpmpp_is_its_published_form() -> None:
    """x_t = (sigma_t / sigma_s) x - alpha_t (e^-h - 1) D, the paper's own variables, step for step."""
    sigmas = (0.95, 0.8, 0.55, 0.3, 0.05)
    x = X
    olds: list[tuple[float, Tensor]] = []
    for sigma, to in pairwise(sigmas):
        lam = {s: math.log((1 - s) / s) for s in (sigma, to)}
        h = lam[to] - lam[sigma]
        clean = x - sigma * mixture(x, sigma)
        mixed = clean
        if olds:
            lam_old, clean_old = olds[-1]
            r = (lam[sigma] - lam_old) / h
            mixed = (1 + 1 / (2 * r)) * clean - 1 / (2 * r) * clean_old
        x = to / sigma * x - (1 - to) * math.expm1(-h) * mixed
        olds.append((lam[sigma], clean))
    torch.testing.assert_close(integrate(DPMpp2M(), mixture, X, sigmas), x, rtol=1e-12, atol=1e-12)

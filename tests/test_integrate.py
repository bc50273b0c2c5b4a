"""The one loop, and the laws of every solver in it."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import mrflow as mf
from mrflow.errors import NonFiniteError, PlanError, PromiseError
from mrflow.flow import Velocity
from mrflow.model_info import FLUX
from mrflow.schedules import Linear, cut
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
    Step,
    StochasticEuler,
    StochasticSolver,
    integrate,
)
from tests.flows import ALL, X, gaussian, gaussian_map, mixture, name, order, point, steady
from tests.strategies import FEW, falling

# Laws of every solver


def draw(seed: int, like: Tensor = X) -> Callable[[], Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return lambda: torch.randn(like.shape, generator=generator, dtype=like.dtype)


@FEW
@given(falling() | falling(first=1.0, last=0.0), st.sampled_from(ALL))
def test_points_are_where_the_velocity_is_asked_for_and_never_zero(sigmas: tuple[float, ...], solver: Solver) -> None:
    seen: list[float] = []

    def spy(x: Tensor, sigma: float) -> Tensor:
        seen.append(sigma)
        return gaussian(0.4, 0.7)(x, sigma)

    integrate(solver, spy, X, sigmas, noise=draw(0))
    assert tuple(seen) == solver.points(sigmas)
    assert 0.0 < min(seen) <= max(seen) <= 1.0


@pytest.mark.parametrize(
    ("solver", "one", "twelve", "cut_twelve"),
    [
        (Euler(), 1, 12, 12),
        (Heun(), 1, 23, 24),
        (Midpoint(), 2, 24, 24),
        (RK4(), 3, 47, 48),
        (AB2(), 1, 12, 12),
        (AB3(), 2, 13, 13),
        (DPMpp2M(), 1, 12, 12),
        (StochasticEuler(), 1, 12, 12),
    ],
    ids=name,
)
def test_evaluations_are_counted(solver: Solver, one: int, twelve: int, cut_twelve: int) -> None:
    assert len(solver.points((1.0, 0.0))) == one
    assert len(solver.points([(12 - i) / 12 for i in range(13)])) == twelve
    assert len(solver.points([(13 - i) / 13 for i in range(13)])) == cut_twelve
    assert len(solver.points(cut(Linear(20)(1.0, 1, FLUX), 0.4))) == cut_twelve


@pytest.mark.parametrize("solver", ALL, ids=name)
@pytest.mark.parametrize("sigmas", [(1.0, 0.0), (0.12, 0.0), (1.0, 0.3), (0.5, 0.2)])
def test_one_step_lists(solver: Solver, sigmas: tuple[float, ...]) -> None:
    got = integrate(solver, gaussian(0.4, 0.7), X, sigmas, noise=draw(1))
    assert bool(torch.isfinite(got).all())
    if not isinstance(solver, StochasticSolver):
        exact = gaussian_map(X, sigmas[0], sigmas[-1], 0.4, 0.7)
        assert float((got - exact).abs().max()) < 5 * (sigmas[0] - sigmas[1]) ** 2


@pytest.mark.parametrize("solver", [Heun(), AB2(), DPMpp2M()], ids=name)
def test_one_step_to_zero_is_eulers(solver: Solver) -> None:
    got = integrate(solver, mixture, X, (0.7, 0.0))
    torch.testing.assert_close(got, X - 0.7 * mixture(X, 0.7), rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("solver", ALL, ids=name)
@pytest.mark.parametrize(
    ("dtype", "state"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)],
)
def test_state_dtype_and_untouched_input(solver: Solver, dtype: torch.dtype, state: torch.dtype) -> None:
    x = X.to(dtype)
    before = x.clone()
    seen: set[torch.dtype] = set()

    def half(x: Tensor, sigma: float) -> Tensor:
        seen.add(x.dtype)
        return mixture(x, sigma).to(torch.bfloat16)

    got = integrate(solver, half, x, (1.0, 0.6, 0.3, 0.0), noise=draw(2))
    assert got.dtype == state
    assert seen == {state}
    assert torch.equal(x, before)


@pytest.mark.parametrize("solver", ALL, ids=name)
def test_solvers_hold_nothing(solver: Solver) -> None:
    sigmas = Linear(5)(1.0, 1, FLUX)
    first = integrate(solver, mixture, X, sigmas, noise=draw(3))
    integrate(solver, gaussian(3.0, 0.1), X + 1, sigmas, noise=draw(4))
    assert torch.equal(first, integrate(solver, mixture, X, sigmas, noise=draw(3)))
    assert hash(solver) == hash(solver)


# Noise


def test_no_churn_is_euler_and_churn_changes_it() -> None:
    sigmas = Linear(6)(1.0, 1, FLUX)
    plain = integrate(Euler(), mixture, X, sigmas)
    assert torch.equal(integrate(StochasticEuler(churn=0.0), mixture, X, sigmas, noise=draw(0)), plain)
    assert not torch.allclose(integrate(StochasticEuler(churn=1.5), mixture, X, sigmas, noise=draw(0)), plain)


def test_churn_keeps_the_marginal() -> None:
    """On Gaussian data every step is linear, so the variance of the result follows from unit responses, exactly."""
    std, churn = 0.7, 1.5

    def variance_error(steps: int) -> float:
        sigmas = Linear(steps)(1.0, 1, FLUX)

        def response(which: int) -> float:
            # to a unit of the start (which = 0) or of the noise of step `which`
            pulses = iter(float(k == which) for k in range(1, steps + 1))
            x = torch.tensor([float(which == 0)], dtype=torch.float64)
            got = integrate(
                StochasticEuler(churn=churn), gaussian(0.0, std), x, sigmas, noise=lambda: torch.tensor([next(pulses)])
            )
            return got.item()

        return abs(sum(response(k) ** 2 for k in range(steps + 1)) - std**2)

    errors = {n: variance_error(n) for n in (16, 32, 64)}
    assert errors[64] < 0.05
    assert abs(2 * errors[64] - errors[32]) < 0.002
    assert order(lambda n: errors[n], (16, 32, 64)) == pytest.approx(1, abs=0.25)


def test_noise_is_drawn_once_a_step_and_only_when_used() -> None:
    drawn: list[int] = []

    def noise() -> Tensor:
        drawn.append(1)
        return torch.zeros_like(X)

    integrate(StochasticEuler(), mixture, X, Linear(7)(1.0, 1, FLUX), noise=noise)
    assert len(drawn) == 7
    integrate(DPMpp2M(), mixture, X, Linear(7)(1.0, 1, FLUX), noise=noise)
    assert len(drawn) == 7


def test_missing_noise() -> None:
    with pytest.raises(PlanError, match=r"StochasticEuler\(churn=1.0\) adds noise; give integrate"):
        integrate(StochasticEuler(), mixture, X, (1.0, 0.0))
    with pytest.raises(PlanError, match="needs noise"):
        StochasticEuler().step(mixture, X, 1.0, 0.0, ())


@pytest.mark.parametrize("churn", [-0.1, 51.0, math.nan, math.inf, True])
def test_bad_churn(churn: float) -> None:
    with pytest.raises(PlanError, match="churn must be from 0 to 50, got "):
        StochasticEuler(churn)


# The loop


@pytest.mark.parametrize(
    ("sigmas", "text"),
    [
        ((1.0,), "at least two noise levels"),
        ((1.0, 1.0, 0.0), "must fall strictly"),
        ((0.2, 0.5), "must fall strictly"),
        ((1.0, math.nan), "level 2 of 2 must be a finite number"),
        ((2.0, 0.0), "level 1 of 2 must be from 0 to 1"),
    ],
)
def test_bad_levels_are_refused_before_any_evaluation(sigmas: tuple[float, ...], text: str) -> None:
    def never(x: Tensor, sigma: float) -> Tensor:
        raise AssertionError("evaluated")

    with pytest.raises(PlanError, match=text):
        integrate(Euler(), never, X, sigmas)


def test_a_state_of_whole_numbers_is_refused() -> None:
    with pytest.raises(PlanError, match=r"floating-point numbers, got torch.int64; call x.float\(\)"):
        integrate(Euler(), mixture, torch.zeros(2, dtype=torch.int64), (1.0, 0.0))


@pytest.mark.parametrize(("value", "what"), [(math.nan, "NaN"), (math.inf, "infinity"), (-math.inf, "infinity")])
@pytest.mark.parametrize("step", [1, 2, 4])
def test_what_is_not_finite_is_named_with_its_step(value: float, what: str, step: int) -> None:
    sigmas = (1.0, 0.8, 0.5, 0.12, 0.0)

    def broken(x: Tensor, sigma: float) -> Tensor:
        v = mixture(x, sigma)
        if sigma == sigmas[step - 1]:
            v[2] = value
        return v

    with pytest.raises(NonFiniteError) as caught:
        integrate(Euler(), broken, X, sigmas, facts=("float16", "qwen-image"))
    arrow = f"sigma {sigmas[step - 1]:g} -> {sigmas[step]:g}"
    assert str(caught.value) == f"{what} after step {step} of 4 ({arrow}, float16, qwen-image)"


def test_the_text_without_facts() -> None:
    with pytest.raises(NonFiniteError, match=r"^NaN after step 1 of 1 \(sigma 0.12 -> 0\)$"):
        integrate(Euler(), lambda x, sigma: x * math.nan, X, (0.12, 0.0))


def test_shapes_must_agree() -> None:
    with pytest.raises(PromiseError, match=r"the velocity must have the state's shape \(5,\), got \(1,\)"):
        integrate(Euler(), lambda x, sigma: x[:1], X, (1.0, 0.0))
    with pytest.raises(PromiseError, match=r"the noise must have the state's shape \(5,\), got \(2,\)"):
        integrate(StochasticEuler(), mixture, X, (1.0, 0.0), noise=lambda: torch.zeros(2))


@pytest.mark.parametrize("solver", ALL, ids=name)
def test_steps_are_told(solver: Solver) -> None:
    sigmas = (1.0, 0.7, 0.4, 0.1, 0.0)
    told: list[Step] = []
    x0 = torch.full_like(X, 0.25)
    end = integrate(solver, point(x0), X, sigmas, on_step=told.append, noise=draw(5))
    assert [(s.index, s.steps) for s in told] == [(i, 4) for i in (1, 2, 3, 4)]
    assert [(s.sigma, s.to) for s in told] == list(pairwise(sigmas))
    assert torch.equal(told[-1].x, end)
    assert torch.equal(told[-1].denoised, end)
    if isinstance(solver, Euler | DPMpp2M):
        for step in told:
            torch.testing.assert_close(step.denoised, x0, rtol=0, atol=1e-12)


def test_integration_in_two_parts_is_one() -> None:
    sigmas = Linear(8)(1.0, 1, FLUX)
    for solver in (Euler(), Heun(), Midpoint(), RK4()):
        whole = integrate(solver, mixture, X, sigmas)
        half = integrate(solver, mixture, X, sigmas[:5])
        assert torch.equal(whole, integrate(solver, mixture, half, sigmas[4:]))


@dataclass(frozen=True)
class Damped(Solver):
    """A solver of one's own is a frozen dataclass with one method."""

    amount: float = 0.5

    def step(self, v: Velocity, x: Tensor, sigma: float, to: float, past: History) -> tuple[Tensor, History]:
        return x + self.amount * (to - sigma) * v(x, sigma), past


def test_a_solver_of_ones_own() -> None:
    got = integrate(Damped(), steady(0), X, (1.0, 0.5, 0.0))
    torch.testing.assert_close(got, X - 0.5)
    assert Damped().points((1.0, 0.5, 0.0)) == (1.0, 0.5)


@pytest.mark.parametrize(("churn", "steps", "start"), [(0.0, 6, 1.0), (2.0, 8, 1.0), (20.0, 8, 1.0), (10.0, 4, 0.6)])
def test_the_variance_that_churn_leaves_is_what_a_simulation_finds(churn: float, steps: int, start: float) -> None:
    torch.manual_seed(0)
    levels = Linear(steps)(start, 1, FLUX)
    x = torch.randn(200_000, dtype=torch.float64) * (start**2 + (1 - start) ** 2) ** 0.5

    def velocity(x: Tensor, s: float) -> Tensor:
        return x * (2 * s - 1) / (s**2 + (1 - s) ** 2)

    out = integrate(StochasticEuler(churn), velocity, x, levels, noise=lambda: torch.randn_like(x))
    assert float(out.var()) == pytest.approx(StochasticEuler(churn).variance(levels), rel=0.02)


@pytest.mark.parametrize(("churn", "said"), [(0.5, False), (20.0, True)])
def test_too_much_churn_is_noted(churn: float, said: bool) -> None:
    chain = mf.Sample(64, 64, Linear(8), solver=StochasticEuler(churn)) >> mf.Decode()
    notes = mf.run(chain, mf.toy(), "x", seed=0).stages[0].notes
    assert any(f"churn {churn:g} in 8 steps leaves" in text for text in notes) == said

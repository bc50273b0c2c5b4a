"""Embedded pairs: published tableaus, tolerance, the plan's estimate, what is counted, batches, sigma 0."""

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import mrflow as mf
from mrflow.errors import PlanError
from mrflow.solvers import AdaptiveSolver, Heun, Pair, integrate
from mrflow.solvers.adaptive import BELOW_THE_END, BOGACKI_SHAMPINE, DORMAND_PRINCE
from mrflow.testing import check_solver
from tests.flows import X, mixture

scipy: Any = importlib.import_module("scipy.integrate")
ONE = mf.Explicit((1.0, 0.0))
PAIRS: list[Callable[..., AdaptiveSolver]] = [mf.BogackiShampine, mf.DormandPrince]


@pytest.mark.parametrize("make", PAIRS)
@pytest.mark.parametrize("zero", [False, True])
def test_they_keep_the_laws(make: Callable[..., AdaptiveSolver], *, zero: bool) -> None:
    check_solver(make(zero=zero), order=3)


# Tableaus


@pytest.mark.parametrize(("pair", "name"), [(BOGACKI_SHAMPINE, "RK23"), (DORMAND_PRINCE, "RK45")])
def test_tableaus_are_those_of_scipy(pair: Pair, name: str) -> None:
    theirs = getattr(scipy, name)
    stages = len(theirs.C)
    np.testing.assert_allclose(pair.nodes[:stages], theirs.C, rtol=1e-15)
    np.testing.assert_allclose(pair.weights[:stages], theirs.B, rtol=1e-15)
    np.testing.assert_allclose(np.abs(pair.error), np.abs(theirs.E), rtol=1e-12, atol=1e-16)
    for own, row in zip(pair.rows, theirs.A, strict=False):
        np.testing.assert_allclose(own, row[: len(own)], rtol=1e-15)


@pytest.mark.parametrize(
    ("pair", "orders"), [(BOGACKI_SHAMPINE, (3, 2)), (BELOW_THE_END, (3, 2)), (DORMAND_PRINCE, (5, 4))]
)
def test_both_methods_integrate_powers(pair: Pair, orders: tuple[int, int]) -> None:
    for sign, order in zip((0, 1), orders, strict=True):
        weights = [w - sign * e for w, e in zip(pair.weights, pair.error, strict=True)]
        for k in range(order):
            got = sum(w * c**k for w, c in zip(weights, pair.nodes, strict=True))
            assert got == pytest.approx(1 / (k + 1), abs=1e-14)


# Tolerance and cost


@pytest.mark.parametrize("make", PAIRS)
def test_a_smaller_tolerance_costs_more_and_is_nearer(make: Callable[..., AdaptiveSolver]) -> None:
    solved = scipy.solve_ivp(
        lambda s, x: mixture(torch.tensor(x), s).numpy(), (1, 0), X.numpy(), method="DOP853", rtol=1e-13, atol=1e-13
    )
    exact, asked, wrong = torch.tensor(solved.y[:, -1]), list[list[float]](), list[float]()

    def watched(x: Tensor, sigma: float) -> Tensor:
        asked[-1].append(sigma)
        return mixture(x, sigma)

    for tolerance in (1e-2, 1e-4, 1e-6):
        asked.append([])
        wrong.append(float((integrate(make(tolerance), watched, X[None], (1.0, 0.0)) - exact).abs().max()))
    assert wrong[0] > 30 * wrong[2]
    assert all(error < 30 * tolerance for error, tolerance in zip(wrong, (1e-2, 1e-4, 1e-6), strict=True))
    assert max(len(asked[0]), len(asked[1])) < len(asked[2])
    assert all(0 < sigma <= 1 for each in asked for sigma in each)


def test_the_last_stage_is_the_next_steps_first() -> None:
    """The velocity is constant, so every step stands and grows fivefold: 1 -> .75 -> 0, and 1 -> .75 -> .5 -> 0."""
    steps, asked = mf.BogackiShampine(zero=True), list[float]()

    def steady(x: Tensor, sigma: float) -> Tensor:
        asked.append(sigma)
        return torch.ones_like(x)

    integrate(steps, steady, X[None], (1.0, 0.0))
    assert asked == [1.0, 0.875, 0.8125, 0.75, 0.375, 0.1875, 0.0]
    asked.clear()
    integrate(steps, steady, X[None], (1.0, 0.5, 0.0))
    assert asked == [1.0, 0.875, 0.8125, 0.75, 0.625, 0.5625, 0.5, 0.25, 0.125, 0.0]
    asked.clear()
    integrate(mf.BogackiShampine(), steady, X[None], (1.0, 0.0))
    assert asked == [1.0, 0.875, 0.8125, 0.75, 0.375, 0.1875]


def test_a_field_that_jumps_is_refused_with_its_place() -> None:
    def jumps(x: Tensor, sigma: float) -> Tensor:
        return torch.full_like(x, 1e6 if sigma < 0.4321 else 0.0)

    with pytest.raises(PlanError, match=r"needs steps shorter than 1e-7 at sigma 0.432"):
        integrate(mf.BogackiShampine(1e-6), jumps, X[None], (1.0, 0.0))


@pytest.mark.parametrize("tolerance", [0.0, -1.0, 2.0, float("nan")])
def test_tolerances_are_checked(tolerance: float) -> None:
    with pytest.raises(PlanError, match="tolerance must be from"):
        mf.DormandPrince(tolerance)


# Sigma 0


def test_the_field_at_zero_is_asked_for_only_by_a_solver_that_was_told() -> None:
    for solver in (mf.BogackiShampine(), mf.DormandPrince()):
        assert min(solver.points((1.0, 0.0))) > 0
    for solver in (mf.BogackiShampine(zero=True), mf.DormandPrince(zero=True)):
        assert min(solver.points((1.0, 0.0))) == 0

    class Untold(Heun):
        def step(self, v: Any, x: Tensor, sigma: float, to: float, past: Any) -> Any:
            return x + (to - sigma) * v(x, to), ()

    with pytest.raises(PlanError, match="asks for the field at sigma 0; no solver may .* unless it was told"):
        integrate(Untold(), mixture, X, (1.0, 0.0))


def test_a_model_says_whether_it_may_be_asked_there() -> None:
    chain = mf.Sample(32, 32, ONE, solver=mf.DormandPrince(zero=True)) >> mf.Decode()
    assert mf.plan(chain, mf.toy().info).nfe > 0
    with pytest.raises(PlanError, match=r"pocket.* cannot be asked for its field at sigma 0.* leave out zero=True"):
        mf.plan(mf.Sample(128, 128, ONE, solver=mf.DormandPrince(zero=True)) >> mf.Decode(), mf.POCKET)


# Chains


@pytest.mark.parametrize("make", PAIRS)
def test_a_plan_is_an_estimate_and_a_record_says_what_was_done(make: Callable[..., AdaptiveSolver]) -> None:
    chain = mf.Sample(32, 32, ONE, solver=make(1e-3), guidance=mf.CFG(2.0)) >> mf.Decode()
    model = mf.toy()
    asked: list[int] = []
    field = model.field

    def watched(*args: Any, **kwargs: Any) -> Any:
        inner = field(*args, **kwargs)
        return lambda x, sigma: (asked.append(len(x)), inner(x, sigma))[1]

    model.field = watched  # type: ignore[method-assign]
    result = mf.run(chain, model, ["a", "b"], seed=[1, 2])
    assert result.plan.work.estimated
    assert "~" in str(result.plan)
    assert set(asked) == {1}  # pictures go alone
    assert 2 * result.nfe in (len(asked), len(asked) + 1)  # a batch's mean, rounded up
    assert result.nfe / 3 < result.plan.nfe < 3 * result.nfe


def test_pictures_of_a_batch_have_steps_of_their_own() -> None:
    chain = mf.Sample(32, 32, ONE, solver=mf.BogackiShampine()) >> mf.Decode()
    both = mf.run(chain, mf.toy(), ["a red house", "b"], seed=[1, 2])
    for i, prompt in enumerate(("a red house", "b")):
        assert torch.equal(both.pixels[i : i + 1], mf.run(chain, mf.toy(), prompt, seed=i + 1).pixels)


def test_levels_of_the_schedule_are_kept() -> None:
    seen: list[float] = []
    integrate(mf.BogackiShampine(), mixture, X[None], (1.0, 0.6, 0.3, 0.0), on_step=lambda step: seen.append(step.to))
    assert seen == [0.6, 0.3, 0.0]


def test_a_cache_must_know_before() -> None:
    chain = mf.Sample(128, 128, ONE, solver=mf.BogackiShampine(), cache=mf.caches.TeaCache(0.1)) >> mf.Decode()
    with pytest.raises(PlanError, match=r"BogackiShampine\(.* chooses its sigmas while it runs, and TeaCache"):
        mf.plan(chain, mf.POCKET)


def test_a_record_holds_them() -> None:
    chain = mf.Sample(32, 32, ONE, solver=mf.DormandPrince(1e-2)) >> mf.Decode()
    record = mf.run(chain, mf.toy(), "a").record()
    assert "DormandPrince" in str(record) and "0.01" in str(record)


@pytest.mark.parametrize("make", PAIRS)
def test_the_error_is_measured_against_one_and_the_state(make: Callable[..., AdaptiveSolver]) -> None:
    """Of dx / dsigma = cos(40 sigma), far from 0, as near 0 at a tolerance that is as much larger as 1 + |x|."""

    def asked(x: float, tolerance: float) -> int:
        seen = list[float]()

        def v(state: Tensor, sigma: float) -> Tensor:
            seen.append(sigma)
            return torch.full_like(state, np.cos(40 * sigma))

        integrate(make(tolerance), v, torch.full((1, 4), x, dtype=torch.float64), (1.0, 0.0))
        return len(seen)

    near, far, loose = asked(0.0, 1e-6), asked(999.0, 1e-6), asked(0.0, 1e-3)
    assert abs(far - loose) <= make().evals and near > 2 * loose


class Ralston(AdaptiveSolver):
    """A pair of one's own, whose last stage is no first one."""

    evals = 3

    @property
    def pair(self) -> Pair:
        """Order 3 beside the midpoint rule."""
        return BELOW_THE_END


def test_a_pair_that_reuses_nothing_goes_from_level_to_level() -> None:
    levels = (0.9, 0.5, 0.3, 0.1)
    out = integrate(Ralston(1e-4), mixture, X, levels)
    torch.testing.assert_close(out, integrate(mf.DormandPrince(1e-6), mixture, X, levels), rtol=0, atol=2e-3)
    past = Ralston(1e-4).step(mixture, X, 0.9, 0.5, ())[1]
    assert len(past) == 1 and past[0][1].dtype == torch.float64 and past[0][1].shape == (len(X),)

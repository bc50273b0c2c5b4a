"""Exponential integrators and SA-Solver: their weights, their orders, and diffusers' schedulers step for step."""

import importlib
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import mrflow as mf
from mrflow.errors import PlanError
from mrflow.solvers import DEIS, RES2M, RES2S, RES3S, DPMpp2M, SASolver, Solver, UniPC, integrate
from mrflow.solvers.base import half_log_snr
from mrflow.solvers.exponential import exponential_weights, phi
from mrflow.testing import check_solver
from tests.flows import EXPONENTIAL, STOCHASTIC, X, mixture

integral: Any = importlib.import_module("scipy.integrate").quad
BELOW_ONE = [0.9 * (1 - i / 8) ** 1.2 for i in range(8)]


@pytest.mark.parametrize(("solver", "order"), EXPONENTIAL, ids=repr)
def test_they_keep_the_laws_with_their_orders(solver: Solver, order: int) -> None:
    check_solver(solver, order=order)


@pytest.mark.parametrize("solver", STOCHASTIC, ids=repr)
def test_stochastic_solvers_keep_the_marginal(solver: Solver) -> None:
    check_solver(solver, order=1)


# Weights


@pytest.mark.parametrize("z", [-30.0, -2.5, -0.9, -1e-3, 0.0, 1e-6, 0.99, 1.01, 4.0])
def test_phi_is_its_integral(z: float) -> None:
    assert phi(0, z) == pytest.approx(math.exp(z), rel=1e-13)
    for k in (1, 2, 3, 4):

        def weighted(t: float, k: int = k) -> float:
            return math.exp(z * (1 - t)) * t ** (k - 1) / math.factorial(k - 1)

        assert phi(k, z) == pytest.approx(integral(weighted, 0, 1, epsabs=0, epsrel=1e-12)[0], rel=1e-9)


@pytest.mark.parametrize("nodes", [(0.0,), (-1.3, 0.0), (0.0, 0.5), (-2.0, -0.7, 0.0), (-1.0, 0.0, 1.0)])
@pytest.mark.parametrize("z", [-3.0, -0.2, 0.7])
def test_weights_integrate_polynomials(nodes: tuple[float, ...], z: float) -> None:
    weights = exponential_weights(nodes, z)
    for degree in range(len(nodes)):

        def weighted(t: float, degree: int = degree) -> float:
            return math.exp(z * (1 - t)) * t**degree

        got = sum(w * r**degree for w, r in zip(weights, nodes, strict=True))
        assert got == pytest.approx(integral(weighted, 0, 1, epsabs=1e-13)[0], abs=1e-10)


LINEAR = (RES2M(), RES2S(), RES3S(), SASolver(0.0, 2, 2))


@pytest.mark.parametrize("solver", LINEAR, ids=repr)
def test_estimates_that_are_linear_in_the_log_snr_are_integrated(solver: Solver) -> None:
    """x' = (s' / s) x + s' times the integral of e^lambda D(lambda), where D depends on lambda alone."""

    def velocity(x: Tensor, sigma: float) -> Tensor:
        return (x - (0.3 - 0.8 * half_log_snr(sigma))) / sigma

    def exact(x: Tensor, sigma: float, to: float) -> Tensor:
        def weighted(t: float) -> float:
            return math.exp(t) * (0.3 - 0.8 * t)

        return to / sigma * x + to * integral(weighted, half_log_snr(sigma), half_log_snr(to), epsabs=1e-13)[0]

    levels = (0.9, 0.7, 0.45, 0.2)
    state = [X, *states(solver, levels, X, velocity)]
    if isinstance(solver, SASolver):  # its corrector comes a step later, with the estimate at its end
        torch.testing.assert_close(state[3], exact(exact(X, 0.9, 0.45), 0.45, 0.2), rtol=0, atol=1e-10)
    else:
        torch.testing.assert_close(state[3], exact(state[1], 0.7, 0.2), rtol=0, atol=1e-10)


@pytest.mark.parametrize(("solver", "before"), [(DEIS(3), 0), (RES2M(), 0), (SASolver(0.0, 3, 0), 2)], ids=repr)
def test_an_estimate_at_sigma_one_is_infinitely_far_away(solver: Solver, before: int) -> None:
    def end(estimate: float) -> Tensor:
        past = (*[(1.0, X)] * before, (1.0, torch.full_like(X, estimate)))
        more: dict[str, Any] = {"noise": X} if before else {}
        return solver.step(mixture, X, 0.8, 0.6, past, **more)[0]

    assert torch.equal(end(0.0), end(100.0))


@pytest.mark.parametrize(("solver", "degree"), [(RES2S(), 1), (RES3S(), 2)], ids=repr)
@pytest.mark.parametrize(("sigma", "to"), [(1.0, 0.7), (0.4, 0.0), (1.0, 0.0)])
def test_where_lambda_is_infinite_steps_integrate_powers_of_sigma(
    solver: Solver, degree: int, sigma: float, to: float
) -> None:
    def made(power: int) -> Tensor:
        return integrate(solver, lambda x, s: torch.full_like(x, (power + 1) * s**power), X, (sigma, to)) - X

    for power in range(degree + 1):
        want = torch.full_like(X, to ** (power + 1) - sigma ** (power + 1))
        torch.testing.assert_close(made(power), want, rtol=0, atol=1e-12)
    assert float((made(degree + 1) - (to ** (degree + 2) - sigma ** (degree + 2))).abs().max()) > 1e-5


@pytest.mark.parametrize("tau", [0.0, 0.5, 1.0])
def test_from_sigma_one_all_noise_is_new_or_none_is(tau: float) -> None:
    """The limit of an infinite step in lambda: (1 - s') D and noise of s', which is drawn where tau is not 0."""
    x, drawn = torch.linspace(-1, 1, 5, dtype=torch.float64), torch.linspace(2, 3, 5, dtype=torch.float64)
    clean = x - mixture(x, 1.0)
    out, _ = SASolver(tau).step(mixture, x, 1.0, 0.6, (), noise=drawn)
    torch.testing.assert_close(out, 0.4 * clean + 0.6 * (drawn if tau else x), rtol=0, atol=1e-12)
    if tau:  # what the formula gives next to 1
        near, _ = SASolver(tau).step(lambda x, _: mixture(x, 1.0), x, 1 - 1e-12, 0.6, (), noise=drawn)
        torch.testing.assert_close(near, out, rtol=0, atol=2e-3)


# diffusers


def states(
    solver: Solver,
    levels: "list[float] | tuple[float, ...]",
    x: Tensor,
    velocity: Callable[[Tensor, float], Tensor] = mixture,
    noise: Callable[[], Tensor] = lambda: torch.zeros_like(X),
) -> list[Tensor]:
    made: list[Tensor] = []
    integrate(solver, velocity, x, levels, on_step=lambda step: made.append(step.x), noise=noise)
    return made


def latents() -> Tensor:
    return torch.randn(1, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def theirs(scheduler: Any, levels: list[float], **more: object) -> list[Tensor]:
    scheduler.sigmas = torch.tensor(levels, dtype=torch.float64)
    made = [latents()]
    for sigma, t in zip(levels[:-1], scheduler.timesteps, strict=True):
        made.append(scheduler.step(mixture(made[-1], sigma), t, made[-1], return_dict=False, **more)[0])
    return made[1:]


@pytest.mark.parity
@pytest.mark.parametrize("start", [0.9, 1.0])
@pytest.mark.parametrize("variant", ["bh1", "bh2"])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_unipc_is_that_of_diffusers(order: int, variant: Any, start: float) -> None:
    from diffusers import UniPCMultistepScheduler

    levels = [start * (1 - i / 8) ** 1.2 for i in range(9)]
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, solver_order=order, solver_type=variant
    )
    scheduler.set_timesteps(sigmas=np.array(levels[:-1]))
    want = theirs(scheduler, [min(s, 1 - 1e-6) for s in levels])
    # its bh1 gives NaN in the step to 0; the step before that one has order 2 at the most
    same = 6 if order == 3 else 7 if variant == "bh1" else 8
    for mine, other in zip(states(UniPC(order, variant), levels, latents())[:same], want[:same], strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-12 if start < 1 else 1e-5)


@pytest.mark.parity
@pytest.mark.parametrize("start", [0.9, 0.6])
def test_dpmpp_is_that_of_diffusers(start: float) -> None:
    """Below sigma 1, where its steps are finite, to the float32 that diffusers computes in."""
    from diffusers import DPMSolverMultistepScheduler

    levels = [start * (1 - i / 8) ** 1.2 for i in range(9)]
    scheduler = DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, solver_order=2, lower_order_final=False
    )
    scheduler.set_timesteps(8)
    for mine, other in zip(states(DPMpp2M(), levels, latents())[:7], theirs(scheduler, levels)[:7], strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-6)


@pytest.mark.parity
@pytest.mark.parametrize("order", [1, 2, 3])
def test_deis_is_that_of_diffusers(order: int) -> None:
    from diffusers import DEISMultistepScheduler

    scheduler = DEISMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, solver_order=order, lower_order_final=False
    )
    scheduler.set_timesteps(7)
    want = theirs(scheduler, BELOW_ONE)
    for mine, other in zip(states(DEIS(order), BELOW_ONE, latents()), want, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-12)


def sa_scheduler(order: int, tau: float) -> Any:
    from diffusers import SASolverScheduler

    scheduler = SASolverScheduler(
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        predictor_order=order,
        corrector_order=order,
        tau_func=lambda t: torch.tensor(tau, dtype=torch.float64),
        lower_order_final=False,
    )
    scheduler.set_timesteps(7)
    scheduler.timesteps = torch.arange(7, 0, -1)
    return scheduler


@pytest.mark.parity
@pytest.mark.parametrize("tau", [0.0, 0.6, 1.0])
def test_sa_solver_of_order_one_is_that_of_diffusers(tau: float) -> None:
    draws = [torch.Generator().manual_seed(3) for _ in range(2)]
    want = theirs(sa_scheduler(1, tau), BELOW_ONE, generator=draws[0])

    def noise() -> Tensor:
        return torch.randn(1, 3, 4, 4, generator=draws[1], dtype=torch.float64)

    for mine, other in zip(states(SASolver(tau, 1, 1), BELOW_ONE, latents(), noise=noise), want, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-12)


@pytest.mark.parity
@pytest.mark.parametrize("tau", [0.0, 1.0])
@pytest.mark.parametrize("end", [False, True])
def test_sa_solver_of_order_three_has_the_weights_of_diffusers(tau: float, *, end: bool) -> None:
    lambdas = [half_log_snr(s) for s in (0.3, 0.5, 0.7)]  # newest first
    begin, to = (lambdas[1], lambdas[0]) if end else (lambdas[0], half_log_snr(0.2))
    wide = [torch.tensor(each, dtype=torch.float64) for each in (begin, to, *lambdas, tau)]
    want = sa_scheduler(3, tau).get_coefficients_fn(3, wide[0], wide[1], wide[2:5], wide[5])
    h, rate = to - begin, 1 + tau**2
    got = exponential_weights([(each - begin) / h for each in lambdas], -rate * h)
    for mine, other in zip(got, want, strict=True):
        assert h * mine == pytest.approx(math.exp(-rate * to) * float(other), rel=1e-6)


# Settings


BAD: list[tuple[Callable[[], Solver], str]] = [
    (lambda: UniPC(4), "solver_order must be"),
    (lambda: UniPC(2, "bh3"), "is 'bh1' or 'bh2', got 'bh3'"),  # type: ignore[arg-type]
    (lambda: DEIS(0), "solver_order must be"),
    (lambda: SASolver(-0.1), "tau must be from 0 to 10"),
    (lambda: SASolver(corrector=4), "corrector must be"),
    (lambda: SASolver(low=0.5, high=0.4), "low < high, got low 0.5, high 0.4"),
]


@pytest.mark.parametrize(("make", "text"), BAD)
def test_settings_are_checked(make: Callable[[], Solver], text: str) -> None:
    with pytest.raises(PlanError, match=text):
        make()


def test_noise_is_needed() -> None:
    with pytest.raises(PlanError, match="SASolver.step needs noise"):
        SASolver().step(mixture, X, 1.0, 0.5, ())


@pytest.mark.parametrize("solver", [UniPC(), DEIS(), RES2M(), RES2S(), RES3S(), SASolver()], ids=repr)
def test_they_sample_and_refine_in_a_chain(solver: Solver) -> None:
    low = mf.Sample(32, 32, mf.Linear(6), solver=solver) >> mf.Decode()
    chain = low >> mf.Encode() >> mf.Reinject(0.3) >> mf.Refine(mf.Linear(2), solver=solver) >> mf.Decode()
    result = mf.run(chain, mf.toy(), ["a", "b"], seed=[1, 2])
    assert bool(torch.isfinite(result.pixels).all())
    alone = mf.run(chain, mf.toy(), "b", seed=2)
    torch.testing.assert_close(result.pixels[1:], alone.pixels, rtol=0, atol=1e-6)
    assert result.nfe == result.plan.nfe

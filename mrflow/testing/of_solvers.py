"""The laws of solvers."""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from mrflow.flow import Velocity
from mrflow.solvers import RK4, AdaptiveSolver, Solver, StochasticSolver, integrate
from mrflow.testing.laws import Laws, demand
from mrflow.testing.toy import Mixture

CENTRES, STD, BEGINS = (-0.9, 0.7), 0.4, (0.55, -0.4, 1.3)
MIXTURE = Mixture(torch.tensor([[m] for m in CENTRES], dtype=torch.float64), STD)


SOLVER_LAWS = Laws("solver", "solvers are frozen: `mrflow.solvers`")


def check_solver(solver: Solver, *, order: float) -> None:
    """Hold a solver to the laws of solvers in `LAWS`; `order` is its order of convergence.

    A `StochasticSolver` is held to its marginal instead of an order: there is no one curve that it follows. One that
    chooses its own steps (`estimated`) is held to its `tolerance` instead, and to nothing where it has none.

    Raises:
        LawBroken: naming the law and what was measured. PlanError: it asks for the field at sigma 0.
    """
    SOLVER_LAWS.hold(solver, order=order)


def _even(n: int) -> list[float]:
    """n even steps from sigma 0.9 to 0.2."""
    return [0.9 - 0.7 * i / n for i in range(n + 1)]


def uneven(n: int, *, start: float = 1.0, to: float = 0.2) -> list[float]:
    """n steps from `start` to `to` whose lengths repeat eight random ones, from 0.4 to 2.2 of the mean."""
    draw = random.Random(7)
    eight = [draw.uniform(0.4, 2.2) for _ in range(8)]
    lengths = [eight[i % 8] for i in range(n)]
    return [start - (start - to) * sum(lengths[:i]) / sum(lengths) for i in range(n)] + [to]


def measured_order(
    solver: Solver, *, steps: Sequence[int] = (32, 64, 128), grid: Callable[[int], list[float]] = _even
) -> float:
    """The order of convergence on the flow of a one-dimensional mixture, along the levels of `grid`.

    The exact solution keeps its quantile: F(x, sigma) is constant along the flow, with F the mixture's distribution
    function, because trajectories in one dimension never cross. It is solved for x by bisection.
    """

    def quantile(x: float, s: float) -> float:
        spread = math.sqrt(2 * ((1 - s) ** 2 * STD**2 + s * s))
        return sum(0.5 + 0.5 * math.erf((x - (1 - s) * m) / spread) for m in CENTRES) / len(CENTRES)

    def exact(x: float) -> float:
        high, low, target = 10.0, -10.0, quantile(x, grid(steps[0])[0])
        for _ in range(80):
            middle = (low + high) / 2
            low, high = (middle, high) if quantile(middle, grid(steps[0])[-1]) < target else (low, middle)
        return low

    want = torch.tensor([[exact(x)] for x in BEGINS], dtype=torch.float64)
    errors = []
    for n in steps:
        x = torch.tensor([[x] for x in BEGINS], dtype=torch.float64)
        errors.append(max(float((integrate(solver, MIXTURE.velocity, x, grid(n)) - want).norm()), 1e-15))
    return math.log(errors[0] / errors[-1]) / math.log(steps[-1] / steps[0])


@SOLVER_LAWS.law("order", "|x_n - x| = O(n^-p)", "F(x, sigma) is constant along the flow of a one-dimensional mixture")
def _even_order(solver: Solver, order: float) -> None:
    """Its error falls with its order where steps are even."""
    if not isinstance(solver, StochasticSolver) and not solver.estimated:
        got = measured_order(solver)
        demand(abs(got - order) < 0.35, f"order {got:.2f} on the mixture's flow, not {order:g}")


@SOLVER_LAWS.law(
    "order on uneven levels",
    "|x_n - x| = O(n^-p)",
    "as `order`; Hairer, Norsett & Wanner, Solving ODEs I, III.5 (variable steps)",
)
def _uneven_order(solver: Solver, order: float) -> None:
    """Its order holds from sigma 1 on uneven levels too."""
    if not isinstance(solver, StochasticSolver) and not solver.estimated:
        got, order = measured_order(solver, steps=(64, 256), grid=uneven), min(order, solver.order_at_ends)
        demand(got > order - 0.45, f"order {got:.2f} on uneven levels from sigma 1, not {order:g}")


@SOLVER_LAWS.law("point mass", "v = (x - x0) / sigma => x(0) = x0", "arXiv 2209.03003: straight paths need one step")
def _point(solver: Solver, order: float) -> None:
    """Data of one point are reached exactly at sigma 0."""
    if solver.at_zero:  # this field is 0/0 there
        return
    target = torch.tensor([[0.3, -0.7]], dtype=torch.float64)

    def towards(x: Tensor, sigma: float) -> Tensor:
        return (x - target) / sigma

    for sigmas in ([0.12, 0.0], [1.0, 0.75, 0.5, 0.25, 0.0], uneven(8, to=0.0), uneven(3, start=0.4, to=0.0)):
        end = integrate(solver, towards, torch.ones_like(target), sigmas, noise=_noise(target))
        error = float((end - target).abs().max())
        demand(error < 1e-9, f"a point mass is missed by {error:.2g} over {[round(s, 3) for s in sigmas]}")


def _noise(like: Tensor) -> Callable[[], Tensor]:
    generator = torch.Generator().manual_seed(1)
    return lambda: torch.randn(like.shape, generator=generator, dtype=like.dtype)


def _data(n: int = 3) -> Tensor:
    return torch.linspace(-1.1, 1.3, n, dtype=torch.float64)[:, None]


GRID = uneven(6, start=0.95, to=0.0)


def _made(solver: Solver, x: Tensor, velocity: Velocity = MIXTURE.velocity) -> Tensor:
    # every item of a batch has the same noise, so that it can be made alone as well
    draw = _noise(x[:1])
    return integrate(solver, velocity, x, GRID, noise=lambda: draw().expand_as(x))


@SOLVER_LAWS.law("untouched", "x' is a new tensor")
def _untouched(solver: Solver, order: float) -> None:
    """It changes no tensor that it is given."""
    seen: list[tuple[str, Tensor, Tensor]] = []

    def watched(x: Tensor, sigma: float) -> Tensor:
        v = MIXTURE.velocity(x, sigma)
        seen.append((f"the velocity at sigma {sigma:.3g}", v, v.clone()))
        return v

    x = _data()
    seen.append(("the state it began with", x, x.clone()))
    integrate(
        solver,
        watched,
        x,
        GRID,
        noise=_noise(x),
        on_step=lambda step: seen.append((f"the state at sigma {step.to:.3g}", step.x, step.x.clone())),
    )
    for what, now, then in seen:
        demand(torch.equal(now, then), f"it changed {what} in place; make new tensors")


@SOLVER_LAWS.law("stateless", "step = f(v, x, sigma, to, past)")
def _stateless(solver: Solver, order: float) -> None:
    """It remembers nothing but `past`: integrations do not meet."""
    x = _data()
    want = _made(solver, x)
    demand(torch.equal(_made(solver, x), want), "the same integration gives something else the second time")
    _made(solver, -2 * x)

    def interrupted(x: Tensor, sigma: float) -> Tensor:
        integrate(solver, MIXTURE.velocity, x + 1, [0.9, 0.5, 0.2], noise=_noise(x))
        return MIXTURE.velocity(x, sigma)

    ok = torch.equal(_made(solver, x, interrupted), want)
    demand(ok, "another integration in between changes this one; what it remembers goes through `past`")


@SOLVER_LAWS.law(
    "items", "step(x)_i = step(x_i)", "a picture depends on (chain, model, prompt, seed) alone: `mrflow.run`"
)
def _items(solver: Solver, order: float) -> None:
    """An item of a batch is what it is alone."""
    x = _data()
    whole = _made(solver, x)
    for i in range(len(x)):
        error = float((_made(solver, x[i : i + 1]) - whole[i : i + 1]).abs().max())
        demand(error < 1e-9, f"item {i} alone differs from item {i} of a batch by {error:.2g}")


@SOLVER_LAWS.law("evaluations", "points = levels asked at", "what `plan` counts: `mrflow.Plan.nfe`")
def _evals(solver: Solver, order: float) -> None:
    """It asks for the field where `points` says, and `evals` times in a full step."""
    sigmas, counted = _even(5), list[list[float]]()

    def counting(x: Tensor, sigma: float) -> Tensor:
        counted[-1].append(sigma)
        return MIXTURE.velocity(x, sigma)

    counted.append([])
    x = _data()
    integrate(solver, counting, x, sigmas, noise=_noise(x), on_step=lambda step: counted.append([]))
    asked = tuple(sigma for step in counted for sigma in step)
    claimed = tuple(solver.points(sigmas))
    if solver.estimated:
        demand(bool(claimed) and max(claimed) <= sigmas[0] and min(claimed) >= 0, f"its points are {claimed}")
        return
    demand(asked == claimed, f"it asks for the field at {asked}, and its points say {claimed}")
    full = len(counted[2])
    demand(full == solver.evals, f"a full step takes {full} evaluations, and `evals` says {solver.evals}")


@SOLVER_LAWS.law(
    "tolerance", "|x - x_exact| < 30 tolerance", "Hairer, Norsett & Wanner, Solving ODEs I, II.4 (step size control)"
)
def _tolerance(solver: Solver, order: float) -> None:
    """One that chooses its steps makes errors of the size of its tolerance."""
    if not isinstance(solver, AdaptiveSolver):
        return
    x, wrong = _data(5), list[float]()
    for sigmas in ([0.9, 0.2], [1.0, 0.4, 0.0]):
        want = integrate(
            RK4(), MIXTURE.velocity, x, [sigmas[0] + (sigmas[-1] - sigmas[0]) * i / 1000 for i in range(1001)]
        )
        for tolerance in (1e-3, 1e-6):
            got = integrate(replace(solver, tolerance=tolerance), MIXTURE.velocity, x, sigmas)
            wrong.append(float((got - want).abs().max()) / tolerance)
    demand(max(wrong) < 30, f"its error is {max(wrong):.2g} times its tolerance")


def _variance(solver: StochasticSolver, n: int, start: float) -> float:
    """The variance at 0.1 over the true one, exactly, for unit Gaussian data and its exact velocity.

    Both are linear, so the end is a sum of unit responses: item 0 begins at 1 without noise, item i begins at 0 and has
    noise 1 in step i alone. Its variance is the sum of their squares, the first times the variance at the start.
    """
    sigmas = [start - (start - 0.1) * i / n for i in range(n + 1)]

    def true(s: float) -> float:
        return s * s + (1 - s) ** 2

    def velocity(x: Tensor, sigma: float) -> Tensor:
        return (2 * sigma - 1) / true(sigma) * x

    unit = torch.eye(n + 1, dtype=torch.float64)[:, :, None]
    draws = iter(range(1, n + 1))
    response = integrate(solver, velocity, unit[0], sigmas, noise=lambda: unit[next(draws)]).square().flatten()
    return float(response[0] * true(sigmas[0]) + response[1:].sum()) / true(sigmas[-1])


@SOLVER_LAWS.law(
    "marginal",
    "a^2 m(sigma_0) + sum b_i^2 -> m(sigma_n), m(s) = s^2 + (1 - s)^2",
    "arXiv 2206.00364, app. B: the SDE has the marginals of the ODE",
)
def _marginal(solver: Solver, order: float) -> None:
    """A stochastic solver leaves the variance of the flow, as steps get finer."""
    if not isinstance(solver, StochasticSolver):
        return
    for start in (0.9, 1.0):
        few, many = _variance(solver, 64, start), _variance(solver, 512, start)
        ok = abs(many - 1) < 0.01 or abs(many - 1) < 0.3 * abs(few - 1)
        left = f"{few:.3f} of the true variance in 64 steps from sigma {start:g} and {many:.3f} in 512"
        demand(ok, f"it leaves {left}; it must go to 1")

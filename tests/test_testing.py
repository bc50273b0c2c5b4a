"""The laws for others, and the toy they are measured on."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import mrflow as mf
from mrflow.testing import LawBroken, Mixture, check_schedule, check_solver, check_stage, measured_order

STAGES = [
    mf.Sample(32, 32), mf.Decode(), mf.Upscale(), mf.Upscale(mf.Lanczos(3)), mf.Encode(), mf.Encode(posterior=True),
    mf.Quantise(), mf.Reinject(0.3), mf.Refine(), mf.Refine(mf.Linear(3), solver=mf.StochasticEuler(0.5)),
    mf.Sample(32, 32, stop=0.4), mf.Sample(32, 32, noise=mf.Stream(0)),
]  # fmt: skip
ORDERS = [
    (mf.Euler(), 1),
    (mf.Heun(), 2),
    (mf.Midpoint(), 2),
    (mf.AB2(), 2),
    (mf.AB3(), 3),
    (mf.RK4(), 4),
    (mf.DPMpp2M(), 2),
]


@pytest.mark.parametrize("stage", STAGES, ids=repr)
def test_own_stages_keep_the_laws(stage: mf.Stage) -> None:  # type: ignore[type-arg]
    check_stage(stage)


@pytest.mark.parametrize(("solver", "order"), ORDERS, ids=repr)
def test_own_solvers_keep_the_laws(solver: mf.Solver, order: int) -> None:
    check_solver(solver, order=order)


@pytest.mark.parametrize("n", [1, 2, 50, 1000])
@pytest.mark.parametrize("make", [mf.Linear, mf.Shifted, mf.DirectSigma, mf.Karras, mf.Beta, mf.LogitNormal, mf.Cosine])
def test_own_schedules_keep_the_laws(make, n: int) -> None:  # type: ignore[no-untyped-def]
    check_schedule(make(n))


def test_the_toys_velocity_is_the_mean_of_noise_minus_data() -> None:
    """Against a Monte-Carlo estimate with importance weights, which knows nothing of the closed form."""
    mixture, sigma, x = Mixture(torch.tensor([[-0.6], [0.8]]), 0.3), 0.55, torch.tensor([[0.25]])
    g = torch.Generator().manual_seed(0)
    x0 = mixture.means[torch.randint(2, (400_000,), generator=g)] + 0.3 * torch.randn(400_000, 1, generator=g)
    eps = (x - (1 - sigma) * x0) / sigma
    weights = torch.exp(-0.5 * eps.square())
    estimate = ((eps - x0) * weights).sum() / weights.sum()
    assert float(mixture.velocity(x, sigma)) == pytest.approx(float(estimate), abs=0.02)


def test_the_toy_samples_its_own_colours() -> None:
    model = mf.toy(std=0.05)
    out = mf.run(mf.Sample(32, 32, mf.Linear(40)), model, "a", seed=list(range(24))).data.mean((2, 3))
    colours = model.condition(["a"])["colours"][0]
    near = torch.cdist(out, colours).argmin(1)
    assert torch.cdist(out, colours).min(1).values.max() < 0.1
    assert 3 < int(near.sum()) < 21


@dataclass(frozen=True)
class Careless(mf.Stage[mf.Pixels, mf.Pixels]):
    """Draws from the global generator."""

    def plan(self, spec: mf.Pixels, model: mf.ModelInfo) -> mf.Pixels:
        return spec

    def apply(self, state: mf.State[mf.Pixels], out: mf.Pixels, ctx: mf.Context) -> Tensor:
        return torch.rand(out.shape)


@dataclass(frozen=True)
class Neighbours(Careless):
    """Mixes the items of a batch."""

    def apply(self, state: mf.State[mf.Pixels], out: mf.Pixels, ctx: mf.Context) -> Tensor:
        return state.data.mean(0, keepdim=True).expand_as(state.data).contiguous()


@dataclass(frozen=True)
class Lazy(mf.Solver):
    """Half a step."""

    def step(self, v: mf.Velocity, x: Tensor, sigma: float, to: float, past: mf.History) -> tuple[Tensor, mf.History]:
        return x + 0.5 * (to - sigma) * v(x, sigma), past


@dataclass(frozen=True)
class Rising(mf.Schedule):
    """Does not fall."""

    def __call__(self, start: float, tokens: int, model: mf.ModelInfo) -> tuple[float, ...]:
        return (start, start, 0.0)


def test_broken_laws_are_named() -> None:
    with pytest.raises(LawBroken, match="two runs with one seed differ"):
        check_stage(Careless())
    with pytest.raises(LawBroken, match="differs from item 0 of a batch"):
        check_stage(Neighbours())
    with pytest.raises(LawBroken, match="order"):
        check_solver(Lazy(), order=1)
    with pytest.raises(LawBroken, match="does not fall strictly"):
        check_schedule(Rising())
    assert measured_order(mf.Euler()) == pytest.approx(1, abs=0.1)

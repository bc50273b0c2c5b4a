"""Levels found by measuring: the path is the best one, and Euler along it is nearer than along the usual levels."""

import itertools

import pytest
import torch

import mrflow as mf
from mrflow.errors import PlanError
from mrflow.schedules.search import _errors, shortest
from mrflow.solvers import RK4, Euler, Solver
from mrflow.testing import check_schedule

PROMPTS = ["a red house", "two stars", "x", "blue", "green door", "seven"]
SIZE = (32, 32)


@pytest.mark.parametrize("steps", [1, 2, 3, 6])
def test_the_path_is_the_best_of_all(steps: int) -> None:
    costs = torch.rand(7, 7, generator=torch.Generator().manual_seed(steps)).tolist()
    paths = [(0, *inner, 6) for inner in itertools.combinations(range(1, 6), steps - 1)]
    want = min(paths, key=lambda path: sum(costs[i][j] for i, j in itertools.pairwise(path)))
    assert shortest(costs, steps) == want


def test_errors_are_those_of_eulers_steps_as_far_as_they_are_left_at_the_end() -> None:
    """Gaussian data, whose flow is x(s) = noise m(s) / m(1), m the deviation at s: what is wrong at t shrinks by m."""
    std = 0.3

    def deviation(s: float) -> float:
        return float((((1 - s) * std) ** 2 + s * s) ** 0.5)

    def field(x: torch.Tensor, s: float) -> torch.Tensor:
        return (s - (1 - s) * std**2) / deviation(s) ** 2 * x

    noise = torch.randn(1, 3, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    levels = tuple(1 - i / 40 for i in range(41))
    got, end = _errors(field, noise, levels)
    torch.testing.assert_close(end, noise * std, rtol=1e-4, atol=0)
    size = float(noise.square().mean().sqrt())
    for i, j in ((0, 7), (10, 11), (5, 30), (20, 40), (3, 40)):
        s, t = levels[i], levels[j]
        slope = (s - (1 - s) * std**2) / deviation(s)
        missed = abs(deviation(s) + (t - s) * slope - deviation(t)) * size
        assert float(got[i, j]) == pytest.approx(missed * deviation(0.0) / deviation(t), rel=1e-3)
    assert not bool(got.tril().any())


def wrong(schedule: mf.Schedule, std: float = 0.3) -> float:
    """How far Euler's steps end from the exact flow, summed over the prompts."""

    def end(schedule: mf.Schedule, solver: Solver) -> torch.Tensor:
        return mf.run(mf.Sample(*SIZE, schedule, solver=solver), mf.toy(std=std), PROMPTS, seed=list(range(5, 11))).data

    return float((end(schedule, Euler()) - end(mf.Linear(100), RK4())).flatten(1).norm(dim=1).sum())


@pytest.mark.parametrize(("std", "steps"), [(0.3, 4), (0.3, 8), (0.1, 4), (0.1, 8), (0.05, 3), (0.3, 2)])
def test_euler_ends_no_farther_along_them_than_along_the_models_own(std: float, steps: int) -> None:
    found = mf.schedules.optimise(mf.toy(std=std), steps, PROMPTS, size=SIZE, fine=40, seed=5)
    assert len(found.sigmas) == steps + 1
    assert wrong(found, std) < 1.01 * wrong(mf.Shifted(steps), std)


def test_what_is_found_is_better_where_the_flow_bends() -> None:
    found = mf.schedules.optimise(mf.toy(std=0.3), 8, PROMPTS, size=SIZE, fine=40, seed=5)
    assert wrong(found) < 0.9 * wrong(mf.Shifted(8))


def test_they_are_a_schedule_like_any_other_and_come_again() -> None:
    model = mf.toy()
    found = mf.schedules.optimise(model, 4, PROMPTS, size=SIZE, fine=12, guidance=mf.CFG(2.0))
    check_schedule(found)
    assert found == mf.schedules.optimise(model, 4, PROMPTS, size=SIZE, fine=12, guidance=mf.CFG(2.0))
    record = mf.run(mf.Sample(*SIZE, found) >> mf.Decode(), model, "a").record()
    assert str(found.sigmas[1]) in str(record)


def test_as_many_steps_as_the_grid_has_are_the_grid() -> None:
    found = mf.schedules.optimise(mf.toy(), 6, PROMPTS[:1], size=SIZE, fine=6)
    tokens = 16 * 16 // 4
    assert found.sigmas == mf.Shifted(6)(1.0, tokens, mf.toy().info)


def test_what_cannot_be_measured_is_refused() -> None:
    for prompts in ("a red house", []):
        with pytest.raises(PlanError, match="needs a list of prompts to measure on"):
            mf.schedules.optimise(mf.toy(), 4, prompts, size=SIZE)
    with pytest.raises(PlanError, match="fine must be a whole number of at least 4, got 3"):
        mf.schedules.optimise(mf.toy(), 4, PROMPTS, size=SIZE, fine=3)
    with pytest.raises(AttributeError, match="no attribute 'optimized'"):
        mf.schedules.optimized  # type: ignore[attr-defined]  # noqa: B018


def test_what_cannot_be_searched_says_which_setting() -> None:
    for name, settings in (("steps", {"steps": 0}), ("fine", {"steps": 2, "fine": 1})):
        with pytest.raises(PlanError, match=f"^{name} "):
            mf.schedules.optimise(mf.toy(), prompts=PROMPTS[:1], size=SIZE, **settings)  # type: ignore[arg-type]


def test_each_prompt_is_searched_on_the_noise_of_a_picture_of_a_seed_of_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    own, seen = mf.PerItem.__call__, list[torch.Tensor]()

    def call(self: mf.PerItem, seeds: list[int], shape: tuple[int, ...], *, scope: str, draw: int) -> torch.Tensor:
        seen.append(own(self, seeds, shape, scope=scope, draw=draw))
        return seen[-1]

    monkeypatch.setattr(mf.PerItem, "__call__", call)
    mf.schedules.optimise(mf.toy(), 2, PROMPTS[:2], size=SIZE, fine=4, seed=7)
    searched = [noise.clone() for noise in seen]
    seen.clear()
    for seed in (7, 8):
        mf.run(mf.Sample(*SIZE, mf.Shifted(2)), mf.toy(), PROMPTS[0], seed=seed)
    assert len(searched) == 2 and all(map(torch.equal, searched, seen)) and not torch.equal(*seen)

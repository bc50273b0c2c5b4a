"""JiT and Fresco: their operators against closed forms, their states on the flow's line, their cost as counted."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from scipy.stats import beta
from torch import Tensor

import mrflow as mf
from mrflow.backbone import Wrapper
from mrflow.cost import decode_flops, forward_flops
from mrflow.flow import Velocity
from mrflow.protocols.tokens import pack, unpack
from mrflow.rivals.fresco import add_noise, by_parent, four_each, groups, hadamard, sigma_after_growth
from mrflow.rivals.jit import JIT_4X, JIT_7X, Spread, activate, add_anchors, anchors
from mrflow.rivals.ralu import children, places_of
from mrflow.testing import check_stage, check_transition


def order(n: int) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(n))


# JiT


def test_jits_settings_are_the_published_ones() -> None:
    """18 and 11 steps, divided at 0.4 and 0.65; levels by scipy, as diffusers' `_convert_to_beta` takes them."""
    for (steps, shares), total in ((JIT_4X, 18), (JIT_7X, 11)):
        assert (sum(steps), steps[0], steps[0] + steps[1]) == (total, int(0.4 * total), int(0.65 * total))
        stage = mf.SampleAnchors(1024, 1024, steps, shares)
        quantiles = beta.ppf(1 - np.linspace(0, 1, total), 1.4, 0.42)
        want = 1 / total + quantiles * (1 - 1 / total)
        assert stage.evaluations(mf.Start(), mf.FLUX) == pytest.approx(want, abs=1e-6)
        assert stage.tokens(mf.FLUX) == (int(4096 * shares[0]), int(4096 * shares[1]), 4096)


@pytest.mark.parametrize(("h", "w", "count"), [(16, 24, 150), (7, 5, 20), (6, 6, 4), (3, 3, 9)])
def test_anchors_are_lattice_border_then_others(h: int, w: int, count: int) -> None:
    at = anchors(h, w, count, order(h * w))
    assert len(at) == len(set(at.tolist())) == count
    lattice = {i * w + j for i in range(0, h, 2) for j in range(0, w, 2)}
    border = {i * w + j for i in range(h) for j in range(w) if i in (0, h - 1) or j in (0, w - 1)}
    chosen = set(at.tolist())
    assert lattice <= chosen or chosen <= lattice
    assert border <= chosen or chosen <= lattice | border
    if count < h * w:
        assert not torch.equal(anchors(h, w, count, -order(h * w)), at)


@pytest.mark.parametrize("count", [30, 6])
def test_values_spread_as_nearest_anchors_softened(count: int) -> None:
    """By hand and by scipy: nearest anchor, a Gaussian cut at three deviations, anchors exactly as they were."""
    h, w = 9, 11
    at = anchors(h, w, count, order(h * w))
    spread, values = Spread(at, h, w), torch.randn(2, count, 3, generator=torch.Generator().manual_seed(1))
    deviation = max(1.0, 0.4 * (h * w / count) ** 0.5)
    got = spread(values)
    assert torch.equal(got[:, at], values)
    hard = torch.empty(2, h * w, 3)
    for cell in range(h * w):
        far = [(cell // w - int(a) // w) ** 2 + (cell % w - int(a) % w) ** 2 for a in at]
        hard[:, cell] = values[:, far.index(min(far))]
    grid = hard.view(2, h, w, 3).double().numpy()
    soft = gaussian_filter(grid, deviation, mode="nearest", truncate=3.0, axes=(1, 2))
    want = torch.from_numpy(soft).float().view(2, -1, 3)
    want[:, at] = values
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(spread(torch.ones(1, count, 1)), torch.ones(1, h * w, 1))
    few = Spread(torch.tensor([0, 98]), h, w)  # 0.4 sqrt(99 / 2) = 2.8 tokens
    assert len(few.kernel) == 2 * 9 + 1


def test_tokens_join_where_the_velocity_varies() -> None:
    h = w = 8
    spread = Spread(anchors(h, w, 20, order(64)), h, w)
    velocity = torch.zeros(1, 64, 4)
    velocity[:, 8 * 3 : 8 * 4] = torch.randn(1, 8, 4, generator=torch.Generator().manual_seed(2))  # the fourth row
    more = set(add_anchors(velocity, spread, 32).tolist())
    old = set(spread.at.tolist())
    assert old <= more and len(more) == 32
    assert all(cell // 8 in (2, 3, 4) for cell in more - old)


def test_a_token_that_joins_has_the_marginal_of_its_level() -> None:
    """Signal (1 - sigma) of the estimate, noise of covariance sigma^2 I, from unit responses; others as they were."""
    h, w, d, sigma = 4, 6, 2, 0.4
    old, new = Spread(torch.tensor([0, 4, 13, 20]), h, w), Spread(torch.arange(0, 24, 2), h, w)
    fresh = [cell for cell in new.at.tolist() if cell not in old.at.tolist()]
    zero = torch.zeros(1, 24, d)
    unit = torch.eye(24 * d).view(-1, 24, d)
    every = zero.expand_as(unit)
    response = activate(every, every, unit, old, new, sigma).flatten(1)
    covariance = (response.T @ response).view(24, d, 24, d)[fresh][:, :, fresh].reshape(len(fresh) * d, -1)
    torch.testing.assert_close(covariance, sigma**2 * torch.eye(len(fresh) * d))
    y = torch.randn(1, 24, d, generator=torch.Generator().manual_seed(3))
    out = activate(y, torch.full_like(y, 0.7), torch.zeros_like(y), old, new, sigma)
    torch.testing.assert_close(out[:, fresh], torch.full((1, len(fresh), d), (1 - sigma) * 0.7))
    rest = [cell for cell in range(24) if cell not in fresh]
    assert torch.equal(out[:, rest], y[:, rest])


# Fresco


@dataclass(frozen=True)
class Unfold(mf.Stage[mf.Latents, mf.Latents]):
    """Fresco's growth of all tokens at once, as a transition."""

    def plan(self, spec: mf.Latents, model: mf.ModelInfo) -> mf.Latents:
        return replace(spec, height=2 * spec.height, width=2 * spec.width, sigma=sigma_after_growth(spec.sigma))

    def apply(self, state: mf.State[mf.Latents], out: mf.Latents, ctx: mf.Context) -> Tensor:
        h, w = state.spec.height // 2, state.spec.width // 2
        four = four_each(pack(state.data), by_parent(pack(ctx.noise(out.shape)), h, w), state.spec.sigma)
        cells = children(torch.arange(h * w).expand(len(four), -1), w)
        grid = torch.empty(len(four), 4 * h * w, four.shape[-1])
        grid.scatter_(1, cells[..., None].expand_as(grid), four.flatten(1, 2))
        return unpack(grid, 2 * h, 2 * w)


@pytest.mark.parametrize(("sigma", "size"), [(0.6, (8, 8)), (0.9, (8, 12)), (0.3, (16, 16))])
def test_frescos_growth_holds_the_laws_of_transitions(sigma: float, size: tuple[int, int]) -> None:
    check_transition(Unfold(), sigma=sigma, size=size)


def test_one_field_serves_all_sizes() -> None:
    """Straight paths: noise sigma times the field's coarse part becomes, over both growths, the field itself."""
    h, w, d = 2, 3, 2
    grown, rest = torch.tensor([[1, 2, 5]]), torch.tensor([[0, 3, 4]])
    unit = torch.eye(4 * h * w * d).view(-1, 4 * h * w, d)
    fours = by_parent(unit, h, w)
    coarse, some, others = hadamard(fours)[:, :, 0], grown.expand(len(unit), -1), rest.expand(len(unit), -1)
    torch.testing.assert_close(hadamard(hadamard(fours)), fours)
    once = 0.8
    twice, last = sigma_after_growth(once), sigma_after_growth(sigma_after_growth(once))
    four = four_each(once * coarse[:, grown[0]], groups(fours, some), once)
    torch.testing.assert_close(four, twice * groups(fours, some))
    kept = add_noise(once * coarse[:, rest[0]], coarse[:, rest[0]], once)
    torch.testing.assert_close(kept, twice * coarse[:, rest[0]])
    state = torch.cat((kept, four.flatten(1, 2)), 1).flatten(1)
    torch.testing.assert_close(state.T @ state, twice**2 * torch.eye(state.shape[1]), atol=1e-6, rtol=0)
    late = four_each(kept, groups(fours, others), twice)
    torch.testing.assert_close(late, last * groups(fours, others))
    four = add_noise(four.flatten(1, 2), groups(fours, some).flatten(1, 2), twice)
    torch.testing.assert_close(four, last * groups(fours, some).flatten(1, 2))
    one = torch.ones(1, 6, d)
    signal = four_each((1 - once) * one, torch.zeros(1, 6, 4, d), once)
    torch.testing.assert_close(signal, (1 - twice) * torch.ones(1, 6, 4, d))
    torch.testing.assert_close(add_noise((1 - once) * one, 0 * one, once), (1 - twice) * one)


def test_tokens_grow_first_where_they_changed_least(monkeypatch: pytest.MonkeyPatch) -> None:
    """A field that moves the right half alone: the left half of the 4 x 8 coarse tokens is what grows."""
    seen: list[Tensor] = []

    def watched(rest: Tensor, fine: Tensor, h: int, w: int) -> Tensor:
        seen.append(fine)
        return places_of(rest, fine, h, w)

    class Right(Wrapper):
        def field(self, cond: mf.Condition, options: mf.FieldOptions = mf.FieldOptions()) -> Velocity:
            def velocity(x: Tensor, sigma: float) -> Tensor:
                out = torch.zeros_like(x)
                out[..., x.shape[-1] // 2 :] = 1.0
                return out

            return velocity

    monkeypatch.setattr("mrflow.rivals.fresco.places_of", watched)
    mf.run(mf.SampleConverged(32, 64, (3, 1, 1)), Right(mf.toy(positions=True)), "a")
    assert seen[0][0].tolist() == [8 * i + j for i in range(4) for j in range(4)]


# Both

STAGES: dict[str, Callable[[int, int], mf.Stage[mf.Start, mf.Latents]]] = {
    "jit": lambda h, w: mf.SampleAnchors(h, w, (2, 2, 2)),
    "fresco": lambda h, w: mf.SampleConverged(h, w, (2, 2, 2)),
    "ralu": lambda h, w: mf.SampleRegions(h, w, (2, 2, 2)),
}


@pytest.mark.parametrize("patch", [1, 2, 4])
@pytest.mark.parametrize("name", STAGES)
def test_stages_hold_their_laws(name: str, patch: int) -> None:
    """Among them: at every evaluation the tokens that the network is given hold white noise of that level."""
    model = mf.toy(positions=True)
    model._info = replace(model.info, space=replace(model.info.space, patch=patch))
    check_stage(STAGES[name](64, 96), model=model)


class Tokens(Wrapper):
    """Adds up the operations of every forward by the tokens that it is given."""

    flops = 0.0

    def field(self, cond: mf.Condition, options: mf.FieldOptions = mf.FieldOptions()) -> Velocity:
        inner = self.model.field(cond, options)

        def counted(x: Tensor, sigma: float) -> Tensor:
            passes = len(x) * (1 + len(options.beside))
            self.flops += passes * forward_flops(self.info, x.shape[2] * x.shape[3] // 4)
            return inner(x, sigma)

        return counted


def test_the_network_is_told_where_the_anchors_lie() -> None:
    """In each stage as many places as tokens, each a cell of the grid, at least one; in the last the whole grid."""
    seen = list[tuple[int, list[list[float]] | None]]()

    class Watched(Wrapper):
        def field(self, cond: mf.Condition, options: mf.FieldOptions = mf.FieldOptions()) -> Velocity:
            inner, at = self.model.field(cond, options), options.positions

            def velocity(x: Tensor, sigma: float) -> Tensor:
                seen.append((x.shape[-2] * x.shape[-1] // 4, None if at is None else at.at.tolist()))
                return inner(x, sigma)

            return velocity

    stage, model = mf.SampleAnchors(16, 16, (1, 1, 1), shares=(0.01, 0.5)), Watched(mf.toy(positions=True))
    assert stage.tokens(model.info) == (1, 8, 16)
    mf.run(stage, model, "a")
    cells = [[float(i), float(j)] for i in range(4) for j in range(4)]
    assert [count for count, _ in seen] == [1, 8, 16]
    for count, places in seen[:2]:
        assert places is not None and len(places) == count and all(place in cells for place in places)


@pytest.mark.parametrize("name", STAGES)
def test_planned_operations_are_those_of_a_run(name: str) -> None:
    model = Tokens(mf.load("pocket", device="cpu"))
    stage = STAGES[name](128, 128)
    planned = mf.plan(stage, model.info, batch=2)
    mf.run(stage, model, ["a big red circle", "the blue word CAT"], seed=[0, 1])
    decoding = 2 * decode_flops(model.info, 64, 64) if name == "ralu" else 0.0
    assert planned.work.flops == pytest.approx(model.flops + decoding, rel=1e-9)


def test_speeds_by_operations_are_near_the_papers() -> None:
    """FLUX.1 at 1024 px against 50 steps: JiT 4.24 and 7.07 (its table 1), Fresco 4.72 with 18 evaluations."""
    native = mf.plan(mf.recipes.native(), mf.FLUX).rows[0].work.flops
    chains = (mf.recipes.jit(), mf.recipes.jit(preset="7x"), mf.recipes.fresco())
    got = [native / mf.plan(chain, mf.FLUX).rows[0].work.flops for chain in chains]
    assert got == pytest.approx([4.24, 7.07, 4.72], rel=0.03)
    assert [mf.plan(chain, mf.FLUX).nfe for chain in chains] == [18, 11, 18]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: mf.SampleAnchors(64, 64, (1, 2)), "steps must be three whole numbers"),  # type: ignore[arg-type]
        (lambda: mf.SampleAnchors(64, 64, shares=(0.6, 0.4)), "shares must be two rising"),
        (lambda: mf.SampleConverged(64, 64, (1, 2, 0)), "steps must be three whole numbers"),
        (lambda: mf.SampleConverged(64, 64, share=1.0), "share must be between"),
        (lambda: mf.recipes.jit(preset="9x"), "preset must be '4x' or '7x'"),  # type: ignore[arg-type]
        (
            lambda: mf.plan(mf.recipes.jit(schedule=mf.Shifted(9)), mf.FLUX),
            "schedule has 9 steps, and the stages take 18",
        ),
        (lambda: mf.plan(mf.recipes.fresco(schedule=mf.Shifted(9)), mf.FLUX), "schedule has 9 steps"),
        (lambda: mf.plan(mf.recipes.fresco(size=1040), mf.FLUX), "half of 1040x1040 is not a whole number of tokens"),  # type: ignore[arg-type]
        (lambda: mf.plan(mf.SampleAnchors(64, 64), mf.toy().info), "draws on whole grids only"),
        (lambda: mf.plan(mf.SampleConverged(64, 64), mf.toy().info), "draws on whole grids only"),
    ],
)
def test_what_cannot_be_says_so(make: Callable[[], object], message: str) -> None:
    with pytest.raises(mf.PlanError, match=message):
        make()

"""Caches without a model: rules and memory on a network of numbers."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import mrflow as mf
from mrflow.caches import Cache, DBCache, Evaluation, MagCache, TaylorSeer, TeaCache
from mrflow.caches.base import difference, interpolate
from mrflow.caches.calibrate import fit_polynomial
from mrflow.caches.clock import Clock, Rule
from mrflow.caches.extrapolate import Series
from mrflow.caches.memory import CachedStep
from mrflow.caches.teacache import COEFFICIENTS
from mrflow.display.notes import tally_work
from mrflow.model_info import FLUX, QWEN
from mrflow.testing import TOY


class Numbers:
    """Pieces of a network of `count` blocks: block i adds feature(i, call) to the image and the text stream."""

    def __init__(self, feature: Any, count: int = 6) -> None:
        self.feature, self.count, self.call = feature, count, -1
        self.ran: list[tuple[int, int]] = []

    def embed(self, tokens: Tensor) -> Tensor:
        self.call += 1
        return tokens

    def modulated_input(self, img: Tensor, table: Tensor) -> Tensor:
        return img * table

    def run(
        self, img: Tensor, txt: Tensor, cos: Tensor, sin: Tensor, table: Tensor, start: int, stop: int
    ) -> tuple[Tensor, Tensor]:
        if start < stop:
            self.ran.append((start, stop))
        for i in range(start, stop):
            img, txt = img + self.feature(i, self.call), txt + self.feature(i, self.call)
        return img, txt

    def head(self, img: Tensor, table: Tensor) -> Tensor:
        return 2 * img


def drive(
    cache: Cache, net: Numbers, count: int, *, batch: int = 1, info: mf.ModelInfo = FLUX, inputs: Any = None
) -> tuple[list[Tensor], list[int]]:
    """Outputs of `count` evaluations, and how many pictures were computed in each; the image is ones."""
    levels = [1 - i / count for i in range(count)]
    clock = Clock(levels)
    step = CachedStep(cache, net, clock, info)
    outs, computed = list[Tensor](), list[int]()
    for call, sigma in enumerate(levels):
        clock.tick(sigma)
        table = torch.ones(1, 1, 1) if inputs is None else inputs(call)
        with tally_work() as tally:
            outs.append(step(torch.ones(batch, 4, 1), torch.zeros(batch, 2, 1), table, table, table))
        computed.append(tally.computed)
        assert tally.asked == batch
    return outs, computed


@pytest.mark.parametrize(
    ("cache", "degree"),
    [
        (TaylorSeer(4, order=0), 0),
        (TaylorSeer(4), 1),
        (TaylorSeer(5, order=2), 2),
        (TaylorSeer(5, order=2, of="velocity"), 2),
        (TaylorSeer(3, order=3, warmup=4), 3),
        (DBCache(1.0, front=1, warmup=3, limit=3, order=1), 1),
        (DBCache(1.0, front=2, warmup=4, limit=5, order=2), 2),
    ],
    ids=str,
)
def test_features_that_are_polynomials_in_the_step_are_met_exactly(cache: Cache, degree: int) -> None:
    curve = np.poly1d([0.01, -0.2, 0.3, 1.5][3 - degree :])
    outs, computed = drive(cache, Numbers(lambda i, t: curve(t) + i), 20)
    want, _ = drive(TaylorSeer(1), Numbers(lambda i, t: curve(t) + i), 20)
    assert 4 < sum(computed) < 16
    for got, exact in zip(outs, want, strict=True):
        torch.testing.assert_close(got, exact, rtol=3e-5, atol=3e-5)  # float32 times weights up to 20
    missed = np.poly1d([1.0, *([0.0] * (degree + 1))])
    outs, _ = drive(cache, Numbers(lambda i, t: missed(t)), 20)
    want, _ = drive(TaylorSeer(1), Numbers(lambda i, t: missed(t)), 20)
    assert max(float((a - b).abs().max()) for a, b in zip(outs, want, strict=True)) > 0.9


def test_blocks_behind_work_on_image_and_text() -> None:
    """With features that do not change reuse is exact, whichever blocks are left out."""
    for back in (0, 1, 3):
        net = Numbers(lambda i, t: i + 1.0)
        outs, computed = drive(DBCache(1.0, front=2, back=back, warmup=1), net, 5)
        assert computed == [1, 0, 0, 0, 0]
        assert all(torch.equal(out, torch.full((1, 4, 1), 44.0)) for out in outs)
        calls = sum(stop - start for start, stop in net.ran)
        assert calls == 6 + 4 * (2 + back)  # computed * L + cached * (F + B)


def test_front_and_back_that_leave_no_block_compute_everything() -> None:
    for front, back in ((6, 0), (8, 0), (3, 3), (4, 9)):
        net = Numbers(lambda i, t: 1.0)
        _, computed = drive(DBCache(1.0, front=front, back=back, warmup=0), net, 5)
        assert computed == [1] * 5
        assert sum(stop - start for start, stop in net.ran) == 30


def test_taylorseer_computes_as_published() -> None:
    def steps(cache: Cache, count: int) -> list[int]:
        return [i for i, c in enumerate(drive(cache, Numbers(lambda i, t: 1.0), count)[1]) if c]

    assert steps(TaylorSeer(), 50) == [0, 1, 2, 8, 14, 20, 26, 32, 38, 44]
    assert steps(TaylorSeer(1), 9) == list(range(9))
    assert steps(TaylorSeer(4, warmup=1), 12) == [0, 4, 8]


@given(st.floats(0.01, 2), st.floats(0.01, 0.5), st.integers(2, 30))
def test_teacache_counts_as_its_arithmetic_says(threshold: float, change: float, count: int) -> None:
    """An input that changes by a constant ratio: the ends, and between them each k-th with k = ceil(thr / P(d))."""
    cache = TeaCache(threshold, coefficients=(1.0, 0.0))
    _, computed = drive(
        cache, Numbers(lambda i, t: 1.0), count, inputs=lambda t: torch.full((1, 1, 1), (1 + change) ** t)
    )
    share = threshold / change
    if abs(share - round(share)) > 1e-3:
        every = math.ceil(share)
        assert [i for i, c in enumerate(computed) if c] == sorted({*range(0, count, every), count - 1})


def test_teacache_far_and_near() -> None:
    wild = dict(inputs=lambda t: torch.full((1, 1, 1), float(t % 3 + 1)))
    assert drive(TeaCache(1e9), Numbers(lambda i, t: 1.0), 12, **wild)[1] == [1, *[0] * 10, 1]
    assert drive(TeaCache(0.0), Numbers(lambda i, t: 1.0), 12, **wild)[1] == [1] * 12
    # FLUX's polynomial is at least 0.18: below it nothing is skipped, at 0.25 at most one in a row
    still: dict[str, Any] = dict(inputs=lambda t: torch.full((1, 1, 1), 1.053**t))
    assert drive(TeaCache(0.179), Numbers(lambda i, t: 1.0), 12, **still)[1] == [1] * 12
    assert drive(TeaCache(0.25), Numbers(lambda i, t: 1.0), 12, **still)[1] == [1, 0] * 5 + [1, 1]


def test_what_reaches_the_threshold_is_computed_by_teacache_and_left_out_by_magcache() -> None:
    """A sum below the threshold leaves out (TeaCache); an error up to the threshold does (MagCache)."""
    inputs: dict[str, Any] = dict(inputs=lambda t: torch.full((1, 1, 1), 1.5**t))  # a change of exactly a half
    tea = TeaCache(0.5, coefficients=(1.0, 0.0))
    assert drive(tea, Numbers(lambda i, t: 1.0), 6, **inputs)[1] == [1] * 6
    assert drive(TeaCache(1.0, coefficients=(1.0, 0.0)), Numbers(lambda i, t: 1.0), 6, **inputs)[1] == [
        1,
        0,
        1,
        0,
        1,
        1,
    ]
    mag = MagCache(0.5, limit=9, retention=0.0, ratios=(1.0, 0.5, 1.0, 1.0))
    assert drive(mag, Numbers(lambda i, t: 1.0), 4)[1] == [1, 0, 1, 0]


def test_published_polynomials_have_the_values_that_were_computed_from_them() -> None:
    flux, qwen = COEFFICIENTS["flux1-dev"], COEFFICIENTS["qwen-image"]
    assert [round(np.polyval(flux, d), 3) for d in (0, 0.02, 0.053, 0.1, 0.2, 0.3)] == [
        0.264, 0.208, 0.18, 0.207, 0.262, 0.522,
    ]  # fmt: skip
    assert [round(np.polyval(qwen, d), 3) for d in (0, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4)] == [
        -0.02, 0.028, 0.06, 0.085, 0.34, 0.805, 0.46,
    ]  # fmt: skip
    assert np.polyval(qwen, 0.45) < -0.6  # a signed sum could fall below any threshold; |P| cannot


def reference_dbcache(changes: Sequence[float], cache: DBCache) -> list[int]:
    """The rule, written once more: r is a number, and only what was computed is remembered."""
    last, row, total, computed = None, 0, 0, []
    for i, r in enumerate(changes):
        similar = last is not None and (cache.threshold >= 1 or abs(last - r) / abs(last) < cache.threshold)
        if i in range(0, cache.warmup, cache.every):
            similar = False
        if cache.limit is not None and row >= cache.limit:
            similar = False
        if cache.most is not None and total >= cache.most:
            similar = False
        computed.append(int(not similar))
        last, row, total = (last, row + 1, total + 1) if similar else (r, 0, total)
    return computed


@given(
    st.lists(st.floats(0.5, 1.5), min_size=1, max_size=25),
    st.sampled_from([0.0, 0.05, 0.2, 0.4, 1.0]),
    st.integers(0, 6),
    st.integers(1, 3),
    st.none() | st.integers(0, 4),
    st.none() | st.integers(0, 6),
)
def test_dbcache_decides_as_its_rule_says(
    changes: list[float], threshold: float, warmup: int, every: int, limit: int | None, most: int | None
) -> None:
    cache = DBCache(threshold, front=2, warmup=warmup, every=every, limit=limit, most=most)
    exact = [float(torch.tensor(c, dtype=torch.float32)) for c in changes]
    net = Numbers(lambda i, t: exact[t] if i == 0 else 0.0)
    _, computed = drive(cache, net, len(changes))
    want = reference_dbcache(exact, cache)
    near = [abs(abs(a - b) / abs(a) - threshold) for a in exact for b in exact]
    if min(near) > 1e-4:
        assert computed == want
    assert (
        drive(
            DBCache(threshold, front=2, warmup=warmup, every=every, limit=limit, most=most, order=1),
            net_of(exact),
            len(exact),
        )[1]
        == computed
    )


def net_of(changes: Sequence[float]) -> Numbers:
    return Numbers(lambda i, t: changes[t] if i == 0 else 0.0)


def test_pictures_of_a_batch_decide_alone() -> None:
    """Some change fast, one hardly: each is computed when it would be alone, and gives what it would."""
    rates = (1.3, 1.02, 1.35, 1.28)

    def feature(i: int, t: int) -> Tensor:
        return torch.tensor([[[r**t]] for r in rates]) if i else torch.ones(len(rates), 1, 1)

    class Rows(Numbers):
        """Blocks that work on whichever rows they are given, told by the image's first number."""

        def embed(self, tokens: Tensor) -> Tensor:
            super().embed(tokens)
            return tokens * self.own

        def run(self, img: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
            rows = [int(x[0, 0]) // 1000 - 1 for x in img]
            txt, _, _, _, start, stop = rest
            for i in range(start, stop):
                img = img + torch.tensor([[[rates[r] ** self.call * (1 + i)]] for r in rows])
            if start < stop:
                self.ran.append((start, stop))
            return img, txt

    for cache in (DBCache(0.25, front=1, warmup=0), DBCache(0.25, front=1, warmup=0, order=1)):
        net = Rows(feature)
        own = 1000.0 * torch.arange(1, 5)[:, None, None]
        net.own = own
        together, computed = drive(cache, net, 9, batch=4)
        assert computed[0] == 4 and 3 in computed
        alone = []
        for row in own.split(1):
            net = Rows(feature)
            net.own = row
            alone.append(drive(cache, net, 9))
        assert [sum(each) for each in zip(*(ran for _, ran in alone), strict=True)] == computed
        for out, *each in zip(together, *(outs for outs, _ in alone), strict=True):
            assert torch.equal(out, torch.cat(each))


@dataclass(frozen=True)
class Late(Cache):
    """Computes below sigma 0.5."""

    def rule(self, info: mf.ModelInfo, sigmas: Sequence[float]) -> Rule:
        return lambda look: look.sigma < 0.5


def test_a_forecast_knows_sigmas_and_how_many_blocks_there_are() -> None:
    levels = [1 - i / 10 for i in range(10)]
    told = Late().forecast(FLUX, levels, levels)
    assert (told.computed, told.exact) == (1 + 4, True)  # the first always
    assert sum(drive(Late(), Numbers(lambda i, t: 1.0), 10)[1]) == told.computed
    kept = [DBCache(1.0, front=1, warmup=0).forecast(info, levels, levels).kept for info in (FLUX, TOY)]
    assert kept == [pytest.approx(1 / 57), 0.0]  # of a model whose blocks are not known, none


def test_another_shape_begins_anew() -> None:
    clock = Clock(())
    net = Numbers(lambda i, t: 1.0)
    step = CachedStep(TaylorSeer(9, warmup=1), net, clock, FLUX)
    one = torch.ones(1, 1, 1)
    ran = []
    for size in (4, 4, 6, 6, 4):
        clock.tick(0.5)
        before = len(net.ran)
        out = step(torch.ones(1, size, 1), torch.zeros(1, 2, 1), one, one, one)
        ran.append(len(net.ran) > before)
        assert torch.equal(out, torch.full((1, size, 1), 14.0))
    assert ran == [True, False, True, False, True]


def naive_magcache(ratios: Sequence[float], threshold: float, limit: int, first: int) -> list[int]:
    computed, product, error, row = [], 1.0, 0.0, 0
    for i, g in enumerate(ratios):
        skip = False
        if i >= first:
            product, row = product * g, row + 1
            error += abs(1 - product)
            skip = i > 0 and threshold > 0 and error <= threshold and row <= limit
            if not skip:
                product, error, row = 1.0, 0.0, 0
        computed.append(int(not skip))
    return computed


@given(
    st.lists(st.floats(0.8, 1.2), min_size=1, max_size=30),
    st.floats(0, 0.5),
    st.integers(0, 5),
    st.floats(0, 1),
)
def test_magcache_is_a_list_of_steps(ratios: list[float], threshold: float, limit: int, retention: float) -> None:
    cache = MagCache(threshold, limit=limit, retention=retention, ratios=tuple(ratios))
    _, computed = drive(cache, Numbers(lambda i, t: 1.0), len(ratios))
    assert computed == naive_magcache(ratios, threshold, limit, int(retention * len(ratios) + 0.5))
    levels = [1 - i / len(ratios) for i in range(len(ratios))]
    told = cache.forecast(FLUX, levels, levels)
    assert (told.computed, told.exact) == (sum(computed), True)


def test_magcache_stretches_its_ratios() -> None:
    half, steps = (1.0, 0.5, 1.0, 0.5), [1 - i / 8 for i in range(8)]  # of four steps, taken at eight
    cache = MagCache(0.4, limit=9, retention=0.0, ratios=half)
    every = MagCache(0.4, limit=9, retention=0.0, ratios=mf.caches.magcache.nearest(half, 8))
    assert [drive(c, Numbers(lambda i, t: 1.0), 8)[1] for c in (cache, every)] == [[1, 0, 1, 1, 0, 0, 1, 1]] * 2
    assert cache.forecast(FLUX, steps, steps).computed == 5
    assert mf.caches.magcache.nearest((1.0, 2.0, 3.0), 5) == (1, 1, 2, 3, 3)  # halves go to the even neighbour
    assert mf.caches.magcache.nearest((1.0, 2.0, 3.0), 1) == (3,)


@given(st.lists(st.floats(-3, 3), min_size=1, max_size=5))
def test_a_polynomial_is_found_again(coefficients: list[float]) -> None:
    pairs = [(x, np.polyval(coefficients, x)) for x in np.linspace(-1, 1, 30)]
    assert fit_polynomial(pairs, len(coefficients) - 1) == pytest.approx(coefficients, abs=1e-6)


def test_what_cannot_be_fitted_is_refused() -> None:
    with pytest.raises(
        mf.PlanError, match=r"3 changes do not fix a polynomial of degree 4; give more prompts or steps"
    ):
        fit_polynomial([(0.1, 0.2)] * 3, 4)
    with pytest.raises(mf.PlanError, match=r"too alike to fix a polynomial of degree 2"):
        fit_polynomial([(0.1, 0.2)] * 9, 2)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: TeaCache(-0.1), "threshold must be a finite number of at least 0, got -0.1"),
        (lambda: DBCache(math.nan), "threshold must be a finite number of at least 0, got nan"),
        (lambda: MagCache(math.inf), "threshold must be a finite number of at least 0, got inf"),
        (lambda: TeaCache(0.2, coefficients=()), "coefficients must be at least one number, the highest power first"),
        (lambda: DBCache(front=0), "front must be a whole number of at least 1, got 0"),
        (lambda: DBCache(warmup=2.5, order=1), "warmup must be a whole number of at least 0, got 2.5"),  # type: ignore[arg-type]
        (lambda: DBCache(limit=-1), "limit must be a whole number of at least 0, got -1"),
        (lambda: TaylorSeer(0), "interval must be a whole number of at least 1, got 0"),
        (lambda: TaylorSeer(of="blocks"), "of must be one of output, velocity, got 'blocks'"),  # type: ignore[arg-type]
        (lambda: TaylorSeer(order=9), "order must be at most 4, got 9"),
        (lambda: DBCache(series="pade", order=1), "series must be one of newton, taylor, got 'pade'"),  # type: ignore[arg-type]
        (lambda: MagCache(retention=1.5), "retention must be a share of the steps from 0 to 1, got 1.5"),
        (lambda: MagCache(ratios=(1.0, 0.0)), "ratios must be finite numbers above 0, one a step"),
    ],
)
def test_settings_that_cannot_work(make: Any, text: str) -> None:
    with pytest.raises(mf.PlanError) as error:
        make()
    assert text in str(error.value)


def test_small_helpers() -> None:
    assert [interpolate(((0, 1.0), (2, 5.0)), x) for x in (-1, 0, 1, 2, 3)] == [1, 1, 3, 5, 5]
    one, three = torch.ones(2), torch.tensor([1.0, 3.0])
    assert difference(three, one) == 1.0
    assert difference(one, three) == 0.5
    assert math.isnan(difference(0 * one, 0 * one))
    clock = Clock((1.0, 0.8, 0.8, 0.5))
    places = []
    for sigma in (1.0, 0.8, 0.8, 0.3):
        clock.tick(sigma)
        places.append(clock.place)
    assert places == [0, 1, 2, 3]
    clock = Clock((1.0, 0.8, 0.5))
    clock.tick(0.5)
    assert Evaluation(0, clock.place, clock.total, 0.5).last


def test_estimates_fall_with_the_threshold_and_limits_hold() -> None:
    levels = [1 - i / 50 for i in range(50)]

    def count(cache: Cache, info: mf.ModelInfo = FLUX) -> float:
        told = cache.forecast(info, levels, levels)
        assert 1 <= told.computed <= 50
        return told.forwards

    for caches in (
        [TeaCache(t) for t in (0.01, 0.25, 0.4, 0.6, 0.8, 1.2)],
        [DBCache(t) for t in (0.01, 0.08, 0.12, 0.24, 0.8, 1.0)],
    ):
        counts = [count(cache) for cache in caches]
        assert counts == sorted(counts, reverse=True)
        assert counts[0] > 2 * counts[-1]
    # what cache-dit publishes for FLUX at 50 steps, in whole forwards
    assert 50 / count(DBCache(0.12, front=4, warmup=4, limit=4)) == pytest.approx(2.66, rel=0.1)
    assert 50 / count(DBCache(0.24, front=1, warmup=4, limit=6)) == pytest.approx(3.94, rel=0.1)
    assert 50 / count(DBCache(0.8, front=1, warmup=8, every=2, limit=8, order=1)) == pytest.approx(5.72, rel=0.15)
    assert count(DBCache(1.0, front=1, warmup=8, limit=0, order=1)) == 50
    assert DBCache(0.8, warmup=8, limit=3).forecast(FLUX, levels, levels).computed == 8 + 10  # one of four, of 42
    for most, computed in ((None, 12), (45, 12), (30, 20), (0, 50)):  # at most so many are left out
        assert DBCache(0.8, warmup=8, most=most).forecast(FLUX, levels, levels).computed == computed
    assert DBCache(0.0).forecast(QWEN, levels, levels).exact
    series: tuple[Series, ...] = ("newton", "taylor")
    assert {count(TaylorSeer(series=s)) for s in series} == {10}

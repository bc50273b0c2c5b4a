"""Spectrum, DMD, L2P and SeaCache against closed forms: forecasts are exact on signals of their class."""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

import mrflow as mf
from mrflow.caches import DMD, L2P, Cache, Evaluation, Extrapolation, SeaCache, Spectrum, TaylorSeer
from mrflow.caches.calibrate import ProductsStep
from mrflow.caches.clock import Clock, Rule
from mrflow.caches.dmd import Modes
from mrflow.caches.l2p import fit_weights
from mrflow.caches.memory import CachedStep, products
from mrflow.caches.seacache import wiener
from mrflow.caches.spectrum import Chebyshev
from mrflow.model_info import FLUX
from tests.test_cache_rules import Numbers, drive

WHOLE = TaylorSeer(1)


def worst(cache: Cache, feature: Any, count: int = 30, since: int = 0) -> float:
    """The largest error of `count` evaluations from `since` on relative to the last output, some of them left out."""
    outs, computed = drive(cache, Numbers(feature), count)
    want, _ = drive(WHOLE, Numbers(feature), count)
    assert 0 < sum(computed) < count
    errors = [float((a - b).abs().max()) for a, b in zip(outs, want, strict=True)]
    return max(errors[since:]) / float(want[-1].abs().max())


def test_spectrum_computes_as_published() -> None:
    """14 and 10 evaluations of 50: the paper's two settings for FLUX.1-dev."""

    def steps(cache: Cache) -> list[int]:
        return [i for i, c in enumerate(drive(cache, Numbers(lambda i, t: 1.0), 50)[1]) if c]

    assert steps(Spectrum()) == [0, 1, 2, 3, 4, 6, 8, 11, 15, 20, 25, 31, 38, 46]
    assert steps(Spectrum(growth=3)) == [0, 1, 2, 3, 4, 6, 11, 19, 30, 44]
    assert steps(Spectrum(1, 0)) == list(range(50))
    levels = [1 - i / 50 for i in range(50)]
    assert Spectrum().forecast(FLUX, levels, levels) == mf.model_info.Forecast(50, 14, 0.0, exact=True)


def test_spectrum_is_exact_on_its_basis() -> None:
    for degree in (2, 4):
        exact, beyond = (np.poly1d(np.linspace(-1, 2, n + 1)) for n in (degree, degree + 1))
        cache = Spectrum(degree=degree, ridge=0)
        assert worst(cache, lambda i, t, p=exact: p(t / 15 - 1) + i) < 1e-4
        assert worst(cache, lambda i, t, p=beyond: p(t / 15 - 1) + i) > 1e-2


@given(
    st.lists(st.integers(0, 49), min_size=2, max_size=14, unique=True).map(sorted),
    st.integers(0, 6),
    st.floats(1e-3, 10),
    st.floats(0, 1),
    st.sampled_from((0, 50, 63, 100)),
)
def test_spectrum_is_ridge_regression(steps: list[int], degree: int, ridge: float, mix: float, total: int) -> None:
    """The normal equations by themselves, with T_n(cos x) = cos n x; of 50 steps where nobody said how many."""
    tau = 2 * np.array([*steps, 49]) / (total or 50) - 1
    x = np.cos(np.arange(degree + 1) * np.arccos(tau)[:, None])
    inverse = np.linalg.inv(x[:-1].T @ x[:-1] + ridge * np.eye(degree + 1))
    curve = x[-1] @ inverse @ x[:-1].T
    line = np.zeros(len(steps))
    line[-2:] = Extrapolation(1).weights(steps[-2:], 49)
    got = Chebyshev(degree, ridge, mix).weights(steps, 49, total=total)
    assert got == pytest.approx(mix * curve + (1 - mix) * line, abs=1e-8 * (1 + float(abs(line).max())))


def exponentials(rng: np.random.Generator, factors: Sequence[complex], width: int) -> NDArray[np.complex128]:
    """Shapes (factors, width) of a real sum of exponentials: conjugate factors have conjugate shapes."""
    shapes = [rng.normal(size=width) + 1j * (0 if np.isreal(f) else 1) * rng.normal(size=width) for f in factors]
    for i, f in enumerate(factors):
        if i and f == np.conj(factors[i - 1]) and not np.isreal(f):
            shapes[i] = shapes[i - 1].conj()
    return np.stack(shapes)


FACTORS: list[tuple[complex, ...]] = [
    (0.95,),
    (1.05, 0.8),
    (0.9 * np.exp(0.3j), 0.9 * np.exp(-0.3j)),
    (1.02 * np.exp(0.2j), 1.02 * np.exp(-0.2j), 0.7),
]


@pytest.mark.parametrize("factors", FACTORS, ids=str)
def test_dmd_is_exact_on_sums_of_exponentials(factors: tuple[complex, ...]) -> None:
    """Also a part of a distance ahead, where a factor's root is taken; a straight line is off."""
    shapes = exponentials(np.random.default_rng(0), factors, 5)

    def feature(i: int, t: int) -> Tensor:
        return torch.tensor((shapes.T @ np.array(factors) ** t).real, dtype=torch.float32)

    ahead = DMD(1.0, front=1, warmup=6)
    assert worst(ahead, feature, 10) < 2e-3
    every = DMD(1.0, front=1, warmup=1, limit=2)  # 0, 3, 6, 9: four from there on
    assert worst(every, feature, since=10) < 2e-3
    assert worst(TaylorSeer(3, warmup=1), feature, since=10) > 4e-3
    steps = (3, 6, 9, 12, 15)
    states = np.stack([(shapes.T @ np.array(factors) ** t).real for t in steps])
    for at in (16, 17, 18, 24):
        weights = Modes(5, 1e-6).weights(steps, at, gram=lambda: states @ states.T)
        want = (shapes.T @ np.array(factors) ** at).real
        assert weights @ states == pytest.approx(want, abs=1e-5 * abs(states).max() + 1e-5 * abs(want).max())


def test_dmd_is_what_the_features_themselves_give() -> None:
    """On noise too: A = Y X^+ on whole states, by its eigenvectors; the Gram matrix must say the same."""
    states = np.random.default_rng(1).normal(size=(5, 40)).cumsum(0)
    factors, vectors = np.linalg.eig(states[1:].T @ np.linalg.pinv(states[:-1].T))
    most = np.argsort(-abs(factors))[:4]  # the others are 0
    phi = vectors[:, most]
    amplitudes = np.linalg.lstsq(phi, states[-1].astype(complex), rcond=None)[0]
    for at in (9, 10, 12):
        want = (phi @ (factors[most] ** ((at - 8) / 2) * amplitudes)).real
        weights = Modes(5, 1e-9).weights((0, 2, 4, 6, 8), at, gram=lambda: states @ states.T)
        assert weights @ states == pytest.approx(want, abs=1e-6 * abs(want).max())


def test_dmd_means_the_same_for_features_of_every_scale() -> None:
    states = np.random.default_rng(2).normal(size=(6, 20)).cumsum(0)
    gram: NDArray[np.float64] = states @ states.T

    def weights(scale: float) -> tuple[float, ...]:
        return Modes(6, 0.1).weights(range(6), 8, gram=lambda: scale * gram)

    assert weights(1.0)[:-1] != (0,) * 5
    for scale in (1e-10, 1e10):
        assert weights(scale) == pytest.approx(weights(1.0))


def test_dmd_takes_even_distances_only() -> None:
    def gram() -> NDArray[np.float64]:
        states = np.array([[0.9**t, 0.5**t] for t in range(6)])
        inner: NDArray[np.float64] = states @ states.T
        return inner

    dmd = Modes(6, 1e-4)
    assert dmd.weights((0, 1, 2, 3, 6, 9), 11, gram=gram) == pytest.approx((0, 0, 0, 0, -2 / 3, 5 / 3))
    assert dmd.weights((4,), 5, gram=gram) == (1.0,)
    weights = dmd.weights((0, 1, 5, 6, 7, 8), 9, gram=gram)
    assert weights[:2] == (0, 0) and weights[2:] != (0, 0, -1, 2)
    assert dmd.weights((1, 2, 3, 4), 5, gram=lambda: np.zeros((4, 4))) == (0, 0, 0, 1)
    wild = np.array([[1e30**t] for t in range(4)])
    assert dmd.weights((1, 2, 3, 4), 90, gram=lambda: wild @ wild.T) == (0, 0, 0, 1)


def test_products_are_summed_in_float64() -> None:
    g = torch.Generator().manual_seed(0)
    features = [torch.randn(1, 3, 5, generator=g) for _ in range(3)]
    want = np.stack([f.double().numpy().ravel() for f in features])
    assert products(features[:2], features) == pytest.approx(want[:2] @ want.T, abs=1e-14)
    large = torch.full((1, 1 << 12, 513), 1.0)  # more than two pieces
    assert products([large], [large, 2 * large]).tolist() == [[513 << 12, 513 << 13]]


def newton(steps: int, interval: int, warmup: int, order: int) -> L2P:
    """The rows that are TaylorSeer's weights."""
    rows, done = list[tuple[float, ...]](), list[int]()
    for step in range(steps):
        whole = step < warmup or (step - warmup + 1) % interval == 0
        near = done[-order - 1 :]
        rows.append(() if whole else Extrapolation(order).weights(near, step))
        done += [step] if whole else []
    return L2P(tuple(rows))


def test_l2p_with_the_weights_of_a_curve_is_that_curve_to_the_bit() -> None:
    def feature(i: int, t: int) -> float:
        return math.sin(t / 3) + i

    for order in (0, 1, 2):
        want, theirs = drive(TaylorSeer(4, order=order), Numbers(feature), 20)
        got, ours = drive(newton(20, 4, 3, order), Numbers(feature), 20)
        assert ours == theirs
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
        off, _ = drive(newton(20, 4, 3, 3), Numbers(feature), 20)
        assert not all(torch.equal(a, b) for a, b in zip(off, want, strict=True))


def test_l2p_finds_linear_predictors_and_is_exact_with_them() -> None:
    """Trajectories that differ in everything but how skipped steps follow from computed ones."""
    rng = np.random.default_rng(0)
    computed = [True, True, True, False, False, True, False]
    true = [*[()] * 3, (0.5, -1.0, 2.0), (-0.2, 0.4, 0.9), (), (0.3, 1.1, -0.7)]

    def trajectory() -> NDArray[np.float64]:
        f = rng.normal(size=(7, 30))
        f[3], f[4], f[6] = np.array(true[3]) @ f[:3], np.array(true[4]) @ f[:3], np.array(true[6]) @ f[[1, 2, 5]]
        return f

    rows = fit_weights(np.sum([f @ f.T for f in (trajectory() for _ in range(3))], axis=0), computed, 3)
    assert [len(row) for row in rows] == [0, 0, 0, 3, 3, 0, 3]
    for row, weights in zip(rows, true, strict=True):
        assert row == pytest.approx(weights, abs=1e-9)
    other = torch.tensor(trajectory(), dtype=torch.float32)
    outs, ran = drive(L2P(rows), Numbers(lambda i, t: (other[t] - 1) / 6), 7)  # six blocks, and an image of ones
    want, _ = drive(WHOLE, Numbers(lambda i, t: (other[t] - 1) / 6), 7)
    assert ran == [int(c) for c in computed]
    for a, b in zip(outs, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("of", ["output", "velocity"])
def test_l2p_is_fitted_to_what_all_blocks_give(of: str) -> None:
    """Features written down while everything is computed: those of the whole network, from its first block on."""
    rows: list[list[NDArray[np.float64]]] = []
    clock, signal = Clock([1.0, 0.5]), [[1.0, 2.0], [3.0, 5.0]]
    net = Numbers(lambda i, t: signal[t][i], 2)
    step = ProductsStep(net, rows=rows, of=cast(Any, of))
    for sigma in (1.0, 0.5):
        clock.tick(sigma)
        step(torch.ones(1, 4, 1), *[torch.zeros(1, 2, 1)] * 4)
    outs = np.array([1 + 3.0, 1 + 8.0]) * (1 if of == "output" else 2)
    gram = np.concatenate([np.ravel(row) for row in rows[0]])
    assert gram / gram[0] == pytest.approx(np.array([outs[0] ** 2, outs[1] * outs[0], outs[1] ** 2]) / outs[0] ** 2)


def test_each_picture_of_a_batch_is_looked_at_alone() -> None:
    seen: list[list[float]] = []

    class Looks(Cache):
        def rule(self, info: mf.ModelInfo, sigmas: Sequence[float]) -> Rule:
            return lambda look: bool(seen.append(look.latents().flatten().tolist()) or True)

    clock = Clock([1.0])
    clock.latents = lambda: torch.arange(3.0)[:, None, None, None]
    step = CachedStep(Looks(), Numbers(lambda i, t: 1.0), clock, FLUX)
    clock.tick(1.0)
    step(torch.ones(3, 4, 1), torch.zeros(3, 2, 1), *[torch.ones(1, 1, 1)] * 3)
    assert seen == [[0.0], [1.0], [2.0]]


def test_l2p_takes_no_weights_from_what_rounding_tells_apart() -> None:
    """Two features that are the same but for 1e-6 of their length share a weight, instead of taking opposite ones."""
    rng = np.random.default_rng(0)
    first, second, rest = rng.normal(size=(3, 400))
    f = np.stack((first, first + 1e-6 * second, 3 * first + rest))
    weights = fit_weights(f @ f.T, [True, True, False], 2)[2]
    assert weights == pytest.approx((1.5, 1.5), abs=0.2)


def test_l2p_computes_what_its_rows_cannot_stand_in_for() -> None:
    """A branch that is asked at some levels only, or at more than were fitted without having been announced."""
    cache = L2P(((), (), (1.0,), (), (-1.0, 2.0), (1.0,), (-1.0, 2.0)))
    levels = [1 - i / 7 for i in range(7)]

    def places(branch: Sequence[int]) -> list[int]:
        rule = cache.rule(FLUX, levels)
        return [p for i, p in enumerate(branch) if rule(Evaluation(i, p, 7, levels[p]))]

    assert places(range(7)) == [0, 1, 3]
    assert places((2, 3, 4, 5, 6)) == [2, 3, 4, 6]  # at 4 the features of 1 and 3 are asked for, at 5 that of 3
    assert cache.forecast(FLUX, levels, levels[2:]).computed == 4
    rule = cache.rule(FLUX, ())
    assert [rule(Evaluation(i, i, 0, 0.5)) for i in range(9)] == [
        True,
        True,
        False,
        True,
        False,
        False,
        False,
        True,
        True,
    ]
    with pytest.raises(mf.PlanError, match=r"fitted to 7 evaluations, and the stage has 9; .* L2P\.calibrate"):
        mf.plan(mf.Sample(64, 64, mf.Shifted(9), cache=cache), mf.FLUX)


def sea(cache: SeaCache, pictures: Sequence[Tensor]) -> list[int]:
    """Which evaluations of these latents are computed; the levels fall evenly from 1."""
    count = len(pictures)
    rule = cache.rule(FLUX, ())
    looks = [
        Evaluation(i, i, count, 1 - i / count, latents=partial(torch.unsqueeze, x, 0)) for i, x in enumerate(pictures)
    ]
    return [i for i, look in enumerate(looks) if rule(look)]


@given(st.floats(0, 1), st.floats(0.5, 4), st.integers(1, 5), st.integers(1, 6))
def test_seacache_filters_as_its_formula_says(sigma: float, power: float, h: int, w: int) -> None:
    """Frequency by frequency, in float64."""
    x = np.random.default_rng(0).normal(size=(2, h, w))
    s = min(max(sigma, 1e-6), 1 - 1e-6)
    gain = np.ones((h, w))
    for i in range(h):
        for j in range(w):
            for k, n in ((i, h), (j, w)):
                signal = 1 / (min(k, n - k) / n) ** power if k else 1e16
                gain[i, j] *= (1 - s) * signal / ((1 - s) ** 2 * signal + s**2)
    want = np.fft.ifft2(np.fft.fft2(x) * gain / gain.mean()).real
    got = wiener(torch.tensor(x, dtype=torch.float32), sigma, power)
    assert got.numpy() == pytest.approx(want, abs=2e-4 * abs(want).max())


def test_seacache_sees_the_signal_and_not_the_noise() -> None:
    """Near pure noise only the mean passes, near none everything does."""
    x = torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(0))
    flat = wiener(x, 1 - 1e-7, 2.0)
    assert float((flat - flat.mean((1, 2), keepdim=True)).abs().max()) < 1e-3 * float(flat.abs().max())
    torch.testing.assert_close(wiener(x, 1e-7, 2.0), x, atol=1e-4, rtol=1e-4)


@given(st.floats(0.01, 2), st.floats(0.02, 0.5), st.integers(2, 30), st.none() | st.integers(1, 4), st.integers(0, 4))
def test_seacache_counts_as_its_arithmetic_says(
    threshold: float, change: float, count: int, limit: int | None, end: int
) -> None:
    """Flat latents that grow by a constant ratio: the filter multiplies them by what it does to a flat one."""
    cache = SeaCache(threshold, of="latents", limit=limit, first=end, last=end)
    pictures = [torch.full((1, 4, 4), (1 + change) ** t) for t in range(count)]
    sizes = [float(wiener(x, 1 - i / count, 2.0).mean()) for i, x in enumerate(pictures)]
    want, total, row = list[int](), 0.0, 0
    margin = 1.0
    for i in range(count):
        forced = i == 0 or i < end or i >= count - end or (limit is not None and row >= limit)
        total += 0 if forced else abs(sizes[i] / sizes[i - 1] - 1)
        margin = min(margin, margin if forced else abs(total - threshold))
        if forced or total >= threshold:
            want.append(i)
            total, row = 0.0, 0
        else:
            row += 1
    if margin > 1e-4:
        assert sea(cache, pictures) == want


def test_seacache_far_and_near() -> None:
    g = torch.Generator().manual_seed(0)
    pictures = [torch.randn(2, 4, 4, generator=g) for _ in range(12)]
    assert sea(SeaCache(1e9, of="latents"), pictures) == [0, 11]
    assert sea(SeaCache(1e9, of="latents", limit=2), pictures) == [0, 3, 6, 9, 11]
    assert sea(SeaCache(1e9, of="latents", first=3, last=0), pictures) == [0, 1, 2]
    assert sea(SeaCache(0.0, of="latents"), pictures) == list(range(12))
    still = [pictures[0]] * 12
    levels = sea(SeaCache(0.25, of="latents"), still)
    assert 2 < len(levels) < 12  # the filter opens with the level, though the latents stay


def test_estimates() -> None:
    levels = [1 - i / 50 for i in range(50)]
    counts = [SeaCache(t).forecast(FLUX, levels, levels) for t in (0.0, 0.15, 0.3)]
    assert [c.computed for c in counts] == [50, 30, 22]
    assert [c.exact for c in counts] == [True, False, False]
    assert SeaCache(0.3, limit=1).forecast(FLUX, levels, levels).computed == 25
    assert SeaCache(0.3, first=40).forecast(FLUX, levels, levels).computed == 41


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: Spectrum(0.5), "window must be a finite number of at least 1, got 0.5"),
        (lambda: Spectrum(growth=-1), "growth must be a finite number of at least 0, got -1"),
        (lambda: Spectrum(ridge=0, warmup=4), "without a ridge a curve of degree 4 needs warmup=5 or more, got 4"),
        (lambda: Spectrum(mix=1.5), "mix must be from 0 to 1, got 1.5"),
        (lambda: Spectrum(of="blocks"), "of must be one of output, velocity, got 'blocks'"),  # type: ignore[arg-type]
        (lambda: DMD(history=3), "history must be a whole number of at least 4, got 3"),
        (lambda: DMD(tolerance=0), "tolerance must be between 0 and 1, got 0"),
        (lambda: DMD(front=0), "front must be a whole number of at least 1, got 0"),
        (lambda: SeaCache(-1), "threshold must be a finite number of at least 0, got -1"),
        (lambda: SeaCache(of="probe"), "of must be one of input, latents, got 'probe'"),  # type: ignore[arg-type]
        (lambda: SeaCache(limit=0), "limit must be a whole number of at least 1, got 0"),
        (lambda: L2P(()), "rows must begin with an empty one"),
        (lambda: L2P(((1.0,),)), "row 0 must be empty (computed) or hold finite weights of at most 0 features"),
        (lambda: L2P(((), (1.0, 2.0))), "row 1 must be empty (computed) or hold finite weights of at most 1 features"),
        (lambda: L2P(((), (math.nan,))), "row 1 must be empty (computed) or hold finite weights"),
    ],
)
def test_settings_that_cannot_work(make: Any, text: str) -> None:
    with pytest.raises(mf.PlanError) as error:
        make()
    assert text in str(error.value)

"""Stages and solvers beside slow implementations that share nothing with them, and what stages hand to a model."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import mrflow as mf
from mrflow.backbone import Wrapper
from mrflow.noise import Noise
from mrflow.rivals.selflift import mix
from mrflow.solvers import SASolver, StochasticEuler
from tests.strategies import LAW


class Recording(Wrapper):
    """The toy, with a decoder that leaves [0, 1]; it keeps what its encoder is given."""

    def __init__(self) -> None:
        super().__init__(mf.toy())
        self.seen: list[tuple[Tensor, Tensor | None]] = []

    def decode(self, latents: Tensor) -> Tensor:
        """Three times as far from the middle as the toy's."""
        return 3 * (self.model.decode(latents) - 0.5) + 0.5

    def encode(self, pixels: Tensor, noise: Tensor | None = None) -> Tensor:
        """The toy's."""
        self.seen.append((pixels, noise))
        return self.model.encode(pixels, noise)


def slowly_mixed(lat: Tensor, pix: Tensor, share: float, low: float, high: float) -> Tensor:
    """SelfLift's mixture, cell by cell."""
    out = lat.clone()
    batch, channels, rows, columns = lat.shape
    for item in range(batch):
        disagreement: dict[tuple[int, int], float] = {}
        for y in range(rows):
            for x in range(columns):
                apart = [abs(float(pix[item, c, y, x] - lat[item, c, y, x])) for c in range(channels)]
                disagreement[y, x] = sum(apart) / channels
        chosen = sorted(disagreement, key=lambda cell: -disagreement[cell])[: max(1, round(share * rows * columns))]
        values = [disagreement[cell] for cell in chosen]
        for y, x in chosen:
            spread = max(values) - min(values)
            rise = (disagreement[y, x] - min(values)) / spread if spread > 0 else 1.0
            w = low + (high - low) * rise
            for c in range(channels):
                out[item, c, y, x] = (1 - w) * lat[item, c, y, x] + w * pix[item, c, y, x]
    return out


@LAW
@given(st.integers(0, 99), st.sampled_from([0.1, 0.4, 1.0]), st.sampled_from([(0.0, 1.0), (0.5, 1.0), (0.3, 0.6)]))
def test_selflift_beside_a_slow_one(seed: int, share: float, ends: tuple[float, float]) -> None:
    lat, pix = torch.randn(2, 2, 3, 4, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    low, high = ends
    mine = mix(lat, pix, share=share, low=low, high=high)
    torch.testing.assert_close(mine, slowly_mixed(lat, pix, share, low, high))


def test_selflift_encodes_a_picture() -> None:
    """Interpolated pixels that lie outside [0, 1] are brought back before they are encoded."""
    model = Recording()
    assert float(model.decode(torch.full((1, *_space(model), 4, 4), 3.0)).max()) > 1
    mf.run(mf.Sample(64, 64, mf.Shifted(2)) >> mf.SelfLift(), model, "a", seed=0)
    pixels, noise = model.seen[-1]
    assert noise is None and float(pixels.min()) >= 0 and float(pixels.max()) <= 1
    assert float(pixels.min()) == 0 or float(pixels.max()) == 1  # some were outside


def _space(model: mf.Backbone) -> tuple[int]:
    return (model.info.space.channels,)


@pytest.mark.parametrize("posterior", [False, True])
def test_encode_takes_the_mode_unless_it_is_told_to_sample(posterior: bool) -> None:
    model = Recording()
    pixels = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    mf.run(mf.Encode(posterior=posterior), model, "a", seed=7, start=pixels)
    seen, noise = model.seen[-1]
    torch.testing.assert_close(seen, pixels)
    if not posterior:
        assert noise is None
    else:
        assert noise is not None and noise.shape == (1, *_space(model), 32, 32)
        own = mf.PerItem()((7,), tuple(noise.shape), scope="Encode/0", draw=0)
        assert torch.equal(noise, own)


@LAW
@given(st.floats(0.1, 4.0), st.floats(0.3, 0.95), st.floats(0.1, 0.9))
def test_a_stochastic_step_by_hand(churn: float, sigma: float, part: float) -> None:
    """Up by exp(churn (sigma - to)) in odds, with fresh noise to the flow's marginal; then down in one Euler step."""
    to = part * sigma
    x, eps = np.random.default_rng(0).normal(size=(2, 5))
    odds = sigma / (1 - sigma) * math.exp(churn * (sigma - to))
    up = odds / (1 + odds)
    signal = (1 - up) / (1 - sigma)
    raised = signal * x + math.sqrt(up**2 - signal**2 * sigma**2) * eps
    expected = raised + (to - up) * (0.3 * raised - up)
    got, _ = StochasticEuler(churn).step(
        lambda z, s: 0.3 * z - s, torch.tensor(x), sigma, to, (), noise=torch.tensor(eps)
    )
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-9)


@pytest.mark.parametrize("sigma", [0.2, 0.3, 0.9])
def test_sa_solver_outside_its_range_is_its_ode(sigma: float) -> None:
    """`tau` holds from above `low` to `high`: elsewhere the step is that of tau 0, whatever the noise."""
    x, eps = torch.tensor(np.random.default_rng(0).normal(size=(2, 5)))

    def stepped(solver: SASolver, noise: Tensor) -> Tensor:
        return solver.step(lambda z, s: 0.3 * z - s, x, sigma, 0.5 * sigma, (), noise=noise)[0]

    partly = SASolver(1.0, low=0.3, high=0.8)
    assert torch.equal(stepped(partly, eps), stepped(SASolver(0.0), 0 * eps))
    assert not torch.equal(stepped(SASolver(1.0), eps), stepped(SASolver(0.0), eps))


@pytest.mark.parametrize(("order", "corrector"), [(1, 0), (1, 1), (2, 2), (3, 1)])
def test_what_sa_solver_remembers_does_not_grow(order: int, corrector: int) -> None:
    """The state and noise of the step before, and no more estimates than a step goes through."""
    solver, past, kept = SASolver(0.5, order, corrector), (), list[int]()
    x = torch.zeros(3, dtype=torch.float64)
    levels = [0.9 - 0.1 * i for i in range(8)]
    for sigma, to in pairwise(levels):
        x, past = solver.step(lambda z, s: z - s, x, sigma, to, past, noise=torch.ones_like(x))
        kept.append(len(past))
    assert kept[-1] == kept[-4] == 2 + max(order, corrector, 2) - 1


@dataclass(frozen=True)
class Pulse(Noise):
    """Ones in one draw, zeros in all others."""

    at: int

    def __call__(self, seeds: Sequence[int], shape: tuple[int, ...], *, scope: str, draw: int) -> Tensor:
        """Float32 of the shape."""
        return torch.full(shape, float(draw == self.at))


def test_each_stochastic_step_of_a_stage_has_noise_of_its_own() -> None:
    """Draw 0 is the noise it begins with; from sigma 1 nothing is raised, and each later step takes a new draw."""

    def sampled(at: int) -> Tensor:
        solver = StochasticEuler(1.0)
        return mf.run(mf.Sample(32, 32, mf.Linear(4), solver=solver, noise=Pulse(at)), mf.toy(), "a", seed=0).data

    none = sampled(99)
    felt = [not torch.equal(sampled(at), none) for at in range(6)]
    assert felt == [True, False, True, True, True, False]


class Same(mf.Upscaler):
    """Pixels as they are."""

    @property
    def scale(self) -> int:
        """1."""
        return 1

    def __call__(self, pixels: Tensor) -> Tensor:
        """A shade brighter, so that what rounds down and what rounds up differ."""
        return pixels + 0.7 / 255


def test_eight_bits_are_rounded_on_the_way_in_and_cut_off_on_the_way_out() -> None:
    """Level k + 0.4 comes in as k, becomes k + 0.7, and goes out as k; k + 0.6 as k + 1. White stays white."""
    k = torch.arange(255.0).expand(1, 3, 1, 255)
    for part, out in ((0.4, k), (0.6, k + 1)):
        assert torch.equal((mf.EightBit(Same())((k + part) / 255) * 255).round(), out)
        exact = mf.EightBit(Same())((k + part) / 255) * 255
        torch.testing.assert_close(exact, out, rtol=0, atol=1e-3)

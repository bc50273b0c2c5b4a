"""The convention: round trips, and what a rise of the noise keeps."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mrflow.errors import PlanError
from mrflow.flow import denoised, finite, raise_noise, renoise, to_noise
from tests.strategies import LAW


def pair(seed: int) -> tuple[Tensor, Tensor]:
    both = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return both[0], both[1]


@LAW
@given(st.integers(0, 99), st.floats(0.0, 1.0))
def test_a_point_on_the_line_gives_both_ends_back(seed: int, sigma: float) -> None:
    x0, eps = pair(seed)
    x, v = renoise(x0, eps, sigma), eps - x0
    torch.testing.assert_close(denoised(x, v, sigma), x0)
    torch.testing.assert_close(to_noise(x, v, sigma), eps)


def test_the_convention_in_numbers() -> None:
    x0, eps = torch.tensor(2.0), torch.tensor(-3.0)
    assert renoise(x0, eps, 0.25).item() == 0.75 * 2 + 0.25 * -3
    assert renoise(x0, eps, 0.0).item() == 2.0
    assert renoise(x0, eps, 1.0).item() == -3.0


def coefficients(sigma: float, to: float) -> tuple[float, float]:
    one, zero = torch.ones((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    return raise_noise(one, zero, sigma, to).item(), raise_noise(zero, one, sigma, to).item()


@LAW
@given(st.floats(0.0, 0.999), st.floats(0.0, 1.0))
def test_raised_noise_has_the_marginal_of_the_flow(sigma: float, part: float) -> None:
    to = sigma + part * (1.0 - sigma)
    a, b = coefficients(sigma, to)
    assert a * (1.0 - sigma) == pytest.approx(1.0 - to, abs=1e-12)
    assert (a * sigma) ** 2 + b**2 == pytest.approx(to**2, abs=1e-12)


@LAW
@given(st.lists(st.floats(0.0, 0.99), min_size=3, max_size=3).map(sorted))
def test_two_rises_are_one(sigmas: list[float]) -> None:
    low, middle, high = sigmas
    a1, b1 = coefficients(low, middle)
    a2, b2 = coefficients(middle, high)
    a, b = coefficients(low, high)
    assert a2 * a1 == pytest.approx(a, abs=1e-12)
    assert (a2 * b1) ** 2 + b2**2 == pytest.approx(b**2, abs=1e-12)


def test_raised_noise_has_the_variance_when_measured() -> None:
    generator = torch.Generator().manual_seed(0)
    x0, eps, fresh = torch.randn(3, 200_000, generator=generator)
    raised = raise_noise(renoise(2.0 * x0, eps, 0.2), fresh, 0.2, 0.6)
    assert raised.var().item() == pytest.approx(0.4**2 * 4 + 0.6**2, rel=0.02)


@pytest.mark.parametrize(("sigma", "to"), [(0.5, 0.4), (-0.1, 0.5), (0.5, 1.1), (1.0, 1.0), (float("nan"), 0.5)])
def test_noise_is_only_raised(sigma: float, to: float) -> None:
    with pytest.raises(PlanError, match="noise can only be raised"):
        raise_noise(torch.zeros(1), torch.zeros(1), sigma, to)


def test_fresh_noise_is_added_with_its_sign() -> None:
    """From the clean picture to 0.5, by hand: half the signal and half of the noise itself, not of its mirror."""
    x, eps = pair(3)
    torch.testing.assert_close(raise_noise(x, eps, 0.0, 0.5), 0.5 * x + 0.5 * eps)


def test_numbers_whose_sum_overflows_are_finite() -> None:
    large = torch.full((8,), 3e38)
    assert not bool(torch.isfinite(large.sum())) and finite(large)
    for bad in (float("nan"), float("inf"), -float("inf")):
        assert not finite(torch.tensor([1.0, bad]))

"""Upscalers: scale, range, exactness on what interpolation must keep."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import mrflow as mf

FACTORS = st.integers(1, 4)
ALL = [
    mf.Lanczos,
    lambda f: mf.Interpolate(f, "bicubic"),
    lambda f: mf.Interpolate(f, "bilinear"),
    lambda f: mf.Interpolate(f, "nearest"),
]


@pytest.mark.parametrize("make", ALL)
@given(factor=FACTORS, h=st.integers(1, 9), w=st.integers(1, 9), level=st.floats(0, 1))
def test_size_range_and_constants(make, factor: int, h: int, w: int, level: float) -> None:  # type: ignore[no-untyped-def]
    up = make(factor)
    x = torch.rand(2, 3, h, w, generator=torch.Generator().manual_seed(h * 10 + w))
    y = up(x)
    assert y.shape == (2, 3, factor * h, factor * w)
    assert up.scale == factor
    assert float(y.min()) >= 0 and float(y.max()) <= 1
    assert torch.allclose(up(x[1:]), y[1:], atol=1e-6)
    flat = torch.full((1, 3, h, w), level)
    assert torch.allclose(up(flat), torch.full_like(up(flat), level), atol=1e-5)


@pytest.mark.parametrize("factor", [1, 2, 3, 4])
def test_lanczos_against_its_formula(factor: int) -> None:
    """Each output is sum_k x_k L(p - k) / sum_k L(p - k) at p = (i + 0.5) / factor - 0.5, away from the borders."""
    x = torch.rand(1, 1, 1, 15, generator=torch.Generator().manual_seed(0)).expand(1, 3, 15, 15).double() * 0.5 + 0.25
    row = mf.Lanczos(factor)(x.float())[0, 0, 0].double()
    k = torch.arange(15, dtype=torch.float64)
    for i in range(5 * factor, 10 * factor):
        d = (i + 0.5) / factor - 0.5 - k
        weights = torch.where(d.abs() < 3, torch.sinc(d) * torch.sinc(d / 3), torch.zeros_like(d))
        assert float(row[i]) == pytest.approx(float((weights * x[0, 0, 0]).sum() / weights.sum()), abs=1e-5)


@pytest.mark.parametrize("bad", [0, -2, 1.5, True, 17])
def test_bad_factors(bad: object) -> None:
    with pytest.raises(mf.PlanError, match="whole number from 1 to 16"):
        mf.Lanczos(bad)  # type: ignore[arg-type]


def test_a_size_between_the_scales_is_reached_by_passes_and_a_resize() -> None:
    stage = mf.Upscale(mf.Interpolate(2), (96, 96))
    assert stage.passes(mf.Pixels(1, 32, 32), mf.toy().info) == 2
    out = mf.run(stage, mf.toy(), start=torch.rand(1, 3, 32, 32)).pixels
    assert out.shape == (1, 3, 96, 96)
    mf.testing.check_stage(stage)

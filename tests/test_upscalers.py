"""Upscalers: scale, range, exactness on what interpolation must keep."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import mrflow as mf
from mrflow.protocols.upscaler import apply_upscaler

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


class Lies(mf.Upscaler):
    """An upscaler that says one scale, and makes whatever it is told to."""

    scale: Any = 2

    def __init__(self, scale: object, make: Callable[[torch.Tensor], object]) -> None:
        self.scale, self.make = scale, make

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.make(pixels)  # type: ignore[return-value]


def twice(x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.interpolate(x, scale_factor=2.0)


NO_SCALE = r"Lies says scale .*; it must be a whole number from 1 to 64"
NO_TENSOR = "Lies made no ordinary tensor but "
LIES: dict[str, tuple[object, Callable[[torch.Tensor], object], type[mf.MrflowError], str]] = {
    **{
        f"scale {scale!r}": (scale, twice, mf.PlanError, NO_SCALE)
        for scale in (0, -2, 2.5, "2", None, True, float("nan"), 10**9)
    },
    "a list": (2, lambda x: [twice(x)], mf.PromiseError, f"{NO_TENSOR}list"),
    "an array": (2, lambda x: twice(x).numpy(), mf.PromiseError, f"{NO_TENSOR}ndarray"),
    "nothing": (2, lambda x: None, mf.PromiseError, f"{NO_TENSOR}NoneType"),
    "sparse": (2, lambda x: twice(x).to_sparse(), mf.PromiseError, f"{NO_TENSOR}one of layout torch.sparse_coo"),
    "another shape": (2, lambda x: twice(x)[0], mf.PromiseError, r"must make \(1, 3, 64, 64\) .* made \(3, 64, 64\)"),
    "half": (2, lambda x: twice(x).half(), mf.PromiseError, "must make float32 on cpu, but made torch.float16"),
    "bytes": (2, lambda x: (255 * twice(x)).byte(), mf.PromiseError, "must make float32 on cpu, but made torch.uint8"),
    "complex": (2, lambda x: twice(x) + 0j, mf.PromiseError, "must make float32 on cpu, but made torch.complex64"),
    "elsewhere": (2, lambda x: twice(x).to("meta"), mf.PromiseError, "must make float32 on cpu, but made .* on meta"),
    "NaN": (2, lambda x: twice(x) * float("nan"), mf.NonFiniteError, "Lies made NaN or infinity"),
    "infinity": (2, lambda x: twice(x) / 0, mf.NonFiniteError, "Lies made NaN or infinity"),
    "far below": (2, lambda x: -255 * twice(x), mf.PromiseError, r"made values from .* to .*; pixels lie in \[0, 1\]"),
    "255 levels": (2, lambda x: 255 * twice(x), mf.PromiseError, r"made values from .* to .*; pixels lie in \[0, 1\]"),
}


@pytest.mark.parametrize("what", LIES)
def test_an_upscaler_that_lies_is_named(what: str) -> None:
    scale, make, error, words = LIES[what]
    chain = mf.recipes.paper(Lies(scale, make), low=(32, 32), size=(64, 64), steps=1)
    with pytest.raises(error, match=rf"^stage 3 of 7, Upscale\(\.\.\.\): .*{words}"):
        mf.run(chain, mf.toy(), "a")
    with pytest.raises(error, match=words):
        apply_upscaler(Lies(scale, make), torch.rand(1, 3, 32, 32))


@pytest.mark.parametrize("given", [Lies, "lanczos", twice, mf.toy()])
def test_what_is_no_upscaler_is_refused_before_work(given: Any) -> None:
    chain = mf.recipes.paper(given, low=(32, 32), size=(64, 64), steps=1)
    with pytest.raises(mf.PlanError, match=r"an upscaler must be an instance of a subclass of mrflow\.Upscaler, got "):
        mf.plan(chain, mf.toy().info)


def test_whole_numbers_of_numpy_and_overshoot_are_fine() -> None:
    as_random_weights = Lies(np.int64(2), lambda x: twice(x) * 12 - 5)
    made = apply_upscaler(as_random_weights, torch.rand(1, 3, 8, 8))
    assert made.shape == (1, 3, 16, 16) and not made.requires_grad

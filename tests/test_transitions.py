"""Transitions between resolutions: each leaves signal 1 - sigma' and white noise of variance sigma'^2."""

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.fft import dctn, idctn
from scipy.ndimage import sobel
from torch import Tensor

import mrflow as mf
from mrflow.backbone import Positions
from mrflow.errors import PlanError
from mrflow.protocols.tokens import pack, unpack
from mrflow.recipes import speed_steps
from mrflow.rivals.growth import PowerSpectrum, dct_matrix, grow
from mrflow.rivals.ralu import (
    RALU_4X,
    RALU_7X,
    children,
    distance,
    edge_order,
    fit_shifts,
    places_of,
    renew,
    restart,
    shift_steps,
)
from mrflow.rivals.selflift import mix
from mrflow.schedules import shift_static
from tests.parity.test_flux import relative
from tests.parity.test_official import pipeline, words
from tests.test_qwen import repo as qwen_repo  # noqa: F401  (fixture)

pytestmark = pytest.mark.filterwarnings("ignore")
RATIOS = [(4, 8), (6, 9), (8, 8), (5, 15)]
LEVELS = st.floats(0.0, 1.0)


# Growth in the frequency domain


@pytest.mark.parametrize("n", [1, 2, 7, 16])
def test_the_dct_is_scipys(n: int) -> None:
    x = torch.randn(n, n, generator=torch.Generator().manual_seed(n))
    want = dctn(x.double().numpy(), norm="ortho")
    got = dct_matrix(n) @ x @ dct_matrix(n).T
    np.testing.assert_allclose(got.numpy(), want, atol=1e-5)
    np.testing.assert_allclose((dct_matrix(n) @ dct_matrix(n).T).numpy(), np.eye(n), atol=1e-6)


@pytest.mark.parametrize(("small", "large"), RATIOS)
@given(sigma=LEVELS, seed=st.integers(0, 99))
def test_growth_against_scipy(small: int, large: int, sigma: float, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    x, noise = torch.randn(2, 3, small, small, generator=g), torch.randn(2, 3, large, large, generator=g)
    ratio = large / small
    coefficients = sigma * noise.double().numpy()
    coefficients[..., :small, :small] = dctn(x.double().numpy(), axes=(-2, -1), norm="ortho")
    want = ratio / (1 + (ratio - 1) * sigma) * idctn(coefficients, axes=(-2, -1), norm="ortho")
    np.testing.assert_allclose(grow(x, noise, sigma).numpy(), want, atol=1e-4)


@given(sigma=LEVELS, value=st.floats(-3, 3))
def test_a_constant_picture_keeps_its_place_on_the_line(sigma: float, value: float) -> None:
    """(1 - sigma) c becomes (1 - sigma') c: the signal factor that belongs to the new level."""
    out = grow(torch.full((1, 1, 6, 6), (1 - sigma) * value), torch.zeros(1, 1, 12, 12), sigma)
    torch.testing.assert_close(out, torch.full_like(out, (1 - shift_static(sigma, 2.0)) * value), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("sigma", [0.2, 0.7, 1.0])
def test_white_noise_stays_white_at_the_new_level(sigma: float) -> None:
    g = torch.Generator().manual_seed(0)
    out = grow(sigma * torch.randn(400, 4, 4, 4, generator=g), torch.randn(400, 4, 8, 8, generator=g), sigma)
    flat = out.flatten(0, 1).flatten(1)
    covariance = flat.T @ flat / len(flat)
    want = shift_static(sigma, 2.0) ** 2 * torch.eye(64)
    assert float((covariance - want).abs().max()) < 0.12


@given(sigma=LEVELS)
def test_two_growths_are_one_in_level(sigma: float) -> None:
    assert shift_static(shift_static(sigma, 2.0), 2.0) == pytest.approx(shift_static(sigma, 4.0), abs=1e-12)
    x = torch.randn(1, 1, 4, 4)
    torch.testing.assert_close(grow(x, torch.randn(1, 1, 4, 4), sigma), x)  # a ratio of 1 changes nothing


@pytest.mark.parametrize(
    ("side", "delta", "level", "after"),
    [
        (64, 0.01, 0.853, 0.920),
        (64, 0.05, 0.718, 0.836),
        (64, 0.1, 0.638, 0.779),
        (64, 0.2, 0.544, 0.705),
        (32, 0.01, 0.934, 0.966),
        (32, 0.05, 0.862, 0.926),
        (32, 0.1, 0.814, 0.897),
        (32, 0.2, 0.751, 0.858),
    ],
)
def test_speeds_levels(side: int, delta: float, level: float, after: float) -> None:
    found = PowerSpectrum().leave(side / 2, delta)
    assert found == pytest.approx(level, abs=6e-4)
    assert shift_static(found, 2.0) == pytest.approx(after, abs=6e-4)


def test_speeds_steps_are_those_reported_for_flux() -> None:
    assert speed_steps(mf.FLUX, delta=0.01) == (18, 32)
    assert speed_steps(mf.FLUX, delta=0.05) == (28, 22)
    three = speed_steps(mf.FLUX, ((256, 256), (512, 512), (1024, 1024)), delta=0.05)
    assert sum(three) == 50
    assert three[0] + three[1] == 28


# SelfLift


def test_selflift_mixes_where_the_two_disagree() -> None:
    lat, pix = torch.zeros(1, 2, 2, 2), torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]] * 2])
    out = mix(lat, pix, share=0.5, low=0.5, high=1.0)
    torch.testing.assert_close(out[0, 0], torch.tensor([[0.0, 0.0], [1.5, 4.0]]))
    torch.testing.assert_close(mix(lat, pix, share=1.0, low=1.0, high=1.0), pix)
    one = torch.arange(16.0).view(1, 1, 4, 4)  # the only chosen cell disagrees most: it is the highest
    torch.testing.assert_close(mix(one * 0, one, share=0.01, low=0.5, high=0.9), (one == 15) * 13.5)
    even = torch.ones(1, 1, 2, 2)
    torch.testing.assert_close(mix(even * 0, even, share=1.0, low=0.5, high=0.9), 0.9 * even)
    torch.testing.assert_close(mix(lat, pix, share=1.0, low=0.0, high=0.0), lat)
    torch.testing.assert_close(mix(pix, pix, share=0.4, low=0.5, high=1.0), pix)


@given(st.floats(0.05, 1), st.floats(0, 1), st.floats(0, 1), st.integers(0, 99))
def test_selflift_stays_between_the_two(share: float, a: float, b: float, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    lat, pix = torch.randn(2, 3, 4, 5, generator=g), torch.randn(2, 3, 4, 5, generator=g)
    out = mix(lat, pix, share=share, low=min(a, b), high=max(a, b))
    weight = (out - lat) / (pix - lat)
    assert float(weight.min()) > -1e-3
    assert float(weight.max()) < 1 + 1e-3
    touched = (out != lat).any(1).flatten(1).sum(1)
    assert (touched <= max(1, round(share * 20))).all()


# RALU


def test_ralus_levels_are_the_published_ones() -> None:
    want = (
        (RALU_4X, (1, 0.9695, 0.9304, 0.8786, 0.8066, 0.7)),
        (RALU_4X, (0.9365, 0.8925, 0.8426, 0.7854, 0.7192, 0.6418, 0.55)),
        (RALU_4X, (0.8853, 0.8157, 0.7347, 0.6396, 0.5260, 0.3881, 0.2173, 0)),
        (RALU_7X, (1, 0.9417, 0.8)),
        (RALU_7X, (0.9616, 0.8946, 0.8101, 0.7)),
        (RALU_7X, (0.9359, 0.8336, 0.7052, 0.5390, 0.3158, 0)),
    )
    for number, (setting, levels) in enumerate(want):
        assert mf.SampleRegions(1024, 1024, *setting).sigmas(mf.FLUX)[number % 3] == pytest.approx(levels, abs=6e-5)
    assert [restart(e, 6.317) for e in (0.3, 0.45)] == pytest.approx([0.06353, 0.11467], abs=5e-6)
    assert [restart(e, 6.261) for e in (0.2, 0.3)] == pytest.approx([0.03840, 0.06407], abs=5e-6)
    assert mf.SampleRegions(1024, 1024, *RALU_4X).tokens(mf.FLUX) == (1024, 1945, 4096)
    assert mf.SampleRegions(1024, 1024, *RALU_7X).tokens(mf.FLUX) == (1024, 1330, 4096)


@given(st.integers(1, 9), st.floats(0, 0.4), st.floats(0.5, 1), st.floats(0.5, 10))
def test_bent_grids_fall_between_their_ends(steps: int, start: float, end: float, factor: float) -> None:
    levels = shift_steps(steps, start, end, factor)
    assert len(levels) == steps + 1
    assert (levels[0], levels[-1]) == (1 - start, 1 - end)
    assert all(a > b for a, b in pairwise(levels))


@pytest.mark.parametrize("end", [0.2, 0.45])
@pytest.mark.parametrize("z", [2.0, 6.3])
def test_ralus_noise_has_the_exact_variance(end: float, z: float) -> None:
    """Noise of level 1 - e in copied and kept tokens becomes white noise of level 1 - s."""
    g = torch.Generator().manual_seed(1)
    n = 60000
    kept, copied = ((1 - end) * torch.randn(1, n, 1, generator=g) for _ in range(2))
    out = renew(kept, copied, torch.randn(1, 5 * n, 1, generator=g), end, z)[0, :, 0]
    level = 1 - restart(end, z)
    assert float(out[:n].var()) == pytest.approx(level**2, rel=0.02)
    four = out[n:].view(n, 4)
    covariance = four.T @ four / n
    assert float((covariance - level**2 * torch.eye(4)).abs().max()) < 0.02
    clean = renew(torch.full((1, 3, 1), end), torch.full((1, 3, 1), end), torch.zeros(1, 15, 1), end, z)
    torch.testing.assert_close(clean, torch.full_like(clean, restart(end, z)))  # the signal factor is s


def test_copies_land_on_their_cells() -> None:
    cells = children(torch.tensor([[0, 5]]), 3)  # coarse cells (0, 0) and (1, 2) of a grid 3 wide
    assert cells.tolist() == [[0, 1, 6, 7, 16, 17, 22, 23]]
    at = places_of(torch.tensor([[1, 2, 3, 4]]), torch.tensor([[0, 5]]), 2, 3)
    assert at[0, :4].tolist() == [[0, 1], [0, 2], [1, 0], [1, 1]]
    assert at[0, 4:8].tolist() == [[0, 0], [0, 0.5], [0.5, 0], [0.5, 0.5]]
    assert at[0, 8:].tolist() == [[1, 2], [1, 2.5], [1.5, 2], [1.5, 2.5]]


def test_edges_come_first() -> None:
    picture = torch.full((1, 3, 32, 48), 0.05)
    picture[:, :, 20:28, 36:44] = 0.2  # dark on dark, in the cell (1, 2) of 2 x 3
    assert edge_order(picture, 2, 3)[0].tolist() == [5, 0, 1, 2, 3, 4]


def test_edges_are_those_of_sobels_operator_in_luma() -> None:
    """Against scipy's, on noise, which has slopes in every direction and colour."""
    pictures = torch.rand(4, 3, 24, 40, generator=torch.Generator().manual_seed(0))
    for picture, order in zip(pictures.double().numpy(), edge_order(pictures, 6, 10), strict=True):
        grey = np.tensordot([0.299, 0.587, 0.114], picture, 1)
        slope = np.hypot(sobel(grey, 0, mode="nearest"), sobel(grey, 1, mode="nearest"))
        strength = slope.reshape(6, 4, 10, 4).mean((1, 3)).ravel()
        assert order.tolist() == np.argsort(-strength).tolist()


def test_ralus_distance_and_fit() -> None:
    assert distance(*RALU_4X[:4], shift=3.0) == pytest.approx(0.01746, abs=1e-4)  # type: ignore[call-arg, misc, arg-type]
    assert distance(*RALU_7X[:4], shift=3.0) == pytest.approx(0.02664, abs=3e-4)  # type: ignore[call-arg, misc, arg-type]
    for steps, ends, found in (((5, 6, 7), (0.3, 0.45), 0.01688), ((2, 3, 5), (0.2, 0.3), 0.02635)):
        assert distance(steps, ends, *fit_shifts(steps, ends), shift=3.0) < found + 4e-4


def test_a_field_over_positions_is_the_field_over_the_grid(tmp_path: Path, qwen_repo: Path) -> None:  # noqa: F811
    """Tokens that happen to form a grid, given as a row with their positions, in any order."""
    pipeline(tmp_path, guidance=True)
    flux, qwen, pocket = (mf.load(w, device="cpu") for w in (tmp_path, qwen_repo, "pocket"))
    conds = (mf.Condition(words(1)), qwen.condition(["a cat"]), pocket.condition(["a big red circle"]))
    g = torch.Generator().manual_seed(2)
    order = torch.randperm(12, generator=g)
    for model, cond in zip((flux, qwen, pocket), conds, strict=True):
        x = torch.randn(1, 16, 6, 8, generator=g)
        at = torch.stack((torch.arange(12) // 4, torch.arange(12) % 4), -1).float()
        row = unpack(pack(x)[:, order], 1, 12)
        with torch.inference_mode():
            want = model.field(cond)(x, 0.6)
            got = model.field(cond, mf.FieldOptions(positions=Positions(at[order], 3, 4)))(row, 0.6)
        assert relative(pack(got), pack(want)[:, order]) < 1e-5


# Parts of schedules


GRIDS = st.integers(2, 40).map(mf.Shifted)


@given(GRIDS, st.data())
def test_parts_join_to_the_whole(grid: mf.Shifted, data: st.DataObject) -> None:
    cut = data.draw(st.integers(1, grid.steps - 1))
    whole = grid(1.0, 4096, mf.FLUX)
    size = (1024, 1024)
    head = mf.Part(grid, 0, cut, size=size)(1.0, 1024, mf.FLUX)
    tail = mf.Part(grid, cut, size=size)(head[-1], 1024, mf.FLUX)
    assert (*head[:-1], *tail) == whole
    clean = mf.Part(grid, 0, cut, size=size, clean=True)(1.0, 1024, mf.FLUX)
    assert clean == (*head[:-1], 0.0)
    spec = mf.Latents(1, 64, 64, mf.FLUX.space)
    assert mf.Level(grid, cut, size=size).of(spec, mf.FLUX) == head[-1]


def test_a_clean_part_leaves_the_clean_estimate() -> None:
    model = mf.toy()
    grid = mf.Linear(5)
    steps: list[Tensor] = []

    def listen(event: mf.Event) -> None:
        if isinstance(event, mf.Stepped):
            steps.append(event.step.denoised)

    mf.run(mf.Sample(32, 32, mf.Part(grid, 0, 3)) >> mf.Refine(mf.Part(grid, 3)), model, on_event=listen)
    clean = mf.run(mf.Sample(32, 32, mf.Part(grid, 0, 3, clean=True)), model).data
    torch.testing.assert_close(clean, steps[2])


def test_a_grid_cut_in_two_stages_is_sampling_in_one() -> None:
    model, grid = mf.toy(), mf.Shifted(6)
    want = mf.run(mf.Sample(32, 32, grid) >> mf.Decode(), model).pixels
    halves = mf.Sample(32, 32, mf.Part(grid, 0, 4)) >> mf.Refine(mf.Part(grid, 4)) >> mf.Decode()
    assert torch.equal(mf.run(halves, model).pixels, want)


BAD: list[tuple[Any, str]] = [
    (lambda: mf.Part(mf.Shifted(4), 3, 3), "at least one step"),
    (lambda: mf.Part(mf.Shifted(4), -1), "first must be a whole number"),
    (lambda: mf.Part(mf.Shifted(4), 0, 5)(1.0, 64, mf.FLUX), "the grid has 4 steps, and this part wants 0 to 5"),
    (lambda: mf.Part(mf.Linear(4), 1)(0.4, 64, mf.FLUX), "the latents hold noise of level 0.4.*goes to 0.5"),
    (lambda: mf.Level(mf.Shifted(4), True), "step must be a whole number"),
    (lambda: mf.SampleRegions(1024, 1024, (1, 2, 0)), "three whole numbers"),
    (lambda: mf.SampleRegions(1024, 1024, ends=(0.5, 0.3)), "two rising times"),
    (lambda: mf.SampleRegions(1024, 1024, z=1.9), "z must be at least 2"),
    (lambda: mf.SampleRegions(1024, 1024, share=1.0), "share must be"),
    (lambda: mf.plan(mf.SampleRegions(1040, 1024), mf.FLUX), "half of 1040x1024 is not a whole number of tokens"),
    (lambda: mf.SelfLift(share=0), "share must be above 0"),
    (lambda: mf.SelfLift(low=0.8, high=0.7), "weights must be"),
    (lambda: PowerSpectrum(0.0), "amplitude must be above 0"),
    (lambda: PowerSpectrum().leave(8, 1.0), "delta must be in"),
    (lambda: mf.recipes.speed(steps=(3, 2)), "steps must be 3 whole numbers"),
    (lambda: mf.recipes.lift(steps=(3, 0)), "steps must be 2 whole numbers"),
    (lambda: mf.recipes.ralu(preset="9x"), "preset must be"),  # type: ignore[arg-type]
    (lambda: mf.plan(mf.Sample(64, 64, mf.Shifted(3)) >> mf.Grow((64, 96)), mf.FLUX), "has another aspect"),
    (
        lambda: mf.plan(mf.Sample(64, 64, mf.Part(mf.Shifted(3), 0, 2)) >> mf.SelfLift(), mf.FLUX),
        "takes a clean estimate.*clean=True",
    ),
    (lambda: mf.run(mf.SampleRegions(64, 64) >> mf.Decode(), mf.toy()), "toy draws on whole grids only"),
]


@pytest.mark.parametrize(("make", "message"), BAD, ids=[m for _, m in BAD])
def test_what_cannot_be_says_so(make: Any, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        make()


# Whole chains

LOW, SIZE = (64, 64), (128, 128)
CHAINS = {
    "lift": mf.recipes.lift(low=LOW, size=SIZE, steps=(3, 2)),
    "lift bilinear from 0.6": mf.recipes.lift("bilinear", low=LOW, size=SIZE, steps=(3, 2), sigma=0.6),
    "selflift": mf.recipes.selflift(low=LOW, size=SIZE, steps=(3, 2)),
    "speed": mf.recipes.speed(sizes=((32, 32), LOW, SIZE), steps=(1, 2, 2)),
    "ralu": mf.recipes.ralu(size=SIZE),
    "ralu 1,2,3": mf.recipes.ralu(size=SIZE, steps=(1, 2, 3)),
    "jit": mf.recipes.jit(size=SIZE, steps=(2, 1, 2)),
    "fresco": mf.recipes.fresco(size=SIZE, steps=(2, 1, 2)),
}


@pytest.mark.parametrize("name", CHAINS)
@pytest.mark.parametrize("family", ["flux", "qwen", "pocket"])
def test_chains_run_on_every_model_and_items_are_independent(
    name: str,
    family: str,
    tmp_path: Path,
    qwen_repo: Path,  # noqa: F811
) -> None:
    chain = CHAINS[name]
    more: dict[str, Any] = {}
    if family == "flux":
        pipeline(tmp_path, guidance=True)
        more["condition"] = mf.Condition(words(2))
    model = mf.load({"flux": tmp_path, "qwen": qwen_repo, "pocket": "pocket"}[family], device="cpu")
    prompts = ["a big red circle", "the blue word CAT"]
    both = mf.run(chain, model, *([] if more else [prompts]), seed=[3, 4], **more)
    if more:
        more = {"condition": mf.Condition({k: t[1:] for k, t in words(2).items()})}
    alone = mf.run(chain, model, *([] if more else [prompts[1]]), seed=4, **more)
    assert relative(both.pixels[1:], alone.pixels) < 2e-4
    planned = mf.plan(chain, model.info)
    assert alone.nfe == planned.nfe
    assert alone.stages[0].nfe == planned.rows[0].work.nfe


@pytest.mark.parametrize("name", CHAINS)
def test_chains_come_back_from_their_records(name: str, tmp_path: Path) -> None:
    model = mf.load("pocket", device="cpu")
    made = mf.run(CHAINS[name], model, "a big red circle", seed=1)
    made.save(tmp_path / "out.png")
    torch.testing.assert_close(mf.replay(tmp_path / "out.png", model=model).pixels, made.pixels)


def test_folded_models_know_all_levels(qwen_repo: Path) -> None:  # noqa: F811
    for name in ("speed", "ralu", "jit", "fresco"):
        whole = mf.run(CHAINS[name], mf.load(qwen_repo, device="cpu"), "a cat").pixels
        folded = mf.load(qwen_repo, device="cpu", fold=CHAINS[name])
        assert torch.equal(mf.run(CHAINS[name], folded, "a cat").pixels, whole)


def test_ralu_costs_what_its_tokens_cost() -> None:
    from mrflow.cost import decode_flops, forward_flops

    planned = mf.plan(mf.recipes.ralu(), mf.FLUX)
    want = sum(n * forward_flops(mf.FLUX, t) for n, t in ((5, 1024), (6, 1945), (7, 4096)))
    assert planned.rows[0].work.flops == pytest.approx(want + decode_flops(mf.FLUX, 512, 512))
    native = mf.plan(mf.recipes.native(), mf.FLUX)
    assert native.work.flops / planned.work.flops == pytest.approx(4.4, abs=0.3)
    fast = mf.plan(mf.recipes.ralu(preset="7x"), mf.FLUX)
    assert native.work.flops / fast.work.flops == pytest.approx(7.5, abs=0.5)


def test_speed_costs_what_was_estimated() -> None:
    """6.3x on FLUX.1 with (3, 2, 7), 9.2x on Qwen-Image with (1, 1, 5), by operations."""
    native = [mf.plan(mf.recipes.native(), m).work.flops for m in (mf.FLUX, mf.QWEN)]
    flux = mf.plan(mf.recipes.speed(), mf.FLUX).work.flops
    qwen = mf.plan(mf.recipes.speed(steps=(1, 1, 5)), mf.QWEN).work.flops
    assert native[0] / flux == pytest.approx(6.3, abs=0.3)
    assert native[1] / qwen == pytest.approx(9.2, abs=0.4)
    assert math.isfinite(flux)

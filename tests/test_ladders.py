"""Sizes, ladders, lifts, crops, composite upscalers, and the command line's way to them."""

import math
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

import mrflow as mf
from mrflow.cli.parsing import refinement, upscaler
from mrflow.stages.lift import nearest_rise
from tests.sr_files import compact
from tests.test_cli import call, here  # noqa: F401


@given(st.floats(0.06, 19), st.floats(0.05, 16), st.sampled_from([8, 16, 32, 64]))
def test_size_is_near_and_whole(aspect: float, megapixels: float, multiple: int) -> None:
    h, w = mf.size(aspect, megapixels=megapixels, multiple=multiple)
    assert h % multiple == w % multiple == 0
    exact_h, exact_w = math.sqrt(megapixels * 2**20 / aspect), math.sqrt(megapixels * 2**20 * aspect)
    assert abs(h - exact_h) <= multiple and abs(w - exact_w) <= multiple


@pytest.mark.parametrize(
    ("aspect", "want"), [("1:1", (1024, 1024)), ("16:9", (768, 1376)), ("9:16", (1376, 768)), (1.5, (832, 1248))]
)
def test_sizes_that_people_ask_for(aspect: str | float, want: tuple[int, int]) -> None:
    assert mf.size(aspect, megapixels=1) == want


@pytest.mark.parametrize("bad", ["16x9", "", "0:1", "1:0", "nan", -1.0, "100:1", None])
def test_aspects_that_make_no_sense(bad: object) -> None:
    with pytest.raises(mf.PlanError, match='an aspect is width:height, such as "16:9"'):
        mf.size(bad)  # type: ignore[arg-type]


def test_areas_that_make_no_sense() -> None:
    with pytest.raises(mf.PlanError, match="megapixels must be above 0"):
        mf.size("1:1", megapixels=0)
    with pytest.raises(mf.PlanError, match="beyond 32768 pixels a side"):
        mf.size("20:1", megapixels=1000)


def test_a_ladder_of_three_rungs() -> None:
    """x2, then a ratio of 1.5 by a x2 upscaler and a resize; its own upscaler and sigma for each rung."""
    chain = mf.recipes.ladder(
        [(32, 48), (64, 96), (96, 144)],
        steps=2,
        sigmas=[0.2, 0.1],
        upscalers=[mf.Lanczos(2), mf.Interpolate(4, "bicubic")],
    )
    model = mf.toy()
    planned = mf.plan(chain, model.info)
    assert [r.out.sigma for r in planned.rows if r.name == "Reinject"] == [0.2, 0.1]  # type: ignore[attr-defined]
    result = mf.run(chain, model, ["a", "b"], seed=[1, 2])
    assert result.pixels.shape == (2, 3, 96, 144)
    alone = mf.run(chain, model, "b", seed=2)
    assert torch.allclose(result.pixels[1:], alone.pixels, atol=1e-4)


def test_wide_and_tall_ladders_on_large_models() -> None:
    for aspect in ("16:9", "9:16", "4:3", "21:9"):
        h, w = mf.size(aspect, megapixels=4, multiple=64)
        chain = mf.recipes.ladder([(h // 4, w // 4), (h // 2, w // 2), (h, w)], upscalers=mf.Lanczos(2))
        assert mf.plan(chain, mf.FLUX).out == mf.Pixels(1, h, w)


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 400), st.integers(1, 400))
def test_the_size_that_is_offered_would_do(h: int, w: int, more: int, wide: int) -> None:
    low = (16 * h, 16 * w)
    high = (low[0] + more, low[1] + wide)
    near = nearest_rise(low, high, 16)
    assert near[0] % 16 == near[1] % 16 == 0 and near[0] * low[1] == near[1] * low[0]
    assert near[0] >= low[0] and near[1] >= low[1]
    mf.plan(mf.Upscale(mf.Lanczos(2), near) >> mf.Encode(), mf.FLUX, start=mf.Pixels(1, *low))


def test_a_rung_that_cannot_be_is_refused_with_the_nearest() -> None:
    with pytest.raises(mf.PlanError, match="1000x1800 has another aspect than 512x896; 1024x1792 would keep it"):
        mf.plan(mf.recipes.ladder([(512, 896), (1000, 1800)], upscalers=mf.Lanczos(2)), mf.FLUX)
    with pytest.raises(mf.PlanError, match="size 1000x1000 is not a multiple of 16; try 1008x1008"):
        mf.plan(mf.recipes.ladder([(500 + 12, 512), (1000, 1000)], upscalers=mf.Lanczos(2)), mf.FLUX)
    with pytest.raises(mf.PlanError, match="sizes must rise"):
        mf.recipes.ladder([(512, 512), (512, 1024)])
    with pytest.raises(mf.PlanError, match="sizes must rise: low 2048x2048 is followed by size 1024x1024"):
        mf.recipes.paper(low=(2048, 2048))  # one of the two was not given, so both are named


@pytest.mark.parametrize("filter", ["nearest", "bilinear", "bicubic"])
def test_lift_enlarges_latents(filter: str) -> None:
    stage = mf.Lift((96, 96), filter)  # type: ignore[arg-type]
    mf.testing.check_stage(stage)
    mf.testing.check_stage(mf.Lift(None, filter))  # type: ignore[arg-type]
    out = mf.run(mf.recipes.latent(filter, low=(32, 32), size=(96, 96), steps=2), mf.toy(), "a")  # type: ignore[arg-type]
    assert out.pixels.shape == (1, 3, 96, 96)


def test_nearest_latents_are_repeated() -> None:
    z = torch.rand(1, 3, 4, 5)
    state = mf.State(mf.Latents(1, 4, 5, mf.toy().info.space), z)
    out = mf.run(mf.Lift(None, "nearest"), mf.toy(), start=state).data
    assert torch.equal(out, z.repeat_interleave(2, 2).repeat_interleave(2, 3))


def test_lift_says_what_it_cannot() -> None:
    with pytest.raises(mf.PlanError, match=re.escape("latents hold noise (sigma 0.2), and Lift takes clean ones")):
        mf.plan(mf.Lift(), mf.FLUX, start=mf.Latents(1, 64, 64, mf.FLUX.space, 0.2))
    with pytest.raises(mf.PlanError, match="1024x512 has another aspect than 512x512; 768x768 would keep it"):
        mf.plan(mf.Lift((1024, 512)), mf.FLUX, start=mf.Latents(1, 64, 64, mf.FLUX.space))
    with pytest.raises(mf.PlanError, match="filter must be"):
        mf.Lift(None, "lanczos")  # type: ignore[arg-type]


def test_round_trip_energy_tells_pictures_from_lifts() -> None:
    """The toy decoder repeats cells and its encoder averages: every latent returns, but those that decode clamps."""
    z = torch.rand(2, 3, 4, 4) * 2 - 1
    assert torch.allclose(mf.metrics.round_trip_energy(mf.toy(), z), torch.zeros(2), atol=1e-12)
    z[1] = 3.0
    assert torch.allclose(mf.metrics.round_trip_energy(mf.toy(), z), torch.tensor([0.0, 4.0]), atol=1e-6)


def test_psnr_and_sharpness_closed_forms() -> None:
    x = torch.full((2, 3, 8, 8), 0.5)
    y = x + torch.tensor([0.1, 0.01]).view(2, 1, 1, 1)
    assert torch.allclose(mf.metrics.psnr(x, y), torch.tensor([20.0, 40.0]), atol=1e-3)
    assert mf.metrics.psnr(x, x).isinf().all()
    with pytest.raises(mf.PlanError, match="must have one shape"):
        mf.metrics.psnr(x, x[..., :4])
    rows = torch.arange(8.0).view(1, 1, 8, 1).expand(1, 3, 8, 8)
    assert float(mf.metrics.sharpness(rows)) == pytest.approx(0, abs=1e-9)  # a ramp has no second difference
    checks = ((torch.arange(8).view(8, 1) + torch.arange(8)) % 2).float().expand(1, 3, 8, 8)
    assert float(mf.metrics.sharpness(checks)) == pytest.approx(16.0, rel=1e-5)  # its Laplacian is +4 and -4


INNER = mf.Interpolate(2, "bilinear")


@pytest.mark.parametrize(
    "up",
    [
        mf.Blend(mf.Lanczos(2), INNER, 0.25),
        mf.Sharpen(INNER, 0.5, 2),
        mf.ColourMatch(INNER),
        mf.EightBit(INNER),
        mf.Sharpen(mf.Blend(mf.EightBit(mf.Lanczos(3)), mf.ColourMatch(mf.Interpolate(3)))),
    ],
    ids=lambda u: type(u).__name__,
)
@given(h=st.integers(1, 9), w=st.integers(1, 9))
def test_composites_keep_the_laws(up: mf.Upscaler, h: int, w: int) -> None:
    x = torch.rand(2, 3, h, w, generator=torch.Generator().manual_seed(h * 10 + w))
    kept, y = x.clone(), up(x)
    assert y.shape == (2, 3, up.scale * h, up.scale * w) and y.dtype == torch.float32
    assert torch.equal(x, kept) and torch.equal(up(x), y)
    assert torch.allclose(up(x[1:]), y[1:], atol=1e-5)
    flat = torch.full((1, 3, h, w), 51 / 255)
    assert torch.allclose(up(flat), torch.full_like(up(flat), 51 / 255), atol=1e-5)


def test_what_composites_do() -> None:
    x = torch.rand(1, 3, 6, 6)
    a, b = mf.Lanczos(2), INNER
    assert torch.allclose(mf.Blend(a, b, 0.25)(x), 0.75 * a(x) + 0.25 * b(x), atol=1e-6)
    y = mf.ColourMatch(mf.Interpolate(2, "nearest"))(0.5 * x)
    assert torch.allclose(y.mean((2, 3)), 0.5 * x.mean((2, 3)), atol=1e-5)
    levels = mf.EightBit(INNER)(x) * 255
    assert torch.allclose(levels, levels.round(), atol=1e-4)
    edge = torch.zeros(1, 3, 4, 4)
    edge[..., 2:] = 1
    sharp, plain = mf.Sharpen(INNER, 0.5)(edge), INNER(edge)
    assert float(sharp.max()) > float(plain.max()) and float(sharp.min()) < float(plain.min())


def test_composites_say_what_they_cannot() -> None:
    with pytest.raises(mf.PlanError, match="one scale, got 2 and 3"):
        mf.Blend(mf.Lanczos(2), mf.Lanczos(3))
    with pytest.raises(mf.PlanError, match="amount must be from 0 to 1"):
        mf.Blend(INNER, INNER, 1.5)
    with pytest.raises(mf.PlanError, match="amount must be"):
        mf.Sharpen(INNER, float("nan"))
    with pytest.raises(mf.PlanError, match="radius must be"):
        mf.Sharpen(INNER, 0.3, 0)


def test_composites_are_replayed(tmp_path: Path) -> None:
    up = mf.Sharpen(mf.Blend(mf.Lanczos(2), mf.EightBit(INNER)), 0.2)
    result = mf.run(mf.recipes.paper(up, low=(32, 32), size=(64, 64), steps=2), mf.toy(), "a")
    result.save(tmp_path / "out.png")
    assert torch.equal(mf.replay(tmp_path / "out.png", model=mf.toy()).pixels, result.pixels)


def test_crop_takes_the_middle() -> None:
    x = torch.arange(5.0 * 6).view(1, 1, 5, 6).expand(1, 3, 5, 6) / 30
    assert torch.equal(mf.run(mf.Crop(3, 2), mf.toy(), start=x).pixels, x[:, :, 1:4, 2:4])
    mf.testing.check_stage(mf.Crop(7, 9))
    with pytest.raises(mf.PlanError, match="height must be a whole number of pixels from 1 to the picture's 5, got 6"):
        mf.run(mf.Crop(6, 6), mf.toy(), start=x)


@given(st.integers(1, 300), st.integers(1, 300), st.sampled_from([1, 1.25, 1.5, 2, 3, 4, 2.7]))
def test_a_photo_is_brought_to_whole_tokens(h: int, w: int, scale: float) -> None:
    info = mf.FLUX
    try:
        part, size = refinement(h, w, scale, info, crop=True)
    except mf.PlanError as error:
        assert "too small" in str(error)
        return
    assert part[0] <= h and part[1] <= w
    assert size[0] % 16 == size[1] % 16 == 0 and size[0] * part[1] == size[1] * part[0]
    assert size[0] / part[0] == pytest.approx(scale, rel=0.01)


def test_refine_a_photo_from_the_command_line(here: Path) -> None:  # noqa: F811
    photo = mf.run(mf.recipes.native(size=(64, 64), steps=2), mf.load("pocket"), "a big red circle").images[0]
    photo.crop((0, 0, 60, 50)).save("photo.jpg")
    code, _, err = call("refine", "photo.jpg")
    assert code == 2 and "50x60 times 2 is not whole tokens of 16 pixels: --crop takes the middle 48x56" in err
    code, out, err = call("refine", "photo.jpg", "--crop", "--prompt", "a big red circle", "--sigma", "0.2")
    assert code == 0 and out.strip() == "photo-refined.png" and "Upscale" in err and "makes mud of a photograph" in err
    own = mf.run(mf.recipes.native(size=(64, 64), steps=2), mf.load("pocket"), "a big red circle").save("own.png")
    code, _, err = call("refine", *map(str, own))
    assert code == 0 and "mud" not in err  # its own drawing is none
    assert mf.read_image("photo-refined.png").shape == (1, 3, 96, 112)
    code, again, _ = call("replay", "photo-refined.png", "--start", "photo.jpg")
    assert code == 0 and torch.equal(mf.read_image(again.strip()), mf.read_image("photo-refined.png"))
    for words, text in (
        (["nowhere.png"], "nowhere.png cannot be read"),
        (["photo.jpg", "--scale", "0.5"], "--scale must be from 1 to 16, got 0.5"),
        (["photo.jpg", "--sr", "latent-nearest"], "refining a picture goes over pixels"),
        (["photo.jpg", "--crop", "--sigma", "2"], "sigma"),
    ):
        code, _, err = call("refine", *words)
        assert code in (2, 5) and text in err


OWN = """
import mrflow as mf
mine = mf.Sharpen(mf.Lanczos(2), 0.4)
number = 3
"""


def test_every_word_of_sr(here: Path) -> None:  # noqa: F811
    save_file(compact(), "net.safetensors")
    torch.save({"params": compact()}, "net.pth")
    Path("own.py").write_text(OWN)
    small = ["a big red circle", "--low", "32x32", "--size", "64x64", "--steps", "2", "--force"]
    for word in (
        *("own", "nearest", "bilinear", "bicubic", "lanczos", "latent-nearest", "latent-bilinear", "latent-bicubic"),
        *("net.safetensors", "net.pth", "own.py:mine"),
    ):
        code, out, err = call("generate", *small, "--sr", word)
        assert code == 0, (word, err)
    code, _, err = call("replay", out.strip())
    assert code == 0, err
    code, out, _ = call("plan", "--model", "flux1-dev", "--sr", "net.pth", "--size", "16:9")
    assert code == 0 and "Pixels 768x1376" in out
    for word, text in (
        ("best", "--sr takes own, nearest, bilinear"),
        ("gone.pth", "there is no file gone.pth"),
        ("own.py:number", "own.py has no upscaler 'number'; its upscalers are mine"),
        ("gone.yml", "there is no file gone.yml"),
    ):
        code, _, err = call("generate", *small, "--sr", word)
        assert code in (2, 3) and text in err, err
    assert isinstance(upscaler("lanczos"), mf.Lanczos)


def test_ladders_from_the_command_line(here: Path) -> None:  # noqa: F811
    words = ["generate", "a big red circle", "--ladder", "32,64,96", "--steps", "2"]
    code, out, err = call(*words)
    assert code == 0 and err.count("Refine") == 2
    assert mf.read_image(out.strip()).shape == (1, 3, 96, 96)
    code, _, err = call(*words, "--size", "64")
    assert code == 2 and "--ladder gives all sizes" in err
    code, _, err = call(*words, "--sr", "latent-nearest")
    assert code == 2 and "--ladder goes over pixels" in err
    code, _, err = call("generate", "a", "--ladder", "64,32")
    assert code == 2 and "sizes must rise" in err

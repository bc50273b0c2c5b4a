"""Stages without a network of their own: where each cell comes from, and operations against those that are counted."""

import itertools
import re
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import mrflow as mf
from mrflow.backbone import Wrapper
from mrflow.errors import PlanError, PromiseError
from mrflow.guidance import Guidance
from mrflow.model_info import ModelInfo
from mrflow.protocols.decoder import Decoder
from mrflow.protocols.upscaler import LatentUpscaler, Upscaler
from mrflow.stages.crop import Crop
from mrflow.stages.integrating import check_policy
from mrflow.stages.lift import nearest_rise
from mrflow.stages.tiles import check_tiles
from mrflow.stages.truth import Truth
from mrflow.testing import TOY
from tests.strategies import FEW

SPACE = TOY.space


def latents(data: Tensor, space: mf.LatentSpace = SPACE) -> mf.State[mf.Latents]:
    return mf.State(mf.Latents(len(data), data.shape[-2], data.shape[-1], space), data)


def pixels(data: Tensor) -> mf.State[mf.Pixels]:
    return mf.State(mf.Pixels(len(data), data.shape[-2], data.shape[-1]), data)


def run(stage: Any, state: Any, model: Any = None) -> Tensor:
    model = model or mf.toy()
    prompts = ["a"] * state.spec.batch
    return mf.run(stage, model, prompts, seed=list(range(len(prompts))), start=state).data


def coordinates(height: int, width: int, batch: int = 2) -> Tensor:
    """Channels that say where a cell lies: its row, its column, its item, all from 0 to below 1."""
    item, row, column = torch.meshgrid(*(torch.arange(n) for n in (batch, height, width)), indexing="ij")
    return torch.stack((row / height, column / width, item / batch), 1)


@dataclass(frozen=True)
class Twice(LatentUpscaler, Upscaler):
    """Each cell `factor` times a side; `counted` gets the cells of each call."""

    factor: int = 2
    space: str = SPACE.name
    says: int | None = None
    counted: list[int] = field(default_factory=list[int], compare=False)

    @property
    def scale(self) -> int:
        return self.factor

    @property
    def channels(self) -> int | None:
        return self.says

    @property
    def flops_per_cell(self) -> float:
        return 7.0

    @property
    def flops_per_pixel(self) -> float:
        return 7.0

    def __call__(self, x: Tensor) -> Tensor:
        self.counted.append(len(x) * x.shape[-2] * x.shape[-1])
        return x.repeat_interleave(self.factor, -2).repeat_interleave(self.factor, -1)


# Crop


@FEW
@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 5), st.integers(0, 5))
def test_a_crop_is_the_middle_pixel_for_pixel(height: int, width: int, over: int, beside: int) -> None:
    whole = coordinates(height + over, width + beside)
    got = run(Crop(height, width), pixels(whole))
    rows, columns = (got[0, 0, :, 0] * (height + over)).round(), (got[0, 1, 0] * (width + beside)).round()
    assert got.shape == (2, 3, height, width)
    assert torch.equal(rows, rows[0] + torch.arange(height)) and torch.equal(columns, columns[0] + torch.arange(width))
    for first, more in ((rows[0], over), (columns[0], beside)):  # as much on either side, or one more at the end
        assert 0 <= (more - first) - first <= 1
    assert got[:, 2].amax((1, 2)).tolist() == got[:, 2].amin((1, 2)).tolist() == [0, 0.5]


def test_a_crop_that_is_larger_is_refused() -> None:
    for crop, side, have in ((Crop(9, 4), "height", 8), (Crop(8, 13), "width", 12), (Crop(0, 4), "height", 8)):
        with pytest.raises(PlanError, match=f"{side} must be a whole number of pixels from 1 to the picture's {have}"):
            mf.plan(crop, TOY, start=mf.Pixels(1, 8, 12))
    assert mf.plan(Crop(8, 12), TOY, start=mf.Pixels(1, 8, 12)).out == mf.Pixels(1, 8, 12)


# Lift and Upscale


@pytest.mark.parametrize("rows", [16, 24])
def test_the_nearest_lift_gives_each_cell_the_one_it_lies_in(rows: int) -> None:
    x = coordinates(8, 12)
    got = run(mf.Lift((2 * rows, 3 * rows), "nearest"), latents(x))
    assert got.shape == (2, 3, rows, rows * 3 // 2)
    for y, column in itertools.product(range(rows), range(rows * 3 // 2)):
        centre = int((y + 0.5) * 8 / rows), int((column + 0.5) * 8 / rows)
        assert torch.equal(got[..., y, column], x[..., centre[0], centre[1]])


@pytest.mark.parametrize(("filter", "off"), [("bilinear", 1e-5), ("bicubic", 0.05)])  # in cells; cubics of a = -0.75
def test_a_smooth_lift_keeps_a_line_a_line(filter: Any, off: float) -> None:
    x = coordinates(12, 16)
    got = run(mf.Lift(None, filter), latents(x))
    inside = got[..., 6:-6, 6:-6]
    where = torch.arange(6, 18), torch.arange(6, 26)  # centres of cells half as large, in old cells
    rows, columns = ((at + 0.5) / 2 - 0.5 for at in where)
    torch.testing.assert_close(12 * inside[0, 0], rows[:, None].expand(12, 20), atol=off, rtol=0)
    torch.testing.assert_close(16 * inside[0, 1], columns.expand(12, 20), atol=off, rtol=0)


@pytest.mark.parametrize(("size", "calls"), [(None, 1), ((32, 48), 1), ((48, 72), 2), ((64, 96), 2), ((128, 192), 3)])
def test_an_upscaler_runs_until_the_size_is_reached_and_costs_what_it_runs(
    size: tuple[int, int] | None, calls: int
) -> None:
    cells, net = coordinates(8, 12), Twice()
    stage = mf.Lift(size, upscaler=net)
    planned = mf.plan(stage, TOY, start=latents(cells).spec)
    got = run(stage, latents(cells))
    assert tuple(got.shape[-2:]) == (size[0] // 2, size[1] // 2) if size else (16, 24)
    assert len(net.counted) == calls and planned.work.flops == 7 * sum(net.counted)
    below = torch.nn.functional.avg_pool2d(got, got.shape[-1] // 12) if got.shape[-1] % 12 == 0 else got[..., :1, :1]
    torch.testing.assert_close(below, cells[..., : below.shape[-2], : below.shape[-1]], atol=0.03, rtol=0)

    picture, net = coordinates(16, 24), Twice()
    enlarge = mf.Upscale(net, size)
    planned = mf.plan(enlarge, TOY, start=pixels(picture).spec)
    got = run(enlarge, pixels(picture))
    assert tuple(got.shape[-2:]) == (size or (32, 48))
    assert len(net.counted) == calls and planned.work.flops == 7 * sum(net.counted)


def test_what_a_lift_cannot_take_is_said() -> None:
    start = mf.Latents(1, 8, 12, SPACE)
    with pytest.raises(PlanError, match=rf"Twice knows latents of 'flux1', and these are of '{SPACE.name}'"):
        mf.plan(mf.Lift(upscaler=Twice(space="flux1")), TOY, start=start)
    with pytest.raises(PlanError, match=r"Twice enlarges latents of 16 channels; toy's have 3"):
        mf.plan(mf.Lift(upscaler=Twice(says=16)), TOY, start=start)
    assert mf.plan(mf.Lift(upscaler=Twice(says=3)), TOY, start=start).out == mf.Latents(1, 16, 24, SPACE)
    with pytest.raises(PlanError, match=r"latents hold noise \(sigma 0.2\), and Lift takes clean ones: put Refine"):
        mf.plan(mf.Lift(), TOY, start=replace(start, sigma=0.2))
    with pytest.raises(PlanError, match="an upscaler of scale 1 cannot reach 16x24"):
        mf.plan(mf.Lift((32, 48), upscaler=Twice(1)), TOY, start=start)
    for smaller in ((8, 48), (32, 12)):  # one side alone
        with pytest.raises(PlanError, match=rf"^(stage .*: )?{smaller[0]}x{smaller[1]} is smaller than what comes in"):
            mf.plan(mf.Lift(smaller), TOY, start=start)


@pytest.mark.parametrize(
    ("tiles", "beside", "words"),
    [
        (mf.Tiles(4, 2), {"cache": mf.caches.TaylorSeer(2)}, "a cache remembers .* leave out the cache or tiles"),
        (mf.Tiles(4, 2), {"policy": mf.PiFlow("a.pt")}, "a policy is followed .* leave out the policy or tiles"),
        (4, {}, r"tiles takes Tiles\(size, overlap\), got 4"),
    ],
)
def test_what_cannot_be_beside_tiles_is_said(tiles: object, beside: dict[str, Any], words: str) -> None:
    with pytest.raises(PlanError, match=f"^{words}$"):
        check_tiles(tiles, mf.toy(positions=True).info, **{"cache": None, "policy": None} | beside)


def test_a_model_without_a_network_of_its_own_needs_one_named() -> None:
    class Bare(Wrapper):
        upscaler = None  # type: ignore[assignment]

    model, pixels = Bare(mf.toy()), torch.rand(1, 3, 16, 16)
    with pytest.raises(
        PlanError, match=r"was loaded without a super-resolution net; name one, such as Upscale\(Lanczos"
    ):
        mf.run(mf.Upscale(), model, "a", start=pixels)
    assert mf.run(mf.Upscale(mf.Lanczos(2)), model, "a", start=pixels).data.shape == (1, 3, 32, 32)


@FEW
@given(*(st.integers(1, 12) for _ in range(4)), st.sampled_from([1, 2, 4, 16]))
def test_the_size_that_is_offered_keeps_the_aspect_and_is_none_too_small(
    h: int, w: int, more: int, wide: int, multiple: int
) -> None:
    low, high = (h * multiple, w * multiple), ((h + more) * multiple, (w + wide) * multiple)
    near = nearest_rise(low, high, multiple)
    rows = range(low[0], 200 * multiple, multiple)
    fits = [(a, a * w // h) for a in rows if a * w % (h * multiple) == 0]
    assert near in fits
    # The two sides may pull apart: as near on the average of both ratios as any other that fits.
    off = {size: abs(size[0] / low[0] - (high[0] / low[0] + high[1] / low[1]) / 2) for size in fits}
    assert off[near] <= min(off.values()) + 1e-9


# Decode


@dataclass(frozen=True)
class Tiny(Decoder):
    """The first three channels, `makes` pixels a cell, beyond [0, 1] at both ends."""

    space: str = SPACE.name
    makes: int = 4

    @property
    def scale(self) -> int:
        return 4

    @property
    def flops_per_pixel(self) -> float:
        return 11.0

    def __call__(self, x: Tensor) -> Tensor:
        return 3 * x.repeat_interleave(self.makes, -2).repeat_interleave(self.makes, -1) - 1


def test_another_decoder_makes_its_own_size_at_its_own_cost_within_bounds() -> None:
    given_ = latents(coordinates(8, 12))
    planned = mf.plan(mf.Decode(Tiny()), TOY, start=given_.spec)
    assert planned.out == mf.Pixels(2, 32, 48) and planned.work.flops == 11 * 2 * 32 * 48
    got = run(mf.Decode(Tiny()), given_)
    assert torch.equal(got[..., ::4, ::4], (3 * given_.data - 1).clamp(0, 1)) and {0.0, 1.0} <= {*got.unique().tolist()}
    with pytest.raises(PromiseError, match=r"Tiny says scale 4, so it must make \(2, 3, 32, 48\) of \(2, 3, 8, 12\)"):
        run(mf.Decode(Tiny(makes=2)), given_)
    with pytest.raises(PlanError, match=rf"Tiny knows latents of 'flux1', and these are of '{SPACE.name}'"):
        mf.plan(mf.Decode(Tiny(space="flux1")), TOY, start=given_.spec)
    with pytest.raises(PlanError, match=r"latents still hold noise \(sigma 0.2\); put Refine\(\) before Decode\(\)"):
        mf.plan(mf.Decode(), TOY, start=replace(given_.spec, sigma=0.2))
    with pytest.raises(
        PlanError, match=rf"latents are of flux1, the model toy works in {SPACE.name}; decode them with"
    ):
        mf.plan(mf.Decode(), TOY, start=mf.Latents(1, 8, 8, mf.FLUX.space))
    priced = replace(TOY, decode=(5.0, 0.5))
    assert mf.plan(mf.Decode(), priced, start=given_.spec).work.flops == 2 * (5 * 16 * 24 + 0.5 * (16 * 24) ** 2)


# Truth

SCENE = "a big red circle at the centre"


def true(prompts: list[str], seeds: list[int], *, size: int = 32, look: str = "", device: str = "cpu") -> Tensor:
    """What the stage renders, as a chain would ask it."""
    context: Any = SimpleNamespace(prompts=prompts, seeds=seeds, model=SimpleNamespace(device=torch.device(device)))
    spec = mf.Start(len(prompts))
    return Truth(size, size, look).apply(
        mf.State(spec, torch.empty(spec.shape)), mf.Pixels(len(prompts), size, size), context
    )


def test_the_truth_is_the_caption_with_what_it_leaves_open_drawn_from_the_seed() -> None:
    both = true([SCENE, "a big blue circle at the centre"], [1, 2])
    assert both.dtype == torch.float32 and both.shape == (2, 3, 32, 32)
    red, blue = both[:, :, 16, 16]
    assert red[0] > 0.5 > red[2] and blue[2] > 0.5 > blue[0]  # channels of the middle, in this order
    levels = both * 255
    torch.testing.assert_close(levels, levels.round(), atol=1e-4, rtol=0)
    assert float(both.max()) > 0.6
    assert torch.equal(true([SCENE], [1]), both[:1]) and torch.equal(true([SCENE], [1]), true([SCENE], [1]))
    assert not torch.equal(true([SCENE], [3]), both[:1])
    assert not torch.equal(true([SCENE], [1], look="dusk"), both[:1])
    assert true([SCENE], [1], device="meta").device.type == "meta"
    with pytest.raises(ValueError, match="shorter"):
        true([SCENE, SCENE], [1])


def test_scenes_that_there_are_none_of_are_refused() -> None:
    pocket = replace(TOY, space=replace(SPACE, name="pocket"))
    assert mf.plan(Truth(32, 32), pocket, batch=2).out == mf.Pixels(2, 32, 32)
    for stage, model, words in (
        (Truth(32, 32), TOY, "only captions of the embedded model have a true scene, not those of toy"),
        (Truth(32, 48), pocket, "scenes are square, got 32x48"),
        (Truth(0, 0), pocket, "scenes are square, got 0x0"),
        (Truth(32, 32, "dawn"), pocket, "no look is called 'dawn'; there are dusk, shapes, runes"),
    ):
        with pytest.raises(PlanError, match=re.escape(words)):
            mf.plan(stage, model)


# What all that integrate share


@dataclass(frozen=True)
class BySize(mf.Sample):
    """Its guidance depends on the latents that it is for."""

    scope: ClassVar[str] = "Sample"

    def guidance_for(self, out: mf.Latents, model: ModelInfo) -> Guidance:
        assert (out.height, out.width, model.name) == (16, 24, "toy")
        return mf.CFG(float(out.height))


def test_guidance_may_depend_on_the_size() -> None:
    like = mf.Sample(32, 48, mf.Linear(2), guidance=mf.CFG(16.0))
    start = mf.State(mf.Start(1), torch.empty(1, 0))
    assert torch.equal(run(BySize(32, 48, mf.Linear(2)), start), run(like, start))


def test_a_policy_leaves_no_room_for_anything_else() -> None:
    policy, cached = mf.PiFlow("folder"), mf.caches.TaylorSeer(2)
    check_policy(policy, mf.Euler(), None, None)
    check_policy(policy, mf.Euler(), mf.Distilled(), None)
    check_policy(None, mf.Heun(), mf.CFG(2.0), cached)
    for given_, words in (
        (("folder", mf.Euler(), None, None), "policy takes PiFlow(path), got 'folder'"),
        ((policy, mf.Heun(), None, None), "a policy is followed by small Euler steps; leave out solver=Heun("),
        ((policy, mf.Euler(), mf.CFG(2.0), None), "asked once; leave out guidance=CFG("),
        ((policy, mf.Euler(), None, cached), "asks the network too seldom for a cache to leave anything out"),
    ):
        with pytest.raises(PlanError, match=re.escape(words)):
            check_policy(*given_)  # type: ignore[arg-type]


def test_a_solver_that_chooses_its_sigmas_leaves_no_room_for_a_cache() -> None:
    able = replace(TOY, capabilities=mf.model_info.EVERYTHING)
    stage = mf.Sample(32, 32, solver=mf.BogackiShampine(), cache=mf.caches.TaylorSeer(2))
    words = r"BogackiShampine\(.*\) chooses its sigmas while it runs, and TaylorSeer\(.*\) must know them before"
    with pytest.raises(PlanError, match=words):
        mf.plan(stage, able)


SIDES: dict[str, Any] = {
    "Lift": lambda size: mf.plan(mf.Sample(16, 16) >> mf.Lift(size), TOY).out,
    "Upscale": lambda size: mf.plan(mf.Sample(16, 16) >> mf.Decode() >> mf.Upscale(mf.Lanczos(2), size), TOY).out,
    "recipe": lambda size: mf.plan(mf.recipes.native(size=size, steps=2), TOY).out,
    "optimise": lambda size: mf.schedules.optimise(mf.toy(), 2, ["a"], size=size, fine=4),
    "controls": lambda size: str(mf.plan(mf.sweep.controls(TOY, low=(16, 16), size=size)["1 forward"], TOY).out),
    "law": lambda size: mf.testing.check_backbone(mf.toy(), size=size),
    "calibrate": lambda size: mf.caches.TeaCache.calibrate(
        0.1, mf.load("pocket", device="cpu"), ["a"], size=size, schedule=mf.Shifted(8), degree=1
    ),
}


@pytest.mark.parametrize("where", SIDES)
def test_one_number_is_a_square_wherever_a_size_is_taken(where: str) -> None:
    """And what is no size is refused by name."""
    assert SIDES[where](64) == SIDES[where]((64, 64)) == SIDES[where]([64, 64])
    for wrong in ("64", (64,), (64, 64.5), True, 0):
        with pytest.raises(
            PlanError, match=r"^size must be \(height, width\) in pixels, or one number for a square, got "
        ):
            SIDES[where](wrong)

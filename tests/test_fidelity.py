"""The fit finds what a caption leaves open; each score has its optimum at the truth and moves with its own fault."""

import math
import random
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal, cast

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from mrflow.backbone import Backbone
from mrflow.errors import NonFiniteError, PlanError
from mrflow.scenes import (
    FULL,
    CaptionError,
    Scene,
    fidelity,
    law_distance,
    parse_caption,
    render,
    sample_scene,
)
from mrflow.scenes.fidelity import _displacement, _spectrum  # pyright: ignore[reportPrivateUsage]
from mrflow.scenes.fit import Adjustable, Edge, FreePart, Slot, Values, fit
from mrflow.scenes.letters import Array
from mrflow.scenes.parameters import OpenScene
from mrflow.sweep import metrics
from mrflow.sweep.aims import BUILT_IN, NONE, Scale, scale_for
from mrflow.sweep.metrics import Fidelity, Measured, Metric, scales_of

N = 256
STAR = "a big red star at the left"
SQUARE = "a big blue square at the centre"
WORD = "the small brown word QUEST"
FACE = "a small sad face at the left on coarse dots"
PICTURES = (
    STAR,
    "a purple ring above a blue cross on coarse checks",
    "four black triangles on medium dots",
    WORD,
    FACE,
)
pictures = pytest.mark.parametrize("caption", PICTURES)


def pixels(scene: Scene, size: int = N) -> Array:
    return render(scene, size).transpose(2, 0, 1).astype(np.float32) / np.float32(255)


def filtered(picture: NDArray[np.floating], gain: NDArray[np.floating]) -> Array:
    """Multiplied by a gain at every spatial frequency."""
    return np.fft.ifft2(np.fft.fft2(picture) * gain).real.astype(np.float32)


def frequency(size: int = N) -> NDArray[np.float64]:
    out: NDArray[np.float64] = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.fftfreq(size)[None])
    return out


def blurred(picture: Array, sigma: float) -> Array:
    return filtered(picture, np.exp(-2 * (math.pi * sigma * frequency(picture.shape[1])) ** 2))


def grown(scene: Scene, more: float) -> Scene:
    """Objects and faces with a radius of `more` pixels more."""
    objects = tuple(replace(o, radius=o.radius + more / N) for o in scene.objects)
    return replace(scene, objects=objects, faces=tuple(replace(f, radius=f.radius + more / N) for f in scene.faces))


def unmoved(found: dict[str, float], *, but: tuple[str, ...] = ()) -> None:
    """Everything is at its optimum, except names that begin with one of `but`."""
    limits = {
        "psnr": (50, 60), "boundary_iou": (0.97, 1), "edge": (0, 0.06), "corner": (0.92, 1.05), "glyph": (0.97, 1.03),
        "expression": (0.97, 1.03), "glyph.right": (1, 1), "expression.right": (1, 1), "spectrum.1": (0, 0.02),
        "spectrum.2": (0, 0.08), "spectrum.3": (0, 0.15), "spectrum.4": (0, 0.2),
    }  # fmt: skip
    for name, value in found.items():
        if not name.startswith(("rank", *but)):
            low, high = limits[name]
            assert low <= value <= high, (name, value)


@settings(max_examples=12)
@given(seed=st.integers(0, 2**32 - 1), size=st.sampled_from((128, 192, 256)))
def test_the_fit_finds_tint_and_jitter_of_true_pictures(seed: int, size: int) -> None:
    scene = sample_scene(FULL, random.Random(seed))
    image = pixels(scene, size).transpose(1, 2, 0)
    found, true = fit(image, OpenScene.of(scene.caption, image)).parts, OpenScene(scene).parts
    assert np.abs(np.subtract(found[0].values, true[0].values)).max() < 1.5 / 255
    for part, wanted in zip(found[1:], true[1:], strict=True):
        assert np.abs(np.subtract(part.values, wanted.values)).max() < 0.3 / size


@settings(max_examples=12)
@given(seed=st.integers(0, 2**32 - 1))
def test_true_pictures_are_at_every_optimum(seed: int) -> None:
    scene = sample_scene(FULL, random.Random(seed))
    found = fidelity(pixels(scene), scene.caption)
    unmoved(found, but=("psnr", "boundary_iou", "edge", "spectrum"))
    # The renderer draws on a grid of quarters of a pixel, so the nearest that the fit tries differs a little.
    assert found["psnr"] > 42 and found["boundary_iou"] > 0.92 and found["edge"] < 0.1
    assert [found[f"spectrum.{i}"] < limit for i, limit in enumerate((0.02, 0.2, 0.4, 0.7), 1)] == [True] * 4
    assert all(0 <= found[f"rank.{name}"] <= 1 for name in ("tint", "cast", "place"))
    assert ("glyph" in found) == (scene.kind == "word") and ("expression" in found) == (scene.kind == "face")


def test_ranks_of_true_pictures_are_uniform_and_those_of_a_collapsed_model_are_not() -> None:
    rng, ranks = random.Random(3), dict[str, list[float]]()
    for _ in range(150):
        for name, value in OpenScene(sample_scene(FULL, rng)).ranks.items():
            ranks.setdefault(name, []).append(value)
    assert all(law_distance(values) < 0.06 for values in ranks.values())
    assert all(law_distance([value] * 150) >= 0.25 for value in (0.0, 0.3, 0.5, 1.0))


def test_the_distance_from_the_law_is_the_area_between_the_distributions() -> None:
    middles = (np.arange(1000) + 0.5) / 1000
    assert law_distance(middles) == pytest.approx(0, abs=1e-3)
    assert law_distance(0.25 + middles / 2) == pytest.approx(0.125, abs=1e-3)  # half as wide
    assert law_distance([0.5] * 7) == pytest.approx(0.25) and law_distance([1.0]) == pytest.approx(0.5)
    rng = np.random.default_rng(0)
    assert np.mean([law_distance(rng.random(100)) for _ in range(200)]) == pytest.approx(0.0313, abs=0.003)


@pytest.mark.parametrize(("right", "down"), [(2, 0), (0, -2), (-1, 2)])
def test_a_shift_that_the_caption_leaves_open_moves_the_place_alone(right: int, down: int) -> None:
    picture = np.roll(pixels(parse_caption(STAR)), (down, right), (1, 2))
    unmoved(fidelity(picture, STAR))
    image = picture.transpose(1, 2, 0)
    x, y = fit(image, OpenScene.of(STAR, image)).parts[1].values
    assert (x - 0.25) * N == pytest.approx(right, abs=0.15) and (y - 0.5) * N == pytest.approx(down, abs=0.15)


def test_a_shift_that_the_caption_does_not_leave_open_displaces_edges() -> None:
    """Words are centred: two pixels to the right displace an upright stroke by 2 and a level one by 0."""
    picture = np.roll(pixels(parse_caption("the big blue word HHI")), 2, 2)
    found = fidelity(picture, "the big blue word HHI")
    assert 1.4 < found["edge"] < 2
    assert found["boundary_iou"] < 0.4 and found["psnr"] < 25


@pytest.mark.parametrize("more", [-2.0, -1.0, 1.0, 2.0])
@pytest.mark.parametrize(
    ("caption", "per_radius", "width"),  # of the outline's move by the radius; of the boundary, across, over 2 pixels
    [
        ("a big green circle at the centre on fine stripes", 1.0, 4 / math.pi),
        (SQUARE, 0.87, 1.0),
        ("a big red diamond at the top", 0.7 / math.hypot(1, 0.7), 1.7 / math.hypot(1, 0.7)),
    ],
)
def test_a_thing_of_another_size_displaces_its_edges_by_as_many_pixels(
    caption: str, per_radius: float, width: float, more: float
) -> None:
    found = fidelity(pixels(grown(parse_caption(caption), more)), caption)
    apart = abs(more) * per_radius
    assert found["edge"] == pytest.approx(apart, rel=0.1)
    assert found["boundary_iou"] == pytest.approx((2 * width - apart) / (2 * width + apart), abs=0.09)
    assert found["rank.cast"] < 0.02  # the tint is grey as drawn


@pictures
def test_a_blur_takes_each_band_s_known_part_and_little_else(caption: str) -> None:
    found = fidelity(blurred(pixels(parse_caption(caption)), 1.0), caption)
    unmoved(found, but=("psnr", "boundary_iou", "edge", "corner", "glyph", "expression", "spectrum"))
    for band in (2, 3, 4):
        low, high = (1 - math.exp(-2 * (math.pi * f / 8) ** 2) for f in (band - 1, band))
        assert low - 0.02 <= found[f"spectrum.{band}"] <= high + 0.02
    assert found["edge"] < 0.25 and found["boundary_iou"] > 0.8
    assert found.get("corner", 0.3) < 0.5 and found.get("glyph", 0.7) > 0.6 and found.get("expression", 0.7) > 0.6
    assert found["psnr"] < 40


@pictures
def test_ringing_overshoots_at_corners_and_in_fine_bands(caption: str) -> None:
    picture = pixels(parse_caption(caption))
    found = fidelity(np.clip(2 * picture - blurred(picture, 1.5), 0, 1), caption)
    assert found["spectrum.1"] < 0.2 and min(found["spectrum.2"], found["spectrum.3"], found["spectrum.4"]) > 0.35
    assert found.get("corner", 2) > 1.3 and found["edge"] < 0.15


@pytest.mark.parametrize("caption", [PICTURES[1], WORD, FACE])
@pytest.mark.parametrize("band", [2, 4])
def test_noise_in_a_band_shows_in_that_band_by_its_power(caption: str, band: int) -> None:
    picture, ring = pixels(parse_caption(caption)), frequency() * 8
    noise = filtered(np.random.default_rng(0).standard_normal((N, N)), ((ring >= band - 1) & (ring < band)) * 1.0)
    noise *= 0.01 / noise.std()
    found = fidelity(0.03 + 0.94 * picture + noise, caption)  # away from 0 and 1, where noise would be cut
    quiet = fidelity(0.03 + 0.94 * picture, caption)
    luma = np.tensordot([0.299, 0.587, 0.114], picture, 1)
    power = np.square(np.abs(np.fft.fft2(luma)))[(ring >= band - 1) & (ring < band) & (ring > 0)].sum()
    known = 0.01 * N * N / math.sqrt(power)
    assert math.hypot(known, quiet[f"spectrum.{band}"]) == pytest.approx(found[f"spectrum.{band}"], rel=0.1)
    for other in {1, 2, 3, 4} - {band}:
        assert found[f"spectrum.{other}"] == pytest.approx(quiet[f"spectrum.{other}"], abs=0.05)
    for name in ("boundary_iou", "edge", "corner", "glyph", "expression"):
        assert found.get(name, 0) == pytest.approx(quiet.get(name, 0), abs=0.05)


@pictures
def test_another_tint_moves_its_ranks_alone(caption: str) -> None:
    scene = parse_caption(caption)
    tints = ((0.80, 0.95, 0.95), (0.99, 0.99, 0.99), (0.83, 0.83, 0.83))
    scenes = [replace(scene, background=replace(scene.background, tint=tint)) for tint in tints]
    cyan, light, dark = (fidelity(pixels(s), caption) for s in scenes)
    for found in (cyan, light, dark):
        unmoved(found)
    assert cyan["rank.cast"] > 0.98 and light["rank.cast"] < 0.02
    assert light["rank.tint"] > 0.95 and dark["rank.tint"] < 0.05


def test_a_cut_corner_lowers_the_corners_and_little_else() -> None:
    """Each of a square's four tips is overpainted by the ground, 1 x 1 to 3 x 3 pixels in a picture of 256."""
    kept = [1.0]
    for cut in (1, 2, 3):
        picture, corners = pixels(parse_caption(SQUARE)), OpenScene(parse_caption(SQUARE)).corners
        for x, y in corners:
            column, row = (math.floor(v * N) if v < 0.5 else math.ceil(v * N) - cut for v in (x, y))
            picture[:, row : row + cut, column : column + cut] = picture[:, :1, :1]
        found = fidelity(picture, SQUARE)
        unmoved(found, but=("corner", "psnr", "spectrum", "boundary_iou", "edge"))
        assert found["edge"] < 8 * cut**2 / (8 * 0.87 * 0.21 * N) + 0.03  # each tip's sides, over the perimeter
        assert found["boundary_iou"] > 0.9
        kept.append(found["corner"])
    assert all(more - less > 0.15 for more, less in pairwise(kept))


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 0.75, 1.0])
def test_a_symbol_on_its_way_to_another_has_that_margin(share: float) -> None:
    """O and Q, happy and surprised: 1 - 2 share, until another wrong symbol is nearer."""

    def mixed(a: str, b: str) -> dict[str, float]:
        return fidelity((1 - share) * pixels(parse_caption(a)) + share * pixels(parse_caption(b)), a)

    word = mixed("the big blue word QQQ", "the big blue word QQO")
    assert word["glyph"] == pytest.approx(1 - 2 * share / 3, abs=0.04)
    assert word["glyph.right"] == pytest.approx(1.0 if share < 0.5 else 2 / 3) or share == 0.5
    face = mixed("a big happy face at the centre", "a big sad face at the centre")
    assert face["expression"] == pytest.approx(1 - 2 * share, abs=0.08)
    assert face["expression.right"] == (share < 0.5) or share == 0.5


@pytest.mark.parametrize("size", ["small", "medium", "big"])
def test_outlines_of_words_are_where_their_paint_ends(size: str) -> None:
    scene = parse_caption(f"the {size} red word HIE")
    painted = (render(scene, 512) != render(replace(scene, words=()), 512)).any(-1).nonzero()[0]
    left, top, right, bottom = OpenScene(scene).edges[0].box
    assert (top, bottom) == pytest.approx((painted.min() / 512, (painted.max() + 1) / 512), abs=0.002)
    assert (left, right) == pytest.approx((0.5 - 1.5 * scene.words[0].advance, 0.5 + 1.5 * scene.words[0].advance))


@pytest.mark.parametrize(("size", "width"), [("small", 0.026), ("medium", 0.04), ("big", 0.055)])
def test_strokes_are_a_fifth_of_a_letter_or_of_its_room(size: str, width: float) -> None:
    scene = parse_caption(f"the {size} red word I")
    row = (render(scene, 1024) != render(replace(scene, words=()), 1024)).any(-1)[512 + 16]
    assert row.sum() / 1024 == pytest.approx(width, abs=0.003)


def test_pictures_that_cannot_be_scored_are_refused() -> None:
    star = pixels(parse_caption(STAR), 64)
    with pytest.raises(CaptionError):
        fidelity(star, "a lighthouse")
    with pytest.raises(PlanError):
        fidelity(star[:, :63, :63], STAR)
    with pytest.raises(NonFiniteError):
        fidelity(np.full((3, 64, 64), np.nan, np.float32), STAR)


@pytest.mark.parametrize("level", [0.0, 0.93])
def test_a_picture_without_the_thing_is_far_off_and_still_scored(level: float) -> None:
    found = fidelity(np.full((3, 128, 128), level, np.float32), STAR)
    assert found["psnr"] < 20 and found["boundary_iou"] == 0 and found["edge"] == pytest.approx(4)
    assert abs(found["corner"]) < 0.3 and all(math.isfinite(value) for value in found.values())


def test_an_edge_is_matched_by_one_of_its_own_direction() -> None:
    """A step up at 10.5 against one at 13, and against a step down there."""
    true, moved = (np.clip(np.arange(24, dtype=np.float32) - at, 0, 1)[None].repeat(24, 0) for at in (10, 12.5))
    assert _displacement([(moved, true)]) == pytest.approx(2.5, abs=1e-5)
    assert _displacement([(1 - moved, true)]) == pytest.approx(4)


def test_bands_of_the_error_are_those_of_the_whole_transform() -> None:
    rng = np.random.default_rng(0)
    image, true = (np.repeat(rng.random((32, 32, 1), np.float32), 3, 2) for _ in range(2))
    ring = np.floor(frequency(32) * 8).astype(int)
    ring[0, 0] = 9
    error, whole = (np.square(np.abs(np.fft.fft2(p[..., 0]))) for p in (image - true, true))
    want = [math.sqrt(error[ring == i].sum() / whole[ring == i].sum()) for i in range(4)]
    assert _spectrum(image, true) == pytest.approx(want, rel=1e-3)


@dataclass(frozen=True)
class Disc:
    """A disc of an unnamed colour anywhere on stripes of a random phase: a world that the fit has never seen."""

    colour: tuple[float, ...] = (0.5, 0.5, 0.5)
    place: tuple[float, ...] = (0.5, 0.5)
    ground_: tuple[float, ...] = (0.9, 0.9, 0.9, 0.0)
    bare: bool = False
    corners: tuple[tuple[float, float], ...] = ()
    slots: tuple[Slot, ...] = ()

    @property
    def parts(self) -> list[FreePart]:
        free = ((0.0, 1.0),) * 3
        ground = FreePart(
            (0.0, 0.0, 1.0, 1.0), self.ground_, ("paint", "paint", "paint", "place"), (*free, (-1.0, 1.0))
        )
        bounds = ((0.3, 0.7), (0.3, 0.7), *free)
        kinds: tuple[Literal["place", "paint"], ...] = ("place", "place", "paint", "paint", "paint")
        return [ground, FreePart((0.1, 0.1, 0.9, 0.9), self.place + self.colour, kinds, bounds)]

    @property
    def edges(self) -> list[Edge]:
        red, green, blue = self.colour
        return [Edge((0.1, 0.1, 0.9, 0.9), (red, green, blue))]

    @property
    def alphabets(self) -> dict[str, str]:
        return {}

    @property
    def ranks(self) -> dict[str, float]:
        return {}

    def with_values(self, values: Values) -> "Disc":
        return replace(self, ground_=values[0], place=values[1][:2], colour=values[1][2:])

    def with_symbol(self, alphabet: str, symbol: str) -> "Disc":
        raise AssertionError((alphabet, symbol))

    def ground(self) -> "Disc":
        return replace(self, bare=True)

    def draw(self, side: int) -> NDArray[np.uint8]:
        at = (np.arange(4 * side) + 0.5) / (4 * side)
        stripe = ((at + self.ground_[3]) * 8) % 1 < 0.5
        picture = np.where(stripe[None, :, None], self.ground_[:3], 0.76 * np.array(self.ground_[:3]))
        picture = np.repeat(picture, len(at), 0)
        x, y = self.place
        if not self.bare:
            picture[(at[None] - x) ** 2 + (at[:, None] - y) ** 2 < 0.04] = self.colour
        small = picture.reshape(side, 4, side, 4, 3).mean((1, 3))
        octets: NDArray[np.uint8] = np.round(255 * np.clip(small, 0, 1)).astype(np.uint8)
        return octets


def test_colours_places_and_phases_of_another_world_are_fitted() -> None:
    true = Disc((0.2, 0.6, 0.3), (0.53, 0.46), (0.95, 0.9, 0.85, 0.02))
    image = true.draw(128).astype(np.float32) / np.float32(255)
    start: Adjustable = Disc()
    found = fit(image, start)
    assert isinstance(found, Disc)
    assert found.place == pytest.approx(true.place, abs=0.5 / 128)
    assert found.colour == pytest.approx(true.colour, abs=0.01)
    assert found.ground_ == pytest.approx(true.ground_, abs=0.01)


def test_as_a_metric_of_a_sweep() -> None:
    picture = torch.from_numpy(pixels(parse_caption(WORD), 64))
    made = Measured(picture, WORD, 0, {}, cast("Backbone", None))
    found = Fidelity()(made)
    assert found == {f"fit.{name}": value for name, value in fidelity(picture, WORD).items()}
    assert Fidelity()(replace(made, prompt="a lighthouse")) == Fidelity()(replace(made, pixels=picture[:, :63])) == {}
    scales = {name: scale_for(name, scales_of([Fidelity()])) for name in found}
    assert NONE not in scales.values()
    assert scales["fit.spectrum.3"].aim == "lower" and scales["fit.glyph.right"] == Scale("higher", 0, 1)
    assert scales["fit.rank.cast"].aim == "uniform"
    kinds = [k for k in vars(metrics).values() if isinstance(k, type) and issubclass(k, Metric)]
    assert {name: which for kind in kinds for name, which in kind.aims.items()} == BUILT_IN
    assert scale_for("fit", BUILT_IN) == NONE and scale_for("lpips", BUILT_IN).aim == "lower"
    assert scale_for("mine.part", {"mine": Scale("one")}) == Scale("one")


def test_an_open_scene_takes_the_tint_that_it_is_given() -> None:
    scene = OpenScene(parse_caption("a big red circle at the left"))
    (_, place) = scene.parts
    moved = scene.with_values(((0.9, 0.8, 0.7), place.values))
    assert moved.scene.background.tint == (0.9, 0.8, 0.7) and moved.parts[0].values == (0.9, 0.8, 0.7)

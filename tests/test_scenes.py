"""The grammar reads what it writes, the renderer obeys the antialias law, the scorer tells right from wrong."""

import random
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from experiments.train_pocket.data import POCKET_1
from mrflow.errors import NonFiniteError, PlanError
from mrflow.scenes import (
    CATEGORIES,
    FULL,
    CaptionError,
    World,
    parse_caption,
    read_facts,
    render,
    sample_scene,
    score,
    score_facts,
    stray,
)
from mrflow.scenes.grammar import (
    COLOURS,
    LETTER_ADVANCE,
    LETTER_HEIGHT,
    SHAPES,
    article,
    held_out,
    held_out_captions,
    plural,
)
from mrflow.scenes.reading import find_tint
from tests.scene_scores import chance, score_many

Array = NDArray[np.float32]
WORLDS = pytest.mark.parametrize("world", [FULL, POCKET_1], ids=["full", "pocket-1"])
seeds = st.integers(0, 2**32 - 1)


def pixels(drawn: NDArray[np.uint8]) -> Array:
    return drawn.transpose(2, 0, 1).astype(np.float32) / np.float32(255)


def blurred(drawn: Array) -> Array:
    """By the binomial (1, 4, 6, 4, 1) / 16 both ways: a standard deviation of one pixel."""
    row = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0]) / 16
    kernel = (row[:, None] * row).expand(3, 1, 5, 5)
    padded = F.pad(torch.tensor(drawn), (2, 2, 2, 2), mode="replicate")
    return np.asarray(F.conv2d(padded, kernel, groups=3).numpy(), np.float32)


def picture(caption: str, *, size: int = 128) -> Array:
    return pixels(render(parse_caption(caption), size))


@cache
def examples(world: World, *, count: int = 120) -> tuple[Array, list[str]]:
    rng = random.Random(7)
    scenes = [sample_scene(world, rng) for _ in range(count)]
    return np.stack([pixels(render(scene, 128)) for scene in scenes]), [scene.caption for scene in scenes]


# -- grammar


@WORLDS
@settings(max_examples=100, deadline=None)
@given(seed=seeds)
def test_a_caption_says_all_facts_but_jitter_and_tint(world: World, seed: int) -> None:
    drawn = sample_scene(world, random.Random(seed))
    said = parse_caption(drawn.caption)
    assert said.kind == drawn.kind
    assert replace(said.background, tint=drawn.background.tint) == drawn.background
    assert [replace(o, x=0, y=0) for o in said.objects] == [replace(o, x=0, y=0) for o in drawn.objects]
    assert [replace(f, x=0, y=0) for f in said.faces] == [replace(f, x=0, y=0) for f in drawn.faces]
    assert [replace(w, y=0) for w in said.words] == [replace(w, y=0) for w in drawn.words]
    for a, b in zip(said.objects, drawn.objects, strict=True):
        assert max(abs(a.x - b.x), abs(a.y - b.y)) <= world.jitter + 1e-9
    for c, d in zip(said.faces, drawn.faces, strict=True):
        assert max(abs(c.x - d.x), abs(c.y - d.y)) <= world.jitter + 1e-9


@WORLDS
@settings(max_examples=50, deadline=None)
@given(seed=seeds)
def test_sampling_depends_on_the_seed_alone_and_stays_in_its_world(world: World, seed: int) -> None:
    scene = sample_scene(world, random.Random(seed))
    assert scene == sample_scene(world, random.Random(seed))
    assert {o.shape for o in scene.objects} <= set(world.shapes)
    assert {o.colour for o in scene.objects} <= set(world.colours)
    assert all(set(word.text) <= set(world.letters) for word in scene.words)
    assert len(scene.objects) <= world.max_count


@pytest.mark.parametrize(
    ("caption", "message"),
    [
        ("", "caption '': word 1 should be 'a', 'the' or a number, not the end"),
        ("a huge red circle at the left", "word 2 should be a size or a colour, not 'huge'"),
        ("a big mauve circle at the left", "word 3 should be a colour, not 'mauve'"),
        ("a red circle beside a blue square", "word 4 should be a relation, not 'beside'"),
        ("three red circle", "word 3 should be shapes, not 'circle'"),
        ("the big red word hello", "word 5 should be one to five capitals, not 'hello'"),
        ("a big happy face at the centre on a beach", "word 9 should be a density, not 'a'"),
        ("two red circles please", "word 4 should be the end, not 'please'"),
    ],
)
def test_errors_name_the_word_where_reading_stopped(caption: str, message: str) -> None:
    with pytest.raises(CaptionError) as caught:
        parse_caption(caption)
    assert message in str(caught.value)


def test_small_words() -> None:
    assert (article("orange"), article("red")) == ("an", "a")
    assert (plural("cross"), plural("star")) == ("crosses", "stars")


def test_two_nearly_equal_tints_are_one_ground() -> None:
    """An eighth of what a texture takes away from a light ground is none: the tint is the median of all."""
    picture = np.full((48, 48, 3), 0.784, np.float32)
    picture[:, ::3] = 0.8
    assert find_tint(picture) == pytest.approx([0.784] * 3)


# -- renderer


@WORLDS
def test_half_the_resolution_is_the_box_filtered_whole(world: World) -> None:
    rng = random.Random(1)
    for scene in (sample_scene(world, rng) for _ in range(30)):
        small = pixels(render(scene, 128))
        large = pixels(render(scene, 256)).reshape(3, 128, 2, 128, 2).mean((2, 4))
        # Only edges may differ: PIL rounds outlines and stroke widths to oversampled pixels.
        assert np.abs(small - large).mean() < 0.012, scene.caption
        assert np.quantile(np.abs(small - large), 0.9) < 0.05, scene.caption


def test_rendering_is_deterministic() -> None:
    scene = sample_scene(FULL, random.Random(5))
    assert render(scene, 96).shape == (96, 96, 3)
    assert (render(scene, 96) == render(scene, 96)).all()


# -- scorer


@WORLDS
def test_true_pictures_score_near_one_and_wrong_captions_near_chance(world: World) -> None:
    drawn, captions = examples(world)
    true, wrong = score_many(drawn, captions), chance(drawn, captions)
    assert tuple(true) == (*CATEGORIES, "overall")
    assert all(value >= 0.97 for value in true.values()), true
    assert all(value <= 0.5 for value in wrong.values()), wrong
    assert wrong["overall"] < 0.3, wrong


@pytest.mark.parametrize("fault", ["noise", "blur", "colour", "moved"])
def test_slightly_bad_pictures_are_still_read(fault: str) -> None:
    drawn, captions = examples(POCKET_1)
    rng = np.random.default_rng(0)
    if fault == "noise":
        bad: NDArray[np.floating] = drawn + 0.03 * rng.standard_normal(drawn.shape)
    elif fault == "blur":
        bad = blurred(drawn)
    elif fault == "colour":
        bad = drawn * rng.uniform(0.88, 1.12, (len(drawn), 3, 1, 1)) + rng.uniform(-0.04, 0.04, (len(drawn), 3, 1, 1))
    else:
        bad = np.pad(drawn, ((0, 0), (0, 0), (3, 0), (2, 0)), mode="edge")[:, :, :128, :128]
    scores = score_many(np.clip(bad, 0, 1).astype(np.float32), captions)
    assert all(value >= 0.95 for value in scores.values()), scores


@pytest.mark.parametrize("level", [0.0, 0.5, 0.93, 1.0])
def test_blank_pictures_score_zero(level: float) -> None:
    _, captions = examples(FULL)
    blank = np.full((3, 128, 128), level, np.float32)
    facts = read_facts(blank)
    assert all(score_facts(facts, caption).overall == 0 for caption in captions)


def test_noise_scores_near_zero() -> None:
    _, captions = examples(FULL)
    rng = np.random.default_rng(0)
    for mean, spread in ((0.5, 0.3), (0.85, 0.15)):
        noise = np.clip(rng.normal(mean, spread, (30, 3, 128, 128)), 0, 1).astype(np.float32)
        assert score_many(noise, captions[:30])["overall"] < 0.12


@pytest.mark.parametrize(
    ("said", "drawn", "lowered"),
    [
        ("a big red circle at the left", "a big blue circle at the left", "alignment"),
        ("a big red circle at the left", "a big red square at the left", "alignment"),
        ("a big red circle at the left", "a small red circle at the left", "alignment"),
        ("a big red circle at the left", "a big red circle at the right", "position"),
        ("a red circle left of a blue square", "a red circle right of a blue square", "position"),
        ("a red circle left of a blue square", "a blue square above a red circle", "position"),
        ("a red circle left of a blue square", "a blue circle left of a blue square", "alignment"),
        ("three red stars on coarse dots", "two red stars on coarse dots", "counting"),
        ("three red stars on coarse dots", "four red stars on coarse dots", "counting"),
        ("three red stars on coarse dots", "three red hearts on coarse dots", "alignment"),
        ("three red stars on coarse dots", "three red stars on medium dots", "detail"),
        ("three red stars on coarse dots", "three red stars on coarse checks", "detail"),
        ("three red stars on coarse dots", "three red stars", "detail"),
        ("a big happy face at the centre", "a big sad face at the centre", "faces"),
        ("a small sad face at the left", "a small surprised face at the left", "faces"),
        ("a small sad face at the left", "a small sad face at the right", "position"),
        ("the big blue word CAT", "the big blue word CAN", "text"),
        ("the big blue word CAT", "the big blue word CATS", "text"),
        ("the small red word QO", "the small red word OO", "text"),
        ("the small red word HELLO", "the small black word HELLO", "alignment"),
        ("the small red word HELLO", "the medium red word HELLO", "alignment"),
    ],
)
def test_one_wrong_fact_lowers_exactly_its_category(said: str, drawn: str, lowered: str) -> None:
    scores = score(picture(drawn), said).as_dict()
    overall = scores.pop("overall")
    assert {name for name, value in scores.items() if value < 1} == {lowered}
    assert overall == pytest.approx(sum(scores.values()) / len(scores))
    assert set(score(picture(said), said).as_dict().values()) == {1.0}


def test_a_mirrored_pair_is_only_in_the_wrong_place() -> None:
    caption = "a red triangle left of a blue cross"
    mirrored = score(picture(caption)[:, :, ::-1], caption)
    assert (mirrored.alignment, mirrored.position) == (1.0, 0.0)


def test_scores_hold_only_what_the_caption_speaks_of() -> None:
    word = score(picture("the big red word OK"), "the big red word OK")
    assert list(word.as_dict()) == ["alignment", "text", "overall"]
    count = score(picture("two red circles on fine stripes"), "two red circles on fine stripes")
    assert list(count.as_dict()) == ["alignment", "counting", "detail", "overall"]


def test_part_of_a_word_is_part_of_the_score() -> None:
    said = "the medium green word HOUSE"
    assert score(picture("the medium green word MOUSE"), said).text == pytest.approx(0.8)
    assert score(picture("the medium green word HOUSE"), "the medium green word HO").text == pytest.approx(0.4)


@pytest.mark.parametrize("size", [64, 100, 256, 512])
def test_any_size_reads_the_same(size: int) -> None:
    captions = ["three red stars on coarse dots", "a small sad face at the left", "the medium pink word FOX"]
    captions += [f"a big blue {shape} at the top" for shape in SHAPES]
    for caption in captions:
        assert score(picture(caption, size=size), caption).overall == 1, caption


def test_tensors_and_arrays_score_alike() -> None:
    drawn, captions = examples(POCKET_1)
    tensor = torch.tensor(drawn[:8])
    assert score_many(tensor, captions[:8]) == score_many(drawn[:8], captions[:8])


def test_facts_are_told_in_one_line() -> None:
    circle = str(read_facts(picture("a big red circle at the left on coarse stripes")))
    assert circle == "red circle of radius 0.21 at (0.25, 0.50); stripes ground of period 0.25"
    assert str(read_facts(picture("the medium pink word FOX"))).endswith("word 'FOX' of height 0.20; plain ground")
    assert "face (sad)" in str(read_facts(picture("a small sad face at the left")))
    assert str(read_facts(np.zeros((3, 64, 64), np.float32))) == "nothing: no pale ground"


def test_a_caption_outside_the_grammar_is_refused_before_the_picture_is_read() -> None:
    with pytest.raises(CaptionError, match="lighthouse"):
        score(np.zeros((3, 8, 8), np.float32), "a lighthouse")


def test_unusable_pictures_are_refused() -> None:
    with pytest.raises(PlanError, match=r"shape \(128, 128, 3\) cannot be scored; give \(3, side, side\)"):
        read_facts(np.zeros((128, 128, 3), np.float32))
    with pytest.raises(NonFiniteError, match="NaN"):
        read_facts(np.full((3, 64, 64), np.nan, np.float32))


@WORLDS
@given(seed=seeds, size=st.sampled_from([64, 128, 200]))
def test_nothing_that_the_renderer_draws_is_stray(world: World, seed: int, size: int) -> None:
    scene = sample_scene(world, random.Random(seed))
    drawn = pixels(render(scene, size))
    assert stray(drawn, scene.caption) == 0
    if size == 200:
        assert stray(blurred(drawn), scene.caption) < 0.5  # a softened edge is no stray paint


@given(seed=seeds, side=st.integers(1, 12), where=st.tuples(st.integers(0, 115), st.integers(0, 115)))
def test_a_fleck_is_stray_by_its_area(seed: int, side: int, where: tuple[int, int]) -> None:
    scene = sample_scene(FULL, random.Random(seed))
    drawn, (y, x) = pixels(render(scene, 128)), where
    drawn[:, y : y + side, x : x + side] = np.array([0.2, 0.9, 0.9], np.float32)[:, None, None]  # no paint of the world
    assert stray(drawn, scene.caption) == pytest.approx(100 * side * side / 128**2)


def test_what_the_caption_does_not_name_is_stray() -> None:
    red = picture("a big red circle at the left")
    inside = 100 * float((np.abs(red - np.array(COLOURS["red"], np.float32)[:, None, None]).max(0) < 0.01).mean())
    assert inside > 3
    assert inside <= stray(red, "a big blue circle at the left") < 1.2 * inside
    assert stray(red, "a big red star at the right") == 0  # what stands where is the score's to say
    assert stray(np.zeros((3, 64, 64), np.float32), "a big red circle at the left") == 100
    with pytest.raises(CaptionError):
        stray(red, "a lighthouse")
    with pytest.raises(PlanError, match="cannot be scored"):
        stray(red[:, :63, :63], "a big red circle at the left")
    with pytest.raises(NonFiniteError):
        stray(np.full((3, 64, 64), np.nan, np.float32), "a big red circle at the left")


@pytest.mark.parametrize(("away", "right"), [(0.0, 1.0), (0.1, 1.0), (0.2, 0.0)])
def test_a_thing_far_from_its_place_is_not_there(away: float, right: float) -> None:
    """`left` is still the nearest place of what lies further left, but not where it is."""
    caption = "a small red circle at the left"
    scene = parse_caption(caption)
    moved = replace(scene, objects=tuple(replace(o, x=0.25 - 0.7 * away, y=0.5 - 0.7 * away) for o in scene.objects))
    found = score(render(moved, 256).transpose(2, 0, 1) / 255, caption)
    assert (found.alignment, found.position) == (1.0, right)


def test_a_word_is_read_with_the_room_of_its_letters_and_a_lost_face_with_its_ground() -> None:
    word = read_facts(picture("the medium pink word FOX")).word
    assert word is not None and (word.height, word.advance) == (LETTER_HEIGHT["medium"], LETTER_ADVANCE["medium"])
    ground = picture("a big red circle at the left on coarse stripes")
    assert score(ground, "a big sad face at the left on coarse stripes").detail == 1.0
    assert score(ground, "a big sad face at the left on fine stripes").detail == 0.0


@WORLDS
def test_held_out_captions_are_captions_that_training_leaves_out(world: World) -> None:
    captions = held_out_captions(world, 40, seed=3)
    assert len(captions) == 40 and all(map(held_out, captions)) and captions == held_out_captions(world, 40, seed=3)
    assert all(parse_caption(caption).caption == caption for caption in captions)
    assert captions != held_out_captions(world, 40, seed=4)

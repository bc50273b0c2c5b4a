"""The hard world: captions leave much open; its reader reads renderings, but neither other captions nor means."""

import math
import random
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.ndimage import binary_dilation

import mrflow as mf
from mrflow.models.pocket.model import LONG_TEXT, VOCABULARY, WORDS
from mrflow.models.pocket.networks import tokenise
from mrflow.scenes import hard, legible
from mrflow.scenes.grammar import FULL, CaptionError, Face, Object, Scene, Word, held_out, sample_caption
from mrflow.scenes.hard import HARD, KINDS, caption_of, cells, fill_hard, held_out_hard_captions, parse_hard, sample
from mrflow.scenes.legible import hard_score, read_parts
from mrflow.scenes.render import render, render_window
from tests.scene_scores import hard_score_many

EACH = pytest.mark.parametrize("kind", KINDS)
CATEGORIES = {
    "objects": {"binding"},
    "sign": {"letters"},
    "faces": {"expressions"},
    "grid": {"cells", "odd"},
    "texture": {"binding", "texture"},
}


def drawn(captions: list[str], *, side: int = 256, seed: int = 0) -> NDArray[np.float32]:
    """Each caption rendered once, what it leaves open drawn at random: (n, 3, side, side) in [0, 1]."""
    rng = random.Random(seed)
    images = [render(fill_hard(parse_hard(caption), HARD, rng), side).transpose(2, 0, 1) for caption in captions]
    return np.stack(images).astype(np.float32) / np.float32(255)


@EACH
def test_captions_are_read_back(kind: str) -> None:
    """Every caption parses to a scene of its kind that the vocabulary can say, in the tokens that there are."""
    rng = random.Random(1)
    captions = [caption_of(HARD, rng, kind) for _ in range(200)]
    ids, lost = tokenise(captions, WORDS, LONG_TEXT)
    assert not any(lost) and len(set(WORDS)) == len(WORDS) and WORDS[: len(VOCABULARY)] == VOCABULARY
    assert {parse_hard(caption).kind for caption in captions} == {kind}
    assert len({tuple(row.tolist()) for row in ids}) == len(set(captions))  # tokens tell captions apart


def test_a_caption_says_what_is_drawn() -> None:
    scene = parse_hard("a red star at the top left, an orange ring at the middle right")
    assert [(o.shape, o.colour) for o in scene.objects] == [("star", "red"), ("ring", "orange")]
    assert [(round(o.x, 3), round(o.y, 3)) for o in scene.objects] == [(0.167, 0.167), (0.833, 0.5)]
    scene = parse_hard("a blue sign in 8% letters, CAT and DO and SUNS and X and ZOO")
    assert [w.text for w in scene.words] == ["CAT", "DO", "SUNS", "X", "ZOO"]
    assert {(w.colour, w.height) for w in scene.words} == {("blue", 0.08)}
    assert [w.x < 0.5 for w in scene.words] == [True, False, True, False, True]  # five are set in two columns
    assert {w.x for w in parse_hard("a blue sign in 8% letters, CAT and DO").words} == {0.5}
    scene = parse_hard("three 12% faces, calm winking sad")
    assert [f.expression for f in scene.faces] == ["calm", "winking", "sad"]
    assert scene.faces[0].radius == 0.06 and scene.faces[2].y > scene.faces[0].y == scene.faces[1].y
    scene = parse_hard("a 4x4 grid of red circles with a pink cross in row 2 column 3")
    assert [i for i, o in enumerate(scene.objects) if (o.shape, o.colour) == ("cross", "pink")] == [6]
    assert len(scene.objects) == 16
    scene = parse_hard("1/32 checks with a black heart at the bottom")
    assert (scene.background.texture, scene.background.period) == ("checks", 1 / 32)
    assert parse_hard("five purple stars").kind == "count"  # the older world's


WANTED = (
    "'a'; 'a', 'the' or a number; 'at'; 'column'; 'face'; 'faces'; 'grid'; 'in'; 'letters'; 'of'; 'row'; 'sign'; "
    "'the'; 'with'; 'word'; a colour; a column; a comma; a density; a letter size; a number; a number from 1 to "
    "4; a number from 1 to 5; a number from 1 to 6; a number from 1 to 7; a number from 1 to 8; a place; a "
    "relation; a row; a shape; a size of faces; a size of grid; a size of letters; a size or a colour; a texture;"
    " an expression; one to five capitals; one to four capitals; shapes; stripes or checks; the end"
)


def test_wherever_a_caption_breaks_off_the_word_that_is_wanted_is_named() -> None:
    """Cut, with a wrong word at the end or in the middle, or one left out: all words that errors ask for."""
    rng, wanted = random.Random(3), set[str]()
    captions = [caption_of(HARD, rng, kind) for kind in KINDS for _ in range(15)]
    for caption in dict.fromkeys(captions + [sample_caption(FULL, rng) for _ in range(80)]):
        words = caption.replace(",", " ,").split()
        for i in range(len(words)):
            rest = words[i + 1 :]
            for middle in ([], ["xyzzy"], ["xyzzy", *rest], rest, ["cat", words[i], *rest]):
                try:
                    parse_hard(" ".join(words[:i] + middle))
                except CaptionError as error:
                    wanted |= set(re.findall("word [0-9]+ should be (.*), not ", str(error)))
    assert wanted == set(WANTED.split("; "))


@pytest.mark.parametrize(
    ("caption", "said"),
    [
        ("a red star at the top left, a dog", "word 10 should be a colour, not 'dog'"),
        ("a red sign in 7% letters, CAT", "word 5 should be a size of letters, not '7%'"),
        ("a red sign in 8% letters, " + " and ".join("ABCDEFGHI"), "at most 8 words, not 9"),
        ("two 12% faces, calm", "word 6 should be an expression, not the end"),
        ("a 4x4 grid of red circles with a pink cross in row 5 column 1", "a number from 1 to 4, not '5'"),
        ("1/32 dots with a black heart at the left", "word 2 should be stripes or checks"),
    ],
)
def test_what_the_grammar_does_not_know_is_named(caption: str, said: str) -> None:
    with pytest.raises(CaptionError, match=said.replace("(", r"\(")):
        parse_hard(caption)
    with pytest.raises(CaptionError, match="no scene of kind 'cube'"):
        caption_of(HARD, random.Random(0), "cube")


@EACH
def test_what_a_caption_leaves_open_is_large(kind: str) -> None:
    """Two draws differ in places, tints and phase, and in nothing that the caption says."""
    rng = random.Random(2)
    scene = parse_hard(caption_of(HARD, rng, kind))
    draws = [fill_hard(scene, HARD, rng) for _ in range(60)]

    def spread(values: list[float]) -> float:
        return max(values) - min(values)

    def first(of: Scene) -> Object | Face | Word:
        things: list[Object | Face | Word] = [*of.objects, *of.faces, *of.words]
        return things[0]

    things, plain = [first(d) for d in draws], first(scene)
    for axis in ("x", "y"):
        moves = [getattr(thing, axis) - getattr(plain, axis) for thing in things]
        assert 1.7 * HARD.free < spread(moves) and max(map(abs, moves)) <= HARD.free
    assert spread([d.background.tint[0] for d in draws]) > 0.05
    assert spread([d.background.phase[1] for d in draws]) > 0.8
    tints = [thing.rgb[1] for thing in things if not isinstance(thing, Face) and thing.rgb is not None]
    assert bool(tints) != bool(scene.faces) and (not tints or 1.6 * HARD.tint < spread(tints))
    for d in draws:
        bare = replace(
            d,
            background=scene.background,
            objects=tuple(replace(o, x=p.x, y=p.y, rgb=None) for o, p in zip(d.objects, scene.objects, strict=True)),
            faces=tuple(replace(f, x=p.x, y=p.y) for f, p in zip(d.faces, scene.faces, strict=True)),
            words=tuple(replace(w, x=p.x, y=p.y, rgb=None) for w, p in zip(d.words, scene.words, strict=True)),
        )
        assert bare == scene


def test_everything_stays_inside_and_apart() -> None:
    rng = random.Random(3)
    for _ in range(300):
        scene = sample(replace(HARD, plain=0.0), rng)
        rounds: list[Object | Face] = [*scene.objects, *scene.faces]
        for thing in rounds:
            assert thing.radius <= min(thing.x, thing.y, 1 - thing.x, 1 - thing.y) + 0.02
        if scene.kind == "objects":
            gaps = [math.dist((a.x, a.y), (b.x, b.y)) for a in scene.objects for b in scene.objects if a is not b]
            assert min(gaps) > 2 * hard.OBJECT
        for word in scene.words:
            half = len(word.text) * word.advance / 2
            assert word.x - half >= 0 and word.x + half <= 1 and word.y - word.height >= 0 and word.y + word.height <= 1


def test_the_same_seed_draws_the_same_world_and_one_caption_in_ten_is_held_out() -> None:
    one, two = (random.Random(7) for _ in range(2))
    scenes = [sample(HARD, one) for _ in range(200)]
    assert scenes == [sample(HARD, two) for _ in range(200)]
    kinds = [scene.kind for scene in scenes]
    assert {*KINDS} < {*kinds} and 8 < sum(kind not in KINDS for kind in kinds) < 45  # some of the older world
    captions = held_out_hard_captions(HARD, 30, seed=4)
    assert len(set(captions)) == 30 and all(map(held_out, captions))
    assert captions == held_out_hard_captions(HARD, 30, seed=4) != held_out_hard_captions(HARD, 30, seed=5)


def test_sizes_are_said_in_latent_cells_too() -> None:
    assert cells("8%", 256) == pytest.approx(2.56) and cells("8%", 128) == pytest.approx(1.28)
    assert cells("1/32", 256) == 1.0


def test_a_window_is_a_part_of_the_picture() -> None:
    word = Word("KEY", "red", 0.43, 0.13, 0.125, 0.47, (0.7, 0.2, 0.1))
    scene = Scene("sign", parse_hard("a red sign in 13% letters, KEY").background, words=(word,))
    whole = render(scene, 128)
    assert np.array_equal(render_window(scene, 128, (30, 40, 90, 70)), whole[40:70, 30:90])
    assert render_window(scene, 128, (-8, 0, 8, 16)).shape == (16, 16, 3)
    assert not np.array_equal(whole, render(replace(scene, words=(replace(word, x=0.5),)), 128))


def test_a_phase_moves_a_texture() -> None:
    ground = replace(parse_hard("1/16 stripes with a black heart at the left").background, phase=(0.25, 0.0))
    moved, still = (render(Scene("texture", g), 64) for g in (ground, replace(ground, phase=(0.0, 0.0))))
    assert np.array_equal(moved[:, :-1], still[:, 1:]) and not np.array_equal(moved, still)


@EACH
def test_renderings_read_and_other_captions_do_not(kind: str) -> None:
    captions = held_out_hard_captions(HARD, 8, kind=kind)
    images = drawn(captions)
    truth = hard_score_many(images, captions)
    assert set(truth) == {*CATEGORIES[kind], "overall"}
    assert min(truth.values()) >= 0.95
    other = hard_score_many(images, captions[1:] + captions[:1])
    assert max(other.values()) < 0.2


@EACH
def test_the_mean_of_a_captions_pictures_does_not_read(kind: str) -> None:
    """One forward can draw no more than this; it goes through the embedded model's autoencoder, as that would."""
    model = mf.load("pocket", device="cpu")
    captions = held_out_hard_captions(HARD, 4, kind=kind)
    means = torch.from_numpy(np.stack([drawn([caption] * 40, seed=i).mean(0) for i, caption in enumerate(captions)]))
    with torch.inference_mode():
        scores = hard_score_many(model.decode(model.encode(means)), captions)
    assert max(scores[name] for name in CATEGORIES[kind]) < 0.3


def test_one_wrong_part_is_one_wrong_part() -> None:
    def missed(scene: Scene, caption: str) -> list[tuple[str, str]]:
        image = render(scene, 256).transpose(2, 0, 1).astype(np.float32) / np.float32(255)
        return [(part.said, part.read) for part in read_parts(image, caption) if not part.right]

    caption = "a green sign in 6% letters, CAT and DOG and SUN"
    scene = parse_hard(caption)
    assert missed(scene, caption) == []
    assert missed(replace(scene, words=(replace(scene.words[0], text="CAR"), *scene.words[1:])), caption) == [
        ("T", "R")
    ]
    assert missed(replace(scene, words=scene.words[:2]), caption) == [("S", ""), ("U", ""), ("N", "")]
    caption = "four 20% faces, happy sad winking surprised"
    scene = parse_hard(caption)
    assert missed(replace(scene, faces=(Face("calm", *_at(scene.faces[0])), *scene.faces[1:])), caption) == [
        ("happy", "calm")
    ]
    caption = "a 5x5 grid of green circles with a red star in row 2 column 4"
    scene = parse_hard(caption)
    odd = scene.objects[8]
    assert missed(
        replace(scene, objects=(*scene.objects[:8], replace(odd, colour="blue"), *scene.objects[9:])), caption
    ) == [("red star", "blue star")]
    caption = "1/24 stripes with a red star at the left"
    scene = parse_hard(caption)
    assert missed(replace(scene, background=replace(scene.background, texture="checks")), caption) == [
        ("1/24 stripes", "1/24 checks")
    ]
    assert missed(replace(scene, background=replace(scene.background, texture="plain")), caption) == [
        ("1/24 stripes", "")
    ]
    caption = "a red star at the top left, a blue ring at the middle right"
    scene = parse_hard(caption)
    swapped = tuple(
        Object(b.shape, b.colour, a.x, a.y, a.radius) for a, b in zip(scene.objects, scene.objects[::-1], strict=True)
    )
    assert missed(replace(scene, objects=swapped), caption) == [("red star", "blue ring"), ("blue ring", "red star")]


def _at(face: Face) -> tuple[float, float, float]:
    return face.x, face.y, face.radius


def test_what_cannot_be_read_is_refused_or_read_as_nothing() -> None:
    black = np.zeros((3, 256, 256), np.float32)
    assert hard_score(black, "two 12% faces, calm sad") == {"expressions": 0.0, "overall": 0.0}
    with pytest.raises(CaptionError, match="'five purple stars' is of the older world; mrflow.scenes.score reads it"):
        read_parts(black, "five purple stars")
    small = drawn(["a green sign in 13% letters, CAT and DOG and SUN"], side=128)[0]
    assert hard_score(small, "a green sign in 13% letters, CAT and DOG and SUN")["letters"] == 1.0
    assert legible.LEAST == 256


@pytest.mark.parametrize("seed", range(4))
def test_the_best_move_is_that_of_a_slow_search(seed: int) -> None:
    """Every move of a drawn patch over a noisy map, one by one, and a parabola through the best one's neighbours."""
    rng, side, most = np.random.default_rng(seed), 64, 6  # (0.07 + 0.02) sides
    drawn, seen = np.zeros((side, side)), 0.05 * rng.random((side, side))
    drawn[20:34, 24:36] = rng.random((14, 12))
    dy, dx = (int(v) for v in rng.integers(-4, 5, 2))
    seen += 0.7 * np.roll(drawn, (dy, dx), (0, 1)) + 0.3 * np.roll(drawn, (dy, dx + 1), (0, 1))
    dots = {(j, i): (seen * np.roll(drawn, (j, i), (0, 1))).sum() for j in range(-7, 8) for i in range(-7, 8)}
    j, i = max((at for at in dots if max(map(abs, at)) <= most), key=lambda at: dots[at])
    assert (j, i) == (dy, dx)
    turn = [np.polyfit((-1, 0, 1), [dots[j + s * down, i + s * (1 - down)] for s in (-1, 0, 1)], 2) for down in (1, 0)]
    y, x = (at - b / (2 * a) for at, (a, b, _) in zip((j, i), turn, strict=True))
    near = np.zeros((5, 5), bool)
    near[2, ::2] = near[::2, 2] = True
    grown = binary_dilation(np.roll(drawn > 0.02, (j, i), (0, 1)), near)
    fit = dots[j, i] / math.sqrt((drawn**2).sum() * (seen[grown] ** 2).sum())
    place, found = legible._best(seen[..., None], drawn[..., None], (20, 16, 40, 40))
    assert place == pytest.approx((x / side, y / side), abs=1e-9)
    assert found == pytest.approx(fit, rel=1e-6)


@EACH
def test_a_picture_without_a_ground_has_every_part_and_none_right(kind: str) -> None:
    """Of a black picture nothing is read, and what its caption names counts in its category."""
    caption = caption_of(HARD, random.Random(5), kind)
    black, right = np.zeros((3, 256, 256), np.float32), drawn([caption])[0]
    parts, truth = read_parts(black, caption), read_parts(right, caption)
    assert [(part.category, part.said, part.read) for part in parts] == [(p.category, p.said, "") for p in truth]
    assert {part.category for part in parts} == CATEGORIES[kind] and not any(part.right for part in parts)


def test_a_ground_that_is_hardly_seen_has_no_texture() -> None:
    """Black dots every three pixels leave nothing of it once their surroundings are left out."""
    picture = np.full((3, 256, 256), 0.9, np.float32)
    picture[:, ::3, ::3] = 0.0
    caption = "1/32 checks with a black heart at the bottom"
    part = next(part for part in read_parts(picture, caption) if part.category == "texture")
    assert (part.said, part.read) == ("1/32 checks", "")

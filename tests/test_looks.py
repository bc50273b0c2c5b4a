"""Other looks of the same scenes: each is read exactly in its own look, and not in another."""

import random
from dataclasses import replace

import numpy as np
import pytest

import mrflow as mf
from mrflow.models import info
from mrflow.scenes import hard_score, render
from mrflow.scenes.grammar import LETTERS, SHAPES
from mrflow.scenes.hard import HARD, draw_scene, held_out_hard_captions
from mrflow.scenes.looks import LOOKS, restyle
from mrflow.sweep import Legible
from mrflow.sweep.metrics import Measured

CHANGED = {"dusk": ("objects", "sign", "texture"), "shapes": ("objects", "grid"), "runes": ("sign",)}
ALPHABET = "a blue sign in 13% letters, " + " and ".join(("ABCD", "EFGH", "IJKL", "MNOP"))
REST = "a red sign in 8% letters, " + " and ".join(("QRST", "UVWX", "YZAB", "CDEF"))


def picture(caption: str, look: str, side: int = 256) -> np.ndarray:
    """The truth, (3, side, side) in [0, 1]."""
    shown = render(restyle(draw_scene(caption, random.Random(1)), look), side)
    return shown.transpose(2, 0, 1).astype(np.float32) / 255


@pytest.mark.parametrize("look", LOOKS)
def test_the_truth_is_read_in_its_own_look_alone(look: str) -> None:
    for kind in CHANGED[look]:
        for caption in held_out_hard_captions(HARD, 2, kind=kind):
            own, usual = picture(caption, look), picture(caption, "")
            assert hard_score(own, caption, look=look)["overall"] == 1
            if look != "dusk":  # in dim light all is still there
                assert hard_score(own, caption)["overall"] < 0.6
            assert hard_score(usual, caption)["overall"] == 1
            assert hard_score(usual, caption, look=look)["overall"] < 0.6


@pytest.mark.parametrize("look", ["", "shapes", "dusk"])
def test_all_shapes_are_told_apart(look: str) -> None:
    places = ("top left", "top centre", "top right", "middle left", "middle right", "bottom left", "bottom right")
    for shapes in (SHAPES[:4], SHAPES[4:]):
        caption = ", ".join(f"a red {shape} at the {place}" for shape, place in zip(shapes, places, strict=False))
        assert hard_score(picture(caption, look), caption, look=look) == {"binding": 1.0, "overall": 1.0}


@pytest.mark.parametrize("look", ["", "runes", "dusk"])
def test_all_letters_of_an_alphabet_are_told_apart(look: str) -> None:
    for caption in (ALPHABET, REST):
        assert hard_score(picture(caption, look), caption, look=look) == {"letters": 1.0, "overall": 1.0}


def test_every_name_has_another_drawing() -> None:
    assert set(LOOKS["runes"].glyphs) == set(LETTERS) and len(set(LOOKS["runes"].glyphs.values())) == len(LETTERS)
    assert set(LOOKS["shapes"].outlines) == set(SHAPES)
    assert all(abs(x) <= 1 and abs(y) <= 1 for points in LOOKS["shapes"].outlines.values() for x, y in points)


def test_dusk_is_dim_and_bluish() -> None:
    day, dusk = (picture("1/16 checks with a pink heart at the left", look) for look in ("", "dusk"))
    assert dusk.mean((1, 2)) == pytest.approx(day.mean((1, 2)) * [0.75, 0.80, 0.95], abs=0.01)


def test_stage_and_metric_know_looks() -> None:
    caption = "a blue sign in 13% letters, RED and FOX and HAT"
    model = mf.load("pocket", device="cpu")
    shown = mf.run(mf.Chain((mf.Truth(256, 256, "runes"),)), model, caption, seed=0).pixels[0]
    made = Measured(shown, caption, 0, {}, model)
    assert Legible("runes")(made) == {"legible.letters": 1.0, "legible": 1.0}
    assert Legible()(made)["legible"] < 0.3
    for other in ("five purple stars", "a lighthouse"):  # not of the hard world: no number, and no failure
        assert Legible()(replace(made, prompt=other)) == {}
    with pytest.raises(mf.PlanError, match=r"no look is called 'night'; there are dusk, shapes, runes"):
        mf.plan(mf.Chain((mf.Truth(256, 256, "night"),)), info("pocket"))

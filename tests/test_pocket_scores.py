"""The script behind the model card's tables: what is kept is not drawn again, and intervals are those of captions."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mrflow as mf
from experiments import pocket_scores
from experiments.pocket_scores import NATIVE, STAGED, interval, other_captions, read_back, scored, seeds_of
from mrflow.scenes.grammar import FULL, held_out_captions
from mrflow.sweep import seed_of

CAPTIONS = held_out_captions(FULL, 5)
CHAIN = mf.recipes.native(size=(64, 64), steps=1)


def test_an_interrupted_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, real, asked = mf.load("pocket", device="cpu"), pocket_scores.pictures, list[list[int]]()
    seeds = [[seed_of(caption, 0) for caption in CAPTIONS[i : i + 2]] for i in (0, 2, 4)]

    def pictures(*args: Any) -> Any:
        if args[3] in asked or len(asked) == 2:
            raise KeyboardInterrupt
        asked.append(args[3])
        return real(*args)

    own, other = read_back(CHAIN, model, CAPTIONS, 2)
    monkeypatch.setattr(pocket_scores, "pictures", pictures)
    with pytest.raises(KeyboardInterrupt):
        read_back(CHAIN, model, CAPTIONS, 2, tmp_path)
    assert asked == seeds[:2] and len(list(tmp_path.iterdir())) == 2
    monkeypatch.setattr(pocket_scores, "pictures", lambda *args: asked.append(args[3]) or real(*args))
    assert read_back(CHAIN, model, CAPTIONS, 2, tmp_path) == (own, other)
    assert read_back(CHAIN, model, CAPTIONS, 2, tmp_path) == (own, other)
    assert asked == seeds
    assert [bool(row) for row in other] == [caption is not None for caption in other_captions(CAPTIONS)]
    read_back(mf.recipes.native(size=(64, 64), steps=2), model, CAPTIONS, 2, tmp_path)  # another chain
    assert asked == [*seeds, *seeds]


def test_a_caption_that_occurs_twice_is_drawn_twice() -> None:
    assert seeds_of(["x", "y", "x"]) == [seed_of("x", 0), seed_of("y", 0), seed_of("x", 1)]


def test_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    rows: dict[object, tuple[list[dict[str, float]], list[dict[str, float]]]] = {
        "a": ([{"overall": 1.0}, {"overall": 0.5}], [{"overall": 0.0}, {}]),
        "b": ([{"overall": 0.5}, {"overall": 0.5}], [{"overall": 0.25}, {}]),
    }
    monkeypatch.setattr(pocket_scores, "read_back", lambda chain, *rest: rows[chain])
    lines = scored({STAGED: "a", NATIVE: "b"}, mf.toy(), ["x", "y"], 2)  # type: ignore[dict-item]  # pyright: ignore
    assert lines[0].split("|")[4:9] == [
        f" {STAGED} ", f" {NATIVE} ", f" {STAGED}, other caption ", f" {NATIVE}, other caption ",
        " staged - native 50, paired ",
    ]  # fmt: skip
    assert "0 in this table" in lines[-1] and "too few prompts" in lines[-3]
    cells = [cell.split()[0] for cell in lines[-3].split("|")[1:-1]]
    assert cells == ["overall", "2", "2", "0.75", "0.50", "0.00", "0.25", "+0.25"]
    rows["a"] = (rows["a"][0], [{}, {}])  # of so few captions none has another one of its kind
    lines = scored({STAGED: "a", NATIVE: "b"}, mf.toy(), ["x", "y"], 2)  # type: ignore[dict-item]  # pyright: ignore
    assert lines[-3].split("|")[6].strip() == "-" and "nan" not in " ".join(lines)


def test_an_interval_resamples_captions() -> None:
    rng = np.random.default_rng(0)
    assert interval([("a", 0.0)] * 50 + [("b", 1.0)] * 50, rng) == (0.5, 0.0, 1.0)  # two captions, not a hundred
    mean, low, high = interval([(str(i), float(i % 2)) for i in range(100)], rng)
    assert mean == 0.5 and 0.38 < low < 0.42 and 0.58 < high < 0.62

"""GenEval and OneIG-Bench: layouts that their scorers read, their formulas from counts, slices, resuming."""

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from experiments import geneval, oneig
from experiments.drawing import shard
from mrflow.errors import PlanError
from mrflow.records.pictures import read_record

TOY = """
import mrflow as mf
chain = mf.recipes.native(size=(64, 64), steps=1, guidance=mf.Distilled())
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a chain that costs almost nothing."""
    (tmp_path / "toy.py").write_text(TOY)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(module: Any, monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    """A script's main with these words."""
    monkeypatch.setattr(sys, "argv", ["script", *words])
    code: int = module.main()
    return code


def test_the_prompts_are_the_published_ones() -> None:
    """Counts by task, number, small classes and persons, as they were counted in the published file."""
    rows = geneval.prompts()
    assert len(rows) == len({json.dumps(r) for r in rows}) == 553
    assert Counter(r["tag"] for r in rows) == dict(zip(geneval.TASKS, (80, 99, 80, 94, 100, 100), strict=True))
    assert Counter(r["include"][0]["count"] for r in rows if r["tag"] == "counting") == {2: 26, 3: 28, 4: 26}
    small = Counter(r["tag"] for r in rows if geneval.small(r))
    assert small == {
        "two_object": 47, "position": 46, "color_attr": 37, "single_object": 20, "counting": 19, "colors": 17
    }  # fmt: skip
    assert sum(geneval.SLICES["a person"](r) for r in rows) == 9
    assert rows[0]["prompt"] == "a photo of a bench"


def rates(values: tuple[float, ...], images: int = 4) -> geneval.Results:
    """Results whose tasks have about these scores."""
    rng, rows = np.random.default_rng(0), []
    for prompt in geneval.prompts():
        p = values[geneval.TASKS.index(prompt["tag"])]
        rows += [{"metadata": json.dumps(prompt), "correct": bool(rng.random() < p)} for _ in range(images)]
    return geneval.Results(rows)


@pytest.mark.parametrize(
    ("scores", "alone", "together"),
    [((0.98, 0.81, 0.74, 0.79, 0.22, 0.45), 0.008, 0.017), ((0.99, 0.92, 0.89, 0.88, 0.76, 0.77), 0.007, 0.014)],
)
def test_the_resolution_of_geneval(scores: tuple[float, ...], alone: float, together: float) -> None:
    """Published task scores of FLUX.1-dev and Qwen-Image; standard errors as computed by hand."""
    results = rates(scores)
    assert geneval.standard_errors(results) == (pytest.approx(alone, abs=6e-4), pytest.approx(together, abs=1e-3))
    assert results.overall() == pytest.approx(sum(scores) / 6, abs=3 * alone)


def test_the_overall_score_is_the_mean_of_tasks_not_of_pictures() -> None:
    results = rates((1.0, 0.0, 1.0, 0.0, 1.0, 0.0))
    assert results.overall() == pytest.approx(0.5)
    everything = [k for keys in results.by_task().values() for k in keys]
    assert results.rate(everything) == pytest.approx((80 + 80 + 100) / 553)


def test_pairs_show_what_they_can() -> None:
    """A run against itself shows nothing; a run that is always right is better; intervals hold the value."""
    a, b = rates((0.5,) * 6), rates((1.0,) * 6)
    same = "\n".join(geneval.report(a, a))
    assert "not shown" in same and "better" not in same and "worse" not in same
    lines = geneval.report(b, a)
    assert sum("better" in line for line in lines) >= 7
    for line in geneval.report(a)[2:9]:
        value, _, rest = line.split("|")[4].partition("[")
        low, high = (float(x) for x in rest.rstrip(" ]").split(","))
        assert low < float(value) < high


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"metadata": "{}", "correct": True}, "line 1: its metadata are none of GenEval's 553 prompts"),
        ({"metadata": json.dumps(geneval.prompts()[0]), "correct": "yes"}, "correct must be true or false"),
        ({"metadata": json.dumps(geneval.prompts()[0]), "correct": True}, "no picture of two_object"),
    ],
)
def test_results_that_cannot_be_scored(row: dict[str, object], text: str) -> None:
    with pytest.raises(PlanError, match=text):
        geneval.Results([row])


@pytest.mark.filterwarnings("ignore")
def test_geneval_is_drawn_in_the_official_layout_and_resumed(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("draw", "out", "--chain", "toy.py:chain", "--samples", "2")
    assert run(geneval, monkeypatch, *words, "--limit", "2") == 0
    assert sorted(p.name for p in Path("out").iterdir()) == ["00000", "00001"]
    for i in range(2):
        folder = Path("out") / f"{i:05d}"
        assert json.loads((folder / "metadata.jsonl").read_text()) == geneval.prompts()[i]
        assert sorted(p.name for p in (folder / "samples").iterdir()) == ["0000.png", "0001.png"]
    first = Path("out/00000/samples/0000.png")
    assert read_record(first)["prompt"] == "a photo of a bench" and read_record(first)["seed"] == 0
    times = {p: p.stat().st_mtime_ns for p in Path("out").rglob("*.png")}
    Path("out/00001/samples/0001.png").unlink()
    assert run(geneval, monkeypatch, *words, "--limit", "3", "--shard", "1/2") == 0
    assert first.stat().st_mtime_ns == times[first]
    assert Path("out/00001/samples/0001.png").is_file() and not Path("out/00002").exists()


def test_shards_are_checked() -> None:
    assert shard("3/4") == (3, 4)
    for bad in ("4/4", "1", "a/b", "-1/2"):
        with pytest.raises(PlanError, match="--shard must be"):
            shard(bad)


CSV = """category,id,prompt,type,prompt_length,class
Anime_Stylization,000,a hero,NP,short,
Portrait,001,a group of people on stairs,NP,short,
Text_Rendering,000,a sign that says OPEN,NP,short,natural scene
Text_Rendering,001,a long page,NP,long,long text
"""


@pytest.mark.filterwarnings("ignore")
def test_oneig_is_drawn_lossless_in_the_official_layout(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("bench.csv").write_text(CSV)
    words = ("draw", "images", "--csv", "bench.csv", "--name", "toy", "--chain", "toy.py:chain")
    assert run(oneig, monkeypatch, *words, "--sets", "text") == 0
    assert sorted(str(p) for p in Path("images").rglob("*.webp")) == [
        "images/text/toy/000.webp",
        "images/text/toy/001.webp",
    ]
    sheet = Image.open("images/text/toy/000.webp").convert("RGB")
    assert sheet.size == (128, 128)
    # The official splitter cuts row by row.
    for i in range(4):
        box = (i % 2 * 64, i // 2 * 64, i % 2 * 64 + 64, i // 2 * 64 + 64)
        tile = Image.open(f"images-tiles/text/toy/000-{i}.png")
        assert np.array_equal(np.array(sheet.crop(box)), np.array(tile.convert("RGB")))
        assert read_record(f"images-tiles/text/toy/000-{i}.png")["seed"] == i
    assert run(oneig, monkeypatch, *words, "--sets", "anime", "human", "--slice", "faces") == 0
    assert [str(p) for p in Path("images").rglob("*/human/*/*.webp")] or Path("images/human/toy/001.webp").is_file()
    assert not Path("images/anime").exists()
    with pytest.raises(PlanError, match="--samples must be a square"):
        run(oneig, monkeypatch, *words, "--samples", "3")


def test_a_perfect_set_is_exactly_one_and_an_empty_reading_is_counted() -> None:
    perfect = oneig.counted("0", 0, "Hello  World!", "Hello\nWorld")
    assert (perfect.edits, perfect.exact, perfect.matched, perfect.words) == (0, 1, 2, 2)
    empty = oneig.counted("0", 0, "Hello World", "")
    assert (empty.edits, empty.exact, empty.matched, empty.words) == (11, 0, 0, 2)

    def score(*rows: oneig.Reading) -> float:
        return float(oneig.text_score(np.array([*(sum(getattr(r, f) for r in rows) for f in FIELDS), len(rows)])))

    assert score(perfect) == 1.0
    assert score(empty) == pytest.approx(1 - 11 / 100)
    # One of two pictures right: ED 5.5, CR 1/2, WAC 2/4.
    assert score(perfect, empty) == pytest.approx(1 - 5.5 * 0.5 * 0.5 / 100)
    long = oneig.counted("0", 0, "x" * 500, "y")
    assert score(long) == pytest.approx(0.0)  # saturates at M


FIELDS = ("edits", "exact", "matched", "words")


@pytest.mark.parametrize(
    ("wanted", "read", "edits", "matched", "words"),
    [
        ("OPEN", "open", 4, 0, 1),  # case counts
        ("one two", "two one", 6, 2, 2),  # words in any order, letters in theirs
        ("a a b", "a b b", 1, 2, 3),  # as often as they occur
        ("OPEN", "we are OPEN today", 13, 1, 1),  # what is more is only edits
        ("well-known", "wellknown", 0, 1, 1),  # what is deleted leaves no gap
        ("café 你好", "café 你好", 0, 2, 2),
    ],
)
def test_edge_cases_of_the_text_score(wanted: str, read: str, edits: int, matched: int, words: int) -> None:
    r = oneig.counted("0", 0, wanted, read)
    assert (r.edits, r.matched, r.words) == (edits, matched, words)


@given(st.text("abc ", max_size=12), st.text("abc ", max_size=12), st.text("abc ", max_size=12))
def test_the_distance_is_a_metric(a: str, b: str, c: str) -> None:
    d = oneig.edit_distance
    assert d(a, a) == 0 and d(a, b) == d(b, a) <= max(len(a), len(b))
    assert abs(len(a) - len(b)) <= d(a, b) <= d(a, c) + d(c, b)


def test_the_slices_are_scored_from_counts(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("bench.csv").write_text(CSV)
    Path("content.csv").write_text("id,text_content\n000,OPEN\n001,many many words\n002,NONE\n")
    rows = [{"id": "0", "tile": 0, "text": "OPEN"}, {"id": "1", "tile": 0, "text": "many words"}]
    Path("read.jsonl").write_text("\n".join(json.dumps(r) for r in rows))
    base = ("text", "tiles", "--content", "content.csv", "--csv", "bench.csv")
    assert run(oneig, monkeypatch, *base, "--readings", "read.jsonl", "--counts", "counts.jsonl") == 0
    out = capsys.readouterr().out
    assert "1 of 3 prompts have no picture" in out
    assert "| small text in scene | 1 | 1 | 1.0000" in out
    assert f"| all | 2 | 2 | {1 - 2.5 * 0.5 * 0.25 / 100:.4f}" in out
    assert [json.loads(line)["edits"] for line in Path("counts.jsonl").read_text().splitlines()] == [0, 5]
    with pytest.raises(PlanError, match="say what reads the pictures"):
        run(oneig, monkeypatch, *base)
    with pytest.raises(PlanError, match="--ocr nothing:here"):
        run(oneig, monkeypatch, *base, "--ocr", "nothing:here")
    Path("read.jsonl").write_text('{"id": "9", "tile": 0, "text": ""}')
    with pytest.raises(PlanError, match="no wanted text for 009"):
        run(oneig, monkeypatch, *base, "--readings", "read.jsonl")


def test_an_ocr_is_plugged_in(here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    Path("reader.py").write_text("def read(paths):\n    return ['OPEN' for _ in paths]\n")
    monkeypatch.syspath_prepend(str(here))
    folder = Path("tiles/text/toy")
    folder.mkdir(parents=True)
    for i in range(2):
        Image.new("RGB", (8, 8)).save(folder / f"000-{i}.png")
    Path("content.csv").write_text("id,text_content\n000,OPEN\n")
    code = run(oneig, monkeypatch, "text", "tiles", "--name", "toy", "--content", "content.csv", "--ocr", "reader:read")
    assert code == 0 and "| all | 1 | 2 | 1.0000" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("program", [geneval, oneig])
def test_steps_are_taken_as_the_command_line_gives_them(
    program: Any, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("bench.csv").write_text(CSV)
    own = () if program is geneval else ("--csv", "bench.csv", "--name", "toy", "--sets", "text")
    words = ("--chain", "native", "--size", "32x32", "--steps", "4", "--limit", "1", "--samples", "1")
    assert run(program, monkeypatch, "draw", "out", *own, *words) == 0
    record = read_record(next(Path().rglob("*.png")))
    assert record["size"] == [32, 32] and "'steps': 4" in str(record["chain"])

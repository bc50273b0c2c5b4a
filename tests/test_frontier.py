"""Every method at equal cost: what is chosen, the table of its rows, and the page's section made of it."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mrflow as mf
from experiments.failures import __main__ as failures
from experiments.failures import first, questions
from experiments.failures.questions import QUESTIONS, Setting, fitted
from mrflow.models import info
from mrflow.sweep import Row
from tests.test_statistics import row

METHODS = {
    "fewer steps", "fewer steps, unguided", "staged", "staged, latents", "lift", "SelfLift", "SPEED", "RALU", "JiT",
    "Fresco", "TaylorSeer", "Spectrum", "DMD", "MagCache", "student", "student, then staged",
}  # fmt: skip


def test_every_method_goes_as_far_as_it_can() -> None:
    facts = info("pocket")
    chains = QUESTIONS["frontier"](Setting(128, 256, 50, 12, students=True), facts)
    found = [first.place(label) for label in chains if label != "native"]
    assert {method for method, _ in found} == METHODS  # token merging alone is nowhere near 4x
    assert {speed for method, speed in found if method == "staged"} == {4, 8, 12}  # one step and one refining are 16x
    whole = mf.plan(chains["native"], facts).work.flops
    for label in chains:
        if label != "native":
            assert 0.95 <= whole / mf.plan(chains[label], facts).work.flops / first.place(label)[1] <= 1.25, label


def test_one_thing_is_exchanged_in_fewer_steps() -> None:
    facts = info("pocket")
    chains = QUESTIONS["slots"](Setting(64, 128, 50, 12), facts)
    usual = mf.plan(chains["fewer steps, 8x"], facts).nfe
    methods = {first.place(label)[0] for label in chains if label != "native"}
    assert methods == {"fewer steps", *questions.SOLVERS, *questions.GUIDANCE, *questions.SCHEDULES}
    for label, chain in chains.items():
        if label.endswith(", 8x"):
            assert mf.plan(chain, facts).nfe == usual, label
            (sample, _) = chain
            changed = [
                n for n in ("solver", "guidance", "schedule") if getattr(sample, n) != getattr(plain(label, facts), n)
            ]
            assert len(changed) == (0 if label.startswith("fewer") else 1), (label, changed)


def plain(label: str, facts: mf.ModelInfo) -> mf.Sample:
    """Fewer steps of as many steps as the chain of a label has."""
    sample = next(iter(QUESTIONS["slots"](Setting(64, 128, 50, 12), facts)[label]))
    assert isinstance(sample, mf.Sample)
    tokens = facts.tokens(128, 128)
    steps = len(sample.schedule(1.0, tokens, facts)) - 1
    found = next(iter(mf.recipes.native(size=(128, 128), steps=steps)))
    assert isinstance(found, mf.Sample)
    return found


def rows(captions: int = 40) -> list[Row]:
    """Three methods at 4x, of which one is as good as the best and one is not, and one at 8x."""
    rng, out = np.random.default_rng(0), list[Row]()
    good = np.clip(0.8 + 0.05 * rng.normal(size=captions), 0, 0.95)
    alike = good + np.where(np.arange(captions) % 2, 0.03, -0.031)
    for label, reads in (
        ("native", good + 0.05), ("good, 4x", good), ("alike, 4x", alike), ("bad, 4x", good / 2), ("bad, 8x", good / 3)
    ):  # fmt: skip
        for i, value in enumerate(reads):
            one = row(f"caption {i}", 0, None, chain=label)
            cost: dict[str, Any] = {"flops": 8e9 / OPERATIONS[label], "seconds": 4.0, "nfe": 7}
            out.append(replace(one, metrics={"legible": float(value)}, timed=f"{label}{i // 10}", **cost))
    return out


OPERATIONS = {"native": 1.0, "good, 4x": 4.1, "alike, 4x": 4.0, "bad, 4x": 4.4, "bad, 8x": 8.0}


def test_the_section_says_what_the_table_says(tmp_path: Path) -> None:
    table = first.table_of(rows(), "native", size=256, low=128)
    verdicts = {(e["method"], e["speed"]): e["behind the best"] for e in table["entries"]}
    assert verdicts == {
        ("good", 4): "best",
        ("alike", 4): "no difference shown",
        ("bad", 4): "lower",
        ("bad", 8): "best",
    }
    first.write_table(table, tmp_path / "table.json")
    assert json.loads((tmp_path / "table.json").read_text()) == table
    page = tmp_path / "page.md"
    page.write_text(f"above\n\n{first.BEGIN.format('frontier')}\nstale\n{first.END}\n\nbelow\n")
    for _ in range(2):  # again over itself
        first.write_section(table, page)
    text = page.read_text()
    assert text.startswith("above\n") and text.endswith("\nbelow\n") and "stale" not in text
    assert "- **4x**: try good first, which reads 0." in text
    assert "Not told apart from it: alike. Below it: bad." in text
    assert "| bad | 8x | 8.0 |" in text and "rehearsal" not in text
    for entry in table["entries"]:
        mean, low, high = entry["reads"]
        assert low < mean < high and f"{mean:.2f} [{low:.2f}, {high:.2f}]" in text


def test_nothing_is_tried_first_where_nothing_is_legible() -> None:
    made = [replace(r, metrics={"legible": 0.0}) if r.chain == "bad, 8x" else r for r in rows()]
    text = "\n".join(first.section(first.table_of(made, "native", size=256, low=128)))
    assert "- **8x**: nothing is legible by any method." in text and "try bad" not in text and "try good first" in text


def test_few_captions_give_no_verdict(tmp_path: Path) -> None:
    table = first.table_of(rows(4), "native", size=256, low=128)
    text = "\n".join(first.section(table))
    assert "A rehearsal" in text and "try good first" not in text
    (tmp_path / "page.md").write_text("no marks")
    with pytest.raises(mf.PlanError, match="has no section to fill"):
        first.write_section(table, tmp_path / "page.md")


def test_the_figure_is_drawn_and_the_page_has_its_marks(tmp_path: Path) -> None:
    first.draw(first.table_of(rows(), "native", size=256, low=128), tmp_path / "frontier.svg")
    drawn = (tmp_path / "frontier.svg").read_text()
    assert drawn.startswith("<?xml") and all(f"<!-- {name} -->" in drawn for name in ("good", "alike", "bad"))
    page = (Path(__file__).parents[1] / "docs" / "how-to" / "rivals.md").read_text()
    for question in questions.FITTED:
        begin = page.index(first.BEGIN.format(question))
        assert (
            page[begin:].count(first.END) >= 1
            and "<!-- first: made" not in page[begin + 5 : page.index(first.END, begin)]
        )


@pytest.mark.slow
def test_what_must_see_the_model_is_found_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, setting, captions = mf.load("pocket", device="cpu"), Setting(32, 64, 24, 6), ["a big red circle at the left"]
    monkeypatch.setattr(questions, "SPEEDS", (4,))
    found = fitted(setting, model, captions, tmp_path / "fitted.json", questions.FITTED["frontier"])
    assert {"L2P, 4x", "TeaCache, 4x", "DBCache, 4x"} <= set(found)
    whole = mf.run(setting.native(24), model, captions).stages
    for label, chain in found.items():
        cost = sum(stage.flops for stage in mf.run(chain, model, captions).stages)
        assert 0.95 <= sum(stage.flops for stage in whole) / cost / 4 <= 1.25, label
    monkeypatch.setattr(mf.caches.L2P, "calibrate", lambda *_, **__: 1 / 0)
    monkeypatch.setattr(mf, "run", lambda *_, **__: 1 / 0)
    assert fitted(setting, model, [], tmp_path / "fitted.json", questions.FITTED["frontier"]) == found


def test_the_command_resumes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["frontier", "--size", "64", "--steps", "24", "--captions", "1", "--details", "texture", "--methods"]
    words += [
        "staged, 4x",
        "fewer steps, 4x",
        "TeaCache, 4x",
        "--out",
        str(tmp_path / "run"),
        "--figure",
        str(tmp_path / "f.svg"),
    ]
    monkeypatch.setattr("sys.argv", ["failures", *words])
    assert failures.main() == 0
    said = capsys.readouterr()
    table = json.loads((tmp_path / "run.json").read_text())
    assert "A rehearsal" in said.out and (tmp_path / "f.svg").is_file()
    assert {e["method"] for e in table["entries"]} == {"staged", "fewer steps", "TeaCache"}
    made = sorted((tmp_path / "run").rglob("*.png"))
    before = [p.stat().st_mtime_ns for p in made]
    assert failures.main() == 0
    assert [p.stat().st_mtime_ns for p in made] == before
    assert json.loads((tmp_path / "run.json").read_text()) == table

"""The scripts behind docs/studies.md: each can be drawn with the model it names, and its table says what rows say."""

import re
from collections import Counter
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest

import mrflow as mf
from experiments.looks import KNOWN, looks
from experiments.studies import __main__ as studies
from experiments.studies import trade_off
from experiments.studies.common import LOW, SIZE
from mrflow.models import info
from mrflow.sweep import Row
from tests.test_statistics import row


@pytest.mark.parametrize("name", studies.NAMES)
def test_every_study_can_be_planned(name: str) -> None:
    study = import_module(f"experiments.studies.{name}")
    sweep: mf.Sweep = studies.with_controls(study.sweep, LOW, SIZE)
    assert set(sweep.plans(info(sweep.model))) == set(sweep.chains)
    assert all(set(prompt.tags) == {"detail"} for prompt in sweep.prompts)


def rows() -> list[Row]:
    """Two methods on 40 captions of two kinds, timed in tens; the second is fast and bad at words."""
    out: list[Row] = []
    for chain, seconds, word in (("slow", 2.0, 1.0), ("fast", 1.0, 0.5)):
        for i, (kind, value) in enumerate((("word", word), ("face", 1.0)) * 20):
            metrics = {"legible": value, f"legible.{kind}": value}
            out.append(
                replace(
                    row(str(i), 0, None, chain=chain, kind=kind),
                    metrics=metrics,
                    seconds=seconds,
                    timed=f"{chain}{i // 10}",
                )
            )
    return out


def cells(lines: list[str]) -> list[list[str]]:
    """A Markdown table's."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]


def test_the_table() -> None:
    heads, slow, fast = cells(studies.table(rows(), "slow"))
    assert heads[4:] == ["minus reference [95 %]", "face", "word"]
    assert slow == ["slow", "1", "0", "1.000 [0.912, 1.000]", "", "1.00", "1.00"]  # of 40 all, exactly
    assert fast[:2] == ["fast", "2.0"] and fast[3].startswith("0.750 [") and fast[4].startswith("-0.250 [-0.3")
    assert fast[4].endswith(" ▼")
    assert fast[5:] == ["1.00", "0.50 ▼"]
    assert "sign-flip tests, 3 in this table, corrected together (Holm, 5 %)" in studies.table(rows(), "slow")[1]


def test_few_captions_get_no_verdict_and_make_no_family() -> None:
    some = [r for r in rows() if int(r.prompt) < 21 or r.tags["kind"] == "word"]
    *_, fast = cells(studies.table(some, "slow"))
    assert fast[5:] == ["1.00 †", "0.50 ▼"]
    assert "sign-flip tests, 2 in this table" in studies.table(some, "slow")[1]


def test_the_table_by_a_tag() -> None:
    heads, _, fast = cells(studies.table(rows(), "slow", by="kind"))
    assert heads[5:] == ["face", "word"] and fast[5:7] == ["1.00", "0.50 ▼"]


def test_an_unknown_tag_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["studies", "sigma", "--by", "colour"])
    with pytest.raises(SystemExit):
        studies.main()
    assert "no caption has the tag 'colour'; there are detail" in capsys.readouterr().err


def test_operating_points_of_a_method_are_one_line_of_the_figure() -> None:
    found = Counter(map(trade_off.method, trade_off.chains))
    assert found.keys() <= KNOWN.keys() and found["native"] == 7 and found["staged"] == 4
    assert len({colour for colour, _ in looks(found).values()}) == len(found) == 5


FIGURES = sorted((Path(__file__).parents[1] / "docs/images/studies").glob("*.svg"))


@pytest.mark.parametrize("figure", FIGURES, ids=lambda path: path.stem)
def test_a_method_has_one_colour_in_every_figure(figure: Path) -> None:
    legend = figure.read_text("utf-8").partition('<g id="legend_1">')[2].partition('<g id="axes_')[0]
    found, colour = dict[str, str](), ""
    for stroke, name in re.findall(r"stroke: (#\w{6})|<!-- (.*?) -->", legend):
        colour = stroke or colour
        if name:
            found[name] = colour
    assert len(FIGURES) == 4 and len(found) >= 5
    assert found == {method: colour for method, (colour, _) in looks(found).items()}
    apart = [look for method, look in looks(found).items() if not method.startswith("truth")]  # dashed
    assert len(set(apart)) == len(apart)


def test_methods_that_are_not_known_look_unlike_those_beside_them() -> None:
    mine = [f"mine {i}" for i in range(40)]
    given = looks([*KNOWN, *mine])
    assert {m: given[m] for m in KNOWN} == KNOWN
    assert len({given[m] for m in mine} - set(KNOWN.values())) == 40


def test_the_figure_shows_every_operating_point(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    metrics = {"native 50": (1.0, 0.1), "native 2": (0.5, 0.0), "native 4": (0.9, 0.0)}
    made = [
        replace(row(str(i), 0, None, chain=chain), metrics={"legible": share, "legible.letters": letters})
        for i in range(3)
        for chain, (share, letters) in metrics.items()
    ]
    trade_off.draw(made, "native 50", tmp_path / "a.svg")
    trade_off.draw(made, "native 50", tmp_path / "b.svg")
    text = (tmp_path / "a.svg").read_text()
    assert text == (tmp_path / "b.svg").read_text()
    assert "legible: higher is better ↑ [95 %]" in text and "faster is better →" in text
    assert "<!-- legible.letters: higher is better ↑ [95 %] -->" in text and "<!-- native -->" in text
    trade_off.draw([r for r in made if r.chain != "native 4"], "native 50", tmp_path / "less.svg")
    assert (tmp_path / "less.svg").read_text().count("<use ") < text.count("<use ")

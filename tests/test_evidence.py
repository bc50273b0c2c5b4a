"""The command that asks everything: each piece has its own folder and enough captions; a failure is not passed over."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from experiments import evidence
from mrflow.models.pocket.model import SHIPPED

MODEL = next(iter(SHIPPED.values()))


def run_main(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr("sys.argv", ["evidence", "--model", str(MODEL), *words])
    return evidence.main()


@pytest.mark.parametrize("trial", [False, True])
def test_pieces_have_folders_of_their_own_and_enough_captions(trial: bool, tmp_path: Path) -> None:
    student = tmp_path / "student.safetensors"
    found = evidence.pieces(MODEL, tmp_path, captions=1 if trial else 20, student=student, trial=trial)
    assert len({piece.name for piece in found}) == len(found) == 10
    outs = [piece.command[piece.command.index("--out") + 1] for piece in found]
    assert len({*outs}) == len(outs) - 2  # three looks share one
    assert [piece.name for piece in found if "--student" in piece.command] == ["transfer"]
    more = evidence.pieces(MODEL, tmp_path, captions=1, student=None, trial=trial, ocr="a:b")
    assert more[-1].name == "legibility" and more[-1].command[more[-1].command.index("--ocr") + 1] == "a:b"
    drawn = [piece for piece in found if piece.captions]
    assert all(piece.captions >= (1 if trial else 20) for piece in drawn)
    if not trial:
        assert next(piece for piece in found if piece.name == "mends").captions >= 72  # else 95 % cannot be shown
        assert sum(piece.seconds for piece in found) <= 110 * 60  # of which an alphabet takes 22


def test_the_pages_times_are_those_of_the_command(tmp_path: Path) -> None:
    page = (Path(__file__).parents[1] / "docs" / "reference" / "hard-world.md").read_text()
    for captions, column in ((20, 3), (200, 4)):
        found = evidence.pieces(MODEL, tmp_path, captions=captions, student=None, trial=False)
        times = {piece.name: piece.seconds / 60 for piece in found}
        times["three fine-tunes"] = sum(times.pop(name) for name in list(times) if name.startswith("fine-tune"))
        for name, minutes in times.items():
            row = next(line for line in page.splitlines() if line.startswith(f"| {name} | ")).split("|")
            assert float(re.findall(r"\d+", row[column])[0]) == pytest.approx(minutes, abs=1), name


def test_a_plan_runs_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(subprocess, "run", None)
    assert run_main(monkeypatch, "--plan", "--out", str(tmp_path / "a")) == 0
    said = capsys.readouterr().err.splitlines()
    assert said[0].startswith("scores: 14 min: python -m experiments.hard_scores") and said[-1].startswith(
        "all: 109 min"
    )
    assert not (tmp_path / "a").exists()


def test_what_a_piece_prints_is_kept_and_a_failure_ends_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    pieces = [evidence.Piece("good", ("this", "--fine")), evidence.Piece("bad", ("json.tool", "no.json"))]
    monkeypatch.setattr(evidence, "pieces", lambda *_, **__: [*pieces, evidence.Piece("never", ("this",))])
    assert run_main(monkeypatch, "--out", str(tmp_path)) == 1
    assert "The Zen of Python" in (tmp_path / "good.md").read_text()
    said = capsys.readouterr().err
    assert f"{shlex.quote(sys.executable)} -m json.tool no.json failed; the same command resumes there" in said
    assert "never: about" not in said and not (tmp_path / "never.md").exists()
    with pytest.raises(SystemExit):
        run_main(monkeypatch, "--only", "dreams")
    assert "no piece is called dreams; there are good, bad, never" in capsys.readouterr().err

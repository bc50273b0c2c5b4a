"""The harness of mutation testing: its parts are there, its draw is recorded, and it counts what mutmut says."""

import json
from pathlib import Path

import pytest

from experiments import mutants

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("name", mutants.PARTS)
def test_a_part_is_files_and_the_tests_that_hold_them(name: str) -> None:
    part = mutants.PARTS[name]
    assert any(list(ROOT.glob(pattern)) for pattern in part.files)
    assert all((ROOT / test).is_file() for test in part.tests)


def test_the_draw_depends_on_the_seed_alone() -> None:
    names = [f"m{i}" for i in range(300)]
    first = mutants.drawn(names, 100, 0)
    assert len(set(first)) == 100 and first == mutants.drawn(names[::-1], 100, 0) != mutants.drawn(names, 100, 1)
    assert mutants.drawn(names[:20], 100, 0) == sorted(names[:20])


def test_the_score_leaves_out_what_is_equivalent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    meta = tmp_path / "flow" / "mutants" / "mrflow" / "flow.py.meta"
    meta.parent.mkdir(parents=True)
    codes = {"dies": 1, "hangs": 36, "lives": 0, "unreached": 33, "same": 0, "not run": None}
    meta.write_text(json.dumps({"exit_code_by_key": codes}))
    monkeypatch.setattr(mutants, "EQUIVALENT", {"same": "multiplies by 1", "dies": "no longer true"})
    lines = mutants.report(tmp_path, 100, 0)
    assert lines[2] == "| flow | 6 | 5 | 2 | 1 | 50% |"
    assert lines[4:] == ["survived: lives", "survived: unreached"]

"""The harness of mutation testing: its parts are there, its draw is recorded, and it counts what mutmut says."""

import json
import os
import subprocess
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
    assert sorted(mutants.drawn(names[:20], 100, 0)) == sorted(names[:20])


SOURCE = '''def x_half__mutmut_orig(x):
    """A half."""
    return x / 2

def x_half__mutmut_1(x):
    """A half."""
    return x / 3

def x_half__mutmut_2(x):
    """A half."""
    return 1 * x / 2

def x_half__mutmut_3(x):
    """A half."""
    return x * 2
'''


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """What mutmut and three runs leave: one killed, one that is equivalent, one from before its function changed."""
    place = tmp_path / "flow"
    (place / "mutants" / "mrflow").mkdir(parents=True)
    (place / "mutants" / "mrflow" / "flow.py").write_text(SOURCE, encoding="utf-8")
    keys = [f"mrflow.flow.x_half__mutmut_{i}" for i in (1, 2, 3)]
    meta = {"exit_code_by_key": dict.fromkeys(keys), "hash_by_function_name": {"x_half": "now"}}
    (place / "mutants" / "mrflow" / "flow.py.meta").write_text(json.dumps(meta), encoding="utf-8")
    rows = [(keys[0], "now", None), (keys[0], "now", "test_half"), (keys[1], "now", None), (keys[2], "before", None)]
    lines = [json.dumps({"mutant": m, "digest": d, "by": by, "tests": 1, "seconds": 2.0}) for m, d, by in rows]
    (place / "results.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return place


def test_what_was_drawn_stays_drawn_while_it_is_there(place: Path) -> None:
    first = mutants.judged(place, 2, 0)
    (place / "drawn-2-0.json").write_text(json.dumps(["mrflow.flow.x_gone__mutmut_1", first[1]]), encoding="utf-8")
    again = mutants.judged(place, 2, 0)
    assert again[0] == first[1] and len({*again}) == 2 and "mrflow.flow.x_gone__mutmut_1" not in again
    assert again == mutants.judged(place, 2, 0)


def test_a_mutant_is_told_by_its_function_and_line(place: Path) -> None:
    function, line, diff = mutants.changed(place, "mrflow.flow.x_half__mutmut_2")
    assert (function, line) == ("mrflow.flow.half", "return 1 * x / 2")
    assert "-    return x / 2\n+    return 1 * x / 2" in diff


def test_the_last_run_counts_and_what_is_equivalent_does_not(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mutants, "EQUIVALENT", {})
    lines = mutants.report(place.parent, 100, 0)
    assert lines[2:] == ["| flow | 3 | 2 | 1 | 0 | 50% | 2.0 |", "", "survived: mrflow.flow.x_half__mutmut_2"]
    monkeypatch.setattr(mutants, "EQUIVALENT", {("mrflow.flow.half", "return 1 * x / 2"): "multiplies by 1"})
    assert mutants.report(place.parent, 100, 0)[2:] == ["| flow | 3 | 2 | 1 | 1 | 100% | 2.0 |", ""]


def test_equivalents_have_their_proof() -> None:
    assert all(len(proof) > 20 for proof in mutants.EQUIVALENT.values())


def test_sources_that_mutmut_did_not_finish_are_named_and_not_counted(place: Path) -> None:
    source, meta = (place / "mutants" / "mrflow" / f"flow.py{end}" for end in ("", ".meta"))
    os.utime(meta, ns=(1, 1))
    assert mutants.interrupted(place) == [source] and mutants.mutants(place) == {}
    lines = mutants.report(place.parent, 100, 0)
    assert lines[2:] == ["", "flow: stopped while mutants of flow.py were written; run it again"]
    meta.unlink()
    assert mutants.interrupted(place) == [source]


def test_a_workplace_follows_the_working_tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree, place = tmp_path / "tree", tmp_path / "out" / "flow"
    for name in ("mrflow/flow.py", "mrflow/weights.bin", "pyproject.toml", "notes/own.txt"):
        mutants._update(tree / name, b"")
    for name in ("mrflow/gone.py", "mutants/mrflow/gone.py", "mutants/mrflow/gone.py.meta", "mutants/mrflow/flow.py"):
        mutants._update(place / name, b"half")
    monkeypatch.chdir(tree)
    subprocess.run(["git", "init", "-q"], check=True)
    monkeypatch.setattr(mutants, "_python", lambda *_: None)
    mutants.workplace(tmp_path / "out", "flow")
    left = {str(path.relative_to(place)) for path in place.rglob("*") if path.is_file()}
    assert left == {"mrflow/flow.py", "mrflow/weights.bin", "mutants/mrflow/weights.bin", "pyproject.toml"}

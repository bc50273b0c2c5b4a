"""Every bench runs once at its smallest size, so that none rots; nothing here looks at a time."""

import json
from contextlib import redirect_stdout, suppress
from functools import partial
from importlib import import_module
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments.bench import chain, full, protocol

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
BENCH, ROOT = Path(full.__file__).parent, protocol.ROOT
SMALLEST = {
    "forward": "--fast --sizes tiny --dtypes float32 bfloat16 --repeats 1",
    "imports": "--repeats 1",
    "loading": "--gigabytes 0.001 --width 128 --repeats 1",
    "qwen": "--fast --sizes tiny --pictures 32 --repeats 1",
    "sr": "--fast --repeats 1",
    "sweeps": "--rows 20 --no-report",
    "vae": "--fast --repeats 1",
}
ELSEWHERE = {"__init__", "protocol", "chain", "full", "kernels"}  # chain and full below; kernels in test_ceilings


def here(code: str) -> protocol.Fresh:
    """A code that a bench gives to a process of its own, run in this one, which has imported what it needs."""
    out = StringIO()
    with redirect_stdout(out), suppress(SystemExit):
        exec(code, {"__name__": "__main__"})
    last = out.getvalue().splitlines()[-1:]
    return protocol.Fresh(1.0, 1.0, 1.0, 1.0, json.loads(last[0]) if last and last[0].startswith("{") else {})


def processes(*codes: str, repeats: int = 1) -> list[list[protocol.Fresh]]:
    """Each code once: the last that does something in a process of its own, the others here."""
    own = [code for code in codes if code][-1]
    once = {code: protocol.process(code) if code == own else here(code) for code in dict.fromkeys(codes)}
    return [[once[code]] * repeats for code in codes]


def pair(reference: protocol.Call, ours: protocol.Call, *, limit: float | None = None, **how: Any) -> protocol.Runs:
    """Each side called once and compared; `protocol.paired`, which test_bench holds, calls them seven times or more."""
    want, got = reference(), ours()
    error = None if limit is None else protocol.equal(got, want, limit=limit, oracle=how.get("oracle"))
    once = [protocol.Sample(1.0, 1.0)]
    return protocol.Runs(once, once, once, error=error)


def run(name: str, words: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bench's main, which writes into a folder of its own."""
    bench: Any = import_module(f"experiments.bench.{name}")
    into = partial(protocol.publish, folder=folder / "runs" / "bench")
    for what, other in (("publish", into), ("fresh", processes), ("process", here), ("paired", pair)):
        if hasattr(bench, what):
            monkeypatch.setattr(bench, what, other)
    monkeypatch.setattr("sys.argv", [name, *words.split()])
    bench.main()


def test_none_is_left_out() -> None:
    assert {path.stem for path in BENCH.glob("*.py")} == {*SMALLEST, *ELSEWHERE}


@pytest.mark.parametrize("name", SMALLEST)
def test_a_bench_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """To its last line; where it compares two sides, they gave the same."""
    run(name, SMALLEST[name], tmp_path, monkeypatch)
    assert "|---|" in capsys.readouterr().out.replace(" ", "")
    for file in tmp_path.rglob("*.json"):
        assert json.loads(file.read_text())["rows"]


def test_cases_of_loading_are_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run("loading", f"{SMALLEST['loading']} --cases C6", tmp_path, monkeypatch)
    (file,) = tmp_path.rglob("*.json")
    assert [row["case"][:2] for row in json.loads(file.read_text())["rows"]] == ["C6"]


def test_what_was_loaded_is_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: two sides that hold other tensors are not timed."""
    digests = iter("ab")
    monkeypatch.setitem(globals(), "here", lambda code: protocol.Fresh(0, 0, 0, 0, {"digest": next(digests)}))
    with pytest.raises(protocol.Unequal, match="loaded different tensors"):
        run("loading", SMALLEST["loading"], tmp_path, monkeypatch)


def test_chains_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Whole chains beside the published procedure; one process each where memory is measured."""
    monkeypatch.setattr(chain, "NATIVE", 4)
    monkeypatch.setattr(chain, "STEPS", 2)
    run("chain", "--sizes tiny --repeats 1", tmp_path, monkeypatch)
    assert "ms a step" in capsys.readouterr().out


def test_the_full_size_bench_is_rehearsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Both models, every lane and stage, diffusers beside; then its table from the file."""
    run("full", f"--tiny --out {tmp_path / 'f.json'}", tmp_path, monkeypatch)
    capsys.readouterr()
    run("full", f"--table {tmp_path / 'f.json'}", tmp_path, monkeypatch)
    said, found = capsys.readouterr().out, json.loads((tmp_path / "f.json").read_text())
    assert [(r["model"], r["lane"]) for r in found["rows"]] == [(m, e.name) for m in full.NAMES for e in full.LANES]
    assert not found["left_out"] and all(len(row["stages"]) in (2, 7) for row in found["rows"])
    assert said.count("FLUX.1-dev") == said.count("Qwen-Image") == len(full.LANES) + 2
    assert all(row["ours"] and row["diffusers"] for row in found["steps"]) and len(found["steps"]) == 4
    page, before = tmp_path / "page.md", (ROOT / "docs" / "performance.md").read_text()
    page.write_text(before)
    for _ in range(2):  # again over its own
        run("full", f"--table {tmp_path / 'f.json'} --into {page}", tmp_path, monkeypatch)
    after = page.read_text()
    assert after.count(said.strip()) == 1 and after.startswith(before.split(full.MARKS[0])[0])
    assert after.endswith(before.split(full.MARKS[1])[1])
    page.write_text("no place")
    with pytest.raises(ValueError, match="has no place for the tables"):
        full.put(said, page)


def test_a_budget_leaves_out_and_says_what(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    run("full", f"--tiny --budget 0 --models qwen --out {tmp_path / 'f.json'}", tmp_path, monkeypatch)
    found = json.loads((tmp_path / "f.json").read_text())
    assert not found["rows"] and found["left_out"] == [f"Qwen-Image {lane.name}" for lane in full.LANES]
    assert "Left out, for want of time: Qwen-Image 12 + 1;" in capsys.readouterr().out


def test_two_sides_that_differ_are_not_reported() -> None:
    """The control of `pair`."""
    with pytest.raises(protocol.Unequal):
        pair(lambda: torch.ones(2), lambda: torch.zeros(2), limit=1e-5)

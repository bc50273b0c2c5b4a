"""The protocol of the benches: statistics and verdicts on made-up samples, refusals, files. Nothing asserts a time."""

import json
import random
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from experiments.bench.protocol import (
    Memory,
    Ratio,
    Row,
    Runs,
    Sample,
    Unequal,
    equal,
    fresh,
    paired,
    ratio,
    relative,
    repeats_for,
    resident,
    table,
    verdict,
    write,
)

STEADY = Ratio(1.0, 0.99, 1.01, 1.0)


def noisy(scale: float, *, count: int = 40, seed: int = 0) -> list[float]:
    """Times about `scale`, 5 % apart, with an outlier now and then."""
    rng = random.Random(seed)
    return [scale * rng.lognormvariate(0, 0.05) * (3 if rng.random() < 0.05 else 1) for _ in range(count)]


def samples(scale: float, seed: int) -> list[Sample]:
    return [Sample(t, 2 * t) for t in noisy(scale, seed=seed)]


@pytest.mark.parametrize("seed", range(5))
def test_equal_sides_give_an_interval_that_holds_one(seed: int) -> None:
    found = ratio(noisy(1.0, seed=seed), noisy(1.0, seed=100 + seed))
    assert found.low <= found.median <= found.high
    assert found.low < 1.03
    assert found.high > 0.97


@pytest.mark.parametrize("truth", [0.5, 1.25, 3.0])
def test_the_interval_holds_the_true_ratio_and_outliers_do_not_move_it(truth: float) -> None:
    found = ratio(noisy(truth, seed=1), noisy(1.0, seed=2))
    assert found.low * 0.98 < truth < found.high * 1.02
    assert found.high - found.low < 0.1 * truth


def test_a_ratio_is_of_pairs() -> None:
    drift = np.linspace(1, 5, 20)  # a machine that becomes slower: pairs share it
    found = ratio((1.5 * drift).tolist(), drift.tolist())
    assert found == Ratio(*[pytest.approx(1.5)] * 4)
    assert ratio([1.0, 2.0], [1.0, 1.0]).least == 1.0


@pytest.mark.parametrize(
    ("measured", "control", "bar", "want"),
    [
        (Ratio(1.30, 1.25, 1.35, 1.2), STEADY, 1.2, "ahead"),
        (Ratio(1.15, 1.12, 1.18, 1.1), STEADY, 1.2, "not behind"),  # faster, but less than the bar
        (Ratio(1.30, 1.25, 1.35, 0.9), STEADY, 1.2, "not behind"),  # the smallest times disagree
        (Ratio(1.03, 1.02, 1.04, 1.1), Ratio(1.0, 0.95, 1.05, 1.0), 1.0, "not behind"),  # within the noise
        (Ratio(0.99, 0.96, 1.001, 1.0), STEADY, 1.0, "not behind"),
        (Ratio(0.95, 0.93, 0.97, 0.9), STEADY, 1.0, "behind"),
        (Ratio(0.90, 0.88, 0.92, 0.9), STEADY, 0.8, "not behind"),  # a bar below 1
        (Ratio(0.75, 0.70, 0.79, 0.9), STEADY, 0.8, "behind"),
        (Ratio(2.00, 1.90, 2.10, 2.0), Ratio(1.1, 1.04, 1.2, 1.0), 1.0, "void"),
        (Ratio(2.00, 1.90, 2.10, 2.0), Ratio(0.9, 0.80, 0.96, 1.0), 1.0, "void"),
        (Ratio(2.00, 1.90, 2.10, 2.0), Ratio(1.0, 0.80, 1.20, 1.0), 1.0, "ahead"),  # wide, but it holds 1
    ],
)
def test_verdicts(measured: Ratio, control: Ratio, bar: float, want: str) -> None:
    assert verdict(measured, control, bar) == want


def test_outputs_that_differ_are_refused_before_anything_is_timed() -> None:
    calls: list[str] = []

    def give(name: str, value: float) -> torch.Tensor:
        calls.append(name)
        return torch.tensor([1.0, value])

    with pytest.raises(Unequal, match="differ"):
        paired(lambda: give("reference", 2.0), lambda: give("ours", 2.1), repeats=3, limit=1e-5)
    assert calls == ["reference", "ours"]


def test_equality() -> None:
    want, got, oracle = torch.tensor([3.0, 4.0]), torch.tensor([3.0, 4.1]), torch.tensor([3.0, 4.2])
    assert relative(got, want) == pytest.approx(0.02, rel=1e-5)
    assert equal(got, want, limit=0.03) == pytest.approx(0.02, rel=1e-5)
    assert equal(got, want, limit=0.01, oracle=oracle) > 0.01
    for bad in (got, torch.full((2,), float("nan")), torch.zeros(3)):
        with pytest.raises(Unequal):
            equal(bad, want, limit=0.01)
    with pytest.raises(Unequal):
        equal(got, want, limit=0.01, oracle=want)


def test_each_repeat_calls_the_reference_twice_and_ours_once_in_an_order_that_changes() -> None:
    calls: list[str] = []
    before = torch.get_num_threads()
    runs = paired(lambda: calls.append("r"), lambda: calls.append("o"), repeats=20)
    assert torch.get_num_threads() == before
    assert len(runs.reference) == len(runs.again) == len(runs.ours) == 20
    repeats = ["".join(calls[i : i + 3]) for i in range(4, len(calls), 3)]
    assert len(repeats) == 20
    assert set(repeats) == {"rro", "ror", "orr"}
    assert runs.error is None
    assert all(s.cpu >= 0 and s.wall > 0 for s in runs.ours)


def test_short_calls_are_repeated_more() -> None:
    assert [repeats_for(t) for t in (0.01, 0.2, 3.0)] == [60, 25, 15]


def test_a_run_is_written_with_every_sample_and_shown_as_a_table(tmp_path: Path) -> None:
    runs = Runs(samples(1.3, 1), samples(1.3, 2), samples(1.0, 3), error=1e-7)
    row = Row("tiny", runs, 1.2, notes={"difference": "1e-07"})
    content = json.loads(write("forward", [row], folder=tmp_path / "new", threads=1).read_text())
    assert content["name"] == "forward"
    assert content["threads"] == 1
    assert {"versions", "flags", "load", "cpu", "python", "date"} <= set(content["environment"])
    assert content["environment"]["versions"]["torch"] == torch.__version__
    (saved,) = content["rows"]
    assert [len(saved["runs"][side]) for side in ("reference", "again", "ours")] == [40] * 3
    assert saved["runs"]["ours"][0] == {"cpu": runs.ours[0].cpu, "wall": runs.ours[0].wall}
    assert saved["verdict"] == row.verdict == "ahead"
    head, rule, line = table([row]).splitlines()
    assert head.count("|") == rule.count("|") == line.count("|")
    assert "ahead" in line
    assert "| difference |" in head


def test_the_clock_can_be_chosen() -> None:
    runs = Runs([Sample(2.0, 3.0)], [Sample(2.0, 3.0)], [Sample(1.0, 1.0)])
    assert Row("x", runs).measured.median == 2.0
    assert Row("x", runs, clock="wall").measured.median == 3.0


linux = pytest.mark.skipif(resident() is None, reason="needs /proc/self/status")


@linux
def test_memory_sees_what_is_held_for_a_while_and_given_back() -> None:
    with Memory() as memory:
        block = np.ones(64 << 20, dtype=np.uint8)
        time.sleep(0.05)
        del block
        time.sleep(0.02)
    assert memory.growth.anon > 50
    assert memory.end.anon < memory.peak.anon - 50


@linux
def test_fresh_processes_report_back() -> None:
    code = "import json; print('noise'); print(json.dumps({'answer': 42}))"
    first, second = fresh(code, "pass", repeats=2)
    assert [s.report for s in first] == [{"answer": 42}] * 2
    assert [s.report for s in second] == [{}] * 2
    assert all(s.wall > 0 and s.anon > 0 for s in first + second)
    with pytest.raises(RuntimeError, match="no such thing"):
        fresh("raise SystemExit('no such thing')", repeats=1)

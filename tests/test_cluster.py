"""The Ray engine on a real local cluster: the same rows to the bit, also when workers are killed in the middle."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import mrflow as mf
from mrflow.sweep import cluster as engine
from mrflow.sweep import read, run_sweep
from mrflow.sweep.cluster import Pool
from tests.test_sweep import facts, pictures, small

SCRIPT = """
import sys, time
sys.path.insert(0, {root!r})
import mrflow as mf
from mrflow.sweep.cluster import Pool, run_on_ray
from tests.test_sweep import small

def load():
    import time
    from mrflow.sweep import leases, maker
    leases.BEAT = 0.3
    run = maker.run
    def slow(*args, **more):
        time.sleep({pause})
        return run(*args, **more)
    maker.run = slow
    return mf.toy()

class Told:
    def begin(self, name, config):
        print("begin", name, config["rows"])

    def row(self, row, number, picture):
        print("row", row.key, number, picture is not None and picture.is_file())

    def finish(self, methods):
        print("finish", len(methods.lines))

done = run_on_ray(small(), load, {folder!r}, Pool(2, cpus=0.5), batch=2, log=[Told()])
print("made", done.made, "failed", done.failed, "left", done.left, flush=True)
"""


def start(folder: Path, *, pause: float = 0.0) -> "subprocess.Popen[str]":
    """A driver in a process of its own: Ray warns and forks as it likes there."""
    root = str(Path(__file__).parents[1])
    code = SCRIPT.format(root=root, folder=str(folder), pause=pause)
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": root, "RAY_USAGE_STATS_ENABLED": "0"}
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env
    )


def kill_holder(lease: Path) -> bool:
    """Kill the process that computes a row; whether it died with the row in hand, neither written nor let go."""
    try:
        text = lease.read_text()
        first, *more = text.splitlines()
        if not any("doing" in line for line in more):
            return False
        os.kill(json.loads(first)["pid"], signal.SIGKILL)
        return lease.read_text() == text and not list(lease.parents[1].glob(f"rows/??/{lease.name}"))
    except (OSError, ValueError):
        return False


@pytest.mark.slow
def test_a_worker_is_killed_in_the_middle(tmp_path: Path) -> None:
    """Two workers, one is killed after some rows while it holds a lease: all is as if one process had made it."""
    pytest.importorskip("ray")
    whole, cluster = tmp_path / "whole", tmp_path / "cluster"
    run_sweep(small(), mf.toy(), whole, batch=2)
    driver = start(cluster, pause=0.4)
    end, killed = time.monotonic() + 120, False
    while time.monotonic() < end and driver.poll() is None and not killed:
        if len(list(cluster.glob("rows/??/*.json"))) >= 2:
            killed = any(kill_holder(lease) for lease in cluster.glob("leases/*.json"))
        time.sleep(0.02)
    out, err = driver.communicate(timeout=180)
    assert killed and driver.returncode == 0, err[-2000:]
    assert "failed 0 left 0" in out
    assert facts(read(cluster)) == facts(read(whole))
    assert pictures(cluster) == pictures(whole)
    assert max(r.tries for r in read(cluster)) == 2  # the row that was in hand was begun again
    assert not list(cluster.glob("leases/*.json"))
    kinds = {"begin", "row", "finish", "made"}
    told = [words for line in out.splitlines() if (words := line.split()) and words[0] in kinds]  # Ray says things too
    assert [line[0] for line in told] == ["begin", *["row"] * (len(told) - 3), "finish", "made"]
    assert told[0][1:] == ["cluster", "12"] and told[-2] == ["finish", "2"]
    keys = [line[1] for line in told[1:-2]]
    assert len(set(keys)) == len(keys) and set(keys) <= facts(read(cluster)).keys()
    assert (
        len(keys) >= 12 - 4
    )  # what the dead worker had made of its batch, two pairs with two chains, it could not report
    assert all(line[3] == "True" for line in told[1:-2])


@pytest.mark.parametrize("given", [(0,), (10**30,), (1, float("nan")), (1, 1, float("inf")), (1, 1, -1)])
def test_pools_are_checked(given: tuple[Any, ...]) -> None:
    with pytest.raises(mf.PlanError, match="at least one worker"):
        Pool(*given)


def test_a_cluster_that_does_not_answer_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Ray:
        ended = 0

        def is_initialized(self) -> bool:
            return False

        def init(self, **_: object) -> None:
            raise Exception("the node timed out")

        def shutdown(self) -> None:
            self.ended += 1

    ray = Ray()
    monkeypatch.setattr(engine, "package", lambda: ray)
    with pytest.raises(mf.ResourceError, match="Ray does not answer on this machine: the node timed out"):
        engine.run_on_ray(small(), mf.toy, tmp_path / "s")
    assert ray.ended == 1 and not list(tmp_path.iterdir())


STAGES = """
from dataclasses import dataclass
import mrflow as mf
from beside import tinted

@dataclass(frozen=True)
class Tint(mf.Stage[mf.Pixels, mf.Pixels]):
    amount: float = 0.5

    def plan(self, spec, model):
        return spec

    def apply(self, state, out, ctx):
        return tinted(state.data, self.amount)

@dataclass(frozen=True)
class Mean(mf.sweep.Metric):
    def __call__(self, made):
        return {"mean": float(made.pixels.mean())}

chain = mf.recipes.native(size=(32, 32), steps=1) >> Tint()
sweep = mf.Sweep({"tinted": chain}, ["a big red circle", "the word CAT"], seeds=(0, 1), metrics=[Mean()])
"""


@pytest.mark.slow
def test_stages_of_the_sweeps_own_file_reach_the_workers(tmp_path: Path) -> None:
    """A stage and a metric of the sweep's file, which imports its neighbour: rows as of one process, with its keys."""
    pytest.importorskip("ray")
    mine = tmp_path / "mine"  # no worker finds it by itself
    mine.mkdir()
    (mine / "s.py").write_text(STAGES)
    (mine / "beside.py").write_text("def tinted(pixels, amount):\n    return pixels * amount\n")
    root = str(Path(__file__).parents[1])
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": root, "RAY_USAGE_STATS_ENABLED": "0"}
    summaries: list[dict[str, object]] = []
    for how in (["--engine", "ray", "--workers", "1"], []):
        out = ["--out", "ray" if how else "local", "--batch", "2", "--json"]
        words = [sys.executable, "-W", "ignore", "-m", "mrflow", "sweep", "mine/s.py", *out, *how]
        done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, env=env, timeout=1200, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        summaries.append(json.loads(done.stdout))
    assert summaries[0] == {**summaries[1], "folder": summaries[0]["folder"]}
    assert summaries[0]["made"] == 4 and summaries[0]["failed"] == summaries[0]["left"] == 0
    assert facts(read(tmp_path / "ray")) == facts(read(tmp_path / "local"))
    assert pictures(tmp_path / "ray") == pictures(tmp_path / "local")
    assert all("mean" in row.metrics for row in read(tmp_path / "ray"))

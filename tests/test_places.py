"""Processes and machines that are set up in odd ways: forks, no home, other locales, clocks that jump."""

import itertools
import os
import pwd
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import mrflow as mf
from mrflow.errors import PlanError, ResourceError
from mrflow.machine.forks import check_process
from mrflow.models.pocket.model import NEWEST
from mrflow.records.files import cache_folder, expand_home, known_file
from mrflow.records.pictures import read_record
from mrflow.sweep import Store, read, run_sweep
from mrflow.upscalers import shelf
from tests.test_reliability import ROOT, one

FORKED = """
import os, sys, torch
torch.set_num_threads(2)
import mrflow as mf
chain, model = mf.recipes.native(size=(128, 128), steps=1), mf.load()
draw = lambda: mf.run(chain, model, "a red circle").pixels
want = draw()
if child := os.fork():
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
os._exit(0 if (draw() - want).abs().max() < 1e-3 and torch.get_num_threads() == 1 else 1)
"""
UNGUARDED = """
open("ran", "a").write("once ")
import mrflow as mf
from mrflow.sweep import Sweep, run_sweep
chain = mf.recipes.native(size=(32, 32), steps=1)
done = run_sweep(Sweep({"a": chain}, ["a"], model="toy"), mf.toy(), "out")
print("made", done.made, flush=True)
"""


def script(text: str, folder: Path, *words: str, **env: str | None) -> "subprocess.CompletedProcess[str]":
    """Run a script in a folder, with these variables changed, or taken away (None)."""
    file = folder / "script.py"
    file.write_text(text, "utf-8")
    there = {name: value for name, value in (os.environ | {"PYTHONPATH": ROOT} | env).items() if value is not None}
    return subprocess.run(
        [sys.executable, str(file), *words],
        cwd=folder,
        env=there,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def test_a_forked_process_draws_with_one_thread_and_does_not_wait_for_ever(tmp_path: Path) -> None:
    done = script(FORKED, tmp_path, OMP_NUM_THREADS=None)
    assert done.returncode == 0, done.stderr
    assert "this process was forked, and computes with one thread" in done.stderr


def test_cuda_that_a_fork_broke_is_refused_before_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "_is_in_bad_fork", lambda: True, raising=False)
    check_process(torch.device("cuda"))  # here nothing was forked
    monkeypatch.setattr("mrflow.machine.forks._pid", -1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    check_process(torch.device("cpu"))
    with pytest.raises(PlanError, match=r"CUDA was initialised before this process was forked.*'spawn'"):
        check_process(torch.device("cuda"))


def test_a_script_without_a_guard_is_not_run_twice(tmp_path: Path) -> None:
    """No function of mrflow starts a process that would import the script again."""
    done = script(UNGUARDED, tmp_path)
    assert (done.returncode, done.stdout) == (0, "made 1\n"), done.stderr
    assert (tmp_path / "ran").read_text() == "once "


def homeless(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container whose user has a number and no name."""
    for name in ("HOME", "XDG_CACHE_HOME", "XDG_DATA_HOME", "MRFLOW_CACHE", "MRFLOW_SR"):
        monkeypatch.delenv(name, raising=False)

    def unknown(_: object) -> Any:
        raise KeyError("uid not found")

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.setattr(pwd, "getpwnam", unknown)


def test_without_a_home_it_draws_and_remembers_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    homeless(monkeypatch)
    assert not cache_folder().is_relative_to("~") and cache_folder() == cache_folder()
    chain = mf.recipes.native(size=(32, 32), steps=1)
    assert run_sweep(mf.Sweep({"a": chain}, ["a"], model="toy"), mf.toy(), tmp_path / "s").made == 1
    with pytest.raises(ResourceError, match="this user has no home folder; set XDG_DATA_HOME"):
        shelf.folder()
    assert expand_home("~nobody/x") == Path("~nobody/x")
    with pytest.raises(mf.WeightsError, match="there is no file"):
        mf.load(lora="~nobody/x.safetensors")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "mrflow"


PROMPT = "ein gro\xdfer roter Kreis \N{ROCKET}"


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_other_locales_time_zones_and_masks(tmp_path: Path, umask: int) -> None:
    odd = {"LC_ALL": "C", "LANG": "C", "TZ": "No/Where", "PYTHONIOENCODING": "ascii"}
    words = ["generate", PROMPT, "--recipe", "native", "--steps", "1", "--size", "64x64", "--out", "2\xfc.png"]
    old = os.umask(umask)
    try:
        done = script("from mrflow.cli.app import app\napp()", tmp_path, *words, **odd)
    finally:
        os.umask(old)
    assert done.returncode == 0, done.stderr
    made = tmp_path / "2\xfc.png"
    assert read_record(made)["prompt"] == PROMPT
    assert made.stat().st_mode & 0o777 == 0o666 & ~umask


def test_a_clock_that_jumps_changes_no_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jumps = itertools.cycle((4e9, 1.0, 2e9))
    monkeypatch.setattr(time, "time", lambda: next(jumps))
    monkeypatch.setattr(time, "time_ns", lambda: int(next(jumps) * 1e9))
    done = run_sweep(one(), mf.toy(), tmp_path)
    assert (done.made, done.left) == (2, 0)
    assert all(0 < row.seconds < 60 for row in read(tmp_path))
    assert run_sweep(one(), mf.toy(), tmp_path).before == 2
    assert not list((tmp_path / "leases").iterdir()) and Store(tmp_path).manifest()


def test_files_that_come_with_mrflow_are_found_by_name() -> None:
    found = known_file(f"{NEWEST}-student.safetensors")
    assert found is not None and found.is_file()

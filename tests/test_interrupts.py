"""Ctrl-C, in every phase of every verb: 130, one line, nothing half-written, the user's files as they were."""

import importlib
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

import mrflow as mf
from mrflow.cli.app import app
from mrflow.cli.display import STOPPED, console
from mrflow.machine import interrupts
from mrflow.records.files import TEMPORARY, write_bytes
from mrflow.records.publish import publish

SMALL = ["--size", "64x64", "--low", "32x32", "--steps", "2"]
SWEEP = """
import mrflow as mf
prompts = ["a big red circle", "the word CAT"]
sweep = mf.Sweep({"n": mf.recipes.native(size=(32, 32), steps=1)}, prompts, metrics=[mf.sweep.Sharpness()])
tune = mf.Tune(prompts, [mf.sweep.Sharpness()], "sharpness", 0.0)
"""
STAGED = {f"a-big-red-circle-seed0{part}.png" for part in ("", "-2-decode", "-3-upscale")}
GENERATE = ["generate", "a big red circle", *SMALL]
PHASES = {
    "loading a model": ("mrflow.models.pocket.model:fill_module", GENERATE),
    "encoding the prompt": ("mrflow.models.pocket.model:Pocket.condition", GENERATE),
    "sampling": ("mrflow.models.flux.field:FluxField.velocity", GENERATE),
    "enlarging": ("mrflow.models.pocket.model:PocketSR.__call__", GENERATE),
    "decoding": ("mrflow.models.pocket.networks:PocketAutoencoder.decode", GENERATE),
    "writing": ("os:fsync", [*GENERATE, "--stages"]),
    "naming": ("os:link", [*GENERATE, "--stages"]),
    "removing drafts": ("pathlib:Path.unlink", [*GENERATE, "--stages"]),
    "comparing": ("mrflow.display.sheet:draw_comparison", [*GENERATE, "--compare", "native"]),
    "refining": ("mrflow.models.flux.field:FluxField.velocity", ["refine", "mine.png", "--scale", "2"]),
    "replaying": ("mrflow.models.flux.field:FluxField.velocity", ["replay", "mine.png"]),
    "inspecting a picture": ("mrflow.cli.records:read_record", ["inspect", "mine.png", "--json"]),
    "inspecting a model": ("mrflow.cli.records:inspect_file", ["inspect", "pocket"]),
    "planning": ("mrflow.cli.plan:plan", ["plan"]),
    "reading the sweep's file": ("mrflow.cli.sweeps:load_file", ["sweep", "s.py"]),
    "loading for a sweep": ("mrflow.models.pocket.model:fill_module", ["sweep", "s.py"]),
    "a row": ("mrflow.models.flux.field:FluxField.velocity", ["sweep", "s.py", "--batch", "1"]),
    "a row's picture": ("mrflow.sweep.store:write_bytes", ["sweep", "s.py", "--batch", "1"]),
    "a metric": ("mrflow.sweep.metrics:Sharpness.__call__", ["sweep", "s.py", "--batch", "1"]),
    "a page": ("mrflow.sweep.report:_png", ["report", "sweep"]),
    "writing a page": ("os:fsync", ["report", "sweep", "--csv"]),
    "exporting": ("mrflow.sweep.datasets:write_bytes", ["sweep", "export", "sweep", "--to", "hf"]),
    "tuning": ("mrflow.models.flux.field:FluxField.velocity", ["tune", "s.py", "--trials", "2"]),
    "downloading": (
        "huggingface_hub:snapshot_download",
        ["generate", "a", "--recipe", "native", "--model", "someone/something"],
    ),
}


def press() -> None:
    """What the terminal does for Ctrl-C."""
    signal.raise_signal(signal.SIGINT)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished sweep and a picture."""
    folder = tmp_path_factory.mktemp("done")
    chain = mf.recipes.native(size=(32, 32), steps=1)
    mf.run_sweep(mf.Sweep({"n": chain}, ["a"], model="toy"), mf.toy(), folder / "sweep")
    mf.run(chain, mf.load(), "a big red circle").save(folder / "mine.png")
    return folder


@pytest.mark.parametrize("phase", PHASES)
def test_it_ends_with_130_and_one_line(phase: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, done: Path) -> None:
    where, words = PHASES[phase]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "s.py").write_text(SWEEP)
    (tmp_path / "note.txt").write_text("mine")
    shutil.copytree(done, tmp_path, dirs_exist_ok=True)
    before = contents(tmp_path)
    module, _, name = where.partition(":")
    holder: object = importlib.import_module(module)
    *path, last = name.split(".")
    for part in path:
        holder = getattr(holder, part)
    real: Callable[..., object] = getattr(holder, last)
    pressed: list[bool] = []

    def pressing(*args: object, **options: object) -> object:
        if not pressed:
            pressed.append(True)
            press()
        return real(*args, **options)

    monkeypatch.setattr(holder, last, pressing)
    result = CliRunner().invoke(app, words)
    monkeypatch.undo()
    assert pressed, phase
    assert result.exit_code == 130, result.output
    assert isinstance(result.exception, SystemExit) and "Traceback" not in result.stderr
    after = contents(tmp_path)
    assert {path: after.get(path) for path in before} == before
    assert not [path for path in after if path.name.startswith(TEMPORARY)]
    for path in after.keys() - before.keys():
        if path.suffix == ".png":
            mf.read_image(path)
    made = {path.name for path in after.keys() - before.keys() if path.parent == tmp_path}
    if "--stages" in words:
        assert made in (set(), STAGED)  # all or none
    if "export" in words:
        assert not made and not (tmp_path / "sweep-export").exists()
    if words[0] != "sweep":
        assert result.stderr.strip().splitlines()[-1] == STOPPED
    else:
        monkeypatch.chdir(tmp_path)
        assert not list(tmp_path.glob("*/leases/*.json"))
        if "export" not in words:
            assert CliRunner().invoke(app, words).exit_code == 0


def contents(folder: Path) -> dict[Path, bytes]:
    """What lies below a folder."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_set_of_files_is_named_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, count = os.link, [0]

    def second(*args: object) -> None:
        count[0] += 1
        if count[0] == 2:
            press()
        real(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "link", second)
    with pytest.raises(KeyboardInterrupt):
        publish({tmp_path / name: name.encode() for name in "abc"})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c"]


def test_a_file_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda handle: press())
    with pytest.raises(KeyboardInterrupt):
        write_bytes(tmp_path / "a", b"x")
    assert not list(tmp_path.iterdir())


def test_other_threads_are_not_asked() -> None:
    seen: list[bool] = []

    def inside() -> None:
        with interrupts.hold_signals(), interrupts.listening(lambda number, frame: None, lambda number: None):
            seen.append(True)

    thread = threading.Thread(target=inside)
    thread.start()
    thread.join()
    assert seen


def test_what_comes_of_a_signal_is_no_error_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    """Libraries turn an interruption into errors of theirs."""
    with pytest.raises(SystemExit) as end, console():
        try:
            press()
        except KeyboardInterrupt:
            raise RuntimeError("the download failed") from None
    assert end.value.code == 130 and capsys.readouterr().err == f"{STOPPED}\n"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


STUCK = """
import sys, threading, time
import huggingface_hub
def stuck(*args, **options):
    thread = threading.Thread(target=time.sleep, args=(600,))
    thread.start()
    print("ready", file=sys.stderr, flush=True)
    {how}
huggingface_hub.snapshot_download = stuck
sys.argv = ["mrflow", "generate", "a", "--recipe", "native", "--model", "someone/something"]
from mrflow.cli import main
main()
"""


@pytest.mark.parametrize(
    "how",
    [
        "thread.join()",  # ends, but for the thread
        "while True:\n        try: thread.join()\n        except BaseException: pass",  # nothing interrupts it
    ],
)
def test_what_cannot_be_interrupted_ends_with_the_process(tmp_path: Path, how: str) -> None:
    words, pipe = [sys.executable, "-c", STUCK.format(how=how)], subprocess.PIPE
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    with subprocess.Popen(words, cwd=tmp_path, text=True, stderr=pipe, env=env) as worker:
        assert worker.stderr is not None and worker.stderr.readline() == "ready\n"
        worker.send_signal(signal.SIGINT)
        _, err = worker.communicate(timeout=300)
    assert worker.returncode == 130 and err == f"{STOPPED}\n" and not list(tmp_path.iterdir())


FORKED = """
import os, signal, time
from mrflow.machine.interrupts import listening
told = []
with listening(lambda number, frame: None, told.append):
    if (child := os.fork()) == 0:
        os.kill(os.getpid(), signal.SIGINT)
        os._exit(0)
    os.waitpid(child, 0)
    time.sleep(0.2)
    print(told)
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.2)
    print(told)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_process_tells_its_parent_nothing() -> None:
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", FORKED], capture_output=True, text=True, env=env, check=True)
    assert done.stdout == "[]\n[2]\n"


@pytest.mark.parametrize("number", interrupts.SIGNALS)
def test_it_may_be_stopped_while_it_begins(number: signal.Signals) -> None:
    words = [sys.executable, "-X", "importtime", "-m", "mrflow", "plan"]
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    with subprocess.Popen(words, text=True, stderr=subprocess.PIPE, env=env) as worker:
        assert worker.stderr is not None
        assert any("typer" in line for line in worker.stderr)  # what it imports first
        worker.send_signal(number)
        said = [line for line in worker.stderr.read().splitlines() if not line.startswith("import time:")]
    assert worker.returncode == 128 + number and said in (["stopped"], [STOPPED])

"""The command line against other processes, odd files, odd texts, and streams that take nothing."""

import errno
import io as streams
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

import mrflow as mf
from mrflow.cli import drawing
from mrflow.cli import parsing as words
from mrflow.cli.app import app
from mrflow.cli.display import Plain, console
from mrflow.cli.sweeps import bar
from mrflow.display.notes import counted, printable
from mrflow.errors import ChainError, PlanError, ResourceError
from mrflow.records import pictures as io
from mrflow.records import publish
from mrflow.sweep.local import Progress

CHAIN = """
from dataclasses import dataclass
from sizes_beside import SIZE
import mrflow as mf

@dataclass(frozen=True)
class Dim(mf.Stage[mf.Pixels, mf.Pixels]):
    def plan(self, spec, model):
        return spec

    def apply(self, state, out, ctx):
        return state.data * 0.5

chain = mf.recipes.native(size=SIZE, steps=1) >> Dim()
sweep = mf.Sweep({"dim": chain}, ["a red circle"], seeds=[0])
"""


def mrflow(*arguments: str, cwd: Path, **how: object) -> "subprocess.CompletedProcess[str]":
    """The program as a process of its own."""
    root = str(Path(words.__file__).parents[2])
    line = [sys.executable, "-m", "mrflow", *arguments]
    how.setdefault("stdout", subprocess.PIPE)
    env = os.environ | {"PYTHONPATH": root}
    return subprocess.run(line, cwd=cwd, env=env, text=True, stderr=subprocess.PIPE, check=False, **how)  # type: ignore[call-overload,no-any-return]


def test_files_are_published_all_or_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = tmp_path / "a.png", tmp_path / "b.png"
    publish.publish({a: b"1", b: b"2"})
    assert (a.read_bytes(), b.read_bytes()) == (b"1", b"2")
    a.unlink()
    with pytest.raises(publish.TakenError, match=r"b\.png exists; choose another --out"):
        publish.publish({a: b"3", b: b"4"})
    assert [p.name for p in tmp_path.iterdir()] == ["b.png"] and b.read_bytes() == b"2"
    publish.publish({a: b"5", b: b"6"}, force=True)
    assert b.read_bytes() == b"6"

    def no_links(*names: object) -> None:
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", no_links)
    with pytest.raises(publish.TakenError):
        publish.publish({b: b"7"})
    publish.publish({tmp_path / "c.png": b"8"})
    assert (tmp_path / "c.png").read_bytes() == b"8" and len(list(tmp_path.iterdir())) == 3

    def full(number: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ResourceError, match="No space left on device; nothing was left behind"):
        publish.publish({tmp_path / "d.png": b"9"})
    assert len(list(tmp_path.iterdir())) == 3


def test_a_name_that_is_taken_meanwhile_is_not_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    real = drawing.result_files

    def slow(result: object, path: Path, paths: object) -> dict[Path, bytes]:
        files = real(result, path, paths)  # type: ignore[arg-type]
        if not Path("x-seed0.png").exists():  # what another process writes while this one encodes
            Path("x-seed0.png").write_bytes(b"another's")
        return files

    monkeypatch.setattr(drawing, "result_files", slow)
    small = ["--recipe", "native", "--size", "32x32", "--steps", "1"]
    done = CliRunner().invoke(app, ["generate", "x", *small, "--stages"])
    assert done.exit_code == 0 and "x-seed0-2.png" in done.stdout
    assert Path("x-seed0.png").read_bytes() == b"another's" and io.read_record("x-seed0-2.png")["prompt"] == "x"
    Path("x-seed0.png").unlink()
    done = CliRunner().invoke(app, ["generate", "x", *small, "--out", "x-seed0.png"])
    assert done.exit_code == 2 and "x-seed0.png exists; choose another --out" in done.stderr
    assert Path("x-seed0.png").read_bytes() == b"another's"


NAMES = ("ablate", "random", "statistics", "torch")


@pytest.fixture
def neighbours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder to work in with chain files that are named like modules, and the file beside them that they import."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "sizes_beside.py").write_text("SIZE = (32, 32)\n")
    for name in NAMES:
        (tmp_path / f"{name}.py").write_text(CHAIN)
    yield tmp_path
    sys.modules.pop("sizes_beside", None)


@pytest.mark.parametrize("name", NAMES)
def test_a_chain_file_may_import_neighbours_and_be_named_like_a_module(neighbours: Path, name: str) -> None:
    before = sys.modules.get(name)
    for line in (["run", f"{name}.py:chain", "a red circle", "--out", "x.png"],
                  ["replay", "x.png", "--with", f"{name}.py"]):  # fmt: skip
        done = CliRunner().invoke(app, line)
        assert done.exit_code == 0, done.stderr
    assert name == "ablate" or sys.modules.get(name) is before


def test_files_that_are_named_like_modules_are_in_nobodys_way_where_it_starts(neighbours: Path) -> None:
    """Python itself puts the folder first where it looks for modules."""
    done = mrflow("sweep", "random.py", cwd=neighbours)
    assert done.returncode == 0, done.stderr


def test_errors_of_a_file_name_its_line_and_variable(tmp_path: Path) -> None:
    file = tmp_path / "bad.py"
    file.write_text("import mrflow as mf\n\nchain = (\n    mf.Decode()\n    >> mf.Decode()\n)\n")
    with pytest.raises(ChainError, match=r"^bad\.py, line 4, in chain: Decode \(stage 1\) gives Pixels"):
        words.load_file(file)
    file.write_text("one = 1\nother: int = one + None\n")
    with pytest.raises(PlanError, match=r"^bad\.py, line 2, in other: TypeError"):
        words.load_file(file)
    file.write_text("import sys\nsys.exit('bye')\n")
    with pytest.raises(PlanError, match=r"^bad\.py, line 2: SystemExit: bye"):
        words.load_file(file)
    file.write_bytes(b"x = 1\0")
    with pytest.raises(PlanError, match=r"^bad\.py"):
        words.load_file(file)
    file.write_text("class E(Exception):\n    def __str__(self): raise ValueError\n\nraise E\n")
    with pytest.raises(PlanError, match=r"^bad\.py, line 4: E: $"):
        words.load_file(file)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_streams_that_take_nothing(tmp_path: Path) -> None:
    with open("/dev/full", "w") as full:
        done = mrflow("plan", cwd=tmp_path, stdout=full)
        assert (
            done.returncode == 5 and done.stderr == "error: standard output takes nothing (No space left on device)\n"
        )
        done = mrflow("--help", cwd=tmp_path, stdout=full)
        assert done.returncode == 5 and "Traceback" not in done.stderr and "Exception ignored" not in done.stderr
    read, write = os.pipe()
    os.close(read)
    done = mrflow("plan", cwd=tmp_path, stdout=write)
    os.close(write)
    assert done.returncode == 141 and done.stderr == ""


@pytest.mark.parametrize(("closed", "words"), [(">&-", ["inspect", "x.png"]), ("<&- >&- 2>&-", ["plan"])])
@pytest.mark.skipif(os.name == "nt", reason="needs sh")
def test_streams_that_a_shell_closed_take_everything(closed: str, words: list[str], tmp_path: Path) -> None:
    mf.run(mf.recipes.native(size=(32, 32), steps=1), mf.toy(), "a").save(tmp_path / "x.png")
    line = shlex.join([sys.executable, "-m", "mrflow", *words])
    done = subprocess.run(["sh", "-c", f"exec {line} {closed}"], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_whatever_is_thrown_ends_in_one_line_with_its_traceback_in_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(SystemExit) as ended, console():
        raise KeyError("first\nsecond \x1b[31m")
    assert ended.value.code == 1
    text = capsys.readouterr().err
    (file,) = tmp_path.iterdir()
    assert text.count("\n") == 1 and "error: KeyError: 'first" in text and str(file) in text and "\x1b" not in text
    assert "Traceback" in file.read_text() and "test_display.py" in file.read_text()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "none"))
    with pytest.raises(SystemExit), console():
        raise OSError(errno.EACCES, "no")
    assert "its traceback could not be written" in capsys.readouterr().err


def test_control_characters_are_shown_as_escapes(tmp_path: Path) -> None:
    hostile = "a\x1b]0;title\x07 \x9b31m \u202egnp.exe\x00 \u2066 \ud800 héllo 🙂 family 👨‍👩‍👧\nline\ttab"
    shown = printable(hostile)
    assert shown == r"a\x1b]0;title\x07 \x9b31m \u202egnp.exe\x00 \u2066 \ud800 " + "héllo 🙂 family 👨‍👩‍👧\nline\ttab"
    record = {
        "format": 1,
        "prompt": hostile[:-9] + "\rx",
        "model": "\x1b[2J",
        "stages": [{"name": "\x1b", "out": "\x07"}],
    }
    from PIL import Image

    io.write_png(tmp_path / "x.png", Image.new("RGB", (8, 8)), record)
    for option in ([], ["--json"]):
        done = CliRunner().invoke(app, ["inspect", str(tmp_path / "x.png"), *option])
        assert done.exit_code == 0 and not set(done.stdout) & set("\x1b\x07\x9b\u202e\r\x00")
    assert json.loads(done.stdout)["model"] == "\x1b[2J"
    done = CliRunner().invoke(app, ["replay", str(tmp_path / "x.png"), "--out", str(tmp_path / "y.png")])
    assert done.exit_code == 2 and "\x1b" not in done.stderr


def test_texts_are_printed_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    text = "mine.py:X:Y [red]a :smile: [/b]"
    with pytest.raises(SystemExit), console() as err:
        err.print(text)
        raise PlanError(text)
    assert capsys.readouterr().err.splitlines() == [text, f"error: {text}"]
    shown = Plain(file=streams.StringIO(), force_terminal=True, width=200, emoji=False)
    with bar(shown) as show:
        show(Progress(1, 0, 2, None, text))
    assert text in shown.file.getvalue()  # type: ignore[attr-defined]


def test_a_console_survives_a_stream_that_takes_nothing() -> None:
    class Full:
        encoding = "utf-8"

        def write(self, text: str) -> int:
            raise OSError(errno.ENOSPC, "full")

        def flush(self) -> None:
            raise OSError(errno.ENOSPC, "full")

    Plain(file=Full()).print("hello")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "words",
    [["{}"], ["--{}"], ["generate", "a", "--{}"], ["generate", "--{}=1"], ["sweep", "run", "--{}"]],
    ids=" ".join,
)
def test_words_that_are_no_options_are_said_harmlessly(words: list[str]) -> None:
    hostile = "x\x1b[2J\u202ey"
    done = CliRunner().invoke(app, [word.format(hostile) for word in words])
    assert done.exit_code == 2 and r"x\x1b[2J\u202ey" in done.output
    assert not set(done.output) & set("\x1b\u202e")


def test_one_thing_is_no_plural() -> None:
    assert [counted(n, "row") for n in (0, 1, 2)] == ["0 rows", "1 row", "2 rows"]

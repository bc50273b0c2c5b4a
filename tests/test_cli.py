"""The command line, as a person meets it: exit codes, texts, files."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

import mrflow as mf
from mrflow.checkpoints.adapters import check_loras
from mrflow.cli.app import app
from mrflow.cli.options import ModelOptions, option_of
from mrflow.models.pocket.model import NEWEST

SMALL = ["--size", "64x64", "--low", "32x32", "--steps", "2"]
MINE = """
from dataclasses import dataclass
import mrflow as mf

@dataclass(frozen=True)
class Invert(mf.Stage[mf.Pixels, mf.Pixels]):
    def plan(self, spec, model):
        return spec

    def apply(self, state, out, ctx):
        return 1 - state.data

chain = mf.recipes.paper(low=(32, 32), size=(64, 64), steps=2) >> Invert()
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to stand in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def call(*words: str) -> tuple[int, str, str]:
    """Exit code, stdout, stderr."""
    result = CliRunner().invoke(app, list(words))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def test_generate_inspect_replay(here: Path) -> None:
    code, out, err = call("generate", "a big red circle at the left", *SMALL)
    assert code == 0
    assert out.strip() == "a-big-red-circle-at-the-left-seed0.png"
    assert "Refine" in err and "total" in err
    code, text, _ = call("inspect", out.strip())
    assert code == 0 and "prompt    a big red circle at the left" in text and "Reinject" in text
    code, again, _ = call("replay", out.strip())
    assert code == 0
    from mrflow.records.pictures import read_image

    assert bool((read_image(here / again.strip()) == read_image(here / out.strip())).all())


def test_a_second_picture_overwrites_nothing(here: Path) -> None:
    names = [call("generate", "a", *SMALL)[1].strip() for _ in range(2)]
    assert names == ["a-seed0.png", "a-seed0-2.png"]
    code, _, err = call("generate", "a", *SMALL, "--out", "a-seed0.png")
    assert code == 2 and "a-seed0.png exists; choose another --out, or overwrite it with --force" in err
    assert call("generate", "a", *SMALL, "--out", "a-seed0.png", "--force")[0] == 0


def test_stages_and_compare(here: Path) -> None:
    code, _, err = call("generate", "a", "b", *SMALL, "--stages", "--compare", "native", "--out", "x.png")
    assert code == 0
    assert {p.name for p in here.iterdir()} == {
        "x-0.png", "x-1.png", "x-compare.png",
        "x-0-2-decode.png", "x-1-2-decode.png", "x-0-3-upscale.png", "x-1-3-upscale.png",
    }  # fmt: skip
    assert "x faster" in err


def test_json(here: Path) -> None:
    code, out, _ = call("generate", "a", *SMALL, "--json")
    assert code == 0
    data = json.loads(out)
    assert data["records"][0]["seed"] == 0 and Path(data["paths"][0]).is_file()


def test_run_a_file_of_ones_own(here: Path) -> None:
    (here / "mine.py").write_text(MINE)
    code, out, err = call("run", "mine.py:chain", "a", "--out", "x.png")
    assert (code, out.strip()) == (0, "x.png"), err
    code, _, err = call("replay", "x.png")
    assert code == 2 and "made with Invert from mine" in err
    assert call("replay", "x.png", "--with", "mine.py")[0] == 0
    assert call("plan", "mine.py:chain")[1].count("->") == 8


def test_plan_loads_no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("mrflow.models.pocket.model.load_pocket", refuse)
    for model in ("pocket", "flux1-dev", "flux1-schnell", "qwen-image"):
        code, out, err = call("plan", "--model", model)
        assert code == 0, err
        assert "Reinject" in out and "less" in out
    data = json.loads(call("plan", "--model", "flux1-dev", "--json")[1])
    assert data["nfe"] == 13 and data["stages"][0]["tokens"] == 1024


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (["generate", "a", "--size", "100x60"], 2, "size 100x60 is not a multiple of 16; try 96x64"),
        (
            ["generate", "a", "--size", "big"],
            2,
            "--size must be HEIGHTxWIDTH in pixels, such as 256x256, or an aspect (16:9), got 'big'",
        ),
        (["generate", "a", "--size", "0"], 2, "height must be from 16"),
        (["generate", "a", "--size", "240x240"], 2, "half of 240x240 is not a multiple of 16; try 256x256"),
        (["generate", "a", "--steps", "0"], 2, "--steps must be"),
        (["generate", "a", "--steps", "-1"], 2, "steps must be"),
        (["generate", "a", "--steps", "10000000"], 2, "steps must be"),
        (["generate", "a", "--steps", "1.5"], 2, ""),
        (["generate", "a", "--sigma", "nan"], 2, "sigma must be above 0 and at most 1"),
        (["generate", "a", "--sigma", "2"], 2, "sigma must be above 0 and at most 1"),
        (["generate", "a", "--seed", "-1"], 2, "--seed must be a whole number from 0"),
        (["generate", "a", "--batch", "0"], 2, "--batch must be at least 1"),
        (["generate", "a", "--recipe", "fast"], 2, "there is no recipe 'fast'; use paper, official, native, lift"),
        (["generate", "a", "--sr", "magic"], 2, "--sr takes own, nearest"),
        (["generate", "a", "--model", "nothing"], 3, "there is no model or file 'nothing'"),
        (["generate", "a", "--model", "flux1-dev"], 3, "is a name for planning"),
        (["generate", "a", "--device", "abacus"], 2, "error: --device must be auto, cpu, cuda, cuda:N or mps"),
        (["generate", "a", "--offload", "some"], 2, "error: --offload must be none, phase, block, got 'some'"),
        (["generate", "a", "--storage", "int4"], 2, "error: --storage takes fp8, got 'int4'"),
        (["generate", "a", "--refine-steps", "0"], 2, "error: --refine-steps must be a whole number from 1"),
        (["refine", "none.png", "--refine-steps", "0"], 2, "error: --refine-steps must be a whole number from 1"),
        (["generate", "a", "--out", "no/x.png"], 5, "the folder no does not exist"),
        (["generate", "a", "--out", "x.jpg"], 2, "--out must end in .png"),
        (["generate", "a", "--compare", "x"], 2, "--compare takes native"),
        (["generate", "a\0b"], 2, "NUL or a lone surrogate"),
        (
            ["plan", "--model", "nothing"],
            2,
            "there is no model 'nothing' to plan; known are pocket, " + NEWEST + ", flux1-dev",
        ),
        (["plan", "none.py:chain"], 2, "there is no Python file none.py in "),
        (["plan", "chain"], 2, "a chain is named file.py:name"),
        (["inspect", "none.png"], 5, "cannot be read"),
        (["replay", "none.png"], 5, "cannot be read"),
        (["generate"], 2, ""),
    ],
)
def test_mistakes_end_with_a_word_and_a_code(here: Path, words: list[str], code: int, text: str) -> None:
    got, out, err = call(*words)
    assert got == code, err
    assert text in err
    assert "Traceback" not in err
    assert not list(here.iterdir()) and out == ""


def test_a_file_that_fails_names_its_line(here: Path) -> None:
    (here / "bad.py").write_text("import mrflow as mf\n\nchain = 1 / 0\n")
    code, _, err = call("run", "bad.py:chain", "a")
    assert code == 2 and "bad.py, line 3, in chain: ZeroDivisionError" in err
    (here / "other.py").write_text("import mrflow as mf\nsteps = mf.Decode()\n")
    assert "has no 'chain'; its chains are steps" in call("run", "other.py:chain", "a")[2]


def test_odd_prompts_are_drawn(here: Path, caplog: pytest.LogCaptureFixture) -> None:
    for i, prompt in enumerate(["", "   ", "🙂 ‮abc", "purple elephants " * 400]):
        assert call("generate", prompt, *SMALL, "--out", f"{i}.png")[0] == 0
    assert "pocket does not know 'elephants'" in caplog.text


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root writes everywhere")
def test_a_read_only_folder_is_named(here: Path) -> None:
    here.chmod(0o500)
    code, _, err = call("generate", "a", *SMALL)
    here.chmod(0o700)
    assert code == 5 and "cannot be written" in err


@pytest.mark.parametrize(("option", "name"), [("--stages", "x-2-decode.png"), ("--compare", "x-compare.png")])
def test_nothing_beside_the_picture_is_overwritten(here: Path, option: str, name: str) -> None:
    (here / name).write_bytes(b"mine")
    words = ["generate", "a", *SMALL, "--out", "x.png", option, *(["native"] if option == "--compare" else [])]
    code, _, err = call(*words)
    assert code == 2 and name in err and "--force" in err
    assert (here / name).read_bytes() == b"mine" and len(list(here.iterdir())) == 1


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_leave_no_half_file(here: Path, number: int, code: int) -> None:
    words = [sys.executable, "-m", "mrflow", "generate", "a", "--recipe", "native", "--steps", "1000", "--out", "x.png"]
    process = subprocess.Popen(
        words,
        stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored in a background job
    )
    deadline = time.monotonic() + 60
    while not _busy(process.pid) and time.monotonic() < deadline:
        time.sleep(0.2)
    process.send_signal(number)
    assert process.wait(60) == code
    assert process.stderr is not None
    assert b"Traceback" not in process.stderr.read()
    process.stderr.close()
    assert not list(here.iterdir())


def _busy(pid: int) -> bool:
    """Whether a process has computed for three seconds: past its imports."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK") > 4


@pytest.mark.slow
def test_help_is_quick_and_imports_are_light(here: Path) -> None:
    code = (
        "import sys, mrflow.cli.app; assert 'torch' not in sys.modules; import mrflow; mrflow.run; "
        "bad = {'transformers', 'diffusers', 'matplotlib', 'torchvision'} & set(sys.modules); assert not bad, bad"
    )
    bare = {k: v for k, v in os.environ.items() if k != "HOME"}
    subprocess.run([sys.executable, "-c", code], check=True, env=bare, cwd=here)
    done = subprocess.run(
        [sys.executable, "-m", "mrflow", "--help"], check=True, capture_output=True, env=bare, cwd=here
    )
    assert b"generate" in done.stdout
    assert not list(here.iterdir())


def test_rivals_by_name(here: Path) -> None:
    for words, stage in (
        (("speed",), "Grow"),
        (("speed", "--steps", "3,2,7"), "Grow"),
        (("ralu",), "SampleRegions"),
        (("ralu", "--steps", "1,2,3"), "SampleRegions"),
        (("selflift", "--steps", "3,1"), "SelfLift"),
        (("jit",), "SampleAnchors"),
        (("jit", "--steps", "4,3,4"), "SampleAnchors"),
        (("fresco", "--steps", "4,2,3"), "SampleConverged"),
        (("lift",), "Lift"),
    ):
        code, out, err = call("plan", "--model", "flux1-dev", "--recipe", *words)
        assert code == 0, err
        assert stage in out
    code, out, err = call("generate", "a big red circle", "--recipe", "lift", "--steps", "1,1", "--size", "64x64")
    assert code == 0, err
    for words, message in (
        (("speed", "--steps", "3,2,7,1"), "--steps must be 3 whole numbers"),
        (("jit", "--steps", "7,4"), "--steps must be 3 whole numbers"),
        (("lift", "--steps", "x"), "--steps takes a count, or counts for each resolution"),
        (("paper", "--steps", "3,2"), "gives counts for each resolution"),
        (("best",), "use paper, official, native, lift, speed, selflift, ralu, jit or fresco"),
    ):
        code, _, err = call("plan", "--model", "flux1-dev", "--recipe", *words)
        assert code == 2
        assert message in err.replace("\n", " ")


def test_short_help_and_the_version(here: Path) -> None:
    from mrflow import __version__

    assert call("--version")[:2] == (0, f"mrflow {__version__}\n")
    code, out, _ = call("-h")
    assert code == 0 and "--install-completion" in out and "generate" in out
    assert call("plan", "-h")[0] == 0


@pytest.mark.parametrize("verb", ["generate", "run", "refine", "replay", "sweep", "tune"])
def test_every_verb_that_loads_a_model_has_the_same_options_for_it(here: Path, verb: str) -> None:
    words = call(verb, "-h")[1]
    wanted = {option_of(field.name) for field in dataclasses.fields(ModelOptions)}
    names = [
        "device",
        "dtype",
        "offload",
        "storage",
        "compute",
        "vae",
        "text",
        "compile",
        "lora",
        "shift",
        "text-tokens",
    ]
    assert wanted == {f"--{name}" for name in names}
    assert wanted <= set(re.findall(r"^ +(--[a-z-]+)", words, re.MULTILINE))


def test_the_words_reach_the_model(here: Path) -> None:
    file = check_loras(mf.students.POCKET.lora)[0].path
    code, out, err = call("generate", "a", *SMALL, "--lora", f"{file}:0.5", "--dtype", "bfloat16", "--json")
    assert code == 0, err
    assert json.loads(out)["records"][0]["weights"] != mf.load("pocket").info.version
    assert call("generate", "a", *SMALL, "--dtype", "float8")[0] == 2

"""Words of the command line: slots, prompts, seeds, sizes; what does nothing is refused; what is shown fits."""

import inspect
import io
import json
import os
import re
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch
import typer
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

import mrflow as mf
from mrflow.checkpoints.safetensors import fill_module
from mrflow.cli import drawing
from mrflow.cli.app import VERBS, app
from mrflow.cli.chains import build, enlargement
from mrflow.cli.display import WORDS, in_options, wrap
from mrflow.cli.options import RECIPE_WORDS, DrawOptions, ModelOptions, SlotOptions
from mrflow.cli.parsing import load_model, pairs_of, parse_seeds, parse_shift, read_prompts
from mrflow.cli.plan import plan_text
from mrflow.cli.records import difference_text, pixel_difference
from mrflow.cli.sweeps import plan_lines
from mrflow.display.sheet import stage_table
from mrflow.errors import PlanError
from mrflow.models import info
from mrflow.models.pocket.model import NEWEST
from mrflow.records.pictures import describe_record
from tests.test_cli import call, here  # noqa: F401

SMALL = ["--size", "64x64", "--low", "32x32", "--steps", "2"]
OPTIONS = {
    "storage": "--storage",
    "compute": "--compute",
    "start": "--start",
    "sigma": "--sigma",
    "own": "--with",
    "sr": "--sr",
}


def test_slots_are_the_words_of_python() -> None:
    words = {
        "solver": "Heun",
        "schedule": "Karras(rho=5)",
        "guidance": "Interval(CFG(3), 0.2, 1)",
        "cache": "TeaCache(0.3)",
    }
    chain = build("paper", mf.POCKET, size="64", low="32", steps="5", **words)
    assert chain == mf.recipes.paper(
        size=(64, 64), low=(32, 32), schedule=mf.Karras(5, rho=5), solver=mf.Heun(), cache=mf.caches.TeaCache(0.3),
        guidance=mf.Interval(mf.CFG(3), 0.2, 1),
    )  # fmt: skip
    assert enlargement((64, 64), None, mf.POCKET, sigma=0.2, refine_steps=3, schedule="Linear") == mf.recipes.enlarge(
        (64, 64), sigma=0.2, schedule=mf.Linear(3)
    )
    rung = build("paper", mf.POCKET, ladder="32,64,96", schedule="Beta", cache="DBCache").stages[0]
    assert rung == mf.Sample(32, 32, mf.Beta(12), cache=mf.caches.DBCache())


def test_a_number_is_the_models_own_kind_of_guidance() -> None:
    def of(info: mf.ModelInfo) -> Any:
        return vars(build("native", info, guidance="3.5").stages[0])["guidance"]

    assert of(mf.FLUX) == mf.Distilled(3.5)
    assert of(mf.QWEN) == mf.CFG(3.5, rescale=True) and of(mf.POCKET) == mf.CFG(3.5)


def test_slots_of_ones_own(here: Path) -> None:  # noqa: F811
    (here / "mine.py").write_text(
        "from dataclasses import dataclass\nimport mrflow as mf\n\n@dataclass(frozen=True)\nclass Half(mf.Euler):\n"
        "    pass\n\nslow = Half()\n"
    )
    for word in ("mine.py:Half", "mine.py:slow"):
        solver = vars(build("native", mf.POCKET, solver=word).stages[0])["solver"]
        assert type(solver).__name__ == "Half"
    with pytest.raises(PlanError, match="--solver: there is no solver 'Hal'; did you mean Half"):
        build("native", mf.POCKET, solver="mine.py:Hal")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--recipe native --sigma 0.2", "--sigma does nothing with the recipe native"),
        ("--recipe native --low 64", "--low does nothing with the recipe native"),
        ("--recipe native --sr lanczos", "--sr does nothing with the recipe native"),
        ("--recipe native --sr own", "--sr does nothing with the recipe native"),
        ("--recipe native --refine-steps 1", "--refine-steps does nothing with the recipe native"),
        ("--recipe official --solver Heun", "--solver does nothing with the recipe official"),
        ("--recipe speed --cache TeaCache", "--cache does nothing with the recipe speed"),
        ("--recipe ralu --schedule Linear", "--schedule does nothing with the recipe ralu"),
        (
            "--recipe jit --schedule Karras",
            "--schedule: Karras(steps, *, rho=7.0, low=None): missing a required argument",
        ),
        ("--recipe lift --sr lanczos", "--sr does nothing with the recipe lift"),
        ("--sr latent-nearest --cache TeaCache", "--cache does nothing with --sr latent-nearest"),
        ("--schedule Karras(4) --steps 2", "--schedule Karras(4) has steps of its own; leave out --steps 2"),
        (
            "--low 512",
            "--low 512 must be smaller, on both sides, than 128x128, pocket's own size (--size takes another)",
        ),
        ("--size 64 --low 64x32", "--low 64x32 must be smaller, on both sides, than --size 64"),
        ("--ladder 128,64", "--ladder 128,64: sizes must rise, 128x128 is followed by 64x64"),
        ("--size 0", "--size 0: height must be from 16 to"),
        ("--low 100x60", "--low 100x60: size 100x60 is not a multiple of 16; try 96x64"),
        ("--sigma 2", "Reinject(...): --sigma must be above 0 and at most 1"),
        ("--guidance nan", "error: --guidance must be a finite number of at least 0, got nan"),
        ("--guidance -1", "error: --guidance must be a finite number of at least 0, got -1"),
        ("--guidance 1e9", "error: --guidance must be at most 1000"),
        ("--guidance CFG(nan)", "error: --guidance: CFG: scale must be a finite number of at least 0, got nan"),
        ("--schedule Karras(rho=inf)", "error: --schedule: Karras: rho must be a finite number, got inf"),
        ("--tiles 0", "error: --tiles 0: a tile's size must be"),
        ("--tiles 64,64", "error: --tiles 64,64: a tile's overlap must be"),
        ("--size 1:0", "error: --size 1:0: an aspect is width:height"),
        ("--solver heun", "--solver: there is no solver 'heun'; did you mean Heun?"),
        ("--guidance CFG", "--guidance: CFG(scale, *, rescale=False, packed=True): missing a required argument"),
        ("--cache TeaCache --steps 2 --schedule Heun", "--schedule: 'Heun' is no schedule; there are "),
        ("--shift 3", "pocket takes no --shift: it is one small file"),
        ("--model flux1-dev --shift three", "--shift takes a factor, Shift(low, high), or a model's name (flux1-dev"),
        ("--model qwen-image --text-tokens 64", "--text-tokens is for FLUX.1"),
        ("--model flux1-dev --text-tokens 0", "--text-tokens must be a whole number from 1 to 512"),
        ("x.py:chain --steps 3 --sr own", "--steps, --sr does nothing beside x.py:chain"),
    ],
)
def test_what_does_nothing_or_cannot_be_is_refused(here: Path, words: str, said: str) -> None:  # noqa: F811
    code, out, err = call("plan", *words.split())
    assert code == 2 and said in err, err
    assert out == "" and "Traceback" not in err


def test_every_recipe_plans_with_what_it_takes(here: Path) -> None:  # noqa: F811
    for recipe in re.split(", | or ", RECIPE_WORDS):
        code, out, err = call("plan", "--recipe", recipe, "--model", "flux1-dev", "--json")
        assert code == 0 and json.loads(out)["nfe"], err
    assert call("plan", "--recipe", "lift", "--sigma", "0.5", "--steps", "2,1")[0] == 0


def test_the_shift_and_text_of_a_plan(here: Path) -> None:  # noqa: F811
    def planned(*words: str) -> str:
        code, out, err = call("plan", "--model", "flux1-schnell", "--recipe", "native", "--steps", "2", *words)
        assert code == 0, err
        return out

    assert "text of 256 tokens" in planned() and "1 0.5 0" in planned()
    assert "1 0.75 0" in planned("--shift", "3") == planned("--shift", "Shift.fixed(3)")
    assert "mu 0.5 at 256 tokens, 1.15 at 4096" in planned("--shift", "flux1-dev")
    assert "text of 77 tokens" in planned("--text-tokens", "77")
    assert parse_shift(None) is None and parse_shift("3") == 3.0


def test_the_words_reach_load(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}
    monkeypatch.setattr("mrflow.models.load", lambda where, **given: seen.update(given, where=where))
    load_model("x", ModelOptions(shift="3", text_tokens=77))
    assert (seen["where"], seen["shift"], seen["text_tokens"]) == ("x", 3.0, 77)


def test_prompts_from_files_and_stdin(here: Path) -> None:  # noqa: F811
    (here / "p.txt").write_bytes("\ufeffone\n\n  \nzwei Äpfel\r\n".encode())
    assert read_prompts(["@p.txt", "x", "@@home"]) == ["one", "zwei Äpfel", "x", "@home"]
    (here / "empty.txt").write_text("\n \n")
    (here / "bad.txt").write_bytes(b"\xff\xfe\x00")
    for word, said in (
        ("@none.txt", "@none.txt names a file of prompts: No such file or directory; a prompt that begins with @ is"),
        ("@empty.txt", "there is no prompt in empty.txt"),
        ("@bad.txt", "not UTF-8"),
        ("@", "names a file of prompts"),
    ):
        with pytest.raises(PlanError, match=re.escape(said)):
            read_prompts([word])
    words = ["generate", "-", "--recipe", "native", "--steps", "1", "--size", "64", "--seed", "1,5", "--json"]
    done = CliRunner().invoke(app, words, input="a big red circle at the left\nthe big blue word CAT\n")
    assert done.exit_code == 0, done.stderr
    made = json.loads(done.stdout)
    pairs = [(r["prompt"].split()[-1], r["seed"]) for r in made["records"]]
    assert pairs == [("left", 1), ("left", 5), ("CAT", 1), ("CAT", 5)]
    assert [mf.read_record(path)["seed"] for path in made["paths"]] == [1, 5, 1, 5]


def test_seeds() -> None:
    assert parse_seeds("3", 2) == [3, 4] and parse_seeds("1,5,9", 1) == [1, 5, 9]
    for word, batch, said in (("1,x", 1, "--seed takes"), ("1,5", 2, "leave out --batch 2"), ("1", 0, "--batch must")):
        with pytest.raises(PlanError, match=said):
            parse_seeds(word, batch)
    with pytest.raises(PlanError, match="2000 pictures are more than the 1024"):
        pairs_of(["a", "b"], DrawOptions(batch=1000))


def drawn(tmp_path: Path, options: DrawOptions, prompts: list[str]) -> list[Path]:
    """Pictures of the toy."""
    chain = mf.recipes.native(size=(16, 16), steps=2)
    err = Console(file=io.StringIO())
    out = tmp_path / "x.png"
    pairs = [(p, s) for p in prompts for s in parse_seeds(options.seed, 1)]
    drawing.draw(err, lambda info: (chain, None), lambda on_facts: mf.toy(), pairs, options, name=out)
    return sorted(tmp_path.glob("*.png"))


def test_a_chain_is_planned_once_and_before_weights_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    plan_row = mf.Sample.plan_row

    def planned(self: mf.Sample, *given: Any) -> Any:
        done.append("planned")
        return plan_row(self, *given)

    def read(*given: Any, **how: Any) -> None:
        done.append("read")
        fill_module(*given, **how)

    monkeypatch.setattr(mf.Sample, "plan_row", planned)
    monkeypatch.setattr("mrflow.models.pocket.model.fill_module", read)
    words = ["generate", "a big red circle", "--recipe", "native", "--steps", "1", "--out", str(tmp_path / "x.png")]
    assert CliRunner().invoke(app, [*words, "--size", "64x72"]).exit_code == 2
    assert "read" not in done
    done.clear()
    assert CliRunner().invoke(app, [*words, "--size", "64x64"]).exit_code == 0
    assert done[0] == "planned" and done.count("planned") == 1 and "read" in done


def test_many_pictures_are_drawn_and_saved_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [f"prompt {i}" for i in range(11)]
    whole = tmp_path / "whole"
    whole.mkdir()
    monkeypatch.setattr(drawing, "TOGETHER", 64)
    at_once = drawn(whole, DrawOptions(seed="0,7"), prompts)
    monkeypatch.setattr(drawing, "TOGETHER", 6)
    real, seen = drawing.result_files, list[int]()

    def counted(result: Any, path: Path, paths: Any) -> Any:
        seen.append(len(list(tmp_path.glob("x-*.png"))))
        return real(result, path, paths)

    monkeypatch.setattr(drawing, "result_files", counted)
    in_parts = drawn(tmp_path, DrawOptions(seed="0,7"), prompts)
    assert seen == [0, 6, 12, 18]  # a part is on disk before the next is made
    assert [p.name for p in in_parts] == [p.name for p in at_once] and len(in_parts) == 22
    for a, b in zip(at_once, in_parts, strict=True):
        one, other = mf.read_record(a), mf.read_record(b)
        assert (one["prompt"], one["seed"]) == (other["prompt"], other["seed"])
        assert pixel_difference(mf.read_image(a), mf.read_image(b))["same"]


def test_a_negative_prompt_that_nothing_reads(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="--negative does nothing with this chain: toy draws without a second branch"):
        drawn(tmp_path, DrawOptions(negative="blur"), ["a"])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("storage must be None or 'fp8', got 'x'", "--storage must be None or 'fp8', got 'x'"),
        ("stage 5 of 7, Reinject(...): sigma must be above 0", "stage 5 of 7, Reinject(...): --sigma must be above 0"),
        (
            "the chain takes Pixels, but is given Start; pass start=",
            "the chain takes Pixels, but is given Start; pass --start",
        ),
        ("give it, --start FILE or start=", "give it, --start FILE"),
        ("name its file, --with FILE, or pass that class: replay(..., types=[Invert])", "name its file, --with FILE"),
        ("no such device; use storage='fp8'", "no such device; use --storage fp8"),
        ("stage 1, Sample(64, sigma=3): no", "stage 1, Sample(64, sigma=3): no"),
        ("a cosine=3 must be", "a cosine=3 must be"),
        ("a sigma must be a number", "--sigma must be a number"),
        ("a schedule must be a Schedule", "a schedule must be a Schedule"),
        ("scale must be at least 0", "scale must be at least 0"),
    ],
)
def test_errors_speak_of_options(text: str, want: str) -> None:
    token = WORDS.set(OPTIONS)
    try:
        assert in_options(text) == want
    finally:
        WORDS.reset(token)
    assert "--" in text or in_options(text) == text  # outside of a verb Python is meant


def test_start_and_own_stages_are_options(here: Path) -> None:  # noqa: F811
    (here / "up.py").write_text("import mrflow as mf\nchain = mf.Upscale(mf.Lanczos(2), (32, 32)) >> mf.Quantise()\n")
    Image.new("RGB", (16, 16), "red").save("p.png")
    code, _, err = call("plan", "up.py:chain")
    assert code == 2 and err.rstrip().endswith("pass --start")
    (here / "bare.py").write_text("x = 1\n")
    assert "bare.py has no 'chain'; it defines no chains" in call("plan", "bare.py:chain")[2]
    assert "32x32" in call("plan", "up.py:chain", "--start", "p.png")[1]
    code, _, err = call("run", "up.py:chain", "a", "--start", "p.png", "--out", "q.png")
    assert code == 0 and mf.read_image("q.png").shape == (1, 3, 32, 32), err
    assert call("replay", "q.png", "--start", "p.png", "--check")[0] == 0
    code, _, err = call("plan", "--start", "p.png")
    assert code == 2 and "--start does nothing with a recipe" in err


def test_refine_reads_a_picture_once(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """The note, the record and the pixels are of the same bytes, whatever becomes of the file meanwhile."""
    Image.new("RGB", (16, 16), "red").save("p.png")
    read, real = list[str](), os.open
    monkeypatch.setattr(os, "open", lambda path, *rest, **named: read.append(str(path)) or real(path, *rest, **named))
    code, _, err = call("refine", "p.png", "--scale", "1e9")
    assert code == 2 and "pocket knows only its own world" in err, err
    assert [Path(path).name for path in read].count("p.png") == 1


def test_replay_checks_the_pixels(here: Path) -> None:  # noqa: F811
    words = ["--recipe", "native", "--steps", "1", "--size", "64"]
    assert call("generate", "a big red circle at the left", *words, "--out", "x.png")[0] == 0
    code, out, _ = call("replay", "x.png", "--check")
    assert (code, out) == (0, "x.png: the same 4096 pixels\n") and [p.name for p in here.iterdir()] == ["x.png"]
    with Image.open("x.png") as opened:
        image = opened.copy()
    image.putpixel((3, 4), tuple(min(255, c + 2) if c < 200 else c - 2 for c in image.getpixel((3, 4))))  # type: ignore
    record = mf.read_record("x.png")
    from mrflow.records.pictures import write_png

    write_png(Path("y.png"), image, record)
    code, out, _ = call("replay", "y.png", "--check")
    assert code == 4 and "1 of 4096 pixels differ, by at most 2 of 255 levels, PSNR" in out
    assert json.loads(call("replay", "y.png", "--check", "--json")[1])["pixels"] == 1
    write_png(Path("z.png"), image.resize((32, 32)), record)
    code, out, _ = call("replay", "z.png", "--check")
    assert code == 4 and "it is 32x32, its record makes 64x64" in out
    assert "--force does nothing beside --check" in call("replay", "x.png", "--check", "--force")[2]


def test_differences_are_said() -> None:
    a = torch.zeros(1, 3, 2, 2)
    b = a.clone()
    b[0, :, 0, 0] = 1
    said = pixel_difference(a, b)
    assert said == {"same": False, "pixels": 1, "of": 4, "levels": 255, "psnr": 6.02}
    assert difference_text(pixel_difference(a, a)) == "the same 4 pixels"


def test_the_chunk_that_other_tools_read(here: Path) -> None:  # noqa: F811
    words = ["--recipe", "native", "--steps", "2", "--size", "64x96", "--solver", "Heun", "--guidance", "3"]
    assert call("generate", "purple élan 日本", *words, "--negative", "grey", "--out", "x.png", "--seed", "4")[0] == 0

    def told(path: Path) -> str:
        with Image.open(path) as image:
            return str(image.info["parameters"])

    assert told(here / "x.png") == (
        "purple élan 日本\nNegative prompt: grey\n"
        "Steps: 2, Sampler: Heun, Schedule type: Shifted, CFG scale: 3, Seed: 4, "
        f"Size: 96x64, Model: pocket, Version: mrflow {mf.__version__}"
    )
    latin = mf.run(mf.recipes.paper(size=(32, 32), low=(16, 16), steps=1), mf.toy(), "a").save("y.png")[0]
    assert "Denoising strength: 0.12" in told(latin)
    assert b"tEXtparameters\0a\nSteps" in latin.read_bytes()


def test_inspect_says_every_setting_and_the_machine(here: Path) -> None:  # noqa: F811
    lora = mf.students.POCKET.lora
    chain = mf.recipes.paper(
        size=(64, 64), low=(32, 32), steps=2, solver=mf.Heun(), guidance=mf.CFG(3), sigma=0.2, lora=lora
    )
    mf.run(chain, mf.load("pocket"), "a big red circle at the left").save("x.png")
    code, out, err = call("inspect", "x.png")
    assert code == 0, err
    for text in (
        "Sample(32, 32, Shifted(2), ", "solver=Heun()", "guidance=CFG(3)", "Reinject(0.2, ", "Refine(DirectSigma(1)",
        "2 steps, sigma 1 ", "1 step, sigma 0.2 0", "shift     Shift(0.7, 1.4", "guidance  CFG(2", "64x64",
        f"torch {torch.__version__}", "Python 3.",
    ):  # fmt: skip
        assert text in out, (text, out)
    assert f"{NEWEST}-student.safetensors" in out
    assert json.loads(call("inspect", "x.png", "--json")[1])["machine"]


def test_a_record_of_an_older_mrflow_is_described() -> None:
    stage = {"name": "SampleRegionsOfMine", "out": "Latents", "seconds": 1.0}
    lines = describe_record({"prompt": "a", "stages": [stage, {"name": "Decode"}], "chain": [{"type": "Gone", "x": 3}]})
    assert "     Gone(x=3)" in lines
    assert [line.index("Latents") for line in lines if "Latents" in line] == [len("  1  SampleRegionsOfMine  ")]


@pytest.mark.parametrize("columns", [60, 120])
def test_help_fits_the_terminal_and_cuts_no_sentence(columns: int) -> None:
    lists = 0
    verbs = [str(each.name) for each in app.registered_commands]
    for words in ("", *verbs, "sweep run", "sweep export", "sr", "sr add", "sr list"):
        done = CliRunner().invoke(app, [*words.split(), "--help"], terminal_width=columns)
        out = done.stdout
        assert done.exit_code == 0 and max(map(len, out.splitlines())) <= columns, out
        listed = out.partition("Commands:")[2]
        assert "..." not in listed, listed
        lists += bool(listed)
    assert lists == 2  # of all verbs, and those of `sr`; `sweep` alone is `sweep run`


def test_tables_fit_names_and_terminals() -> None:
    chain = mf.recipes.ralu(size=(64, 64), steps=(1, 1, 1))
    planned = mf.plan(chain, mf.POCKET)
    for columns in (60, 120):
        lines = plan_text(planned, columns).splitlines()
        assert max(map(len, lines)) <= columns, columns
    names = ("paper", "speed", "ralu", "selflift", "jit", "fresco", "lift", "native")
    for name in names:  # at a size of four digits, and sigmas with many
        wide = mf.plan(build(name, info("flux1-dev")), info("flux1-dev"))
        assert max(map(len, plan_text(wide, 60).splitlines())) <= 60, name
    assert plan_text(planned) == plan_text(planned, 10_000) and " -> " in plan_text(planned).splitlines()[1]
    result = mf.run(mf.recipes.paper(size=(32, 32), low=(16, 16), steps=1), mf.toy(), "a")
    for columns in (60, 120):
        lines = stage_table(result, columns).splitlines()
        assert max(map(len, lines)) <= columns
    assert len({line.index(" s ") for line in stage_table(result).splitlines()[:-1]}) == 1
    assert wrap(["prompt    one two three"], 20) == ["prompt    one two", "      three"]


def test_progress_says_steps_rate_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("mrflow.cli.drawing.time.monotonic", lambda: now[0])
    planned = mf.plan(mf.recipes.native(size=(16, 16), steps=4), mf.toy().info)
    screen = io.StringIO()
    err = Console(file=screen, force_terminal=True, width=60, _environ={"TERM": "xterm"})
    step = torch.zeros(1)
    with drawing.progress(err, planned, [8, 8]) as listen:
        listen(mf.StageBegan(0, 2, "Sample", planned.rows[0].out))
        for index in (1, 2):
            now[0] += 2.0
            listen(mf.Stepped(0, mf.Step(index, 4, 1.0, 0.5, step, step)))
    text = screen.getvalue()
    assert "1-8 of 16 Sample" in text and "2/4 2.0 s/step, " in text
    left = re.search(r"2/4 2.0 s/step, (\d+) s left", text)
    assert left is not None and int(left[1]) == 28  # half a stage of two took 4 s, of two parts
    assert max(len(line) for line in re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "\r", text).split("\r")) <= 60
    assert drawing.rate(5, 2.0) == "2.5 steps/s"


def test_slots_are_options_of_all_three_verbs() -> None:
    for verb in ("generate", "plan", "refine"):
        words = call(verb, "-h")[1]
        assert {f"--{f.name}" for f in fields(SlotOptions)} <= set(re.findall(r"^ +(--[a-z-]+)", words, re.MULTILINE))


def test_results_as_json(here: Path) -> None:  # noqa: F811
    assert isinstance(json.loads(call("sr", "list", "--json")[1]), list)
    file = next(Path(mf.__file__).parent.glob("models/pocket/*.safetensors"))
    assert "lines" in json.loads(call("inspect", str(file), "--json")[1])


def test_pocket_says_what_it_was_not_trained_on(caplog: pytest.LogCaptureFixture, here: Path) -> None:  # noqa: F811
    model = mf.load("pocket")
    model.condition(["a big red circle at the left", "the big blue word CAT", ""])
    assert not caplog.messages
    model.condition(["a big red circle", "a big red circle"])
    assert len(caplog.messages) == 1 and "no such caption: word 5 should be 'at'" in caplog.messages[0]

    def odd(*sizes: Any) -> tuple[str, ...]:
        return mf.plan(mf.recipes.paper(low=sizes[0], size=sizes[1], upscaler=mf.Lanczos(2)), mf.POCKET).notes

    assert odd(128, 256) == odd(64, 128) == ()
    assert odd((160, 320), (320, 640)) == (
        "pocket was trained on squares of 64, 128, 256 pixels; it draws worse at 160x320, 320x640",
    )
    assert mf.plan(mf.recipes.native(size=(64, 64)), mf.FLUX).notes == ()
    assert "it draws worse at 96x96" in call("plan", "--recipe", "native", "--size", "96")[2]
    caplog.clear()
    result = mf.run(mf.Sample(48, 64, mf.Linear(1)) >> mf.Decode(), model, "")
    assert "it draws worse at 48x64" in result.notes[0] and caplog.messages == [result.notes[0]]
    assert result.record()["notes"] == list(result.notes)


SWEEP = """
import mrflow as mf

sweep = mf.Sweep({"one": mf.recipes.native(size=(16, 16), steps=1)}, ["a", "b"], model="pocket")
"""


def test_sweeps_as_json_and_options_of_other_engines(here: Path) -> None:  # noqa: F811
    (here / "s.py").write_text(SWEEP)
    planned = json.loads(call("sweep", "s.py", "--plan", "--json")[1])
    assert planned["rows"] == 2 and planned["chains"]["one"]["nfe"] == 2 and planned["flops"] > 0
    assert call("sweep", "s.py", "--plan")[1].startswith("1 chain x 2 prompts x 1 draw: 2 rows\n     2 forwards  ")
    chains = {label: {"nfe": 24, "flops": 17.8e9} for label in ("one", "a label that says all its settings, " * 3)}
    lines = plan_lines({"chains": chains, "prompts": 1, "draws": 1, "rows": 2, "flops": 35.6e9})
    assert wrap(lines, 60)[1] == "    24 forwards  17.8 GFLOP  one" == lines[1]
    assert len({line.index("GFLOP") for line in lines[1:3]}) == 1
    code, _, err = call("sweep", "s.py", "--workers", "3", "--gpus", "1")
    assert code == 2 and "--workers, --gpus does nothing without --engine ray" in err
    code, _, err = call("report", "none", "--metric", "score")
    assert code == 2 and "--metric does nothing without --plots" in err
    code, _, err = call("tune", "s.py", "--captions", "3")
    assert code == 2 and "--captions does nothing beside s.py" in err
    code, _, err = call("tune", "--floor", "90")
    assert code == 2 and "error: --floor must be at least 0 and at most 1, the range of 'score', got 90" in err, err
    assert not [p for p in here.iterdir() if p.name not in ("s.py", "__pycache__")]


def test_lines_hang_below_what_they_explain() -> None:
    assert wrap(["made on   one two three"], 20) == ["made on   one two", "      three"]
    assert wrap(["     Sample(64, 64, Shifted(2))"], 20) == ["     Sample(64, 64,", "     Shifted(2))"]
    assert wrap(["made on   one two three"], None) == ["made on   one two three"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["generate", "a", "--batch", "9" * 30], "9" * 30 + " pictures are more than the 1024 of one command"),
        (["generate", "@/dev/zero"], "holds more than 64 MiB of prompts"),
        (["tune", "--captions", "9" * 30], "--captions must be a whole number from 1 to 10000"),
        (["tune", "--captions", "0"], "--captions must be a whole number from 1 to 10000"),
        (["tune", "--trials", "9" * 30], "--trials must be a whole number from 1 to 100000"),
    ],
)
def test_numbers_and_files_without_end_are_refused_at_once(words: list[str], said: str, here: Path) -> None:  # noqa: F811
    code, _, err = call(*words)
    assert code == 2 and said in err and not list(here.iterdir())


NUMBERS = {"int": (["1.0", "1e3", "two", "", "\u0663"], "whole number"), "float": (["two", "1,5", ""], "number")}


@pytest.mark.parametrize(("group", "verb", "options"), [(each[0], each[1], each[2]) for each in VERBS])
def test_options_that_count_take_whole_numbers_alone(group: Any, verb: str, options: type) -> None:
    assert group is not None
    command = next(each for each in group.registered_commands if each.name == verb)
    found = inspect.signature(command.callback).parameters.values()
    numbers = [(p, info, n) for p in found for n in NUMBERS if (info := _number(p.annotation, n)) is not None]
    for parameter, info, kind in numbers:
        assert info.metavar == f"<{kind}>"  # the help says which
        for word in NUMBERS[kind][0]:
            with pytest.raises(typer.BadParameter, match=f"takes a {NUMBERS[kind][1]}, got {re.escape(repr(word))}"):
                info.parser(word)
        for value in (7, None if parameter.default is None else parameter.default):
            assert value is None or info.parser(str(value)) == info.parser(value) == value
    counted = sum("int" in str(f.type) for each in _groups(options) for f in fields(each))
    assert sum(kind == "int" for *_, kind in numbers) == counted  # none was forgotten


def _groups(options: Any) -> list[Any]:
    return [options, *(hint for hint in get_type_hints(options).values() if is_dataclass(hint))]


def _number(annotation: Any, kind: str) -> Any:
    held, *more = get_args(annotation) or (None,)
    kinds = [getattr(each, "__name__", "") for each in (held, *get_args(held))]
    return more[0] if more and kind in kinds else None


def test_whole_numbers_on_the_command_line(here: Path) -> None:  # noqa: F811
    for words in (["plan", "--batch", "1.0"], ["generate", "a", "--batch", "1.0"], ["tune", "--trials", "4.0"]):
        code, out, err = call(*words)
        assert code == 2 and f"'{words[-2]}'" in err and f"it takes a whole number, got '{words[-1]}'" in err, err
        assert out == "" and not list(here.iterdir())
    assert call("plan", "--batch", "2")[0] == 0


def test_inspect_knows_the_names_of_models(here: Path) -> None:  # noqa: F811
    code, out, err = call("inspect", "pocket")
    assert code == 0 and f"version {NEWEST}+" in out, err
    assert call("inspect", NEWEST)[1] == out
    for name in ("flux1-dev", "black-forest-labs/FLUX.1-dev"):
        code, out, err = call("inspect", name)
        assert code == 2 and f"mrflow plan --model {name}" in err and out == "", err
    code, out, err = call("inspect", "poket")
    assert code == 5 and "there is no such file; inspect takes" in err and "pocket" in err
    (here / "pocket").write_text("mine")  # a file of one's own is the one that is meant
    assert call("inspect", "pocket")[0] != 0

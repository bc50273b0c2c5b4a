"""Transfer to fine-tunes: a look is learned by a LoRA in little, and the table says what its rows say."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import mrflow as mf
from experiments import transfer
from experiments.failures.questions import Setting
from experiments.train_pocket import finetune, flow, student
from experiments.train_pocket.data import tensors_of
from experiments.train_pocket.export import export
from experiments.train_pocket.hard import start_from
from mrflow.checkpoints.adapters import check_loras
from mrflow.checkpoints.safetensors import save_file
from mrflow.models import info
from mrflow.models.pocket.model import NEWEST, VOCABULARY, WEIGHTS, WORDS, open_pocket
from mrflow.scenes.grammar import held_out
from mrflow.scenes.hard import parse_hard
from mrflow.scenes.looks import LOOKS
from mrflow.sweep import Row
from tests.test_statistics import row

LITTLE = finetune.Lessons({64: 6, 128: 4}, {64: 3, 128: 2}, 3)
Values = Callable[[int], float]


@pytest.fixture(scope="module")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file that knows the hard world's words, as training begins."""
    net, auto, sr = start_from(NEWEST)
    path = tmp_path_factory.mktemp("model") / "pocket-4.safetensors"
    export("pocket-4", net.state_dict(), auto, sr, path, {"cfg": "2", "size": "256", "low": "128"})
    return path


def teach(monkeypatch: pytest.MonkeyPatch, look: str, model: Path, folder: Path, *words: str) -> None:
    monkeypatch.setattr(finetune, "LESSONS", LITTLE)
    monkeypatch.setattr(finetune, "start_log", lambda folder: None)
    monkeypatch.setattr(flow, "SHOWN_STEPS", 2)
    monkeypatch.setitem(finetune.SHOWN, look, finetune.SHOWN[look][:1])
    monkeypatch.setattr("sys.argv", ["finetune", look, "--model", str(model), "--out", str(folder), *words])
    finetune.main()


@pytest.fixture(scope="module")
def taught(untrained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the LoRA of a look, learned in one run."""
    folder = tmp_path_factory.mktemp("taught")
    with pytest.MonkeyPatch.context() as monkeypatch:
        teach(monkeypatch, "runes", untrained, folder)
    return folder


@pytest.mark.slow
def test_a_look_is_taught_in_pieces_and_leaves_the_model_alone(
    untrained: Path, taught: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut = tmp_path / "cut" / "runes-lora.safetensors"
    for _ in range(LITTLE.steps):
        assert not cut.exists()
        teach(monkeypatch, "runes", untrained, tmp_path / "cut", "--minutes", "1e-9")
    whole = load_file(taught / "runes-lora.safetensors")
    assert whole and all(torch.equal(value, load_file(cut)[key]) for key, value in whole.items())
    assert any(bool(value.any()) for key, value in whole.items() if "lora_B" in key)
    chain = mf.recipes.native(size=(64, 64), steps=1)
    base, tuned = (mf.load(str(untrained), device="cpu", lora=lora) for lora in (None, str(cut)))
    caption = "a blue sign in 13% letters, RED and FOX and HAT"
    assert not torch.equal(mf.run(chain, base, caption).pixels, mf.run(chain, tuned, caption).pixels)


def test_a_look_is_taught_its_own_scenes_and_none_that_is_held_out() -> None:
    for look in LOOKS:
        found = finetune.scenes(look, 40, 1)
        assert all(scene.look is LOOKS[look] and not held_out(scene.caption) for scene in found)
        assert {scene.kind for scene in found} <= {*finetune.WORLDS[look].kinds}
        for shown in finetune.SHOWN[look]:
            assert parse_hard(shown).kind in finetune.WORLDS[look].kinds
        for name in transfer.CHANGED[look]:
            assert transfer.CATEGORIES[name].kind in finetune.WORLDS[look].kinds


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["runes", "--model", "OLDER"], f"knows {len(VOCABULARY)} of the hard world's {len(WORDS)}"),
        (["runes", "--model", "no.safetensors"], "no.safetensors"),
        (["runes", "--model", str(WEIGHTS), "--steps", "0"], "--steps 0 is out of range"),
        (["runes", "--model", str(WEIGHTS), "--scale", "0"], "--scale 0.0 is out of range"),
    ],
)
def test_what_cannot_be_taught_is_said_first(
    words: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    older = tensors_of(open_pocket(WEIGHTS))
    older["text.tokens.weight"] = older["text.tokens.weight"][: len(VOCABULARY)].clone()
    save_file(older, tmp_path / "older.safetensors")
    words = [str(tmp_path / "older.safetensors") if word == "OLDER" else word for word in words]
    monkeypatch.setattr("sys.argv", ["finetune", *words, "--out", str(tmp_path / "a")])
    with pytest.raises(SystemExit):
        finetune.main()
    assert said in capsys.readouterr().err
    assert not (tmp_path / "a").exists()


def made(model: str, chain: str, caption: int, name: str, value: float, *, lost: float = 0.0) -> Row:
    one = row(f"{name} {caption}", 0, None, chain=chain)
    metric = transfer.CATEGORIES[name].metric
    return replace(one, tags={"category": name}, metrics={metric: float(np.clip(value - lost, 0, 1))})


def sweeps(base: float, tuned: float, *, count: int = 24, noise: float = 0.05, bare: float = 0.0) -> transfer.Rows:
    """Rows of the alphabet: native reads 0.9; staged sampling loses so much on the base and on the fine-tune."""
    rng = np.random.default_rng(0)
    out: dict[str, list[Row]] = {"base": [], "runes": [], "runes, base": []}
    for name in transfer.CHANGED["runes"]:
        for i in range(count):
            for model, lost in (("base", base), ("runes", tuned)):
                out[model].append(made(model, transfer.NATIVE, i, name, 0.9 + noise * rng.normal()))
                out[model].append(made(model, transfer.STAGED, i, name, 0.9 + noise * rng.normal(), lost=lost))
            out["runes, base"].append(made("runes, base", transfer.STAGED, i, name, bare))
    return out


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (sweeps(0.0, 0.0), "transfers (and is kept)"),
        (sweeps(0.3, 0.3), "transfers (with the loss that the base has)"),
        (sweeps(0.1, 0.5), "does not transfer: 0."),
        (sweeps(0.1, 0.1, noise=0.3), "not shown either way: up to 0."),
        (sweeps(0.0, 0.0, count=19), "no verdict from fewer than 20 captions"),
        (sweeps(0.0, 0.0, bare=0.85), "nothing: native sampling reads 0."),
    ],
)
def test_verdicts_say_what_the_rows_say(rows: transfer.Rows, said: str) -> None:
    lines = [line for line in transfer.table(rows, transfer.STAGED) if line.startswith("| runes")]
    assert len(lines) == 2 and all(line.split("|")[-2].strip().startswith(said) for line in lines)


def test_a_world_in_which_nothing_differs_has_few_arrows() -> None:
    """Under the null, at most 6 % of tables have an arrow."""
    rng, wrong, tables = np.random.default_rng(1), 0, 300
    for _ in range(tables):
        rows: dict[str, list[Row]] = {"base": [], "runes": [], "runes, base": []}
        for name in transfer.CHANGED["runes"]:
            for i in range(20):
                for model in ("base", "runes"):
                    for chain in (transfer.NATIVE, transfer.STAGED):
                        rows[model].append(made(model, chain, i, name, float(rng.binomial(9, 0.8)) / 9))
        found = transfer.losses(rows, transfer.STAGED).values()
        wrong += any(c.verdict in ("higher", "lower") for _, *two in found for c in two)
    assert wrong / tables <= 0.06


def test_a_student_takes_the_levels_that_its_file_says(tmp_path: Path) -> None:
    for shift, factor in ((mf.Shift.fixed(5), 5.0), (None, 2.0)):
        facts = student.said("pocket-4+1", student.Lessons({}, {}, 1, shift=shift), 1)
        student.export({"a": torch.full((1,), factor)}, facts, path := tmp_path / f"{factor}.safetensors")
        assert transfer.student_of(path).shift == mf.Shift.fixed(factor)
    assert transfer.student_of(path, 3.0).shift == mf.Shift.fixed(3.0)


def test_rows_of_every_look_can_be_planned() -> None:
    facts, setting = info("pocket"), Setting(64, 128, 4, 2)
    pupil = mf.students.POCKET
    for look in LOOKS:
        found = transfer.chains(setting, facts, look, pupil)
        assert list(found)[:4] == [transfer.NATIVE, transfer.STAGED, "student", transfer.STACKED]
        truths = [stage for chain in found.values() for stage in chain if isinstance(stage, mf.Truth)]
        assert len(truths) == 4 and all(truth.look == look for truth in truths)
        assert any(label.endswith("unguided (same cost)") for label in found)
        mf.plan(found[transfer.STACKED], facts)
    assert transfer.STACKED not in transfer.chains(setting, facts, "", None)


@pytest.mark.slow
def test_the_study_runs_to_its_last_line(
    untrained: Path, taught: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--model", str(untrained), "--loras", str(tmp_path), "--looks", "runes", "--captions", "1", "--size", "64"]
    words += ["--steps", "2", "--few", "1", "--student", check_loras(mf.students.POCKET.lora)[0].path]
    monkeypatch.setattr("sys.argv", ["transfer", *words])
    assert transfer.main() == 2
    assert "runes-lora.safetensors is not there; make it with python -m experiments.train_pocket.finetune runes" in (
        capsys.readouterr().err
    )
    shutil.copytree(taught, tmp_path, dirs_exist_ok=True)
    assert transfer.main() == 0
    said = capsys.readouterr().out
    assert "| runes | letters 13% |" in said and "**runes, base**" in said and "| truth |  | 1.00" in said

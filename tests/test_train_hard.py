"""The hard world's recipe in little: pieces end where one run would have, and what comes out loads."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest
import torch
from safetensors.torch import load_file, save_file

import mrflow as mf
from experiments import hard_scores
from experiments.train_pocket import flow
from experiments.train_pocket import hard as recipe
from experiments.train_pocket.data import pictures, tensors_of
from experiments.train_pocket.flow import Trainee, losses_at
from experiments.train_pocket.loop import Loop, PieceOver, Run, cosine, finished, keep_settings
from experiments.train_pocket.muon import orthogonalised
from experiments.train_pocket.student import in_use
from mrflow.errors import PlanError, WeightsError
from mrflow.models.pocket.model import (
    LONG_TEXT,
    NEWEST,
    TEXT_LENGTH,
    VOCABULARY,
    WEIGHTS,
    WORDS,
    load_pocket,
    open_pocket,
)
from mrflow.scenes.grammar import held_out
from mrflow.scenes.hard import HARD, KINDS, parse_hard

LITTLE = replace(recipe.BROAD, autoencoder=2, sr=2, scenes=6, shards={128: 2, 256: 1}, batch={128: 4, 256: 2})
WHOLE = ["--steps", "3", "--batch", "0.03", "--shards", "0.003", "--every", "0"]


def run_main(monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    monkeypatch.setattr("sys.argv", ["hard", *words])
    monkeypatch.setattr(recipe, "start_log", lambda folder: None)
    monkeypatch.setattr(flow, "SHOWN_STEPS", 2)
    recipe.main()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a little lesson that was learned in one run."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setitem(recipe.LESSONS, "broad", LITTLE)
        monkeypatch.setattr(recipe, "SHOWN", recipe.SHOWN[:1])
        run_main(monkeypatch, *WHOLE, "--out", str(folder))
    return folder


@pytest.mark.slow
def test_pieces_end_where_one_run_would_have(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(recipe.LESSONS, "broad", LITTLE)
    monkeypatch.setattr(recipe, "SHOWN", recipe.SHOWN[:1])
    file = tmp_path / "cut" / "pocket-4.safetensors"
    for piece in range(3):  # each ends after one step of the flow
        assert not file.exists()
        run_main(monkeypatch, *WHOLE, "--out", str(tmp_path / "cut"), "--minutes", "1e-9")
        if piece == 0:
            check_the_last_checkpoint_can_be_written(tmp_path / "cut", tmp_path / "early", monkeypatch)
    assert file.exists()
    once, cut = (load_file(folder / "pocket-4.safetensors") for folder in (whole, tmp_path / "cut"))
    assert set(once) == set(cut) and all(torch.equal(once[key], cut[key]) for key in once)
    start = tensors_of(open_pocket(WEIGHTS))
    assert not torch.equal(cut["flow.img_in.weight"], start["flow.img_in.weight"])
    model = load_pocket(tmp_path / "cut" / "pocket-4.safetensors")
    assert model.info.size == (256, 256) and model.info.low == (128, 128)
    assert model.info.architecture is not None and model.info.architecture.text_tokens == LONG_TEXT
    chain = mf.recipes.paper(low=(64, 64), size=(128, 128), steps=1)
    assert mf.run(chain, model, recipe.SHOWN[0]).pixels.shape == (1, 3, 128, 128)


def check_the_last_checkpoint_can_be_written(cut: Path, copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At any time: here after the first step, in a copy."""
    shutil.copytree(cut, copy)
    run_main(monkeypatch, *WHOLE, "--out", str(copy), "--finish")
    average = torch.load(copy / "flow.pt", weights_only=True)["average"]
    written = load_file(copy / "pocket-4.safetensors") | load_file(copy / "pocket-4-autoencoder.safetensors")
    assert torch.equal(written["text.places"], average["text.places"].half())
    auto = finished(Run(copy), "autoencoder")
    assert auto is not None and torch.equal(written["autoencoder.std"], auto["std"].half())


@pytest.mark.slow
def test_another_lesson_goes_on_from_a_run_which_stays_as_it_is(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = {"scenes": 6, "sr": 2, "shards": {64: 1, 128: 1}, "batch": {64: 2, 128: 2}, "share": {64: 0.5, 128: 0.5}}
    monkeypatch.setitem(recipe.LESSONS, "readable", replace(recipe.READABLE, **small))
    monkeypatch.setattr(recipe, "SHOWN", recipe.SHOWN[:1])
    before = {path.name: path.read_bytes() for path in whole.iterdir() if path.is_file()}
    more = ["--steps", "5", "--batch", "0.5", "--shards", "0.5", "--every", "0", "--start", str(whole)]
    for _ in range(3):  # a step, another, and the end
        run_main(monkeypatch, *more, "--lesson", "readable", "--out", str(tmp_path / "second"), "--minutes", "1e-9")
    assert before == {path.name: path.read_bytes() for path in whole.iterdir() if path.is_file()}
    model = load_pocket(tmp_path / "second" / "pocket-4.safetensors")
    assert model.info.size == (128, 128) and model.info.low == (64, 64) and model.info.sides == (64, 128)
    assert torch.load(tmp_path / "second" / "flow.pt", weights_only=True)["step"] == 5


@pytest.mark.slow
def test_the_readable_lesson_goes_on_from_the_embedded_weights_and_their_autoencoder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = {"scenes": 6, "sr": 2, "shards": {64: 1, 128: 1}, "batch": {64: 2, 128: 2}, "share": {64: 0.5, 128: 0.5}}
    monkeypatch.setitem(recipe.LESSONS, "readable", replace(recipe.READABLE, **small))
    monkeypatch.setattr(recipe, "SHOWN", recipe.SHOWN[:1])
    run_main(
        monkeypatch, "--lesson", "readable", "--steps", "1", "--batch", "0.5", "--shards", "0.5", "--out", str(tmp_path)
    )
    made, start = load_file(tmp_path / "pocket-4-autoencoder.safetensors"), tensors_of(open_pocket(WEIGHTS))
    kept = [key for key in made if key.startswith("autoencoder.")]
    assert kept and all(torch.equal(made[key], start[key]) for key in kept)
    flow_of = load_file(tmp_path / "pocket-4.safetensors")
    assert not torch.equal(flow_of["flow.img_in.weight"], start["flow.img_in.weight"])


def test_the_readable_lesson_shows_only_sizes_that_the_autoencoder_keeps() -> None:
    captions = [scene.caption for scene in recipe.scenes(recipe.READABLE.worlds[128], 300, 1)]
    named = {word for caption in captions for word in caption.split() if "%" in word or "x" in word or "1/" in word}
    assert {"13%", "20%", "4x4", "5x5", "6x6", "1/16"} == {word for word in named if word[0].isdigit()}
    assert sum("sign" in caption for caption in captions) > 90


def test_it_begins_with_what_the_older_version_knows() -> None:
    net, auto, sr = recipe.start_from(NEWEST)
    old, own = tensors_of(open_pocket(WEIGHTS)), net.state_dict()
    assert all(torch.equal(own[key], value.float()) for key, value in old.items() if key.startswith("flow."))
    assert torch.equal(own["text.tokens.weight"][: len(old["text.tokens.weight"])], old["text.tokens.weight"].float())
    assert own["text.tokens.weight"].shape[0] == len(WORDS) and len(own["text.places"]) == LONG_TEXT > TEXT_LENGTH
    more = own["text.tokens.weight"][len(VOCABULARY) :]
    assert float(more.std()) == pytest.approx(float(old["text.tokens.weight"].float().std()), rel=0.1)
    assert {"mean", "std"} < {*auto} and "head.weight" in sr


def test_shards_hold_no_caption_that_is_held_out_and_differ() -> None:
    first, second = (recipe.scenes(HARD, 150, seed) for seed in (1, 2))
    assert not any(held_out(scene.caption) for scene in (*first, *second)) and first != second
    assert {scene.kind for scene in first} >= {*KINDS}
    assert all(held_out(caption) for caption in pictures(HARD, 12, 64, 3, held=True)[1])
    for shown in recipe.SHOWN:
        parse_hard(shown)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--steps", "0"], "--steps, --rate, --shards and --grid must be above 0"),
        (["--rate", "nan"], "--steps, --rate, --shards and --grid must be above 0"),
        (["--minutes", "0"], "--minutes 0.0 is out of range"),
        (["--workers", "-1"], "--workers -1 is out of range"),
        (["--name", "a/b"], "--name must be letters"),
        (["--start", "nowhere"], "--start nowhere: there is no flow.pt in it"),
        (["--rate", "1e-3"], "was begun with another scale, batch or recipe"),
    ],
)
def test_what_cannot_be_is_said_before_any_work(
    words: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    keep_settings(Run(tmp_path), repr(replace(recipe.BROAD, shards={})))
    keep_settings(Run(tmp_path), repr(replace(recipe.BROAD, shards={})))  # the same again is fine
    with pytest.raises(SystemExit):
        run_main(monkeypatch, "--out", str(tmp_path), *words)
    assert said in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["settings.json"]


def test_a_file_of_more_words_than_there_are_is_refused(tmp_path: Path) -> None:
    tensors = tensors_of(open_pocket(WEIGHTS))
    tensors["text.tokens.weight"] = torch.zeros(len(WORDS) + 1, 192)
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(WeightsError, match=rf"a text encoder of {len(WORDS) + 1} words and 40 tokens; pocket has at m"):
        load_pocket(tmp_path / "a.safetensors")


@pytest.mark.parametrize("shape", [(3, 48, 64), (3, 64, 48)])
def test_muon_in_bfloat16_goes_the_same_way(shape: tuple[int, int, int]) -> None:
    g = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    exact, rough = orthogonalised(g), orthogonalised(g, dtype=torch.bfloat16)
    assert rough.dtype == torch.float32 and not torch.equal(exact, rough)
    assert torch.cosine_similarity(exact.flatten(1), rough.flatten(1)).min() > 0.998
    values = torch.linalg.svdvals(exact)
    assert values.min() > 0.6 and values.max() < 1.3


def test_the_loop_counts_minutes(tmp_path: Path) -> None:
    x = torch.nn.Parameter(torch.zeros(()))
    for steps in (1, 2, 3):
        loop = Loop("x", Run(tmp_path, minutes=1e-9), {"x": x}, [torch.optim.SGD([x], lr=1.0)], 3, factor=cosine)
        if steps == 3:
            for _ in loop:  # the last step is done, so nothing is over
                loop.learn(x)
            break
        with pytest.raises(PieceOver, match=f"x: {steps} of 3 steps done"):
            for _ in loop:
                loop.learn(x)
    with pytest.raises(PlanError, match="--minutes -1 is out of range"):
        Run(tmp_path, minutes=-1)


def test_scores_by_size_of_detail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The truth reads, the mean of a caption's pictures does not, and neither does another caption."""
    words = [
        "--captions",
        "2",
        "--size",
        "256",
        "--doses",
        "letters 8%",
        "objects",
        "letters 4%",
        "--out",
        str(tmp_path / "a.json"),
    ]
    monkeypatch.setattr(hard_scores, "DRAWS", 12)
    monkeypatch.setattr(
        "sys.argv", ["hard_scores", *words, "--rows", "truth", "autoencoder", "staged path", "mean", "other"]
    )
    hard_scores.main()
    said = capsys.readouterr().out
    with monkeypatch.context() as m:
        m.setattr(hard_scores, "images_of", None)  # what is kept is not drawn again
        hard_scores.main()
    assert capsys.readouterr().out == said
    lines = [line for line in said.splitlines() if line.startswith("| ")]
    assert lines[-1].startswith("| shown: letters 8%, objects | overall | 1.00 | ")
    assert lines[1].split(" | ")[2] == "1.00 [0.16, 1.00]"  # two of two: exact, not [1.00, 1.00]
    values = {line.split(" | ")[0]: [float(cell.split()[0]) for cell in line.split(" | ")[2:]] for line in lines[1:3]}
    assert float(lines[3].split(" | ")[3].split()[0]) < hard_scores.SHOWN  # letters of 4 %, which `shown` leaves out
    for truth, autoencoder, _, mean, other in values.values():
        assert truth == 1 and autoencoder > 0.9 and mean < 0.3 and other < 0.2
    assert values["| letters 8%"][2] < 0.7 < values["| objects"][2]
    monkeypatch.setattr("sys.argv", ["hard_scores", "--rows", "dreams"])
    with pytest.raises(SystemExit):
        hard_scores.main()
    assert "no row or size is called dreams; there are truth" in capsys.readouterr().err


def test_networks_are_taught_further_at_sizes_that_are_in_use() -> None:
    info = replace(mf.POCKET, sides=(64, 128, 256), size=(128, 128))
    assert in_use({64: 1, 96: 2, 128: 3, 256: 4}, info) == {64: 1, 128: 3}


def test_noise_levels_take_the_shifts_in_turn() -> None:
    """Of 4,096 items at 256 px the even ones lie above 0.9 as a factor of 2 says, the odd ones as one of 7 does.

    sigma > 0.9 where the normal variable is above log(9 / factor): 6.6 % and 40.1 %. In the other order it is red.
    """
    seen = list[torch.Tensor]()

    class Silent(torch.nn.Module):
        def text(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return torch.zeros(len(ids), ids.shape[1], 4), torch.zeros(len(ids), 4)

        def flow(self, tokens: torch.Tensor, *rest: torch.Tensor | None) -> torch.Tensor:
            assert rest[4] is not None
            seen.append(rest[4])
            return torch.zeros_like(tokens)

    torch.manual_seed(0)
    latents, ids = torch.zeros(4096, 1, 32, 32), torch.ones(4096, 2, dtype=torch.long)
    losses_at(cast("Trainee", Silent()), latents, ids, *recipe.SHIFTS)
    above = [float((seen[0][turn::2] > 0.9).float().mean()) for turn in (0, 1)]
    assert above == pytest.approx([0.066, 0.401], abs=0.03)

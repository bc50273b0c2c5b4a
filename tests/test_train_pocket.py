"""The embedded model's training: the whole recipe in little, and that an interruption changes nothing."""

import errno
import json
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import mrflow as mf
from experiments.train_pocket import __main__ as recipe
from experiments.train_pocket import autoencoder, data, flow, short_runs, sr, student
from experiments.train_pocket.data import POCKET_1, grid, pictures
from experiments.train_pocket.export import digest
from experiments.train_pocket.loop import Loop, Run, cosine, finished, flat_then_linear, keep_settings
from mrflow.checkpoints.safetensors import read_header
from mrflow.errors import ResourceError
from mrflow.models.pocket.model import SMALL, WEIGHTS, load_pocket
from mrflow.scenes.grammar import FULL, held_out_captions
from tests.test_pocket import older

TINY = 0.0008


class Stop(Exception):
    """The machine goes down."""


@pytest.mark.slow
@pytest.mark.parametrize("name", recipe.RECIPES)
def test_a_whole_recipe_makes_what_is_shipped(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (flow, student):
        monkeypatch.setattr(module, "SHOWN", flow.SHOWN[:1])
    monkeypatch.setattr(flow, "SHOWN_STEPS", 2)
    run, lessons = Run(tmp_path / "run", scale=TINY, batch=0.01), recipe.RECIPES[name].lessons
    monkeypatch.setitem(recipe.RECIPES, name, replace(recipe.RECIPES[name], lessons=replace(lessons, inner=1)))
    model_file, adapter_file = recipe.train(run, recipe.RECIPES[name], "trial")
    model = load_pocket(model_file)
    assert model.info.version.startswith("trial+")
    assert replace(model.info, version="") == recipe.RECIPES[name].info
    chain = mf.recipes.few(replace(mf.students.POCKET, lora=mf.Lora(str(adapter_file))), size=(256, 256))
    assert mf.run(chain, model, "a big red circle at the left").pixels.shape == (1, 3, 256, 256)
    grids = sorted(p.name for p in (tmp_path / "run").rglob("grids/*.png"))
    phases = len(recipe.RECIPES[name].phases)
    want = [*["autoencoder"] * phases, *["flow"] * phases, *["sr"] * phases, "student"]
    assert [name.split("-")[0] for name in grids] == want
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.pt")}
    first = model_file.read_bytes(), adapter_file.read_bytes()
    recipe.train(run, recipe.RECIPES[name], "trial")  # nothing is made again
    assert before == {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.pt")}
    assert (model_file.read_bytes(), adapter_file.read_bytes()) == first
    sizes = recipe.RECIPES[name].phases[-1].flow.sizes
    with Image.open(next((tmp_path / "run").rglob("grids/flow-*.png"))) as picture:
        assert picture.size == (sizes[-1] * len(flow.SHOWN), sum(sizes))


def train(part: str, run: Run) -> dict[str, torch.Tensor]:
    """One part from nothing, a few steps."""
    torch.manual_seed(3)
    auto = autoencoder.PocketAutoencoder().state_dict()
    if part == "autoencoder":
        return autoencoder.train(run, part, POCKET_1, 5000)
    if part == "sr":
        return sr.train(run, part, POCKET_1, 5000, auto, gan=0.4)
    if part == "student":
        lessons = student.Lessons({128: 1000, 256: 1000}, {128: 4, 256: 2}, 5000)
        return student.train(run, part, POCKET_1, lessons, WEIGHTS)
    course = recipe.two_sizes(2500, 2500, 0.5)
    return flow.train(run, part, POCKET_1, course, auto, info=SMALL, width=128, head=32)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--scale", "0"], "--scale 0.0 is out of range"),
        (["--batch", "0"], "--batch 0.0 is out of range"),
        (["--name", "a/b"], "--name must be letters"),
        (["--device", "tpu"], "tpu"),
        (["--workers", "-1"], "--workers -1 is out of range"),
        (["--scale", "0.5"], "was begun with another scale, batch or recipe"),
        (["--recipe", "other"], "was begun with another scale, batch or recipe"),
    ],
)
def test_what_cannot_be_is_said_before_any_work(
    words: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Run(tmp_path, scale=1.0)
    for _ in range(2):  # the same again is fine
        keep_settings(run, repr(recipe.RECIPES["full"]))
    monkeypatch.setitem(recipe.RECIPES, "other", replace(recipe.RECIPES["full"], phases=()))
    monkeypatch.setattr("sys.argv", ["train_pocket", "--out", str(tmp_path), *words])
    with pytest.raises(SystemExit):
        recipe.main()
    assert said in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["settings.json"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--steps", "0"], "--steps 0 is out of range"),
        (["--batch", "nan"], "--batch nan is out of range"),
        (["--export", "nowhere/a.safetensors"], "the folder nowhere does not exist"),
        (["--export", "settings.json"], "settings.json"),
        (["--teacher", "no.safetensors"], "no.safetensors"),
        (["--steps", "4800"], "was begun with another scale, batch or recipe"),
        (["--teacher", "OTHER"], "was begun with another scale, batch or recipe"),
    ],
)
def test_a_student_of_other_settings_is_not_taken_for_this_one(
    words: list[str],
    said: str,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What lies in the folder was taught by one teacher, in so many steps."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(student, "train", lambda *_: {"a": torch.zeros(2)})
    monkeypatch.setattr(student, "start_log", lambda _: None)
    monkeypatch.setattr("sys.argv", ["student", "--out", str(tmp_path), "--export", str(tmp_path / "a.safetensors")])
    student.main()
    assert read_header(tmp_path / "a.safetensors").metadata["trained"] == "2400 steps"
    if words[-1] == "OTHER":
        words = [*words[:-1], str(older(tmp_path_factory.mktemp("other"), "pocket-0"))]
    monkeypatch.setattr("sys.argv", ["student", "--out", str(tmp_path), "--export", "b.safetensors", *words])
    with pytest.raises(SystemExit):
        student.main()
    assert said in capsys.readouterr().err
    assert {p.name for p in tmp_path.iterdir()} == {"settings.json", "a.safetensors"}


def test_a_version_does_not_hang_on_the_order_of_tensors() -> None:
    tensors = {"b": torch.ones(2), "a": torch.zeros(3)}
    assert digest(tensors) == digest(dict(sorted(tensors.items()))) != digest({**tensors, "a": torch.ones(3)})


@pytest.mark.slow
@pytest.mark.parametrize("part", ["autoencoder", "flow", "sr", "student"])
def test_an_interrupted_training_ends_where_it_would_have(
    part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (flow, student):
        monkeypatch.setattr(module, "SHOWN", flow.SHOWN[:1])
    monkeypatch.setattr(flow, "SHOWN_STEPS", 2)
    whole = train(part, Run(tmp_path / "whole", scale=TINY, grid=3))
    learn = Loop.learn

    def failing(self: Loop, *args: object, **kwargs: object) -> None:
        if self.step == 2:
            raise Stop
        learn(self, *args, **kwargs)  # type: ignore[arg-type]

    cut = Run(tmp_path / "cut", scale=TINY, every=0.0, grid=3)  # a checkpoint after every step
    monkeypatch.setattr(Loop, "learn", failing)
    with pytest.raises(Stop):
        train(part, cut)
    assert finished(cut, part) is None
    monkeypatch.setattr(Loop, "learn", learn)
    resumed = train(part, cut)
    assert set(resumed) == set(whole)
    assert all(torch.equal(resumed[key], whole[key]) for key in whole)
    assert all(torch.equal(resumed[key], value) for key, value in load_file(cut.folder / f"{part}.safetensors").items())


def test_the_loop_averages_and_follows_its_rates(tmp_path: Path) -> None:
    """Plain descent down x, whose slope is 1: the steps are the rates."""
    x = torch.nn.Parameter(torch.zeros(()))
    rates: list[float] = []
    optimiser = torch.optim.SGD([x], lr=0.5)
    loop = Loop("x", Run(tmp_path), {"x": x}, [optimiser], 10, factor=flat_then_linear(0.5), warmup=2, decay=0.5)
    values = [0.0]
    for _ in loop:
        loop.learn(x)
        rates.append(values[-1] - x.item())
        values.append(x.item())
    want = [0.5 * min(1, (i + 1) / 2) * (0.02 + 0.98 * min(1, (1 - i / 10) / 0.5)) for i in range(10)]
    assert rates == pytest.approx(want, abs=1e-6)
    average = 0.0
    for i, value in enumerate(values[1:], 1):
        average += (1 - min(0.5, (i + 1) / (i + 10))) * (value - average)
    assert loop.average["x"].item() == pytest.approx(average, abs=1e-6)
    with loop.averaged():
        assert x.item() == pytest.approx(average, abs=1e-6)
    assert x.item() == values[-1]


def test_rates_end_low() -> None:
    assert cosine(0) == flat_then_linear(0.3)(0) == 1
    assert cosine(1) == pytest.approx(0.02)
    assert flat_then_linear(0.3)(1) == pytest.approx(0.02)
    assert flat_then_linear(0.3)(0.7) == pytest.approx(1)


def test_a_course_goes_from_small_to_large(tmp_path: Path) -> None:
    """Parts follow one another, scaled with everything, and within one the sizes have their shares."""
    course = flow.Course({}, {}, ((100, {128: 1.0}), (100, {128: 0.25, 512: 0.75})))
    run = Run(tmp_path, scale=0.5)
    torch.manual_seed(0)
    assert course.sizes == (128, 512)
    assert {course.size_at(step, run) for step in range(50)} == {128}
    drawn = [course.size_at(step, run) for step in range(50, 100)] + [course.size_at(99, run) for _ in range(2000)]
    assert sum(size == 512 for size in drawn) / len(drawn) == pytest.approx(0.75, abs=0.04)


@pytest.mark.slow
def test_processes_render_what_one_does() -> None:
    alone = pictures(FULL, 70, 32, 3)
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        shared = pictures(FULL, 70, 32, 3, pool=pool)
        ahead = flow.renders(Run(Path(), scale=0.01, pool=pool), FULL, recipe.two_sizes(1, 1, 0.5))
        assert {size: len(make()[0]) for size, make in ahead.items()} == {128: 160, 256: 50}
    assert torch.equal(alone[0], shared[0]) and alone[1] == shared[1]


def test_renders_that_do_not_fit_into_memory_go_to_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*places: str) -> Callable[[int, int, int], None]:
        def allocate(handle: int, offset: int, size: int) -> None:
            if any(os.readlink(f"/proc/self/fd/{handle}").startswith(place) for place in places):
                raise OSError(errno.ENOSPC, "No space left on device")
            os.truncate(handle, size)

        return allocate

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(os, "posix_fallocate", full("/dev/shm"))
    with data._room(123) as name:
        assert Path(name).parent == tmp_path and Path(name).stat().st_size == 123
    monkeypatch.setattr(os, "posix_fallocate", full("/dev/shm", str(tmp_path)))
    with pytest.raises(ResourceError, match=r"2.0 GB of renders fit neither.*--workers 0"), data._room(2 * 10**9):
        pass
    assert list(tmp_path.iterdir()) == []


def test_crops_lie_on_the_grid_of_cells() -> None:
    """A picture of the crop's size comes whole; of a larger one, cuts whose corners are multiples of 8."""
    rows, columns = torch.meshgrid(torch.arange(256), torch.arange(256), indexing="ij")
    image = torch.stack((rows, columns, rows)).to(torch.uint8)[None]
    torch.manual_seed(0)
    for _ in range(20):
        cut = autoencoder.cropped(image, 2)
        assert cut.shape == (2, 3, 128, 128) and int(cut[0, 0, 0, 0]) % 8 == int(cut[0, 1, 0, 0]) % 8 == 0
        assert torch.equal(cut[0, 0, :, 0].int().diff(), torch.ones(127, dtype=torch.int32))
    assert torch.equal(autoencoder.cropped(image[..., :128, :128], 1), image[..., :128, :128])


def test_grid_is_rows_of_pictures() -> None:
    rows = [torch.zeros(2, 3, 4, 4), torch.ones(3, 3, 8, 8)]
    picture = grid(rows)
    assert picture.size == (24, 12)
    assert picture.getpixel((0, 0)) == (0, 0, 0)
    assert picture.getpixel((23, 11)) == (255, 255, 255)


@pytest.mark.slow
def test_short_runs_differ_in_what_they_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flow, "SHOWN", flow.SHOWN[:1])
    run, captions = Run(tmp_path, scale=TINY), held_out_captions(POCKET_1, 3)
    for name in ("base", "wider", "plain-latents"):
        short_runs.arm(run, name, captions)
    rows = {p.stem: json.loads(p.read_text()) for p in tmp_path.glob("*.json")}
    assert rows["base"]["captions"] == captions
    assert len(rows["base"]["scores"]) == 3
    assert rows["wider"]["parameters"] > 2 * rows["base"]["parameters"] == 2 * rows["plain-latents"]["parameters"]
    smooth, plain = (load_file(tmp_path / f"autoencoder-{name}.safetensors") for name in ("smooth", "plain"))
    assert any(not torch.equal(smooth[key], plain[key]) for key in smooth)
    assert {p.name for p in tmp_path.glob("*-0.006-latents.pt")} == {
        "smooth-0.006-latents.pt",
        "plain-0.006-latents.pt",
    }
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    short_runs.arm(run, "base", captions)  # is there
    assert before == {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    names = [line.split(" | ")[0] for line in short_runs.table(run).splitlines()[2:]]
    assert names == ["| base", "| wider", "| plain-latents"]


def test_short_runs_are_held_against_the_base_by_caption(tmp_path: Path) -> None:
    common = {"captions": ["a", "b", "b"], "ceiling": 1.0, "parameters": 3_000_000, "seconds": 60.0}
    (tmp_path / "base.json").write_text(json.dumps({**common, "scores": [0.25, 0.5, 0.75]}))
    (tmp_path / "both.json").write_text(json.dumps({**common, "scores": [0.0, 0.25, 0.5]}))
    base, both = short_runs.table(Run(tmp_path)).splitlines()[2:]
    assert base.endswith("0.50 (0.25 to 0.62) |  |")
    assert both.startswith("| both | 1000 | 3.00 M | plain | 8 % | 60 | 1.00 | 0.25 (")
    assert both.endswith("| -0.25 (-0.25 to -0.25) |")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["bigger"], "no run is called bigger; there are base, longer"),
        (["--scale", "0"], "--scale 0.0 or --captions 150 is out of range"),
        (["--captions", "0"], "--scale 1.0 or --captions 0 is out of range"),
        (["--scale", "0.5"], "was begun with another scale, batch or recipe"),
    ],
)
def test_short_runs_say_what_cannot_be(
    words: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    keep_settings(Run(tmp_path), "something else")
    monkeypatch.setattr("sys.argv", ["short_runs", "--out", str(tmp_path), *words])
    with pytest.raises(SystemExit):
        short_runs.main()
    assert said in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["settings.json"]

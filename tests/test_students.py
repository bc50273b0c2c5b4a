"""Few-step students: the published levels, strengths and guidance, alone and under MrFlow."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import mrflow as mf
from mrflow.checkpoints.adapters import check_loras
from mrflow.checkpoints.safetensors import read_header
from mrflow.models.pocket.model import NEWEST
from mrflow.records.files import known_file
from mrflow.scenes import FULL, held_out_captions
from mrflow.students import (
    HYPER_8,
    HYPER_16,
    LIGHTNING_4,
    LIGHTNING_8,
    POCKET,
    SCHNELL,
    TURBO_ALPHA,
)
from tests.parity.test_flux import relative
from tests.parity.test_official import UP, pipeline, words
from tests.scene_scores import score_many
from tests.test_lora import QWEN_LINEARS, qwen_lora
from tests.test_pocket import older
from tests.test_qwen import repo as qwen_repo  # noqa: F401  (fixture)

pytestmark = pytest.mark.filterwarnings("ignore")
LEVELS: list[tuple[mf.Student, mf.ModelInfo, int, int | None, list[float]]] = [
    (HYPER_8, mf.FLUX, 4096, None, [1, 0.957, 0.905, 0.840, 0.760, 0.655, 0.513, 0.311]),
    (TURBO_ALPHA, mf.FLUX, 4096, 4, [1, 0.905, 0.760, 0.513]),
    (HYPER_8, mf.FLUX, 1024, None, [1, 0.929, 0.849, 0.758, 0.652, 0.530, 0.385, 0.211]),
    (LIGHTNING_4, mf.QWEN, 4096, None, [1, 0.9, 0.75, 0.5]),
    (LIGHTNING_4, mf.QWEN, 1024, None, [1, 0.9, 0.75, 0.5]),
    (LIGHTNING_8, mf.QWEN, 4096, None, [1, 0.955, 0.9, 0.833, 0.75, 0.643, 0.5, 0.3]),
    (SCHNELL, mf.SCHNELL, 4096, None, [1, 0.75, 0.5, 0.25]),
    (SCHNELL, mf.SCHNELL, 4096, 2, [1, 0.5]),
    (SCHNELL, mf.SCHNELL, 4096, 1, [1]),
    (POCKET, mf.POCKET, 1024, None, [1, 0.6667]),
]


def test_the_embedded_student_fits_its_teacher_and_says_so_of_others(
    caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    few = mf.recipes.few(POCKET, size=(64, 64))
    mf.run(few, mf.load("pocket", device="cpu"), "a big red circle at the left")
    assert not any("taught" in said for said in caplog.messages)
    other = older(tmp_path, "pocket-0")
    mf.run(few, mf.load(other, device="cpu"), "a big red circle at the left")
    (said,) = [said for said in caplog.messages if "taught" in said]
    assert said.startswith(f"{NEWEST}-student.safetensors was taught by {NEWEST}+") and f"load('{NEWEST}')" in said
    caplog.clear()
    merged = mf.load(other, device="cpu", lora=POCKET.lora)
    assert f"was taught by {NEWEST}+" in caplog.text
    assert merged.info.version.startswith("pocket-0+")


def test_an_adapter_for_another_width_does_not_fit(tmp_path: Path) -> None:
    (adapter,) = check_loras(POCKET.lora)
    header, tensors = read_header(Path(adapter.path)), load_file(adapter.path)
    narrow = tmp_path / "narrow.safetensors"
    save_file({k: t[..., :64].contiguous() for k, t in tensors.items()}, narrow, dict(header.metadata))
    with pytest.raises(mf.WeightsError, match="does not fit pocket"):
        mf.load("pocket", device="cpu", lora=mf.Lora(str(narrow)))


@pytest.mark.slow
def test_what_two_evaluations_of_the_embedded_student_draw() -> None:
    model, captions = mf.load("pocket", device="cpu"), held_out_captions(FULL, 8)
    guided, student = (mf.run(chain, model, captions, seed=0).pixels for chain in (
        mf.recipes.native(size=(256, 256), steps=1), mf.recipes.few(mf.students.POCKET, size=(256, 256)),
    ))  # fmt: skip
    assert score_many(student, captions)["overall"] > 0.9 > score_many(guided, captions)["overall"]


@pytest.mark.parametrize(("student", "info", "tokens", "steps", "levels"), LEVELS)
def test_levels(student: mf.Student, info: mf.ModelInfo, tokens: int, steps: int | None, levels: list[float]) -> None:
    found = student.schedule(steps)(1.0, tokens, info)
    assert found[:-1] == pytest.approx(levels, abs=6e-4)
    assert found[-1] == 0


def test_no_steps_are_refused() -> None:
    with pytest.raises(mf.PlanError, match="steps"):
        mf.recipes.few(POCKET, size=(256, 256), steps=0)


def test_strengths_and_passes() -> None:
    assert [s.lora[0].strength for s in (HYPER_8, HYPER_16, TURBO_ALPHA, LIGHTNING_4)] == [0.125, 0.125, 1, 1]  # type: ignore[index, union-attr]  # pyright: ignore
    assert mf.plan(mf.recipes.few(LIGHTNING_4), mf.QWEN).nfe == 4
    assert mf.plan(mf.recipes.few(HYPER_8), mf.FLUX).nfe == 8
    assert mf.plan(mf.recipes.stacked(LIGHTNING_4, UP), mf.QWEN).nfe == 5
    assert mf.plan(mf.recipes.stacked(LIGHTNING_4, UP, refine="base"), mf.QWEN).nfe == 6  # the base is guided
    one = mf.plan(mf.recipes.stacked(SCHNELL, UP, steps=1), mf.SCHNELL)
    assert one.nfe == 2
    with pytest.raises(mf.PlanError, match="refine must be"):
        mf.recipes.stacked(SCHNELL, UP, refine="both")  # type: ignore[arg-type]  # pyright: ignore


def test_the_low_stage_may_keep_the_levels_of_the_full_size() -> None:
    chain = mf.recipes.stacked(HYPER_8, UP, full_levels=True)
    assert mf.plan(chain, mf.FLUX).rows[0].sigmas[:3] == pytest.approx([1, 0.957, 0.905], abs=6e-4)


def test_a_student_on_tiny_models(tmp_path: Path, qwen_repo: Path) -> None:  # noqa: F811
    file = qwen_lora(tmp_path / "x.safetensors", "lightning", QWEN_LINEARS)
    own = mf.Student(4, mf.Lora(str(file)), LIGHTNING_4.shift, LIGHTNING_4.guidance)
    model = mf.load(qwen_repo, device="cpu")
    sizes: Any = {"low": (48, 64), "size": (96, 128)}
    base = mf.run(mf.recipes.stacked(own, UP, refine="base", **sizes), model, "a cat")
    both = mf.run(mf.recipes.stacked(own, UP, **sizes), model, "a cat")
    assert [s.nfe for s in base.stages if s.nfe] == [4, 2]
    assert [s.nfe for s in both.stages if s.nfe] == [4, 1]
    assert relative(base.pixels, both.pixels) > 1e-4
    merged = mf.load(qwen_repo, device="cpu", lora=mf.Lora(str(file)))
    bare = mf.Student(4, (), LIGHTNING_4.shift, LIGHTNING_4.guidance)
    want = mf.run(mf.recipes.stacked(bare, UP, **sizes), merged, "a cat").pixels
    assert relative(both.pixels, want) < 1e-4
    pipeline(tmp_path / "schnell", guidance=False)
    schnell = mf.load(tmp_path / "schnell", device="cpu")
    drawn = mf.run(mf.recipes.few(SCHNELL, size=(64, 96), steps=2), schnell, condition=mf.Condition(words(1)))
    assert drawn.nfe == 2
    assert torch.isfinite(drawn.pixels).all()


def test_a_record_finds_the_adapter_that_comes_with_mrflow() -> None:
    """A record holds a file's name and SHA-256, not its place."""
    found = known_file(f"{NEWEST}-student.safetensors")
    assert found is not None and found == Path(check_loras(POCKET.lora)[0].path)
    assert known_file("nothing.safetensors") is None

"""A family is one folder: plan, load and inspect ask it, and a new one is known without another file changed."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import mrflow as mf
from mrflow.checkpoints.safetensors import save_file
from mrflow.cli.app import app
from mrflow.models import family, info
from mrflow.models.describe import describe
from tests.tiny import write_flux_repo, write_qwen_repo, write_zimage_repo
from tests.toy_family import ToyFamily, write_repository


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A toy repository, and its family known."""
    monkeypatch.setattr(family, "_registered", ())
    family.register(ToyFamily())
    return write_repository(tmp_path / "toy")


def ladder() -> mf.Chain[mf.Start, mf.Pixels]:
    return (
        mf.Sample(16, 16, mf.Shifted(3))
        >> mf.Decode()
        >> mf.Upscale(mf.Lanczos(2))
        >> mf.Encode()
        >> mf.Reinject(0.3)
        >> mf.Refine(mf.Linear(2))
        >> mf.Decode()
    )


def test_a_family_of_ones_own_is_planned_loaded_run_and_adapted(toy: Path, tmp_path: Path) -> None:
    model = mf.load(toy, device="cpu")
    assert info(str(toy)) == replace(model.info, version="")
    assert mf.plan(ladder(), info(str(toy))).nfe == 5
    plain = mf.run(ladder(), model, "a tree")
    assert plain.pixels.shape == (1, 3, 32, 32) and plain.nfe == 5
    pair = {"toy_blocks.1.lora_A.weight": torch.ones(1, 16), "toy_blocks.1.lora_B.weight": torch.ones(16, 1)}
    save_file(pair, tmp_path / "lora.safetensors")
    low = mf.Lora(str(tmp_path / "lora.safetensors"), 0.1)
    merged = mf.run(mf.Sample(16, 16, mf.Shifted(3)), mf.load(toy, device="cpu", lora=low), "a tree").data
    staged = mf.run(mf.Sample(16, 16, mf.Shifted(3), lora=low), model, "a tree").data
    torch.testing.assert_close(merged, staged)
    assert not torch.allclose(staged, mf.run(mf.Sample(16, 16, mf.Shifted(3)), model, "a tree").data)
    assert any("tensors of a toy" in line for line in describe(toy / "transformer"))


def test_what_the_family_does_not_have_is_refused(toy: Path, tmp_path: Path) -> None:
    save_file({"toy_nothing.lora_A.weight": torch.ones(1, 16)}, tmp_path / "lora.safetensors")
    with pytest.raises(mf.WeightsError):
        mf.load(toy, device="cpu", lora=tmp_path / "lora.safetensors")
    with pytest.raises(mf.PlanError, match="cannot be cached"):
        mf.plan(mf.Sample(16, 16, cache=mf.caches.TaylorSeer(2)) >> mf.Decode(), info(str(toy)))


def test_unregistered_it_is_not_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(family, "_registered", ())
    with pytest.raises(mf.WeightsError, match="holds a ToyPipeline"):
        mf.load(write_repository(tmp_path / "toy"), device="cpu")


@pytest.mark.parametrize("write", [write_flux_repo, write_qwen_repo, write_zimage_repo])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_folder_is_planned_as_it_is_loaded(write: object, dtype: torch.dtype, tmp_path: Path) -> None:
    """All facts, also of memory; what text encoders take is told from headers, where buffers do not show."""
    folder = write(tmp_path / "repo", dtype=dtype)  # type: ignore[operator]
    planned, loaded = info(str(folder)), mf.load(folder, device="cpu").info
    assert planned.footprint is not None and loaded.footprint is not None
    of_text = {"text": 0, "text_layers": 0, "text_pair": 0}
    assert replace(planned, footprint=replace(planned.footprint, **of_text)) == replace(
        loaded, version="", footprint=replace(loaded.footprint, **of_text)
    )
    for name in of_text:
        assert getattr(planned.footprint, name) == pytest.approx(getattr(loaded.footprint, name), rel=0.05)


def test_the_command_line_plans_that_model(tmp_path: Path) -> None:
    folder = write_flux_repo(tmp_path / "repo")
    done = CliRunner().invoke(app, ["plan", "--model", str(folder), "--size", "64x64", "--low", "32x32"])
    assert done.exit_code == 0, done.output
    facts = info(str(folder)).architecture
    assert facts is not None
    for text in (
        f"{facts.double_blocks} double",
        f"{facts.single_blocks} single",
        f"{facts.parameters:,}",
        "sigmas",
        f"{facts.text_tokens}",
    ):
        assert text in done.output

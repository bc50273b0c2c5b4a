"""Upscalers by a short name, and enlarging without a model."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner

import mrflow as mf
from mrflow.cli.app import app
from mrflow.cli.parsing import upscaler
from mrflow.errors import PlanError, WeightsError
from mrflow.upscalers import shelf
from mrflow.upscalers.nets import CompactParams, SRVGGNetCompact


@pytest.fixture(autouse=True)
def own_shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MRFLOW_SR", str(tmp_path / "shelf"))
    return tmp_path / "shelf"


def network(path: Path, convs: int = 16) -> Path:
    torch.manual_seed(0)
    save_file(dict(SRVGGNetCompact(CompactParams(convs=convs)).state_dict()), path)
    return path


def test_a_network_is_kept_once_and_found(tmp_path: Path, own_shelf: Path) -> None:
    file = network(tmp_path / "realesr-animevideov3.safetensors")
    assert shelf.add(file) == ("video", own_shelf / "video.safetensors")
    assert file.is_file() and os.listdir(own_shelf) == ["video.safetensors"]
    taken = upscaler("video")
    assert taken is not None and not isinstance(taken, str) and taken.scale == 4
    with pytest.raises(PlanError, match="video is taken by"):
        shelf.add(file)


def test_absent_it_says_what_to_get() -> None:
    with pytest.raises(PlanError, match=r"get RealESRGAN_x4plus\.pth from .*BSD-3-Clause.*`mrflow sr add"):
        upscaler("realesrgan-x4")


def test_another_network_is_refused(tmp_path: Path, own_shelf: Path) -> None:
    file = network(tmp_path / "realesr-animevideov3.safetensors", convs=8)
    with pytest.raises(WeightsError, match="is not Real-ESRGAN animevideov3: its network is"):
        shelf.add(file)
    with pytest.raises(PlanError, match="--name realesrgan-x4, anime, video"):
        shelf.add(network(tmp_path / "mine.safetensors"))
    assert not own_shelf.exists()


def picture(path: Path) -> Path:
    values = np.random.default_rng(0).integers(0, 256, (12, 20, 3), dtype=np.uint8)
    Image.fromarray(values).save(path)
    return path


def test_sr_only_enlarges_without_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("mrflow.models.load", lambda *_, **__: pytest.fail("a model was loaded"))
    picture(tmp_path / "cat.png")
    args = ["refine", "cat.png", "--sr-only", "--sr", "lanczos", "--scale", "3"]
    done = CliRunner().invoke(app, args)
    assert done.exit_code == 0, done.output
    with Image.open(tmp_path / "cat-enlarged.png") as made, Image.open(tmp_path / "cat.png") as source:
        assert made.size == (60, 36)
        back = np.asarray(made.resize((20, 12), Image.Resampling.BOX), dtype=float)
        assert np.abs(back - np.asarray(source, dtype=float)).mean() < 25  # the picture, not another (about 85)
    for wrong in (["--sr", "own"], [], ["--sr", "latent-bicubic"]):
        assert "--sr-only needs an upscaler of pixels" in CliRunner().invoke(app, [*args[:3], *wrong]).output


def test_the_list_says_what_is_here(tmp_path: Path) -> None:
    shelf.add(network(tmp_path / "realesr-animevideov3.safetensors"))
    text = CliRunner().invoke(app, ["sr", "list"]).output
    assert "video.safetensors" in text and "anime: Real-ESRGAN x4plus anime 6B, BSD-3-Clause; not here" in text


@pytest.mark.parametrize(("scale", "passes"), [(1.0, 1), (3.0, 1), (8.0, 2)])
def test_sr_only_gives_what_the_stage_gives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scale: float, passes: int
) -> None:
    """The same passes, the same resize: the picture is that of `Upscale` in a chain."""
    monkeypatch.chdir(tmp_path)
    file, start = network(tmp_path / "x4.safetensors"), mf.read_image(picture(tmp_path / "cat.png"))
    calls, single = [0], mf.Checkpoint.__call__

    def counted(self: mf.Checkpoint, pixels: torch.Tensor) -> torch.Tensor:
        calls[0] += 1
        return single(self, pixels)

    monkeypatch.setattr(mf.Checkpoint, "__call__", counted)
    args = ["refine", "cat.png", "--sr-only", "--sr", str(file), "--scale", str(scale)]
    done = CliRunner().invoke(app, args)
    assert done.exit_code == 0, done.output
    assert calls[0] == passes
    size = (int(12 * scale), int(20 * scale))
    if scale > 1:  # at the same size a chain has nothing to do
        stage = mf.Upscale(mf.Checkpoint(str(file)), size)
        pixels = mf.run(stage >> mf.Upscale(mf.Lanczos(2), size), mf.toy(), "", start=start).pixels
        assert torch.equal(mf.read_image(tmp_path / "cat-enlarged.png"), (255 * pixels).round() / 255)


def test_an_orphan_of_a_pair_is_not_written_over(tmp_path: Path, own_shelf: Path) -> None:
    own_shelf.mkdir()
    (own_shelf / "video.bin").write_bytes(b"another's")
    with pytest.raises(PlanError, match=r"video is taken by .*video\.bin"):
        shelf.add(network(tmp_path / "realesr-animevideov3.safetensors"))
    assert (own_shelf / "video.bin").read_bytes() == b"another's"

"""Pictures, records and files."""

import errno
import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import mrflow as mf
from mrflow import io
from mrflow.records import decode, decode_chain, encode, encode_chain

CHAIN = mf.recipes.paper(low=(32, 32), size=(64, 64), steps=3)


@dataclass(frozen=True)
class Dim(mf.Stage[mf.Pixels, mf.Pixels]):
    """A stage from outside mrflow."""

    factor: float = 0.5

    def plan(self, spec: mf.Pixels, model: mf.ModelInfo) -> mf.Pixels:
        return spec

    def apply(self, state: mf.State[mf.Pixels], out: mf.Pixels, ctx: mf.Context) -> torch.Tensor:
        return state.data * self.factor


@pytest.mark.parametrize(
    "chain",
    [
        CHAIN,
        mf.recipes.official(mf.Lanczos(2), low=(32, 32), size=(64, 64), eight_bit=True),
        mf.recipes.ladder([(32, 32), (64, 64), (96, 96)], sigmas=(0.2, 0.1), upscalers=mf.Interpolate(2)),
        mf.recipes.native(
            size=(64, 64), schedule=mf.Karras(7), solver=mf.Heun(), guidance=mf.Interval(mf.CFG(3.0), 0.1, 0.9)
        ),
        mf.Sample(64, 64, mf.Explicit((1.0, 0.4, 0.0)), solver=mf.StochasticEuler(0.3)) >> mf.Decode(),
    ],
)
def test_a_chain_survives_its_record(chain: mf.Chain) -> None:  # type: ignore[type-arg]
    text = json.dumps(encode_chain(chain))
    assert decode_chain(json.loads(text)) == chain


def test_replay_gives_the_same_pixels(tmp_path: Path) -> None:
    result = mf.run(CHAIN, mf.toy(), ["a", "héllo \u202e 🙂\n../x"], seed=[5, 6], negative="no")
    paths = result.save(tmp_path / "x.png")
    assert [p.name for p in paths] == ["x-0.png", "x-1.png"]
    for i, path in enumerate(paths):
        again = mf.replay(path, model=mf.toy())
        assert torch.allclose(again.pixels[0], result.pixels[i], atol=1e-6)
        assert again.prompts == (result.prompts[i],)
    assert mf.read_record(paths[1])["prompt"] == "héllo \u202e 🙂\n../x"
    assert not list(tmp_path.glob(".*"))


def test_own_stages_are_replayed_only_when_named(tmp_path: Path) -> None:
    path = mf.run(CHAIN >> Dim(0.25), mf.toy(), "a").save(tmp_path / "x.png")[0]
    with pytest.raises(mf.RecordError, match=r"pass that class: replay\(..., types=\[Dim\]\)"):
        mf.replay(path, model=mf.toy())
    assert mf.replay(path, model=mf.toy(), types=[Dim]).pixels.max() <= 0.25


@pytest.mark.parametrize(
    ("data", "text"),
    [
        ({"type": "os:system", "command": "x"}, "made with system from os"),
        ({"type": "mrflow.solvers:Nothing"}, "this mrflow has no mrflow.solvers:Nothing"),
        ({"type": "mrflow.stage:plan"}, "this mrflow has no"),
        ({"type": "mrflow.schedules:Linear", "steps": 3, "new": 1}, "unknown field 'new'"),
        ({"type": "mrflow.schedules:Linear", "steps": 0}, "cannot be made: steps must be"),
        ({"no": 1}, "object without a type"),
    ],
)
def test_bad_records(data: object, text: str) -> None:
    with pytest.raises(mf.RecordError, match=text):
        decode(data)


def test_what_cannot_be_recorded_is_said() -> None:
    with pytest.raises(mf.RecordError, match="object cannot be written into a record"):
        encode(object())


def test_pictures_without_a_record(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    with pytest.raises(mf.RecordError, match="carries no mrflow record"):
        mf.read_record(tmp_path / "plain.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "plain.png").read_bytes()[:30])
    with pytest.raises(mf.RecordError, match="not a whole PNG"):
        mf.read_record(tmp_path / "cut.png")
    with pytest.raises(mf.ResourceError, match="cannot be read"):
        mf.read_record(tmp_path / "none.png")
    assert mf.ResourceError.exit_code == 5


def test_another_model_is_refused(tmp_path: Path) -> None:
    path = mf.run(CHAIN, mf.toy(), "a").save(tmp_path / "x.png")[0]
    with pytest.raises(mf.RecordError, match=r"was made by toy .*, but the model given is pocket"):
        mf.replay(path, model=mf.load("pocket"))


def test_read_image_turns_every_kind_into_rgb(tmp_path: Path) -> None:
    base = np.arange(192, dtype=np.uint8).reshape(8, 8, 3)
    for name, image in {
        "rgb.png": Image.fromarray(base),
        "grey.png": Image.fromarray(base[..., 0]),
        "rgba.png": Image.fromarray(np.dstack([base, np.full((8, 8), 128, np.uint8)])),
        "cmyk.jpg": Image.fromarray(base).convert("CMYK"),
        "sixteen.png": Image.fromarray(base[..., 0].astype(np.uint16) * 257),
        "palette.png": Image.fromarray(base).convert("P"),
    }.items():
        image.save(tmp_path / name)
        pixels = mf.read_image(tmp_path / name)
        assert pixels.shape == (1, 3, 8, 8) and pixels.dtype == torch.float32
        assert float(pixels.min()) >= 0 and float(pixels.max()) <= 1
    assert torch.equal(mf.read_image(tmp_path / "rgb.png")[0], torch.from_numpy(base / 255).permute(2, 0, 1).float())
    assert torch.allclose(
        mf.read_image(tmp_path / "sixteen.png")[0, 0], torch.from_numpy(base[..., 0] / 255).float(), atol=1e-4
    )
    turned = Image.fromarray(base[:4])
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.png", exif=exif)
    assert mf.read_image(tmp_path / "turned.png").shape == (1, 3, 8, 4)


def test_read_image_refuses_what_is_no_picture(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("hello")
    with pytest.raises(mf.PlanError, match="not a picture that Pillow can read"):
        mf.read_image(tmp_path / "text.png")
    Image.effect_noise((64, 64), 50).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:900])
    with pytest.raises(mf.PlanError, match="broken picture"):
        mf.read_image(tmp_path / "cut.png")
    with pytest.raises(mf.ResourceError, match="cannot be read"):
        mf.read_image(tmp_path / "none.png")


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    (tmp_path / "kept.png").write_bytes(b"old")
    with pytest.raises(mf.ResourceError, match="No space left on device; nothing was left behind"):
        io.write_bytes(tmp_path / "kept.png", b"new")
    assert [p.name for p in tmp_path.iterdir()] == ["kept.png"]
    assert (tmp_path / "kept.png").read_bytes() == b"old"


def test_output_is_checked_before_work(tmp_path: Path) -> None:
    with pytest.raises(mf.ResourceError, match="does not exist"):
        io.check_writable(tmp_path / "no" / "x.png")
    with pytest.raises(mf.ResourceError, match="is a folder"):
        io.check_writable(tmp_path)
    result = mf.run(CHAIN, mf.toy(), "a")
    with pytest.raises(mf.PlanError, match=r"should end in \.png"):
        result.save(tmp_path / "x.jpg")


@pytest.mark.parametrize(
    ("text", "stem"),
    [("A Big RED circle!", "a-big-red-circle"), ("../../etc", "etc"), ("", "picture"), ("🙂\0", "picture")],
)
def test_file_names_come_from_letters_alone(text: str, stem: str) -> None:
    assert io.slug(text) == stem

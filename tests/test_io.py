"""Pictures, records and files."""

import errno
import hashlib
import importlib
import inspect
import json
import os
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

import mrflow as mf
from mrflow.caches.dmd import Modes
from mrflow.records import pictures as io
from mrflow.records.chains import decode, decode_chain, encode, encode_chain, name_of
from mrflow.records.files import FileNamed

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
    with pytest.raises(mf.RecordError, match=r"--with FILE, or pass that class: replay\(..., types=\[Dim\]\)"):
        mf.replay(path, model=mf.toy())
    assert mf.replay(path, model=mf.toy(), types=[Dim]).pixels.max() <= 0.25


@pytest.mark.parametrize(
    ("data", "text"),
    [
        ({"type": "os:system", "command": "x"}, "made with system from os"),
        ({"type": "Nothing"}, "this mrflow has no Nothing"),
        ({"type": "plan"}, "this mrflow has no plan"),
        ({"type": "mrflow.solvers:Euler"}, "this mrflow has no mrflow.solvers:Euler"),
        ({"type": "solvers.Euler"}, "this mrflow has no solvers.Euler"),
        ({"type": "caches.base.Cache"}, "this mrflow has no caches.base.Cache"),
        ({"type": "Linear", "steps": 3, "new": 1}, "unknown field 'new'"),
        ({"type": "Linear", "steps": 0}, "cannot be made: steps must be"),
        ({"no": 1}, "object without a type"),
    ],
)
def test_bad_records(data: object, text: str) -> None:
    with pytest.raises(mf.RecordError, match=text):
        decode(data)


def test_what_cannot_be_recorded_is_said() -> None:
    with pytest.raises(mf.RecordError, match="object cannot be written into a record"):
        encode(object())
    with pytest.raises(mf.RecordError, match="Modes is not a public name of mrflow"):
        encode(Modes(4, 0.1))


def test_every_type_a_chain_may_hold_has_a_public_name() -> None:
    for module in pkgutil.walk_packages(mf.__path__, "mrflow."):
        if not module.name.endswith(("__main__", "triton_code")):  # that one needs triton, and holds no types
            importlib.import_module(module.name)
    kinds: list[type] = [mf.Stage, mf.Schedule, mf.Solver, mf.Guidance, mf.Noise, mf.Upscaler, mf.caches.Cache]
    left = list(kinds)
    while left:
        more: list[type] = left.pop().__subclasses__()
        left, kinds = left + more, kinds + more
    own = [c for c in kinds if c.__module__.startswith("mrflow.") and not inspect.isabstract(c) and is_dataclass(c)]
    own += [mf.Level, mf.Lora, mf.PiFlow, mf.Tiles]
    names = {name_of(c) for c in own}
    assert len(names) == len(set(own)) and {"Sample", "Part", "caches.TeaCache", "BasicSR"} <= names
    assert not [n for n in names if ":" in n or n.removeprefix("caches.").count(".")]


def test_noise_does_not_hang_on_the_name_of_a_class() -> None:
    def below(cls: type) -> set[type[mf.Stage[Any, Any]]]:
        return {c for each in cls.__subclasses__() for c in (each, *below(each))}

    shipped = {c for c in below(mf.Stage) if c.__module__.startswith(("mrflow.st", "mrflow.ri"))}
    own = {c for c in shipped if not inspect.isabstract(c)}
    assert sorted(c.scope for c in own) == [
        *("Crop", "Decode", "Encode", "Grow", "Lift", "Quantise", "Refine", "Reinject"),
        *("Sample", "SampleAnchors", "SampleConverged", "SampleRegions", "SelfLift", "Truth", "Upscale"),
    ]
    assert all(f'scope: ClassVar[str] = "{c.scope}"' in inspect.getsource(c) for c in own)  # written down, not derived

    @dataclass(frozen=True)
    class Renamed(mf.Sample):
        scope: ClassVar[str] = "Sample"

    @dataclass(frozen=True)
    class Mine(mf.Sample):
        pass

    a, b, c = (mf.run(kind(32, 32) >> mf.Decode(), mf.toy(), "a").pixels for kind in (mf.Sample, Renamed, Mine))
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_a_type_of_ones_own_never_stands_for_one_of_ours() -> None:
    @dataclass(frozen=True)
    class Euler(mf.Solver):
        def step(self, *_: object) -> tuple[torch.Tensor, mf.History]:
            raise AssertionError

    assert decode(encode(mf.Euler()), [Euler]) == mf.Euler()
    elsewhere = f"another_module:{Euler.__qualname__}"  # the file was run by itself
    assert isinstance(decode({"type": elsewhere}, [Euler]), Euler)


def test_pictures_without_a_record(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    with pytest.raises(mf.RecordError, match="carries no mrflow record"):
        mf.read_record(tmp_path / "plain.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "plain.png").read_bytes()[:30])
    with pytest.raises(mf.RecordError, match="not a whole PNG"):
        mf.read_record(tmp_path / "cut.png")
    (tmp_path / "own.py").write_text("chain = None")
    with pytest.raises(mf.RecordError, match="own.py is no PNG; records lie in the PNGs that mrflow saves"):
        mf.read_record(tmp_path / "own.py")
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
    with pytest.raises(mf.PlanError, match="not an image that mrflow reads"):
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


def hostile(path: Path, **changes: object) -> Path:
    """A picture whose record was changed by hand."""
    made = mf.run(CHAIN, mf.toy(), "a")
    io.write_png(path, made.images[0], made.record() | changes)
    return path


@pytest.mark.parametrize("name", ["owner/model", "/etc/passwd", "../pocket", "flux1-dev", ""])
def test_a_record_loads_embedded_models_only(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mrflow.models.load", lambda *a, **k: pytest.fail("a record chose what is loaded"))
    with pytest.raises(mf.RecordError, match="which is not embedded; give it: --model"):
        mf.replay(hostile(tmp_path / "x.png", model=name))


@pytest.mark.parametrize(
    "value",
    [
        {"type": "Lora", "path": "owner/name/x.safetensors", "strength": 1.0, "skip_text": False, "sha256": ""},
        {"type": "Lora", "path": "/dev/zero"},
        {"type": "Lora", "path": 5},
        {"type": "Lora", "path": "../x\0.safetensors"},
    ],
)
def test_a_record_uses_files_only_when_they_are_given(tmp_path: Path, value: object) -> None:
    stage = {"type": "Sample", "height": 32, "width": 32, "lora": [value]}
    with pytest.raises(mf.WeightsError, match="is not here: say where it is"):
        mf.replay(hostile(tmp_path / "x.png", chain=[stage]), model=mf.toy())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"prompt": 5}, "prompt is no text"),
        ({"seed": "x"}, "seed is no whole number"),
        ({"seed": True}, "seed is no whole number"),
        ({"stages": [1]}, "a stage is no table"),
        ({"stages": [{"name": 5}]}, "a stage holds values of other types"),
        ({"format": 99}, "has the format 99; this mrflow reads up to 1"),
        ({"chain": {}}, "chain is no list"),
        ({"seconds": float("nan")}, "NaN is no number"),
    ],
)
def test_records_are_held_to_their_types(tmp_path: Path, changes: dict[str, object], words: str) -> None:
    with pytest.raises(mf.RecordError, match=words):
        mf.read_record(hostile(tmp_path / "x.png", **changes))


def test_deep_and_twofold_records(tmp_path: Path) -> None:
    deep: object = 0
    for _ in range(100):
        deep = [deep]
    with pytest.raises(mf.RecordError, match="nested more than 32 deep"):
        mf.replay(hostile(tmp_path / "x.png", chain=[{"type": "Sample", "guidance": deep}]), model=mf.toy())
    info = PngImagePlugin.PngInfo()
    for text in ('{"format": 1}', '{"format": 1, "prompt": "other"}'):
        info.add_itxt("mrflow", text, zip=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "two.png", pnginfo=info)
    with pytest.raises(mf.RecordError, match="it carries 2"):
        mf.read_record(tmp_path / "two.png")
    for text in ("[" * 100_000, '{"a": ' * 5_000 + "1" + "}" * 5_000, '{"seed": ' + "9" * 9_000 + "}", "[1]", "null"):
        info = PngImagePlugin.PngInfo()
        info.add_itxt("mrflow", text, zip=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "x.png", pnginfo=info)
        with pytest.raises(mf.RecordError, match="record is broken"):
            mf.read_record(tmp_path / "x.png")


@pytest.mark.parametrize(
    "prompt", ["红色的圆" * 50_000, "🔴" * 90_000, "a red circle " * 69_000], ids=["CJK", "emoji", "ASCII"]
)
def test_whatever_prompt_was_accepted_is_read_and_replayed(tmp_path: Path, prompt: str) -> None:
    made = mf.run(CHAIN, mf.toy(), prompt)
    made.save(tmp_path / "x.png")
    assert mf.read_record(tmp_path / "x.png")["prompt"] == prompt
    assert torch.equal(mf.replay(tmp_path / "x.png", model=mf.toy()).pixels, made.pixels)
    assert float((mf.read_image(tmp_path / "x.png") - made.pixels).abs().max()) < 1 / 255
    with pytest.raises(mf.PromptError, match="at most 1000000"):
        mf.run(CHAIN, mf.toy(), "a" * 1_000_001)
    with pytest.raises(mf.PromptError, match="the negative prompt has 1000001"):
        mf.run(CHAIN, mf.toy(), "a", negative="a" * 1_000_001)


@dataclass(frozen=True)
class Weighed(FileNamed):
    files: ClassVar[Mapping[str, str]] = {"weights": "digest"}
    weights: str
    digest: str = ""
    scale: int = 2

    def __post_init__(self) -> None:
        self.find_file("weights", self.weights)


def test_a_record_of_what_names_files_holds_fields_alone(tmp_path: Path) -> None:
    (tmp_path / "net.bin").write_bytes(b"weights")
    made = Weighed(str(tmp_path / "net.bin"))
    assert made.to_record() == {"weights": "net.bin", "digest": hashlib.sha256(b"weights").hexdigest(), "scale": 2}

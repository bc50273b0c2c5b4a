"""The embedded model: loads, draws what the caption says, and keeps mrflow's promises about batches and sizes."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import mrflow as mf
from experiments.pocket_scores import BLOCK
from experiments.train_pocket.data import tensors_of
from mrflow.errors import WeightsError
from mrflow.models import info
from mrflow.models.pocket.model import (
    NEWEST,
    SHIPPED,
    TEXT_LENGTH,
    VOCABULARY,
    WEIGHTS,
    embedded_file,
    load_pocket,
    open_pocket,
)
from mrflow.models.pocket.networks import CompactSR, tokenise
from mrflow.scenes.grammar import FULL, held_out_captions
from tests.scene_scores import score_many

CHAIN = mf.recipes.paper(low=(128, 128), size=(256, 256))  # the smaller pair of sizes that it was trained at
DEFAULT = mf.recipes.paper(low=info("pocket").low, size=info("pocket").size)
GOLDEN = Path(__file__).parent / "golden" / "pocket.json"


def older(folder: Path, name: str) -> Path:
    """A file of another version: the shipped weights, a little smaller, with guidance 3."""
    from safetensors.torch import save_file

    path = folder / f"{name}.safetensors"
    tensors = {key: 0.99 * tensor for key, tensor in tensors_of(open_pocket(WEIGHTS)).items()}
    save_file(tensors, path, {"version": f"{name}+0123456789ab", "cfg": "3.0"})
    return path


@pytest.fixture(scope="module")
def model() -> mf.Backbone:
    """The shipped weights."""
    return mf.load("pocket", device="cpu")


def test_the_file_is_small_and_has_a_version(model: mf.Backbone) -> None:
    shipped_files = sorted(WEIGHTS.parent.glob("*.safetensors"))
    stems = {stem for name in SHIPPED for stem in (name, f"{name}-student", f"{name}-autoencoder")}
    assert {*SHIPPED} < {p.stem for p in shipped_files} <= stems
    assert all(
        {entry.file for entry in open_pocket(path).tensors.values()} <= {*shipped_files} for path in SHIPPED.values()
    )
    assert sum(p.stat().st_size for p in shipped_files) < 21e6  # the wheel stays below 22 MB
    assert model.info.version.startswith(f"{next(iter(SHIPPED))}+")
    assert model.info.name == "pocket"


@pytest.mark.parametrize("name", [*SHIPPED, "pocket-0"])
def test_every_version_loads_by_name_and_its_pictures_are_made_again(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A record says "pocket" and the version; replaying takes the weights that made the picture."""
    if name not in SHIPPED:
        monkeypatch.setitem(SHIPPED, name, older(tmp_path, name))
    old = mf.load(name, device="cpu")
    assert old.info.version.startswith(f"{name}+")
    assert old.info.name == "pocket"
    assert info(name) == replace(old.info, version="")
    assert old.info.cfg == (3.0 if name == "pocket-0" else 2.0)  # each is used with its own guidance
    result = mf.run(mf.recipes.paper(low=(64, 64), size=(128, 128), steps=2), old, "the big blue word CAT", seed=3)
    (path,) = result.save(tmp_path / "old.png")
    again = mf.replay(path)
    assert again.record()["weights"] == result.record()["weights"] == old.info.version
    assert torch.equal(again.pixels, result.pixels)


def test_a_version_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(WeightsError, match=rf"no model or file 'pocket-0'; use 'pocket' \(.*{NEWEST}\)"):
        mf.load("pocket-0")
    assert embedded_file("pocket", "pocket-0+1") == embedded_file("pocket") == WEIGHTS
    monkeypatch.setitem(SHIPPED, "pocket-0", tmp_path)
    assert embedded_file("pocket", "pocket-0+1") == tmp_path and embedded_file("pocket") == WEIGHTS
    assert embedded_file("flux1-dev", f"{NEWEST}+1") is None


def test_the_facts_for_planning_are_the_real_ones(model: mf.Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parameters and operations, counted on the loaded networks."""
    from torch.utils.flop_counter import FlopCounterMode

    from mrflow.cost import decode_flops, encode_flops, forward_flops
    from mrflow.models.pocket.model import Pocket

    assert isinstance(model, Pocket)
    facts = model.info
    a = facts.architecture
    assert a is not None
    assert a.parameters == sum(p.numel() for p in model.transformer.parameters())

    def counted(call) -> int:  # type: ignore[no-untyped-def]
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            call()
        return int(counter.get_total_flops())

    pixels, latents = torch.rand(1, 3, 128, 128), torch.randn(1, 16, 16, 16)
    assert counted(lambda: model.encode(pixels)) == pytest.approx(encode_flops(facts, 128, 128), rel=0.01)
    assert counted(lambda: model.decode(latents)) == pytest.approx(decode_flops(facts, 128, 128), rel=0.01)
    assert model.upscaler is not None
    assert counted(lambda: model.upscaler(pixels)) == pytest.approx(facts.upscale_flops * 128 * 128, rel=0.01)
    field = model.field(model.condition(["a"]))
    monkeypatch.setattr(model.transformer, "attention", lambda q, k, v: (q @ k.transpose(-1, -2)).softmax(-1) @ v)
    last = 2 * (1 + a.mlp_ratio) * a.hidden**2 + 4 * a.hidden * (64 + a.text_tokens)  # of a token of text, left out
    planned = forward_flops(facts, 64) - last * a.text_tokens
    assert counted(lambda: field(latents, 0.5)) == pytest.approx(planned, rel=0.01)


@pytest.mark.parametrize("name", SHIPPED)
def test_the_facts_of_each_version_are_its_networks_own(name: str) -> None:
    """Parameters, and bytes of each part in float32."""
    from mrflow.models.latent_model import bytes_of, footprint
    from mrflow.models.pocket.model import Pocket

    old = mf.load(name, device="cpu")
    assert isinstance(old, Pocket)
    planned, counted = old.info.footprint, footprint(old.transformer, old._autoencoder, None)
    assert planned is not None and old.info.architecture is not None
    assert old.info.architecture.parameters == sum(p.numel() for p in old.transformer.parameters())
    own = {"autoencoder": counted.autoencoder + bytes_of(old._sr.net), "text": bytes_of(old._text)}
    values = {"encode_values": planned.encode_values, "decode_values": planned.decode_values}
    assert replace(counted, **own, **values) == planned


def test_a_width_that_no_version_has(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    tensors = tensors_of(open_pocket(WEIGHTS))
    path = tmp_path / "odd.safetensors"
    save_file({**tensors, "flow.img_in.weight": torch.zeros(96, 64)}, path)
    with pytest.raises(
        WeightsError, match="odd.safetensors: flow of width 96 with heads of 64; pocket's widths are 128"
    ):
        load_pocket(path)
    del tensors["flow.img_in.weight"]
    save_file(tensors, path)
    with pytest.raises(WeightsError, match="flow of width 0"):
        mf.plan(DEFAULT, info(str(path)))


def test_a_picture_does_not_depend_on_its_batch(model: mf.Backbone) -> None:
    prompts = ["a big red circle at the left", "the big blue word CAT", ""]
    whole = mf.run(CHAIN, model, prompts, seed=[3, 4, 5]).pixels
    for i, prompt in enumerate(prompts):
        alone = mf.run(CHAIN, model, prompt, seed=3 + i).pixels[0]
        assert float((whole[i] - alone).abs().max()) < 2e-3


def test_any_size_and_a_ladder(model: mf.Backbone) -> None:
    result = mf.run(mf.recipes.paper(low=(64, 96), size=(128, 192), steps=2), model, "a big red circle at the left")
    assert result.pixels.shape == (1, 3, 128, 192)
    three = mf.recipes.ladder([(64, 64), (128, 128), (256, 256)], steps=2)
    assert mf.run(three, model, "x").pixels.shape == (1, 3, 256, 256)


def test_the_facts_without_weights_are_those_that_the_file_says(model: mf.Backbone) -> None:
    assert replace(model.info, version="") == mf.POCKET


def test_golden(model: mf.Backbone) -> None:
    """A picture made on another day: means of 8 x 8 pixels, to 2 levels of 255 (tests/golden/pocket.json says how)."""
    golden = json.loads(GOLDEN.read_text())
    assert model.info.version == golden["version"], "new weights: make the golden again as its 'how' says"
    pixels = mf.run(DEFAULT, model, golden["prompt"], seed=golden["seed"]).pixels[0]
    means = torch.nn.functional.avg_pool2d(pixels, BLOCK).numpy()
    assert np.abs(means - np.array(golden["means"])).max() < 2 / 255


@pytest.mark.slow
def test_pictures_show_what_the_caption_says(model: mf.Backbone) -> None:
    captions = held_out_captions(FULL, 14, seed=5)
    pixels = mf.run(CHAIN, model, captions, seed=0).pixels.numpy()
    right = score_many(pixels, captions)
    wrong = score_many(pixels, captions[1:] + captions[:1])
    assert right["overall"] > wrong["overall"] + 0.25


def test_tokens() -> None:
    ids, lost = tokenise(["The big blue word CAT", "an octopus", "red " * 20], VOCABULARY, TEXT_LENGTH)
    words = [VOCABULARY[i] for i in ids[0] if i]
    assert words == ["big", "blue", "word", "C", "A", "T"]
    assert lost == [[], ["octopus"], ["red"] * (20 - TEXT_LENGTH)]
    assert len(set(VOCABULARY)) == len(VOCABULARY)


def test_prompts_that_are_no_text(model: mf.Backbone) -> None:
    for bad in ("a\0b", "\ud800", "x" * 1_000_001):
        with pytest.raises(mf.PromptError):
            model.condition([bad])


def test_guidance_that_the_model_cannot_take(model: mf.Backbone) -> None:
    with pytest.raises(mf.PlanError, match="no guidance embedding"):
        mf.run(mf.Sample(64, 64, guidance=mf.Distilled(3.5)), model, "a")


def test_broken_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "cut.safetensors"
    path.write_bytes(WEIGHTS.read_bytes()[:100_000])
    with pytest.raises(WeightsError, match=r"cut\.safetensors.*cut off"):
        load_pocket(path)
    from safetensors.torch import save_file

    tensors = tensors_of(open_pocket(WEIGHTS))
    save_file({**tensors, "flow.img_in.bias": torch.zeros(3)}, path)
    with pytest.raises(WeightsError, match=r"cut\.safetensors does not fit PocketNetworks: 1 problems: flow"):
        load_pocket(path)

    def never(*_: object) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr("mrflow.models.pocket.model.fill_module", never)
    for change, words in (
        ({"flow.img_in.bias": torch.zeros(3)}, r"flow.img_in.bias has shape \(3,\), expected"),
        ({"flow.img_in.surprise": torch.zeros(3)}, "flow.img_in.surprise is not expected"),
    ):
        save_file({**tensors, **change}, path)
        with pytest.raises(WeightsError, match=words):
            load_pocket(path)
    save_file({k: v for k, v in tensors.items() if k != "flow.img_in.bias"}, path)
    with pytest.raises(WeightsError, match=r"1 problems: flow\.img_in\.bias is missing"):
        load_pocket(path)
    save_file({**tensors, "other.bias": torch.zeros(3)}, path)
    with pytest.raises(WeightsError, match=r"other\.bias is not expected"):
        load_pocket(path)


def test_sr_on_odd_sides() -> None:
    net = CompactSR()
    for h, w in ((1, 1), (3, 8), (7, 5)):
        assert net(torch.rand(1, 3, h, w)).shape == (1, 3, 2 * h, 2 * w)


def test_device_auto_takes_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    from mrflow.models import choose_device

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_device("auto").type == "cuda"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert choose_device("auto").type == "mps"
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert choose_device("auto").type == "cpu"
    with pytest.raises(mf.PlanError, match="there is no device 'cuda:7' here"):
        choose_device("cuda:7")


def test_a_version_may_lie_in_two_files(tmp_path: Path, model: mf.Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is too large for one file is the same model from two."""
    from safetensors.torch import load_file, save_file

    from experiments.train_pocket import export as module

    monkeypatch.setattr(module, "LARGEST", 1_000_000)
    parts: dict[str, dict[str, torch.Tensor]] = {"flow": {}, "autoencoder": {}, "sr": {}}
    for key, tensor in tensors_of(open_pocket(WEIGHTS)).items():
        part, _, rest = key.partition(".")
        name = key if part in ("flow", "text") else rest
        parts["flow" if part in ("flow", "text") else part][name] = tensor
    path = tmp_path / "two.safetensors"
    version = module.export("two", parts["flow"], parts["autoencoder"], parts["sr"], path, {"cfg": "2"})
    assert {p.name for p in tmp_path.iterdir()} == {"two.safetensors", "two-autoencoder.safetensors"}
    loaded = mf.load(path, device="cpu")
    assert loaded.info.version == version and len(loaded.info.files) == 2
    small = mf.recipes.native(size=(64, 64), steps=1)
    assert torch.equal(mf.run(small, loaded, "a").pixels, mf.run(small, model, "a").pixels)
    beside = tmp_path / "two-autoencoder.safetensors"
    save_file(load_file(beside), beside, {"version": "three+1"})
    with pytest.raises(WeightsError, match=r"two-autoencoder\.safetensors belongs to three\+1, and two\.s"):
        mf.load(path, device="cpu")
    beside.unlink()
    with pytest.raises(WeightsError, match=r"autoencoder\.\S+ is missing"):
        mf.load(path, device="cpu")

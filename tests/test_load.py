"""Loading FLUX.1 from every kind of place, and running it in every way: the pictures are the same."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import mrflow as mf
from mrflow.bridge.facts import bridged_shift
from mrflow.checkpoints.safetensors import map_tensor, open_checkpoint
from mrflow.cost import memory
from mrflow.display.notes import collect_notes
from mrflow.errors import PlanError, ResourceError, WeightsError
from mrflow.models import info
from mrflow.models.describe import describe
from mrflow.models.flux.backbone import Flux1
from mrflow.models.flux.weights import FLUX_AUTOENCODER, load_flux, save_flux
from mrflow.models.scheduler import shift_of
from tests.live import LiveBytes
from tests.parity.test_flux import relative
from tests.parity.test_official import UP, pipeline, words
from tests.tiny import save_vae_flux, write_flux_repo, write_qwen_repo, write_zimage_repo

pytestmark = pytest.mark.filterwarnings("ignore:.*torchvision.*")
CHAIN = mf.recipes.paper(UP, low=(32, 48), size=(64, 96), steps=3)


@pytest.fixture(scope="session")
def repo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A FLUX.1-dev repository without text encoders, as diffusers writes it."""
    folder = tmp_path_factory.mktemp("repo")
    pipeline(folder, guidance=True)
    return folder


@pytest.fixture(scope="session")
def single(repo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same weights as two files in BFL's layout."""
    folder = tmp_path_factory.mktemp("single")
    save_flux(load_flux(repo / "transformer"), folder / "flux1-dev.safetensors")
    save_vae_flux(FLUX_AUTOENCODER.prepare(repo / "vae").read(), folder / "ae.safetensors")
    return folder


RENAMED = [
    *("transformer", "vae", "scheduler", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"),
    *("model_index.json", "transformer/config.json", "vae/config.json", "text_encoder/config.json"),
    *("text_encoder_2/config.json", "scheduler/scheduler_config.json"),
    *(f"{part}/*.safetensors" for part in ("transformer", "vae", "text_encoder")),
]


def to_capitals(path: Path) -> None:
    """As a file system that knows no capitals may have left it, or a hand."""
    path.rename(path.with_name("renamed"))
    path.with_name("renamed").rename(path.with_name(path.name.title()))


@pytest.mark.parametrize("what", RENAMED)
def test_parts_in_capitals_are_found(what: str, tmp_path: Path) -> None:
    folder = write_flux_repo(tmp_path / "m")
    before = mf.load(folder)
    said, condition = describe(folder), before.condition(["a cat"])
    to_capitals(next(folder.glob(what)))
    after = mf.load(folder)
    assert after.info == before.info
    again = after.condition(["a cat"]).tensors
    assert again.keys() == condition.tensors.keys()
    assert all(torch.equal(tensor, condition.tensors[name]) for name, tensor in again.items())
    assert "\n".join(describe(folder)).lower() == "\n".join(said).lower()


@pytest.mark.parametrize("part", ["tokenizer", "tokenizer_2"])
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_tokenizers_files_in_capitals_are_named(name: str, part: str, tmp_path: Path) -> None:
    """Only transformers reads those, and by their very names."""
    folder = write_flux_repo(tmp_path / "m")
    mf.load(folder)
    to_capitals(folder / part / name)
    with pytest.raises(WeightsError, match=name.title()):
        mf.load(folder)


OTHERWISE: list[tuple[Any, str, str, object]] = [
    (write_flux_repo, "transformer", "patch_size", 2),
    (write_flux_repo, "vae", "act_fn", "relu"),
    (write_flux_repo, "vae", "mid_block_add_attention", False),
    (write_flux_repo, "vae", "use_quant_conv", True),
    (write_flux_repo, "vae", "use_post_quant_conv", True),
    (write_qwen_repo, "transformer", "patch_size", 1),
    (write_qwen_repo, "vae", "attn_scales", [0.5]),
    (write_zimage_repo, "transformer", "norm_eps", 1e-6),
    (write_zimage_repo, "transformer", "qk_norm", False),
    (write_zimage_repo, "transformer", "t_scale", 1.0),
    (write_zimage_repo, "transformer", "n_kv_heads", 1),
]


@pytest.mark.parametrize(("write", "part", "setting", "value"), OTHERWISE)
def test_networks_that_compute_otherwise_in_what_no_shape_tells_are_refused(
    write: Any, part: str, setting: str, value: object, tmp_path: Path
) -> None:
    """Their weights fit, and their pictures would be wrong without a word."""
    folder = tmp_path / "m"
    write(folder)
    mf.load(folder)
    path = folder / part / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {setting: value}))
    for use in (mf.load, info):
        with pytest.raises(WeightsError, match=f"its config is of another network: {setting} "):
            use(str(folder))


def draw(model: mf.Backbone, *, chain: Any = CHAIN, batch: int = 1, **more: Any) -> mf.Result:
    return mf.run(chain, model, condition=mf.Condition(words(batch)), seed=list(range(batch)), **more)


def loaded(where: Any, **more: Any) -> Flux1:
    model = mf.load(where, device="cpu", **more)
    assert isinstance(model, Flux1)
    return model


def prefixed(single: Path, folder: Path) -> Path:
    """An all-in-one file with the autoencoder in it."""
    flux, vae = load_file(single / "flux1-dev.safetensors"), load_file(single / "ae.safetensors")
    tensors = {f"model.diffusion_model.{k}": v for k, v in flux.items()} | {f"vae.{k}": v for k, v in vae.items()}
    metadata: dict[str, str] = {}
    for name in ("flux1-dev", "ae"):
        with safe_open(single / f"{name}.safetensors", "pt") as f:
            metadata[name] = f.metadata()["config"]
    config = json.loads(metadata["flux1-dev"])
    save_file(tensors, folder / "all.safetensors", metadata={"config": json.dumps(config)})
    return folder / "all.safetensors"


def test_every_place_gives_the_same_picture(repo: Path, single: Path, tmp_path: Path) -> None:
    want = draw(loaded(repo)).pixels
    places: dict[str, tuple[Any, dict[str, Any]]] = {
        "transformer folder": (repo / "transformer", {}),
        "folder of files": (single, {}),
        "file": (single / "flux1-dev.safetensors", {}),
        "file, vae elsewhere": (single / "flux1-dev.safetensors", {"vae": repo / "vae"}),
        "text path": (str(repo), {}),
    }
    for name, (where, more) in places.items():
        assert relative(draw(loaded(where, **more)).pixels, want) < 1e-5, name


def test_an_all_in_one_file_needs_nothing_else(single: Path, tmp_path: Path) -> None:
    model = loaded(prefixed(single, tmp_path))
    assert relative(draw(model).pixels, draw(loaded(single)).pixels) < 1e-6


def test_a_repository_keeps_its_own_schedule(repo: Path, tmp_path: Path) -> None:
    shutil.copytree(repo, tmp_path / "r")
    config = tmp_path / "r" / "scheduler" / "scheduler_config.json"
    settings = json.loads(config.read_text())
    config.write_text(json.dumps({**settings, "base_shift": 0.25}))
    assert loaded(repo).info.shift == mf.FLUX.shift
    assert loaded(tmp_path / "r").info.shift == mf.Shift(0.25, 1.15)
    config.write_text(json.dumps({**settings, "use_dynamic_shifting": False, "shift": 3.0}))
    assert loaded(tmp_path / "r").info.shift == mf.Shift.fixed(3.0)
    config.write_text(json.dumps({"use_dynamic_shifting": True}))
    with pytest.raises(WeightsError, match="scheduler_config.json cannot be used"):
        loaded(tmp_path / "r")


SWITCHES: dict[str, tuple[dict[str, Any], str]] = {
    "as published": ({}, ""),
    "linear": ({"time_shift_type": "linear"}, ""),
    "dynamic, terminal": ({"shift_terminal": 0.1}, ""),
    "static": ({"use_dynamic_shifting": False, "shift": 3.0}, ""),
    "static, terminal": ({"use_dynamic_shifting": False, "shift": 3.0, "shift_terminal": 0.1}, ""),
    "beta": ({"use_beta_sigmas": True}, "has use_beta_sigmas=True, beta-spaced"),
    "Karras": ({"use_karras_sigmas": True}, "has use_karras_sigmas=True, Karras"),
    "exponential": ({"use_exponential_sigmas": True}, "has use_exponential_sigmas=True"),
    "inverted": ({"invert_sigmas": True}, "has invert_sigmas=True"),
    "stochastic": ({"stochastic_sampling": True}, "has stochastic_sampling=True"),
    "other steps": ({"num_train_timesteps": 500}, "has num_train_timesteps=500"),
}
MULTISTEP = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
OTHERS: dict[str, tuple[str, dict[str, Any], str]] = {
    "UniPC": ("UniPCMultistepScheduler", MULTISTEP | {"flow_shift": 3.0}, ""),
    "UniPC, dynamic": ("UniPCMultistepScheduler", MULTISTEP | {"use_dynamic_shifting": True}, ""),
    "DEIS": ("DEISMultistepScheduler", MULTISTEP | {"flow_shift": 2.5}, ""),
    "UniPC of another kind": ("UniPCMultistepScheduler", {}, "is UniPCMultistepScheduler, whose levels"),
    "UniPC that does not end": (
        "UniPCMultistepScheduler",
        MULTISTEP | {"final_sigmas_type": "sigma_min"},
        "has final_sigmas_type='sigma_min'",
    ),
    "Heun": ("FlowMatchHeunDiscreteScheduler", {}, "is FlowMatchHeunDiscreteScheduler, whose levels"),
}


@pytest.mark.parametrize("case", [*SWITCHES, *OTHERS])
def test_levels_are_the_schedulers_own_or_refused(case: str, repo: Path, tmp_path: Path) -> None:
    import diffusers
    import numpy as np
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    published = json.loads((repo / "scheduler" / "scheduler_config.json").read_text())
    kind, settings, words = OTHERS[case] if case in OTHERS else ("", published | SWITCHES[case][0], SWITCHES[case][1])
    scheduler = getattr(diffusers, kind or published["_class_name"]).from_config(settings)
    scheduler.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "scheduler_config.json").read_text())
    if words:
        with pytest.raises(WeightsError, match=f"the scheduler of scheduler_config.json {words}"):
            shift_of(config, "x")
        with pytest.raises(PlanError, match=f"the pipeline's scheduler {words}"):
            bridged_shift(scheduler)
        return
    steps, tokens = 6, 1024
    line = ("base_image_seq_len", 256), ("max_image_seq_len", 4096), ("base_shift", 0.5), ("max_shift", 1.15)
    mu = calculate_shift(tokens, *(config.get(name, default) for name, default in line))
    given = {} if kind.startswith("DEIS") else {"sigmas": np.linspace(1.0, 1 / steps, steps)}
    if config.get("use_dynamic_shifting") or not kind:
        given["mu"] = mu
    if given:
        scheduler.set_timesteps(**given)
        want = [float(s) for s in scheduler.sigmas]
    else:  # takes no levels of others: its own formula
        want = [2.5 * s / (1 + 1.5 * s) for s in (1 - i / steps for i in range(steps + 1))]
    for curve in (shift_of(config, "x"), bridged_shift(scheduler)):
        assert curve is not None
        assert mf.Shifted(steps)(1.0, tokens, replace(mf.FLUX, shift=curve)) == pytest.approx(want, abs=1e-5)


def test_a_switch_is_refused_before_weights_are_read(repo: Path, tmp_path: Path) -> None:
    shutil.copytree(repo, tmp_path / "r")
    config = tmp_path / "r" / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "use_karras_sigmas": True}))
    for asked in (loaded, mf.models.info):
        with pytest.raises(WeightsError, match="Karras levels: switch it off"):
            asked(str(tmp_path / "r"))


def without_guidance(single: Path, folder: Path) -> Path:
    """A single file without a guidance embedding, as schnell's and as a de-distilled dev's are."""
    folder.mkdir()
    file = single / "flux1-dev.safetensors"
    with safe_open(file, "pt") as f:
        metadata = f.metadata()
    state = {k: v for k, v in load_file(file).items() if "guidance_in" not in k}
    save_file(state, folder / "flux1-dev.safetensors", metadata=metadata)
    shutil.copy(single / "ae.safetensors", folder)
    return folder / "flux1-dev.safetensors"


def test_what_is_assumed_of_a_flux_without_guidance_is_said(single: Path, tmp_path: Path) -> None:
    file = without_guidance(single, tmp_path / "x")
    with collect_notes() as notes:
        plain = loaded(file).info
    assert plain.name == "flux1-schnell"
    assert any("taken for FLUX.1-schnell" in n and "shift=mrflow.FLUX.shift, text_tokens=512" in n for n in notes)
    with collect_notes() as notes:
        undone = loaded(file, shift=mf.FLUX.shift).info
        schnell = loaded(file, shift=1.0, text_tokens=128).info
    assert not notes
    assert (undone.name, undone.shift, undone.guidance) == ("flux1-de-distilled", mf.FLUX.shift, None)
    assert undone.architecture is not None and undone.architecture.text_tokens == 512
    assert (schnell.name, schnell.shift) == ("flux1-schnell", mf.Shift.fixed(1.0))
    assert schnell.architecture is not None and schnell.architecture.text_tokens == 128
    assert len({plain.version, undone.version, schnell.version}) == 3
    for wrong in ({"shift": "much"}, {"shift": True}, {"text_tokens": 513}, {"text_tokens": 1.5}):
        with pytest.raises(PlanError, match="must be a"):
            loaded(file, **wrong)
    with pytest.raises(PlanError, match="pocket takes no shift"):
        mf.load("pocket", shift=3.0)


@pytest.mark.parametrize(("kind", "latents"), [("AutoencoderKL", 4), ("AutoencoderKLFlux2", 32)])
def test_another_familys_autoencoder_is_named_by_its_channels(
    kind: str, latents: int, repo: Path, single: Path, tmp_path: Path
) -> None:
    import diffusers

    sizes = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    other = getattr(diffusers, kind)(
        **sizes, block_out_channels=(32, 32, 64, 64), layers_per_block=1, latent_channels=latents
    )
    other.save_pretrained(tmp_path / "folder")
    (tmp_path / "file").mkdir()
    alone = tmp_path / "file" / "a_vae.safetensors"
    shutil.copy(tmp_path / "folder" / "diffusion_pytorch_model.safetensors", alone)
    words = f"has {latents} latent channels, as .*; the transformer needs 16: say where its own is, vae="
    for vae in (tmp_path / "folder", alone):
        for where in (repo, single / "flux1-dev.safetensors"):
            with pytest.raises(WeightsError, match=words):
                loaded(where, vae=vae)
    # Beside the file: passed over where the right one is there too, named where it is the only one.
    beside = tmp_path / "beside"
    beside.mkdir()
    shutil.copy(single / "flux1-dev.safetensors", beside)
    shutil.copy(alone, beside)
    with pytest.raises(WeightsError, match=words):
        loaded(beside / "flux1-dev.safetensors")
    shutil.copy(single / "ae.safetensors", beside)
    assert loaded(beside / "flux1-dev.safetensors").info.name == "flux1-dev"


@pytest.mark.parametrize("neighbour", [b"", b"\0" * 100, b"PK\x03\x04" + b"x" * 50])
def test_a_neighbour_that_cannot_be_read_stops_nothing(neighbour: bytes, single: Path, tmp_path: Path) -> None:
    shutil.copytree(single, tmp_path / "s")
    (tmp_path / "s" / "download.safetensors").write_bytes(neighbour)
    (tmp_path / "s" / "._flux1-dev.safetensors").write_bytes(neighbour)
    assert loaded(tmp_path / "s" / "flux1-dev.safetensors").info.name == "flux1-dev"
    assert loaded(tmp_path / "s").info.name == "flux1-dev"


def hub_cache(repo: Path, folder: Path, name: str) -> None:
    """What huggingface_hub keeps of a repository."""
    home = folder / f"models--{name.replace('/', '--')}"
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "main").write_text("a" * 40)
    shutil.copytree(repo, home / "snapshots" / ("a" * 40))


def test_a_hub_id_is_found_in_the_cache_and_nothing_is_fetched(
    repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub_cache(repo, tmp_path, "someone/flux")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert torch.equal(draw(loaded("someone/flux")).pixels, draw(loaded(repo)).pixels)
    with pytest.raises(ResourceError, match="someone/other is not in the local cache"):
        loaded("someone/other")


def test_only_a_hub_id_touches_the_hub(repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr("huggingface_hub.snapshot_download", never)
    loaded(repo)
    for missing in ("nothing", str(tmp_path / "a" / "b"), "a/b.safetensors", "./a/b"):
        with pytest.raises(WeightsError):
            loaded(missing)
    with pytest.raises(AssertionError, match="the hub was asked"):
        loaded("a/b")


def test_only_the_needed_files_are_asked_for(monkeypatch: pytest.MonkeyPatch, repo: Path) -> None:
    asked: dict[str, Any] = {}

    def fake(name: str, **more: Any) -> str:
        asked.update(more, name=name)
        return str(repo)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fake)
    loaded("black-forest-labs/FLUX.1-dev@refs/pr/1")
    assert (asked["name"], asked["revision"]) == ("black-forest-labs/FLUX.1-dev", "refs/pr/1")
    from fnmatch import fnmatch

    def wanted(path: str) -> bool:
        return any(fnmatch(path, pattern) for pattern in asked["allow_patterns"])

    assert wanted("transformer/diffusion_pytorch_model-00001-of-00003.safetensors")
    assert wanted("tokenizer_2/spiece.model") and wanted("vae/config.json") and wanted("model_index.json")
    assert not wanted("flux1-dev.safetensors") and not wanted("ae.safetensors") and not wanted("README.md")


def spoil_names(folder: Path) -> None:
    """Swap the transformer for the autoencoder."""
    shutil.rmtree(folder / "transformer")
    shutil.copytree(folder / "vae", folder / "transformer")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def change_index(folder: Path, **values: Any) -> None:
    path = folder / "model_index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def extra_key(folder: Path) -> None:
    path = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    save_file({**load_file(path), "surprise.weight": torch.ones(2)}, path)


SPOILT: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no vae": (lambda f: shutil.rmtree(f / "vae"), "has no vae folder"),
    "another pipeline": (lambda f: change_index(f, _class_name="SanaPipeline"), "holds a SanaPipeline; mrflow loads"),
    "another family's pipeline": (
        lambda f: change_index(f, _class_name="QwenImagePipeline"),
        "says it holds a QwenImagePipeline, but its transformer is a FLUX transformer",
    ),
    **{
        f"a pipeline named {name!r}": (
            lambda f, name=name: change_index(f, _class_name=name),
            f"model_index.json names no pipeline of diffusers: its _class_name is {re.escape(repr(name))}",
        )
        for name in (5, ["FluxPipeline"], "", "\x1b[31m", {})
    },
    "FLUX.2": (lambda f: change_index(f, _class_name="Flux2KleinPipeline"), "holds a Flux2KleinPipeline"),
    "an autoencoder as transformer": (
        spoil_names,
        r"is not a FLUX transformer or a Qwen-Image transformer or .*: it looks like a FLUX autoencoder",
    ),
    "cut off": (lambda f: cut(f / "vae" / "diffusion_pytorch_model.safetensors"), "cut off or has extra bytes"),
    "an extra key": (extra_key, "surprise.weight is not expected"),
    "empty": (
        lambda f: (f / "transformer" / "diffusion_pytorch_model.safetensors").write_bytes(b""),
        "0 bytes, expected at least 8",
    ),
}


@pytest.mark.parametrize("what", SPOILT)
def test_what_is_wrong_is_said_before_weights_are_read(
    what: str, repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "r"
    shutil.copytree(repo, folder)
    change, said = SPOILT[what]
    change(folder)

    def never(*_: object) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr("mrflow.models.sources.weights_fingerprint", lambda *_: "")
    if what != "an extra key":  # names are compared per network: the autoencoder's come first
        monkeypatch.setattr("mrflow.checkpoints.safetensors.map_tensor", never)
    with pytest.raises(WeightsError, match=said):
        loaded(folder)


def test_several_or_no_transformers_in_a_folder(single: Path, tmp_path: Path) -> None:
    with pytest.raises(
        WeightsError, match=r"holds no FLUX transformer and no Qwen-Image transformer.*; it holds no safetensors file"
    ):
        loaded(tmp_path)
    shutil.copy(single / "ae.safetensors", tmp_path)
    with pytest.raises(WeightsError, match=r"it holds ae.safetensors \(a FLUX autoencoder\)"):
        loaded(tmp_path)
    for name in ("a", "b"):
        shutil.copy(single / "flux1-dev.safetensors", tmp_path / f"{name}.safetensors")
    with pytest.raises(WeightsError, match=r"several, name one: a.safetensors, b.safetensors"):
        loaded(tmp_path)
    (tmp_path / "ae.safetensors").unlink()
    with pytest.raises(WeightsError, match="no FLUX autoencoder beside"):
        loaded(tmp_path / "a.safetensors")


def test_arguments_that_cannot_be(repo: Path) -> None:
    for more, said in (
        ({"storage": "int4"}, "storage"),
        ({"offload": "disk"}, "offload"),
        ({"dtype": torch.int8}, "dtype"),
        ({"compile": True, "offload": "block"}, "compile"),
        ({"tile": 9}, "tile"),
    ):
        with pytest.raises(PlanError, match=said):
            loaded(repo, **more)
    with pytest.raises(PlanError, match="pocket takes no offload"):
        mf.load("pocket", offload="phase")
    with pytest.raises(WeightsError, match="flux1-dev is a name for planning.*black-forest-labs/FLUX.1-dev"):
        mf.load("flux1-dev")


def test_words_need_encoders_but_encoded_words_do_not(repo: Path, tmp_path: Path) -> None:
    model = loaded(repo)
    with pytest.raises(PlanError, match="without text encoders.*text=folder.*condition="):
        mf.run(CHAIN, model, "a prompt")
    mf.Condition(words(2)).save(tmp_path / "words.safetensors")
    again = mf.Condition.load(tmp_path / "words.safetensors")
    result = mf.run(CHAIN, model, condition=again, seed=[0, 1])
    assert torch.equal(result.pixels, draw(model, batch=2).pixels)
    save_file({"context": torch.ones(1, 2, 3)}, tmp_path / "other.safetensors")
    with pytest.raises(WeightsError, match="holds no encoded prompts"):
        mf.Condition.load(tmp_path / "other.safetensors")
    wrong = mf.Condition({"context": torch.ones(1, 4, 7), "pooled": torch.ones(1, 12)})
    with pytest.raises(PlanError, match=r"needs context \(batch, tokens, 24\).*another model"):
        mf.run(CHAIN, model, condition=wrong)
    with pytest.raises(PlanError, match="needs a condition with context and pooled"):
        mf.run(CHAIN, model, condition=mf.Condition({"context": torch.ones(1, 4, 24)}))


def test_a_batch_is_its_items(repo: Path) -> None:
    model, given = loaded(repo), words(3)
    both = mf.run(CHAIN, model, condition=mf.Condition(given), seed=[4, 5, 6]).pixels
    for i in range(3):
        one = mf.Condition({k: v[i : i + 1] for k, v in given.items()})
        assert relative(mf.run(CHAIN, model, condition=one, seed=4 + i).pixels, both[i : i + 1]) < 5e-5


def test_folding_offloading_and_staying_give_the_same_bits(repo: Path) -> None:
    want = draw(loaded(repo, fold=False), batch=2).pixels
    for offload in ("none", "phase", "block"):
        for fold in (True, False):
            assert torch.equal(draw(loaded(repo, offload=offload, fold=fold), batch=2).pixels, want), (offload, fold)


@pytest.mark.parametrize("solver", [mf.Heun(), mf.Euler(), mf.AB2()])
def test_folding_keeps_bits_for_every_solver_and_guidance(repo: Path, solver: mf.Solver) -> None:
    guidance = mf.Interval(mf.CFG(2.0), 0.2, 0.9)
    chain = mf.Sample(32, 32, mf.Shifted(3), solver=solver, guidance=guidance) >> mf.Decode()
    folded, plain = loaded(repo), loaded(repo, fold=False)
    for model in (folded, plain):
        model._words = None

        def condition(prompts: Any) -> mf.Condition:
            return mf.Condition({k: v[:1].expand(len(prompts), *v.shape[1:]) for k, v in words(2).items()})

        model.condition = condition  # type: ignore[method-assign]
    assert torch.equal(mf.run(chain, folded, "a").pixels, mf.run(chain, plain, "a").pixels)


def test_levels_are_known_before_the_first_step(repo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = loaded(repo)
    asked: list[int] = []
    tables = model.transformer.tables
    monkeypatch.setattr(
        model.transformer, "tables", lambda sigmas, *rest: asked.append(len(sigmas)) or tables(sigmas, *rest)
    )
    draw(model)
    assert asked == [3, 1]


@pytest.mark.parametrize("storage", [None, "fp8"])
@pytest.mark.parametrize("offload", ["none", "phase", "block"])
@pytest.mark.parametrize("fold", [True, False])
def test_memory_is_predicted_to_the_byte_for_weights(repo: Path, offload: Any, storage: Any, fold: bool) -> None:
    model = loaded(repo, offload=offload, storage=storage, fold=fold)
    planned = mf.plan(CHAIN, model.info)
    predicted = memory(planned, offload=offload, fold=fold, value_bytes=0)
    draw(model)
    assert predicted is not None and model.ledger.peak == predicted.peak


def test_products_in_8_bits_are_lossy_and_named_in_the_record(repo: Path) -> None:
    half = torch.bfloat16
    stored, model = (loaded(repo, dtype=half, **how) for how in ({"storage": "fp8"}, {"compute": "fp8"}))
    assert model.info.version == f"{stored.info.version}+compute fp8"
    want, result = draw(stored), draw(model)
    assert 1e-4 < relative(result.pixels, want.pixels) < 0.2
    assert "compute fp8" in json.dumps(result.record())
    kinds = {type(m).__name__ for block in model.transformer.stack() for m in block.modules() if "Fp8" in str(type(m))}
    assert kinds == {"Fp8Product", "Fp8Linear"}  # modulations keep the products of `storage`
    with pytest.raises(PlanError, match="gives bfloat16, not float32; dtype=torch.bfloat16"):
        mf.load(repo, device="cpu", compute="fp8", dtype=torch.float32)
    with pytest.raises(PlanError, match="compute must be None or 'fp8', got 'int8'"):
        loaded(repo, compute="int8")


def test_memory_is_predicted_for_values_too(repo: Path) -> None:
    model = loaded(repo)
    for chain in (CHAIN, mf.recipes.native(size=(160, 160), steps=2)):
        planned = mf.plan(chain, model.info)
        assert model.info.architecture is not None and model.info.footprint is not None
        few = mf.Condition({k: v for k, v in words(1).items()})
        with LiveBytes() as live:
            mf.run(chain, model, condition=few)
        # The tiny autoencoder is narrower than the published one, whose values per pixel the facts give.
        scale = 32 / 128
        info = model.info
        from dataclasses import replace

        narrow = replace(info.footprint, encode_values=646 * scale, decode_values=768 * scale)
        short = replace(info.architecture, text_tokens=9)
        predicted = memory(mf.Plan(replace(info, footprint=narrow, architecture=short), planned.rows), value_bytes=4)
        assert predicted is not None
        values = predicted.peak - narrow.total
        assert 0.8 * values < live.peak < 1.25 * values


def test_blocks_are_compiled_once_for_all_resolutions_and_prompts(repo: Path, tmp_path: Path) -> None:
    code = f"""
import torch, mrflow as mf
from torch._dynamo.testing import CompileCounter
from safetensors.torch import load_file
counter = CompileCounter()
where, chain = {str(repo)!r}, mf.recipes.paper(mf.Lanczos(2), low=(32, 32), size=(64, 64), steps=3)
given = mf.Condition.load({str(tmp_path / "words.safetensors")!r})
plain = mf.run(chain, mf.load(where, device="cpu"), condition=given).pixels
model = mf.load(where, device="cpu", compile=counter)
first = mf.run(chain, model, condition=given).pixels
compiled = counter.frame_count
mf.run(chain, model, condition=given, seed=3)
assert counter.frame_count == compiled, (counter.frame_count, compiled)
assert (first - plain).norm() < 1e-4 * plain.norm(), float((first - plain).norm())
print(compiled)
"""
    mf.Condition(words(1)).save(tmp_path / "words.safetensors")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stderr[-2000:]
    # As for Qwen-Image; GELU beside attention, the heads of one stream, and the head's norm, whose tokens are a part.
    assert done.stdout.split()[-1] == "8"


def shrink(model: Flux1, largest: int, monkeypatch: pytest.MonkeyPatch, error: type[Exception]) -> None:
    """Pretend that the decoder has memory for so many cells a side only."""
    forward = model._vae.decoder.forward

    def limited(z: Tensor) -> Tensor:
        if max(z.shape[-2:]) > largest:
            raise error("CUDA out of memory") if error is not RuntimeError else error("can't allocate memory: you lie")
        return forward(z)

    monkeypatch.setattr(model._vae.decoder, "forward", limited)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, MemoryError, RuntimeError])
def test_the_autoencoder_goes_on_in_tiles(
    repo: Path, monkeypatch: pytest.MonkeyPatch, error: type[Exception], tmp_path: Path
) -> None:
    model = loaded(repo)
    monkeypatch.setattr("mrflow.models.latent_model.TILE", 16)
    chain = mf.recipes.native(size=(160, 160), steps=1)
    whole = draw(model, chain=chain).pixels
    shrink(model, 16, monkeypatch, error)
    events: list[mf.Event] = []
    result = draw(model, chain=chain, on_event=events.append)
    said = "the autoencoder ran out of memory at 160x160; it works in tiles of 128 pixels"
    assert [e.text for e in events if isinstance(e, mf.Noted)] == [said]
    assert result.stages[-1].notes == (said,)
    assert json.loads(json.dumps(result.record()))["stages"][-1]["notes"] == [said]
    # Group norms and the middle's attention see a tile only: a seam error that no overlap removes.
    assert 0 < relative(result.pixels, whole) < 0.2
    shrink(model, 8, monkeypatch, error)
    with pytest.raises(mf.ResourceError, match=r"stage 2 of 2, Decode\(\): out of memory"):
        draw(model, chain=chain)


def test_tiles_when_asked(repo: Path) -> None:
    model, tiled = loaded(repo), loaded(repo, tile=32)
    chain = mf.recipes.paper(UP, low=(160, 160), size=(320, 320), steps=1)
    error = relative(draw(tiled, chain=chain).pixels, draw(model, chain=chain).pixels)
    assert 0 < error < 0.2
    assert torch.equal(draw(tiled).pixels, draw(model).pixels)  # smaller than a tile


def test_records_name_the_weights_and_how_they_are_kept(repo: Path, single: Path) -> None:
    versions = {loaded(repo).info.version, loaded(repo, dtype=torch.bfloat16).info.version}
    versions |= {loaded(repo, storage="fp8").info.version, loaded(single).info.version}
    assert len(versions) == 4
    assert loaded(repo).info.version == loaded(str(repo)).info.version


@pytest.mark.parametrize(
    ("where", "said"),
    [
        (
            "transformer",
            ["FLUX transformer", "diffusers, with guidance embedding (dev)", "2 double and 3 single blocks"],
        ),
        ("vae", ["FLUX autoencoder", "diffusers", "16 latent channels"]),
        ("", ["transformer/", "vae/", "FLUX autoencoder"]),
    ],
)
def test_inspect_says_what_it_is(where: str, said: list[str], repo: Path) -> None:
    text = "\n".join(describe(repo / where))
    assert all(words in text for words in said), text


def test_inspect_on_single_files(single: Path, tmp_path: Path) -> None:
    assert "Black Forest Labs" in "\n".join(describe(single / "flux1-dev.safetensors"))
    assert "Black Forest Labs" in "\n".join(describe(single / "ae.safetensors"))
    from mrflow.models.pocket.model import NEWEST, WEIGHTS

    assert f"network   pocket, mrflow's embedded model, version {NEWEST}+" in "\n".join(describe(WEIGHTS))
    save_file({"a": torch.ones(2)}, tmp_path / "x.safetensors")
    assert "not known to mrflow" in "\n".join(describe(tmp_path / "x.safetensors"))


LOADING = """
import sys, threading, time
import torch, mrflow as mf
from mrflow.models.scheduler import shift_of
from mrflow.models.flux.weights import load_flux
def anonymous():
    for line in open("/proc/self/status"):
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
peak, stop = [anonymous()], []
def watch():
    while not stop:
        peak[0] = max(peak[0], anonymous()); time.sleep(0.002)
start = anonymous(); thread = threading.Thread(target=watch); thread.start()
flux = load_flux(sys.argv[1], dtype=getattr(torch, sys.argv[2]), fuse=sys.argv[3] == "fuse" or None)
stop.append(1); thread.join()
print((peak[0] - start) / sum(p.nbytes for p in flux.parameters()))
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads /proc")
@pytest.mark.parametrize(
    ("dtype", "fuse", "most"), [("float32", "", 0.1), ("float32", "fuse", 1.15), ("bfloat16", "", 1.15)]
)
def test_peak_memory_of_loading(dtype: str, fuse: str, most: float, tmp_path: Path) -> None:
    from diffusers import FluxTransformer2DModel

    big = FluxTransformer2DModel(
        in_channels=64, num_layers=4, num_single_layers=8, attention_head_dim=64, num_attention_heads=8,
        joint_attention_dim=128, pooled_projection_dim=64, guidance_embeds=True, axes_dims_rope=(16, 24, 24),
    )  # fmt: skip
    big.save_pretrained(tmp_path, max_shard_size="60MB")
    done = subprocess.run(
        [sys.executable, "-c", LOADING, str(tmp_path), dtype, fuse], capture_output=True, text=True, check=True
    )
    assert float(done.stdout) < most


@pytest.mark.parametrize(("guidance", "name"), [(True, "flux1-dev"), (False, "flux1-schnell")])
def test_facts_of_a_folder_without_its_weights(tmp_path: Path, guidance: bool, name: str) -> None:
    """Planning takes a folder as loading does: what it is shows in the headers."""
    from mrflow.models import info

    write_flux_repo(tmp_path / "repo", guidance=guidance)
    assert info(str(tmp_path / "repo")).name == name
    (tmp_path / "empty").mkdir()
    with pytest.raises(mf.WeightsError):
        info(str(tmp_path / "empty"))


def test_a_file_that_is_cut_in_use_is_an_error_and_no_crash(repo: Path, tmp_path: Path) -> None:
    shutil.copytree(repo, tmp_path / "r")
    model = loaded(tmp_path / "r")
    file = tmp_path / "r" / "transformer" / "diffusion_pytorch_model.safetensors"
    whole = file.read_bytes()
    with file.open("r+b") as f:
        f.truncate(4096)
    with pytest.raises(WeightsError, match=rf"was cut while it was in use: it had {len(whole)} bytes .* has 4096 now"):
        draw(model)
    file.write_bytes(whole)
    want = draw(model).pixels
    file.unlink()  # what is mapped stays
    assert torch.equal(draw(model).pixels, want)


@pytest.mark.parametrize("offload", ["none", "phase", "block"])
def test_a_file_that_is_cut_between_two_blocks_is_an_error_and_no_crash(
    repo: Path, tmp_path: Path, offload: str
) -> None:
    shutil.copytree(repo, tmp_path / "r")
    model = loaded(tmp_path / "r", offload=offload)
    file = tmp_path / "r" / "transformer" / "diffusion_pytorch_model.safetensors"

    def cut(*_: object) -> None:
        os.truncate(file, 0)

    model._net.stack()[0].register_forward_hook(cut)
    with pytest.raises(WeightsError, match=r"stage 1 of .* was cut while it was in use: .* has 0 now"):
        draw(model)


def test_a_file_that_is_cut_after_its_header_was_read_is_refused(repo: Path, tmp_path: Path) -> None:
    file = shutil.copy(repo / "transformer" / "diffusion_pytorch_model.safetensors", tmp_path)
    header = open_checkpoint(file)
    with Path(file).open("r+b") as f:
        f.truncate(Path(file).stat().st_size - 8)
    with pytest.raises(WeightsError, match="was cut after its header was read"):
        for entry in header.tensors.values():
            map_tensor(entry, {})

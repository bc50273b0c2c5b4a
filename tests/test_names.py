"""Whatever a training program wraps around a network, its file is read as the network's own."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

import mrflow as mf
from mrflow.checkpoints.names import bare, before, common_wrapper, plain
from mrflow.checkpoints.safetensors import map_tensor, open_checkpoint
from mrflow.errors import WeightsError
from mrflow.models.flux.text import find_text
from mrflow.models.flux.weights import FLUX_AUTOENCODER, load_flux, save_flux
from mrflow.models.headers import kind
from mrflow.models.lora import changes
from mrflow.models.qwen.text import QwenText
from mrflow.models.qwen.weights import QWEN_AUTOENCODER, QWEN_TRANSFORMER, wan
from mrflow.upscalers import load_upscaler
from mrflow.upscalers.weights import read_state, rename
from tests.sr_files import as_first_generation, as_trunk, compact, rrdb
from tests.test_lora import TINY, Flux, lora
from tests.test_qwen import repo as qwen_repo  # noqa: F401
from tests.test_text import repo  # noqa: F401  (a fixture)
from tests.tiny import save_vae_flux

pytestmark = pytest.mark.filterwarnings("ignore")
State = dict[str, Tensor]


def behind(prefix: str) -> Callable[[State], State]:
    """All names behind a prefix."""
    return lambda state: {prefix + name: tensor for name, tensor in state.items()}


def by_layer(word: str) -> Callable[[State], State]:
    """A word behind the number of each layer, as where layers are wrapped one by one."""
    return lambda state: {re.sub(r"(\.\d+\.)", rf"\1{word}.", name, count=1): t for name, t in state.items()}


WRAPPERS: dict[str, Callable[[State], State]] = {
    "torch.compile": behind("_orig_mod."),
    "DDP": behind("module."),
    "Lightning": behind("model."),
    "diffusers": behind("transformer."),
    "ComfyUI": behind("diffusion_model."),
    "all in one": behind("model.diffusion_model."),
    "DiffSynth": behind("pipe.dit."),
    "DDP of compiled": behind("module._orig_mod."),
    "compiled DDP": behind("_orig_mod.module."),
    "everything": behind("model.pipe.dit._orig_mod.module."),
    "an average": lambda s: behind("module.")(s) | {"n_averaged": torch.tensor(7)},
    "an average of DDP": lambda s: behind("module.module.")(s) | {"n_averaged": torch.tensor(7)},
    "ema_pytorch": lambda s: behind("ema_model.")(s) | {"initted": torch.tensor([1]), "step": torch.tensor([9])},
    "layers compiled": by_layer("_orig_mod"),
    "FSDP with checkpoints": lambda s: behind("_fsdp_wrapped_module.")(
        by_layer("_fsdp_wrapped_module._checkpoint_wrapped_module")(s)
    ),
}


def values(net: torch.nn.Module) -> State:
    return dict(net.state_dict())


def read_clip(file: Path) -> State:
    files = find_text(file.parent.parent)
    return {name: map_tensor(entry, {}) for name, entry in files.clip.tensors.items()}


def read_t5(file: Path) -> State:
    files = find_text(file.parent.parent)
    return {name: map_tensor(entry, {}) for name, entry in files.t5.tensors.items()}


def read_qwen_text(file: Path) -> State:
    found = QwenText.find(file.parent.parent).encoder.tensors
    return {name: map_tensor(entry, {}) for name, entry in found.items()}


MAIN = "diffusion_pytorch_model.safetensors"
# family -> (its repository, its file there, how it is read)
FAMILIES: dict[str, tuple[str, str, Callable[[Path], State]]] = {
    "FLUX": ("flux", f"transformer/{MAIN}", lambda p: values(load_flux(p))),
    "FLUX, BFL": ("flux", "bfl/flux.safetensors", lambda p: values(load_flux(p))),
    "FLUX's autoencoder": ("flux", f"vae/{MAIN}", lambda p: values(FLUX_AUTOENCODER.prepare(p).read())),
    "FLUX's autoencoder, BFL": ("flux", "bfl/ae.safetensors", lambda p: values(FLUX_AUTOENCODER.prepare(p).read())),
    "CLIP": ("flux", "text_encoder/model.safetensors", read_clip),
    "T5": ("flux", "text_encoder_2/model.safetensors", read_t5),
    "Qwen-Image": ("qwen", f"transformer/{MAIN}", lambda p: values(QWEN_TRANSFORMER.prepare(p).read())),
    "Qwen-Image's autoencoder": ("qwen", f"vae/{MAIN}", lambda p: values(QWEN_AUTOENCODER.prepare(p).read())),
    "Qwen-Image's autoencoder, Wan": (
        "qwen",
        "wan/vae.safetensors",
        lambda p: values(QWEN_AUTOENCODER.prepare(p).read()),
    ),
    "Qwen2.5-VL": ("qwen", "text_encoder/model.safetensors", read_qwen_text),
}


@pytest.fixture(scope="module")
def repositories(repo: Path, qwen_repo: Path, tmp_path_factory: Any) -> dict[str, Path]:  # noqa: F811
    """Both repositories with single files in the other layouts too."""
    out = {name: tmp_path_factory.mktemp("wrapped") / name for name in ("flux", "qwen")}
    for name, source in (("flux", repo), ("qwen", qwen_repo)):
        shutil.copytree(source, out[name])
    (out["flux"] / "bfl").mkdir()
    (out["qwen"] / "wan").mkdir()
    save_flux(load_flux(repo / "transformer"), out["flux"] / "bfl/flux.safetensors")
    save_vae_flux(FLUX_AUTOENCODER.prepare(repo / "vae").read(), out["flux"] / "bfl/ae.safetensors")
    video = load_file(qwen_repo / f"vae/{MAIN}")
    save_file({wan(name)[0]: t for name, t in video.items()}, out["qwen"] / "wan/vae.safetensors")
    shutil.copy(qwen_repo / "vae/config.json", out["qwen"] / "wan/config.json")
    return out


@pytest.mark.parametrize("family", FAMILIES)
def test_every_wrapper_of_every_family(family: str, repositories: dict[str, Path]) -> None:
    name, where, read = FAMILIES[family]
    file = repositories[name] / where
    kept = file.read_bytes()
    with safe_open(file, "pt") as f:
        metadata = f.metadata()
    want = {k: t.clone() for k, t in read(file).items()}
    state = {k: t.clone() for k, t in load_file(file).items()}
    what = kind(open_checkpoint(file))
    try:
        for wrapper, wrap in WRAPPERS.items():
            save_file(wrap(state), file, metadata=metadata)
            assert kind(open_checkpoint(file)) == what, wrapper
            got = read(file)
            assert set(got) == set(want), wrapper
            assert all(torch.equal(got[k], want[k]) for k in want), wrapper
    finally:
        file.write_bytes(kept)


NETWORKS: dict[str, Callable[[], State]] = {
    "RRDBNet": rrdb,
    "first ESRGAN": lambda: as_first_generation(rrdb()),
    "RRDB_trunk": lambda: as_trunk(rrdb()),
    "SRVGG": compact,
}


@pytest.mark.parametrize("network", NETWORKS)
def test_every_wrapper_of_every_upscaler(network: str, tmp_path: Path) -> None:
    state = NETWORKS[network]()
    want = rename(state)
    for wrapper, wrap in WRAPPERS.items():
        torch.save({"params_ema": wrap(state), "iter": 3}, tmp_path / "x.pth")
        save_file(wrap(state), tmp_path / "x.safetensors")
        for name in ("x.pth", "x.safetensors"):
            got = rename(read_state(tmp_path / name))
            assert set(got) == set(want), wrapper
            assert all(torch.equal(got[k], want[k]) for k in want), wrapper


def test_torchs_own_wrappers(tmp_path: Path) -> None:
    from mrflow.upscalers.nets import RRDBNet, RRDBParams

    net = RRDBNet(RRDBParams(8, 2, 4))
    compiled = torch.compile(net, backend="eager")
    averaged = AveragedModel(compiled)
    for i, state in enumerate((compiled.state_dict(), averaged.state_dict())):  # type: ignore[attr-defined]
        torch.save({"params": dict(state)}, tmp_path / f"{i}.pth")
        assert set(read_state(tmp_path / f"{i}.pth")) == set(net.state_dict())
        x = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(load_upscaler(tmp_path / f"{i}.pth")(x), net(x))


@pytest.mark.parametrize("layout", ["peft", "bare", "sd-scripts", "black forest labs"])
def test_every_wrapper_of_an_adapter(layout: str, tmp_path: Path) -> None:
    net = Flux(TINY)
    file = lora(tmp_path, layout=layout)
    want = changes(net, (mf.Lora(str(file)),), "flux")
    state = load_file(file)
    for wrapper, wrap in WRAPPERS.items():
        save_file(wrap(state), tmp_path / "wrapped.safetensors")
        got = changes(net, (mf.Lora(str(tmp_path / "wrapped.safetensors")),), "flux")
        assert set(got) == set(want), wrapper
        assert all(torch.equal(got[k].matrix(), want[k].matrix()) for k in want), wrapper


def test_an_adapter_of_a_compiled_network_by_sd_scripts(tmp_path: Path) -> None:
    file = lora(tmp_path, layout="sd-scripts")
    state = {k.replace("lora_unet_", "lora_unet__orig_mod_"): t for k, t in load_file(file).items()}
    save_file(state, tmp_path / "x.safetensors")
    got, want = (changes(Flux(TINY), (mf.Lora(str(f)),), "flux") for f in (tmp_path / "x.safetensors", file))
    assert set(got) == set(want)


def test_a_network_that_is_there_twice_is_refused(repo: Path, tmp_path: Path) -> None:  # noqa: F811
    state = load_file(repo / f"transformer/{MAIN}")
    both = behind("model.")(state) | {f"ema.{k}": t.clone() for k, t in state.items()}
    save_file(both, tmp_path / "x.safetensors")
    with pytest.raises(WeightsError, match=r"a FLUX transformer 2 times, behind 'ema.', 'model.'"):
        load_flux(tmp_path / "x.safetensors")
    save_file({"_orig_mod.a": torch.ones(1), "a": torch.ones(1)}, tmp_path / "x.safetensors")
    with pytest.raises(WeightsError, match=r"x.safetensors: a is there twice"):
        open_checkpoint(tmp_path / "x.safetensors")


def test_what_is_left_beside_a_wrapped_network_is_not_passed_over(repo: Path, tmp_path: Path) -> None:  # noqa: F811
    state = behind("module.")(load_file(repo / f"transformer/{MAIN}"))
    with safe_open(repo / f"transformer/{MAIN}", "pt") as f:
        metadata = f.metadata()
    (tmp_path / "config.json").write_bytes((repo / "transformer/config.json").read_bytes())
    for extra in ("module.surprise.weight", "surprise.weight"):
        save_file(state | {extra: torch.ones(2)}, tmp_path / "x.safetensors", metadata=metadata)
        with pytest.raises(WeightsError, match=r"surprise.weight is not expected"):
            load_flux(tmp_path / "x.safetensors")
    save_file(state | {"vae.encoder.weight": torch.ones(2)}, tmp_path / "x.safetensors", metadata=metadata)
    load_flux(tmp_path / "x.safetensors")


def test_names_are_taken_off_no_further_than_they_are_known() -> None:
    assert plain({"a._orig_mod.b": 1, "n_averaged": 2, "a_orig_mod.c": 3}) == {"a.b": 1, "a_orig_mod.c": 3}
    assert bare("module.model.proj_out", {"proj_out"}.__contains__) == "proj_out"
    assert bare("module.blocks.9.proj_out", {"proj_out"}.__contains__) is None
    assert bare("model.model.0", {"model.0"}.__contains__) == "model.0"
    assert before("pipe.dit.img_in.weight", "img_in.weight") == "pipe.dit."
    assert before("blocks.img_in.weight", "img_in.weight") is None
    assert before("ximg_in.weight", "img_in.weight") is None
    assert common_wrapper(["module.a", "module.b.c"]) == "module."
    assert common_wrapper(["module.a", "b"]) == "" == common_wrapper(["body.a", "body.b"]) == common_wrapper([])

"""Z-Image: one folder that inherits what the shared code has: offloading, adapters, caches, storage, plans."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import mrflow as mf
from mrflow.cost import memory
from mrflow.display.notes import collect_notes
from mrflow.errors import PlanError, WeightsError
from mrflow.models.zimage.backbone import ZImageModel
from tests.parity.test_flux import relative
from tests.tiny import write_zimage_repo

pytestmark = pytest.mark.filterwarnings("ignore")
UP = mf.Lanczos(2)
CHAIN = mf.recipes.paper(UP, low=(48, 64), size=(96, 128), steps=3)
PROMPTS = ["a cat", "a much longer tale of two towns", "a dog"]


@pytest.fixture(scope="module")
def repo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_zimage_repo(tmp_path_factory.mktemp("zimage") / "repo")


def loaded(where: Any, **more: Any) -> ZImageModel:
    model = mf.load(where, device="cpu", **more)
    assert isinstance(model, ZImageModel)
    return model


def draw(model: mf.Backbone, *, chain: Any = CHAIN, batch: int = 1, **more: Any) -> mf.Result:
    return mf.run(chain, model, PROMPTS[:batch], seed=list(range(batch)), **more)


def test_a_batch_is_its_items(repo: Path) -> None:
    """Texts that fill up to one length are a batch, others are not; each is drawn as if alone."""
    model, native = loaded(repo), mf.Sample(48, 64, mf.Shifted(3))
    both = draw(model, chain=native, batch=3).data
    for i, prompt in enumerate(PROMPTS):
        assert relative(mf.run(native, model, prompt, seed=i).data, both[i : i + 1]) < 5e-6


def test_folding_and_offloading_give_the_same_bits(repo: Path) -> None:
    want = draw(loaded(repo, fold=False), batch=2).pixels
    for offload in ("none", "phase", "block"):
        for fold in (True, False):
            model = loaded(repo, offload=offload, fold=fold)
            assert torch.equal(draw(model, batch=2).pixels, want), (offload, fold)
            predicted = memory(mf.plan(CHAIN, model.info), offload=offload, fold=fold, value_bytes=0)
            assert predicted is not None and model.ledger.peak == predicted.peak


def pair(rank: int, rows: int, width: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A low-rank pair: down, up."""
    g = torch.Generator().manual_seed(seed)
    return torch.randn(rank, width, generator=g), 0.2 * torch.randn(rows, rank, generator=g)


def test_adapters_under_both_names_merged_and_on_one_stage(repo: Path, tmp_path: Path) -> None:
    """diffusers' q, k and v apart, and the single files' joint matrix with the level's modulation."""
    apart: dict[str, torch.Tensor] = {}
    for i, part in enumerate("qkv"):
        down, up = pair(2, 32, 32, i)
        apart |= {f"transformer.layers.0.attention.to_{part}.lora_{n}.weight": t for n, t in (("A", down), ("B", up))}
    joint: dict[str, torch.Tensor] = {}
    linears = {
        "layers_1_attention_qkv": (96, 32),
        "layers_1_adaLN_modulation_0": (128, 32),
        "context_refiner_0_feed_forward_w2": (32, 85),
        "layers_0_attention_out": (32, 32),
    }
    for name, (rows, width) in linears.items():
        down, up = pair(2, rows, width, 7)
        joint |= {f"lora_unet_{name}.lora_down.weight": down, f"lora_unet_{name}.lora_up.weight": up}
    plain = loaded(repo)
    native = mf.Sample(48, 64, mf.Shifted(2))
    for which, state in (("apart", apart), ("joint", joint)):
        save_file(state, tmp_path / f"{which}.safetensors")
        low = mf.Lora(str(tmp_path / f"{which}.safetensors"), 0.8)
        staged = mf.Sample(48, 64, mf.Shifted(2), lora=low)
        merged, on = (draw(m, chain=c).data for m, c in ((loaded(repo, lora=low), native), (plain, staged)))
        assert relative(on, merged) < 1e-5 and relative(on, draw(plain, chain=native).data) > 1e-2


@pytest.mark.parametrize(
    ("cache", "same"),
    [
        (mf.caches.DBCache(0.0, front=1, warmup=0), True),
        (mf.caches.ToMA(0.0, skip=0), True),
        (mf.caches.DBCache(9.0, front=1, warmup=1), False),
        (mf.caches.ToMA(0.5, tile=2, every=1, skip=0), False),
    ],
)
def test_caches_open_its_network(cache: Any, same: bool, repo: Path) -> None:
    model = loaded(repo)
    got, want = (draw(model, chain=mf.Sample(48, 64, mf.Shifted(4), cache=c), batch=3).data for c in (cache, None))
    assert bool(got.isfinite().all()) and (relative(got, want) < 1e-5) is same


def test_an_fp8_file_and_fp8_storage(repo: Path, tmp_path: Path) -> None:
    tensors = load_file(repo / "transformer" / "diffusion_pytorch_model.safetensors")
    save_file({k: t.to(torch.float8_e4m3fn) for k, t in tensors.items()}, tmp_path / "net.safetensors")
    (tmp_path / "config.json").write_text((repo / "transformer" / "config.json").read_text())
    native = mf.Sample(48, 64, mf.Shifted(2))
    file = loaded(tmp_path / "net.safetensors", vae=repo / "vae", text=repo)
    assert file.transformer.dtype == torch.bfloat16
    want = draw(loaded(repo), chain=native).data
    for model, limit in ((file, 0.5), (loaded(repo, storage="fp8"), 0.2)):
        assert 0 < relative(draw(model, chain=native).data, want) < limit


def test_long_prompts_lose_words_and_say_so(repo: Path) -> None:
    model = loaded(repo)
    with collect_notes() as notes:
        assert model.condition(["a" * 600])["context"].shape[1] == 512
    assert len(notes) == 1 and notes[0].startswith("Z-Image reads 512 tokens of a prompt and does not see: 'aaa")


def test_what_is_wrong_is_said(repo: Path, tmp_path: Path) -> None:
    tensors = load_file(repo / "transformer" / "diffusion_pytorch_model.safetensors")
    config = json.loads((repo / "transformer" / "config.json").read_text())

    def refused(state: dict[str, torch.Tensor], said: str, **changed: Any) -> None:
        meta = {"config": json.dumps(config | changed)}
        save_file(state, tmp_path / "z.safetensors", metadata=meta)
        with pytest.raises(WeightsError, match=said):
            loaded(tmp_path / "z.safetensors", vae=repo / "vae")

    refused(tensors | {"siglip_pad_token": torch.zeros(1, 32)}, "takes images as a condition")
    refused(tensors, r"n_layers 3 \(weights: 2\)", n_layers=3)
    refused(tensors, "heads of 16 channels, but no config.json says their axes_dims", _class_name="Another")
    refused({n: t for n, t in tensors.items() if n != "cap_pad_token"}, "cap_pad_token")
    lumina = {"noise_refiner.0.attention.qkv.weight": torch.zeros(2, 2)}
    refused(lumina, "is not .*: it looks like a Lumina transformer")
    with pytest.raises(PlanError, match="text_tokens= is for FLUX.1"):
        loaded(repo, text_tokens=64)
    with pytest.raises(PlanError, match="fold=chain is for Qwen-Image"):
        loaded(repo, fold=CHAIN)
    with pytest.raises(PlanError, match=r"needs context \(batch, tokens, 16\)"):
        mf.run(CHAIN, loaded(repo), condition=mf.Condition({"context": torch.ones(1, 3, 7)}))


def test_the_command_line_plans_and_inspects_a_folder(repo: Path) -> None:
    from tests.test_cli import call

    code, out, err = call("plan", "--model", str(repo), "--size", "64x64", "--low", "32x32", "--recipe", "official")
    assert (
        code == 0
        and "z-image-turbo" in out
        and "Latents 8x8 sigma=0.2727" in out
        and "native    8 steps: 8 forwards" in out
    ), err
    code, out, _ = call("plan", "--model", "z-image-turbo", "--recipe", "native")
    assert code == 0 and "offload block" in out
    code, out, _ = call("inspect", str(repo))
    for words in ("Z-Image transformer", "FLUX autoencoder", "Qwen3 text encoder", "1 refiners each"):
        assert words in out

"""Every published tensor name and shape has its place in our networks, at full size and without a byte of weights."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mrflow.checkpoints.safetensors import DTYPES, Entry, Header, Layout, Source
from mrflow.model_info import FLUX, QWEN, SCHNELL
from mrflow.models.encoders import text_layout
from mrflow.models.flux.transformer import Flux
from mrflow.models.flux.vae import VaeFlux
from mrflow.models.flux.weights import flux_layout, flux_names, flux_params, vae_layout, vae_names, vae_params
from mrflow.models.headers import transformer_layout
from mrflow.models.latent_model import footprint
from mrflow.models.qwen.text import QwenText
from mrflow.models.qwen.transformer import QwenImage
from mrflow.models.qwen.vae import VaeQwen
from mrflow.models.qwen.weights import (
    QWEN_AUTOENCODER,
    qwen_names,
    qwen_params,
    qwen_vae_params,
    same,
    wan,
)
from mrflow.models.zimage.facts import TURBO
from mrflow.models.zimage.transformer import ZImage, ZImageParams
from mrflow.models.zimage.weights import single_file, zimage_diffusers, zimage_params

GOLDEN: dict[str, Any] = json.loads((Path(__file__).parent / "golden" / "checkpoints.json").read_text())


def header(which: str, *, without: dict[str, Any] | None = None) -> Header:
    """A published checkpoint's header, with nowhere to read weights from."""
    path = Path("/nowhere/model.safetensors")
    given = GOLDEN[which]
    rows = [
        (name.replace(".*.", f".{i}.", 1), value)
        for name, value in given["tensors"].items()
        for i in range(given["repeats"] if ".*." in name else 1)
    ]
    return Header(path, {n: Entry(path, DTYPES[d], tuple(s), 0) for n, (d, s) in rows if n not in (without or {})})


def expected(module: nn.Module, layout: Layout) -> dict[str, tuple[int, ...]]:
    """The tensors and shapes that a file must hold to fill a module."""
    out: dict[str, tuple[int, ...]] = {}
    for name, tensor in module.state_dict().items():
        source: Source = layout[name]
        shape = list(tensor.shape)
        while source.squeeze and shape[-1] == 1:
            shape.pop()
        assert sum(source.rows) == shape[0]
        for part, rows in zip(source.names, source.rows, strict=True):
            assert part not in out
            out[part] = (rows, *shape[1:])
    return out


@pytest.mark.parametrize("which", ["flux1_bfl", "flux1_diffusers"])
@pytest.mark.parametrize("variant", ["dev", "schnell"])
@pytest.mark.parametrize("split", [False, True])
def test_flux(which: str, variant: str, split: bool) -> None:
    given = header(which, without=GOLDEN["schnell_lacks"][which] if variant == "schnell" else None)
    names = flux_names(given)
    params = flux_params(given, names)
    assert params.guidance is (variant == "dev")
    if split and which == "flux1_bfl":
        pytest.skip("this layout has nothing to keep apart")
    with torch.device("meta"):
        flux = Flux(params, split=split)
    assert expected(flux, flux_layout(flux, names)) == {n: e.shape for n, e in given.tensors.items()}
    info = FLUX if variant == "dev" else SCHNELL
    assert info.architecture is not None
    count = sum(p.numel() for p in flux.parameters())
    assert count == info.architecture.parameters == (11_901_408_320 if variant == "dev" else 11_891_178_560)


@pytest.mark.parametrize("which", ["vae_bfl", "vae_diffusers"])
def test_vae(which: str) -> None:
    given = header(which)
    names = vae_names(given)
    with torch.device("meta"):
        vae = VaeFlux(vae_params(given, names))
    assert expected(vae, vae_layout(vae, names)) == {n: e.shape for n, e in given.tensors.items()}
    assert sum(p.numel() for p in vae.parameters()) == GOLDEN[which]["parameters"] == 83_819_683


@pytest.mark.parametrize("info", [FLUX, SCHNELL])
def test_the_planned_footprint_is_the_networks_own(info: Any) -> None:
    given = header("flux1_bfl", without=GOLDEN["schnell_lacks"]["flux1_bfl"] if info is SCHNELL else None)
    with torch.device("meta"):
        flux, vae = (
            Flux(flux_params(given, flux_names(given))).bfloat16(),
            VaeFlux(vae_params(v := header("vae_bfl"), vae_names(v))).bfloat16(),
        )
    counted, planned = footprint(flux, vae, None), info.footprint
    for field in ("rest", "modulation", "modulation_pair", "blocks", "block_pair", "autoencoder"):
        assert getattr(counted, field) == getattr(planned, field), field
    t5, clip = GOLDEN["t5_xxl"]["tensors"], GOLDEN["clip_l"]["tensors"]
    sizes = {n: 2 * math.prod(s) for n, (_, s) in t5.items()}
    layers = [sum(b for n, b in sizes.items() if n.startswith(f"encoder.block.{i}.")) for i in range(24)]
    whole = sum(sizes.values()) + sum(2 * math.prod(s) for _, s in clip.values())
    assert planned.text_layers == sum(layers) and planned.text == whole - sum(layers)
    assert planned.text_pair == layers[0] + layers[1]
    assert planned.total == 2 * (info.architecture.parameters + 83_819_683 + 4_762_310_656 + 123_060_480)


def test_qwen_image() -> None:
    given = header("qwen_image")
    assert len(given.tensors) == GOLDEN["qwen_image"]["count"] == 1933
    names = qwen_names
    with torch.device("meta"):
        split, fused = (QwenImage(qwen_params(given, names), split=split) for split in (True, False))
    for net in (split, fused):
        assert expected(net, transformer_layout(net, names)) == {n: e.shape for n, e in given.tensors.items()}
    assert QWEN.architecture is not None
    count = sum(p.numel() for p in fused.parameters())
    assert count == QWEN.architecture.parameters == GOLDEN["qwen_image"]["parameters"] == 20_430_401_088


@pytest.mark.parametrize("which", ["qwen_vae", "qwen_vae_wan"])
def test_qwen_vae(which: str) -> None:
    given, names = header(which), same if which == "qwen_vae" else wan
    with torch.device("meta"):
        vae = VaeQwen(qwen_vae_params(given, names))
    layout = QWEN_AUTOENCODER.place(vae, given, names)
    needed = {n: e.shape for n, e in given.tensors.items() if ".time_conv." not in n}
    assert {s.names[0] for s in layout.values()} == set(needed)
    for name, tensor in vae.state_dict().items():
        shape = needed[layout[name].names[0]]
        assert tuple(tensor.shape) == (shape[:2] + shape[3:] if layout[name].frame else shape), name
    assert sum(p.numel() for p in vae.parameters()) == 44_599_603
    assert GOLDEN[which]["parameters"] == 126_892_531


def test_qwen_text() -> None:
    from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLTextConfig
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLTextModel

    given = header("qwen_text")
    assert len(given.tensors) == GOLDEN["qwen_text"]["count"] == 729
    with torch.device("meta"):
        model = Qwen2_5_VLTextModel(
            Qwen2_5_VLTextConfig(
                hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
                num_key_value_heads=4, vocab_size=152064,
            )
        )  # fmt: skip
    needed = {n: e.shape for n, e in given.tensors.items() if not n.startswith(QwenText.unused)}
    assert expected(model, text_layout(model, given)) == needed
    assert sum(p.numel() for p in model.parameters()) == 7_070_619_136


def test_the_planned_footprint_of_qwen_image() -> None:
    given, v = header("qwen_image"), header("qwen_vae")
    with torch.device("meta"):
        net = QwenImage(qwen_params(given, qwen_names)).bfloat16()
        vae = VaeQwen(qwen_vae_params(v, same)).bfloat16()
    counted, planned = footprint(net, vae, None), QWEN.footprint
    assert planned is not None
    for field in ("rest", "modulation", "modulation_pair", "blocks", "block_pair", "autoencoder"):
        assert getattr(counted, field) == getattr(planned, field), field
    sizes = {
        n: 2 * math.prod(e.shape) for n, e in header("qwen_text").tensors.items() if not n.startswith(QwenText.unused)
    }
    layers = [sum(b for n, b in sizes.items() if n.startswith(f"model.layers.{i}.")) for i in range(28)]
    assert planned.text_layers == sum(layers) and planned.text == sum(sizes.values()) - sum(layers)
    assert planned.text_pair == 2 * layers[0]


def zimage_header() -> Header:
    """What diffusers' own network of the published sizes would save."""
    from diffusers import ZImageTransformer2DModel

    path = Path("/nowhere/model.safetensors")
    with torch.device("meta"):
        net = ZImageTransformer2DModel()
    return Header(path, {n: Entry(path, torch.bfloat16, tuple(t.shape), 0) for n, t in net.state_dict().items()})


def test_zimage() -> None:
    """Every name and shape at full size, in both layouts, and the facts that plans count with."""
    given = zimage_header()
    assert zimage_params(given, zimage_diffusers) == ZImageParams()
    with torch.device("meta"):
        split, fused = (ZImage(ZImageParams(), split=split).bfloat16() for split in (True, False))
        vae = VaeFlux(vae_params(v := header("vae_bfl"), vae_names(v))).bfloat16()
    for net in (split, fused):
        layout = transformer_layout(net, zimage_diffusers)
        assert expected(net, layout) == {n: e.shape for n, e in given.tensors.items()}
    single = expected(fused, transformer_layout(fused, single_file))
    assert single["layers.29.attention.qkv.weight"] == (11520, 3840) and single["x_pad_token"] == (1, 3840)
    assert "noise_refiner.1.attention.q_norm.weight" in single and "t_embedder.mlp.2.bias" in single
    counted, planned = footprint(fused, vae, None), TURBO.footprint
    assert planned is not None and TURBO.architecture is not None
    for field in ("rest", "modulation", "modulation_pair", "blocks", "block_pair", "autoencoder"):
        assert getattr(counted, field) == getattr(planned, field), field
    assert TURBO.architecture.parameters == sum(p.numel() for p in fused.parameters()) == 6_154_908_736
    assert TURBO.architecture.single_blocks == len(fused.stack()) == 32


def test_zimage_text() -> None:
    """Qwen3-4B without its head, by its published sizes."""
    from transformers import Qwen3Config, Qwen3Model

    sizes = dict(
        vocab_size=151936, hidden_size=2560, intermediate_size=9728, num_hidden_layers=36, num_attention_heads=32,
        num_key_value_heads=8, head_dim=128,
    )  # fmt: skip
    with torch.device("meta"):
        model = Qwen3Model(Qwen3Config(**sizes))
    layers = [2 * sum(p.numel() for p in layer.parameters()) for layer in model.layers]
    planned = TURBO.footprint
    assert planned is not None and planned.text_layers == sum(layers) and planned.text_pair == layers[0] + layers[1]
    assert planned.text == 2 * sum(p.numel() for p in model.parameters()) - sum(layers)

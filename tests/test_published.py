"""Every published tensor name and shape has its place in our networks, at full size and without a byte of weights."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mrflow.models.base import footprint
from mrflow.models.checkpoint import DTYPES, Entry, Header, Layout, Source
from mrflow.models.flux import Flux
from mrflow.models.vae_flux import VaeFlux
from mrflow.models.weights import flux_layout, flux_names, flux_params, vae_layout, vae_names, vae_params
from mrflow.spec import FLUX, SCHNELL

GOLDEN: dict[str, Any] = json.loads((Path(__file__).parent / "golden" / "checkpoints.json").read_text())


def header(which: str, *, without: dict[str, Any] | None = None) -> Header:
    """A published checkpoint's header, with nowhere to read weights from."""
    path = Path("/nowhere/model.safetensors")
    rows = GOLDEN[which]["tensors"].items()
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

"""Broken checkpoints: each one a clear WeightsError before anything is allocated."""

import json
import pickle
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from mrflow.errors import WeightsError
from mrflow.models.checkpoint import read_header
from mrflow.models.flux import Flux, FluxParams
from mrflow.models.vae_flux import VaeFlux, VaeParams
from mrflow.models.weights import load_flux, save_flux

PARAMS = FluxParams(16, 16, 24, 12, 128, 1, (16, 56, 56), 4.0, 1, 1, guidance=True)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small good checkpoint."""
    flux = Flux(PARAMS)
    flux.reset(torch.Generator().manual_seed(0))
    path = tmp_path_factory.mktemp("flux") / "flux.safetensors"
    save_flux(flux, path)
    return path


def test_a_good_file_comes_back_to_the_bit(whole: Path) -> None:
    flux = load_flux(whole)
    assert flux.params == PARAMS
    for name, tensor in load_file(whole).items():
        assert torch.equal(flux.state_dict()[name], tensor)


def change(whole: Path, where: Path, how: str) -> Path:
    """A copy of a good file with one fault."""
    path, data, tensors = where / "broken.safetensors", whole.read_bytes(), load_file(whole)
    name = "double_blocks.0.img_attn.proj.weight"
    if how == "cut":
        path.write_bytes(data[: len(data) // 2])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "length":
        path.write_bytes(struct.pack("<Q", 2**62) + data[8:])
    elif how == "garbage":
        path.write_bytes(data[:8] + b"\xff" * 64 + data[72:])
    elif how == "pickle":
        path.write_bytes(pickle.dumps({"a": 1}, protocol=2))
    elif how == "longer":
        path.write_bytes(data + b"\0" * 16)
    elif how == "shape":
        save_file({**tensors, name: torch.zeros(3, 5)}, path)
    elif how == "extra":
        save_file({**tensors, "intruder.weight": torch.zeros(3)}, path)
    elif how == "missing":
        save_file({k: v for k, v in tensors.items() if k != name}, path)
    return path


@pytest.mark.parametrize(
    ("how", "text"),
    [
        ("cut", "expected"),
        ("empty", "0 bytes, expected at least 8"),
        ("length", str(2**62)),
        ("garbage", "broken header"),
        ("pickle", "a Python pickle; mrflow reads safetensors"),
        ("longer", "extra bytes"),
        ("shape", "double_blocks.0.img_attn.proj.weight"),
        ("extra", "intruder.weight"),
        ("missing", "double_blocks.0.img_attn.proj.weight"),
    ],
)
def test_broken_files_are_named(whole: Path, tmp_path: Path, how: str, text: str) -> None:
    path = change(whole, tmp_path, how)
    with pytest.raises(WeightsError) as caught:
        load_flux(path)
    assert text in str(caught.value)
    assert path.name in str(caught.value)


def test_a_missing_shard_and_a_path_that_leaves_the_folder(whole: Path, tmp_path: Path) -> None:
    index = tmp_path / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}))
    with pytest.raises(WeightsError, match=r"2 of 2 shards are missing: one\.safetensors, two\.safetensors"):
        load_flux(tmp_path)
    index.write_text(json.dumps({"weight_map": {"a": "../../etc/passwd"}}))
    with pytest.raises(WeightsError, match="not beside it"):
        load_flux(tmp_path)


@given(at=st.integers(0, 2000), value=st.integers(0, 255))
def test_a_changed_byte_in_the_header_is_an_error_of_ours_or_harmless(whole: Path, at: int, value: int) -> None:
    data = bytearray(whole.read_bytes())
    at %= 8 + struct.unpack("<Q", data[:8])[0]
    data[at] = value
    path = whole.parent / "mutated.safetensors"
    path.write_bytes(bytes(data))
    try:
        load_flux(path)
    except WeightsError:
        pass
    finally:
        path.unlink()


def test_headers_are_read_without_weights(whole: Path) -> None:
    header = read_header(whole)
    assert header.tensors["img_in.weight"].shape == (128, 16)


def test_full_size_models_have_the_published_number_of_parameters() -> None:
    with torch.device("meta"):
        flux, vae = Flux(FluxParams()), VaeFlux(VaeParams())
    assert sum(p.numel() for p in flux.parameters()) == 11_901_408_320
    counts = {part: sum(p.numel() for n, p in vae.named_parameters() if n.startswith(part)) for part in ("encoder", "decoder")}
    assert counts == {"encoder": 34_274_208, "decoder": 49_545_475}

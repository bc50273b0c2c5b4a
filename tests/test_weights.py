"""Checkpoints: broken ones give one WeightsError that says what is wrong; whole ones give their tensors."""

import json
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn

from mrflow.checkpoints.safetensors import (
    Source,
    load_into,
    map_tensor,
    mapped_files,
    open_checkpoint,
    read_header,
    save_file,
    to_layout,
)
from mrflow.errors import ResourceError, WeightsError
from mrflow.models.flux.initial import reset
from mrflow.models.flux.transformer import Flux, FluxParams
from mrflow.models.flux.vae import VaeFlux, VaeParams
from mrflow.models.flux.weights import (
    FLUX_AUTOENCODER,
    bfl,
    flux_diffusers,
    flux_layout,
    load_flux,
    save_flux,
    vae_diffusers,
    vae_layout,
)
from tests.tiny import save_vae_flux

PARAMS = FluxParams(8, 8, 12, 6, 16, 2, (2, 2, 4), 4.0, 1, 2, guidance=True)
LAYOUT = {"weight": Source(("w",), (3,)), "bias": Source(("b",), (3,))}


def raw_file(path: Path, table: object, *, data: bytes = b"", length: int | None = None) -> Path:
    """A file with this header, whether or not it makes sense."""
    text = table if isinstance(table, bytes) else json.dumps(table).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def linear_file(path: Path) -> dict[str, Tensor]:
    """A checkpoint of one linear layer, 2 to 3."""
    tensors = {"w": torch.randn(3, 2), "b": torch.randn(3)}
    save_file(tensors, path)
    return tensors


def linear() -> nn.Linear:
    with torch.device("meta"):
        return nn.Linear(2, 3)


def flux_file(path: Path, *, change: Callable[[dict[str, Tensor]], object] | None = None) -> Path:
    """A small FLUX in diffusers' layout with its config, after a change to its tensors."""
    net = Flux(PARAMS)
    reset(net, torch.Generator().manual_seed(0))
    tensors = to_layout(net.state_dict(), flux_layout(net, flux_diffusers))
    if change:
        change(tensors)
    save_file(tensors, path)
    config = {"_class_name": "FluxTransformer2DModel", "axes_dims_rope": [2, 2, 4], "num_layers": 1}
    path.with_name("config.json").write_text(json.dumps(config))
    return path


def item(dtype: str = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


BROKEN: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "0 bytes, expected at least 8"),
    "three bytes": (b"abc", "3 bytes, expected at least 8"),
    "absurd length": (struct.pack("<Q", 2**62) + b"{}", str(2**62)),
    "length beyond the file": (struct.pack("<Q", 100) + b"{}", "10 bytes, expected at least 108"),
    "garbage": (bytes(range(255, 155, -1)), "header"),
    "no JSON": (struct.pack("<Q", 4) + b"{{{{", "broken header"),
    "not UTF-8": (struct.pack("<Q", 2) + b"\xff\xfe", "broken header"),
    "deep nesting": (struct.pack("<Q", 200_000) + b"[" * 200_000, "broken header"),
    "pickle": (pickle.dumps({"a": 1}), "pickle"),
    "zip": (b"PK\x03\x04" + bytes(100), "pickle"),
    "a picture": (b"\x89PNG\r\n\x1a\n" + bytes(100), "is a picture; mrflow reads safetensors"),
    "a photograph": (b"\xff\xd8\xff\xe0\x00\x10JFIF" + bytes(100), "is a picture; mrflow reads safetensors"),
    "hdf5": (b"\x89HDF\r\n\x1a\n" + bytes(100), "HDF5"),
    "gzip": (b"\x1f\x8b\x08\x00abcdefgh" + bytes(100), "gzip"),
    "a web page": (b"<!DOCTYPE html><html><title>Log in</title>", "is a web page, not the file itself: fetch it again"),
    "gguf": (b"GGUF" + bytes(100), "GGUF"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "git lfs pull"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_what_is_no_safetensors_file_is_refused(what: str, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(BROKEN[what][0])
    with pytest.raises(WeightsError, match="x.safetensors") as caught:
        read_header(path)
    assert BROKEN[what][1] in str(caught.value)


HEADERS: dict[str, tuple[object, str]] = {
    "a list": ([], "not a table"),
    "no dtype": ({"a": {"shape": [2], "data_offsets": [0, 8]}}, "needs dtype"),
    "one offset": ({"a": item(offsets=[0])}, "two data_offsets"),
    "unknown dtype": ({"a": item("F33")}, "F33"),
    "negative shape": ({"a": item(shape=[-1, -2])}, "whole numbers"),
    "boolean shape": ({"a": item(shape=[True, 2])}, "whole numbers"),
    "fractions": ({"a": item(offsets=[0, 8.0])}, "whole numbers"),
    "wrong size": ({"a": item(shape=[3])}, "needs 12 bytes but is given 8"),
    "huge shape": ({"a": item(shape=[2**62, 2**62])}, "needs"),
    "overlap": ({"a": item(), "b": item()}, "begins at byte 0, expected 8"),
    "hole": ({"a": item(shape=[1], offsets=[4, 8])}, "begins at byte 4, expected 0"),
    "too little data": ({"a": item(shape=[9], offsets=[0, 36])}, "cut off or has extra bytes"),
    "too much data": ({"a": item(shape=[1], offsets=[0, 4])}, "cut off or has extra bytes"),
    "metadata": ({"__metadata__": {"a": 1}, "a": item()}, "metadata"),
    "twice": (b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":{}}', "twice"),
}


@pytest.mark.parametrize("what", HEADERS)
def test_a_header_that_contradicts_itself_is_refused(what: str, tmp_path: Path) -> None:
    table, words = HEADERS[what]
    with pytest.raises(WeightsError) as caught:
        read_header(raw_file(tmp_path / "x.safetensors", table, data=bytes(8)))
    assert "x.safetensors" in str(caught.value)
    assert words in str(caught.value)


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    linear_file(path)
    whole = path.read_bytes()
    for n in range(len(whole)):
        path.write_bytes(whole[:n])
        with pytest.raises(WeightsError, match=f"{n} bytes, expected"):
            read_header(path)


@given(st.data())
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_mutated_header_gives_an_error_or_the_same_tensors(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "x.safetensors"
    want = linear_file(path)
    whole = bytearray(path.read_bytes())
    (length,) = struct.unpack("<Q", whole[:8])
    for _ in range(data.draw(st.integers(1, 2))):
        at = data.draw(st.integers(0, 8 + length - 1))
        whole[at] = data.draw(st.one_of(st.integers(0, 255), st.sampled_from(b'0123456789,:[]{}" ')))
    path.write_bytes(whole)
    module = linear()
    try:
        load_into(module, open_checkpoint(path), LAYOUT)
    except WeightsError:
        return
    assert torch.equal(module.weight, want["w"])
    assert torch.equal(module.bias, want["b"])


@given(st.binary(max_size=200))
@example(struct.pack("<Q", 2) + b"{}")
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes_give_an_error_or_a_header(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    try:
        assert read_header(path).tensors == {}
    except WeightsError as error:
        assert "x.safetensors" in str(error)


def test_all_that_does_not_fit_is_in_one_error(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"w": torch.zeros(2, 3), "c": torch.zeros(3), "d": torch.zeros(1)}, path)
    with pytest.raises(WeightsError) as caught:
        load_into(linear(), open_checkpoint(path), LAYOUT)
    message = str(caught.value)
    assert "x.safetensors does not fit Linear: 4 problems" in message
    assert "w has shape (2, 3), expected (3, 2)" in message
    assert "b is missing" in message
    assert "c is not expected" in message


def test_no_weight_is_read_before_all_shapes_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("a weight was read")

    path = flux_file(tmp_path / "x.safetensors", change=lambda t: t.update(extra=torch.zeros(1)))
    monkeypatch.setattr("mrflow.checkpoints.safetensors.map_tensor", never)
    with pytest.raises(WeightsError, match="1 problems: extra is not expected"):
        load_flux(path)


def test_integers_are_no_weights_and_eight_bits_need_a_dtype(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"w": torch.zeros(3, 2, dtype=torch.int32), "b": torch.zeros(3)}, path)
    with pytest.raises(WeightsError, match="w is torch.int32"):
        load_into(linear(), open_checkpoint(path), LAYOUT, dtype=torch.float32)
    save_file({"w": torch.ones(3, 2).to(torch.float8_e4m3fn), "b": torch.zeros(3)}, path)
    with pytest.raises(WeightsError, match="say in which dtype"):
        load_into(linear(), open_checkpoint(path), LAYOUT)
    module = linear()
    load_into(module, open_checkpoint(path), LAYOUT, dtype=torch.bfloat16)
    assert module.weight.dtype == torch.bfloat16
    assert module.weight.sum() == 6


def test_weights_that_need_no_change_stay_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    want = linear_file(path)
    module, before = linear(), path.read_bytes()
    load_into(module, open_checkpoint(path), LAYOUT)
    assert module.weight.untyped_storage().data_ptr() == module.bias.untyped_storage().data_ptr()
    assert module.weight.untyped_storage().nbytes() == len(before)
    with torch.no_grad():
        module.weight += 1
    assert torch.equal(module.weight, want["w"] + 1)
    assert path.read_bytes() == before


def test_a_header_of_odd_length_is_read_too(tmp_path: Path) -> None:
    values = torch.arange(6.0).view(3, 2)
    text = b'{"w":{"dtype":"F32","shape":[3,2],"data_offsets":[0,24]},"b":{"dtype":"F32","shape":[3],"data_offsets":[24,36]}}'  # noqa: E501
    odd = text + b" " * (1 - len(text) % 2)
    path = raw_file(tmp_path / "x.safetensors", odd, data=values.numpy().tobytes() + bytes(12))
    assert len(odd) % 4
    module = linear()
    load_into(module, open_checkpoint(path), LAYOUT)
    assert torch.equal(module.weight, values)


def test_saving_is_all_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.safetensors"
    want = linear_file(path)

    def full(_: int) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ResourceError, match=r"x.safetensors cannot be written: No space"):
        save_file({"w": torch.zeros(1)}, path)
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]
    assert torch.equal(load_file(path)["w"], want["w"])
    monkeypatch.undo()
    with pytest.raises(ResourceError, match="cannot be written"):
        save_file({"w": torch.zeros(1)}, tmp_path / "no folder" / "x.safetensors")


def sharded(folder: Path, table: dict[str, Any], files: dict[str, dict[str, Tensor]]) -> Path:
    """A folder with these shards and an index."""
    for name, tensors in files.items():
        save_file(tensors, folder / name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": table}))
    return folder


def test_shards_are_one_checkpoint(tmp_path: Path) -> None:
    w, b = torch.randn(3, 2), torch.randn(3)
    files = {"1.safetensors": {"w": w}, "2.safetensors": {"b": b}}
    folder = sharded(tmp_path, {"w": "1.safetensors", "b": "2.safetensors"}, files)
    for where in (folder, folder / "model.safetensors.index.json"):
        module = linear()
        load_into(module, open_checkpoint(where), LAYOUT)
        assert torch.equal(module.weight, w)
        assert torch.equal(module.bias, b)


def test_an_index_that_is_wrong_is_refused(tmp_path: Path) -> None:
    good = {"1.safetensors": {"w": torch.zeros(1)}}
    with pytest.raises(WeightsError, match=r"2 of 3 shards are missing: 2.safetensors, 3.safetensors"):
        open_checkpoint(sharded(tmp_path, {"w": "1.safetensors", "a": "3.safetensors", "b": "2.safetensors"}, good))
    for path in ("../1.safetensors", "/etc/passwd", "a/../../b", "..", ""):
        with pytest.raises(WeightsError, match="not beside it"):
            open_checkpoint(sharded(tmp_path, {"w": path}, {}))
    with pytest.raises(WeightsError, match=r"disagree about 1 tensors: b not in 1.safetensors"):
        open_checkpoint(sharded(tmp_path, {"w": "1.safetensors", "b": "1.safetensors"}, {}))
    save_file({"w": torch.zeros(1), "c": torch.zeros(1)}, tmp_path / "1.safetensors")
    with pytest.raises(WeightsError, match=r"disagree about 1 tensors: c in 1.safetensors"):
        open_checkpoint(sharded(tmp_path, {"w": "1.safetensors"}, {}))
    for text in ("", "[]", "{}", '{"weight_map": {}}', '{"weight_map": 3}', "[" * 100_000):
        (tmp_path / "model.safetensors.index.json").write_text(text)
        with pytest.raises(WeightsError, match=r"index.json"):
            open_checkpoint(tmp_path)


def test_folders_hold_one_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="none"):
        open_checkpoint(tmp_path)
    with pytest.raises(WeightsError, match="does not exist"):
        open_checkpoint(tmp_path / "x.safetensors")
    linear_file(tmp_path / "a.safetensors")
    assert open_checkpoint(tmp_path).path.name == "a.safetensors"
    linear_file(tmp_path / "b.safetensors")
    with pytest.raises(WeightsError, match=r"several, name one: a.safetensors, b.safetensors"):
        open_checkpoint(tmp_path)


SIDECAR = b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X        " + b"\0" * 4072


def test_hidden_files_are_no_checkpoints(tmp_path: Path) -> None:
    linear_file(tmp_path / "a.safetensors")
    (tmp_path / "._a.safetensors").write_bytes(SIDECAR)
    (tmp_path / "._a.safetensors.index.json").write_bytes(SIDECAR)
    (tmp_path / ".b.safetensors").write_bytes(SIDECAR)
    assert open_checkpoint(tmp_path).path.name == "a.safetensors"


def test_folders_pipes_and_dead_links_are_no_checkpoints(tmp_path: Path) -> None:
    linear_file(tmp_path / "b.safetensors")
    (tmp_path / "a.safetensors").mkdir()
    (tmp_path / "c.safetensors").symlink_to("nowhere")
    (tmp_path / "d.safetensors").symlink_to("d.safetensors")
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "e.safetensors")
    assert open_checkpoint(tmp_path).path.name == "b.safetensors"


def test_a_name_in_capitals_is_a_checkpoint(tmp_path: Path) -> None:
    linear_file(tmp_path / "a.safetensors")
    (tmp_path / "a.safetensors").rename(tmp_path / "A.SafeTensors")
    assert open_checkpoint(tmp_path).path.name == "A.SafeTensors"


@pytest.mark.parametrize("name", ["a" * 5000, "a\0b", "..\\a\\b", "3", "\ud800"], ids=range(5))
def test_an_index_of_names_that_no_file_has(name: str, tmp_path: Path) -> None:
    (tmp_path / "a.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": name}}))
    with pytest.raises(WeightsError, match="1 of 1 shards are missing") as caught:
        open_checkpoint(tmp_path)
    assert len(str(caught.value)) < 1000


def shards(folder: Path, stem: str, index: str, *, fill: float) -> None:
    """A checkpoint in two files and their index."""
    parts = {f"{stem}-0000{i}-of-00002.safetensors": n for i, n in ((1, "w"), (2, "b"))}
    tensors = {"w": torch.full((3, 2), fill), "b": torch.zeros(3)}
    for file, name in parts.items():
        save_file({name: tensors[name]}, folder / file)
    (folder / index).write_text(json.dumps({"weight_map": {name: file for file, name in parts.items()}}))


def test_variants_are_found_and_the_plain_one_is_taken(tmp_path: Path) -> None:
    def first() -> tuple[str, float]:
        header = open_checkpoint(tmp_path)
        return header.path.name, float(map_tensor(header.tensors["w"], {})[0, 0])

    shards(tmp_path, "m.fp16", "m.safetensors.index.fp16.json", fill=16.0)
    assert first() == ("m.safetensors.index.fp16.json", 16.0)
    linear_file(tmp_path / "m.safetensors")
    assert first()[0] == "m.safetensors"
    shards(tmp_path, "m", "m.safetensors.index.json", fill=32.0)
    assert first() == ("m.safetensors.index.json", 32.0)
    for path in tmp_path.iterdir():
        path.unlink()
    linear_file(tmp_path / "m.bf16.safetensors")
    assert first()[0] == "m.bf16.safetensors"
    linear_file(tmp_path / "m.fp16.safetensors")
    with pytest.raises(WeightsError, match="holds the variants bf16, fp16 and no plain checkpoint"):
        open_checkpoint(tmp_path)
    linear_file(tmp_path / "m.safetensors")
    assert first()[0] == "m.safetensors"


def cut(path: Path) -> None:
    """A download that stopped."""
    linear_file(path)
    path.write_bytes(path.read_bytes()[:-1])


def unfinished(path: Path) -> None:
    """An index of which a shard is missing."""
    path.write_text(json.dumps({"weight_map": {"w": "gone.safetensors"}}))


NEIGHBOURS: dict[str, Callable[[Path], object]] = {
    "cut.safetensors": cut,
    "empty.safetensors": lambda path: path.write_bytes(b""),
    "text.safetensors": lambda path: path.write_text("later"),
    "a.safetensors.index.json": lambda path: path.write_text("{"),
    "a.safetensors.index.fp16.json": lambda path: path.write_bytes(SIDECAR),
    "A.Safetensors.Index.json": lambda path: path.write_text("[]"),
}


@pytest.mark.parametrize("plain", ["m.safetensors", "m.fp16.safetensors", "m.safetensors.index.json"])
@pytest.mark.parametrize("name", NEIGHBOURS)
def test_a_neighbour_that_cannot_be_read_stops_nothing(name: str, plain: str, tmp_path: Path) -> None:
    if plain.endswith(".json"):
        shards(tmp_path, "m", plain, fill=1.0)
    else:
        linear_file(tmp_path / plain)
    NEIGHBOURS[name](tmp_path / name)
    assert open_checkpoint(tmp_path).path.name == plain
    NEIGHBOURS[name](tmp_path / name.replace(name.partition(".")[0], "m.bf16", 1))
    assert open_checkpoint(tmp_path).path.name == plain


def test_files_whose_shards_were_merged_need_no_index(tmp_path: Path) -> None:
    linear_file(tmp_path / "m.safetensors")
    unfinished(tmp_path / "m.safetensors.index.json")
    assert open_checkpoint(tmp_path).path.name == "m.safetensors"


@pytest.mark.parametrize(
    ("name", "harm"),
    [
        ("diffusion_pytorch_model.safetensors", cut),
        ("model.safetensors", cut),
        ("model.safetensors.index.json", lambda path: path.write_text("{")),
        ("x.safetensors.index.json", unfinished),
    ],
)
def test_nothing_is_taken_in_the_stead_of_what_is_meant(
    name: str, harm: Callable[[Path], object], tmp_path: Path
) -> None:
    linear_file(tmp_path / "other.safetensors")
    harm(tmp_path / name)
    with pytest.raises(WeightsError, match=f"{name}.*(cut off|not JSON|are missing)"):
        open_checkpoint(tmp_path)
    linear_file(tmp_path / "diffusion_pytorch_model.safetensors")
    with pytest.raises(WeightsError, match="several, name one: diffusion_pytorch_model.safetensors, other.safetensors"):
        open_checkpoint(tmp_path)


def with_header(path: Path, table: dict[str, object], size: int) -> Path:
    """A file of this header and so many bytes."""
    raw = json.dumps(table).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + bytes(size))
    return path


EVERY = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32,
    "F32": 32, "C64": 64, "F64": 64, "I64": 64, "U64": 64,
}  # fmt: skip


@pytest.mark.parametrize("code", EVERY)
def test_every_type_of_the_format_is_known_and_refused_only_in_use(code: str, tmp_path: Path) -> None:
    size = 8 * EVERY[code] // 8
    table: dict[str, object] = {"b": {"dtype": code, "shape": [8], "data_offsets": [0, size]}}
    header = open_checkpoint(with_header(tmp_path / "x.safetensors", table, size))
    assert header.tensors["b"].shape == (8,)
    floating = code[0] in "FB" and code not in ("BOOL", "F4", "F6_E2M3", "F6_E3M2")
    module = torch.nn.Module()
    module.register_buffer("b", torch.empty(8, device="meta"))
    if floating:
        load_into(module, header, {"b": Source(("b",), (8,))}, dtype=torch.float32)
        assert not module.b.any() or code == "F8_E8M0"  # whose bytes of 0 are 2^-127
        return
    with pytest.raises(WeightsError, match=f"b is {code if code[:2] in ('F4', 'F6') else 'torch'}"):
        load_into(module, header, {"b": Source(("b",), (8,))}, dtype=torch.float32)


def test_metadata_may_be_null(tmp_path: Path) -> None:
    assert open_checkpoint(with_header(tmp_path / "x.safetensors", {"__metadata__": None}, 0)).metadata == {}


def test_headers_are_bounded(tmp_path: Path) -> None:
    one = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    text = b"{" + b",".join(b'"%d":%s' % (i, json.dumps(one).encode()) for i in range(100_001)) + b"}"
    many = tmp_path / "x.safetensors"
    many.write_bytes(struct.pack("<Q", len(text)) + text)
    with pytest.raises(WeightsError, match="names 100001 tensors, 100000 at most"):
        open_checkpoint(many)
    for shape in ([1] * 17, [0, 1 << 70], [1 << 62] * 16):
        with pytest.raises(WeightsError, match="has 17 axes|not whole numbers|needs"):
            open_checkpoint(with_header(many, {"a": {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}}, 0))
    with pytest.raises(WeightsError, match="bytes for 0 tensors"):
        many.write_bytes(struct.pack("<Q", 17 << 20) + b"{}".ljust(17 << 20))
        open_checkpoint(many)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop("transformer_blocks.0.attn.to_k.bias"), "transformer_blocks.0.attn.to_k.bias is missing"),
        (lambda t: t.update({"surplus": torch.zeros(1)}), "surplus is not expected"),
        (lambda t: t.update({"proj_out.bias": torch.zeros(9)}), r"proj_out.bias has shape \(9,\), expected \(8,\)"),
        (lambda t: t.update({"transformer_blocks.1.norm1.linear.bias": torch.zeros(96)}), "is not expected"),
        (lambda t: t.pop("x_embedder.weight"), "x_embedder.weight is missing"),
        (lambda t: t.update({"x_embedder.weight": torch.zeros(3)}), "expected 2 axes"),
        (lambda t: t.update({"transformer_blocks.0.attn.norm_q.weight": torch.zeros(0)}), "heads of 0"),
        (lambda t: t.update({"transformer_blocks.0.attn.norm_q.weight": torch.zeros(5)}), "heads"),
        (lambda t: t.clear(), "not a FLUX transformer"),
    ],
)
def test_a_transformer_that_does_not_fit_is_refused(
    change: Callable[[dict[str, Tensor]], object], words: str, tmp_path: Path
) -> None:
    with pytest.raises(WeightsError, match=words):
        load_flux(flux_file(tmp_path / "x.safetensors", change=change))


def test_config_and_weights_must_agree(tmp_path: Path) -> None:
    path = flux_file(tmp_path / "x.safetensors")
    config = path.with_name("config.json")
    config.write_text(json.dumps({**json.loads(config.read_text()), "num_layers": 4}))
    with pytest.raises(WeightsError, match=r"num_layers 4 \(weights: 1\)"):
        load_flux(path)
    for axes in ([2, 2], [2, 2, 4.0], "abc", 3):
        config.write_text(json.dumps({"_class_name": "FluxTransformer2DModel", "axes_dims_rope": axes}))
        with pytest.raises(
            WeightsError, match=r"x.safetensors|config.json: axes_dims_rope must be a list of at most 8 whole numbers"
        ):
            load_flux(path)
    config.unlink()
    with pytest.raises(WeightsError, match="axes_dims_rope"):
        load_flux(path)


def test_shards_without_an_index_and_half_an_autoencoder_are_named(tmp_path: Path) -> None:
    for n in (1, 2):
        save_file({f"a{n}": torch.zeros(1)}, tmp_path / f"model-0000{n}-of-00002.safetensors")
    with pytest.raises(WeightsError, match=r"shards \(model-00001-of-00002.*\) without their index: put its"):
        open_checkpoint(tmp_path)
    (tmp_path / "pickles").mkdir()
    (tmp_path / "pickles" / "model.bin").write_bytes(b"x")
    with pytest.raises(WeightsError, match=r"it holds pickles alone \(model.bin\), which are never read"):
        open_checkpoint(tmp_path / "pickles")
    save_vae_flux(VaeFlux(VaeParams((4, 8), groups=2)), tmp_path / "vae.safetensors")
    half = {name: x for name, x in load_file(tmp_path / "vae.safetensors").items() if name.startswith("decoder")}
    save_file(half, tmp_path / "half.safetensors")
    with pytest.raises(WeightsError, match=r"half\.safetensors has no encoder of images"):
        FLUX_AUTOENCODER.prepare(tmp_path / "half.safetensors").read()


def test_one_kind_of_checkpoint_is_not_taken_for_another(tmp_path: Path) -> None:
    flux, vae = tmp_path / "flux.safetensors", tmp_path / "vae.safetensors"
    save_flux(Flux(PARAMS), flux)
    save_vae_flux(VaeFlux(VaeParams((4, 8), groups=2)), vae)
    with pytest.raises(WeightsError, match="not a FLUX autoencoder: it looks like a FLUX transformer"):
        FLUX_AUTOENCODER.prepare(flux).read()
    with pytest.raises(WeightsError, match="not a FLUX transformer: it looks like a FLUX autoencoder"):
        load_flux(vae)


def test_an_all_in_one_prefix_is_read(tmp_path: Path) -> None:
    path, net = tmp_path / "x.safetensors", Flux(PARAMS)
    layout = flux_layout(net, bfl("model.diffusion_model."))
    config = {"_class_name": "FluxTransformer2DModel", "axes_dims_rope": [2, 2, 4]}
    save_file(to_layout(net.state_dict(), layout), path, metadata={"config": json.dumps(config)})
    again = load_flux(path)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), again.parameters(), strict=True))


def test_layouts_name_every_published_tensor() -> None:
    with torch.device("meta"):
        flux, vae = Flux(FluxParams()), VaeFlux(VaeParams())
    native, diffusers = flux_layout(flux, bfl("")), flux_layout(flux, flux_diffusers)
    assert len(native) == 780
    assert sum(len(s.names) for s in diffusers.values()) == 1160
    assert diffusers["single_blocks.37.linear1.weight"] == Source(
        tuple(f"single_transformer_blocks.37.{n}.weight" for n in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")),
        (3072, 3072, 3072, 12288),
    )
    assert [n for n, s in diffusers.items() if s.swap] == [
        f"final_layer.adaLN_modulation.1.{w}" for w in ("weight", "bias")
    ]
    last = vae_layout(vae, vae_diffusers(4))
    assert last["decoder.up.3.upsample.conv.weight"].names == ("decoder.up_blocks.0.upsamplers.0.conv.weight",)
    assert len([n for n, s in last.items() if s.squeeze and n.endswith("weight")]) == 8


@pytest.mark.parametrize(
    ("mark", "what"),
    [
        ("distilled_guidance_layer.in_proj.weight", "a Chroma transformer"),
        ("distilled_guidance_layer.layers.0.in_layer.weight", "a Chroma transformer"),
        ("double_stream_modulation_txt.lin.weight", r"a FLUX\.2 transformer"),
        ("single_stream_modulation.linear.weight", r"a FLUX\.2 transformer"),
        ("double_stream_modulation_img.lin.weight", r"a FLUX\.2 transformer"),
        ("controlnet_x_embedder.weight", "a ControlNet"),
    ],
)
def test_relatives_are_named_by_their_own_marks(mark: str, what: str, tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    state = {k: t.clone() for k, t in Flux(PARAMS).state_dict().items()}
    for prefix in ("", "model.diffusion_model."):
        save_file({prefix + k: t for k, t in (state | {mark: torch.zeros(2, 2)}).items()}, file)
        with pytest.raises(WeightsError, match=f"is not a FLUX transformer: it looks like {what}"):
            load_flux(file)


def test_files_that_a_parameter_or_a_buffer_lies_in_are_known(tmp_path: Path) -> None:
    """They are held against their sizes before use; what was copied to another dtype lies in none."""

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.empty(3, device="meta"))
            self.register_buffer("bias", torch.empty(3, device="meta"))

    for name, dtype in (("weight", torch.float32), ("bias", torch.float16)):
        save_file({name: torch.ones(3, dtype=dtype)}, tmp_path / f"{name}.safetensors")
    index = {"metadata": {}, "weight_map": {name: f"{name}.safetensors" for name in ("weight", "bias")}}
    (tmp_path / "m.safetensors.index.json").write_text(json.dumps(index))
    layout = {name: Source((name,), (3,)) for name in ("weight", "bias")}
    for dtype, lie in ((None, {"weight", "bias"}), (torch.float32, {"weight"}), (torch.float16, {"bias"})):
        module = Both()
        load_into(module, open_checkpoint(tmp_path / "m.safetensors.index.json"), layout, dtype=dtype)
        assert {path.stem for path in mapped_files([module])} == lie

"""8-bit files and 8-bit storage: values against the same file in 32 bits, and files that are not what they say."""

import json
import math
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from mrflow.checkpoints.safetensors import finite_8bit, open_checkpoint
from mrflow.errors import PlanError, WeightsError
from mrflow.models.flux.transformer import Flux, FluxParams
from mrflow.models.flux.weights import flux_diffusers, flux_layout, load_flux, whole_state
from mrflow.models.fp8 import FP8_MAX, Fp8Linear, Fp8Product, check_fp8, multiply_fp8, with_scales
from tests.parity.test_flux import SMALL, call, inputs, relative, scatter

PARAMS = FluxParams(16, 16, 24, 12, 128, 1, (16, 56, 56), 4.0, 1, 1, guidance=True)
CONFIG = {"config": json.dumps({"_class_name": "FluxTransformer2DModel", "axes_dims_rope": [16, 56, 56]})}
F8 = torch.float8_e4m3fn


def tensors(seed: int = 0) -> dict[str, Tensor]:
    """A small FLUX in BFL's layout."""
    net = Flux(PARAMS)
    scatter(net, seed)
    return {name: t.detach().clone() for name, t in net.state_dict().items()}


def is_matrix(name: str, t: Tensor) -> bool:
    return t.ndim == 2 and "blocks" in name


def plain(path: Path, *, prefix: str = "") -> Path:
    """Every tensor cast to 8 bits."""
    save_file({prefix + k: t.to(F8) for k, t in tensors().items()}, path, metadata=CONFIG)
    return path


def scaled(path: Path, style: str, *, prefix: str = "") -> dict[str, Tensor]:
    """The blocks' matrices in 8 bits with a scale each; gives what their values stand for."""
    out: dict[str, Tensor] = {}
    stand: dict[str, Tensor] = {}
    meta, layers = dict(CONFIG), {}
    for name, t in tensors().items():
        stand[name] = t.to(torch.bfloat16)
        if not is_matrix(name, t):
            out[prefix + name] = t.to(torch.bfloat16)
            continue
        scale = t.abs().max() / FP8_MAX
        out[prefix + name] = (t / scale).to(F8)
        stand[name] = (out[prefix + name].float() * scale).to(torch.bfloat16)
        layer = prefix + name.removesuffix(".weight")
        if style == "older":
            out[f"{layer}.scale_weight"] = scale
            out[f"{layer}.scale_input"] = torch.ones(())
        else:
            out[f"{layer}.weight_scale"] = scale.reshape(1) if style == "newer" else scale.expand(len(t), 1).clone()
            settings = json.dumps({"format": "float8_e4m3fn"}).encode()
            out[f"{layer}.comfy_quant"] = torch.frombuffer(bytearray(settings), dtype=torch.uint8)
            layers[layer] = {"format": "float8_e4m3fn"}
    if style == "older":
        out[prefix + "scaled_fp8"] = torch.empty(2, dtype=F8)
    if style == "by row":
        meta["_quantization_metadata"] = json.dumps({"format_version": "1.0", "layers": layers})
    save_file(out, path, metadata=meta)
    return stand


@pytest.mark.parametrize("style", ["older", "newer", "by row"])
def test_scaled_files_give_what_their_values_stand_for(style: str, tmp_path: Path) -> None:
    want = scaled(tmp_path / "f.safetensors", style)
    flux = load_flux(tmp_path / "f.safetensors")
    assert flux.dtype == torch.bfloat16
    for name, tensor in flux.state_dict().items():
        assert torch.equal(tensor, want[name]), name


@pytest.mark.parametrize("style", ["older", "newer", "by row", "unmarked"])
def test_wider_weights_are_scaled_where_the_file_says_so(
    style: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The values of a scaled file in 16 bits stand for the same; scales that nothing calls for are left out."""
    path = tmp_path / "f.safetensors"
    want = scaled(path, "newer" if style == "unmarked" else style)
    with safe_open(path, "pt") as file:
        meta, data = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    marks = ("comfy_quant",) if style == "unmarked" else ()
    data = {n: t.to(torch.bfloat16) if t.dtype == F8 and t.ndim == 2 else t for n, t in data.items()}
    wider = tmp_path / "wider.safetensors"  # not over the first: older safetensors map it into `data`
    save_file({n: t for n, t in data.items() if not n.endswith(marks)}, wider, metadata=meta)
    for name, tensor in load_flux(wider).state_dict().items():
        assert torch.equal(tensor, data[name] if style == "unmarked" else want[name]), name
    assert ("scales for 13 weights of more than 8 bits" in caplog.text) == (style == "unmarked"), caplog.text


@pytest.mark.parametrize("storage", [None, "fp8"])
@pytest.mark.parametrize(("dtype", "bits"), [
    (F8, 0x7F), (F8, 0xFF), (torch.float8_e5m2, 0x7C), (torch.float8_e5m2, 0xFD), (torch.float8_e5m2, 0x7F),
    (torch.float8_e4m3fnuz, 0x80), (torch.float8_e5m2fnuz, 0x80),
])  # fmt: skip
def test_8_bit_values_that_are_not_finite_are_seen_when_loaded(
    storage: str | None, dtype: torch.dtype, bits: int, tmp_path: Path
) -> None:
    data, spoiled = {name: t.to(dtype) for name, t in tensors().items()}, "single_blocks.0.linear1.weight"
    save_file(data, tmp_path / "good.safetensors", metadata=CONFIG)
    load_flux(tmp_path / "good.safetensors", storage=storage)
    data[spoiled].view(torch.uint8)[5, 7] = bits
    save_file(data, tmp_path / "bad.safetensors", metadata=CONFIG)
    with pytest.raises(WeightsError, match=f"{spoiled} holds values that are NaN or infinite"):
        load_flux(tmp_path / "bad.safetensors", storage=storage)


@pytest.mark.parametrize("dtype", [
    F8, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.float8_e8m0fnu
])  # fmt: skip
def test_bits_are_told_finite_as_torch_converts_them(dtype: torch.dtype) -> None:
    for bits in range(256):
        value = torch.tensor([0, bits], dtype=torch.uint8).view(dtype)
        assert finite_8bit(value) == bool(torch.isfinite(value.float()).all()), bits


def test_a_plain_cast_is_read_as_bfloat16(tmp_path: Path) -> None:
    flux = load_flux(plain(tmp_path / "f.safetensors", prefix="model.diffusion_model."))
    for name, tensor in tensors().items():
        assert torch.equal(flux.state_dict()[name], tensor.to(F8).to(torch.bfloat16)), name


@pytest.mark.parametrize("style", ["older", "newer"])
def test_storage_keeps_a_files_own_8_bits(style: str, tmp_path: Path) -> None:
    want = scaled(tmp_path / "f.safetensors", style)
    kept, wide = load_flux(tmp_path / "f.safetensors", storage="fp8"), load_flux(tmp_path / "f.safetensors")
    given = inputs(PARAMS, (3, 4))
    assert relative(call(kept, given), call(wide, given)) < 2e-2  # bfloat16: the scale multiplies after the product
    weight = kept.double_blocks[0].img_attn.qkv.weight
    assert weight.dtype == F8
    stand = weight.float() * kept.double_blocks[0].img_attn.qkv.scale[:, None]
    assert relative(stand, want["double_blocks.0.img_attn.qkv.weight"]) < 1e-2


def test_storage_halves_the_blocks_and_stays_close(tmp_path: Path) -> None:
    save_file({k: t.to(torch.bfloat16) for k, t in tensors().items()}, tmp_path / "f.safetensors", metadata=CONFIG)
    narrow, wide = load_flux(tmp_path / "f.safetensors", storage="fp8"), load_flux(tmp_path / "f.safetensors")
    blocks = [sum(p.nbytes for p in f.double_blocks.parameters()) for f in (narrow, wide)]
    assert blocks[0] < 0.52 * blocks[1]
    given = inputs(PARAMS, (3, 4))
    assert 1e-4 < relative(call(narrow, given), call(wide, given)) < 0.1


def test_storage_joins_what_a_file_keeps_apart(tmp_path: Path) -> None:
    net = Flux(SMALL)
    scatter(net, 2)
    from mrflow.checkpoints.safetensors import to_layout

    config = {"_class_name": "FluxTransformer2DModel", "axes_dims_rope": SMALL.axes}
    meta = {"config": json.dumps(config)}
    save_file(to_layout(net.state_dict(), flux_layout(net, flux_diffusers)), tmp_path / "f.safetensors", metadata=meta)
    flux = load_flux(tmp_path / "f.safetensors", storage="fp8")
    linear = flux.double_blocks[0].img_attn.qkv
    assert isinstance(linear, Fp8Linear) and linear.weight.shape == (3 * SMALL.hidden, SMALL.hidden)
    want = whole_state(net)["double_blocks.0.img_attn.qkv.weight"]
    assert relative(linear.weight.float() * linear.scale[:, None], want) < 0.05


@settings(max_examples=30)
@given(st.integers(0, 2**31), st.floats(-8, 8))
def test_rounding_to_8_bits_is_within_a_sixteenth_of_each_value(seed: int, magnitude: float) -> None:
    values = torch.randn(4, 32, generator=torch.Generator().manual_seed(seed)) * 10.0**magnitude
    linear = Fp8Linear(32, 4)
    linear.take([(values, None)], "cpu")
    back = linear.weight.float() * linear.scale[:, None]
    smallest = linear.scale[:, None] * 2.0**-9  # half of e4m3fn's smallest step
    assert bool(((back - values).abs() <= values.abs() / 16 + smallest).all())


def spoil(path: Path, change: str) -> None:
    """A scaled file with something wrong."""
    from safetensors.torch import load_file

    scaled(path, "newer")
    data = load_file(path)
    metadata = dict(CONFIG)
    layer = "double_blocks.0.img_mlp.0"
    match change:
        case "a scale is missing":
            del data[f"{layer}.weight_scale"]
        case "a weight is missing":
            del data[f"{layer}.weight"]
        case "a scale of three":
            data[f"{layer}.weight_scale"] = torch.ones(3)
        case "a scale of NaN":
            data[f"{layer}.weight_scale"] = torch.full((1,), float("nan"))
        case "an infinite scale":
            data[f"{layer}.weight_scale"] = torch.full((1,), float("inf"))
        case "a scale too large":
            data[f"{layer}.weight_scale"] = torch.full((1,), 1e37)
        case "a scale of bool":
            data[f"{layer}.weight_scale"] = torch.ones(1, dtype=torch.bool)
        case "a scale in 8 bits":
            data[f"{layer}.weight_scale"] = torch.ones(1).to(F8)
        case "two scales":
            data[f"{layer}.scale_weight"] = torch.ones(())
        case "another format":
            metadata["_quantization_metadata"] = json.dumps({"layers": {layer: {"format": "nvfp4"}}})
        case "broken metadata":
            metadata["_quantization_metadata"] = "{"
        case "bitsandbytes":
            data[f"{layer}.weight.absmax"] = torch.ones(3)
        case "packed":
            data[f"{layer}.weight"] = torch.ones(3, 4, dtype=torch.uint8)
        case _:
            metadata["model_class"] = "NunchakuFluxTransformer2dModel"
    save_file(data, path, metadata=metadata)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("a scale is missing", "1 of its weights have no scale: double_blocks.0.img_mlp.0.weight"),
        ("a weight is missing", "scales of 1 weights that it does not have"),
        ("a scale of three", r"has shape \(3,\), expected one value"),
        ("a scale of NaN", "the scale of double_blocks.0.img_mlp.0.weight is NaN, infinite or beyond"),
        ("an infinite scale", "the scale of double_blocks.0.img_mlp.0.weight is NaN, infinite or beyond"),
        ("a scale too large", "the scale of double_blocks.0.img_mlp.0.weight is NaN, infinite or beyond"),
        ("a scale of bool", "the scale of double_blocks.0.img_mlp.0.weight is torch.bool, expected float32"),
        ("a scale in 8 bits", "the scale of double_blocks.0.img_mlp.0.weight is torch.float8_e4m3fn, expected"),
        ("two scales", "double_blocks.0.img_mlp.0.weight has two scales, one of them"),
        ("another format", "quantised as 'nvfp4'"),
        ("broken metadata", "cannot be read"),
        ("bitsandbytes", "bitsandbytes"),
        ("packed", "packed bytes"),
        ("nunchaku", "Nunchaku"),
    ],
)
def test_files_that_are_not_whole_are_refused(change: str, words: str, tmp_path: Path) -> None:
    spoil(tmp_path / "f.safetensors", change)
    with pytest.raises(WeightsError, match=words):
        with_scales(open_checkpoint(tmp_path / "f.safetensors"))


def partly(path: Path, layers: list[str], *, prefix: str, listed: str) -> dict[str, Tensor]:
    """Some layers scaled, the blocks' other matrices plain casts; gives what the values stand for."""
    out: dict[str, Tensor] = {}
    stand: dict[str, Tensor] = {}
    for name, t in tensors().items():
        layer = name.removesuffix(".weight")
        if layer in layers:
            scale = t.abs().max() / FP8_MAX
            out |= {prefix + name: (t / scale).to(F8), f"{prefix}{layer}.weight_scale": scale}
            stand[name] = (out[prefix + name].float() * scale).to(torch.bfloat16)
            if listed == "beside":
                said = json.dumps({"format": "float8_e4m3fn"}).encode()
                out[f"{prefix}{layer}.comfy_quant"] = torch.frombuffer(bytearray(said), dtype=torch.uint8)
        else:
            out[prefix + name] = t.to(F8) if is_matrix(name, t) else t.to(torch.bfloat16)
            stand[name] = out[prefix + name].to(torch.bfloat16)
    start = {"own": prefix, "bare": "", "foreign": "model.diffusion_model."}.get(listed, "")
    table = {start + layer: {"format": "float8_e4m3fn"} for layer in layers}
    table |= {"text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q": {"format": "float8_e4m3fn"}}
    said = {} if listed == "beside" else {"_quantization_metadata": json.dumps({"layers": table})}
    save_file(out, path, metadata=CONFIG | said)
    return stand


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("listed", ["beside", "own", "bare", "foreign"])
@pytest.mark.parametrize(
    "layers", [["double_blocks.0.img_mlp.0"], ["final_layer.linear", "single_blocks.0.linear1"], []]
)
def test_each_layer_is_scaled_or_a_plain_cast_by_itself(
    layers: list[str], listed: str, prefix: str, tmp_path: Path
) -> None:
    want = partly(tmp_path / "f.safetensors", layers, prefix=prefix, listed=listed)
    got = load_flux(tmp_path / "f.safetensors").state_dict()
    assert all(torch.equal(got[name], value) for name, value in want.items())


def test_a_listed_layer_without_its_scale_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    for listed in ("beside", "own"):
        file = tmp_path / "f.safetensors"
        partly(file, ["double_blocks.0.img_mlp.0"], prefix="", listed=listed)
        with safe_open(file, "pt") as f:
            metadata = f.metadata()
        state = {k: v for k, v in load_file(file).items() if not k.endswith("weight_scale")}
        save_file(state, file, metadata=metadata)
        with pytest.raises(WeightsError, match=r"1 of its weights have no scale: double_blocks.0.img_mlp.0.weight"):
            load_flux(file)
        state["double_blocks.0.img_mlp.0.comfy_quant"] = torch.frombuffer(
            bytearray(b'{"format": "nvfp4"}'), dtype=torch.uint8
        )
        save_file(state, file, metadata=CONFIG)
        with pytest.raises(WeightsError, match=r"double_blocks.0.img_mlp.0.weight is quantised as 'nvfp4'"):
            load_flux(file)


def nearest(value: float) -> float:
    """The float8_e4m3fn that is nearest to a number, ties to even: from the format's definition alone."""
    table = [(1 + m / 8) * 2.0 ** (e - 7) if e else m / 8 * 2.0**-6 for e in range(16) for m in range(8)][:-1]
    even = {v: i % 2 == 0 for i, v in enumerate(table)}
    best = min(table, key=lambda v: (abs(v - abs(value)), not even[v]))
    return math.copysign(best, value)


def slow_product(x: torch.Tensor, linear: Fp8Linear) -> torch.Tensor:
    """What a product in 8 bits is to give: one number after another, in Python's own arithmetic."""
    out = torch.empty(len(x), len(linear.weight), dtype=torch.float64)
    for i, row in enumerate(x.double().tolist()):
        scale = float(torch.tensor(max(map(abs, row)), dtype=torch.float32) / 448) or 1.0
        given = [nearest(float(torch.tensor(v, dtype=torch.float32) / scale)) for v in row]
        for j, weights in enumerate(linear.weight.double().tolist()):
            total = sum(a * b for a, b in zip(given, weights, strict=True)) * scale * float(linear.scale[j])
            out[i, j] = total + (0.0 if linear.bias is None else float(linear.bias[j]))
    return out


def in_8_bits(width: int, out: int, *, seed: int = 0, bias: bool = True) -> nn.Module:
    """A network of one linear with rows of very different sizes."""
    g = torch.Generator().manual_seed(seed)
    linear = Fp8Linear(width, out, bias=bias)
    linear.take(
        [(torch.randn(out, width, generator=g) * 10.0 ** torch.arange(out)[:, None].sub(out // 2), None)], "cpu"
    )
    if linear.bias is not None:
        linear.bias.data = torch.randn(out, generator=g).bfloat16()
    return nn.Sequential(linear)


@pytest.mark.parametrize("bias", [True, False])
def test_products_in_8_bits_are_what_arithmetic_gives(bias: bool) -> None:
    net = in_8_bits(32, 16, bias=bias)
    rows = torch.randn(16, 3, 32, generator=torch.Generator().manual_seed(0))
    x = (rows * torch.tensor([[1e-3], [1.0], [300.0]])).flatten(0, 1).bfloat16()
    x[0, 3] = 0.0
    want, stored = slow_product(x, net[0]), net(x)
    multiply_fp8(net, ())
    got = net(x[None])[0]
    assert got.dtype == torch.bfloat16 and got.shape == want.shape
    each = (got.double() - want).norm(dim=0) / want.norm(dim=0)
    assert float(each.max()) < 4e-3  # bfloat16, once
    assert 0.015 < relative(got, stored) < 0.04  # the control: it is lossy, and not another product
    assert not net(torch.zeros(1, 32).bfloat16()).isnan().any()


def test_only_products_that_fit_are_in_8_bits() -> None:
    fitting, narrow, left = in_8_bits(32, 16)[0], in_8_bits(32, 12)[0], in_8_bits(16, 16)[0]
    multiply_fp8(nn.ModuleList([fitting, narrow, left]), [left])
    assert [type(m) for m in (fitting, narrow, left)] == [Fp8Product, Fp8Linear, Fp8Linear]


@pytest.mark.parametrize(
    ("device", "dtype", "capability", "said"),
    [
        ("cuda", torch.bfloat16, (8, 0), r"8.9 or newer \(Ada, Hopper\), this one has 8.0; use storage='fp8'"),
        ("mps", torch.bfloat16, None, r"for CUDA, and imitated on a CPU, not for mps; use storage='fp8'"),
        ("cuda", torch.float16, (9, 0), r"gives bfloat16, not float16; dtype=torch.bfloat16"),
        ("cuda", torch.bfloat16, (9, 0), None),
        ("cuda", torch.bfloat16, (8, 9), None),
        ("cpu", torch.bfloat16, None, None),
    ],
)
def test_products_in_8_bits_are_refused_where_there_are_none(
    device: str, dtype: torch.dtype, capability: object, said: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    with nullcontext() if said is None else pytest.raises(PlanError, match=said):
        check_fp8(torch.device(device), dtype)

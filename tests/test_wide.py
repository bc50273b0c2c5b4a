"""bfloat16 on processors without it: float32 between the weights, which stay as they lie."""

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import mrflow as mf
from mrflow.checkpoints.blueprint import blueprint
from mrflow.cost import memory
from mrflow.machine import hardware
from mrflow.models import wide
from mrflow.models.fields import step
from mrflow.models.flux.transformer import Flux, FluxParams
from mrflow.models.flux.vae import VaeFlux, VaeParams
from mrflow.models.latent_model import bytes_of
from mrflow.models.lora import AdaptedLinear, Change
from mrflow.models.wide import WideLinear, widen
from tests.live import LiveBytes
from tests.parity.test_flux import relative
from tests.tiny import write_flux_repo, write_qwen_repo, write_zimage_repo


def product(x: torch.Tensor, plain: nn.Linear) -> torch.Tensor:
    bias = None if plain.bias is None else plain.bias.double()
    return torch.nn.functional.linear(x.double(), plain.weight.double(), bias)


def widened(*sizes: int, bias: bool = True) -> nn.Linear:
    plain = nn.Linear(*sizes, bias=bias).bfloat16().requires_grad_(False)
    plain.__class__ = WideLinear
    return plain


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tokens", [1, 3])  # two rows are multiplied as they lie, six in float32
def test_blocks_of_rows_are_the_product(monkeypatch: pytest.MonkeyPatch, tokens: int, bias: bool) -> None:
    monkeypatch.setattr(wide, "BLOCK", 1)
    monkeypatch.setattr(wide, "ROWS", 5)
    torch.manual_seed(0)
    plain = widened(16, 12, bias=bias)
    x = torch.randn(2, tokens, 16).bfloat16()
    got, want = plain(x), product(x, plain)
    assert got.dtype == torch.bfloat16 and torch.equal(got, want.bfloat16())
    exact = plain(x.float())
    assert exact.dtype == torch.float32 and relative(exact, want) < 1e-6


class Casts(TorchDispatchMode):
    """How many values of matrices were made float32, and how many of them in new memory."""

    def __init__(self) -> None:
        super().__init__()
        self.copied = self.new = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.ndim == 2 and out.dtype == torch.float32:
            self.copied += out.numel() * ("copy_" in str(func))
            self.new += out.numel() * ("_to_copy" in str(func))
        return out


def test_a_vector_of_modulations_casts_no_matrix_and_others_are_cast_where_the_last_one_was() -> None:
    plain, vector, tokens = widened(64, 48), torch.randn(1, 64).bfloat16(), torch.randn(1, 9, 64)
    with torch.inference_mode():
        plain(tokens)
    for x, count in ((vector, 0), (tokens, 48 * 64)):
        with Casts() as casts:
            plain(x)
        assert (casts.copied, casts.new) == (count, 0)


def test_gradients_are_those_of_the_product() -> None:
    """What autograd keeps is not written over by the next product."""
    torch.manual_seed(0)
    first, second = widened(16, 16), widened(16, 8)
    x = torch.randn(5, 16, requires_grad=True)
    second(first(x)).sum().backward()
    assert x.grad is not None
    assert relative(x.grad, (second.weight.double().sum(0) @ first.weight.double()).expand(5, -1)) < 1e-5


def test_threads_do_not_share_what_they_cast() -> None:
    torch.manual_seed(0)
    layers, x = [widened(32, 32) for _ in range(8)], torch.randn(40, 32)
    want = [layer(x) for layer in layers]
    with ThreadPoolExecutor(4) as pool:
        found = pool.map(lambda i: torch.equal(layers[i % 8](x), want[i % 8]), range(400))
        assert all(found)


@pytest.mark.filterwarnings("ignore")
def test_a_model_is_widened_where_the_processor_needs_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_flux_repo(tmp_path / "r")
    stage = mf.Sample(32, 32, mf.Shifted(2))

    def latents(dtype: torch.dtype) -> tuple[set[type], torch.Tensor]:
        model: Any = mf.load(tmp_path / "r", device="cpu", dtype=dtype)
        kinds = {type(m) for m in model.transformer.modules() if isinstance(m, nn.Linear)}
        assert all(p.dtype == dtype for p in model.transformer.parameters())
        return kinds, mf.run(stage, model, "a cat", seed=1).data

    monkeypatch.setattr(hardware, "has_bfloat16", lambda: True)
    kinds, native = latents(torch.bfloat16)
    assert kinds == {nn.Linear}
    monkeypatch.setattr(hardware, "has_bfloat16", lambda: False)
    kinds, exact = latents(torch.float32)
    assert kinds == {nn.Linear}
    kinds, widened = latents(torch.bfloat16)
    assert kinds == {WideLinear}

    def error(x: torch.Tensor) -> float:
        return float((x - exact).norm() / exact.norm())

    assert 0 < error(widened) < 1.2 * error(native)


def test_what_adapters_add_to_it_is_float32_too() -> None:
    torch.manual_seed(0)
    base = nn.Linear(16, 12, bias=False).bfloat16().requires_grad_(False)
    base.__class__ = WideLinear
    change = Change(torch.randn(4, 16), torch.randn(12, 4), torch.randn(12), torch.randn(12, 16))
    x, kept = (
        torch.randn(3, 16),
        [t.bfloat16().float() for t in (change.down, change.up, change.bias, change.diff) if t is not None],
    )
    got = AdaptedLinear(base, change, dtype=torch.bfloat16, device="cpu")(x)
    want = x @ base.weight.float().T + x @ kept[0].T @ kept[1].T + kept[2] + x @ kept[3].T
    assert got.dtype == torch.float32 and relative(got, want) < 1e-5


class Dtypes(TorchDispatchMode):
    """The dtypes of everything that is computed, by what computed it."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[str, torch.dtype]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        outputs = out if isinstance(out, tuple | list) else (out,)
        self.seen |= {(str(func), t.dtype) for t in outputs if isinstance(t, torch.Tensor) and t.is_floating_point()}
        return out


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("write", [write_flux_repo, write_qwen_repo, write_zimage_repo])
def test_nothing_between_the_products_is_bfloat16(write: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights are looked at in pieces; all that is computed in a step is float32, as of a model of the same values."""
    write(tmp_path / "r")
    exact: Any = mf.load(tmp_path / "r", device="cpu", dtype=torch.float32)
    for p in exact.transformer.parameters():
        p.data = p.data.bfloat16().float()
    monkeypatch.setattr(hardware, "has_bfloat16", lambda: False)
    model: Any = mf.load(tmp_path / "r", device="cpu", dtype=torch.bfloat16)
    assert all(type(m) is not nn.Linear for m in model.transformer.modules())
    exact.transformer.tables = model.transformer.tables  # whose levels are rounded as the reference rounds them
    x = torch.randn(1, model.info.space.channels, 4, 6, generator=torch.Generator().manual_seed(0))
    cond = model.condition(["a red cat"])
    with torch.inference_mode():
        field = model.field(cond, mf.FieldOptions(sigmas=(0.7,)))
        field(x, 0.7)  # what is made once
        with Dtypes() as dtypes:
            got = field(x, 0.7)
        assert relative(got, exact.field(cond)(x, 0.7)) < 1e-5
    views = ("aten.split", "aten.slice", "aten.t.", "aten.view", "aten.transpose", "aten.alias", "aten.detach")
    assert not {name for name, dtype in dtypes.seen if dtype != torch.float32 and not name.startswith(views)}


@pytest.mark.parametrize("split", [True, False])
def test_its_memory_is_predicted(split: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What one step holds beside the weights, against bytes that are counted: float32, and a part of a matrix."""
    monkeypatch.setattr(hardware, "has_bfloat16", lambda: False)
    monkeypatch.setattr(wide, "_kept", threading.local())  # what this thread has cast before counts too
    params = FluxParams(hidden=256, heads=2, context=64, pooled=32, double_blocks=2, single_blocks=2)
    net = Flux(params, split=split).to(torch.bfloat16).eval().requires_grad_(False)
    widen(net)
    text, side = 64, 24
    given = torch.randn(1, side * side, 64), torch.randn(1, text, 256)
    cos, table = torch.randn(text + side * side, 64), torch.randn(1, 12 * 2 + 3 * 2 + 2, 256)
    with torch.no_grad(), LiveBytes() as live:
        step(net, *given, cos, cos, table)
    flux = mf.FLUX
    assert flux.architecture is not None and flux.footprint is not None
    sizes = replace(flux.architecture, hidden=256, text_tokens=text)
    planned = mf.plan(mf.Sample(16 * side, 16 * side, mf.Linear(1)), replace(flux, architecture=sizes))

    def values(device: str) -> int:
        found = memory(planned, device=device)
        assert found is not None
        vae = flux.footprint.autoencoder if device == "cpu" and not hardware.has_bfloat16() else 0  # type: ignore[union-attr]
        return max(found.moments.values()) - flux.footprint.total - vae  # type: ignore[union-attr]

    assert 0.8 * values("cpu") < live.peak <= values("cpu")
    assert values("cuda") < 0.6 * live.peak
    monkeypatch.setattr(hardware, "has_bfloat16", lambda: True)
    assert values("cpu") == values("cuda")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("write", [write_flux_repo, write_qwen_repo])
def test_autoencoders_are_float32_there(write: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "r")
    exact: Any = mf.load(tmp_path / "r", device="cpu", dtype=torch.float32)
    for p in exact._vae.parameters():
        p.data = p.data.bfloat16().float()
    x = torch.randn(1, exact.info.space.channels, 4, 6, generator=torch.Generator().manual_seed(0))
    errors = list[float]()
    for has in (True, False):
        monkeypatch.setattr(hardware, "has_bfloat16", lambda has=has: has)
        model: Any = mf.load(tmp_path / "r", device="cpu", dtype=torch.bfloat16)
        kept = torch.bfloat16 if has else torch.float32
        assert {p.dtype for p in model._vae.parameters()} == {kept}
        errors.append(relative(model.decode(x), exact.decode(x)))
    assert errors[0] > 1e-3 and errors[1] < 1e-5


def test_their_memory_is_predicted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice the bytes of the autoencoder, and of the values that it holds while it decodes."""
    planned = mf.plan(mf.recipes.native(size=(1024, 1024), steps=1), mf.FLUX)
    foot = mf.FLUX.footprint
    assert foot is not None
    found = dict[bool, int]()
    for has in (True, False):
        monkeypatch.setattr(hardware, "has_bfloat16", lambda has=has: has)
        predicted = memory(planned, device="cpu")
        assert predicted is not None
        (found[has],) = (size for name, size in predicted.moments.items() if name.startswith("Decode"))
    with blueprint():
        narrow, broad = (bytes_of(VaeFlux(VaeParams()).to(dtype)) for dtype in (torch.bfloat16, torch.float32))
    assert foot.autoencoder == narrow
    assert found[False] - found[True] == broad - narrow + int(2 * foot.decode_values * 1024**2)

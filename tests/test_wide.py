"""bfloat16 on processors without it: float32 between the weights, which stay as they lie."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import mrflow as mf
from mrflow.models import wide
from mrflow.models.lora import AdaptedLinear, Change
from mrflow.models.wide import WideLinear
from tests.parity.test_flux import relative
from tests.tiny import write_flux_repo, write_qwen_repo, write_zimage_repo


def test_blocks_of_rows_are_the_product(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wide, "ROWS", 5)
    torch.manual_seed(0)
    plain = nn.Linear(16, 12).bfloat16()
    x = torch.randn(2, 3, 16).bfloat16()
    want = torch.nn.functional.linear(x.double(), plain.weight.double(), plain.bias.double())
    plain.__class__ = WideLinear
    got = plain(x)
    assert got.dtype == torch.bfloat16 and torch.equal(got, want.bfloat16())


@pytest.mark.filterwarnings("ignore")
def test_a_model_is_widened_where_the_processor_needs_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_flux_repo(tmp_path / "r")
    stage = mf.Sample(32, 32, mf.Shifted(2))

    def latents(dtype: torch.dtype) -> tuple[set[type], torch.Tensor]:
        model: Any = mf.load(tmp_path / "r", device="cpu", dtype=dtype)
        kinds = {type(m) for m in model.transformer.modules() if isinstance(m, nn.Linear)}
        assert all(p.dtype == dtype for p in model.transformer.parameters())
        return kinds, mf.run(stage, model, "a cat", seed=1).data

    monkeypatch.setattr(wide, "has_bfloat16", lambda: True)
    kinds, native = latents(torch.bfloat16)
    assert kinds == {nn.Linear}
    monkeypatch.setattr(wide, "has_bfloat16", lambda: False)
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
    monkeypatch.setattr(wide, "has_bfloat16", lambda: False)
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

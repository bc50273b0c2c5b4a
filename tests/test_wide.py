"""bfloat16 on processors without it: products in float32, weights as they lie."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import mrflow as mf
from mrflow.models import wide
from mrflow.models.wide import WideLinear
from tests.tiny import write_flux_repo


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

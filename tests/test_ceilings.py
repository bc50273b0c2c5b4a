"""Ceilings that hold without a GPU: kernels of a block and bytes of a step, counted at full size on the meta device."""

from functools import cache

import pytest
import torch

from experiments.bench.kernels import block, counting, flux_step, main
from mrflow.models.kernels.ops import FUSED
from mrflow.models.layers import PLAIN

Counted = cache(block)


@pytest.mark.parametrize(("kind", "most"), [("single", 8), ("double", 24)])
def test_kernels_of_a_block(kind: str, most: int) -> None:
    fused, plain = Counted(kind, FUSED), Counted(kind, PLAIN)
    assert fused.total <= most < plain.total, (fused.names, plain.names)
    assert fused.kernels["product"] == plain.kernels["product"] and fused.kernels["attention"] == 1


def test_bytes_of_a_step_at_full_size() -> None:
    """Elementwise kernels of FLUX.1-dev at 1024 pixels; the definitions alone move more than three times as much."""
    assert flux_step(FUSED, 1024).gigabytes <= 45 < 3 * 45 < flux_step(PLAIN, 1024).gigabytes


def test_bytes_are_those_of_the_tensors_that_are_read_and_written() -> None:
    x, vector = torch.empty(1, 7, 16, dtype=torch.bfloat16), torch.empty(1, 1, 16, dtype=torch.bfloat16)
    heads, scale = x.view(1, 7, 2, 8), torch.empty(8, dtype=torch.bfloat16)
    cos, large = torch.empty(7, 4), torch.empty(1, 9, 2, 8, dtype=torch.bfloat16)
    rows, one = x.numel() * 2, vector.numel() * 2
    want = {
        "norm": (2 * rows + 2 * one, (x, vector, vector)),
        "gated": (3 * rows + one, (x, vector, x)),
        "gated_norm": (4 * rows + 3 * one, (x, vector, x, vector, vector)),
        "gelu_beside": (4 * rows, (x, x)),
        "turned": (2 * rows + 2 * cos.numel() * 4 + 8 * 2, (heads, scale, cos, cos, large, 0, 0)),
    }
    for name, (size, given) in want.items():
        away = [t.to("meta") if isinstance(t, torch.Tensor) else t for t in given]
        with counting() as counts:
            getattr(torch.ops.mrflow, name)(*away)
        assert dict(counts.bytes) == {name: size} and counts.total == 1


def test_the_table_is_printed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["kernels"])
    main()
    rows = capsys.readouterr().out.splitlines()
    assert len(rows) == 14 and all(row.count("|") == 8 for row in rows)

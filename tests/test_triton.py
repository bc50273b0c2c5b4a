"""The kernels against their definitions, in Triton's interpreter, and compiled for GPUs that are not here.

`make test-kernels` brings Triton; without it these tests are left out.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed; say make test-kernels")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1, as make test-kernels sets it", allow_module_level=True)

from mrflow.models.kernels import errors
from mrflow.models.kernels import triton_code as code
from mrflow.models.kernels.ops import FUSED, fused_norm_silu
from mrflow.models.layers import PLAIN, QKV, Rope

pytestmark = pytest.mark.filterwarnings("ignore")
CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("dtype", "width", "heads"),
    [(torch.float32, 96, 3), (torch.float32, 80, 2), (torch.bfloat16, 96, 3), (torch.float16, 128, 1)],
)
def test_kernels_give_what_their_definitions_give(dtype: torch.dtype, width: int, heads: int) -> None:
    """Views, several items, heads of no power of two, more heads than one program turns."""
    found = errors(FUSED, CPU, dtype, norms=fused_norm_silu, width=width, heads=heads)
    assert len(found) == 20 + (dtype != torch.float32) and max(found.values()) < 1, found


def test_more_heads_than_one_program_turns() -> None:
    found = errors(FUSED, CPU, torch.float32, width=88, heads=11)
    assert max(found.values()) < 1, found


def test_scales_that_come_late_are_rounded_as_their_definition_rounds() -> None:
    """Nearly every bit; the control is a kernel that rounds once, which is nearer to the truth and another number."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 9, 3, 32, generator=g).half() for _ in range(3))
    streams = [QKV(q, k, v, *((1 + 0.3 * torch.randn(32, generator=g)).half() for _ in range(2)))]
    turn = torch.randn(9, 16, generator=g)
    rope = Rope(turn.cos(), turn.sin())
    want = PLAIN.joint_heads(streams, rope, 1e-5, late=True)
    same = list[float]()
    for late in (True, False):
        pairs = zip(FUSED.joint_heads(streams, rope, 1e-5, late=late), want, strict=True)
        same.append(min(float((a == b).float().mean()) for a, b in pairs))
    assert same[0] > 0.98 and same[1] < 0.9, same


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fakes_say_what_kernels_give(dtype: torch.dtype) -> None:
    x, vector = torch.randn(2, 3, 16).to(dtype), torch.randn(1, 1, 16).to(dtype)
    pixels, weight = torch.randn(2, 16, 3, 5).to(dtype).contiguous(memory_format=torch.channels_last), x[0, 0]
    heads, table, out = torch.randn(2, 3, 2, 8).to(dtype), torch.randn(3, 4), torch.zeros(2, 5, 2, 8, dtype=dtype)
    calls: tuple[tuple[str, tuple[Any, ...]], ...] = (
        ("norm", (x, vector, vector)),
        ("gated", (x, vector, x + 1)),
        ("gated_norm", (x, vector, x + 1, vector, vector)),
        ("gelu_beside", (x, x + 1)),
        ("rms_scaled", (x, vector[0, 0], vector, 1e-5)),
        ("rms_gated", (x, vector, x + 1, vector[0, 0], 1e-5)),
        ("turned", (heads, torch.ones(8, dtype=dtype), table, table, out, 1, 0, 1e-5)),
        ("group_moments", (pixels, 4)),
        ("group_norm_silu", (pixels, torch.rand(2, 4, 2), weight, weight, 1e-6)),
        ("channel_norm_silu", (pixels, weight.view(16, 1, 1))),
    )
    for name, given in calls:
        torch.library.opcheck(getattr(torch.ops.mrflow, name), given, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("pixels", [(1, 1), (3, 5), (37, 41)])
def test_moments_of_many_programs_are_those_of_all_values(
    pixels: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Put together of parts that are not all full, far from zero: sums of squares are 2e-2 from the variance there."""
    monkeypatch.setattr(code, "SOME", 2)
    monkeypatch.setattr(code, "PARTS", 4)
    monkeypatch.setattr(code, "TILE", 256)
    g = torch.Generator().manual_seed(0)
    x = (300 + torch.randn(2, 16, *pixels, generator=g)).contiguous(memory_format=torch.channels_last)
    each = x.double().unflatten(1, (4, 4)).flatten(2)
    want = torch.stack((each.mean(-1), each.var(-1, correction=0)), -1)

    def error(moments: torch.Tensor) -> float:
        return float(((moments - want) / want).abs().max())

    assert error(torch.ops.mrflow.group_moments(x, 4)) < 1e-4
    if pixels == (37, 41):
        single = each.float()
        assert error(torch.stack((single.mean(-1), single.square().mean(-1) - single.mean(-1) ** 2), -1)) > 1e-2


def test_kernels_compile_for_gpus_without_spilling() -> None:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    ran = subprocess.run(
        [sys.executable, str(Path(__file__).parent / "compile_kernels.py"), "80", "90"],
        capture_output=True, text=True, env=env, cwd=Path(__file__).parents[1], timeout=500,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-2000:]
    found = json.loads(ran.stdout.splitlines()[-1])
    assert {name.partition(" ")[2] for name in found} == {"sm_80", "sm_90a"} and len(found) == 24
    assert all(kernel["spilled"] == 0 and kernel["registers"] <= 128 for kernel in found.values()), found

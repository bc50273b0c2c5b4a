"""Ceilings that hold without a GPU: kernels of a block and bytes of a step, counted at full size on the meta device."""

from dataclasses import replace
from functools import cache

import pytest
import torch

import mrflow as mf
from experiments.bench.kernels import block, counting, decoded, flux_step, main, meta
from mrflow.checkpoints.blueprint import blueprint
from mrflow.cost import memory
from mrflow.models.fields import step
from mrflow.models.flux.transformer import Flux, FluxParams
from mrflow.models.flux.vae import VaeFlux, VaeParams
from mrflow.models.kernels.ops import FUSED, fused_norm_silu
from mrflow.models.kl import channels_last, norm_silu
from mrflow.models.layers import PLAIN, Ops
from mrflow.models.qwen.vae import VaeQwen
from tests.live import LiveBytes

Counted = cache(block)


@pytest.mark.parametrize(("kind", "most"), [("single", 8), ("double", 24)])
def test_kernels_of_a_block(kind: str, most: int) -> None:
    fused, plain = Counted(kind, FUSED), Counted(kind, PLAIN)
    assert fused.total <= most < plain.total, (fused.names, plain.names)
    assert "gelu" not in fused.names  # of a single block beside the attention's output, else in the product before it
    assert fused.kernels["product"] == plain.kernels["product"] and fused.kernels["attention"] == 1


def test_bytes_of_a_step_at_full_size() -> None:
    """Elementwise kernels of FLUX.1-dev at 1024 pixels; the definitions alone move more than three times as much."""
    assert flux_step(FUSED, 1024).gigabytes <= 45 < 3 * 45 < flux_step(PLAIN, 1024).gigabytes


@pytest.mark.parametrize(("kind", "most"), [(VaeFlux, 17), (VaeQwen, 10)])
def test_bytes_of_an_autoencoder_at_full_size(kind: type[VaeFlux | VaeQwen], most: int) -> None:
    """Of a picture of 1024 pixels that is decoded; norms with SiLU move what they read and write, no copies."""
    fused, plain = decoded(fused_norm_silu, 1024, kind), decoded(norm_silu, 1024, kind)
    assert fused.gigabytes <= most < plain.gigabytes
    assert fused.names["native_group_norm"] + fused.names["linalg_vector_norm"] == 1 and not fused.names["silu_"]
    assert fused.kernels["product"] == plain.kernels["product"]


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
        "turned": (2 * rows + 2 * cos.numel() * 4 + 8 * 2, (heads, scale, cos, cos, large, 0, 0, 1e-6)),
    }
    pixels, weight = torch.empty(1, 16, 3, 5, dtype=torch.bfloat16), torch.empty(16, dtype=torch.bfloat16)
    seen, moments = pixels.contiguous(memory_format=torch.channels_last), torch.empty(1, 4, 2)
    values = pixels.numel() * 2
    want |= {
        "group_moments": (values + 4 * 2 * 4, (seen, 4)),
        "group_norm_silu": (2 * values + 4 * 2 * 4 + 2 * 16 * 2, (seen, moments, weight, weight, 1e-6)),
        "channel_norm_silu": (2 * values + 16 * 2, (seen, weight.view(16, 1, 1))),
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
    assert len(rows) == 18 and all(row.count("|") == 8 for row in rows)


def values_a_pixel(which: str, *, cuda: bool) -> float:
    """bfloat16 values alive at once per pixel while FLUX's autoencoder encodes or decodes."""
    with blueprint():
        vae = VaeFlux(VaeParams()).to(torch.bfloat16)
        shape = (1, 16, 32, 32) if which == "decode" else (1, 3, 256, 256)
        x = torch.empty(shape).contiguous(memory_format=torch.channels_last)
    channels_last(vae)
    with torch.no_grad(), LiveBytes(cuda=cuda) as live:
        vae.decode(x) if which == "decode" else vae.moments(x)
    return live.peak / 2 / 256**2


def test_memory_of_the_blocks_that_were_measured_is_predicted() -> None:
    """27.0 GB on one H200, without text encoders. What it takes to say so is the copies between layouts."""
    foot = mf.FLUX.footprint
    assert foot is not None
    for which, said in (("encode", foot.encode_values), ("decode", foot.decode_values)):
        assert abs(values_a_pixel(which, cuda=True) - said) < 0.01 * said
        assert values_a_pixel(which, cuda=False) < 0.85 * said
    alone = replace(foot, text=0, text_layers=0, text_pair=0)
    planned = memory(mf.plan(mf.recipes.paper(mf.Lanczos(2)), replace(mf.FLUX, footprint=alone)))
    assert planned is not None and abs(planned.peak / 27.0e9 - 1) < 0.05


@pytest.mark.parametrize("ops", [PLAIN, FUSED])
def test_values_of_a_forward_are_no_more_than_is_said(ops: Ops) -> None:
    """Of both paths; the kernels leave fewer alive."""
    params, n, text = FluxParams(double_blocks=2, single_blocks=2), 1024, 512
    with blueprint():
        net = meta(Flux(params), ops)
        tokens, cos = torch.empty(1, n, 64), torch.empty(text + n, 64)
        words = torch.empty(1, text, params.hidden, dtype=torch.bfloat16)
        vectors = 12 * params.double_blocks + 3 * params.single_blocks + 2
        table = torch.empty(1, vectors, params.hidden, dtype=torch.bfloat16)
    with torch.no_grad(), LiveBytes() as live:
        step(net, tokens, words, cos, cos, table)
    assert mf.FLUX.footprint is not None
    assert live.peak / 2 / (n + text) / params.hidden <= mf.FLUX.footprint.forward_values - (4 if ops is FUSED else 0)

"""The parts that the transformers share."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mrflow.models.layers import (
    QKV,
    Embedder,
    QKNorm,
    RMSNorm,
    Rope,
    apply_rope,
    attention,
    joint_heads,
    modulated,
    rope_tables,
    sinusoid,
)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_attention_is_a_weighted_mean_of_values() -> None:
    q, k, v = noise(2, 3, 5, 8), noise(2, 3, 7, 8, seed=1), noise(2, 3, 7, 8, seed=2)
    weights = (q @ k.mT / math.sqrt(8)).softmax(-1)
    torch.testing.assert_close(attention(q, k, v), weights @ v)


def test_rope_angles_are_position_times_falling_frequencies() -> None:
    rope = rope_tables(torch.tensor([[0.0, 3.0], [2.0, 5.0]]), (4, 6), theta=10000.0)
    angles = [2.0, 2.0 * 10000**-0.5, 5.0, 5.0 * 10000 ** (-1 / 3), 5.0 * 10000 ** (-2 / 3)]
    assert rope.cos.shape == (2, 5)
    torch.testing.assert_close(rope.cos[1], torch.tensor([math.cos(a) for a in angles]))
    torch.testing.assert_close(rope.sin[1], torch.tensor([math.sin(a) for a in angles]))
    assert rope.cos[0, :2].tolist() == [1.0, 1.0]
    assert rope.sin.dtype == torch.float32


def test_rope_turns_interleaved_pairs() -> None:
    x = torch.tensor([[1.0, 0.0, 0.0, 1.0]])
    a, b = 0.3, 1.1
    rope = Rope(torch.tensor([[math.cos(a), math.cos(b)]]), torch.tensor([[math.sin(a), math.sin(b)]]))
    want = torch.tensor([[math.cos(a), math.sin(a), -math.sin(b), math.cos(b)]])
    torch.testing.assert_close(apply_rope(x, rope), want)


@given(st.integers(-50, 50), st.integers(0, 2**16))
@settings(max_examples=20, deadline=None)
def test_rope_keeps_norms_and_sees_differences_of_positions_only(offset: int, seed: int) -> None:
    q, k = noise(4, 8, seed=seed), noise(4, 8, seed=seed + 1)
    ids = noise(4, 2, seed=seed + 2).mul(5).round()
    here, there = (rope_tables(i, (2, 6), theta=100.0) for i in (ids, ids + offset))
    torch.testing.assert_close(apply_rope(q, here).norm(dim=-1), q.norm(dim=-1))
    near = apply_rope(q, here) @ apply_rope(k, here).mT
    torch.testing.assert_close(apply_rope(q, there) @ apply_rope(k, there).mT, near, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_rope_is_the_same_function(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    x, rope = noise(2, 3, 5, 12).to(dtype), rope_tables(noise(5, 3).mul(9), (4, 4, 4), theta=10000.0)
    eager = apply_rope(x, rope)
    assert eager.dtype == dtype
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    torch.testing.assert_close(apply_rope(x, rope), eager)
    # A view with gaps, as queries are one.
    qkv = noise(2, 5, 3, 3, 12).to(dtype).permute(2, 0, 3, 1, 4)
    turned = apply_rope(qkv[0], rope)
    monkeypatch.undo()
    torch.testing.assert_close(apply_rope(qkv[0], rope), turned)


def test_sinusoid_is_cosines_then_sines() -> None:
    got = sinusoid(torch.tensor([120.0, 3500.0]))
    frequencies = [math.exp(-math.log(10000) * k / 128) for k in range(128)]
    assert got.shape == (2, 256)
    assert got[0, 0] == pytest.approx(math.cos(120.0), abs=1e-5)
    assert got[0, 128 + 127] == pytest.approx(math.sin(120.0 * frequencies[127]), abs=1e-6)
    assert frequencies[127] == pytest.approx(1.0746e-4, rel=1e-4)


def test_norms_do_not_see_the_scale_of_their_input() -> None:
    norm, x = RMSNorm(16), noise(3, 16)
    torch.testing.assert_close(norm(x), norm(100 * x), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(norm(x).square().mean(-1), torch.ones(3), atol=1e-3, rtol=1e-3)
    pair = QKNorm(16)
    with torch.no_grad():
        pair.key_norm.scale.fill_(3.0)
    streams = (QKV(x[None, :, None], x[None, :, None], x[None, :, None], *pair.scales),)
    q, k, _ = joint_heads(streams, Rope(torch.ones(3, 8), torch.zeros(3, 8)))
    torch.testing.assert_close(3 * q, k)


def test_modulated_is_norm_times_scale_plus_shift() -> None:
    x, shift, scale = noise(2, 3, 8), noise(2, 1, 8, seed=1), noise(2, 1, 8, seed=2)
    centred = x - x.mean(-1, keepdim=True)
    want = centred / (x.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt() * scale + shift
    torch.testing.assert_close(modulated(x, shift, scale), want)


def test_embedder_is_two_linears() -> None:
    net, x = Embedder(4, 6), noise(2, 4)
    hidden = net.in_layer(x)
    torch.testing.assert_close(net(x), net.out_layer(hidden * hidden.sigmoid()))

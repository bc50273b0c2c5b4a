"""What blocks do between their products: plain definitions, and that nothing is computed that nobody reads."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import mrflow as mf
from experiments.bench.kernels import counting
from mrflow.display import notes
from mrflow.models import kernels, latent_model
from mrflow.models.flux.transformer import Flux, FluxParams
from mrflow.models.flux.vae import VaeFlux, VaeParams
from mrflow.models.kernels import errors, fused_kernels
from mrflow.models.kernels.ops import FUSED, fused_norm_silu
from mrflow.models.kl import ChannelNorm, NormedModule, norm_silu
from mrflow.models.layers import EPS, PLAIN, QKV, Rope, apply_rope, attention
from mrflow.models.qwen.vae import QwenVaeParams, VaeQwen
from mrflow.models.wide import WideLinear
from tests.tiny import write_flux_repo, write_qwen_repo, write_zimage_repo

SMALL = FluxParams(hidden=64, heads=2, axes=(8, 12, 12), context=32, pooled=16, double_blocks=1, single_blocks=2)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def angles(tokens: int, half: int) -> Rope:
    turn = noise(tokens, half, seed=9)
    return Rope(turn.cos(), turn.sin())


def streams(dtype: torch.dtype, *lengths: int, heads: int = 3, head: int = 16, last: int | None = None) -> list[QKV]:
    """Streams as fused projections give them: views of one tensor each; queries of the `last` tokens alone."""
    made = list[QKV]()
    for i, n in enumerate(lengths):
        scales = ((1 + 0.2 * noise(head, seed=seed + i)).to(dtype) for seed in (20, 30))
        q, k, v = (
            part.reshape(2, n, heads, head) for part in noise(2, n, 3 * heads * head, seed=i).to(dtype).chunk(3, -1)
        )
        made.append(QKV(q if last is None else q[:, -last:], k, v, *scales))
    return made


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_each_stream_by_itself_gives_the_bits_of_all_at_once(dtype: torch.dtype) -> None:
    """Heads before tokens, put together, then turned: the other order that this was once done in."""
    given, rope = streams(dtype, 5, 7), angles(12, 8)
    want = list[list[Tensor]]([[], [], []])
    for q, k, v, *scales in given:
        normed = (F.rms_norm(x.transpose(1, 2), s.shape, s, EPS) for x, s in zip((q, k), scales, strict=True))
        for to, part in zip(want, (*normed, v.transpose(1, 2)), strict=True):
            to.append(part)
    q, k, v = (torch.cat(parts, 2) for parts in want)
    got = PLAIN.joint_heads(given, rope)
    for mine, other in zip(got, (apply_rope(q, rope), apply_rope(k, rope), v), strict=True):
        assert torch.equal(mine.transpose(1, 2), other)


@torch.no_grad()
def test_tables_of_each_item_turn_it() -> None:
    given, rope = streams(torch.float32, 6), angles(6, 8)
    other = Rope(rope.cos.flip(0), rope.sin.flip(0))
    both = Rope(*(torch.stack(pair) for pair in zip(rope, other, strict=True)))
    got = PLAIN.joint_heads(given, both)
    for item, own in enumerate((rope, other)):
        assert torch.equal(got[0][item], PLAIN.joint_heads(given, own)[0][item])


@torch.no_grad()
def test_queries_of_the_last_tokens_are_turned_as_among_all() -> None:
    rope = angles(6, 8)
    (q, k, _), (few, same, _) = (PLAIN.joint_heads(streams(torch.float32, 6, last=last), rope) for last in (None, 2))
    assert torch.equal(few, q[:, -2:]) and torch.equal(same, k)


@torch.no_grad()
@pytest.mark.parametrize("split", [True, False])
@pytest.mark.parametrize(
    ("dtype", "tokens", "less"), [(torch.float32, 80, True), (torch.float32, 5, False), (torch.bfloat16, 80, False)]
)
def test_the_last_block_leaves_text_out(split: bool, dtype: torch.dtype, tokens: int, less: bool) -> None:
    """The image is the same to the bit; where it would not be, all rows are computed."""
    torch.manual_seed(0)
    block: Any = Flux(SMALL, split=split).to(dtype).single_blocks[0]
    n = 4 + tokens
    x, rope = noise(2, n, 64).to(dtype), angles(n, 16)
    vectors: Any = noise(3, 2, 1, 64, seed=1).to(dtype).unbind(0)
    rows = list[int]()
    block.linear2.register_forward_hook(lambda *seen: rows.append(seen[2].shape[1]))
    attend = torch.nn.functional.scaled_dot_product_attention
    whole = block(x, rope, vectors, attend, text=4)
    image = block(x, rope, vectors, attend, text=4, last=True)
    assert torch.equal(image, whole[:, 4:])
    assert rows == [n, tokens if less else n]


def test_a_wrong_kernel_is_seen() -> None:
    """The measure by which kernels are taken or left, for each of them."""
    cpu = torch.device("cpu")
    assert max(errors(PLAIN, cpu, torch.float32).values()) == 0
    wrong: dict[str, Any] = {
        "norm": lambda x, shift, scale: PLAIN.norm(x, scale, shift),
        "gated": lambda x, gate, change: x + change,
        "gated_norm": lambda *given: (PLAIN.gated_norm(*given)[0], given[0]),
        "joint_heads": lambda streams, rope, *eps, late: PLAIN.joint_heads(
            streams, Rope(rope.cos, -rope.sin), *eps, late=late
        ),
        "gelu_beside": lambda out, inner: torch.cat((out, F.gelu(inner + 1e-3)), -1),
        "rms_scaled": lambda x, weight, scale, eps: PLAIN.rms_scaled(x, weight, scale, 1e-2),
        "rms_gated": lambda x, gate, change, weight, eps: x + gate * change,
    }
    for name, function in wrong.items():
        found = errors(PLAIN._replace(**{name: function}), cpu, torch.float32)
        assert {key.partition(",")[0].partition(" ")[0] for key, error in found.items() if error > 1} == {name}


@pytest.mark.parametrize("kind", [torch.nn.GroupNorm, ChannelNorm])
def test_a_wrong_norm_of_an_autoencoder_is_seen(kind: type) -> None:
    found = errors(
        PLAIN, torch.device("cpu"), torch.float32,
        norms=lambda norm, x: norm(x) if isinstance(norm, kind) else norm_silu(norm, x),
    )  # fmt: skip
    assert [name for name, error in found.items() if error > 1] == [
        f"norm_silu, {'channels' if kind is ChannelNorm else 'groups'}"
    ]


def test_a_wrong_epilogue_is_seen() -> None:
    """In the precisions in which GELU's two forms are one."""
    for function, wrong in ((PLAIN.linear_gelu, False), (lambda layer, x: F.relu(layer(x)), True)):
        found = errors(PLAIN._replace(linear_gelu=function), torch.device("cpu"), torch.bfloat16)
        assert {name for name, error in found.items() if error > 1} == ({"linear_gelu"} if wrong else set())


@torch.no_grad()
@pytest.mark.parametrize(("dtype", "near"), [(torch.float32, 5e-4), (torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
def test_gelu_is_made_in_the_product_before_it(dtype: torch.dtype, near: float) -> None:
    """One kernel, of views too; on a CPU, where torch has GELU's erf form there, as near as the two forms are."""
    layer, x = torch.nn.Linear(24, 40).to(dtype), noise(2, 9, 48).to(dtype)[..., :24]
    got, want = (ops.linear_gelu(layer, x) for ops in (FUSED, PLAIN))
    assert got.shape == want.shape and got.dtype == dtype
    assert float((got.float() - want.float()).abs().max()) < near * float(want.abs().max())
    layer, x = layer.to("meta"), x.to("meta")
    with counting() as counts:
        FUSED.linear_gelu(layer, x[:1])
    assert dict(counts.names) == {"_addmm_activation": 1} == {"_addmm_activation": counts.kernels["product"]}


class Doubled(torch.nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


@torch.no_grad()
def test_a_linear_of_another_kind_works_as_it_does() -> None:
    for layer, x in ((Doubled(8, 8), noise(1, 3, 8)), (WideLinear(8, 8).bfloat16(), noise(1, 5, 8))):
        assert torch.equal(FUSED.linear_gelu(layer, x), F.gelu(layer(x), approximate="tanh"))


@torch.no_grad()
@pytest.mark.parametrize("last", [False, True])
def test_blocks_ask_for_the_products_that_gelu_follows(last: bool) -> None:
    """The bits of the modules one after another."""
    block, asked = Flux(SMALL).double_blocks[0], list[torch.nn.Module]()
    ops = PLAIN._replace(linear_gelu=lambda layer, x: asked.append(layer) or PLAIN.linear_gelu(layer, x))  # type: ignore[func-returns-value]
    vectors: Any = noise(12, 1, 1, 64).unbind(0)
    block(noise(1, 5, 64), noise(1, 4, 64), angles(9, 16), vectors, attention, last=last, ops=ops)
    assert asked == ([block.img_mlp[0]] if last else [block.img_mlp[0], block.txt_mlp[0]])
    x = noise(1, 5, 64)
    assert torch.equal(block.img_mlp(x), torch.nn.Sequential(*block.img_mlp)(x))


def last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


@torch.no_grad()
@pytest.mark.parametrize(
    ("vae", "norm"),
    [
        (VaeFlux(VaeParams((32, 64), groups=16)), torch.nn.GroupNorm),
        (VaeQwen(QwenVaeParams((16, 32))), ChannelNorm),
    ],
)
def test_an_autoencoder_asks_for_every_norm_that_silu_follows(vae: Any, norm: type) -> None:
    """To the bit what the modules give; only the norm before its attention is another one."""
    asked = list[torch.nn.Module]()
    x = last(noise(1, 3, 16, 16))
    want = vae.moments(x), vae.decode(x.new_ones(1, 16, 4, 4))
    vae.use(lambda norm, x: asked.append(norm) or norm_silu(norm, x))  # type: ignore[func-returns-value]
    got = vae.moments(x), vae.decode(x.new_ones(1, 16, 4, 4))
    assert all(map(torch.equal, got, want))
    norms = [m for m in vae.modules() if isinstance(m, norm)]
    assert len(asked) == len(set(asked)) == len(norms) - 2


@torch.no_grad()
def test_norms_that_no_kernel_is_for_work_as_defined() -> None:
    """Another layout, another dtype of weights, groups of three channels, a subclass."""
    x, group, channel = noise(2, 48, 5, 7), torch.nn.GroupNorm(16, 48), ChannelNorm(48)
    for norm, given in (
        (group, last(x)),
        (torch.nn.GroupNorm(16, 32), x[:, :32].contiguous()),
        (channel, x),
        (channel.bfloat16(), last(x)),
        (ChannelNormOfTwo(48), last(x)),
    ):
        assert torch.equal(fused_norm_silu(norm, given), F.silu(norm(given)))


class ChannelNormOfTwo(ChannelNorm):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def test_another_epsilon_of_heads_is_seen() -> None:
    other = PLAIN._replace(joint_heads=lambda streams, rope, eps, *, late: PLAIN.joint_heads(streams, rope, late=late))
    found = errors(other, torch.device("cpu"), torch.float32)
    assert {name for name, error in found.items() if error > 1} == {"joint_heads, small values, scales late"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_block_of_z_image_asks_for_its_norms_by_name(dtype: torch.dtype) -> None:
    """The bits of its norms as modules, and every one of them is a call that a kernel can take."""
    from mrflow.models.zimage.transformer import Block, SelfAttention, ZImageParams

    p = ZImageParams(hidden=32, heads=2, axes=(4, 6, 6), level=16)
    g = torch.Generator().manual_seed(0)
    block = Block(p, split=False).to(dtype)
    for parameter in block.parameters():
        parameter.data = (0.3 * torch.randn(parameter.shape, generator=g)).to(dtype)
    x = torch.randn(2, 7, 32, generator=g).to(dtype)
    c1, g1, c2, g2 = (torch.randn(1, 1, 32, generator=g).to(dtype) for _ in range(4))
    turn = torch.randn(7, 8, generator=g)
    rope, asked = Rope(turn.cos(), turn.sin()), list[str]()

    def heard(name: str) -> Any:
        def asking(*given: Any, **how: Any) -> Any:
            asked.append(name)
            return getattr(PLAIN, name)(*given, **how)

        return asking

    def seen(own: SelfAttention, x: Tensor) -> Tensor:
        q, k, v = own.qkv(x).unflatten(-1, (3, 2, 16)).unbind(2)
        q, k = (apply_rope(norm(part).transpose(1, 2), rope) for norm, part in ((own.q_norm, q), (own.k_norm, k)))
        return own.out(attention(q, k, v.transpose(1, 2)).transpose(1, 2).flatten(2))

    ops = PLAIN._replace(**{name: heard(name) for name in PLAIN._fields})
    with torch.no_grad():
        got = block(x, rope, (c1, g1, c2, g2), attention, ops=ops)
        want = torch.addcmul(x, g1, block.attention_norm2(seen(block.attention, block.attention_norm1(x) * c1)))
        want = torch.addcmul(want, g2, block.ffn_norm2(block.feed_forward(block.ffn_norm1(want) * c2)))
    assert torch.equal(got, want)
    assert asked == ["rms_scaled", "joint_heads", "rms_gated", "rms_scaled", "rms_gated"]


def test_a_cpu_takes_the_definitions() -> None:
    assert fused_kernels(torch.device("cpu")) == (PLAIN, norm_silu)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("write", [write_flux_repo, write_qwen_repo, write_zimage_repo])
def test_a_model_takes_what_is_found_for_its_device(
    write: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Transformer and autoencoder, unless kernels are switched off; blocks may be compiled beside it."""
    write(tmp_path / "r")
    own = PLAIN._replace(norm=lambda *given: PLAIN.norm(*given))

    def norms(norm: torch.nn.Module, x: Tensor) -> Tensor:
        return norm_silu(norm, x)

    monkeypatch.setattr(latent_model, "fused_kernels", lambda device: (own, norms))
    ways = ({}, own, norms), ({"kernels": False}, PLAIN, norm_silu), ({"compile": "eager"}, None, norms)
    for options, ops, found in ways:
        model: Any = mf.load(tmp_path / "r", device="cpu", dtype=torch.float32, **options)
        assert {m.norm_silu for m in model._vae.modules() if isinstance(m, NormedModule)} == {found}
        assert model.transformer.ops == ops or (ops is None and model.transformer.ops not in (own, PLAIN))


def test_where_kernels_fail_the_definitions_are_taken_and_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """No GPU is needed for that: without one the kernels fail."""
    monkeypatch.setattr(kernels, "find_spec", lambda name: name)
    kernels._try.cache_clear()
    with notes.collect_notes() as said:
        assert fused_kernels(torch.device("cuda", 7)) == (PLAIN, norm_silu)
    kernels._try.cache_clear()
    assert "without fused kernels" in said[0]

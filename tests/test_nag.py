"""NAG: held against a slow forward of one image and two texts, written out block by block; and the laws of guidance."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import mrflow as mf
from mrflow.errors import PlanError
from mrflow.guidance import NAG
from mrflow.models.flux.transformer import image_ids
from mrflow.models.layers import Rope
from mrflow.models.qwen.transformer import positions_qwen as qwen_positions
from mrflow.models.zimage.transformer import positions_zimage as zimage_positions
from mrflow.protocols.tokens import pack, unpack
from mrflow.testing import check_guidance
from tests.parity.test_flux import relative
from tests.test_guidance import Mock
from tests.tiny import write_flux_repo, write_qwen_repo, write_zimage_repo

pytestmark = pytest.mark.filterwarnings("ignore")
WRITERS: dict[str, Any] = {"flux": write_flux_repo, "qwen": write_qwen_repo, "zimage": write_zimage_repo}
KINDS = (*WRITERS, "pocket")
PROMPT, NEGATIVE = (
    "a big red circle at the left and a much longer tale of two towns, and of what is left of them",
    "blue",
)
H, W = 3, 5
STRONG = NAG(4.0, tau=1.2, alpha=0.7)  # the cap must bind, else nothing is seen of it


@pytest.fixture(scope="module", params=KINDS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    if request.param == "pocket":
        return mf.load("pocket", device="cpu")
    return mf.load(WRITERS[request.param](tmp_path_factory.mktemp("nag") / "repo"), device="cpu")


def latents(model: Any, batch: int = 1) -> Tensor:
    g = torch.Generator().manual_seed(1)
    return torch.randn(batch, model.info.space.channels, 2 * H, 2 * W, generator=g)


# The slow way: streams (tokens, width) of one picture, heads in loops, softmax written out.


def turned(x: Tensor, rope: Rope) -> Tensor:
    """(tokens, heads, channels), each pair as a complex number times its rotation."""
    pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2).contiguous())
    return torch.view_as_real(
        pairs * torch.polar(torch.ones_like(rope.cos), torch.atan2(rope.sin, rope.cos))[:, None]
    ).flatten(-2)


def normed(x: Tensor, scale: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * scale


def softmaxed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = [torch.softmax(q[:, h] @ k[:, h].T / q.shape[-1] ** 0.5, -1) @ v[:, h] for h in range(q.shape[1])]
    return torch.cat(out, -1)


def guided(z: Tensor, other: Tensor, nag: NAG) -> Tensor:
    """Token by token, as the paper has it: extrapolated, shortened where longer than tau, blended."""
    rows = []
    for one, two in zip(z, other, strict=True):
        e = nag.scale * one - (nag.scale - 1) * two
        r = e.abs().sum() / one.abs().sum()
        rows.append(nag.alpha * (e * nag.tau / r if r > nag.tau else e) + (1 - nag.alpha) * one)
    return torch.stack(rows)


def layer_norm(x: Tensor) -> Tensor:
    return F.layer_norm(x, (x.shape[-1],), eps=1e-6)


def heads(attn: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (part.unflatten(-1, (attn.heads, -1)) for part in attn.qkv(x[None])[0].chunk(3, -1))
    scales = attn.norm.scales
    return normed(q, scales[0], 1e-6), normed(k, scales[1], 1e-6), v


def double(block: Any, img: Tensor, texts: list[Tensor], ropes: list[Rope], tables: list[Tensor], nag: NAG) -> Tensor:
    """The image after a two-stream block; `texts` are replaced."""
    s1, c1, g1, s2, c2, g2 = tables[0][:6]
    qi, ki, vi = heads(block.img_attn, layer_norm(img) * c1 + s1)
    seen = []
    for i, (text, rope, table) in enumerate(zip(texts, ropes, tables, strict=True)):
        ts1, tc1, tg1, ts2, tc2, tg2 = table[6:12]
        qt, kt, vt = heads(block.txt_attn, layer_norm(text) * tc1 + ts1)
        q, k = turned(torch.cat((qt, qi)), rope), turned(torch.cat((kt, ki)), rope)
        out = softmaxed(q, k, torch.cat((vt, vi)))
        seen.append(out[len(text) :])
        text = text + tg1 * block.txt_attn.proj(out[: len(text)])
        texts[i] = text + tg2 * block.txt_mlp(layer_norm(text) * tc2 + ts2)
    img = img + g1 * block.img_attn.proj(guided(seen[0], seen[1], nag))
    new: Tensor = img + g2 * block.img_mlp(layer_norm(img) * c2 + s2)
    return new


def singles(blocks: Any, img: Tensor, texts: list[Tensor], ropes: list[Rope], tables: list[Tensor], nag: NAG) -> Tensor:
    """The image after all one-stream blocks, in which either condition has a copy of it."""
    rows = [torch.cat((text, img)) for text in texts]
    for n, block in enumerate(blocks):
        outs, inners = [], []
        for x, rope, table in zip(rows, ropes, tables, strict=True):
            shift, scale, _ = table[3 * n : 3 * n + 3]
            *qkv, inner = block.linear1((layer_norm(x) * scale + shift)[None])[0].split(block.rows, -1)
            q, k, v = (part.unflatten(-1, (block.heads, -1)) for part in qkv)
            q, k = (turned(normed(p, s, 1e-6), rope) for p, s in zip((q, k), block.norm.scales, strict=True))
            outs.append(softmaxed(q, k, v))
            inners.append(F.gelu(inner, approximate="tanh"))
        one = guided(outs[0][-H * W :], outs[1][-H * W :], nag)
        for i, (x, table) in enumerate(zip(rows, tables, strict=True)):
            both = torch.cat((torch.cat((outs[i][: -H * W], one)), inners[i]), -1)
            rows[i] = x + table[3 * n + 2] * block.linear2(both)
    return rows[0][-H * W :]


def slow_flux(model: Any, net: Any, conds: Sequence[mf.Condition], x: Tensor, sigma: float, nag: NAG) -> Tensor:
    level, value = torch.tensor([sigma]), model.info.guidance
    strength = None if value is None else torch.tensor([value])
    tables = [net.tables([level], strength, c["pooled"])[0][0] for c in conds]
    texts = [net.embed_text(c["context"])[0] for c in conds]
    ropes = [net.rope(image_ids(H, W), torch.zeros(len(t), 3)) for t in texts]
    img = net.embed_image(pack(x))[0]
    for i, block in enumerate(net.double_blocks):
        img = double(block, img, texts, ropes, [t[12 * i : 12 * i + 12] for t in tables], nag)
    img = singles(net.single_blocks, img, texts, ropes, [t[12 * len(net.double_blocks) :] for t in tables], nag)
    return unpack(net.head(img[None], tables[0][None]), H, W)


def slow_qwen(model: Any, net: Any, conds: Sequence[mf.Condition], x: Tensor, sigma: float, nag: NAG) -> Tensor:
    table = net.tables([torch.tensor([sigma])])[0][0]
    texts = [net.embed_text(states[None])[0] for c in conds for states in model._states(c)]
    assert len(texts[0]) != len(texts[1])
    ropes = [net.rope(qwen_positions(H, W, len(t))) for t in texts]
    img = net.embed_image(pack(x))[0]
    for i, block in enumerate(net.double_blocks):
        img = double(block, img, texts, ropes, [table[12 * i : 12 * i + 12]] * 2, nag)
    return unpack(net.head(img[None], table[None]), H, W)


def slow_zimage(model: Any, net: Any, conds: Sequence[mf.Condition], x: Tensor, sigma: float, nag: NAG) -> Tensor:
    table = net.tables([torch.tensor([sigma])])[0][0]
    texts = [net.embed_text([states])[0] for c in conds for states in model._states(c)]
    assert len(texts[0]) != len(texts[1])
    packed = x[0].view(-1, H, 2, W, 2).permute(1, 3, 2, 4, 0).reshape(H * W, -1)
    image = net.embed_image(packed[None])[0]
    count = len(image)
    filling = net.x_pad_token.expand(-count % 32, -1)
    rows = [torch.cat((text, filling, image)) for text in texts]
    ropes = [net.rope(zimage_positions(H, W, len(t))) for t in texts]
    for i, block in enumerate(net.stack()):
        c1, g1, c2, g2 = table[4 * i : 4 * i + 4]
        outs = []
        for x_, rope, text in zip(rows, ropes, texts, strict=True):
            lead = len(text) if i < len(net.noise_refiner) else 0
            part, turn = x_[lead:], Rope(rope.cos[lead:], rope.sin[lead:])
            given = (normed(part, block.attention_norm1.scale, 1e-5) * c1)[None]
            a = block.attention
            q, k, v = (p.unflatten(-1, (a.heads, -1)) for p in a.qkv(given)[0].chunk(3, -1))
            q, k = (turned(normed(p, n.scale, 1e-5), turn) for p, n in ((q, a.q_norm), (k, a.k_norm)))
            outs.append(softmaxed(q, k, v))
        one = guided(outs[0][-count:], outs[1][-count:], nag)
        for j, (x_, out) in enumerate(zip(rows, outs, strict=True)):
            lead = len(x_) - len(out)
            change = block.attention.out(torch.cat((out[:-count], one)))
            part = x_[lead:] + g1 * normed(change, block.attention_norm2.scale, 1e-5)
            change = block.feed_forward((normed(part, block.ffn_norm1.scale, 1e-5) * c2)[None])[0]
            rows[j] = torch.cat((x_[:lead], part + g2 * normed(change, block.ffn_norm2.scale, 1e-5)))
    tokens: Tensor = net.head(rows[0][None, -count:], table[None])[0]
    return tokens.view(H, W, 2, 2, -1).permute(4, 0, 2, 1, 3).reshape(1, -1, 2 * H, 2 * W)


def slow(model: Any, conds: Sequence[mf.Condition], x: Tensor, sigma: float, nag: NAG) -> Tensor:
    net = model.transformer
    how = {"Flux": slow_flux, "QwenImage": slow_qwen, "ZImage": slow_zimage}[type(net).__name__]
    return how(model, net, conds, x, sigma, nag)


@pytest.mark.parametrize("nag", [STRONG, NAG(4.0)], ids=repr)
def test_it_is_one_image_beside_two_texts(model: Any, nag: NAG) -> None:
    cond, negative = model.condition([PROMPT]), model.condition([NEGATIVE])
    x = latents(model)
    with torch.inference_mode():
        got = nag.field(model, cond, negative)(x, 0.7)
        want = slow(model, (cond, negative), x, 0.7, nag)
        plain, other = (model.field(c)(x, 0.7) for c in (cond, negative))
    assert relative(got, want) < 2e-5
    apart = min(relative(got, v) for v in (plain, other))
    assert apart > 20 * relative(got, want) and apart > 1e-5, apart


def test_its_neutral_settings_are_the_prompt_alone(model: Any) -> None:
    cond, negative = model.condition([PROMPT, NEGATIVE]), model.condition([NEGATIVE])
    x = latents(model, 2)
    with torch.inference_mode():
        want = model.field(cond)(x, 0.7)
        assert torch.equal(NAG(1.0).field(model, cond, None)(x, 0.7), want)
        for neutral in (NAG(5.0, alpha=0.0), NAG(1.0 + 1e-6)):
            assert relative(neutral.field(model, cond, negative)(x, 0.7), want) < 1e-5
    assert (NAG(1.0).passes, NAG(2.0).passes) == (1, 2)


@pytest.mark.parametrize("nag", [NAG(4.0), STRONG, NAG(0.5), NAG(1.0)], ids=repr)
def test_it_keeps_the_laws_of_guidance(model: Any, nag: NAG) -> None:
    check_guidance(nag, model=model)


def test_plans_count_what_runs(model: Any) -> None:
    size = 8 * model.info.space.multiple
    chain = mf.Sample(size, size, mf.Linear(3), guidance=mf.Interval(NAG(4.0), 0.5, 1.0)) >> mf.Decode()
    result = mf.run(chain, model, PROMPT)
    assert result.nfe == result.plan.nfe == 5  # 1, 2/3: two passes; 1/3: one
    assert mf.parse("NAG(4, tau=2)", mf.Guidance) == NAG(4.0, tau=2.0)


def test_what_cannot_serve_it_says_so() -> None:
    chain = mf.Sample(64, 64, mf.Linear(2), guidance=mf.Interval(NAG(4.0), 0.2, 1.0)) >> mf.Decode()
    with pytest.raises(PlanError, match="no guidance into its attention"):
        mf.plan(chain, replace(mf.FLUX, capabilities=mf.Capabilities(together=True)))
    cached = mf.Sample(64, 64, mf.Linear(2), guidance=NAG(4.0), cache=mf.caches.TaylorSeer(2)) >> mf.Decode()
    with pytest.raises(PlanError, match="works inside attention, which TaylorSeer"):
        mf.plan(cached, mf.FLUX)
    rival = mf.recipes.ralu(size=(256, 256), steps=(2, 2, 2), guidance=NAG(4.0))
    with pytest.raises(PlanError, match="no guidance into its attention"):
        mf.plan(rival, replace(mf.FLUX, capabilities=mf.Capabilities(positions=True)))
    with pytest.raises(PlanError, match="needs a negative"):
        NAG(4.0).field(Mock(), Mock().condition(["a"]), None)
    with pytest.raises(PlanError, match="one must be beside the first, not 0"):
        mf.FieldOptions(attention=NAG(4.0).mix)
    for wrong in ({"tau": 0.5}, {"alpha": 1.5}):
        with pytest.raises(PlanError):
            NAG(4.0, **wrong)


def test_no_image_token_grows_beyond_tau() -> None:
    g = torch.Generator().manual_seed(0)
    z, other = (torch.randn(2, 3, 7, 8, generator=g) for _ in range(2))
    got = NAG(20.0, tau=1.5, alpha=1.0).mix(z, other)
    norm, own = (t.abs().sum((1, 3)) for t in (got, z))
    torch.testing.assert_close(norm, 1.5 * own)
    assert NAG(3.0).mix(z.bfloat16(), other.bfloat16()).dtype == torch.bfloat16
    assert not bool(NAG(3.0).mix(torch.zeros_like(z), torch.zeros_like(z)).isnan().any())

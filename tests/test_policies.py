"""pi-Flow: policies against exact solutions, adapters in the published layout on tiny FLUX.1 and Qwen-Image."""

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

import mrflow as mf
from mrflow.errors import PlanError, WeightsError
from mrflow.models.piflow import read_head
from mrflow.protocols.policies import DX, GM, automatic, follow, raw, substeps
from mrflow.schedules import shift_static
from tests.lora_files import dotted, low_rank
from tests.parity.test_flux import relative
from tests.parity.test_official import UP, pipeline, words
from tests.test_qwen import repo as qwen_repo  # noqa: F401  (fixture)

pytestmark = pytest.mark.filterwarnings("ignore")


def single(mean: float, variance: float, x: float, sigma: float) -> GM:
    """A prior N(mean, variance) as a policy of one component: its posterior at the source."""
    alpha, precision = 1 - sigma, 1 / variance
    v = 1 / (precision + (alpha / sigma) ** 2)
    mu = v * (mean * precision + alpha * x / sigma**2)
    here = torch.full((1, 1, 1, 1), x, dtype=torch.float64)
    means = (here - mu)[:, None] / sigma
    logstd = torch.full((1, 1, 1, 1, 1), 0.5 * math.log(v / sigma**2), dtype=torch.float64)
    return GM(means, torch.zeros(1, 1, 1, 1, 1, dtype=torch.float64), logstd, here, sigma)


def exact(mean: float, variance: float, x: float, sigma: float, to: float) -> float:
    """The end of the flow from (x, sigma) for a Gaussian prior."""
    spread = [math.sqrt((1 - s) ** 2 * variance + s**2) for s in (sigma, to)]
    return (1 - to) * mean + spread[1] / spread[0] * (x - (1 - sigma) * mean)


@pytest.mark.parametrize(
    ("r", "to", "steps", "error"),
    [(1.0, 0.7143, 37, -5.3e-5), (0.4286, 0.1429, 37, -2.9e-3), (0.4286, 0.1429, 1, -8.6e-2)],
)
def test_a_gaussian_prior_is_followed_to_its_exact_end(r: float, to: float, steps: int, error: float) -> None:
    start, end = (shift_static(t, 3.2) for t in (r, to))
    policy = single(0.4, 0.3, 0.9, start)
    found = follow(policy, policy.x_s, start, end, shift=3.2, total=round(steps / (r - to) - 0.4))
    assert float(found) - exact(0.4, 0.3, 0.9, start, end) == pytest.approx(error, rel=0.06)
    finer = follow(policy, policy.x_s, start, end, shift=3.2, total=100000)
    assert float(finer) == pytest.approx(exact(0.4, 0.3, 0.9, start, end), abs=1e-4)


@given(
    st.floats(-1, 1), st.floats(0.05, 2), st.floats(-2, 2), st.floats(0.1, 1), st.floats(0.02, 0.99), st.floats(-2, 2)
)
def test_one_component_is_bayes_rule_everywhere(
    mean: float, variance: float, x: float, source: float, part: float, other: float
) -> None:
    """The posterior mean at another place is that of the prior there, whatever the source was."""
    sigma = source * part
    policy = single(mean, variance, x, source)
    gain = (1 - sigma) * variance / ((1 - sigma) ** 2 * variance + sigma**2)
    want = mean + gain * (other - (1 - sigma) * mean)
    found = policy.denoised(torch.full((1, 1, 1, 1), other, dtype=torch.float64), sigma)
    assert float(found) == pytest.approx(want, rel=1e-6, abs=1e-6)


def random_mixture(seed: int, sigma: float, *, k: int = 4) -> GM:
    g = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    x = draw(2, 3, 2, 2)
    weights = draw(2, k, 1, 2, 2).log_softmax(1)
    return GM(draw(2, k, 3, 2, 2), weights, 0.3 * draw(2, 1, 1, 1, 1) - 1, x, sigma)


@given(st.integers(0, 99), st.floats(0.2, 1.0), st.floats(0.05, 0.95))
def test_a_mixture_against_the_ratio_of_likelihoods(seed: int, source: float, part: float) -> None:
    """Importance weights of samples: the posterior at the source times p(x | x0) / p(x_s | x0)."""
    policy, sigma = random_mixture(seed, source), source * part
    g = torch.Generator().manual_seed(seed)
    x = (1 - sigma) * policy.denoised(policy.x_s, source) + sigma * torch.randn(2, 3, 2, 2, generator=g)
    mu = policy.x_s[:, None] - source * policy.means
    v = ((2 * policy.logstd).exp() * source**2)[:, :, 0, 0, 0]
    zeta = ((1 - sigma) / sigma) ** 2 - ((1 - source) / source) ** 2
    nu = (1 - sigma) / sigma**2 * x - (1 - source) / source**2 * policy.x_s
    logs, means = [], []
    for k in range(4):  # a Gaussian times exp(nu x0 - zeta x0^2 / 2), completed to a square by hand
        precision = 1 / v[:, :, None, None] + zeta
        m = (mu[:, k] / v[:, :, None, None] + nu) / precision
        constant = -0.5 * (mu[:, k] ** 2 / v[:, :, None, None]) + 0.5 * precision * m**2
        logs.append(policy.logweights[:, k, 0] + constant.sum(1))
        means.append(m)
    weights = torch.stack(logs, 1).softmax(1)[:, :, None]
    want = (weights * torch.stack(means, 1)).sum(1)
    torch.testing.assert_close(policy.denoised(x, sigma), want, rtol=1e-6, atol=1e-6)


@given(st.integers(0, 99), st.floats(0.1, 1.0))
def test_at_the_source_the_velocity_is_the_weighted_mean(seed: int, sigma: float) -> None:
    policy = random_mixture(seed, sigma)
    want = (policy.logweights.exp() * policy.means).sum(1)
    torch.testing.assert_close(policy(policy.x_s, sigma), want, rtol=1e-6, atol=1e-6)


@given(st.integers(0, 99))
def test_components_may_be_exchanged_and_temperature_one_is_nothing(seed: int) -> None:
    policy = random_mixture(seed, 0.8)
    order = torch.randperm(4, generator=torch.Generator().manual_seed(seed))
    other = GM(policy.means[:, order], policy.logweights[:, order], policy.logstd, policy.x_s, 0.8)
    x = 0.5 * policy.x_s
    torch.testing.assert_close(other(x, 0.3), policy(x, 0.3))
    assert policy.with_temperature(1.0) is policy
    cold = policy.with_temperature(0.3)
    torch.testing.assert_close(cold.logweights.exp().sum(1), torch.ones(2, 1, 2, 2, dtype=torch.float64))
    torch.testing.assert_close((2 * cold.logstd).exp(), 0.3 * (2 * policy.logstd).exp())
    assert bool((cold.logweights.max(1).values >= policy.logweights.max(1).values - 1e-9).all())


@given(st.integers(1, 200), st.floats(0.1, 1.0))
def test_a_sure_policy_is_a_straight_line(total: int, sigma: float) -> None:
    policy = random_mixture(1, sigma, k=1)
    sure = GM(
        policy.means, torch.zeros_like(policy.logweights), torch.full_like(policy.logstd, -40.0), policy.x_s, sigma
    )
    target = policy.x_s - sigma * policy.means[:, 0]
    end = follow(sure, policy.x_s, sigma, 0.0, shift=3.2, total=total)
    torch.testing.assert_close(end, target, rtol=1e-5, atol=1e-5)


def test_float32_holds_at_the_ends() -> None:
    policy = random_mixture(3, 1.0)
    single32 = GM(*(t.float() for t in (policy.means, policy.logweights, policy.logstd, policy.x_s)), 1.0)
    for sigma in (1.0, 0.5, 1e-3, 1e-6):
        got, want = single32(single32.x_s, sigma), policy(policy.x_s, sigma)
        assert torch.isfinite(got).all()
        if sigma >= 1e-3:
            assert relative(got, want) < 1e-3


def test_substeps_are_the_published_ones() -> None:
    levels = mf.FlowMap(4)(1.0, 4096, mf.FLUX)
    assert [substeps(a, b, shift=3.2) for a, b in pairwise(levels)] == [37, 37, 37, 19]
    whole = mf.FlowMap(4, final_step=1.0)(1.0, 4096, mf.FLUX)
    assert [substeps(a, b, shift=3.2) for a, b in pairwise(whole)] == [32] * 4
    assert whole[3] == pytest.approx(0.5161, abs=1e-4)
    assert [automatic(n) for n in (1, 4, 8, 20)] == pytest.approx([0.0, 0.3, 0.7, 1.0])


@given(st.integers(2, 12), st.floats(0.2, 1.0), st.floats(0.05, 0.95), st.integers(0, 99))
def test_a_grid_is_interpolated_in_time(n: int, sigma: float, part: float, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    outputs, x = torch.randn(1, n, 2, 2, 2, generator=g), torch.randn(1, 2, 2, 2, generator=g)
    policy = DX(outputs, x, sigma, 3.2, 1 / 3.5)
    start, end = raw(sigma, 3.2), max(0.0, raw(sigma, 3.2) - 1 / 3.5)
    clean = x - sigma * outputs[0]
    torch.testing.assert_close(policy.denoised(x, sigma)[0], clean[-1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(policy.denoised(x, shift_static(end, 3.2))[0], clean[0], rtol=1e-4, atol=1e-4)
    at = end + part * (start - end)
    place = part * (n - 1)
    low = min(int(place), n - 2)
    want = (low + 1 - place) * clean[low] + (place - low) * clean[low + 1]
    torch.testing.assert_close(policy.denoised(x, shift_static(at, 3.2))[0], want, rtol=1e-3, atol=1e-3)


def test_a_polynomial_is_one() -> None:
    x, outputs = torch.randn(1, 1, 1, 1), torch.randn(1, 3, 1, 1, 1)
    policy = DX(outputs, x, 0.9, 3.2, 1.0, polynomial=True)
    d = raw(0.9, 3.2) - raw(0.4, 3.2)
    clean = x - 0.9 * outputs[0]
    want = clean[0] + d * clean[1] + d * d * clean[2]
    torch.testing.assert_close(policy.denoised(x, 0.4).view(-1), want.view(-1))


# Adapters as published, on tiny networks

GUIDANCE = {"flux": True, "qwen": False}


def adapter(folder: Path, family: str, *, kind: str = "gm", k: int = 3, seed: int = 0, **change: Any) -> Path:
    """A folder as LakonLab publishes it, for the tiny networks of width 32."""
    g = torch.Generator().manual_seed(seed)
    folder.mkdir(parents=True, exist_ok=True)
    prefix = "transformer_blocks.0."
    names = (
        {f"{prefix}ff.net.2": (32, 128), "single_transformer_blocks.1.proj_mlp": (128, 32)}
        if family == "flux"
        else {f"{prefix}img_mlp.net.2": (32, 128), f"{prefix}txt_mlp.net.0.proj": (128, 32)}
    )
    names |= {"time_text_embed.timestep_embedder.linear_2": (32, 32)}
    state: dict[str, Tensor] = {}
    for name, low in low_rank(names, seed=seed).items():
        state |= dotted(".lora_A.weight", ".lora_B.weight", "")(name, low)

    def linear(name: str, rows: int, width: int) -> dict[str, Tensor]:
        return {
            f"{name}.weight": torch.randn(rows, width, generator=g) / width**0.5,
            f"{name}.bias": 0.2 * torch.randn(rows, generator=g),
        }

    state |= linear("norm_out.linear", 64, 32)
    if kind == "gm":
        state |= linear("proj_out_means", 64 * k, 32) | linear("proj_out_logweights", 4 * k, 32)
        state |= linear("proj_out_logstds.1", 16, 32) | linear("proj_out_logstds.3", 1, 16)
    else:
        state |= linear("proj_out", 64 * k, 32)
    config = {"type": "GM" if kind == "gm" else "DX", "policy_kwargs": {"shift": 3.2}}
    if kind == "polynomial":
        config["policy_kwargs"] = {"shift": 3.2, "mode": "polynomial", "segment_size": 1.0}
    state |= change
    (folder / "config.json").write_text(json.dumps({"_class_name": "GMFluxTransformer2DModel"}))
    save_file(
        {n: t.contiguous() for n, t in state.items()},
        folder / "diffusion_pytorch_model.safetensors",
        metadata={"policy_config": json.dumps(config)},
    )
    return folder


def model_of(family: str, tmp_path: Path, qwen_repo: Path, **more: Any) -> tuple[Any, dict[str, Any]]:  # noqa: F811
    if family == "qwen":
        return mf.load(qwen_repo, device="cpu", **more), {}
    if not (tmp_path / "model").exists():
        pipeline(tmp_path / "model", guidance=True)
    return mf.load(tmp_path / "model", device="cpu", **more), {"condition": mf.Condition(words(1))}


@pytest.mark.parametrize("family", ["flux", "qwen"])
@pytest.mark.parametrize("kind", ["gm", "grid", "polynomial"])
def test_heads_give_the_policy_of_their_outputs(family: str, kind: str, tmp_path: Path, qwen_repo: Path) -> None:  # noqa: F811
    """Against a transformer by diffusers with the same low-rank changes, whose head is applied by hand."""
    from diffusers import FluxTransformer2DModel, QwenImageTransformer2DModel

    model, more = model_of(family, tmp_path, qwen_repo)
    folder = adapter(tmp_path / "pi", family, kind=kind)
    where = (tmp_path / "model" if family == "flux" else qwen_repo) / "transformer"
    net: Any = (
        (FluxTransformer2DModel if family == "flux" else QwenImageTransformer2DModel).from_pretrained(where).eval()
    )
    state = load_file(folder / "diffusion_pytorch_model.safetensors")
    with torch.no_grad():
        for name in {n.partition(".lora")[0] for n in state if "lora" in n}:
            net.get_submodule(name).weight += state[f"{name}.lora_B.weight"] @ state[f"{name}.lora_A.weight"]
        for leaf in ("weight", "bias"):
            getattr(net.norm_out.linear, leaf).copy_(state[f"norm_out.linear.{leaf}"])
    seen: dict[str, Tensor] = {}
    net.proj_out.register_forward_pre_hook(lambda _, args: seen.update(hidden=args[0]))
    net.time_text_embed.register_forward_hook(lambda *args: seen.update(temb=args[-1]))
    g = torch.Generator().manual_seed(5)
    x = torch.randn(1, 16, 6, 8, generator=g)
    packed = x.view(1, 16, 3, 2, 4, 2).permute(0, 2, 4, 1, 3, 5).reshape(1, 12, 64)
    cond = more["condition"] if more else model.condition(["a cat"])
    ids = torch.zeros(12, 3)
    ids[:, 1], ids[:, 2] = torch.arange(12) // 4, torch.arange(12) % 4
    extra: dict[str, Any] = (
        dict(
            pooled_projections=cond["pooled"] if more else None,
            img_ids=ids,
            txt_ids=torch.zeros(9, 3),
            guidance=torch.tensor([3.5]),
        )
        if more
        else dict(img_shapes=[[(1, 3, 4)]], encoder_hidden_states_mask=cond["mask"].long())
    )
    with torch.no_grad():
        net(hidden_states=packed, encoder_hidden_states=cond["context"], timestep=torch.tensor([0.7]), **extra)
    hidden = seen["hidden"]

    def spread(name: str, channels: int) -> Tensor:
        out = hidden @ state[f"{name}.weight"].T + state[f"{name}.bias"]
        return out.view(1, 3, 4, 3, channels, 2, 2).permute(0, 3, 4, 1, 5, 2, 6).reshape(1, 3, channels, 6, 8)

    with torch.inference_mode():
        policy: Any = model.field(cond, mf.FieldOptions(policy=mf.PiFlow(str(folder)))).policy(x, 0.7)
    if kind == "gm":
        assert isinstance(policy, GM)
        assert relative(policy.means, spread("proj_out_means", 16)) < 1e-4
        assert relative(policy.logweights, spread("proj_out_logweights", 1).log_softmax(1)) < 1e-4
        mlp = torch.nn.functional.silu(seen["temb"]) @ state["proj_out_logstds.1.weight"].T
        mlp = torch.nn.functional.silu(mlp + state["proj_out_logstds.1.bias"]) @ state["proj_out_logstds.3.weight"].T
        assert relative(policy.logstd.view(1, 1), mlp + state["proj_out_logstds.3.bias"]) < 1e-4
    else:
        assert isinstance(policy, DX)
        assert policy.polynomial == (kind == "polynomial")
        assert policy.segment == (1.0 if kind == "polynomial" else pytest.approx(1 / 3.5))
        assert relative(policy.outputs, spread("proj_out", 16)) < 1e-4


@pytest.mark.parametrize("family", ["flux", "qwen"])
@pytest.mark.parametrize("options", [{}, {"offload": "block"}], ids=str)
def test_the_recipe_runs_and_leaves_the_model_alone(
    family: str,
    options: dict[str, Any],
    tmp_path: Path,
    qwen_repo: Path,  # noqa: F811
) -> None:
    model, more = model_of(family, tmp_path, qwen_repo, **options)
    pi = mf.PiFlow(str(adapter(tmp_path / "pi", family)))
    before = {n: t.clone() for n, t in model.transformer.state_dict().items()}
    for sigma, start in ((None, 0.5161), (0.12, 0.12)):
        chain = mf.recipes.piflow(pi, UP, low=(32, 48), size=(64, 96), sigma=sigma)
        planned = mf.plan(chain, model.info)
        assert planned.rows[4].out.sigma == pytest.approx(start, abs=1e-4)  # type: ignore[attr-defined]  # pyright: ignore
        events: list[mf.Event] = []
        result = mf.run(chain, model, "" if more else "a cat", on_event=events.append, **more)
        assert result.nfe == planned.nfe == 5  # one pass each, whatever the model's own guidance
        assert len([e for e in events if isinstance(e, mf.Stepped)]) == 5
        result.save(tmp_path / "out.png")
        again = mf.replay(tmp_path / "out.png", model=model, files=[tmp_path / "pi"]) if not more else None
        assert again is None or torch.equal(again.pixels, result.pixels)
    assert all(torch.equal(before[n], t) for n, t in model.transformer.state_dict().items())


def test_a_policy_follows_by_hand(tmp_path: Path, qwen_repo: Path) -> None:  # noqa: F811
    model, more = model_of("flux", tmp_path, qwen_repo)
    pi = mf.PiFlow(str(adapter(tmp_path / "pi", "flux")))
    levels = mf.FlowMap(3)(1.0, 1, model.info)
    got = mf.run(mf.Sample(32, 32, mf.FlowMap(3), policy=pi), model, seed=2, **more).data
    x = mf.PerItem()([2], (1, 16, 4, 4), scope="Sample/0", draw=0)
    with torch.inference_mode():
        field = model.field(more["condition"], mf.FieldOptions(policy=pi))
        for i, (sigma, to) in enumerate(pairwise(levels)):
            policy = field.policy(x, sigma)
            policy = policy.with_temperature(0.2) if i < 2 else policy
            x = follow(policy, x, sigma, to, shift=3.2)
    torch.testing.assert_close(got, x)
    plain = mf.Sample(32, 32, mf.FlowMap(3), policy=mf.PiFlow(pi.path, temperature=None))
    assert not torch.equal(mf.run(plain, model, seed=2, **more).data, got)
    euler = mf.Sample(32, 32, mf.FlowMap(3), policy=mf.PiFlow(pi.path, temperature=None, substeps=1))
    assert relative(mf.run(euler, model, seed=2, **more).data, got) > 1e-4


def test_policies_and_loras_together(tmp_path: Path, qwen_repo: Path) -> None:  # noqa: F811
    from tests.test_lora import lora

    model, more = model_of("flux", tmp_path, qwen_repo)
    pi, low = mf.PiFlow(str(adapter(tmp_path / "pi", "flux"))), mf.Lora(str(lora(tmp_path)), 0.5)
    merged, _ = model_of("flux", tmp_path, qwen_repo, lora=low)
    beside = mf.run(mf.Sample(32, 32, mf.FlowMap(2), policy=pi, lora=low), model, **more).data
    want = mf.run(mf.Sample(32, 32, mf.FlowMap(2), policy=pi), merged, **more).data
    assert relative(beside, want) < 1e-3


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "missing": ({"proj_out_logstds.1.weight": torch.zeros(16, 31)}, "proj_out_logstds.1.weight has shape"),
    "unknown": ({"proj_out_gamma.weight": torch.zeros(2, 2)}, "proj_out_gamma.weight is not expected"),
    "norm": ({"norm_out.linear.weight": torch.zeros(32, 32)}, r"norm_out.linear.weight has shape \(32, 32\)"),
    "lora": (
        {f"nowhere.lora_{w}.weight": torch.zeros(2, 2) for w in "AB"},
        "1 names that belong nowhere in .*nowhere",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_adapters_that_do_not_fit_are_refused(case: str, tmp_path: Path, qwen_repo: Path) -> None:  # noqa: F811
    change, message = BAD[case]
    model, more = model_of("flux", tmp_path, qwen_repo)
    pi = mf.PiFlow(str(adapter(tmp_path / "pi", "flux", **change)))
    with pytest.raises(WeightsError, match=message):
        mf.run(mf.Sample(32, 32, mf.FlowMap(2), policy=pi), model, **more)


def test_what_a_policy_leaves_no_room_for(tmp_path: Path, qwen_repo: Path) -> None:  # noqa: F811
    pi = mf.PiFlow(str(tmp_path))
    for more, message in (
        ({"solver": mf.Heun()}, "leave out solver=Heun"),
        ({"guidance": mf.CFG(3.0)}, "leave out guidance=CFG"),
        ({"cache": mf.caches.TeaCache(0.2)}, "too seldom for a cache"),
        ({"policy": "pi"}, "policy takes PiFlow"),
    ):
        given: Any = {"policy": pi, **more}
        with pytest.raises(PlanError, match=message):
            mf.plan(mf.Sample(32, 32, mf.FlowMap(2), **given), mf.FLUX)
    with pytest.raises(PlanError, match="pocket takes no pi-Flow adapter"):
        mf.run(mf.Sample(32, 32, mf.FlowMap(2), policy=pi), mf.load("pocket", device="cpu"))
    with pytest.raises(WeightsError, match="should hold one safetensors checkpoint; it holds none"):
        model, cond = model_of("flux", tmp_path / "m", qwen_repo)
        mf.run(mf.Sample(32, 32, mf.FlowMap(2), policy=mf.PiFlow(str(tmp_path))), model, **cond)
    for bad in ({"temperature": 2.0}, {"substeps": 0}):
        with pytest.raises(PlanError):
            mf.PiFlow("x", **bad)  # type: ignore[arg-type]  # pyright: ignore
    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(WeightsError, match="is no pi-Flow adapter"):
        read_head(tmp_path / "x.safetensors", model.transformer, device=torch.device("cpu"))

"""LoRA: every layout means the same change, merged or beside the weights, which are never touched by a stage."""

import json
import re
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import mrflow as mf
from mrflow.errors import PlanError, WeightsError
from mrflow.models.flux.transformer import Flux, FluxParams
from mrflow.models.flux.weights import whole_state
from mrflow.models.layers import SplitLinear
from mrflow.models.lora import AdaptedLinear, Change, changes, key_of, merge, targets
from mrflow.models.qwen.transformer import QwenImage, QwenParams
from tests.lora_files import LAYOUTS, flux_linears, low_rank, write_lora
from tests.parity.test_flux import SMALL, relative
from tests.parity.test_official import words
from tests.parity.test_qwen_image import forward
from tests.test_cli import call
from tests.test_load import draw, loaded, repo, single  # noqa: F401  (fixtures)
from tests.test_qwen import repo as qwen_repo  # noqa: F401

pytestmark = pytest.mark.filterwarnings("ignore")
TINY = FluxParams(64, 64, 24, 12, 32, 2, (4, 6, 6), 4.0, 2, 3, guidance=True)
CHANGES = low_rank(flux_linears(TINY))


def deltas(net: Flux, path: Path, strength: float = 1.0) -> dict[str, Tensor]:
    """What a file adds to each native weight, by merging it into a network of zeros."""
    for p in net.parameters():
        p.data = torch.zeros_like(p)
    merge(net, changes(net, (mf.Lora(str(path), strength),), "flux"))
    return {name: t for name, t in whole_state(net).items() if t.any()}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("apart", [False, True], ids=["fused", "split"])
def test_every_layout_is_the_same_change(layout: str, apart: bool, tmp_path: Path) -> None:
    net = Flux(TINY, split=apart)
    found = deltas(net, write_lora(tmp_path / "x.safetensors", CHANGES, layout=layout))
    assert found.keys() == {f"{name}.weight" for name in CHANGES}
    for name, (down, up) in CHANGES.items():
        assert relative(found[f"{name}.weight"], up @ down) < 1e-6, name


@pytest.mark.parametrize(
    "wrapper", ["lora_unet_transformer_", "lora_pipe_dit_", "lora_unet__orig_mod_", "student.module."]
)
def test_wrappers_before_flattened_names(wrapper: str, tmp_path: Path) -> None:
    state = load_file(write_lora(tmp_path / "x.safetensors", CHANGES, layout="sd-scripts"))
    want = deltas(Flux(TINY), tmp_path / "x.safetensors")
    save_file({name.replace("lora_unet_", wrapper): t for name, t in state.items()}, tmp_path / "y.safetensors")
    found = deltas(Flux(TINY), tmp_path / "y.safetensors")
    assert found.keys() == want.keys() and all(torch.equal(found[name], want[name]) for name in want)


@pytest.mark.parametrize("alpha", [torch.tensor(True), torch.tensor(3 + 1j)], ids=["bool", "complex"])
def test_an_alpha_of_another_kind_is_refused(alpha: Tensor, tmp_path: Path) -> None:
    state = load_file(write_lora(tmp_path / "x.safetensors", CHANGES, layout="sd-scripts"))
    save_file({**state, "lora_unet_img_in.alpha": alpha}, tmp_path / "x.safetensors")
    with pytest.raises(WeightsError, match=r"img_in has alpha of torch\."):
        deltas(Flux(TINY), tmp_path / "x.safetensors")


def test_xlabs_names(tmp_path: Path) -> None:
    d, rank = TINY.hidden, 3
    own: dict[str, tuple[str, int, int, int]] = {
        "double_blocks.0.processor.qkv_lora1": ("double_blocks.0.img_attn.qkv", 3 * d, d, 3 * d),
        "double_blocks.1.processor.proj_lora2": ("double_blocks.1.txt_attn.proj", d, d, d),
        "single_blocks.1.processor.qkv_lora": ("single_blocks.1.linear1", 3 * d, d, 3 * d + TINY.mlp),
        "single_blocks.2.processor.proj_lora": ("single_blocks.2.linear2", d, d + TINY.mlp, d),
    }
    lows = low_rank({name: (o, i) for name, (_, o, i, _) in own.items()}, rank=rank)
    state = {f"{n}.{way}.weight": t for n, low in lows.items() for way, t in zip(("down", "up"), low, strict=True)}
    save_file({k: t.contiguous() for k, t in state.items()}, tmp_path / "x.safetensors")
    found = deltas(Flux(TINY), tmp_path / "x.safetensors")
    assert found.keys() == {f"{native}.weight" for native, *_ in own.values()}
    for name, (native, rows, _, whole) in own.items():
        down, up = lows[name]
        assert len(found[f"{native}.weight"]) == whole
        assert relative(found[f"{native}.weight"][:rows], up @ down) < 1e-6
        assert not found[f"{native}.weight"][rows:].any()


def test_flattened_names_do_not_collide() -> None:
    for net in (Flux(SMALL), QwenImage(QwenParams(64, 64, 32, 32, 2, (4, 6, 6), 4.0, 2))):
        names = [name for name, m in net.named_modules() if isinstance(m, torch.nn.Linear)]
        found = targets(net)
        whole = {t.path for t in found.values()}
        assert whole == set(names)
        for target in found.values():
            assert 0 <= target.start < target.start + target.rows <= net.get_submodule(target.path).weight.shape[0]


@given(st.floats(-2, 2), st.floats(-2, 2), st.integers(1, 5))
def test_strengths_scale_and_add_up(tmp_path_factory: Any, a: float, b: float, rank: int) -> None:
    folder = tmp_path_factory.mktemp("lora")
    sizes = {"single_blocks.0.linear1": (3 * 32 + 128, 32)}
    one, two = low_rank(sizes, rank=rank, seed=1), low_rank(sizes, rank=2, seed=2)
    files = [
        write_lora(folder / "1.safetensors", one, layout="comfyui"),
        write_lora(folder / "2.safetensors", two, layout="sd-scripts"),
    ]
    net = Flux(TINY)
    found = changes(net, (mf.Lora(str(files[0]), a), mf.Lora(str(files[1]), b)), "flux")
    (change,) = found.values()
    want = a * one["single_blocks.0.linear1"][1] @ one["single_blocks.0.linear1"][0]
    want = want + b * two["single_blocks.0.linear1"][1] @ two["single_blocks.0.linear1"][0]
    torch.testing.assert_close(change.matrix(), want, rtol=1e-5, atol=1e-5)


def lora(folder: Path, *, layout: str = "comfyui", seed: int = 0) -> Path:
    return write_lora(folder / f"l{seed}.safetensors", low_rank(flux_linears(TINY), seed=seed), layout=layout)


def weights(model: Any) -> dict[str, tuple[int, Tensor]]:
    return {n: (p.data_ptr(), p.detach().clone()) for n, p in model.transformer.named_parameters()}


@pytest.mark.parametrize("options", [{}, {"offload": "phase"}, {"offload": "block"}, {"fold": False}], ids=str)
def test_beside_the_weights_is_the_same_as_merged(repo: Path, tmp_path: Path, options: dict[str, Any]) -> None:  # noqa: F811
    file = mf.Lora(str(lora(tmp_path)), 0.7)
    model, merged = loaded(repo, **options), loaded(repo, lora=file, **options)
    before = weights(model)
    plain = draw(model)
    chain = mf.Chain((mf.Sample(32, 48, mf.Shifted(3), lora=file), *draw(model).chain.stages[1:5]))
    whole = chain >> mf.Refine(mf.DirectSigma(1), lora=file) >> mf.Decode()
    beside = draw(model, chain=whole)
    both = draw(merged)
    assert relative(beside.pixels, both.pixels) < 1e-4
    assert relative(plain.pixels, both.pixels) > 1e-2
    assert torch.equal(draw(model).pixels, plain.pixels)
    after = weights(model)
    assert all(torch.equal(after[n][1], t) and (options or after[n][0] == at) for n, (at, t) in before.items())
    low = draw(model, chain=chain >> mf.Refine(mf.DirectSigma(1)) >> mf.Decode())
    assert relative(low.pixels, beside.pixels) > 1e-4  # off in Refine


def test_single_files_bfloat16_and_fp8(repo: Path, single: Path, tmp_path: Path) -> None:  # noqa: F811
    file = str(lora(tmp_path, layout="peft"))
    exact = draw(loaded(repo, lora=file)).pixels
    flux = single / "flux1-dev.safetensors"
    torch.testing.assert_close(draw(loaded(flux, lora=file)).pixels, exact, rtol=1e-4, atol=1e-4)
    half = draw(loaded(flux, lora=file, dtype=torch.bfloat16)).pixels
    narrow = draw(loaded(flux, lora=file, storage="fp8")).pixels
    assert 0 < relative(half, exact) < 0.05
    assert 0 < relative(narrow, exact) < 0.1
    beside = mf.Sample(32, 48, mf.Shifted(2), lora=mf.Lora(file)) >> mf.Decode()
    plain = mf.Sample(32, 48, mf.Shifted(2)) >> mf.Decode()
    got = draw(loaded(flux, storage="fp8"), chain=beside).pixels
    assert relative(got, draw(loaded(flux, lora=file), chain=plain).pixels) < 0.1


def test_loading_leaves_what_no_adapter_touches_mapped(repo: Path, tmp_path: Path) -> None:  # noqa: F811
    some = low_rank({"double_blocks.0.img_attn.qkv": (96, 32)})
    model = loaded(repo, lora=str(write_lora(tmp_path / "x.safetensors", some, layout="comfyui")))
    net = model.transformer
    first, other = net.double_blocks[0].img_attn.qkv, net.double_blocks[1].img_attn.qkv  # type: ignore[union-attr]
    assert isinstance(first, SplitLinear)
    base = loaded(repo).transformer.state_dict()
    assert not torch.equal(first.parts[0].weight, base["double_blocks.0.img_attn.qkv.parts.0.weight"])
    assert torch.equal(other.parts[0].weight, base["double_blocks.1.img_attn.qkv.parts.0.weight"])


def test_threads_with_different_adapters_do_not_meet(repo: Path, tmp_path: Path) -> None:  # noqa: F811
    model = loaded(repo)
    files = [None, *(mf.Lora(str(lora(tmp_path, seed=seed))) for seed in range(4))]  # more than are kept
    chains = [mf.Sample(32, 32, mf.Shifted(4), lora=f) >> mf.Decode() for f in files]
    want = [draw(model, chain=c).pixels for c in chains]
    got: dict[int, Tensor] = {}

    def work(i: int) -> None:
        got[i] = draw(model, chain=chains[i]).pixels

    threads = [threading.Thread(target=work, args=(i,)) for i in range(5)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert all(torch.equal(got[i], want[i]) for i in range(5))
    assert not torch.equal(want[1], want[2])


def test_a_cache_goes_with_an_adapter(repo: Path, tmp_path: Path) -> None:  # noqa: F811
    file = mf.Lora(str(lora(tmp_path)))
    model = loaded(repo)
    steps = mf.Shifted(5)
    want = draw(model, chain=mf.Sample(32, 32, steps, lora=file) >> mf.Decode())
    none = mf.caches.TeaCache(0.0)
    same = draw(model, chain=mf.Sample(32, 32, steps, lora=file, cache=none) >> mf.Decode())
    assert torch.equal(same.pixels, want.pixels)
    cached = mf.Sample(32, 32, steps, lora=file, cache=mf.caches.TaylorSeer(2))
    some = draw(model, chain=cached >> mf.Decode())
    assert some.stages[0].nfe < want.stages[0].nfe
    wide = mf.Sample(32, 32, steps, lora=file)
    assert torch.equal(draw(mf.caches.TaylorSeer(2)(model), chain=wide >> mf.Decode()).pixels, some.pixels)


def test_records_name_the_file_and_stages_are_kept_apart(tmp_path: Path) -> None:
    model = mf.load("pocket", device="cpu")
    files = [small_pocket(tmp_path, seed) for seed in (1, 2)]
    stage_cache = mf.StageCache()
    made = []
    for file in files:
        chain = mf.Sample(64, 64, mf.Shifted(2), lora=mf.Lora(str(file))) >> mf.Decode()
        made.append(mf.run(chain, model, "a big red circle", cache=stage_cache))
    assert not torch.equal(made[0].pixels, made[1].pixels)
    assert stage_cache.hits == 0
    made[0].save(tmp_path / "out.png")
    text = str(mf.read_record(tmp_path / "out.png"))
    assert str(tmp_path) not in text
    assert files[0].name in text
    away = tmp_path / "away"
    away.mkdir()
    files[0].rename(away / files[0].name)
    with pytest.raises(WeightsError, match="is not here.*say where it is"):
        mf.replay(tmp_path / "out.png", model=model)
    again = mf.replay(tmp_path / "out.png", model=model, files=[away])
    torch.testing.assert_close(again.pixels, made[0].pixels)
    files[1].rename(files[0])
    with pytest.raises(WeightsError, match="another file"):
        mf.replay(tmp_path / "out.png", model=model, files=[tmp_path])


def small_pocket(folder: Path, seed: int) -> Path:
    sizes = {"double_blocks.1.img_mlp.0": (768, 192), "final_layer.adaLN_modulation.1": (384, 192)}
    return write_lora(folder / f"p{seed}.safetensors", low_rank(sizes, seed=seed), layout="comfyui", hidden=192)


def test_pocket_merged_and_beside(tmp_path: Path) -> None:
    file = small_pocket(tmp_path, 1)
    merged, model = (
        mf.load("pocket", device="cpu", lora=[file, mf.Lora(str(file), 0.5)]),
        mf.load("pocket", device="cpu"),
    )
    chain = mf.Sample(64, 64, mf.Shifted(2)) >> mf.Decode()
    twice = mf.Sample(64, 64, mf.Shifted(2), lora=(mf.Lora(str(file)), mf.Lora(str(file), 0.5))) >> mf.Decode()
    got = mf.run(twice, model, "a big red circle").pixels
    assert relative(mf.run(chain, merged, "a big red circle").pixels, got) < 1e-4
    assert merged.info.version.startswith(model.info.version)
    assert merged.info.version != model.info.version


def test_a_plan_costs_adapters_and_needs_no_file(tmp_path: Path) -> None:
    some = mf.Sample(512, 512, mf.Shifted(8), lora=mf.Lora("nowhere.safetensors")) >> mf.Decode()
    plain = mf.Sample(512, 512, mf.Shifted(8)) >> mf.Decode()
    assert mf.plan(some, mf.FLUX).work == mf.plan(plain, mf.FLUX).work
    file = small_pocket(tmp_path, 1)
    chain = mf.Sample(128, 128, mf.Shifted(2), lora=mf.Lora(str(file))) >> mf.Decode()
    model = mf.load("pocket").info
    extra = (
        mf.plan(chain, model).work.flops - mf.plan(mf.Sample(128, 128, mf.Shifted(2)) >> mf.Decode(), model).work.flops
    )
    assert model.architecture is not None
    tokens = 64 + model.architecture.text_tokens
    assert extra == 2 * 2 * 2 * (3 * (768 + 192) + 3 * (384 + 192)) * tokens


BAD: dict[str, tuple[dict[str, Tensor], str]] = {
    "unknown": (
        {f"diffusion_model.{n}.lora_{w}.weight": torch.zeros(2, 2) for n in ("a.b", "c") for w in ("A", "B")},
        "2 names that belong nowhere.*diffusion_model.a.b, diffusion_model.c",
    ),
    "half": ({"img_in.lora_A.weight": torch.zeros(2, 64)}, "img_in has only the down matrix"),
    "other half": ({"img_in.lora_up.weight": torch.zeros(32, 2)}, "img_in has only the up matrix"),
    "shape": (
        {"img_in.lora_A.weight": torch.zeros(2, 63), "img_in.lora_B.weight": torch.zeros(32, 2)},
        r"img_in: down has shape \(2, 63\), expected \(2, 64\)",
    ),
    "alone": ({"img_in.alpha": torch.ones(())}, "img_in has an alpha and nothing else"),
    "dora": (
        {"img_in.lora_A.weight": torch.zeros(2, 64), "img_in.dora_scale": torch.zeros(2)},
        "is DoRA.*img_in.dora_scale",
    ),
    "loha": ({"lora_unet_img_in.hada_w1_a": torch.zeros(2, 64)}, "is LoHa"),
    "lokr": ({"lora_unet_img_in.lokr_w1": torch.zeros(2, 64)}, "is LoKr"),
    "lokr, tucker": ({"lora_unet_img_in.lokr_t2": torch.zeros(2, 64)}, "is LoKr"),
    "loha, second": ({"lora_unet_img_in.hada_w2_b": torch.zeros(2, 64)}, "is LoHa"),
    "ia3": ({"base_model.model.img_in.ia3_l": torch.zeros(64)}, "is IA3"),
    "text": (
        {f"text_encoder.text_model.q_proj.lora_{w}.weight": torch.zeros(2, 2) for w in "AB"},
        "1 names for text encoders, which are not adapted: text_encoder.text_model.q_proj.*skip_text=True",
    ),
    "nothing": ({"img_in.weight": torch.zeros(2, 2)}, "holds no LoRA; its names begin with img_in.weight"),
    "whole numbers": (
        {"img_in.lora_A.weight": torch.zeros(2, 64, dtype=torch.int64), "img_in.lora_B.weight": torch.zeros(32, 2)},
        "img_in has down of torch.int64",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_files_that_do_not_fit_are_refused_by_name(case: str, repo: Path, tmp_path: Path) -> None:  # noqa: F811
    state, message = BAD[case]
    save_file(state, tmp_path / "x.safetensors")
    with pytest.raises(WeightsError, match=message):
        loaded(repo, lora=tmp_path / "x.safetensors")
    chain = mf.Sample(32, 32, mf.Shifted(2), lora=mf.Lora(str(tmp_path / "x.safetensors"))) >> mf.Decode()
    with pytest.raises(WeightsError, match=message):
        draw(loaded(repo), chain=chain)


def test_text_encoders_are_left_out_when_asked(repo: Path, tmp_path: Path) -> None:  # noqa: F811
    state = load_file(lora(tmp_path, layout="sd-scripts"))
    state |= {f"lora_te1_text_model_q_proj.lora_{w}.weight": torch.zeros(2, 2) for w in ("down", "up")}
    save_file(state, tmp_path / "x.safetensors")
    got = loaded(repo, lora=mf.Lora(str(tmp_path / "x.safetensors"), skip_text=True))
    want = loaded(repo, lora=lora(tmp_path, layout="sd-scripts"))
    assert torch.equal(draw(got).pixels, draw(want).pixels)


def test_whole_matrices_and_biases(repo: Path, tmp_path: Path) -> None:  # noqa: F811
    g = torch.Generator().manual_seed(0)
    state = {
        "diffusion_model.img_in.diff": 0.1 * torch.randn(32, 64, generator=g),
        "diffusion_model.img_in.diff_b": torch.randn(32, generator=g),
        "diffusion_model.txt_in.lora_A.weight": torch.randn(2, 24, generator=g),
        "diffusion_model.txt_in.lora_B.weight": 0.1 * torch.randn(32, 2, generator=g),
        "diffusion_model.txt_in.lora_B.bias": torch.randn(32, generator=g),
    }
    save_file(state, tmp_path / "x.safetensors")
    net, base = (
        loaded(repo, **more).transformer for more in ({"lora": mf.Lora(str(tmp_path / "x.safetensors"), 0.5)}, {})
    )
    torch.testing.assert_close(
        net.img_in.weight, base.img_in.weight + 0.5 * state["diffusion_model.img_in.diff"], rtol=1e-6, atol=1e-6
    )
    torch.testing.assert_close(net.img_in.bias, base.img_in.bias + 0.5 * state["diffusion_model.img_in.diff_b"])
    torch.testing.assert_close(net.txt_in.bias, base.txt_in.bias + 0.5 * state["diffusion_model.txt_in.lora_B.bias"])
    chain = mf.Sample(32, 32, mf.Shifted(2)) >> mf.Decode()
    on = mf.Sample(32, 32, mf.Shifted(2), lora=mf.Lora(str(tmp_path / "x.safetensors"), 0.5)) >> mf.Decode()
    merged = draw(loaded(repo, lora=mf.Lora(str(tmp_path / "x.safetensors"), 0.5)), chain=chain)
    assert relative(draw(loaded(repo), chain=on).pixels, merged.pixels) < 1e-4


DOWN, UP = torch.linspace(-1, 1, 4 * 32).view(4, 32), torch.linspace(1, -2, 32 * 4).view(32, 4)
BIAS, WHOLE = torch.linspace(-3, 1, 32), torch.linspace(-1, 3, 32 * 32).view(32, 32)
STEM = "diffusion_model.double_blocks.0.img_attn.proj"


def change_of(folder: Path, state: dict[str, Tensor], *, strength: float = 1.0, metadata: Any = None) -> Any:
    """What a file changes in a transformer of zeros, by the paths of the linears: (weight, bias)."""
    save_file({k: v.clone().contiguous() for k, v in state.items()}, folder / "x.safetensors", metadata=metadata)
    net = Flux(TINY)
    found = changes(net, (mf.Lora(str(folder / "x.safetensors"), strength),), "flux")
    return {path: (change.matrix(), change.bias) for path, change in found.items()}


@pytest.mark.parametrize("names", [("lora_down", "lora_up"), ("lora_A", "lora_B"), ("lora.down", "lora.up")])
def test_alpha_scales_the_pair_and_its_own_bias_and_no_whole_change(names: tuple[str, str], tmp_path: Path) -> None:
    down, up = names
    alpha = {f"{STEM}.alpha": torch.tensor(1.0)}
    pair = {f"{STEM}.{down}.weight": DOWN, f"{STEM}.{up}.weight": UP} | alpha
    ((weight, bias),) = change_of(tmp_path, pair | {f"{STEM}.diff_b": BIAS}, strength=0.5).values()
    torch.testing.assert_close(weight, 0.5 / 4 * UP @ DOWN)
    torch.testing.assert_close(bias, 0.5 * BIAS)
    ((_, bias),) = change_of(tmp_path, pair | {f"{STEM}.{up}.bias": BIAS}, strength=0.5).values()
    torch.testing.assert_close(bias, 0.5 / 4 * BIAS)
    whole = {f"{STEM}.diff": WHOLE, f"{STEM}.diff_b": BIAS, f"{STEM}.alpha": torch.tensor(8.0)}
    ((weight, bias),) = change_of(tmp_path, whole, strength=0.5).values()
    torch.testing.assert_close(weight, 0.5 * WHOLE)
    torch.testing.assert_close(bias, 0.5 * BIAS)
    all_of_it = pair | whole | {f"{STEM}.alpha": torch.tensor(2.0), f"{STEM}.{up}.bias": BIAS}
    ((weight, bias),) = change_of(tmp_path, all_of_it).values()
    torch.testing.assert_close(weight, 0.5 * UP @ DOWN + WHOLE)
    torch.testing.assert_close(bias, 0.5 * BIAS + BIAS)


PEFT_STEM = "transformer.transformer_blocks.0.attn.to_out.0"
TWICE: dict[str, tuple[dict[str, Tensor], str]] = {
    "two names": (
        {f"{PEFT_STEM}.lora_{w}.{n}.weight": t for n in ("style", "face") for w, t in (("A", DOWN), ("B", UP))},
        "holds 2 adapters: face, style; save each in a file of its own",
    ),
    "a name and none": (
        {f"{PEFT_STEM}.lora_{w}{n}.weight": t for n in ("", ".style") for w, t in (("A", DOWN), ("B", UP))},
        r"holds 2 adapters: \(no name\), style",
    ),
    "on different linears": (
        {
            f"{stem}.lora_{w}.{n}.weight": t
            for stem, n in ((PEFT_STEM, "style"), ("transformer.transformer_blocks.1.attn.to_out.0", "face"))
            for w, t in (("A", DOWN), ("B", UP))
        },
        "holds 2 adapters: face, style",
    ),
    "two words for one role": (
        {f"{STEM}.{w}.weight": DOWN if w[-1] in "nA" else UP for w in ("lora_A", "lora_B", "lora_down", "lora_up")},
        "down of .* is there twice, up of .* is there twice",
    ),
    "two names for one linear": (
        {f"{stem}.lora_{w}.weight": t for stem in (STEM, PEFT_STEM) for w, t in (("A", DOWN), ("B", UP))},
        "are the same weights",
    ),
    "a fused linear and a part": (
        {f"{PEFT_STEM[:-8]}to_q.lora_{w}.weight": t for w, t in (("A", DOWN), ("B", UP))}
        | {f"{STEM[:-4]}qkv.lora_{w}.weight": t for w, t in (("A", DOWN), ("B", torch.cat((UP, UP, UP))))},
        "are the same weights",
    ),
}


@pytest.mark.parametrize("case", TWICE)
def test_no_adapter_hides_another(case: str, tmp_path: Path) -> None:
    state, message = TWICE[case]
    with pytest.raises(WeightsError, match=message):
        change_of(tmp_path, state)


UNSOUND: dict[str, tuple[dict[str, Tensor], str]] = {
    "rank 0": ({"lora_down.weight": DOWN[:0], "lora_up.weight": UP[:, :0]}, "matrices of rank 0"),
    "rank 0 with alpha": (
        {"lora_down.weight": DOWN[:0], "lora_up.weight": UP[:, :0], "alpha": torch.tensor(1.0)},
        "matrices of rank 0",
    ),
    "two ranks": ({"lora_A.weight": DOWN, "lora_B.weight": UP[:, :3]}, "matrices of ranks 4 and 3"),
    "empty alpha": ({"lora_down.weight": DOWN, "lora_up.weight": UP, "alpha": torch.empty(0)}, r"shape \(0,\)"),
    "alpha of two": ({"lora_down.weight": DOWN, "lora_up.weight": UP, "alpha": torch.ones(2)}, r"shape \(2,\)"),
    "scalar": ({"lora_down.weight": torch.tensor(1.0), "lora_up.weight": UP}, r"down of shape \(\), expected 2"),
    "vector": ({"lora_down.weight": torch.ones(32), "lora_up.weight": UP}, r"down of shape \(32,\), expected 2"),
    "scalar whole change": ({"diff": torch.tensor(1.0)}, r"diff of shape \(\), expected 2"),
    "scalar bias": ({"diff": WHOLE, "diff_b": torch.tensor(1.0)}, r"diff_b of shape \(\), expected 1"),
    "bias alone": ({"lora_B.bias": BIAS}, "low-rank matrices that are not there"),
    "NaN alpha": (
        {"lora_down.weight": DOWN, "lora_up.weight": UP, "alpha": torch.tensor(float("nan"))},
        "has the alpha nan",
    ),
}


@pytest.mark.parametrize("case", UNSOUND)
def test_what_makes_no_change_is_refused_and_inspect_says_the_same(case: str, tmp_path: Path) -> None:
    state, message = UNSOUND[case]
    with pytest.raises(WeightsError, match=f"no sound LoRA: {STEM} .*{message}"):
        change_of(tmp_path, {f"{STEM}.{k}": v for k, v in state.items()})
    code, out, _ = call("inspect", str(tmp_path / "x.safetensors"))
    assert code == 0
    assert re.search(message, " ".join(out.split()))


@pytest.mark.parametrize("role", ["lora_A.weight", "lora_B.weight", "lora_B.bias", "diff", "diff_b"])
def test_values_that_are_not_finite_are_refused_by_name(role: str, tmp_path: Path) -> None:
    state = {"lora_A.weight": DOWN, "lora_B.weight": UP, "lora_B.bias": BIAS, "diff": WHOLE, "diff_b": BIAS}
    state[role] = torch.full_like(state[role], float("nan" if role != "diff" else "inf"))
    with pytest.raises(WeightsError, match=rf"x.safetensors: \w+ of {STEM} holds NaN or infinity"):
        change_of(tmp_path, {f"{STEM}.{k}": v for k, v in state.items()})


PATTERNS: dict[str, dict[str, Any]] = {
    "none": {},
    "by ending": {"alpha_pattern": {"to_q": 2}},
    "by path": {"alpha_pattern": {"transformer_blocks.0.attn.to_q": 2, "transformer_blocks.1.attn.to_q": 3}},
    "expression": {"alpha_pattern": {r"transformer_blocks\.\d+\.attn\.to_(q|k)": 2}},
    "first wins": {"alpha_pattern": {r".*\.0\.attn\.to_[qk]": 2, "to_q": 5, "to_k": 7}},
    "anchored": {"alpha_pattern": {"^transformer_blocks.0.attn.to_q": 2, "^to_k": 9}},
    "whole names": {"alpha_pattern": {"o_q": 9, "attn": 11}},
    "ranks": {"rank_pattern": {"attn.to_q": 2, r"to_.*": 4}, "alpha_pattern": {"to_q": 3}},
    "ranks, rslora": {"rank_pattern": {"attn.to_q": 2}, "use_rslora": True},
}


@pytest.mark.parametrize("case", PATTERNS)
@pytest.mark.parametrize("beside", [False, True], ids=["metadata", "adapter_config.json"])
def test_patterns_match_as_in_peft(case: str, beside: bool, tmp_path: Path) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    settings = {"r": 4, "lora_alpha": 6.0, "target_modules": ["to_q", "to_k"]} | PATTERNS[case]
    modules = torch.nn.ModuleDict
    blocks = modules(
        {str(i): modules({"attn": modules({n: torch.nn.Linear(32, 32) for n in ("to_q", "to_k")})}) for i in (0, 1)}
    )
    theirs: Any = inject_adapter_in_model(LoraConfig(**settings), modules({"transformer_blocks": blocks}))
    state: dict[str, Tensor] = {}
    want: dict[int, list[Tensor]] = {0: [], 1: []}
    for i in (0, 1):
        for n in ("to_q", "to_k"):
            module = theirs["transformer_blocks"][str(i)]["attn"][n]
            rank = module.r["default"]
            state |= {
                f"transformer_blocks.{i}.attn.{n}.lora_A.weight": DOWN[:rank],
                f"transformer_blocks.{i}.attn.{n}.lora_B.weight": UP[:, :rank],
            }
            want[i].append(module.scaling["default"] * UP[:, :rank] @ DOWN[:rank])
    if beside:
        file = tmp_path / "adapter_model.safetensors"
        save_file({f"base_model.model.{k}": v.clone().contiguous() for k, v in state.items()}, file)
        (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    else:
        file = tmp_path / "x.safetensors"
        table = {f"transformer.{key}": value for key, value in settings.items()}
        named = {f"transformer.{k}": v.clone().contiguous() for k, v in state.items()}
        save_file(named, file, metadata={"lora_adapter_metadata": json.dumps(table)})
    net = Flux(TINY)
    found = changes(net, (mf.Lora(str(file)),), "flux")
    for i in (0, 1):
        q, k, _ = found[f"double_blocks.{i}.img_attn.qkv"].matrix().split(32)
        torch.testing.assert_close([q, k], want[i])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank_pattern": {"to_q": 8}}, "gives transformer_blocks.0.attn.to_q rank 8, but its matrices have 4"),
        ({"r": 8}, "rank 8, but its matrices have 4"),
        ({"alpha_pattern": {"to_q": "much"}}, "gives lora_alpha 'much', which is no number"),
        ({"lora_alpha": float("nan")}, "NaN is no number"),
        ({"alpha_pattern": {"to_(q": 1}}, "no regular expression"),
        ({"alpha_pattern": {"(.+)+z": 1}}, "too involved"),
        ({"rank_pattern": {".*.*.*.*.*z": 1}}, "too involved"),
        ({"rank_pattern": ["to_q"]}, "its rank_pattern must be a table"),
        ({"alpha_pattern": {"to_k": 10**400}}, "beyond any that a setting has"),
        ({"lora_alpha": 10**400}, "beyond any that a setting has"),
        ({"use_rslora": "false"}, "use_rslora must be true or false, got 'false'"),
        ({"use_dora": True}, "is DoRA; mrflow reads LoRA"),
        ({"peft_type": "LOHA"}, "is LOHA; mrflow reads LoRA"),
        ({"init_lora_weights": "pissa_niter_16"}, "beside a changed copy of the model"),
        ({"init_lora_weights": "olora"}, "beside a changed copy of the model"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    state = {f"transformer.transformer_blocks.0.attn.to_q.lora_{w}.weight": t for w, t in (("A", DOWN), ("B", UP))}
    table = {f"transformer.{key}": value for key, value in ({"r": 4, "lora_alpha": 4} | settings).items()}
    with pytest.raises(WeightsError, match=message):
        change_of(tmp_path, state, metadata={"lora_adapter_metadata": json.dumps(table)})
    code, out, _ = call("inspect", str(tmp_path / "x.safetensors"))
    assert code == 0 and (re.search(message, " ".join(out.split())) or "its matrices have" in message)


@pytest.mark.parametrize("settings", [{"peft_type": "LORA", "init_lora_weights": "gaussian"}, {"alpha_pattern": None}])
def test_settings_of_training_alone_change_nothing(settings: dict[str, Any], tmp_path: Path) -> None:
    state = {f"transformer.transformer_blocks.0.attn.to_q.lora_{w}.weight": t for w, t in (("A", DOWN), ("B", UP))}
    table = {f"transformer.{key}": value for key, value in ({"r": 4, "lora_alpha": 4} | settings).items()}
    change_of(tmp_path, state, metadata={"lora_adapter_metadata": json.dumps(table)})


@pytest.mark.parametrize(
    "state",
    [
        {"lora_down.weight": DOWN, "lora_up.weight": UP, "alpha": torch.tensor(3e38)},
        {"lora_down.weight": 1e30 * DOWN, "lora_up.weight": 1e30 * UP},
    ],
)
def test_a_change_that_no_weight_holds_is_refused_by_name(state: dict[str, Tensor], tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=f"{STEM} are beyond float32"):
        change_of(tmp_path, {f"{STEM}.{k}": v for k, v in state.items()})


@pytest.mark.parametrize("merged", [True, False])
def test_a_change_that_float16_does_not_hold_is_refused(merged: bool) -> None:
    net = nn.Sequential(nn.Linear(32, 32)).half()
    change = Change(DOWN, 1e6 * UP)
    with pytest.raises(WeightsError, match=r"reach \d.*, beyond float16; take bfloat16"):
        if merged:
            merge(net, {"0": change})
        else:
            AdaptedLinear(net[0], change, dtype=torch.float16, device="cpu")


@pytest.mark.parametrize("strength", [float("nan"), float("inf"), "1", True, 101])
def test_strengths_are_numbers(strength: Any) -> None:
    with pytest.raises(PlanError, match="strength must be a number from -100 to 100"):
        mf.Lora("x.safetensors", strength)


def test_what_is_no_adapter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=re.escape('lora takes Lora("file.safetensors", strength)')):
        mf.Sample(64, 64, lora="x.safetensors")  # type: ignore[arg-type]  # pyright: ignore
    with pytest.raises(PlanError, match="lora takes a path"):
        mf.load("pocket", lora=3)  # type: ignore[arg-type]  # pyright: ignore
    with pytest.raises(WeightsError, match=r"there is no file .*gone.safetensors"):
        mf.load("pocket", lora=tmp_path / "gone.safetensors")
    with pytest.raises(PlanError, match=r"toy takes no LoRA"):
        mf.run(mf.Sample(64, 64, lora=mf.Lora("x.safetensors")) >> mf.Decode(), mf.toy())


def test_the_same_contents_are_the_same_adapter(tmp_path: Path) -> None:
    file = small_pocket(tmp_path, 1)
    other = tmp_path / "copy.safetensors"
    other.write_bytes(file.read_bytes())
    assert key_of([mf.Lora(str(file), 0.5)]) == key_of([mf.Lora(str(other), 0.5)])


QWEN_LINEARS = {
    "transformer_blocks.0.attn.to_q": (32, 32),
    "transformer_blocks.1.attn.to_out.0": (32, 32),
    "transformer_blocks.0.attn.add_v_proj": (32, 32),
    "transformer_blocks.1.attn.to_add_out": (32, 32),
    "transformer_blocks.0.img_mlp.net.0.proj": (128, 32),
    "transformer_blocks.1.txt_mlp.net.2": (32, 128),
}
QWEN_MORE = {"transformer_blocks.0.img_mod.1": (192, 32), "norm_out.linear": (64, 32), "proj_out": (64, 32)}
QWEN_WAYS = {
    "lightning": ("", ".lora_down.weight", ".lora_up.weight"),
    "peft": ("transformer.", ".lora_A.weight", ".lora_B.weight"),
    "peft with names": ("transformer.", ".lora_A.default.weight", ".lora_B.default.weight"),
    "comfyui": ("diffusion_model.", ".lora_A.weight", ".lora_B.weight"),
    "sd-scripts": ("lora_unet_", ".lora_down.weight", ".lora_up.weight"),
}


def qwen_lora(path: Path, way: str, sizes: dict[str, tuple[int, int]]) -> Path:
    prefix, down, up = QWEN_WAYS[way]
    state: dict[str, Tensor] = {}
    for name, low in low_rank(sizes, rank=4).items():
        stem = prefix + (name.replace(".", "_") if way == "sd-scripts" else name)
        state |= {f"{stem}{down}": low[0], f"{stem}{up}": low[1]}
        if way in ("lightning", "sd-scripts"):
            state |= {f"{stem}.alpha": torch.tensor(4.0)}
    save_file({k: t.contiguous() for k, t in state.items()}, path)
    return path


@pytest.mark.parametrize("way", QWEN_WAYS)
def test_qwen_layouts_merged_and_beside(way: str, qwen_repo: Path, tmp_path: Path) -> None:  # noqa: F811
    file = qwen_lora(tmp_path / "x.safetensors", way, QWEN_LINEARS | QWEN_MORE)
    chain = mf.Sample(48, 64, mf.Shifted(2)) >> mf.Decode()
    on = mf.Sample(48, 64, mf.Shifted(2), lora=mf.Lora(str(file))) >> mf.Decode()
    model = mf.load(qwen_repo, device="cpu")
    merged = mf.run(chain, mf.load(qwen_repo, device="cpu", lora=file), "a cat").pixels
    same = qwen_lora(tmp_path / "y.safetensors", "comfyui", QWEN_LINEARS | QWEN_MORE)
    assert torch.equal(merged, mf.run(chain, mf.load(qwen_repo, device="cpu", lora=same), "a cat").pixels)
    assert relative(mf.run(on, model, ["a cat"] * 2, seed=[0, 1]).pixels[:1], merged) < 1e-4
    assert relative(mf.run(chain, model, "a cat").pixels, merged) > 1e-3


def test_folded_qwen_takes_adapters_that_leave_modulations_alone(qwen_repo: Path, tmp_path: Path) -> None:  # noqa: F811
    chain = mf.Sample(48, 64, mf.Shifted(2)) >> mf.Decode()
    some = qwen_lora(tmp_path / "some.safetensors", "lightning", QWEN_LINEARS)
    more = qwen_lora(tmp_path / "more.safetensors", "lightning", QWEN_LINEARS | QWEN_MORE)
    want = mf.run(chain, mf.load(qwen_repo, device="cpu", lora=some), "a cat").pixels
    torch.testing.assert_close(
        mf.run(chain, mf.load(qwen_repo, device="cpu", fold=chain, lora=some), "a cat").pixels, want
    )
    on = mf.Sample(48, 64, mf.Shifted(2), lora=mf.Lora(str(some))) >> mf.Decode()
    folded = mf.load(qwen_repo, device="cpu", fold=chain)
    assert relative(mf.run(on, folded, "a cat").pixels, want) < 1e-4
    with pytest.raises(PlanError, match="changes modulations"):
        mf.load(qwen_repo, device="cpu", fold=chain, lora=more)
    with pytest.raises(PlanError, match="changes modulations"):
        mf.run(mf.Sample(48, 64, mf.Shifted(2), lora=mf.Lora(str(more))) >> mf.Decode(), folded, "a cat")


@pytest.mark.parity
@pytest.mark.parametrize("layout", ["peft", "peft with alpha"])
def test_diffusers_agrees_on_flux(layout: str, repo: Path, tmp_path: Path) -> None:  # noqa: F811
    from diffusers import FluxPipeline

    blocks = {n: s for n, s in flux_linears(TINY).items() if not n.startswith("guidance_in")}
    file = write_lora(tmp_path / "x.safetensors", low_rank(blocks), layout=layout)
    pipe = FluxPipeline.from_pretrained(repo, text_encoder=None, text_encoder_2=None, tokenizer=None, tokenizer_2=None)
    pipe.load_lora_weights(str(tmp_path), weight_name=file.name)
    pipe.set_adapters(pipe.get_list_adapters()["transformer"], 0.6)
    w = words(1)
    g = torch.Generator().manual_seed(0)
    want = pipe(
        prompt_embeds=w["context"], pooled_prompt_embeds=w["pooled"], height=32, width=48, num_inference_steps=3,
        guidance_scale=3.5, generator=g, output_type="pt",
    ).images  # fmt: skip
    chain = mf.Sample(32, 48, mf.Shifted(3), noise=mf.Stream(0), lora=mf.Lora(str(file), 0.6)) >> mf.Decode()
    assert relative(draw(loaded(repo), chain=chain).pixels, want) < 1e-4


@pytest.mark.parity
@pytest.mark.parametrize("way", ["lightning", "peft", "comfyui", "sd-scripts"])
def test_diffusers_agrees_on_qwen(way: str, qwen_repo: Path, tmp_path: Path) -> None:  # noqa: F811
    from diffusers import QwenImageTransformer2DModel
    from diffusers.loaders import QwenImageLoraLoaderMixin

    file = qwen_lora(tmp_path / "x.safetensors", way, QWEN_LINEARS)
    net = QwenImageTransformer2DModel.from_pretrained(qwen_repo / "transformer").eval()
    state = QwenImageLoraLoaderMixin.lora_state_dict(str(tmp_path), weight_name=file.name)
    QwenImageLoraLoaderMixin.load_lora_into_transformer(state, net, adapter_name="x")
    x, context = torch.randn(1, 12, 64), torch.randn(1, 5, 32)
    with torch.no_grad():
        want = net(
            hidden_states=x, encoder_hidden_states=context, timestep=torch.tensor([0.5]), img_shapes=[[(1, 3, 4)]],
            encoder_hidden_states_mask=torch.ones(1, 5, dtype=torch.long), return_dict=False,
        )[0]  # fmt: skip
        ours = mf.load(qwen_repo, device="cpu", lora=file).transformer  # type: ignore[attr-defined]  # pyright: ignore
        got = forward(ours, x, (3, 4), context, torch.tensor([0.5]))
    assert relative(got, want) < 1e-4


def test_the_command_line_merges_and_replays(tmp_path: Path) -> None:
    file = small_pocket(tmp_path, 1)
    small = ("--size", "64x64", "--steps", "2", "--recipe", "native", "--device", "cpu")
    out = tmp_path / "out.png"
    code, _, err = call("generate", "a big red circle", *small, "--lora", f"{file}:0.5", "--out", str(out))
    assert code == 0, err
    chain = mf.recipes.native(size=(64, 64), steps=2)
    model = mf.load("pocket", device="cpu", lora=mf.Lora(str(file), 0.5))
    assert mf.read_record(out)["weights"] == model.info.version
    mf.run(chain, model, "a big red circle").save(tmp_path / "want.png")
    assert torch.equal(mf.read_image(out), mf.read_image(tmp_path / "want.png"))
    code, _, err = call("replay", str(out), "--out", str(tmp_path / "again.png"))
    assert code == 2
    assert "the model given is pocket" in err.replace("\n", " ")
    code, _, err = call("replay", str(out), "--lora", f"{file}:0.5", "--out", str(tmp_path / "again.png"))
    assert code == 0, err
    assert torch.equal(mf.read_image(tmp_path / "again.png"), mf.read_image(out))
    code, _, err = call("generate", "a big red circle", *small, "--lora", "gone.safetensors")
    assert code == 3
    assert "there is no file gone.safetensors" in err


def test_inspect_tells_what_an_adapter_is(tmp_path: Path) -> None:
    code, out, _ = call("inspect", str(lora(tmp_path, layout="sd-scripts")))
    assert code == 0
    assert "LoRA for 16 layers, rank 3, heads 0" in out
    save_file(
        {"img_in.lora_A.weight": torch.zeros(2, 64), "img_in.dora_scale": torch.zeros(2)}, tmp_path / "d.safetensors"
    )
    code, out, _ = call("inspect", str(tmp_path / "d.safetensors"))
    assert "is DoRA" in out

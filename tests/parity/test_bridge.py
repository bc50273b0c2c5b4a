"""Bridged pipelines against the pipelines' own calls, our own transformers, and the published procedures."""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import mrflow as mf
from mrflow.bridge import Bridged, Control, from_diffusers, preset
from mrflow.cost import forward_flops
from tests import tiny_bridge
from tests.parity.reenact import generators, official_qwen
from tests.parity.reenact import official as official_flux
from tests.parity.reenact_bridge import official_klein, official_z_image
from tests.parity.test_flux import relative
from tests.tiny import write_flux_repo, write_qwen_repo

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]
UP = mf.Lanczos(2)
PROMPTS = ["a cat", "a much longer tale of two towns"]
SIZE = (48, 80)


def flux(folder: Path, *, guidance: bool) -> Any:
    """The FluxPipeline of a tiny repository."""
    from diffusers import FluxPipeline

    return FluxPipeline.from_pretrained(write_flux_repo(folder / "r", guidance=guidance))


def qwen(folder: Path) -> Any:
    """The QwenImagePipeline of a tiny repository."""
    from diffusers import QwenImagePipeline

    return QwenImagePipeline.from_pretrained(write_qwen_repo(folder / "r"))


MAKERS: dict[str, Callable[[Path], Any]] = {
    "dev": lambda folder: flux(folder, guidance=True),
    "schnell": lambda folder: flux(folder, guidance=False),
    "qwen": qwen,
    "sd3": tiny_bridge.sd3,
    "sd3 without T5": lambda folder: tiny_bridge.sd3(folder, t5=False),
    "klein base": tiny_bridge.klein,
    "klein": lambda folder: tiny_bridge.klein(folder, distilled=True),
    "flux2 dev": tiny_bridge.flux2_dev,
    "krea2": tiny_bridge.krea2,
    "krea2 turbo": lambda folder: tiny_bridge.krea2(folder, distilled=True),
    "z-image": tiny_bridge.z_image,
}
CALLS: dict[str, dict[str, Any]] = {
    "dev": {"guidance_scale": 3.5},
    "schnell": {"max_sequence_length": 256},
    "qwen": {"negative_prompt": [" ", " "], "true_cfg_scale": 4.0},
    "sd3": {"guidance_scale": 7.0},
    "sd3 without T5": {"guidance_scale": 7.0},
    "klein base": {"guidance_scale": 4.0},
    "klein": {"guidance_scale": 1.0},
    "flux2 dev": {"guidance_scale": 4.0},
    "krea2": {"guidance_scale": 4.5},
    "krea2 turbo": {"guidance_scale": 0.0},
    "z-image": {"guidance_scale": 0.0},
}
FAMILIES = list(MAKERS)


@pytest.fixture(scope="module")
def pipes(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """Each tiny pipeline, made once; tests leave it as it is."""
    made: dict[str, Any] = {}

    def get(name: str) -> Any:
        if name not in made:
            made[name] = MAKERS[name](tmp_path_factory.mktemp("pipe"))
            made[name].set_progress_bar_config(disable=True)
        return made[name]

    return get


def native(steps: int, size: tuple[int, int] = SIZE) -> Any:
    return mf.Sample(*size, mf.Shifted(steps), noise=mf.Stream(0)) >> mf.Decode()


@pytest.mark.parametrize("name", FAMILIES)
def test_native_sampling_is_the_pipelines_own_call(name: str, pipes: Callable[[str], Any]) -> None:
    pipe = pipes(name)
    theirs = pipe(
        prompt=list(PROMPTS),
        height=SIZE[0],
        width=SIZE[1],
        num_inference_steps=3,
        generator=generators([5, 8]),
        output_type="pt",
        **CALLS[name],
    ).images
    ours = mf.run(native(3), from_diffusers(pipe), PROMPTS, seed=[5, 8]).pixels
    assert float(theirs.std()) > 0.05  # a picture, not a saturated plane
    assert relative(ours, theirs) < 1e-4


@pytest.mark.parametrize("name", ["dev", "schnell", "qwen"])
def test_our_own_transformer_gives_the_same_pictures(
    name: str, pipes: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Ours are channels-last, where torch's CPU group norm loses three digits on smooth pictures: 4e-4 against 1e-7.
    norm = F.group_norm
    monkeypatch.setattr(F, "group_norm", lambda x, *rest: norm(x.contiguous(), *rest))
    pipe = pipes(name)
    own = mf.load(pipe.config._name_or_path, device="cpu")
    bridged = from_diffusers(pipe)
    same = ("name", "space", "shift", "cfg", "rescale", "guidance", "negative", "architecture", "upscale")
    assert [getattr(bridged.info, k) for k in same] == [getattr(own.info, k) for k in same]
    for recipe in (mf.recipes.paper, mf.recipes.official):
        chain = recipe(UP, low=(48, 80), size=(96, 160), steps=3)
        ours, theirs = (mf.run(chain, model, PROMPTS, seed=[1, 2]).pixels for model in (bridged, own))
        assert relative(ours, theirs) < 1e-4
    # A prompt encoded for one serves the other.
    cond = own.condition(PROMPTS)
    assert (
        relative(
            mf.run(native(2), bridged, condition=cond, seed=1).pixels, mf.run(native(2), own, PROMPTS, seed=1).pixels
        )
        < 1e-4
    )


def test_official_mode_is_the_published_procedure(pipes: Callable[[str], Any]) -> None:
    sizes: dict[str, Any] = dict(low=(48, 80), size=(96, 160))
    small, large = official_flux(pipes("dev"), {"prompt": list(PROMPTS)}, seeds=[5, 8], steps=12, upscale=UP, **sizes)
    model = from_diffusers(pipes("dev"))
    result = mf.run(preset(model.info, UP, **sizes), model, PROMPTS, seed=[5, 8], keep=True)
    kept = result.stages[1].data
    assert kept is not None and relative(kept, small) < 1e-4
    assert relative(result.pixels, large) < 1e-4
    _, large = official_qwen(pipes("qwen"), {"prompt": ["a cat"]}, seeds=[5], steps=12, upscale=UP, **sizes)
    model = from_diffusers(pipes("qwen"))
    assert relative(mf.run(preset(model.info, UP, **sizes), model, "a cat", seed=5).pixels, large) < 1e-4


@pytest.mark.parametrize(("name", "scale", "steps", "sigma"), [("klein base", 4.0, 12, 0.12), ("klein", 1.0, 4, 0.25)])
def test_official_klein_is_the_published_script(
    name: str, scale: float, steps: int, sigma: float, pipes: Callable[[str], Any]
) -> None:
    low, size = (48, 80), (96, 160)
    small, large = official_klein(
        pipes(name), ["a cat"], seed=5, low=low, size=size, steps=steps, sigma=sigma, scale=scale, upscale=UP
    )
    model = from_diffusers(pipes(name))
    result = mf.run(preset(model.info, UP, low=low, size=size), model, "a cat", seed=5, keep=True)
    kept = result.stages[1].data
    assert kept is not None and relative(kept, small) < 1e-4
    assert relative(result.pixels, large) < 1e-4


def test_official_z_image_is_the_published_script(pipes: Callable[[str], Any]) -> None:
    low, size = (48, 80), (96, 160)
    small, large = official_z_image(pipes("z-image"), PROMPTS, seeds=[5, 8], low=low, size=size, upscale=UP)
    model = from_diffusers(pipes("z-image"))
    result = mf.run(preset(model.info, UP, low=low, size=size), model, PROMPTS, seed=[5, 8], keep=True)
    kept = result.stages[1].data
    assert kept is not None and relative(kept, small) < 1e-4
    assert relative(result.pixels, large) < 1e-4


def test_undistilled_z_image_adds_its_scale_to_the_conditional(pipes: Callable[[str], Any]) -> None:
    pipe = pipes("z-image")
    theirs = pipe(
        prompt=list(PROMPTS), height=48, width=80, num_inference_steps=2, generator=generators([5, 8]),
        guidance_scale=2.5, output_type="pt",
    ).images  # fmt: skip
    model = from_diffusers(pipe, guidance=3.5)
    assert relative(mf.run(native(2), model, PROMPTS, seed=[5, 8]).pixels, theirs) < 1e-4
    apart = mf.Sample(*SIZE, mf.Shifted(2), noise=mf.Stream(0), guidance=mf.CFG(3.5, packed=False)) >> mf.Decode()
    assert relative(mf.run(apart, model, PROMPTS, seed=[5, 8]).pixels, theirs) < 1e-4


def test_true_guidance_of_flux(pipes: Callable[[str], Any]) -> None:
    pipe = pipes("dev")
    theirs = pipe(
        prompt="a cat", negative_prompt="a dog", true_cfg_scale=2.0, height=48, width=80, num_inference_steps=2,
        generator=generators([5]), output_type="pt",
    ).images  # fmt: skip
    chain = mf.Sample(*SIZE, mf.Shifted(2), noise=mf.Stream(0), guidance=mf.CFG(2.0)) >> mf.Decode()
    assert relative(mf.run(chain, from_diffusers(pipe), "a cat", negative="a dog", seed=5).pixels, theirs) < 1e-4


@pytest.mark.parametrize("hint", [False, True], ids=["through the VAE", "hint block"])
def test_a_controlnet_is_followed_as_its_pipeline_does(hint: bool, pipes: Callable[[str], Any]) -> None:
    from diffusers import FluxControlNetModel, FluxControlNetPipeline

    base = pipes("dev")
    config = {k: v for k, v in base.transformer.config.items() if not k.startswith("_")}
    keep = ("in_channels", "attention_head_dim", "num_attention_heads", "joint_attention_dim", "pooled_projection_dim",
            "guidance_embeds", "axes_dims_rope")  # fmt: skip
    net = FluxControlNetModel(
        patch_size=2 if hint else 1,
        num_layers=1,
        num_single_layers=1,
        conditioning_embedding_channels=16 if hint else None,
        **{k: config[k] for k in keep},
    )
    tiny_bridge.spread(net)
    parts = {k: v for k, v in base.components.items() if v is not None}
    vae = deepcopy(base.vae)
    vae.encoder.conv_out.weight.data[16:] = 0  # a posterior without spread: its sample is its mode
    vae.encoder.conv_out.bias.data[16:] = -30
    pipe = FluxControlNetPipeline(**{**parts, "vae": vae}, controlnet=net)
    pipe.set_progress_bar_config(disable=True)
    pixels = torch.rand(1, 3, *SIZE, generator=torch.Generator().manual_seed(3))
    cells = (SIZE[0] // 8, SIZE[1] // 8)
    noise = torch.randn(1, 16, *cells, generator=torch.Generator().manual_seed(5))
    theirs = pipe(
        prompt="a cat",
        control_image=2 * pixels - 1,
        controlnet_conditioning_scale=0.7,
        guidance_scale=3.5,
        height=SIZE[0],
        width=SIZE[1],
        num_inference_steps=3,
        latents=pipe._pack_latents(noise, 1, 16, *cells),
        output_type="pt",
    ).images
    model = from_diffusers(pipe, control=Control(pixels, 0.7))
    ours = mf.run(native(3), model, "a cat", seed=5).pixels
    assert relative(ours, theirs) < 1e-4
    without = mf.run(native(3), from_diffusers(base), "a cat", seed=5).pixels
    assert relative(ours, without) > 1e-3
    assert from_diffusers(pipe, control=Control(pixels, 0.8)).info.version != model.info.version
    refined = mf.run(mf.recipes.paper(UP, low=SIZE, size=(96, 160), steps=2), model, "a cat").pixels
    assert refined.shape[-2:] == (96, 160)


@pytest.mark.parametrize("name", FAMILIES)
def test_levels_are_those_the_scheduler_runs(name: str, pipes: Callable[[str], Any]) -> None:
    pipe, model = pipes(name), from_diffusers(pipes(name))

    @given(steps=st.integers(2, 60), rows=st.integers(2, 80), columns=st.integers(2, 80))
    def check(steps: int, rows: int, columns: int) -> None:
        tokens, scheduler = rows * columns, deepcopy(pipe.scheduler)
        mu = model.info.shift.mu(tokens)
        if name.startswith(("klein", "flux2")):
            from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu

            mu = compute_empirical_mu(tokens, steps)
        grid = None if name.startswith("sd3") else np.linspace(1.0, 1 / steps, steps)
        scheduler.set_timesteps(steps, sigmas=grid, mu=mu)
        ours = mf.Shifted(steps)(1.0, tokens, model.info)
        assert ours == pytest.approx(scheduler.sigmas.tolist(), abs=1e-6)

    check()


def test_published_levels_of_the_presets() -> None:
    """The effective levels of the published scripts: 0.578 and 0.770 for Klein at 1024 x 1024, 0.273 for Z-Image."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    from mrflow.bridge import PRESETS
    from mrflow.bridge.flux2 import flux2_shift

    shift = flux2_shift(FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True))
    klein = mf.ModelInfo("k", mf.LatentSpace("flux2", 128, 16, 1), shift)
    size = (1024, 1024)
    assert PRESETS["flux2-klein-base"].level(klein, size) == pytest.approx(0.578, abs=5e-4)
    assert PRESETS["flux2-klein"].level(klein, size) == pytest.approx(0.770, abs=5e-4)
    turbo = mf.ModelInfo("z", mf.LatentSpace("z-image"), mf.Shift.fixed(3.0))
    assert PRESETS["z-image"].level(turbo, size) == pytest.approx(0.2727, abs=5e-5)
    with pytest.raises(mf.PlanError, match="there is no official MrFlow preset for toy, only for flux1-dev, "):
        preset(mf.testing.TOY)


@pytest.mark.parametrize("name", FAMILIES)
def test_operations_are_those_counted(name: str, pipes: Callable[[str], Any]) -> None:
    """`plan` against torch's own counter on one forward; the text is as long as the plan takes it to be."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    model: Bridged = from_diffusers(pipes(name))
    info, words = model.info, model.info.architecture
    assert words is not None
    cond = model.condition(["a cat"])
    one = cond["context"][:, :1]
    context = one.expand(1, words.text_tokens, *one.shape[2:])
    tensors = {**cond.tensors, "context": context}
    if "mask" in tensors:
        tensors["mask"] = torch.ones(1, words.text_tokens, dtype=torch.long)
    field = model.field(mf.Condition(tensors))
    down = info.space.downscale
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # others are not counted
        field(torch.randn(1, info.space.channels, 320 // down, 320 // down), 0.5)
    counted = counter.get_total_flops()
    assert forward_flops(info, info.tokens(320, 320)) == pytest.approx(counted, rel=0.12)
    assert mf.plan(mf.recipes.paper(UP, low=(160, 160), size=(320, 320)), info).work.flops > 0

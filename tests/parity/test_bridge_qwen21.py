"""Qwen-Image-2.1: the bridge draws what its pipeline draws, from text alone, and keeps the text's keys as it does."""

from typing import Any

import pytest
import torch
from diffusers.configuration_utils import FrozenDict
from torch import Tensor

import mrflow as mf
from mrflow.bridge import from_diffusers
from mrflow.cost import forward_flops
from mrflow.errors import PlanError
from tests.parity.reenact import generators
from tests.parity.test_flux import relative
from tests.tiny_bridge import qwen21

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]
PROMPTS = ["a cat", "a much longer tale of two towns"]
SIZE = (64, 96)


@pytest.fixture(scope="module")
def pipe(tmp_path_factory: pytest.TempPathFactory) -> Any:
    made = qwen21(tmp_path_factory.mktemp("pipe"))
    made.set_progress_bar_config(disable=True)
    return made


def native(steps: int = 3) -> Any:
    return mf.Sample(*SIZE, mf.Shifted(steps), noise=mf.Stream(0))


def theirs(pipe: Any, batch: int, kind: str, **more: Any) -> Tensor:
    out: Tensor = pipe(
        prompt=PROMPTS[:batch], height=SIZE[0], width=SIZE[1], num_inference_steps=3, output_type=kind,
        generator=generators([5, 8][:batch]), **more,
    ).images  # fmt: skip
    return out


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("scale", [None, 3.0])
def test_native_sampling_is_the_pipelines_own_call(pipe: Any, batch: int, scale: float | None) -> None:
    more: dict[str, Any] = {} if scale is None else {"true_cfg_scale": scale, "negative_prompt": ["a dog"] * batch}
    ours: dict[str, Any] = {} if scale is None else {"negative": "a dog"}
    model = from_diffusers(pipe, guidance=scale)
    result = mf.run(native() >> mf.Decode(), model, PROMPTS[:batch], seed=[5, 8][:batch], **ours)
    latents = theirs(pipe, batch, "latent", **more)
    got = mf.run(native(), model, PROMPTS[:batch], seed=[5, 8][:batch], **ours).data
    assert relative(got.flatten(2).transpose(1, 2), latents) < 1e-5
    want = theirs(pipe, batch, "pt", **more)[:, :3]  # the fourth is alpha
    assert want.std() > 0.02 and float(((want > 0) & (want < 1)).float().mean()) > 0.9
    assert relative(result.pixels, want) < 1e-5
    assert result.nfe == result.plan.nfe == (3 if scale is None else 6)


def test_operations_are_those_counted(pipe: Any) -> None:
    """`plan` against torch's own counter on the first forward; later ones leave out the text."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    model = from_diffusers(pipe)
    words = model.info.architecture
    assert words is not None
    context = model.condition(PROMPTS[:1])["context"][:, :1].expand(1, words.text_tokens, -1).contiguous()
    field = model.field(mf.Condition({"context": context, "mask": torch.ones(1, words.text_tokens, dtype=torch.long)}))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # others are not counted
        field(torch.randn(1, model.info.space.channels, 4, 4), 0.5)
    assert forward_flops(model.info, model.info.tokens(64, 64)) == pytest.approx(counter.get_total_flops(), rel=0.12)


def test_text_is_read_once_and_sizes_are_kept_apart(pipe: Any) -> None:
    model = from_diffusers(pipe)
    seen: list[int] = []
    hook = pipe.transformer.transformer_blocks[0].register_forward_pre_hook(
        lambda _, __, given: seen.append(given["hidden_states"].shape[1]), with_kwargs=True
    )
    try:
        field = model.field(cond := model.condition(PROMPTS[:1]))
        x = torch.randn(1, 8, 4, 6, generator=torch.Generator().manual_seed(0))
        small = torch.randn(1, 8, 2, 6, generator=torch.Generator().manual_seed(0))
        got = [field(each, sigma) for each, sigma in ((x, 0.9), (x, 0.5), (small, 0.5), (x, 0.5))]
    finally:
        hook.remove()
    text = cond["context"].shape[1]
    assert seen == [text + 24, 24, text + 12, text + 24]
    for each, sigma, want in ((x, 0.9, got[0]), (small, 0.5, got[2]), (x, 0.5, got[1])):
        assert relative(model.field(cond)(each, sigma), want) < 1e-5


def test_the_autoencoder_is_used_as_its_pipeline_uses_it(pipe: Any) -> None:
    model = from_diffusers(pipe)
    pixels = torch.rand(1, 3, *SIZE, generator=torch.Generator().manual_seed(0))
    opaque = torch.cat((2 * pixels - 1, torch.ones(1, 1, *SIZE)), 1)
    with torch.no_grad():
        want = pipe._encode_vae_image(opaque[:, :, None], torch.Generator())[:, :, 0]
    assert relative(model.encode(pixels), want) < 1e-5


def test_chains_run_and_what_cannot_be_is_refused(pipe: Any) -> None:
    model = from_diffusers(pipe)
    chain = mf.recipes.paper(mf.Lanczos(2), low=(64, 64), size=(128, 128), steps=2)
    assert mf.run(chain, model, "a cat").pixels.shape == (1, 3, 128, 128)
    assert model.info.tokens(64, 96) == 24
    with pytest.raises(PlanError, match="multiple of 32"):
        mf.plan(mf.Sample(48, 96) >> mf.Decode(), model.info)
    with pytest.raises(PlanError, match="cannot be cached"):
        mf.plan(mf.Sample(64, 96, cache=mf.caches.TaylorSeer(2)) >> mf.Decode(), model.info)
    with pytest.raises(PlanError, match="even grids"):
        model.field(model.condition(["a"]))(torch.zeros(1, 8, 3, 6), 0.5)
    cond = model.condition(["a"])
    with pytest.raises(PlanError, match="no guidance embedding"):
        model.field(cond, mf.FieldOptions(guidance=3.0))
    with pytest.raises(PlanError, match="marks no text"):
        model.field(mf.Condition({**cond.tensors, "mask": torch.zeros_like(cond["mask"])}))
    with pytest.raises(PlanError, match="no official MrFlow preset for qwen-image-2.1"):
        mf.bridge.preset(model.info, mf.Lanczos(2))
    with pytest.raises(PlanError, match="no guidance into its attention"):
        mf.plan(mf.Sample(64, 96, guidance=mf.NAG(2.0)) >> mf.Decode(), model.info)


def test_facts_are_those_of_its_parts(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many steps as its configuration lists sigmas, else the published 40; another autoencoder is refused."""
    steps = [from_diffusers(pipe).info.native_steps]
    monkeypatch.setattr(pipe, "_internal_dict", FrozenDict({**pipe.config, "sample_sigmas": [1.0, 0.6, 0.3]}))
    steps.append(from_diffusers(pipe).info.native_steps)
    assert steps == [40, 3]
    monkeypatch.setattr(pipe.vae, "_internal_dict", FrozenDict({**pipe.vae.config, "z_dim": 9}))
    with pytest.raises(PlanError, match="takes 8 channels a token and gives 8, its autoencoder has 9"):
        from_diffusers(pipe)

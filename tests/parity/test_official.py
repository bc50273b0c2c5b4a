"""`recipes.official` against the published procedure, re-enacted with diffusers' pipelines on tiny random weights."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import mrflow as mf
from tests.parity.reenact import official
from tests.parity.test_flux import CASES, relative, scatter
from tests.tiny import kl

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]
UP = mf.Lanczos(2)
CONTEXT, POOLED = 24, 12


def pipeline(folder: Path, *, guidance: bool, dtype: torch.dtype = torch.float32) -> Any:
    """A FluxPipeline without text encoders, saved by diffusers."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    transformer = FluxTransformer2DModel(**{**CASES["guided"], "guidance_embeds": guidance}).eval()
    vae = kl((32, 32, 64, 64)).eval()
    scatter(transformer, 3)
    scatter(vae, 4)
    published = dict(base_image_seq_len=256, base_shift=0.5, max_image_seq_len=4096, max_shift=1.15)
    scheduler = FlowMatchEulerDiscreteScheduler(
        **published, shift=3.0 if guidance else 1.0, use_dynamic_shifting=guidance
    )
    pipe = FluxPipeline(
        scheduler=scheduler,
        vae=vae.to(dtype),
        transformer=transformer.to(dtype),
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
    )
    pipe.save_pretrained(folder)
    return pipe


def words(batch: int) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(1)
    return {"context": torch.randn(batch, 9, CONTEXT, generator=g), "pooled": torch.randn(batch, POOLED, generator=g)}


@pytest.mark.parametrize(
    ("steps", "refine_steps", "guidance", "low", "seeds"),
    [
        (12, 1, True, (64, 64), [5]),
        (20, 1, True, (64, 64), [0]),
        (12, 3, True, (64, 64), [5]),
        (12, 1, True, (48, 96), [5]),
        (4, 1, False, (64, 64), [5]),
        (12, 1, True, (64, 64), [5, 8]),
    ],
    ids=["12+1", "20+1", "12+3", "not square", "schnell", "two"],
)
def test_the_refined_picture_is_theirs(
    steps: int, refine_steps: int, guidance: bool, low: tuple[int, int], seeds: list[int], tmp_path: Path
) -> None:
    pipe = pipeline(tmp_path, guidance=guidance)
    model = mf.load(tmp_path, device="cpu")
    assert model.info.name == ("flux1-dev" if guidance else "flux1-schnell")
    size = (2 * low[0], 2 * low[1])
    given = words(len(seeds))
    small, large = official(
        pipe,
        {"prompt_embeds": given["context"], "pooled_prompt_embeds": given["pooled"]},
        seeds=seeds,
        low=low,
        size=size,
        steps=steps,
        refine_steps=refine_steps,
        upscale=UP,
    )
    chain = mf.recipes.official(UP, low=low, size=size, steps=steps, refine_steps=refine_steps)
    result = mf.run(chain, model, condition=mf.Condition(given), seed=seeds, keep=True)
    assert float(large.std()) > 0.05  # a picture, not a saturated plane
    kept = result.stages[1].data
    assert kept is not None and relative(kept, small) < 1e-4
    assert relative(result.pixels, large) < 1e-4


def test_another_seed_or_sigma_is_another_picture(tmp_path: Path) -> None:
    pipeline(tmp_path, guidance=True)
    model, given = mf.load(tmp_path, device="cpu"), mf.Condition(words(1))
    size: dict[str, Any] = dict(low=(64, 64), size=(128, 128), steps=4)
    first = mf.run(mf.recipes.official(UP, **size), model, condition=given, seed=5).pixels
    assert relative(mf.run(mf.recipes.official(UP, **size), model, condition=given, seed=6).pixels, first) > 1e-2
    assert (
        relative(mf.run(mf.recipes.official(UP, sigma=0.13, **size), model, condition=given, seed=5).pixels, first)
        > 1e-3
    )


def test_bfloat16_is_as_close_to_float32_as_theirs(tmp_path: Path) -> None:
    pipe = pipeline(tmp_path, guidance=True, dtype=torch.bfloat16)
    model, exact = mf.load(tmp_path, device="cpu"), mf.load(tmp_path, device="cpu", dtype=torch.float32)
    assert model.info.version.endswith("/bfloat16")
    given, seeds = {k: v.bfloat16() for k, v in words(16).items()}, list(range(16))
    _, theirs = official(
        pipe,
        {"prompt_embeds": given["context"], "pooled_prompt_embeds": given["pooled"]},
        seeds=seeds,
        low=(64, 64),
        size=(128, 128),
        steps=4,
        upscale=UP,
    )
    chain = mf.recipes.official(UP, low=(64, 64), size=(128, 128), steps=4)
    ours = mf.run(chain, model, condition=mf.Condition(given), seed=seeds).pixels
    best = mf.run(chain, exact, condition=mf.Condition(given), seed=seeds).pixels
    errors = torch.tensor([[relative(x[i], best[i]) for x in (ours, theirs.float())] for i in range(16)])
    assert float((errors[:, 0] / errors[:, 1]).log().mean()) < 0.08  # over 48 pictures: 0.0005, standard error 0.011

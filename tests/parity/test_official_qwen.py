"""`recipes.official` for Qwen-Image against the published procedure, re-enacted with diffusers on tiny weights."""

from pathlib import Path

import pytest
import torch

import mrflow as mf
from mrflow.stages.upscale import resize
from tests.parity.reenact import official_qwen
from tests.parity.test_flux import relative
from tests.tiny import write_qwen_repo

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]
UP = mf.Lanczos(2)


@pytest.mark.parametrize(
    ("case", "steps", "refine_steps", "low", "size", "prompts"),
    [
        ("two", 12, 1, (64, 64), (128, 128), ["a cat"]),
        ("three", 20, 1, (48, 96), (96, 192), ["a cat"]),
        ("two", 4, 3, (64, 64), (128, 128), ["a cat"]),
        ("wide", 4, 1, (80, 112), (240, 336), ["a cat"]),
        ("two", 4, 1, (48, 80), (96, 160), ["a cat", "a much longer tale of two towns"]),
        ("two", 1, 1, (64, 64), (128, 128), ["a cat"]),
    ],
    ids=["12+1", "not square", "12+3", "odd grids", "two unequal prompts", "one step"],
)
def test_the_refined_picture_is_theirs(
    case: str,
    steps: int,
    refine_steps: int,
    low: tuple[int, int],
    size: tuple[int, int],
    prompts: list[str],
    tmp_path: Path,
) -> None:
    from diffusers import QwenImagePipeline

    write_qwen_repo(tmp_path / "r", case=case)
    seeds = [5, 8][: len(prompts)]
    pipe = QwenImagePipeline.from_pretrained(tmp_path / "r")
    if steps == 1:  # with its terminal stretch the reference's schedule of one step is 0 / 0; ours is (1, 0)
        pipe.scheduler.register_to_config(shift_terminal=None)

    def up(pixels: torch.Tensor) -> torch.Tensor:
        while pixels.shape[-1] < size[1]:
            pixels = UP(pixels)
        return resize(pixels, *size)

    small, large = official_qwen(
        pipe, {"prompt": prompts}, seeds=seeds, low=low, size=size, steps=steps, refine_steps=refine_steps, upscale=up
    )
    model = mf.load(tmp_path / "r", device="cpu")
    assert model.info.name == "qwen-image"
    chain = mf.recipes.official(UP, low=low, size=size, steps=steps, refine_steps=refine_steps)
    result = mf.run(chain, model, prompts, seed=seeds, keep=True)
    assert result.nfe == 2 * (steps + refine_steps)
    assert float(large.std()) > 0.05
    kept = result.stages[1].data
    assert kept is not None and relative(kept, small) < 1e-4
    assert relative(result.pixels, large) < 1e-4


def test_bfloat16_is_as_close_to_float32_as_theirs(tmp_path: Path) -> None:
    from diffusers import QwenImagePipeline

    write_qwen_repo(tmp_path / "r", dtype=torch.bfloat16)
    prompts, seeds = ["a cat"] * 12, list(range(12))
    pipe = QwenImagePipeline.from_pretrained(tmp_path / "r", torch_dtype=torch.bfloat16)
    sizes = dict(low=(48, 48), size=(96, 96), steps=4)
    _, theirs = official_qwen(pipe, {"prompt": prompts}, seeds=seeds, upscale=UP, **sizes)  # type: ignore[arg-type]
    chain = mf.recipes.official(UP, **sizes)  # type: ignore[arg-type]
    ours = mf.run(chain, mf.load(tmp_path / "r", device="cpu"), prompts, seed=seeds).pixels
    best = mf.run(chain, mf.load(tmp_path / "r", device="cpu", dtype=torch.float32), prompts, seed=seeds).pixels
    errors = torch.tensor([[relative(x[i], best[i]) for x in (ours, theirs.float())] for i in range(12)])
    assert float((errors[:, 0] / errors[:, 1]).log().mean()) < 0.1

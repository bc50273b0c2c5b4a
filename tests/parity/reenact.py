"""The published MrFlow procedure with diffusers' own pipelines: what `recipes.official` is held against.

As the official scripts (Xingyu-Zheng/MrFlow) with floats between the stages: FluxPipeline at the low size; the decoded
picture enlarged; FluxImg2ImgPipeline on the same parts with explicit linear sigmas, which a scheduler without any shift
leaves as they are; seeds for the first, seeds + 1 for the second.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def generators(seeds: Sequence[int]) -> list[torch.Generator]:
    """One CPU generator a picture."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def official(
    pipe: Any,
    words: dict[str, Any],
    *,
    seeds: Sequence[int],
    low: tuple[int, int],
    size: tuple[int, int],
    steps: int,
    upscale: Callable[[Tensor], Tensor],
    refine_steps: int = 1,
    sigma: float = 0.12,
    guidance: float = 3.5,
) -> tuple[Tensor, Tensor]:
    """Low-resolution and refined pictures, float (b, 3, h, w) in [0, 1]; `words` are prompts or their embeddings."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxImg2ImgPipeline

    pipe.set_progress_bar_config(disable=True)
    small = pipe(
        **words,
        height=low[0],
        width=low[1],
        num_inference_steps=steps,
        guidance_scale=guidance,
        generator=generators(seeds),
        output_type="pt",
    ).images
    parts = {k: v for k, v in pipe.components.items() if k not in ("scheduler", "image_encoder", "feature_extractor")}
    refiner = FluxImg2ImgPipeline(
        **parts, scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0, use_dynamic_shifting=False)
    )
    refiner.set_progress_bar_config(disable=True)
    large = refiner(
        **words,
        image=upscale(small.float()).clamp(0, 1),
        strength=1.0,
        sigmas=[sigma * (1 - i / refine_steps) for i in range(refine_steps)],
        height=size[0],
        width=size[1],
        num_inference_steps=refine_steps,
        guidance_scale=guidance,
        generator=generators([seed + 1 for seed in seeds]),
        output_type="pt",
    ).images
    return small, large


def official_qwen(
    pipe: Any,
    words: dict[str, Any],
    *,
    seeds: Sequence[int],
    low: tuple[int, int],
    size: tuple[int, int],
    steps: int,
    upscale: Callable[[Tensor], Tensor],
    refine_steps: int = 1,
    sigma: float = 0.12,
    scale: float = 4.0,
) -> tuple[Tensor, Tensor]:
    """The same with QwenImagePipeline and QwenImageImg2ImgPipeline: true CFG with the negative prompt " " in both."""
    from diffusers import FlowMatchEulerDiscreteScheduler, QwenImageImg2ImgPipeline

    pipe.set_progress_bar_config(disable=True)
    guided = dict(negative_prompt=[" "] * len(seeds), true_cfg_scale=scale)
    small = pipe(
        **words,
        **guided,
        height=low[0],
        width=low[1],
        num_inference_steps=steps,
        generator=generators(seeds),
        output_type="pt",
    ).images
    parts = {k: v for k, v in pipe.components.items() if k != "scheduler"}
    direct = FlowMatchEulerDiscreteScheduler(shift=1.0, use_dynamic_shifting=False)
    refiner = QwenImageImg2ImgPipeline(**parts, scheduler=direct)
    refiner.set_progress_bar_config(disable=True)
    large = refiner(
        **words,
        **guided,
        image=upscale(small.float()).clamp(0, 1),
        strength=1.0,
        sigmas=[sigma * (1 - i / refine_steps) for i in range(refine_steps)],
        height=size[0],
        width=size[1],
        num_inference_steps=refine_steps,
        generator=generators([seed + 1 for seed in seeds]),
        output_type="pt",
    ).images
    return small, large

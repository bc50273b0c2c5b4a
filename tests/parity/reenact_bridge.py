"""The published scripts for FLUX.2 Klein and Z-Image-Turbo with diffusers' own parts, floats between the stages.

As Xingyu-Zheng/MrFlow's examples: Klein encodes with the posterior's mode, and what it calls its noise level goes
through the scheduler's shift; Z-Image runs the last of nine img2img steps (strength 0.11).
"""

from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from tests.parity.reenact import generators


@torch.no_grad()
def official_klein(
    pipe: Any,
    prompts: Sequence[str],
    *,
    seed: int,
    low: tuple[int, int],
    size: tuple[int, int],
    steps: int,
    sigma: float,
    scale: float,
    upscale: Callable[[Tensor], Tensor],
) -> tuple[Tensor, Tensor]:
    """Low-resolution and refined pictures, float (b, 3, h, w) in [0, 1]."""
    from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu, retrieve_timesteps

    small = pipe(
        prompt=list(prompts),
        height=low[0],
        width=low[1],
        guidance_scale=scale,
        num_inference_steps=steps,
        generator=generators([seed]),
        output_type="pt",
    ).images
    generator, scheduler = torch.Generator().manual_seed(seed + 1), deepcopy(pipe.scheduler)
    latents = pipe._encode_vae_image(2 * upscale(small).clamp(0, 1) - 1, generator=generator)
    ids = pipe._prepare_latent_ids(latents)
    mu = compute_empirical_mu(image_seq_len=latents.shape[2] * latents.shape[3], num_steps=1)
    times, _ = retrieve_timesteps(scheduler, 1, "cpu", sigmas=[sigma], mu=mu)
    scheduler.set_begin_index(0)
    noise = torch.randn(latents.shape, generator=generator)
    x = pipe._pack_latents(scheduler.scale_noise(latents, times[:1], noise))
    velocities = []
    for words in [prompts, [""]][: 2 if scale > 1 else 1]:
        states, text_ids = pipe.encode_prompt(list(words))
        velocities.append(
            pipe.transformer(
                hidden_states=x,
                timestep=times[:1] / 1000,
                guidance=None,
                encoder_hidden_states=states,
                txt_ids=text_ids,
                img_ids=ids,
                return_dict=False,
            )[0]
        )
    v = velocities[0] if scale == 1 else velocities[1] + scale * (velocities[0] - velocities[1])
    x = scheduler.step(v, times[0], x, return_dict=False)[0]
    z = pipe._unpack_latents_with_ids(x, ids, latents.shape[2], latents.shape[3])
    norm = pipe.vae.bn
    deviation = torch.sqrt(norm.running_var + pipe.vae.config.batch_norm_eps)
    z = z * deviation.view(1, -1, 1, 1) + norm.running_mean.view(1, -1, 1, 1)
    large = pipe.vae.decode(pipe._unpatchify_latents(z), return_dict=False)[0]
    return small, (large / 2 + 0.5).clamp(0, 1)


def official_z_image(
    pipe: Any,
    prompts: Sequence[str],
    *,
    seeds: Sequence[int],
    low: tuple[int, int],
    size: tuple[int, int],
    upscale: Callable[[Tensor], Tensor],
) -> tuple[Tensor, Tensor]:
    """The same with ZImagePipeline and ZImageImg2ImgPipeline."""
    from diffusers import ZImageImg2ImgPipeline

    small = pipe(
        prompt=list(prompts),
        height=low[0],
        width=low[1],
        guidance_scale=0.0,
        num_inference_steps=9,
        generator=generators(seeds),
        output_type="pt",
    ).images
    refiner = ZImageImg2ImgPipeline(**{**pipe.components, "scheduler": deepcopy(pipe.scheduler)})
    refiner.set_progress_bar_config(disable=True)
    large = refiner(
        prompt=list(prompts),
        image=upscale(small).clamp(0, 1),
        strength=0.11,
        num_inference_steps=9,
        height=size[0],
        width=size[1],
        guidance_scale=0.0,
        generator=generators([seed + 1 for seed in seeds]),
        output_type="pt",
    ).images
    return small, large

"""Qwen-Image-2.1 pipelines as backbones, from text alone."""

from dataclasses import replace
from importlib import import_module
from typing import Any, ClassVar

import torch
from torch import Tensor

from mrflow.backbone import Condition, FieldOptions
from mrflow.bridge.base import BRIDGED, check_batch, decode_pixels, keepable, posterior, thousandths
from mrflow.bridge.facts import bridged_shift, parameters_of
from mrflow.bridge.qwen import BridgedQwen
from mrflow.errors import PlanError
from mrflow.flow import Velocity
from mrflow.model_info import QWEN, Architecture, LatentSpace, ModelInfo
from mrflow.protocols.pieces import StepFactory
from mrflow.protocols.tokens import PackedCall

DOWNSCALE = 16  # pixels of a latent cell, which is a token; cells come in blocks of 2 x 2
TEXT = 50  # tokens of an average prompt: its pipeline has no limit


class BridgedQwen21(BridgedQwen):
    """Qwen-Image-2.1 as its pipeline runs it: one causal sequence of text, then the image, without a condition image.

    Text is modulated at sigma 0 and sees no image, so its keys and values are kept from the first evaluation on, as the
    pipeline keeps them; each field has its own. The autoencoder has an alpha channel: pictures go in opaque, and what
    comes out of it is left out. The pipeline draws without guidance unless it is given a scale and a negative.
    """

    accepts = ("QwenImage21Pipeline",)
    words: ClassVar[tuple[str, ...]] = ("text_encoder", "processor")
    can = replace(BRIDGED, cache=False)  # it keeps text between evaluations in its own way

    def check_parts(self) -> None:
        """A token a latent cell, in and out, and text that the noise level does not change."""
        config, latent = self.pipe.transformer.config, self.pipe.vae.config.z_dim
        if (config.in_channels, config.out_channels, config.patch_size) != (latent, latent, 1):
            raise PlanError(
                f"this Qwen-Image-2.1 takes {config.in_channels} channels a token and gives {config.out_channels}, its "
                f"autoencoder has {latent}"
            )

    def facts(self) -> ModelInfo:
        """The pipeline's own sizes. Its gated MLPs have three matrices, where a plan counts two."""
        pipe, config = self.pipe, self.pipe.transformer.config
        listed = pipe.config.get("sample_sigmas")
        return ModelInfo(
            "qwen-image-2.1",
            LatentSpace("qwen-image-2.1", pipe.vae.config.z_dim, DOWNSCALE, 1, whole=2),
            bridged_shift(pipe.scheduler),
            cfg=1.0 if self._guidance is None else self._guidance,
            negative=" ",
            native_steps=len(listed) if listed else 40,
            architecture=Architecture(
                config.num_attention_heads * config.attention_head_dim,
                0,
                config.num_layers,
                config.context_in_dim,
                self._text_tokens or TEXT,
                parameters_of(pipe.transformer),
                1.5 * config.mlp_ratio,
            ),
            upscale=QWEN.upscale,
            upscale_flops=QWEN.upscale_flops,
        )

    def encode_words(self, prompts: list[str]) -> dict[str, Tensor]:
        """States (b, longest, width), zeros behind, and a mask (b, longest) of the text."""
        context, mask, _ = self.pipe.encode_prompt(prompt=prompts, device=self.device)
        whole = context.new_ones(context.shape[:2], dtype=torch.long)
        return {"context": context, "mask": whole if mask is None else mask}

    def make_field(self, cond: Condition, options: FieldOptions, step: StepFactory | None) -> Velocity:
        """The velocity of one branch; padding is masked where a batch's texts differ in length."""
        info, device, own = self.info, self.device, self.pipe.transformer
        _, branch, moved = self.begin(cond, options, step, {"context": own.config.context_in_dim})
        context, mask = self.text_of(cond)
        mask = None if mask is None else mask.bool()
        module: Any = import_module("diffusers.models.transformers.transformer_qwenimage21")
        caches: dict[tuple[int, ...], Any] = {}

        def velocity(tokens: Tensor, sigma: float, h: int, w: int) -> Tensor:
            check_batch(tokens, cond.batch)
            if h % 2 or w % 2:
                raise PlanError(f"{info.name} takes even grids of latent cells, got {h}x{w}")
            text, slots = context.shape[1], torch.ones(cond.batch, h * w // 4, dtype=torch.bool, device=device)
            slots = torch.cat((slots.new_zeros(cond.batch, text), slots), 1)
            kept, keeping = caches.get((h, w)), None
            if own.config.causal_condition:
                keeping = "extract" if kept is None else "cached"
                if kept is None:
                    caches.clear()
                    kept = caches[h, w] = module.QwenImage21KVCache(len(own.transformer_blocks))
            with self.working(moved=moved), branch():
                out: Tensor = own(
                    hidden_states=keepable(tokens).to(device, context.dtype),
                    timestep=thousandths(sigma, cond.batch, device).to(context.dtype) / 1000,
                    encoder_hidden_states=context,
                    encoder_hidden_states_mask=mask,
                    img_shapes=[[(1, h, w)]] * cond.batch,
                    img_mask=slots,
                    kv_cache=kept,
                    kv_cache_mode=keeping,
                    return_dict=False,
                )[0][:, -h * w :].float()
                return out.to(tokens.device)

        return PackedCall(velocity, patch=1)

    def encode(self, pixels: Tensor, noise: Tensor | None = None) -> Tensor:
        """Latents of the posterior's mode, or a sample of it, each channel to mean 0 and deviation 1."""
        opaque = torch.cat((pixels, torch.ones_like(pixels[:, :1])), 1)
        mean, std = self.normal()
        return (posterior(self, opaque, noise, frame=True) - mean) / std

    def decode(self, latents: Tensor) -> Tensor:
        """Pixels, clamped, without alpha."""
        mean, std = self.normal()
        return decode_pixels(self, latents * std + mean, frame=True)[:, :3]

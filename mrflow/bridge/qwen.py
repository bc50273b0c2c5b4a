"""Qwen-Image pipelines as backbones."""

from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from mrflow._checks import is_number
from mrflow.backbone import Condition, FieldOptions
from mrflow.bridge.base import Bridged, check_batch, decode_pixels, keepable, posterior, thousandths
from mrflow.bridge.blocks import QWEN as FAMILY
from mrflow.bridge.facts import bridged_shift, parameters_of
from mrflow.errors import PlanError
from mrflow.flow import Velocity
from mrflow.model_info import QWEN, Architecture, LatentSpace, ModelInfo
from mrflow.protocols.pieces import StepFactory
from mrflow.protocols.tokens import PackedCall

PUBLISHED_BASE = 96
FLAGS = ("zero_cond_t", "use_additional_t_cond", "use_layer3d_rope", "guidance_embeds")


class BridgedQwen(Bridged):
    """Qwen-Image as its pipeline runs it: masked text states, one frame of a video autoencoder, rescaled guidance."""

    accepts: ClassVar[tuple[str, ...]] = ("QwenImagePipeline", "QwenImageImg2ImgPipeline")
    family = FAMILY

    def check_parts(self) -> None:
        """The text-to-image transformer, without the switches of Edit and Layered."""
        config, latent = self.pipe.transformer.config, 4 * self.pipe.vae.config.z_dim
        if odd := [flag for flag in FLAGS if config.get(flag)]:
            raise PlanError(f"this Qwen-Image has {odd[0]}=True (an Edit, Layered or distilled model): not supported")
        if (config.in_channels, 4 * config.out_channels) != (latent, latent):
            raise PlanError(
                f"this Qwen-Image takes {config.in_channels} channels a token and gives {4 * config.out_channels}, its "
                f"autoencoder has {latent}: not a text-to-image model"
            )

    def facts(self) -> ModelInfo:
        """Qwen-Image's facts with the pipeline's own sizes."""
        pipe, config, vae = self.pipe, self.pipe.transformer.config, self.pipe.vae.config
        published = vae.base_dim == PUBLISHED_BASE
        return replace(
            QWEN,
            space=LatentSpace("qwen-image", vae.z_dim, 2 ** len(vae.temperal_downsample)),
            shift=bridged_shift(pipe.scheduler),
            cfg=QWEN.cfg if self._guidance is None else self._guidance,
            architecture=Architecture(
                config.num_attention_heads * config.attention_head_dim,
                config.num_layers,
                0,
                config.joint_attention_dim,
                self._text_tokens or 50,
                parameters_of(pipe.transformer),
            ),
            encode=QWEN.encode if published else (0.0, 0.0),
            decode=QWEN.decode if published else (0.0, 0.0),
            footprint=None,
        )

    def encode_words(self, prompts: list[str]) -> dict[str, Tensor]:
        """States (b, longest, width), zeros behind, and a mask (b, longest) of the text."""
        limit = self._text_tokens or 512
        template = self.pipe.prompt_template_encode
        dropped = self.pipe.prompt_template_encode_start_idx
        self.tell_lost(self.pipe.tokenizer, [template.format(p) for p in prompts], limit + dropped)
        context, mask = self.pipe.encode_prompt(prompt=prompts, device=self.device, max_sequence_length=limit)
        whole = context.new_ones(context.shape[:2], dtype=torch.long)
        return {"context": context, "mask": whole if mask is None else mask}

    def make_field(self, cond: Condition, options: FieldOptions, step: StepFactory | None) -> Velocity:
        """The velocity of one branch; padding is masked where a batch's texts differ in length."""
        device, needs = self.device, {"context": self.pipe.transformer.config.joint_attention_dim}
        net, branch, moved = self.begin(cond, options, step, needs, advice="CFG(scale, rescale=True)")
        context, mask = self.text_of(cond)

        def velocity(tokens: Tensor, sigma: float, h: int, w: int) -> Tensor:
            check_batch(tokens, cond.batch)
            with self.working(moved=moved), branch():
                out: Tensor = net(
                    hidden_states=keepable(tokens).to(device, context.dtype),
                    timestep=thousandths(sigma, cond.batch, device).to(context.dtype) / 1000,
                    encoder_hidden_states=context,
                    encoder_hidden_states_mask=mask,
                    img_shapes=[[(1, h, w)]] * cond.batch,
                    return_dict=False,
                )[0].float()
                return out.to(tokens.device)

        return PackedCall(velocity)

    def text_of(self, cond: Condition) -> tuple[Tensor, Tensor | None]:
        """States (b, longest, width), and a mask (b, longest) where the texts differ in length."""
        context, mask = keepable(cond["context"]).to(self.device), cond.tensors.get("mask")
        if mask is None:
            return context, None
        if not bool(mask.bool().any(1).all()):
            raise PlanError("a prompt's mask marks no text at all")
        mask = keepable(mask).to(self.device)[:, : int(mask.sum(1).max())]
        return context[:, : mask.shape[1]], None if bool(mask.bool().all()) else mask

    def encode(self, pixels: Tensor, noise: Tensor | None = None) -> Tensor:
        """Latents of the posterior's mode, or a sample of it, each channel to mean 0 and deviation 1."""
        mean, std = self.normal()
        return (posterior(self, pixels, noise, frame=True) - mean) / std

    def decode(self, latents: Tensor) -> Tensor:
        """Pixels, clamped."""
        mean, std = self.normal()
        return decode_pixels(self, latents * std + mean, frame=True)

    def normal(self) -> tuple[Tensor, Tensor]:
        """latents_mean and latents_std, one number a channel."""
        config = self.pipe.vae.config
        means, stds = list(config.latents_mean), list(config.latents_std)
        whole = len(means) == len(stds) == config.z_dim and all(is_number(each) for each in means)
        if not (whole and all(is_number(each, 1e-6, 1e6) for each in stds)):
            raise PlanError(
                f"the autoencoder's config must have {config.z_dim} finite latents_mean and latents_std above 0, got "
                f"{means!r} and {stds!r}"
            )
        mean, std = torch.tensor([means, stds], device=self.device).view(2, 1, -1, 1, 1)
        return mean, std

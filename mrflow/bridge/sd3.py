"""Stable Diffusion 3 and 3.5 pipelines as backbones."""

import inspect
from dataclasses import replace

import torch
from torch import Tensor

from mrflow.backbone import Condition, FieldOptions
from mrflow.bridge.base import BRIDGED, KLBridged, check_batch, keepable, thousandths
from mrflow.bridge.blocks import SD3
from mrflow.bridge.facts import bridged_shift, downscale, parameters_of, vae_flops
from mrflow.errors import PlanError
from mrflow.flow import Velocity
from mrflow.model_info import FLUX, Architecture, LatentSpace, ModelInfo
from mrflow.models.transformer_model import repeat, side_by_side
from mrflow.protocols.pieces import StepFactory


class BridgedSD3(KLBridged):
    """Stable Diffusion 3 as its pipeline runs it: two CLIPs and T5 (or zeros without it), plain guidance."""

    accepts = ("StableDiffusion3Pipeline", "StableDiffusion3Img2ImgPipeline")
    family = SD3
    can = replace(BRIDGED, together=True)
    words = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    more_words = ("text_encoder_3", "tokenizer_3")
    networks = ("transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3")

    def check_parts(self) -> None:
        """Latents of the autoencoder in and out."""
        config, latent = self.pipe.transformer.config, self.pipe.vae.config.latent_channels
        if (config.in_channels, config.out_channels) != (latent, latent):
            raise PlanError(
                f"this transformer takes {config.in_channels} channels and gives {config.out_channels}, its "
                f"autoencoder has {latent}: not a text-to-image model"
            )
        clips = [getattr(self.pipe, name, None) for name in ("text_encoder", "text_encoder_2")]
        sizes = [clip.config.projection_dim for clip in clips if clip is not None]
        if sizes != sorted(sizes):
            raise PlanError(
                f"{type(self.pipe).__name__}: text_encoder gives vectors of {sizes[0]}, text_encoder_2 of {sizes[1]}; "
                "CLIP-L comes before the wider CLIP-G: exchange the two folders"
            )

    def widths(self) -> dict[str, int]:
        """T5's states."""
        return {"text_encoder_3": self.pipe.transformer.config.joint_attention_dim}

    def facts(self) -> ModelInfo:
        """The pipeline's own sizes. The even grid is the scheduler's, whose end is shifted twice."""
        encode, decode = vae_flops(self.pipe.vae)
        pipe, config = self.pipe, self.pipe.transformer.config
        default = inspect.signature(type(pipe).__call__).parameters["guidance_scale"].default
        dual = len(config.get("dual_attention_layers") or ())
        return ModelInfo(
            "sd3",
            LatentSpace("sd3", config.in_channels, downscale(pipe.vae), config.patch_size),
            bridged_shift(pipe.scheduler, own_grid=True),
            cfg=float(default if self._guidance is None else self._guidance),
            architecture=Architecture(
                config.num_attention_heads * config.attention_head_dim,
                config.num_layers,
                0,
                config.joint_attention_dim,
                77 + self._t5_tokens(),
                parameters_of(pipe.transformer),
                4.0 + 2.0 * dual / config.num_layers,  # a block's second attention: 8 d^2 in its linears
            ),
            upscale=FLUX.upscale,
            upscale_flops=FLUX.upscale_flops,
            encode=encode,
            decode=decode,
        )

    def _t5_tokens(self) -> int:
        return self._text_tokens or 256

    def encode_words(self, prompts: list[str]) -> dict[str, Tensor]:
        """States (b, 77 + T5's, context), CLIPs first, and the CLIPs' pooled vectors (b, pooled)."""
        if self.pipe.tokenizer_3 is not None:
            self.tell_lost(self.pipe.tokenizer_3, prompts, self._t5_tokens())
        context, _, pooled, _ = self.pipe.encode_prompt(
            prompt=prompts,
            prompt_2=None,
            prompt_3=None,
            device=self.device,
            do_classifier_free_guidance=False,
            max_sequence_length=self._t5_tokens(),
        )
        return {"context": context, "pooled": pooled}

    def make_field(self, cond: Condition, options: FieldOptions, step: StepFactory | None) -> Velocity:
        """The velocity; conditions of equal shapes are a larger batch, as in the pipeline, others take turns."""
        if options.beside:
            conds = (cond, *options.beside)
            if len({str([(name, t.shape) for name, t in sorted(c.tensors.items())]) for c in conds}) > 1:
                fields = [self.make_field(c, replace(options, beside=()), step) for c in conds]
                return lambda x, sigma: torch.cat([f(x, sigma) for f in fields])
            joined = self.make_field(side_by_side(cond, options.beside), replace(options, beside=()), step)
            return repeat(joined, len(conds))
        info, device, config = self.info, self.device, self.pipe.transformer.config
        needs = {"context": config.joint_attention_dim, "pooled": config.pooled_projection_dim}
        net, branch, moved = self.begin(cond, options, step, needs)
        context, pooled = (keepable(cond[name]).to(device) for name in ("context", "pooled"))
        patch = config.patch_size
        most = (config.pos_embed_max_size or 0) * patch

        def velocity(x: Tensor, sigma: float) -> Tensor:
            check_batch(x, cond.batch)
            if most and max(x.shape[2:]) > most:
                scale = info.space.downscale
                raise PlanError(f"{info.name} knows positions up to {most * scale} pixels a side; make it smaller")
            with self.working(moved=moved), branch():
                out: Tensor = net(
                    hidden_states=keepable(x).to(device, context.dtype),
                    timestep=thousandths(sigma, cond.batch, device),
                    encoder_hidden_states=context,
                    pooled_projections=pooled,
                    return_dict=False,
                )[0]
                return out.float().to(x.device)

        return velocity

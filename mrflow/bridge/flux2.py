"""FLUX.2 pipelines as backbones: Klein, base and distilled, and dev."""

from dataclasses import replace
from typing import Any, ClassVar

import torch
from einops import rearrange
from torch import Tensor

from mrflow.backbone import Condition, FieldOptions
from mrflow.bridge.base import (
    BRIDGED,
    Bridged,
    check_condition,
    decode_pixels,
    has_hooks,
    in_parts,
    keepable,
    posterior,
    thousandths,
)
from mrflow.bridge.blocks import FLUX2
from mrflow.bridge.facts import bridged_shift, downscale, parameters_of, vae_flops
from mrflow.display.notes import note
from mrflow.errors import PlanError
from mrflow.flow import Velocity
from mrflow.model_info import FLUX, Architecture, ByStep, LatentSpace, ModelInfo, Shift
from mrflow.protocols.pieces import StepFactory
from mrflow.protocols.tokens import PackedCall

# mu as a line in the tokens, for many steps and for ten (diffusers `compute_empirical_mu`).
MANY, TEN = (0.00016927, 0.45666666), (8.73809524e-05, 1.89833333)


class BridgedFlux2(Bridged):
    """FLUX.2 Klein as its pipeline runs it: Qwen3's states, four-axis positions, normalised patches as latents.

    Its latents are the autoencoder's 2 x 2 patches, brought to mean 0 and deviation 1 by the running statistics of the
    autoencoder's batch norm: one latent cell is a token of 16 x 16 pixels.
    """

    accepts = ("Flux2KleinPipeline",)
    embedded: ClassVar[bool] = False  # whether the transformer has a guidance embedding
    family = FLUX2
    can = replace(BRIDGED, positions=True)

    def check_parts(self) -> None:
        """Patches of the autoencoder's latents in and out, no guidance embedding."""
        config, latent = self.pipe.transformer.config, 4 * self.pipe.vae.config.latent_channels
        out = config.out_channels or config.in_channels
        if (config.in_channels, out) != (latent, latent):
            raise PlanError(
                f"this FLUX.2 takes {config.in_channels} channels a token and gives {out}, its autoencoder has {latent}"
            )
        if bool(config.guidance_embeds) is not self.embedded:
            has = "has a" if config.guidance_embeds else "has no"
            raise PlanError(f"this FLUX.2 {has} guidance embedding, which {self.accepts[0]} does not go with")

    def facts(self) -> ModelInfo:
        """The pipeline's own sizes; guidance by whether it says that it is distilled."""
        distilled = bool(self.pipe.config.get("is_distilled"))
        scale = 1.0 if distilled else 4.0
        cfg = scale if self._guidance is None else self._guidance
        return replace(self._sizes("flux2-klein" if distilled else "flux2-klein-base"), cfg=cfg)

    def _sizes(self, name: str) -> ModelInfo:
        """What follows from the parts alone."""
        encode, decode = vae_flops(self.pipe.vae)
        pipe, config = self.pipe, self.pipe.transformer.config
        return ModelInfo(
            name,
            LatentSpace("flux2", config.in_channels, 2 * downscale(pipe.vae), 1),
            flux2_shift(pipe.scheduler),
            architecture=Architecture(
                config.num_attention_heads * config.attention_head_dim,
                config.num_layers,
                config.num_single_layers,
                config.joint_attention_dim,
                self._text_tokens or 512,
                parameters_of(pipe.transformer),
                1.5 * config.mlp_ratio,  # three matrices in its gated MLP, where this counts two
            ),
            upscale=FLUX.upscale,
            upscale_flops=FLUX.upscale_flops,
            encode=encode,
            decode=decode,
        )

    def encode_words(self, prompts: list[str]) -> dict[str, Tensor]:
        """States of three layers of Qwen3 side by side (b, text tokens, context); padding is seen too."""
        limit, tokenizer = self._text_tokens or 512, self.pipe.tokenizer
        said = [chat(tokenizer, prompt, thinking=False) for prompt in prompts]
        self.tell_lost(tokenizer, said, limit)
        context, _ = self.pipe.encode_prompt(prompt=prompts, device=self.device, max_sequence_length=limit)
        return {"context": context}

    def make_field(self, cond: Condition, options: FieldOptions, step: StepFactory | None) -> Velocity:
        """The velocity of one branch."""
        net, info, device = self.network(step), self.info, self.device
        check_condition(info, cond, {"context": self.pipe.transformer.config.joint_attention_dim})
        strength = self.strength(options.guidance, cond.batch)
        context = keepable(cond["context"]).to(device)
        branch, moved = self.branch(), has_hooks(self.pipe.transformer)
        text_ids = positions(1, 1, context.shape[1], cond.batch, device)

        def one(tokens: Tensor, sigma: float, h: int, w: int, part: int) -> Tensor:
            ids = positions(h, w, 1, cond.batch, device)
            if options.positions is not None:
                ids = ids.float()
                ids[..., 1:3] = options.positions.part(part).to(ids)
            with self.working(moved=moved), branch():
                out: Tensor = net(
                    hidden_states=keepable(tokens).to(device, self.pipe.transformer.dtype),
                    timestep=thousandths(sigma, cond.batch, device).to(context.dtype) / 1000,
                    guidance=strength,
                    encoder_hidden_states=context,
                    txt_ids=text_ids,
                    img_ids=ids,
                    return_dict=False,
                )[0].float()
                return out.to(tokens.device)

        return PackedCall(in_parts(one, options.positions, cond.batch), patch=1)

    def strength(self, value: float | None, batch: int) -> Tensor | None:
        """What the guidance embedding is given, (batch,); None where there is none.

        Raises:
            PlanError: a value, and no embedding.
        """
        if value is not None:
            raise PlanError(f"{self.info.name} has no guidance embedding; use CFG(scale)")
        return None

    def encode(self, pixels: Tensor, noise: Tensor | None = None) -> Tensor:
        """Normalised patches of the posterior's mode, or of a sample of it; `noise` has the latents' shape."""
        given = None if noise is None else unpatchify(noise)
        z = patchify(posterior(self, pixels, given))
        mean, std = self._normal(z)
        return (z - mean) / std

    def decode(self, latents: Tensor) -> Tensor:
        """Pixels, clamped."""
        mean, std = self._normal(latents)
        return decode_pixels(self, unpatchify(latents * std + mean))

    def _normal(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """The batch norm's running mean and deviation, (1, channels, 1, 1)."""
        vae = self.pipe.vae
        mean, variance = (statistic(vae.bn, name).float().to(like.device) for name in ("running_mean", "running_var"))
        deviation = (variance + vae.config.batch_norm_eps).sqrt()
        return mean.view(1, -1, 1, 1), deviation.view(1, -1, 1, 1)


class BridgedFlux2Dev(BridgedFlux2):
    """FLUX.2-dev: as Klein, with a distilled guidance embedding, and states of Mistral's text model."""

    accepts = ("Flux2Pipeline",)
    embedded = True

    def facts(self) -> ModelInfo:
        """The pipeline's own sizes and its default guidance of 4."""
        return replace(self._sizes("flux2-dev"), guidance=4.0 if self._guidance is None else self._guidance)

    def encode_words(self, prompts: list[str]) -> dict[str, Tensor]:
        """States of three layers side by side (b, text tokens, context), behind the system message; padding too."""
        limit, pipe = self._text_tokens or int(self.pipe.tokenizer_max_length), self.pipe
        for prompt in prompts:
            turns = [("system", pipe.system_message), ("user", prompt)]
            said = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in turns]
            ids = pipe.tokenizer.apply_chat_template([said], tokenize=True, return_dict=True)["input_ids"][0]
            if len(ids) > limit:
                note(f"a prompt of {len(ids)} tokens is cut to {limit}: the end of {prompt[:40]!r}... is not seen")
        context, _ = pipe.encode_prompt(prompt=prompts, device=self.device, max_sequence_length=limit)
        return {"context": context}

    def strength(self, value: float | None, batch: int) -> Tensor | None:
        """The guidance of each item, (batch,)."""
        chosen = self.info.guidance if value is None else value
        return torch.full((batch,), float(chosen or 0.0), device=self.device)


def statistic(norm: Any, name: str) -> Tensor:  # noqa: ANN401
    """A buffer of a norm, from where an offload hook keeps it if it was taken away."""
    tensor: Tensor = getattr(norm, name)
    held = getattr(getattr(norm, "_hf_hook", None), "weights_map", None)
    return tensor if tensor.device.type != "meta" or held is None else held[name]


def flux2_shift(scheduler: Any) -> Shift:  # noqa: ANN401
    """The pipeline's own mu, which depends on tokens and steps, where its scheduler shifts by resolution."""
    found = bridged_shift(scheduler)
    if not scheduler.config.get("use_dynamic_shifting"):
        return found
    low, high = ((MANY[0] * n + MANY[1], TEN[0] * n + TEN[1]) for n in (256, 4096))
    few = ByStep(low[1], high[1])
    return Shift(low[0], high[0], terminal=found.terminal, kind=found.kind, by_step=few)


def positions(rows: int, columns: int, words: int, batch: int, device: torch.device) -> Tensor:
    """Positions (time, row, column, word) of a grid, (batch, rows x columns x words, 4)."""
    axes = [torch.arange(n, device=device) for n in (1, rows, columns, words)]
    return torch.cartesian_prod(*axes)[None].repeat(batch, 1, 1)


def patchify(z: Tensor) -> Tensor:
    """2 x 2 cells as one, channel slowest."""
    return rearrange(z, "b c (h p) (w q) -> b (c p q) h w", p=2, q=2)


def unpatchify(z: Tensor) -> Tensor:
    """The inverse of `patchify`."""
    return rearrange(z, "b (c p q) h w -> b c (h p) (w q)", p=2, q=2)


def chat(tokenizer: Any, prompt: str, *, thinking: bool) -> str:  # noqa: ANN401
    """A prompt as the user's turn of Qwen3's chat, ready for the answer."""
    said = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True, enable_thinking=thinking
    )
    return str(said)

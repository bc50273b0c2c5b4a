"""Krea-2 pipelines as backbones, base and distilled."""

from dataclasses import replace

from torch import Tensor

from mrflow.backbone import Condition, FieldOptions
from mrflow.bridge.base import check_batch, keepable, thousandths
from mrflow.bridge.blocks import KREA2, OpenedForward
from mrflow.bridge.facts import bridged_shift, parameters_of
from mrflow.bridge.qwen import PUBLISHED_BASE, BridgedQwen
from mrflow.errors import PlanError
from mrflow.flow import Velocity
from mrflow.model_info import QWEN, Architecture, LatentSpace, ModelInfo
from mrflow.protocols.pieces import StepFactory
from mrflow.protocols.tokens import PackedCall

MU = 1.15  # of the distilled checkpoint, at every size


class BridgedKrea2(BridgedQwen):
    """Krea-2 as its pipeline runs it: Qwen-Image's autoencoder, a stack of Qwen3-VL's states, one stream.

    The pipeline's guidance_scale counts from the conditional branch: cfg is 1 + guidance_scale, 5.5 for the base model
    and 1 for the distilled.
    """

    accepts = ("Krea2Pipeline",)
    family = KREA2

    def check_parts(self) -> None:
        """Patches of 2 x 2 of the autoencoder's latents."""
        given, latent = self.pipe.transformer.config.in_channels, 4 * self.pipe.vae.config.z_dim
        if given != latent or self.pipe.config.patch_size != 2:
            raise PlanError(f"this Krea-2 takes {given} channels a token, its autoencoder has {latent}")

    def facts(self) -> ModelInfo:
        """The pipeline's own sizes, with the autoencoder of Qwen-Image; guidance by whether it is distilled."""
        pipe, config = self.pipe, self.pipe.transformer.config
        distilled, found = bool(pipe.config.get("is_distilled")), bridged_shift(pipe.scheduler)
        dynamic = bool(pipe.scheduler.config.get("use_dynamic_shifting"))
        hidden = config.num_attention_heads * config.attention_head_dim
        # Queries and outputs are square, keys and values narrower; the gated MLP has three matrices.
        attention = 2 + 2 * config.num_key_value_heads / config.num_attention_heads
        ratio = (3 * config.intermediate_size / hidden + attention - 4) / 2
        vae = pipe.vae.config
        published = vae.base_dim == PUBLISHED_BASE
        return replace(
            QWEN,
            name="krea2-turbo" if distilled else "krea2",
            space=LatentSpace("qwen-image", vae.z_dim, 2 ** len(vae.temperal_downsample)),
            shift=replace(found, low=MU, high=MU) if distilled and dynamic else found,
            cfg=(1.0 if distilled else 5.5) if self._guidance is None else self._guidance,
            rescale=False,
            negative="",
            native_steps=8 if distilled else 28,
            architecture=Architecture(
                hidden,
                0,
                config.num_layers,
                config.text_hidden_dim,
                self._text_tokens or 512,
                parameters_of(pipe.transformer),
                ratio,
            ),
            encode=QWEN.encode if published else (0.0, 0.0),
            decode=QWEN.decode if published else (0.0, 0.0),
            footprint=None,
        )

    def encode_words(self, prompts: list[str]) -> dict[str, Tensor]:
        """States of several layers (b, tokens, layers, width) and a mask (b, tokens): padding lies before the end."""
        limit, pipe = self._text_tokens or 512, self.pipe
        prefix, suffix = pipe.prompt_template_encode_start_idx, pipe.prompt_template_encode_num_suffix_tokens
        said = [pipe.prompt_template_encode_prefix + prompt for prompt in prompts]
        self.tell_lost(pipe.tokenizer, said, limit + prefix - suffix)
        context, mask = pipe.encode_prompt(prompt=prompts, device=self.device, max_sequence_length=limit)
        return {"context": context, "mask": mask.long()}

    def make_field(self, cond: Condition, options: FieldOptions, step: StepFactory | None) -> Velocity:
        """The velocity of one branch; padding is masked."""
        device, needs = self.device, {"context": self.pipe.transformer.config.text_hidden_dim, "mask": 0}
        net, branch, moved = self.begin(cond, options, step, needs)
        context, mask = keepable(cond["context"]).to(device), keepable(cond["mask"]).to(device).bool()
        if not bool(mask.any(1).all()):
            raise PlanError("a prompt's mask marks no text at all")

        def velocity(tokens: Tensor, sigma: float, h: int, w: int) -> Tensor:
            check_batch(tokens, cond.batch)
            if isinstance(net, OpenedForward):
                net.pieces.image = h * w
            with self.working(moved=moved), branch():
                out: Tensor = net(
                    hidden_states=keepable(tokens).to(device, context.dtype),
                    encoder_hidden_states=context,
                    timestep=(thousandths(sigma, cond.batch, device) / 1000).to(context.dtype),
                    position_ids=self.pipe.prepare_position_ids(context.shape[1], h, w, device),
                    encoder_attention_mask=mask,
                    return_dict=False,
                )[0].float()
                return out.to(tokens.device)

        return PackedCall(velocity)

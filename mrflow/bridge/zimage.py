"""Z-Image pipelines as backbones, Turbo first of all."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from mrflow.backbone import Condition, FieldOptions
from mrflow.bridge.base import BRIDGED, KLBridged, check_batch, check_condition, keepable, thousandths
from mrflow.bridge.blocks import Z_IMAGE, OpenedForward
from mrflow.bridge.facts import bridged_shift, downscale, parameters_of, vae_flops
from mrflow.bridge.flux2 import chat
from mrflow.errors import PlanError
from mrflow.flow import Velocity
from mrflow.model_info import FLUX, Architecture, LatentSpace, ModelInfo
from mrflow.models.transformer_model import repeat, side_by_side
from mrflow.protocols.pieces import StepFactory

GATED = 4.0  # its gated MLP of three matrices of 8/3 widths counts as two of four


class BridgedZImage(KLBridged):
    """Z-Image as its pipeline runs it: lists of pictures and texts, time that counts from noise, the sign turned.

    Without `guidance` it is used as Turbo is: in one pass. The undistilled model takes guidance = 1 + guidance_scale of
    its pipeline, which adds guidance_scale times the difference to the conditional branch.
    """

    accepts = ("ZImagePipeline", "ZImageImg2ImgPipeline")
    family = Z_IMAGE
    can = replace(BRIDGED, together=True)

    def check_parts(self) -> None:
        """Patches of 2 x 2, no picture as a condition."""
        config, latent = self.pipe.transformer.config, self.pipe.vae.config.latent_channels
        if config.in_channels != latent or 2 not in config.all_patch_size or 1 not in config.all_f_patch_size:
            raise PlanError(f"this Z-Image takes {config.in_channels} channels, its autoencoder has {latent}")
        if config.get("siglip_feat_dim") is not None:
            raise PlanError("this Z-Image takes pictures as a condition (Omni, Edit): not supported")

    def facts(self) -> ModelInfo:
        """The pipeline's own sizes."""
        encode, decode = vae_flops(self.pipe.vae)
        pipe, config = self.pipe, self.pipe.transformer.config
        return ModelInfo(
            "z-image",
            LatentSpace("z-image", config.in_channels, downscale(pipe.vae)),
            bridged_shift(pipe.scheduler),
            cfg=1.0 if self._guidance is None else self._guidance,
            architecture=Architecture(
                config.dim,
                0,
                config.n_layers + config.n_refiner_layers,
                config.cap_feat_dim,
                64,
                parameters_of(pipe.transformer),
                GATED,
            ),
            upscale=FLUX.upscale,
            upscale_flops=FLUX.upscale_flops,
            encode=encode,
            decode=decode,
        )

    def encode_words(self, prompts: list[str]) -> dict[str, Tensor]:
        """States (b, longest, width) of Qwen3's last layer but one, zeros behind, and a mask (b, longest)."""
        limit, tokenizer = self._text_tokens or 512, self.pipe.tokenizer
        self.tell_lost(tokenizer, [chat(tokenizer, prompt, thinking=True) for prompt in prompts], limit)
        states, _ = self.pipe.encode_prompt(
            prompt=list(prompts), device=self.device, do_classifier_free_guidance=False, max_sequence_length=limit
        )
        lengths = torch.tensor([len(s) for s in states], device=self.device)
        context = torch.nn.utils.rnn.pad_sequence(states, batch_first=True)
        mask = torch.arange(context.shape[1], device=self.device) < lengths[:, None]
        return {"context": context, "mask": mask.long()}

    def make_field(self, cond: Condition, options: FieldOptions, step: StepFactory | None) -> Velocity:
        """The velocity; conditions beside are a larger batch, as in the pipeline."""
        if conds := options.beside:
            joined = self.make_field(self._side_by_side((cond, *conds)), replace(options, beside=()), step)
            return repeat(joined, 1 + len(conds))
        device, own = self.device, self.pipe.transformer
        net, branch, moved = self.begin(cond, options, step, {"context": own.config.cap_feat_dim, "mask": 0})
        texts = self._texts(cond)

        def velocity(x: Tensor, sigma: float) -> Tensor:
            check_batch(x, len(texts))
            if isinstance(net, OpenedForward):
                net.pieces.image = (x.shape[2] // 2) * (x.shape[3] // 2)
            with self.working(moved=moved), branch():
                pictures = keepable(x).to(device, own.dtype)[:, :, None].unbind(0)
                time = (1000 - thousandths(sigma, len(texts), device)) / 1000
                out = net(list(pictures), time, list(texts), return_dict=False)[0]
                return -torch.stack([o.float() for o in out])[:, :, 0].to(x.device)

        return velocity

    def _side_by_side(self, conds: Sequence[Condition]) -> Condition:
        """Conditions as one over a larger batch, as the pipeline has them: texts as wide as the longest."""
        longest = max(check_condition(self.info, c, {"context": 0, "mask": 0})["context"].shape[1] for c in conds)

        def wide(cond: Condition) -> Condition:
            rest = longest - cond["context"].shape[1]
            pads = {name: t.new_zeros(cond.batch, rest, *t.shape[2:]) for name, t in cond.tensors.items()}
            return Condition({name: torch.cat((t, pads[name]), 1) for name, t in cond.tensors.items()})

        first, *others = map(wide, conds)
        return side_by_side(first, others)

    def _texts(self, cond: Condition) -> list[Tensor]:
        """Each item's own states."""
        lengths = [int(n) for n in cond["mask"].sum(1)]
        if min(lengths) == 0:
            raise PlanError("a prompt's mask marks no text at all")
        context = keepable(cond["context"]).to(self.device)
        return [item[:length] for item, length in zip(context, lengths, strict=True)]

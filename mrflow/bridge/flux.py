"""FLUX.1 pipelines as backbones: dev, schnell and their fine-tunes, with or without a ControlNet."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mrflow.backbone import Condition, FieldOptions
from mrflow.bridge.base import (
    BRIDGED,
    KLBridged,
    Pipeline,
    check_condition,
    has_hooks,
    home,
    in_parts,
    keepable,
    thousandths,
)
from mrflow.bridge.blocks import FLUX as FAMILY
from mrflow.bridge.facts import bridged_shift, downscale, parameters_of, vae_flops
from mrflow.errors import PlanError
from mrflow.flow import Velocity, finite
from mrflow.model_info import Architecture, LatentSpace, ModelInfo, flux_facts
from mrflow.models.flux.transformer import image_ids
from mrflow.protocols.pieces import StepFactory
from mrflow.protocols.tokens import PackedCall, pack
from mrflow.protocols.upscaler import Upscaler
from mrflow.stages.upscale import resize


@dataclass(frozen=True, eq=False)
class Control:
    """A picture that a ControlNet follows, the same in every stage: resized to each stage's size.

    `pixels` are float (1, 3, height, width) in [0, 1], as `mrflow.read_image` gives. `scale` weighs the ControlNet,
    `low` <= sigma <= `high` is where it acts, `mode` chooses one of a union model's kinds.
    """

    pixels: Tensor
    scale: float = 1.0
    mode: int | None = None
    low: float = 0.0
    high: float = 1.0

    def __post_init__(self) -> None:
        if self.pixels.ndim != 4 or self.pixels.shape[:2] != (1, 3) or not finite(self.pixels):
            raise PlanError(f"a control picture must be finite pixels (1, 3, h, w), got {tuple(self.pixels.shape)}")
        if not 0.0 <= self.low < self.high <= 1.0:
            raise PlanError(f"a control must act in 0 <= low < high <= 1, got low {self.low!r}, high {self.high!r}")

    def fingerprint(self) -> str:
        """A digest of the picture and how it is used."""
        data = self.pixels.detach().float().cpu().contiguous().numpy().tobytes()
        facts = repr((tuple(self.pixels.shape), self.scale, self.mode, self.low, self.high))
        return hashlib.sha256(data + facts.encode()).hexdigest()


class BridgedFlux(KLBridged):
    """FLUX.1 as its pipeline runs it: distilled guidance, packed tokens, CLIP's pooled vector and T5's states."""

    accepts = ("FluxPipeline", "FluxImg2ImgPipeline", "FluxControlNetPipeline", "FluxControlNetImg2ImgPipeline")
    family = FAMILY
    can = replace(BRIDGED, positions=True)
    words = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    networks = ("transformer", "vae", "text_encoder", "text_encoder_2", "controlnet")

    def __init__(
        self,
        pipe: Pipeline,
        *,
        guidance: float | None = None,
        text_tokens: int | None = None,
        control: Control | None = None,
        upscaler: Upscaler | None = None,
    ) -> None:
        self.control = control
        super().__init__(pipe, guidance=guidance, text_tokens=text_tokens, upscaler=upscaler)

    def check_parts(self) -> None:
        """Tokens of the autoencoder's latents in and out; a control where there is a ControlNet, and nowhere else."""
        config, latent = self.pipe.transformer.config, 4 * self.pipe.vae.config.latent_channels
        out = config.out_channels or config.in_channels
        if (config.in_channels, out) != (latent, latent):
            raise PlanError(
                f"this FLUX takes {config.in_channels} channels a token and gives {out}, its autoencoder has {latent}: "
                "models with an image condition (Fill, Canny, Depth) are not supported"
            )
        net = getattr(self.pipe, "controlnet", None)
        if net is None and self.control is not None:
            raise PlanError(f"{type(self.pipe).__name__} has no ControlNet for control=; use FluxControlNetPipeline")
        if net is not None and self.control is None:
            raise PlanError("a pipeline with a ControlNet needs its picture: pass control=Control(pixels)")
        if net is not None and not hasattr(net, "input_hint_block"):
            raise PlanError(f"{type(net).__name__} is not supported; give the pipeline one FluxControlNetModel")
        if self._guidance is not None and not config.guidance_embeds:
            raise PlanError("this FLUX has no guidance embedding; leave guidance out, or use CFG(scale) in the chain")

    def widths(self) -> dict[str, int]:
        """CLIP's pooled vector and T5's states."""
        config = self.pipe.transformer.config
        return {"text_encoder": config.pooled_projection_dim, "text_encoder_2": config.joint_attention_dim}

    def facts(self) -> ModelInfo:
        """FLUX.1-dev's or -schnell's facts, told apart by the guidance embedding, with the pipeline's own sizes."""
        encode, decode = vae_flops(self.pipe.vae)
        pipe, config = self.pipe, self.pipe.transformer.config
        curve = bridged_shift(pipe.scheduler)
        base = flux_facts(guidance=config.guidance_embeds, curve=curve)
        assert base.architecture is not None
        hidden = config.num_attention_heads * config.attention_head_dim
        return replace(
            base,
            space=LatentSpace("flux1", pipe.vae.config.latent_channels, downscale(pipe.vae)),
            shift=curve,
            guidance=self._guidance if self._guidance is not None else base.guidance,
            architecture=Architecture(
                hidden,
                config.num_layers,
                config.num_single_layers,
                config.joint_attention_dim,
                self._text_tokens or base.architecture.text_tokens,
                parameters_of(pipe.transformer),
            ),
            footprint=None,
            encode=encode,
            decode=decode,
        )

    def identity(self) -> tuple[object, ...]:
        """The control too."""
        return (*super().identity(), None if self.control is None else self.control.fingerprint())

    def encode_words(self, prompts: list[str]) -> dict[str, Tensor]:
        """T5 states (b, text tokens, context) and CLIP's pooled vector (b, pooled)."""
        architecture = self.facts().architecture
        assert architecture is not None
        limit = architecture.text_tokens
        self.tell_lost(self.pipe.tokenizer_2, prompts, limit)
        context, pooled, _ = self.pipe.encode_prompt(
            prompt=prompts, prompt_2=None, device=self.device, max_sequence_length=limit
        )
        return {"context": context, "pooled": pooled}

    def make_field(self, cond: Condition, options: FieldOptions, step: StepFactory | None) -> Velocity:
        """The velocity, with the guidance embedding where the model has one."""
        net, config = self.network(step), self.pipe.transformer.config
        info, device = self.info, self.device
        check_condition(info, cond, {"context": config.joint_attention_dim, "pooled": config.pooled_projection_dim})
        if options.guidance is not None and not config.guidance_embeds:
            raise PlanError(f"{info.name} has no guidance embedding; use CFG(scale)")
        if self.control is not None and (step is not None or options.positions is not None):
            raise PlanError("a ControlNet adds to every block of a whole grid: no cache and no regions beside control=")
        context, pooled = (keepable(cond[name]).to(device) for name in ("context", "pooled"))
        dtype, value = context.dtype, info.guidance if options.guidance is None else options.guidance
        strength = None if value is None else torch.full((cond.batch,), value, dtype=torch.float32, device=device)
        text_ids = torch.zeros(context.shape[1], 3, device=device, dtype=dtype)
        branch, control = self.branch(), self._controlled()
        moved = has_hooks(self.pipe.transformer) or (control is not None and has_hooks(self.pipe.controlnet))

        def one(tokens: Tensor, sigma: float, h: int, w: int, part: int) -> Tensor:
            ids = image_ids(h, w, device=device)
            if options.positions is not None:
                ids[:, 1:] = options.positions.part(part).to(ids)
            with self.working(moved=moved):
                given: dict[str, Any] = {
                    "hidden_states": keepable(tokens).to(device, dtype),
                    "timestep": thousandths(sigma, cond.batch, device).to(dtype) / 1000,
                    "encoder_hidden_states": context,
                    "pooled_projections": pooled,
                    "txt_ids": text_ids,
                    "img_ids": ids.to(dtype),
                    "return_dict": False,
                }
                if control is not None:
                    given |= control(given, strength, (2 * h, 2 * w), sigma)
                with branch():
                    out: Tensor = net(**given, guidance=strength)[0].float()
                return out.to(tokens.device)

        return PackedCall(in_parts(one, options.positions, cond.batch))

    def _controlled(self) -> Callable[[dict[str, Any], Tensor | None, tuple[int, int], float], dict[str, Any]] | None:
        """What the ControlNet adds to a call of the transformer; its picture is prepared once a size."""
        control = self.control
        if control is None:
            return None
        net, seen = self.pipe.controlnet, dict[tuple[int, int], Tensor]()
        through_vae = net.input_hint_block is None

        def residuals(
            given: dict[str, Any], strength: Tensor | None, cells: tuple[int, int], sigma: float
        ) -> dict[str, Any]:
            if not control.low <= sigma <= control.high:
                return {}
            tokens = given["hidden_states"]
            if cells not in seen:
                scale = downscale(self.pipe.vae)
                pixels = control.pixels.to(self.device, torch.float32)
                pixels = resize(pixels, cells[0] * scale, cells[1] * scale).clamp(0, 1)
                seen[cells] = pack(self.encode(pixels)) if through_vae else 2 * pixels - 1
            picture = seen[cells].expand(len(tokens), *seen[cells].shape[1:])
            mode = control.mode
            blocks, singles = net(
                **given,
                controlnet_cond=picture.to(home(net), tokens.dtype),
                controlnet_mode=None if mode is None else torch.full((len(tokens), 1), mode, device=tokens.device),
                conditioning_scale=control.scale,
                guidance=strength if net.config.guidance_embeds else None,
            )
            return {
                "controlnet_block_samples": blocks,
                "controlnet_single_block_samples": singles,
                "controlnet_blocks_repeat": not through_vae,
            }

        return residuals

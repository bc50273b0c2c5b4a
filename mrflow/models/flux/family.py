"""FLUX.1: its files, its names, its facts, and how it is built."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch

from mrflow.checkpoints.safetensors import Header
from mrflow.display.notes import note
from mrflow.model_info import FLUX, SCHNELL, ModelInfo, flux_facts
from mrflow.models.family import Files
from mrflow.models.flux.backbone import Flux1
from mrflow.models.flux.text import TextFiles, find_text, prepare_text
from mrflow.models.flux.transformer import Flux
from mrflow.models.flux.vae import VaeFlux
from mrflow.models.flux.weights import (
    FLUX_AUTOENCODER,
    FLUX_TRANSFORMER,
    flux_diffusers,
    flux_names,
    flux_params,
    vae_names,
    vae_params,
)
from mrflow.models.latent_model import own_facts
from mrflow.models.transformer_family import TransformerFamily

NATIVE = "decoder.mid.block_1.conv1.weight"  # a name of BFL's autoencoder that the other layout changes
# XLabs' adapters name a block's joint projections by their processors.
XLABS = {
    "processor.proj_lora1": "img_attn.proj",
    "processor.proj_lora2": "txt_attn.proj",
    "processor.qkv_lora1": "img_attn.qkv",
    "processor.qkv_lora2": "txt_attn.qkv",
}
XLABS_SINGLE = {"processor.qkv_lora": "linear1", "processor.proj_lora": "linear2"}


class FluxFamily(TransformerFamily):
    """FLUX.1-dev, -schnell, and models of their architecture, in Black Forest Labs' layout or diffusers'."""

    name = "FLUX"
    parts = (FLUX_TRANSFORMER, FLUX_AUTOENCODER)
    transformer, autoencoder = FLUX_TRANSFORMER.what, FLUX_AUTOENCODER.what
    marks = ("double_blocks.0.img_attn.qkv.weight", "single_transformer_blocks.0.norm.linear.weight")
    autoencoder_marks = ("decoder.up.0.block.0.norm1.weight", "decoder.up_blocks.0.resnets.0.norm1.weight")
    text_marks: ClassVar[Mapping[str, str]] = {
        "text_model.embeddings.token_embedding.weight": "a CLIP text encoder",
        "embeddings.token_embedding.weight": "a CLIP text encoder",
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": "a T5 encoder",
    }
    pipelines = ("FluxPipeline", "FluxImg2ImgPipeline")
    published: ClassVar[Mapping[str, ModelInfo]] = {
        "black-forest-labs/FLUX.1-dev": FLUX,
        "black-forest-labs/FLUX.1-schnell": SCHNELL,
    }
    network = Flux
    model = Flux1
    text_layer = "block"
    no_chain = "fold=chain is for Qwen-Image; FLUX's modulations depend on the prompt too: use fold=True"
    text_tokens = True

    def names(self, parameter: str) -> tuple[str, ...]:
        """As diffusers publishes them."""
        return flux_diffusers(parameter)

    def find_text(self, folder: Path) -> TextFiles:
        """CLIP's and T5's files."""
        return find_text(folder)

    def prepare_text(
        self, files: TextFiles, *, dtype: torch.dtype | None, device: torch.device
    ) -> Callable[[], object]:
        """CLIP's and T5's, checked."""
        return prepare_text(files, dtype=dtype, device=device)

    def aliases(self, path: str) -> Mapping[str, int | None]:
        """XLabs' names; a single block's joint projection is meant without the MLP's rows."""
        kind, _, rest = path.partition(".")
        index, _, rest = rest.partition(".")
        table = XLABS if kind == "double_blocks" else XLABS_SINGLE
        return {f"{kind}.{index}.{alias}": 3 if alias == "processor.qkv_lora" else None
                for alias, own in table.items() if own == rest}  # fmt: skip

    def text_headers(self, files: Any) -> tuple[Header, ...]:  # noqa: ANN401
        """CLIP's and T5's."""
        return (files.clip, files.t5)

    def info(self, net: Flux, vae: VaeFlux, text: object, files: Files, parameters: int) -> ModelInfo:
        """FLUX.1-dev's or -schnell's, told apart by the guidance embedding, with the files' own sizes."""
        if not net.params.guidance and files.curve is None:
            note(
                f"{files.where} has no guidance embedding, and no scheduler configuration says its levels: taken for "
                "FLUX.1-schnell (shift 1, 256 text tokens). A de-distilled FLUX.1-dev needs shift=mrflow.FLUX.shift, "
                "text_tokens=512"
            )
        base, tokens = flux_facts(guidance=net.params.guidance, curve=files.curve), files.text_tokens
        return own_facts(base, net, vae, text, curve=files.curve, parameters=parameters, text_tokens=tokens)

    def describe(self, what: str, header: Header) -> list[str]:
        """Layout and sizes."""
        if what == self.transformer:
            names = flux_names(header)
            p = flux_params(header, names)
            layout = "diffusers" if names is flux_diffusers else "Black Forest Labs"
            variant = "with guidance embedding (dev)" if p.guidance else "without guidance embedding (schnell)"
            return [
                f"layout    {layout}, {variant}",
                f"sizes     width {p.hidden}, {p.heads} heads, {p.double_blocks} double and {p.single_blocks} single "
                f"blocks, {p.in_channels} channels a token, text {p.context}, pooled {p.pooled}",
            ]
        names = vae_names(header)
        v = vae_params(header, names)
        return [
            f"layout    {'Black Forest Labs' if names(NATIVE)[0].endswith(NATIVE) else 'diffusers'}",
            f"sizes     channels {', '.join(map(str, v.channels))}; {v.latent} latent channels",
        ]

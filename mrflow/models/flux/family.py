"""FLUX.1: its files, its names, its facts, and how it is built."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

from mrflow.checkpoints.safetensors import CheckedNetwork, Header
from mrflow.model_info import FLUX, SCHNELL, ModelInfo
from mrflow.models.family import Files
from mrflow.models.flux.backbone import Flux1, flux1_info
from mrflow.models.flux.text import find_text, prepare_text
from mrflow.models.flux.transformer import Flux
from mrflow.models.flux.vae import VaeFlux
from mrflow.models.flux.weights import (
    flux_diffusers,
    flux_names,
    flux_params,
    prepare_flux,
    prepare_vae_flux,
    vae_names,
    vae_params,
)
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
    transformer = "a FLUX transformer"
    autoencoder = "a FLUX autoencoder"
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
        """diffusers' names."""
        return flux_diffusers(parameter)

    def aliases(self, path: str) -> Mapping[str, int | None]:
        """XLabs' names; a single block's joint projection is meant without the MLP's rows."""
        kind, _, rest = path.partition(".")
        index, _, rest = rest.partition(".")
        table = XLABS if kind == "double_blocks" else XLABS_SINGLE
        return {f"{kind}.{index}.{alias}": 3 if alias == "processor.qkv_lora" else None
                for alias, own in table.items() if own == rest}  # fmt: skip

    def find_text(self, folder: Path) -> object:
        """CLIP and T5."""
        return find_text(folder)

    def prepare(self, header: Header, **how: Any) -> CheckedNetwork[Flux]:  # noqa: ANN401
        """In either layout."""
        return prepare_flux(header, **how)

    def prepare_autoencoder(self, header: Header, **how: Any) -> CheckedNetwork[VaeFlux]:  # noqa: ANN401
        """In either layout."""
        return prepare_vae_flux(header, **how)

    def prepare_text(self, files: Any, **how: Any) -> Callable[[], object]:  # noqa: ANN401
        """CLIP and T5."""
        return prepare_text(files, **how)

    def text_headers(self, files: Any) -> tuple[Header, ...]:  # noqa: ANN401
        """CLIP's and T5's."""
        return (files.clip, files.t5)

    def info(self, net: Flux, vae: VaeFlux, text: object, files: Files, parameters: int) -> ModelInfo:
        """FLUX.1-dev's or -schnell's, told apart by the guidance embedding, with the files' own sizes."""
        return flux1_info(net, vae, text, files.curve, files.text_tokens, parameters, path=files.where)

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

"""Z-Image: its files, its names, its facts, and how it is built."""

from collections.abc import Mapping
from typing import ClassVar

from mrflow.checkpoints.safetensors import Header
from mrflow.model_info import ModelInfo
from mrflow.models.encoders import PREFIXES
from mrflow.models.family import Files
from mrflow.models.flux.family import FluxFamily
from mrflow.models.flux.vae import VaeFlux
from mrflow.models.flux.weights import FLUX_AUTOENCODER
from mrflow.models.latent_model import own_facts
from mrflow.models.transformer_family import TransformerFamily
from mrflow.models.zimage.backbone import ZImageModel
from mrflow.models.zimage.facts import TURBO, UNDISTILLED
from mrflow.models.zimage.text import ZImageText
from mrflow.models.zimage.transformer import ZImage
from mrflow.models.zimage.weights import (
    ZIMAGE_TRANSFORMER,
    single_file,
    zimage_diffusers,
    zimage_names,
    zimage_params,
)


class ZImageFamily(TransformerFamily):
    """Z-Image-Turbo, Z-Image, and models of their architecture, in single files or diffusers' layout."""

    name = "Z-Image"
    parts = (ZIMAGE_TRANSFORMER, FLUX_AUTOENCODER)
    transformer, autoencoder = ZIMAGE_TRANSFORMER.what, FLUX_AUTOENCODER.what
    marks = ("x_pad_token",)
    autoencoder_marks = FluxFamily.autoencoder_marks
    text_marks: ClassVar[Mapping[str, str]] = {
        f"{prefix}layers.0.self_attn.q_norm.weight": ZImageText.encoder for prefix in PREFIXES
    }
    takes = "x_embedder.weight"
    words = ZImageText
    pipelines = ("ZImagePipeline", "ZImageImg2ImgPipeline")
    published: ClassVar[Mapping[str, ModelInfo]] = {
        "Tongyi-MAI/Z-Image-Turbo": TURBO,
        "Tongyi-MAI/Z-Image": UNDISTILLED,
    }
    network = ZImage
    model = ZImageModel

    def names(self, parameter: str) -> tuple[str, ...]:
        """As diffusers publishes them."""
        return zimage_diffusers(parameter)

    def aliases(self, path: str) -> Mapping[str, int | None]:
        """The single files' names, where ours differ."""
        (own,) = single_file(f"{path}.weight")
        return {own.removesuffix(".weight"): None}

    def info(self, net: ZImage, vae: VaeFlux, text: object, files: Files, parameters: int) -> ModelInfo:
        """Z-Image-Turbo's or Z-Image's, told apart by the scheduler's factor, with the files' own sizes.

        They have the same tensors: a factor of 3, and no configuration at all, is taken for Turbo.
        """
        base = TURBO if files.curve in (None, TURBO.shift) else UNDISTILLED
        return own_facts(base, net, vae, text, curve=files.curve, parameters=parameters)

    def describe(self, what: str, header: Header) -> list[str]:
        """Layout and sizes of the transformer; the autoencoder is described by its own family."""
        if what != self.transformer:
            return []
        names = zimage_names(header)
        p = zimage_params(header, names)
        return [
            f"layout    {'single file' if names is single_file else 'diffusers'}",
            f"sizes     width {p.hidden}, {p.heads} heads, {p.layers} blocks, {p.refiners} refiners each of image and "
            f"text, {p.in_channels} channels a token, text {p.context}",
        ]

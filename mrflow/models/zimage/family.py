"""Z-Image: its files, its names, its facts, and how it is built."""

from collections.abc import Mapping
from typing import Any, ClassVar

from mrflow.checkpoints.safetensors import CheckedNetwork, Header
from mrflow.model_info import ModelInfo
from mrflow.models.encoders import PREFIXES
from mrflow.models.family import Files
from mrflow.models.flux.family import FluxFamily
from mrflow.models.flux.vae import VaeFlux
from mrflow.models.flux.weights import prepare_vae_flux
from mrflow.models.transformer_family import TransformerFamily
from mrflow.models.zimage.backbone import ZImageModel
from mrflow.models.zimage.facts import TURBO, UNDISTILLED, zimage_info
from mrflow.models.zimage.text import ZImageText
from mrflow.models.zimage.transformer import ZImage
from mrflow.models.zimage.weights import (
    TRANSFORMER,
    prepare_zimage,
    single_file,
    zimage_diffusers,
    zimage_names,
    zimage_params,
)


class ZImageFamily(TransformerFamily):
    """Z-Image-Turbo, Z-Image, and models of their architecture, in single files or diffusers' layout."""

    name = "Z-Image"
    transformer = TRANSFORMER
    autoencoder = FluxFamily.autoencoder
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
        """diffusers' names."""
        return zimage_diffusers(parameter)

    def aliases(self, path: str) -> Mapping[str, int | None]:
        """The single files' names, where ours differ."""
        (own,) = single_file(f"{path}.weight")
        return {own.removesuffix(".weight"): None}

    def prepare(self, header: Header, **how: Any) -> CheckedNetwork[ZImage]:  # noqa: ANN401
        """In either layout."""
        return prepare_zimage(header, **how)

    def prepare_autoencoder(self, header: Header, **how: Any) -> CheckedNetwork[VaeFlux]:  # noqa: ANN401
        """FLUX.1's."""
        return prepare_vae_flux(header, **how)

    def info(self, net: ZImage, vae: VaeFlux, text: object, files: Files, parameters: int) -> ModelInfo:
        """Z-Image-Turbo's or Z-Image's, told apart by the scheduler's factor, with the files' own sizes."""
        return zimage_info(net, vae, text, files.curve, parameters)

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

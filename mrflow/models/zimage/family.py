"""Z-Image: its files, its names, its facts, and how it is built."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

from mrflow.backbone import Backbone
from mrflow.checkpoints.safetensors import Header
from mrflow.errors import PlanError
from mrflow.models.encoders import PREFIXES
from mrflow.models.family import Family, Files, Loading
from mrflow.models.flux.family import FluxFamily
from mrflow.models.flux.weights import prepare_vae_flux
from mrflow.models.latent_model import text_bytes
from mrflow.models.lora import changes, merge
from mrflow.models.zimage.backbone import ZImageModel
from mrflow.models.zimage.facts import TURBO, UNDISTILLED, zimage_info
from mrflow.models.zimage.transformer import ZImage
from mrflow.models.zimage.weights import (
    TRANSFORMER,
    prepare_zimage,
    single_file,
    zimage_diffusers,
    zimage_names,
    zimage_params,
)
from mrflow.spec import ModelInfo


class ZImageFamily(Family):
    """Z-Image-Turbo, Z-Image, and models of their architecture, in single files or diffusers' layout."""

    name = "Z-Image"
    transformer = TRANSFORMER
    autoencoder = FluxFamily.autoencoder
    marks = ("x_pad_token",)
    autoencoder_marks = FluxFamily.autoencoder_marks
    text_marks: ClassVar[Mapping[str, str]] = {
        f"{prefix}layers.0.self_attn.q_norm.weight": "a Qwen3 text encoder" for prefix in PREFIXES
    }
    takes = "x_embedder.weight"
    pipelines = ("ZImagePipeline", "ZImageImg2ImgPipeline")
    published: ClassVar[Mapping[str, ModelInfo]] = {
        "Tongyi-MAI/Z-Image-Turbo": TURBO,
        "Tongyi-MAI/Z-Image": UNDISTILLED,
    }
    network = ZImage

    def names(self, parameter: str) -> tuple[str, ...]:
        """diffusers' names."""
        return zimage_diffusers(parameter)

    def aliases(self, path: str) -> Mapping[str, int | None]:
        """The single files' names, where ours differ."""
        (own,) = single_file(f"{path}.weight")
        return {own.removesuffix(".weight"): None}

    def find_text(self, folder: Path) -> object:
        """Qwen3-4B."""
        from mrflow.models.zimage.text import find_text_zimage

        return find_text_zimage(folder)

    def facts(self, files: Files) -> ModelInfo:
        """Z-Image-Turbo's or Z-Image's, told apart by the scheduler's factor, with the files' own sizes."""
        from mrflow.models.language import LanguageFiles

        prepared = prepare_zimage(files.transformer)
        vae = prepare_vae_flux(files.vae, dtype=prepared.dtype)
        words = text_bytes((files.text.encoder,), "layers") if isinstance(files.text, LanguageFiles) else None
        net, vae_net = prepared.net.to(prepared.dtype), vae.net.to(prepared.dtype)
        return zimage_info(net, vae_net, words, files.curve, version="")

    def load(self, loading: Loading) -> Backbone:
        """The model from its parts."""
        from mrflow.models.language import LanguageFiles
        from mrflow.models.zimage.text import prepare_text_zimage

        files, device, resting = loading.files, loading.device, loading.resting
        if loading.chain is not None:
            raise PlanError("fold=chain is for Qwen-Image, of whose weights modulations are a third: use fold=True")
        prepared_vae = prepare_vae_flux(files.vae, dtype=loading.working, device=resting)
        prepared = prepare_zimage(files.transformer, dtype=loading.working, device=resting, storage=loading.storage)
        changed = changes(prepared.net, loading.loras, files.where) if loading.loras else {}
        read_text = None
        if isinstance(files.text, LanguageFiles):
            read_text = prepare_text_zimage(files.text, dtype=loading.dtype, device=resting)
        vae, flow, text = prepared_vae.read(), prepared.read(), None if read_text is None else read_text()
        merge(flow, changed)
        info = replace(zimage_info(flow, vae, text, files.curve, version=loading.version), files=files.paths)
        return ZImageModel(
            flow=flow, vae=vae, text=text, info=info, device=device, runtime=loading.runtime, upscaler=loading.upscaler
        )

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

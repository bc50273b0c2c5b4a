"""Qwen-Image: its files, its names, its facts, and how it is built."""

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

from mrflow.backbone import Backbone
from mrflow.cost import levels
from mrflow.errors import PlanError
from mrflow.models.encoders import PREFIXES
from mrflow.models.family import Family, Files, Loading
from mrflow.models.latent_model import count, text_bytes
from mrflow.models.lora import changes, merge
from mrflow.models.qwen.backbone import Qwen, qwen_facts, qwen_info
from mrflow.models.qwen.transformer import QwenImage
from mrflow.models.qwen.weights import AUTOENCODER, TRANSFORMER, prepare_qwen, prepare_vae_qwen, qwen_names
from mrflow.records.files import cache_folder
from mrflow.spec import QWEN, ModelInfo


class QwenFamily(Family):
    """Qwen-Image, and models of its architecture."""

    name = "Qwen-Image"
    transformer = TRANSFORMER
    autoencoder = AUTOENCODER
    marks = ("txt_norm.weight",)
    autoencoder_marks = ("decoder.middle.0.residual.0.gamma", "decoder.mid_block.resnets.0.norm1.gamma")
    text_marks: ClassVar[Mapping[str, str]] = {  # Qwen3 has no biases
        f"{prefix}layers.0.self_attn.q_proj.bias": "a Qwen2.5-VL text encoder" for prefix in PREFIXES
    }
    pipelines = ("QwenImagePipeline", "QwenImageImg2ImgPipeline")
    published: ClassVar[Mapping[str, ModelInfo]] = {"Qwen/Qwen-Image": QWEN}
    network = QwenImage

    def names(self, parameter: str) -> tuple[str, ...]:
        """diffusers' names, which are the published ones."""
        return qwen_names(parameter)

    def find_text(self, folder: Path) -> object:
        """Qwen2.5-VL's language model."""
        from mrflow.models.qwen.text import find_text_qwen

        return find_text_qwen(folder)

    def facts(self, files: Files) -> ModelInfo:
        """Qwen-Image's, with the files' own sizes."""
        from mrflow.models.language import LanguageFiles

        prepared = prepare_qwen(files.transformer)
        vae = prepare_vae_qwen(files.vae, dtype=prepared.dtype)
        net = prepared.net.to(prepared.dtype)
        words = text_bytes((files.text.encoder,), "layers") if isinstance(files.text, LanguageFiles) else None
        return qwen_info(
            net,
            vae.net.to(prepared.dtype),
            words,
            files.curve,
            version="",
            parameters=count(net),
        )

    def load(self, loading: Loading) -> Backbone:
        """The model from its parts; with a chain, the modulations of its levels instead of their linears."""
        from mrflow.models.language import LanguageFiles
        from mrflow.models.qwen.text import prepare_text_qwen

        files, where, device, resting = loading.files, loading.where, loading.device, loading.resting
        prepared_vae = prepare_vae_qwen(files.vae, dtype=loading.working, device=resting)
        prepared = prepare_qwen(files.transformer, dtype=loading.working, device=resting, storage=loading.storage)
        parameters = count(prepared.net)
        changed = changes(prepared.net, loading.loras, where) if loading.loras else {}
        linears = {id(module) for module in prepared.net.modulators()}
        touched = [path for path in changed if id(prepared.net.get_submodule(path)) in linears]
        if loading.chain is not None and touched:
            raise PlanError(f"the LoRA changes modulations ({touched[0]}), which fold=chain never loads: use fold=True")
        read_text = None
        if isinstance(files.text, LanguageFiles):
            read_text = prepare_text_qwen(files.text, dtype=loading.dtype, device=resting)
        vae, made = prepared_vae.read(), None
        if loading.chain is None:
            flow = prepared.read()
        else:
            asked = levels(loading.chain, qwen_facts(vae, files.curve))
            key = hashlib.sha256(repr((loading.version, asked)).encode()).hexdigest()[:16]
            keep = cache_folder() / f"modulation-{key}.safetensors"
            flow, made = prepared.read_folded(asked, device=device, keep=keep)
        merge(flow, changed)
        text = None if read_text is None else read_text()
        info = qwen_info(flow, vae, text, files.curve, version=loading.version, parameters=parameters)
        info = replace(info, files=files.paths)
        return Qwen(
            flow=flow,
            vae=vae,
            text=text,
            info=info,
            device=device,
            runtime=loading.runtime,
            upscaler=loading.upscaler,
            tables=made,
        )

"""Qwen-Image: its files, its names, its facts, and how it is built."""

import hashlib
from collections.abc import Mapping
from typing import Any, ClassVar

from mrflow.checkpoints.safetensors import CheckedNetwork, Header
from mrflow.cost import evaluated_sigmas
from mrflow.errors import PlanError
from mrflow.model_info import QWEN, ModelInfo
from mrflow.models.encoders import PREFIXES
from mrflow.models.family import Files, Loading
from mrflow.models.qwen.backbone import Qwen, qwen_facts, qwen_info
from mrflow.models.qwen.text import QwenText
from mrflow.models.qwen.transformer import QwenImage
from mrflow.models.qwen.vae import VaeQwen
from mrflow.models.qwen.weights import (
    AUTOENCODER,
    TRANSFORMER,
    prepare_qwen,
    prepare_vae_qwen,
    qwen_names,
    read_folded,
)
from mrflow.models.transformer_family import TransformerFamily
from mrflow.records.files import cache_folder


class QwenFamily(TransformerFamily):
    """Qwen-Image, and models of its architecture."""

    name = "Qwen-Image"
    transformer = TRANSFORMER
    autoencoder = AUTOENCODER
    marks = ("txt_norm.weight",)
    autoencoder_marks = ("decoder.middle.0.residual.0.gamma", "decoder.mid_block.resnets.0.norm1.gamma")
    text_marks: ClassVar[Mapping[str, str]] = {  # Qwen3 has no biases
        f"{prefix}layers.0.self_attn.q_proj.bias": QwenText.encoder for prefix in PREFIXES
    }
    words = QwenText
    pipelines = ("QwenImagePipeline", "QwenImageImg2ImgPipeline")
    published: ClassVar[Mapping[str, ModelInfo]] = {"Qwen/Qwen-Image": QWEN}
    network = QwenImage
    model = Qwen

    def names(self, parameter: str) -> tuple[str, ...]:
        """diffusers' names, which are the published ones."""
        return qwen_names(parameter)

    def prepare(self, header: Header, **how: Any) -> CheckedNetwork[QwenImage]:  # noqa: ANN401
        """In the one layout."""
        return prepare_qwen(header, **how)

    def prepare_autoencoder(self, header: Header, **how: Any) -> CheckedNetwork[VaeQwen]:  # noqa: ANN401
        """In either layout."""
        return prepare_vae_qwen(header, **how)

    def info(self, net: QwenImage, vae: VaeQwen, text: object, files: Files, parameters: int) -> ModelInfo:
        """Qwen-Image's, with the files' own sizes."""
        return qwen_info(net, vae, text, files.curve, parameters)

    def check(self, prepared: CheckedNetwork[QwenImage], loading: Loading, changed: Mapping[str, object]) -> None:
        """Modulations that a chain makes are never loaded: no LoRA may change them."""
        linears = {id(module) for module in prepared.net.modulators()}
        touched = [path for path in changed if id(prepared.net.get_submodule(path)) in linears]
        if loading.chain is not None and touched:
            raise PlanError(f"the LoRA changes modulations ({touched[0]}), which fold=chain never loads: use fold=True")

    def read(
        self, prepared: CheckedNetwork[QwenImage], vae: VaeQwen, loading: Loading
    ) -> tuple[QwenImage, dict[str, Any]]:
        """All weights; with a chain, the modulations of its levels instead of their linears."""
        if loading.chain is None:
            return prepared.read(), {}
        asked = evaluated_sigmas(loading.chain, qwen_facts(vae, loading.files.curve))
        key = hashlib.sha256(repr((loading.version, asked)).encode()).hexdigest()[:16]
        keep = cache_folder() / f"modulation-{key}.safetensors"
        flow, made = read_folded(prepared, asked, device=loading.device, keep=keep)
        return flow, {"tables": made}

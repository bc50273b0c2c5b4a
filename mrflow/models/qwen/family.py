"""Qwen-Image: its files, its names, its facts, and how it is built."""

import hashlib
from collections.abc import Mapping
from typing import Any, ClassVar

from mrflow.checkpoints.safetensors import CheckedNetwork
from mrflow.cost import evaluated_sigmas
from mrflow.errors import PlanError
from mrflow.model_info import QWEN, ModelInfo
from mrflow.models.encoders import PREFIXES
from mrflow.models.family import Files, Loading
from mrflow.models.latent_model import latent_facts, own_facts
from mrflow.models.qwen.backbone import Qwen
from mrflow.models.qwen.text import QwenText
from mrflow.models.qwen.transformer import QwenImage
from mrflow.models.qwen.vae import VaeQwen
from mrflow.models.qwen.weights import QWEN_AUTOENCODER, QWEN_TRANSFORMER, qwen_names, read_folded
from mrflow.models.transformer_family import TransformerFamily
from mrflow.records.files import cache_folder

# Values alive at once per pixel in bfloat16, where norms work in float32: measured on the networks themselves.
ENCODE, DECODE = 587.0, 676.0


class QwenFamily(TransformerFamily):
    """Qwen-Image, and models of its architecture."""

    name = "Qwen-Image"
    parts = (QWEN_TRANSFORMER, QWEN_AUTOENCODER)
    transformer, autoencoder = QWEN_TRANSFORMER.what, QWEN_AUTOENCODER.what
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
        """As diffusers publishes them."""
        return qwen_names(parameter)

    def info(self, net: QwenImage, vae: VaeQwen, text: object, files: Files, parameters: int) -> ModelInfo:
        """Qwen-Image's, with the files' own sizes."""
        return own_facts(
            QWEN, net, vae, text, curve=files.curve, parameters=parameters, encode_values=ENCODE, decode_values=DECODE
        )

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
        asked = evaluated_sigmas(loading.chain, latent_facts(QWEN, vae, loading.files.curve))
        key = hashlib.sha256(repr((loading.version, asked)).encode()).hexdigest()[:16]
        keep = cache_folder() / f"modulation-{key}.safetensors"
        flow, made = read_folded(prepared, asked, device=loading.device, keep=keep)
        return flow, {"tables": made}

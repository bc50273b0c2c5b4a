"""A family whose model is a transformer, an autoencoder and perhaps text encoders, each in files of its own."""

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from mrflow.backbone import Backbone
from mrflow.checkpoints.safetensors import CheckedNetwork, Header
from mrflow.display.notes import collect_notes
from mrflow.errors import PlanError
from mrflow.model_info import ModelInfo
from mrflow.models.blocks import Transformer
from mrflow.models.family import Family, Files, Loading
from mrflow.models.language import LanguageText
from mrflow.models.latent_model import count_parameters, text_bytes
from mrflow.models.lora import changes, merge
from mrflow.models.prepared import Published, PublishedTransformer


class TransformerFamily(Family):
    """It says how its parts are published and what facts follow; planning and loading are alike for all.

    `parts` are the transformer and the autoencoder, `model` is made of them; `words` is its text encoder where that is
    a language model; `text_layer` is what numbers a text encoder's layers in tensor names, `no_chain` says why
    fold=chain is refused.
    """

    parts: ClassVar[tuple[PublishedTransformer[Any], Published[Any]]]
    model: ClassVar[Callable[..., Backbone]]
    words: ClassVar[type[LanguageText] | None] = None
    text_layer: ClassVar[str] = "layers"
    no_chain: ClassVar[str] = "fold=chain is for Qwen-Image, of whose weights modulations are a third: use fold=True"

    def find_text(self, folder: Path, /) -> object:
        """A language model in a folder, where the family has one."""
        return super().find_text(folder) if self.words is None else self.words.find(folder)

    def prepare_text(self, files: Any, *, dtype: torch.dtype | None, device: torch.device) -> Callable[[], object]:  # noqa: ANN401
        """Check what `find_text` found; what is given back reads it."""
        if self.words is None:
            raise PlanError(f"{self.name} has no text encoders to load; leave out text=")
        return self.words.prepare(files, dtype=dtype, device=device)

    def text_headers(self, files: Any) -> Sequence[Header]:  # noqa: ANN401
        """The headers of what `find_text` found, the largest encoder last."""
        return (files.encoder,)

    @abstractmethod
    def info(self, net: Any, vae: Any, text: object, files: Files, parameters: int) -> ModelInfo:  # noqa: ANN401
        """All facts but the version; `parameters` are the transformer's."""

    def check(self, prepared: CheckedNetwork[Any], loading: Loading, changed: Mapping[str, object]) -> None:
        """Refuse, before weights are read, what this family cannot do.

        Raises:
            PlanError: saying what to do instead.
        """
        if loading.chain is not None:
            raise PlanError(self.no_chain)

    def read(self, prepared: CheckedNetwork[Any], vae: Any, loading: Loading) -> tuple[Transformer, dict[str, Any]]:  # noqa: ANN401
        """The transformer with its weights, and what `model` is given beyond its parts."""
        return prepared.read(), {}

    def facts(self, files: Files) -> ModelInfo:
        """Of the networks that the headers describe."""
        transformer, autoencoder = self.parts
        prepared = transformer.prepare(files.transformer)
        vae = autoencoder.prepare(files.vae, dtype=prepared.dtype).net.to(prepared.dtype)
        net = prepared.net.to(prepared.dtype)
        words = None
        if files.text is not None:
            self.prepare_text(files.text, dtype=None, device=torch.device("cpu"))  # what load refuses is refused here
            words = text_bytes(self.text_headers(files.text), self.text_layer)
        return self.info(net, vae, words, files, count_parameters(net))

    def load(self, loading: Loading) -> Backbone:
        """The model from its parts."""
        files, resting = loading.files, loading.resting
        transformer, autoencoder = self.parts
        prepared_vae = autoencoder.prepare(files.vae, dtype=loading.working, device=resting)
        prepared = transformer.prepare(
            files.transformer, dtype=loading.working, device=resting, storage=loading.storage
        )
        parameters = count_parameters(prepared.net)
        changed = changes(prepared.net, loading.loras, files.where) if loading.loras else {}
        self.check(prepared, loading, changed)
        read_text = None
        if files.text is not None:
            read_text = self.prepare_text(files.text, dtype=loading.dtype, device=resting)

        def info(net: nn.Module, vae: nn.Module, text: object) -> ModelInfo:
            facts = self.info(net, vae, text, files, parameters)
            return replace(facts, version=loading.version, files=files.paths)

        if loading.on_facts is not None:
            with collect_notes():  # its notes come below
                early = info(prepared.net, prepared_vae.net, None)
            loading.on_facts(early)
        vae = prepared_vae.read()
        flow, more = self.read(prepared, vae, loading)
        merge(flow, changed)
        text = None if read_text is None else read_text()
        return self.model(
            flow=flow, vae=vae, text=text, info=info(flow, vae, text), device=loading.device,
            runtime=loading.runtime, upscaler=loading.upscaler, **more,
        )  # fmt: skip

"""Text encoders that are a language model of the Qwen line, through transformers: found, checked, read, asked."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mrflow._checks import is_whole
from mrflow.checkpoints.configs import read_config
from mrflow.checkpoints.safetensors import Header, check_layout, compute_dtype, fill_module, open_checkpoint
from mrflow.errors import PlanError, WeightsError
from mrflow.models.encoders import (
    Tokenizer,
    built,
    check_prompt,
    language_sizes,
    seen,
    settings_of,
    text_layout,
    tokenizer_of,
    without_prefixes,
)
from mrflow.models.fp8 import with_scales
from mrflow.models.headers import agree, part
from mrflow.records.files import spelled

MAX_STATES = 512  # what the reference's pipelines keep unless told otherwise


@dataclass(frozen=True)
class LanguageFiles:
    """The encoder by its header, without what text does not need; its config, and its tokenizer's folder."""

    encoder: Header
    config: Mapping[str, Any]
    tokenizer: Path


class LanguageText(ABC):
    """Prompts to the language model's states. `most` is how many tokens it may be given.

    `model_name` and `encoder` are what errors call it; tensors whose names begin with one of `unused` are left out.
    """

    most: ClassVar[int]
    model_name: ClassVar[str]
    encoder: ClassVar[str]
    unused: ClassVar[tuple[str, ...]]

    def __init__(self, model: nn.Module, tokenizer: Tokenizer) -> None:
        self.model, self.tokenizer = model.eval().requires_grad_(False), tokenizer  # noqa: FBT003

    @classmethod
    @abstractmethod
    def classes(cls, files: LanguageFiles) -> tuple[Any, Any, Any]:
        """transformers' config of the text model, and its classes of the network and of positions (in no file)."""

    @classmethod
    def find(cls, where: Path) -> LanguageFiles:
        """The encoder in a folder with `text_encoder/` and `tokenizer/`.

        Raises:
            WeightsError: something is missing, or is not what it should be.
        """
        folder, tokens = spelled(where, "text_encoder"), spelled(where, "tokenizer")
        settings = spelled(folder, "config.json")
        missing = [str(p.relative_to(where)) for p in (folder, settings) if not p.exists()]
        vocabulary = [(tokens / name).is_file() for name in ("tokenizer.json", "vocab.json", "merges.txt")]
        if not (vocabulary[0] or all(vocabulary[1:])):  # transformers would make a tokenizer that knows no words
            missing.append(f"tokenizer (a folder with tokenizer.json, or vocab.json and merges.txt{seen(tokens)})")
        if missing:
            what = f"{cls.model_name}'s text encoder"
            raise WeightsError(f"{where} lacks {', '.join(missing)} of {what}; say where it is: text=")
        header = with_scales(without_prefixes(part(open_checkpoint(folder), cls.encoder), *cls.unused))
        config = read_config(settings)
        inside = config.get("text_config")
        settings_of(header, inside if isinstance(inside, dict) else config, language_sizes(header))
        return LanguageFiles(header, config, tokens)

    @classmethod
    def prepare(
        cls, files: LanguageFiles, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
    ) -> Callable[[], "LanguageText"]:
        """Check names and shapes of the encoder, and read its tokenizer; what is given back then reads the weights.

        `dtype=None` is the file's own.

        Raises:
            WeightsError: the config, a tensor or the tokenizer does not fit.
        """
        config, model, rotary = cls.classes(files)
        agree(files.encoder, config.to_dict(), language_sizes(files.encoder))
        net = built(model, config, files.encoder)
        layout = text_layout(net, files.encoder)
        kind = dtype or compute_dtype(files.encoder)
        check_layout(net, files.encoder, layout, dtype=kind)
        tokenizer = tokenizer_of("Qwen2Tokenizer", files.tokenizer, language_sizes(files.encoder)["vocab_size"])

        def read() -> LanguageText:
            fill_module(net, files.encoder, layout, dtype=kind, device=device)
            net.register_module("rotary_emb", rotary(config).to(device))
            return cls(net, tokenizer)

        return read

    def modules(self) -> list[nn.Module]:
        """The one network."""
        return [self.model]

    def layers(self) -> list[nn.Module]:
        """Its layers, by far the most of the weights, in the order they run."""
        return list(self.model.get_submodule("layers").children())

    def __call__(self, prompts: Sequence[str], *, length: int = MAX_STATES) -> list[Tensor]:
        """States (tokens, width) of each prompt, at most `length` tokens.

        One prompt after another, so that none depends on its neighbours. What cannot be read is noted.

        Raises:
            PlanError: length is not from 1 to `most`. PromptError: a prompt is no text.
        """
        if not is_whole(length, 1, self.most):
            raise PlanError(f"the text encoder reads from 1 to {self.most} tokens, got {length!r}")
        for prompt in prompts:
            check_prompt(prompt)
        names = [repr(prompt[:40]) if len(prompts) > 1 else "a prompt" for prompt in prompts]
        return [self._states(prompt, length, name) for prompt, name in zip(prompts, names, strict=True)]

    @abstractmethod
    def _states(self, prompt: str, length: int, name: str) -> Tensor:
        """States (tokens, width) of one prompt in the family's template; `name` is what a note calls it."""

"""Qwen-Image's text encoder: the language model of Qwen2.5-VL-7B, through transformers.

As in diffusers' `pipeline_qwenimage.py`: the prompt in a fixed template, the last hidden state after the final norm,
the template's first 34 tokens dropped. The vision tower and the language-model head are never read.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mrflow._checks import is_whole
from mrflow.checkpoints.configs import read_config
from mrflow.checkpoints.safetensors import (
    Header,
    check_layout,
    compute_dtype,
    fill,
    open_checkpoint,
)
from mrflow.errors import PlanError, WeightsError
from mrflow.models.encoders import (
    Tokenizer,
    built,
    check_prompt,
    configured,
    language_sizes,
    needed,
    shortened,
    text_layout,
    tokenizer_of,
)
from mrflow.models.fp8 import described
from mrflow.models.headers import agree, part
from mrflow.notes import note

ENCODER = "a Qwen2.5-VL text encoder"
TEMPLATE = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial "
    "relationships of the objects and background:<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)
DROPPED = 34  # tokens of the template before the prompt
CLOSING = 5  # and after it
MAX_TOKENS = 1024  # what the encoder may be given beyond the template's beginning
MAX_STATES = 512  # what the reference's pipelines keep of it unless told otherwise
UNUSED = ("visual.", "model.visual.", "lm_head.", "language_model.lm_head.")


@dataclass(frozen=True)
class QwenTextFiles:
    """The encoder by its header, without what text does not need; its config, and its tokenizer's folder."""

    encoder: Header
    config: Mapping[str, Any]
    tokenizer: Path


def find_text_qwen(where: Path) -> QwenTextFiles:
    """The encoder in a folder with `text_encoder/` and `tokenizer/`.

    Raises:
        WeightsError: something is missing, or is not what it should be.
    """
    folder, tokens = where / "text_encoder", where / "tokenizer"
    missing = [str(p.relative_to(where)) for p in (folder, folder / "config.json") if not p.exists()]
    vocabulary = [(tokens / name).is_file() for name in ("tokenizer.json", "vocab.json", "merges.txt")]
    if not (vocabulary[0] or all(vocabulary[1:])):  # transformers would make a tokenizer that knows no words
        missing.append("tokenizer (a folder with vocab.json and merges.txt)")
    if missing:
        raise WeightsError(f"{where} lacks {', '.join(missing)} of Qwen-Image's text encoder; say where it is: text=")
    header = described(needed(part(open_checkpoint(folder), ENCODER), *UNUSED))
    return QwenTextFiles(header, read_config(folder / "config.json"), tokens)


def prepare_text_qwen(
    files: QwenTextFiles, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> Callable[[], "QwenText"]:
    """Check names and shapes of the encoder; what is given back then reads it. `dtype=None` is the file's own."""
    from transformers import Qwen2_5_VLConfig
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLRotaryEmbedding, Qwen2_5_VLTextModel

    whole = configured(Qwen2_5_VLConfig, files.encoder, files.config, {})
    config: Any = whole.get_text_config()
    agree(files.encoder, config.to_dict(), language_sizes(files.encoder))
    model = built(Qwen2_5_VLTextModel, config, files.encoder)
    layout = text_layout(model, files.encoder)
    kind = dtype or compute_dtype(files.encoder)
    check_layout(model, files.encoder, layout, dtype=kind)

    def read() -> QwenText:
        fill(model, files.encoder, layout, dtype=kind, device=device)
        rotary: Any = Qwen2_5_VLRotaryEmbedding(config)  # its tables are in no file
        model.register_module("rotary_emb", rotary.to(device))
        return QwenText(model, tokenizer_of("Qwen2Tokenizer", files.tokenizer))

    return read


class QwenText:
    """Prompts to the language model's states."""

    def __init__(self, model: nn.Module, tokenizer: Tokenizer) -> None:
        self.model, self.tokenizer = model.eval().requires_grad_(False), tokenizer  # noqa: FBT003

    def modules(self) -> list[nn.Module]:
        """The one network."""
        return [self.model]

    def layers(self) -> list[nn.Module]:
        """Its layers, by far the most of the weights, in the order they run."""
        return list(self.model.get_submodule("layers").children())

    def __call__(self, prompts: Sequence[str], *, length: int = MAX_STATES) -> list[Tensor]:
        """States (tokens, width) of each prompt: its own tokens and the template's closing ones, at most `length`.

        One prompt after another, so that none depends on its neighbours. What cannot be read is noted.

        Raises:
            PlanError: length is not from 1 to 1024. PromptError: a prompt is no text.
        """
        if not is_whole(length, 1, MAX_TOKENS):
            raise PlanError(f"the text encoder reads from 1 to {MAX_TOKENS} tokens, got {length!r}")
        for prompt in prompts:
            check_prompt(prompt)
        names = [repr(prompt[:40]) if len(prompts) > 1 else "a prompt" for prompt in prompts]
        return [self._states(prompt, length, name) for prompt, name in zip(prompts, names, strict=True)]

    def _states(self, prompt: str, length: int, name: str) -> Tensor:
        ids: list[int] = self.tokenizer(TEMPLATE.format(prompt), truncation=False, verbose=False).input_ids
        if len(ids) - DROPPED > length:
            lost = str(self.tokenizer.decode(ids[DROPPED + length : max(len(ids) - CLOSING, DROPPED + length)])).strip()
            note(f"Qwen-Image reads {length} tokens of {name} and does not see: {shortened(lost)!r}")
        given = torch.tensor([ids[: DROPPED + MAX_TOKENS]], device=next(self.model.parameters()).device)
        states: Tensor = self.model(input_ids=given, use_cache=False).last_hidden_state
        return states[0, DROPPED : DROPPED + length]

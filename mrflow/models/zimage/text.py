"""Z-Image's text encoder: Qwen3-4B, through transformers.

As in diffusers' `pipeline_z_image.py`: the prompt as a user's turn in the chat template, with thinking on; the states
before the last layer, of the text alone. The language-model head is never read.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mrflow._checks import is_whole
from mrflow.checkpoints.configs import read_config
from mrflow.checkpoints.safetensors import Header, check_layout, compute_dtype, fill, open_checkpoint
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

ENCODER = "a Qwen3 text encoder"
MAX_STATES = 512  # what the reference's pipeline gives the encoder, template and all
# The template of Qwen3's tokenizer for one turn of a user, thinking on.
OPENING, CLOSING = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"


@dataclass(frozen=True)
class ZImageTextFiles:
    """The encoder by its header, without its head; its config, and its tokenizer's folder."""

    encoder: Header
    config: Mapping[str, Any]
    tokenizer: Path


def find_text_zimage(where: Path) -> ZImageTextFiles:
    """The encoder in a folder with `text_encoder/` and `tokenizer/`.

    Raises:
        WeightsError: something is missing, or is not what it should be.
    """
    folder, tokens = where / "text_encoder", where / "tokenizer"
    missing = [str(p.relative_to(where)) for p in (folder, folder / "config.json") if not p.exists()]
    vocabulary = [(tokens / name).is_file() for name in ("tokenizer.json", "vocab.json", "merges.txt")]
    if not (vocabulary[0] or all(vocabulary[1:])):  # transformers would make a tokenizer that knows no words
        missing.append("tokenizer (a folder with tokenizer.json, or vocab.json and merges.txt)")
    if missing:
        raise WeightsError(f"{where} lacks {', '.join(missing)} of Z-Image's text encoder; say where it is: text=")
    header = described(needed(part(open_checkpoint(folder), ENCODER), "lm_head."))
    return ZImageTextFiles(header, read_config(folder / "config.json"), tokens)


def prepare_text_zimage(
    files: ZImageTextFiles, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> Callable[[], "ZImageText"]:
    """Check names and shapes of the encoder; what is given back then reads it. `dtype=None` is the file's own."""
    from transformers import Qwen3Config, Qwen3Model
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

    config = configured(Qwen3Config, files.encoder, files.config, {})
    agree(files.encoder, config.to_dict(), language_sizes(files.encoder))
    model = built(Qwen3Model, config, files.encoder)
    layout = text_layout(model, files.encoder)
    kind = dtype or compute_dtype(files.encoder)
    check_layout(model, files.encoder, layout, dtype=kind)

    def read() -> ZImageText:
        fill(model, files.encoder, layout, dtype=kind, device=device)
        rotary: Any = Qwen3RotaryEmbedding(config)  # its tables are in no file
        model.register_module("rotary_emb", rotary.to(device))
        return ZImageText(model, tokenizer_of("Qwen2Tokenizer", files.tokenizer))

    return read


class ZImageText:
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
        """States (tokens, width) of each prompt in its template, of which at most `length` tokens are read.

        One prompt after another, so that none depends on its neighbours. What cannot be read is noted.

        Raises:
            PlanError: length is not from 1 to 512. PromptError: a prompt is no text.
        """
        if not is_whole(length, 1, MAX_STATES):
            raise PlanError(f"the text encoder reads from 1 to {MAX_STATES} tokens, got {length!r}")
        for prompt in prompts:
            check_prompt(prompt)
        names = [repr(prompt[:40]) if len(prompts) > 1 else "a prompt" for prompt in prompts]
        return [self._states(prompt, length, name) for prompt, name in zip(prompts, names, strict=True)]

    def _states(self, prompt: str, length: int, name: str) -> Tensor:
        ids: list[int] = self.tokenizer(OPENING + prompt + CLOSING, truncation=False, verbose=False).input_ids
        if len(ids) > length:
            closing = len(self.tokenizer(CLOSING, truncation=False, verbose=False).input_ids)
            lost = str(self.tokenizer.decode(ids[length : max(len(ids) - closing, length)])).strip()
            note(f"Z-Image reads {length} tokens of {name} and does not see: {shortened(lost)!r}")
        given = torch.tensor([ids[:length]], device=next(self.model.parameters()).device)
        states: Tensor = self.model(input_ids=given, use_cache=False, output_hidden_states=True).hidden_states[-2]
        return states[0]

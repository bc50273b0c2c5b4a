"""Qwen-Image's text encoder: the language model of Qwen2.5-VL-7B, through transformers.

As in diffusers' `pipeline_qwenimage.py`: the prompt in a fixed template, the last hidden state after the final norm,
the template's first 34 tokens dropped. The vision tower and the language-model head are never read.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor

from mrflow.display.notes import note
from mrflow.models.encoders import make_config, shorten
from mrflow.models.language import LanguageFiles, LanguageText

TEMPLATE = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial "
    "relationships of the objects and background:<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)
DROPPED = 34  # tokens of the template before the prompt
CLOSING = 5  # and after it
MAX_TOKENS = 1024  # what the encoder may be given beyond the template's beginning


class QwenText(LanguageText):
    """States of each prompt: its own tokens and the template's closing ones."""

    most: ClassVar[int] = MAX_TOKENS
    model_name: ClassVar[str] = "Qwen-Image"
    encoder: ClassVar[str] = "a Qwen2.5-VL text encoder"
    unused: ClassVar[tuple[str, ...]] = ("visual.", "model.visual.", "lm_head.", "language_model.lm_head.")

    @classmethod
    def classes(cls, files: LanguageFiles) -> tuple[Any, Any, Any]:
        """Those of Qwen2.5-VL's text model."""
        from transformers import Qwen2_5_VLConfig
        from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLRotaryEmbedding, Qwen2_5_VLTextModel

        whole = make_config(Qwen2_5_VLConfig, files.encoder, files.config, {})
        return whole.get_text_config(), Qwen2_5_VLTextModel, Qwen2_5_VLRotaryEmbedding

    def _states(self, prompt: str, length: int, name: str) -> Tensor:
        ids: list[int] = self.tokenizer(TEMPLATE.format(prompt), truncation=False, verbose=False).input_ids
        if len(ids) - DROPPED > length:
            lost = str(self.tokenizer.decode(ids[DROPPED + length : max(len(ids) - CLOSING, DROPPED + length)])).strip()
            note(f"Qwen-Image reads {length} tokens of {name} and does not see: {shorten(lost)!r}")
        given = torch.tensor([ids[: DROPPED + MAX_TOKENS]], device=next(self.model.parameters()).device)
        states: Tensor = self.model(input_ids=given, use_cache=False).last_hidden_state
        return states[0, DROPPED : DROPPED + length]

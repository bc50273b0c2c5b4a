"""Z-Image's text encoder: Qwen3-4B, through transformers.

As in diffusers' `pipeline_z_image.py`: the prompt as a user's turn in the chat template, with thinking on; the states
before the last layer, of the text alone. The language-model head is never read.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor

from mrflow.display.notes import note
from mrflow.models.encoders import make_config, shorten
from mrflow.models.language import MAX_STATES, LanguageFiles, LanguageText

# The template of Qwen3's tokenizer for one turn of a user, thinking on.
OPENING, CLOSING = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"


class ZImageText(LanguageText):
    """States of each prompt in its template, which counts among the tokens."""

    most: ClassVar[int] = MAX_STATES  # what the reference's pipeline gives the encoder
    model_name: ClassVar[str] = "Z-Image"
    encoder: ClassVar[str] = "a Qwen3 text encoder"
    unused: ClassVar[tuple[str, ...]] = ("lm_head.",)

    @classmethod
    def classes(cls, files: LanguageFiles) -> tuple[Any, Any, Any]:
        """Those of Qwen3."""
        from transformers import Qwen3Config, Qwen3Model
        from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

        return make_config(Qwen3Config, files.encoder, files.config, {}), Qwen3Model, Qwen3RotaryEmbedding

    def _states(self, prompt: str, length: int, name: str) -> Tensor:
        ids: list[int] = self.tokenizer(OPENING + prompt + CLOSING, truncation=False, verbose=False).input_ids
        if len(ids) > length:
            closing = len(self.tokenizer(CLOSING, truncation=False, verbose=False).input_ids)
            lost = str(self.tokenizer.decode(ids[length : max(len(ids) - closing, length)])).strip()
            note(f"Z-Image reads {length} tokens of {name} and does not see: {shorten(lost)!r}")
        given = torch.tensor([ids[:length]], device=next(self.model.parameters()).device)
        states: Tensor = self.model(input_ids=given, use_cache=False, output_hidden_states=True).hidden_states[-2]
        return states[0]

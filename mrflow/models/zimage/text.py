"""Z-Image's text encoder: Qwen3-4B, through transformers.

As in diffusers' `pipeline_z_image.py`: the prompt as a user's turn in the chat template, with thinking on; the states
before the last layer, of the text alone. The language-model head is never read.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from mrflow.display.notes import note
from mrflow.models.encoders import make_config, shorten
from mrflow.models.language import MAX_STATES, LanguageFiles, LanguageText, find_language, prepare_language

ENCODER = "a Qwen3 text encoder"
# The template of Qwen3's tokenizer for one turn of a user, thinking on.
OPENING, CLOSING = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"


def find_text_zimage(where: Path) -> LanguageFiles:
    """The encoder in a folder with `text_encoder/` and `tokenizer/`.

    Raises:
        WeightsError: something is missing, or is not what it should be.
    """
    return find_language(where, model="Z-Image", encoder=ENCODER, unused=("lm_head.",))


def prepare_text_zimage(
    files: LanguageFiles, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> Callable[[], "ZImageText"]:
    """Check names and shapes of the encoder; what is given back then reads it. `dtype=None` is the file's own."""
    from transformers import Qwen3Config, Qwen3Model
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

    config: Any = make_config(Qwen3Config, files.encoder, files.config, {})
    read = prepare_language(files, config, Qwen3Model, Qwen3RotaryEmbedding, dtype=dtype, device=device)
    return lambda: ZImageText(*read())


class ZImageText(LanguageText):
    """States of each prompt in its template, which counts among the tokens."""

    most: ClassVar[int] = MAX_STATES  # what the reference's pipeline gives the encoder

    def _states(self, prompt: str, length: int, name: str) -> Tensor:
        ids: list[int] = self.tokenizer(OPENING + prompt + CLOSING, truncation=False, verbose=False).input_ids
        if len(ids) > length:
            closing = len(self.tokenizer(CLOSING, truncation=False, verbose=False).input_ids)
            lost = str(self.tokenizer.decode(ids[length : max(len(ids) - closing, length)])).strip()
            note(f"Z-Image reads {length} tokens of {name} and does not see: {shorten(lost)!r}")
        given = torch.tensor([ids[:length]], device=next(self.model.parameters()).device)
        states: Tensor = self.model(input_ids=given, use_cache=False, output_hidden_states=True).hidden_states[-2]
        return states[0]

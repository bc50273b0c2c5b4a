"""FLUX.1's text encoders: CLIP-L's pooled vector and T5-XXL's states, through transformers.

As in diffusers' `pipeline_flux.py`: CLIP reads 77 tokens and gives the final state of its first end token; T5 reads a
fixed number, padded, and neither it nor the transformer is given a mask, so the padding's states count.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from mrflow._checks import is_whole
from mrflow.checkpoints.configs import read_config
from mrflow.checkpoints.safetensors import (
    Header,
    Layout,
    Source,
    assemble,
    check_layout,
    checkpoints_in,
    compute_dtype,
    fill_module,
    open_checkpoint,
    readable,
)
from mrflow.display.notes import note
from mrflow.errors import PlanError, WeightsError
from mrflow.models.encoders import (
    Tokenizer,
    built,
    check_prompt,
    layers_of,
    make_config,
    seen,
    settings_of,
    shape_of,
    shorten,
    tokenizer_of,
    without_prefixes,
)
from mrflow.models.fp8 import with_scales
from mrflow.models.headers import looks_like, part
from mrflow.records.files import spelled

CLIP_TOKENS, T5_TOKENS = 77, 512
CLIP, T5 = "a CLIP text encoder", "a T5 encoder"
# Of each tokenizer, the sets of files that do; without them transformers makes one that knows no words.
VOCABULARIES = {
    "tokenizer": (("tokenizer.json",), ("vocab.json", "merges.txt")),
    "tokenizer_2": (("tokenizer.json",), ("spiece.model",)),
}
# Of files of whole models, what text does not need: CLIP's vision tower, projections and a table of positions that
# follows from its size; T5's decoder, head, and the tokenizer that some files carry as bytes.
NOT_READ = {
    CLIP: (
        *("vision_model.", "visual_projection.", "text_projection.", "logit_scale"),
        *("text_model.embeddings.position_ids", "embeddings.position_ids"),
    ),
    T5: ("decoder.", "lm_head.", "spiece_model", "logit_scale"),
}
# Settings that shapes do not tell, as published (openai/clip-vit-large-patch14, google/t5-v1_1-xxl).
CLIP_CONFIG = {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "bos_token_id": 0, "eos_token_id": 2}
T5_CONFIG = {"feed_forward_proj": "gated-gelu", "layer_norm_epsilon": 1e-6, "relative_attention_max_distance": 128}
FREE = ("num_attention_heads", "tie_word_embeddings", *CLIP_CONFIG, *T5_CONFIG)  # what shapes do not tell


@dataclass(frozen=True)
class TextFiles:
    """The encoders by their headers, their configs (empty: read off the shapes), and their tokenizers' folders."""

    clip: Header
    t5: Header
    clip_config: Mapping[str, Any]
    t5_config: Mapping[str, Any]
    tokenizer: Path
    tokenizer_2: Path


def find_text(where: Path) -> TextFiles:
    """The encoders in a folder: as diffusers saves them, or single files beside the two tokenizers' folders.

    Raises:
        WeightsError: something is missing, or is not what it should be.
    """
    if not where.is_dir():
        raise WeightsError(f"text must be a folder with text encoders and tokenizers, got {where}")
    saved = [spelled(where, name) for name in ("text_encoder", "text_encoder_2")]
    loose = {} if all(s.is_dir() for s in saved) else readable(checkpoints_in(where))
    found: list[Header | None] = []
    for folder, wanted in zip(saved, (CLIP, T5), strict=True):
        if folder.is_dir() and (any(folder.glob("*.safetensors*")) or not any(folder.glob("*.bin"))):
            found.append(part(open_checkpoint(folder), wanted))
            continue
        files = [h for h in loose.values() if looks_like(h, wanted)]
        if len(files) > 1:
            raise WeightsError(f"{where} holds several of {wanted}: {', '.join(h.path.name for h in files)}")
        found.append(part(files[0], wanted) if files else None)
    tokenizers = [spelled(where, name) for name in VOCABULARIES]
    pickles = ["; there are only pickles" if any(s.glob("*.bin")) else "" for s in saved]
    missing = [f"{s.name} ({w}{p})" for s, w, f, p in zip(saved, (CLIP, T5), found, pickles, strict=True) if f is None]
    for folder, (name, ways) in zip(tokenizers, VOCABULARIES.items(), strict=True):
        if not any(all((folder / file).is_file() for file in way) for way in ways):
            missing.append(f"{name} (a folder with {' or '.join(' and '.join(way) for way in ways)}{seen(folder)})")
    clip, t5 = found
    if missing or clip is None or t5 is None:
        raise WeightsError(
            f"{where} lacks {', '.join(missing)}; text encoders and tokenizers are in FLUX.1's repository: say where "
            "with text="
        )
    configs = [read_config(p) if (p := spelled(h.path.parent, "config.json")).is_file() else {} for h in (clip, t5)]
    clip, t5 = (with_scales(without_prefixes(header, *NOT_READ[kind])) for header, kind in ((clip, CLIP), (t5, T5)))
    inside = configs[0].get("text_config")
    clip_config = inside if isinstance(inside, dict) and inside else configs[0]
    settings_of(clip, clip_config, clip_sizes(clip), free=FREE)
    settings_of(t5, configs[1], t5_sizes(t5), free=FREE)
    return TextFiles(clip, t5, clip_config, configs[1], *tokenizers)


def prepare_text(
    files: TextFiles, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> Callable[[], "ClipT5"]:
    """Check names and shapes of both encoders, and read their tokenizers; what is given back then reads the weights.

    `dtype=None` is the files' own.

    Raises:
        WeightsError: a config, a tensor or a tokenizer does not fit.
    """
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    clip_config = make_config(CLIPTextConfig, files.clip, files.clip_config, clip_sizes(files.clip), free=FREE)
    t5_config = make_config(T5Config, files.t5, files.t5_config, t5_sizes(files.t5), free=FREE)
    clip, t5 = built(CLIPTextModel, clip_config, files.clip), built(T5EncoderModel, t5_config, files.t5)
    layouts = (clip_layout(clip, files.clip), t5_layout(t5, files.t5))
    kinds = [dtype or compute_dtype(header) for header in (files.clip, files.t5)]
    for module, header, layout, kind in zip((clip, t5), (files.clip, files.t5), layouts, kinds, strict=True):
        check_layout(module, header, layout, dtype=kind)
    words = (
        tokenizer_of("CLIPTokenizer", files.tokenizer, clip_config.vocab_size),
        tokenizer_of("T5TokenizerFast", files.tokenizer_2, t5_config.vocab_size),
    )

    def read() -> ClipT5:
        for module, header, layout, kind in zip((clip, t5), (files.clip, files.t5), layouts, kinds, strict=True):
            fill_module(module, header, layout, dtype=kind, device=device)
        embeddings = clip.get_submodule("text_model.embeddings" if hasattr(clip, "text_model") else "embeddings")
        places = torch.arange(clip_config.max_position_embeddings, device=device).expand(1, -1)
        embeddings.register_buffer("position_ids", places, persistent=False)
        t5.get_submodule("encoder.embed_tokens").register_parameter("weight", t5.get_parameter("shared.weight"))
        if kinds[1] == torch.float16:  # its products leave float16's range: transformers keeps them wide too
            for name, module in t5.named_modules():
                if name.endswith(".wo"):
                    source = layouts[1][f"{name}.weight"]
                    wide = assemble(files.t5, source, {}, dtype=torch.float32, device=device)
                    module.register_parameter("weight", nn.Parameter(wide, requires_grad=False))
        return ClipT5(clip, t5, *words)

    return read


class ClipT5:
    """Prompts to T5's states and CLIP's pooled vector."""

    def __init__(self, clip: nn.Module, t5: nn.Module, tokenizer: Tokenizer, tokenizer_2: Tokenizer) -> None:
        self.clip, self.t5 = clip.eval().requires_grad_(False), t5.eval().requires_grad_(False)  # noqa: FBT003
        self.tokenizer, self.tokenizer_2 = tokenizer, tokenizer_2

    def modules(self) -> list[nn.Module]:
        """Both networks."""
        return [self.clip, self.t5]

    def layers(self) -> list[nn.Module]:
        """T5's layers, by far the most of the weights, in the order they run."""
        return list(self.t5.get_submodule("encoder.block").children())

    def __call__(self, prompts: Sequence[str], *, length: int = T5_TOKENS) -> tuple[Tensor, Tensor]:
        """States (prompts, length, width) in T5's dtype and pooled (prompts, width) in CLIP's.

        One prompt after another, so that none depends on its neighbours. What either encoder cannot read is noted.

        Raises:
            PlanError: length is not from 1 to 512. PromptError: a prompt is no text.
        """
        if not is_whole(length, 1, T5_TOKENS):
            raise PlanError(f"T5 reads from 1 to {T5_TOKENS} tokens, got {length!r}")
        for prompt in prompts:
            check_prompt(prompt)
        states: list[Tensor] = []
        pooled: list[Tensor] = []
        for prompt in prompts:
            of = f" of {prompt[:40]!r}" if len(prompts) > 1 else ""
            short = self._tokens(self.tokenizer, prompt, CLIP_TOKENS, "CLIP", " (T5 still may)", of)
            pooled.append(self.clip(short).pooler_output)
            long = self._tokens(self.tokenizer_2, prompt, length, "T5", "", of)
            states.append(self.t5(long).last_hidden_state)
        return torch.cat(states), torch.cat(pooled)

    def _tokens(self, tokenizer: Tokenizer, prompt: str, limit: int, who: str, but: str, of: str = "") -> Tensor:
        """Token ids (1, limit), padded or cut; what is cut off is noted."""
        all_ids: list[int] = tokenizer(prompt, truncation=False, verbose=False).input_ids
        if len(all_ids) > limit:
            lost = str(tokenizer.decode(all_ids[limit - 1 : -1])).strip()
            note(f"{who} reads {limit} tokens{of} and does not see{but}: {shorten(lost)!r}")
        ids = tokenizer(prompt, padding="max_length", max_length=limit, truncation=True, return_tensors="pt").input_ids
        return cast("Tensor", ids).to(next(self.t5.parameters()).device)


def clip_layout(clip: nn.Module, header: Header) -> Layout:
    """Where CLIP's parameters lie: published names begin with `text_model.`, transformers' own with or without it."""
    prefix = "text_model." if any(name.startswith("text_model.") for name in header.tensors) else ""
    return {n: Source((prefix + n.removeprefix("text_model."),), (len(t),)) for n, t in clip.state_dict().items()}


def t5_layout(t5: nn.Module, header: Header) -> Layout:
    """Where T5's parameters lie: files hold its one embedding under either name, or under both."""
    out: dict[str, Source] = {}
    twins = ("shared.weight", "encoder.embed_tokens.weight")
    for name, tensor in t5.state_dict().items():
        given = next((t for t in (name, *twins) if t in header.tensors), name) if name in twins else name
        out[name] = Source((given,), (len(tensor),))
    return out


def clip_sizes(header: Header) -> dict[str, Any]:
    """A config for CLIP's text tower from the shapes of its file; heads have 64 channels."""
    prefix = "text_model." if any(name.startswith("text_model.") for name in header.tensors) else ""
    vocabulary, width = shape_of(header, f"{prefix}embeddings.token_embedding.weight")
    positions, _ = shape_of(header, f"{prefix}embeddings.position_embedding.weight")
    inner, _ = shape_of(header, f"{prefix}encoder.layers.0.mlp.fc1.weight")
    return CLIP_CONFIG | {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "max_position_embeddings": positions,
        "intermediate_size": inner,
        "num_attention_heads": max(1, width // 64),
        "num_hidden_layers": layers_of(header, f"{prefix}encoder.layers.{{}}.mlp.fc1.weight"),
    }


def t5_sizes(header: Header) -> dict[str, Any]:
    """A config for T5 v1.1's encoder from the shapes of its file."""
    block = "encoder.block.0.layer"
    name = "shared.weight" if "shared.weight" in header.tensors else "encoder.embed_tokens.weight"
    vocabulary, width = shape_of(header, name)
    buckets, heads = shape_of(header, f"{block}.0.SelfAttention.relative_attention_bias.weight")
    rows, _ = shape_of(header, f"{block}.0.SelfAttention.q.weight")
    inner, _ = shape_of(header, f"{block}.1.DenseReluDense.wi_0.weight")
    layers = layers_of(header, "encoder.block.{}.layer.0.SelfAttention.q.weight")
    return T5_CONFIG | {
        "vocab_size": vocabulary,
        "d_model": width,
        "d_ff": inner,
        "d_kv": rows // max(1, heads),
        "num_heads": heads,
        "num_layers": layers,
        "relative_attention_num_buckets": buckets,
        "tie_word_embeddings": False,
    }

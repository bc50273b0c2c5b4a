"""What text encoders share: transformers' networks held against a file's header, its tokenizers, and prompts."""

from collections.abc import Container, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable

import torch
from torch import Tensor, nn

from mrflow.checkpoints.blueprint import blueprint
from mrflow.checkpoints.configs import MAX_BYTES
from mrflow.checkpoints.safetensors import Header, Layout, Source
from mrflow.errors import PromptError, WeightsError
from mrflow.models.headers import agree
from mrflow.records.files import parse_table, read_regular, spelled

# Of the language model, from the newest way to save it to the network alone.
PREFIXES = ("model.language_model.", "language_model.model.", "language_model.", "model.", "")


@runtime_checkable
class Tokenizer(Protocol):
    """A tokenizer as transformers has them."""

    def __call__(self, text: str, **options: object) -> Any:  # noqa: ANN401
        """An encoding with `input_ids`."""
        ...

    def decode(self, token_ids: list[int]) -> object:
        """The text of token ids."""
        ...


def without_prefixes(header: Header, *beginnings: str) -> Header:
    """A checkpoint without the tensors whose names begin so."""
    return replace(header, tensors={n: e for n, e in header.tensors.items() if not n.startswith(beginnings)})


def make_config(
    kind: Any,  # noqa: ANN401
    header: Header,
    config: Mapping[str, Any],
    sizes: Mapping[str, Any],
    *,
    free: Container[str] = (),
) -> Any:  # noqa: ANN401
    """A configuration of transformers: the one given, which must agree with the header's sizes, or else the sizes.

    Nothing is built from a configuration before, so that none makes a network larger than its file. `free` are sizes
    that shapes do not tell: a configuration may say another value.

    Raises:
        WeightsError: they do not agree, or it cannot be read.
    """
    settings = settings_of(header, config, sizes, free=free)
    try:
        return kind.from_dict(settings or dict(sizes))
    except WeightsError:
        raise
    except Exception as error:
        why = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise WeightsError(f"{header.path}: its config.json cannot be used: {why}") from None


def settings_of(
    header: Header, config: Mapping[str, Any], sizes: Mapping[str, Any], *, free: Container[str] = ()
) -> dict[str, Any]:
    """The settings of a configuration, without what no encoder here needs, that agree with the header's sizes.

    Raises:
        WeightsError: they do not, or a number is larger than any published encoder's.
    """
    agree(header, config, {k: v for k, v in sizes.items() if k not in free})
    return _harmless(config, header.path)


# What a configuration of transformers may hold that has it fetch code, or make tables of a size of its own.
NOT_READ_SETTINGS = frozenset({
    "auto_map", "attn_implementation", "_attn_implementation", "_attn_implementation_internal",
    "experts_implementation", "_experts_implementation",
    "quantization_config", "num_labels", "id2label", "label2id", "_name_or_path",
})  # fmt: skip
MAX_LAYERS, MAX_SETTING, MAX_TOKENS = 1000, 1 << 24, 100_000


def _harmless(config: Mapping[str, Any], where: object) -> dict[str, Any]:
    """Settings, those of tables inside too, without what no encoder here needs; counts of layers and the like bounded.

    Raises:
        WeightsError: a number is larger than any published encoder's.
    """
    out: dict[str, Any] = {}
    for name, value in config.items():
        if name in NOT_READ_SETTINGS:
            continue
        most = MAX_LAYERS if "layers" in name or name == "depth" else MAX_SETTING
        if isinstance(value, int) and abs(value) > most:
            raise WeightsError(f"{where}: its config.json has {name} {value}, {most} at most")
        out[name] = _harmless(cast("dict[str, Any]", value), where) if isinstance(value, dict) else value
    return out


def built(kind: Any, config: Any, header: Header) -> nn.Module:  # noqa: ANN401
    """A network of transformers on the meta device.

    Raises:
        WeightsError: its configuration makes none.
    """
    try:
        with blueprint():
            return cast("nn.Module", kind(config))
    except Exception as error:
        why = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise WeightsError(f"{header.path}: its config.json makes no network: {why}") from None


def _settings(path: Path) -> dict[str, Any]:
    """A tokenizer's settings; unlike in models', numbers may be as large as they like (`model_max_length` is 1e30)."""
    return parse_table(read_regular(path.resolve(), most=MAX_BYTES)) if path.is_file() else {}


# What transformers reads of a tokenizer, by these names alone.
TOKENIZER_FILES = (
    "tokenizer.json", "vocab.json", "merges.txt", "spiece.model", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json",
)  # fmt: skip


def misspelled(folder: Path) -> dict[str, str]:
    """The files of a tokenizer that a folder holds under names of other capitals, by those that transformers reads."""
    found = {name: spelled(folder, name).name for name in TOKENIZER_FILES}
    return {name: other for name, other in found.items() if other != name}


def seen(folder: Path) -> str:
    """What a tokenizer's folder holds under other names than transformers reads; words for an error."""
    found = misspelled(folder)
    return f"; {folder} holds {', '.join(found.values())}, which would not be read" if found else ""


def tokenizer_of(kind: str, folder: Path, rows: int) -> Tokenizer:
    """A tokenizer of transformers, by its class, from local files only, for an encoder that embeds `rows` tokens.

    Raises:
        WeightsError: the folder does not hold one, or it knows no words, or tokens that the encoder does not embed.
    """
    import transformers

    settings, most = folder / "tokenizer_config.json", max(rows, MAX_TOKENS)
    for name, other in misspelled(folder).items():
        raise WeightsError(f"{folder / other} would not be read: rename it to {name}")
    try:
        for name, value in _settings(settings).items():
            if name != "model_max_length" and isinstance(value, int) and value > most:  # such as tokens to be made up
                raise ValueError(f"{settings.name} says {name} = {value}, {most} at most")
        found = getattr(transformers, kind).from_pretrained(folder, local_files_only=True)
        last = max(found.get_vocab().values(), default=-1)
        known = [i for i in found("a picture", add_special_tokens=False).input_ids if i != found.unk_token_id]
    except Exception as error:
        why = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise WeightsError(f"{folder} holds no tokenizer that can be read: {why}") from error
    if last >= rows:
        raise WeightsError(f"{folder} holds a tokenizer of {last + 1} tokens, but the text encoder embeds {rows}")
    if not known:
        raise WeightsError(f"{folder} holds a tokenizer that knows no words: it reads nothing in 'a picture'")
    return cast("Tokenizer", found)


def shorten(text: str, most: int = 120) -> str:
    """A long text's beginning and end."""
    return text if len(text) <= most else f"{text[: most - 40]} ... {text[-35:]}"


def check_prompt(prompt: object) -> None:
    """Refuse what cannot be text: lone surrogates and NUL; any other string is a prompt, even an empty one.

    Raises:
        PromptError: the prompt is no string, cannot be encoded, or is longer than a million characters.
    """
    if not isinstance(prompt, str):
        raise PromptError(f"a prompt must be text, got {prompt!r}")
    if len(prompt) > 1_000_000:
        raise PromptError(f"the prompt has {len(prompt)} characters; a million is the limit")
    if "\0" in prompt or any(0xD800 <= ord(c) <= 0xDFFF for c in prompt):
        raise PromptError(f"the prompt holds characters that are no text (NUL or a lone surrogate): {prompt[:40]!r}")


def shape_of(header: Header, name: str) -> tuple[int, int]:
    """Rows and columns of a matrix that must be there."""
    entry = header.tensors.get(name)
    if entry is None or len(entry.shape) != 2:
        raise WeightsError(f"{header.path}: {name} is {'missing' if entry is None else 'not a matrix'}")
    return entry.shape[0], entry.shape[1]


def layers_of(header: Header, template: str) -> int:
    """How many layers there are, from 0 on."""
    count = 0
    while template.format(count) in header.tensors:
        count += 1
    return count


def language_sizes(header: Header) -> dict[str, int]:
    """Sizes of the language model that its shapes tell, by transformers' names."""
    prefix = next((p for p in PREFIXES if f"{p}embed_tokens.weight" in header.tensors), PREFIXES[0])
    vocabulary, width = shape_of(header, f"{prefix}embed_tokens.weight")
    inner, _ = shape_of(header, f"{prefix}layers.0.mlp.gate_proj.weight")
    layers = layers_of(header, prefix + "layers.{}.mlp.gate_proj.weight")
    return {"vocab_size": vocabulary, "hidden_size": width, "intermediate_size": inner, "num_hidden_layers": layers}


def text_layout(model: nn.Module, header: Header) -> Layout:
    """Where the language model's parameters lie."""
    prefix = next((p for p in PREFIXES if f"{p}embed_tokens.weight" in header.tensors), PREFIXES[0])
    return {name: Source((prefix + name,), (len(tensor),)) for name, tensor in model.state_dict().items()}


def pad_states(states: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """States of unequal length as one tensor (b, longest, width), zeros behind, and a mask (b, longest) of the text."""
    longest = max(len(s) for s in states)
    context = torch.stack([torch.nn.functional.pad(s, (0, 0, 0, longest - len(s))) for s in states])
    mask = torch.stack([torch.arange(longest, device=s.device) < len(s) for s in states])
    return context, mask

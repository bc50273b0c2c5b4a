"""What a LoRA's file holds: pairs of matrices by the name of the linear, and the factor that its metadata give."""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import torch

from mrflow._checks import is_number
from mrflow.checkpoints.configs import Config, parse_config, read_config
from mrflow.checkpoints.hub import fetch_file
from mrflow.checkpoints.names import bare
from mrflow.checkpoints.safetensors import Entry, Header, map_tensor, open_checkpoint, some
from mrflow.errors import WeightsError
from mrflow.records.files import expand_home, locate, spelled

INFIX = r"(?:\.(?P<adapter>(?!(?:weight|bias)$)[\w-]+))?"  # PEFT names adapters: lora_A.default.weight
ROLES = (
    (re.compile(rf"\.lora_A{INFIX}\.weight$|\.(?:lora_down|lora\.down|lora_linear_layer\.down|down)\.weight$"), "down"),
    (re.compile(rf"\.lora_B{INFIX}\.weight$|\.(?:lora_up|lora\.up|lora_linear_layer\.up|up)\.weight$"), "up"),
    (re.compile(rf"\.lora_B{INFIX}\.bias$|\.(?:lora_up|lora\.up)\.bias$"), "bias"),
    (re.compile(r"\.alpha$"), "alpha"),
    (re.compile(r"\.diff$"), "diff"),
    (re.compile(r"\.diff_b$"), "diff_b"),
)
AXES = {"down": 2, "up": 2, "diff": 2, "bias": 1, "diff_b": 1}
TEXT = ("text_encoder.", "text_encoder_2.", "text_encoders.", "lora_te", "te1.", "te2.", "conditioner.")
OTHER = {
    "dora_scale": "DoRA", "lora_magnitude_vector": "DoRA", "hada_": "LoHa", "lokr_": "LoKr", "oft_": "OFT",
    "lora_mid": "a Tucker-decomposed LoRA", "set_weight": "a weight replacement", "boft_": "BOFT", "vera_": "VeRA",
    "a1.weight": "GLoRA", "on_input": "IA3", "ia3_": "IA3",
}  # fmt: skip
# What PEFT trains beside a changed copy of the model's weights: added to the published ones it is something else.
BESIDE = ("pissa", "olora", "corda", "loftq", "lora_ga", "milora")


@dataclass(frozen=True)
class AdapterFile:
    """An adapter's file: what it holds by the stem of its names, and the factor that its metadata give."""

    header: Header
    groups: Mapping[str, Mapping[str, Entry]]
    extra: Mapping[str, Entry] = field(default_factory=dict[str, Entry])

    @property
    def parameters(self) -> int:
        """Numbers in the low-rank matrices."""
        return sum(
            math.prod(e.shape) for group in self.groups.values() for role, e in group.items() if role in ("down", "up")
        )


def read_groups(header: Header) -> tuple[dict[str, dict[str, Entry]], dict[str, Entry]]:
    """What a file holds by the stem of its names, and what is no part of a LoRA.

    Raises:
        WeightsError: it is an adapter of another kind, holds several adapters, or matrices that make no change.
    """
    groups: dict[str, dict[str, Entry]] = {}
    extra: dict[str, Entry] = {}
    adapters: dict[str, str] = {}
    twice: list[str] = []
    for name, entry in header.tensors.items():
        for other, what in OTHER.items():
            if f".{other}" in name:
                raise WeightsError(f"{header.path} is {what} ({name}); mrflow reads LoRA, see docs/how-to/lora.md")
        for pattern, role in ROLES:
            if found := pattern.search(name):
                group = groups.setdefault(stem := name[: found.start()], {})
                if role in group:
                    twice.append(f"{role} of {stem}")
                group[role] = entry
                if role in ("down", "up") and not is_text(stem):
                    adapters.setdefault(found.groupdict().get("adapter") or "", name)
                break
        else:
            extra[name] = entry
    if len(adapters) > 1:
        names = ", ".join(name or "(no name)" for name in sorted(adapters))
        raise WeightsError(
            f"{header.path} holds {len(adapters)} adapters: {names}; "
            f"save each in a file of its own (names such as {some(list(adapters.values()))})"
        )
    problems = [f"{each} is there twice" for each in twice]
    for stem, group in groups.items():
        if not is_text(stem) and (problem := _malformed(group)):
            problems.append(f"{stem} {problem}")
    if problems:
        raise WeightsError(f"{header.path} is no sound LoRA: {some(problems)}")
    return groups, extra


def is_text(stem: str) -> bool:
    """Whether a name is a text encoder's, behind whatever wrappers."""
    return bare(stem, lambda name: name.startswith(TEXT)) is not None


def _malformed(group: Mapping[str, Entry]) -> str:
    """What is wrong with the tensors of one linear, whatever the linear's size; empty where nothing is."""
    for role, entry in group.items():
        whole = role == "alpha" and not entry.dtype.is_complex and entry.dtype != torch.bool
        if not (entry.dtype.is_floating_point or whole):
            return f"has {role} of {entry.dtype}"
        if role != "alpha" and len(squeeze(entry.shape, AXES[role])) != AXES[role]:
            return f"has {role} of shape {entry.shape}, expected {AXES[role]} axes"
    down, up, alpha = (group.get(role) for role in ("down", "up", "alpha"))
    if (down is None) != (up is None):
        return f"has only the {'up' if down is None else 'down'} matrix"
    if set(group) <= {"alpha"}:
        return "has an alpha and nothing else"
    if down is None and "bias" in group:
        return "has a bias of low-rank matrices that are not there"
    if down is not None and up is not None:
        if down.shape[0] != up.shape[1]:
            return f"has matrices of ranks {down.shape[0]} and {up.shape[1]}"
        if not down.shape[0]:
            return "has matrices of rank 0"
    if alpha is not None:
        if math.prod(alpha.shape) != 1:
            return f"has an alpha of shape {alpha.shape}, expected one number"
        if not math.isfinite(value := number_of(alpha)):
            return f"has the alpha {value}"
    return ""


@lru_cache(maxsize=16)
def _opened(path: Path, sha256: str) -> AdapterFile:
    header = open_checkpoint(path)
    groups, extra = read_groups(header)
    if not groups:
        raise WeightsError(f"{path} holds no LoRA; its names begin with {some(list(header.tensors))}")
    return AdapterFile(header, groups, extra)


def read_adapter(path: str, sha256: str = "") -> tuple[AdapterFile, str]:
    """What an adapter's file holds, and its SHA-256; a hub file is fetched.

    Raises:
        WeightsError: the file is missing or another one than `sha256` says, or holds no LoRA.
    """
    where, found = locate(str(fetch_adapter(path)), sha256)
    return _opened(where, found), found


def fetch_adapter(path: str) -> Path:
    """The local file of `owner/name/file.safetensors` on the hub, where no such path is here; else the path itself."""
    local = expand_home(path)
    parts = path.split("/")
    if local.exists() or local.is_absolute() or len(parts) < 3 or not path.endswith(".safetensors"):
        return local
    return fetch_file("/".join(parts[:2]), "/".join(parts[2:]))


def squeeze(shape: tuple[int, ...], rank: int) -> tuple[int, ...]:
    """Without trailing axes of length 1: a linear that was saved as a 1 x 1 convolution."""
    return shape[:rank] if all(n == 1 for n in shape[rank:]) else shape


def scale_factors(header: Header) -> Callable[[str, int], float]:
    """alpha / rank by module and rank, from the file's metadata or an adapter_config.json beside it; else 1.

    As in PEFT: the first pattern that matches the end of a module's name gives its alpha or rank.

    Raises:
        WeightsError: they are of another kind of adapter, or a setting is not what it should be.
    """
    path = header.path
    raw = parse_config(header.metadata.get("lora_adapter_metadata", "{}"), f"{path}: its lora_adapter_metadata")
    settings: Mapping[str, Any] = {key.removeprefix("transformer."): value for key, value in raw.items()}
    beside = spelled(path.parent, "adapter_config.json")
    if not settings and path.name.lower() == "adapter_model.safetensors" and beside.is_file():
        path, settings = beside, read_config(beside)
    config = Config(settings, path)
    what = str(settings.get("peft_type") or "LORA").rpartition(".")[2]
    if what.upper() != "LORA" or config.flag("use_dora"):
        what = "DoRA" if what.upper() == "LORA" else what
        raise WeightsError(f"{path} is {what}; mrflow reads LoRA, see docs/how-to/lora.md")
    start = str(settings.get("init_lora_weights")).lower()
    if start.startswith(BESIDE):
        raise WeightsError(
            f"{path} was trained with init_lora_weights={start!r}, beside a changed copy of the model: let PEFT "
            "convert it (save_pretrained(path_initial_model_for_weight_conversion=...))"
        )
    roots = config.flag("use_rslora")
    alphas, ranks = (
        [
            *_patterns(settings.get(f"{kind}_pattern"), kind, key, path),
            (re.compile(""), _number(path, key, settings.get(key))),
        ]
        for kind, key in (("alpha", "lora_alpha"), ("rank", "r"))
    )

    def factor(module: str, rank: int) -> float:
        alpha, own = (next(value for pattern, value in table if pattern.match(module)) for table in (alphas, ranks))
        if alpha is None:
            return 1.0
        if own is not None and own != rank:
            raise WeightsError(f"{path} gives {module} rank {own:g}, but its matrices have {rank}")
        return alpha / (rank**0.5 if roots else rank)

    return factor


def _number(path: Path, key: str, value: object) -> float | None:
    if not (value is None or is_number(value)):
        raise WeightsError(f"{path} gives {key} {str(value)[:40]!r}, which is no number")
    return None if value is None else float(value)


def _patterns(table: object, kind: str, key: str, path: Path) -> list[tuple[re.Pattern[str], float | None]]:
    """Regular expressions of modules' names, compiled as PEFT's `get_pattern_key` does, with what each gives.

    Expressions whose search can take forever (a repeated group, or many repeats) are refused.
    """
    out: list[tuple[re.Pattern[str], float | None]] = []
    if not (table is None or isinstance(table, dict)):
        raise WeightsError(f"{path}: its {kind}_pattern must be a table of numbers by name, got {str(table)[:60]}")
    for pattern, value in cast("dict[str, object]", table or {}).items():
        plain = re.sub(r"\\.|\[(?:\\.|[^\]])*\]", "x", pattern)
        if len(pattern) > 500 or re.search(r"\)[*+{]", plain) or len(re.findall(r"[*+{]", plain)) > 3:
            raise WeightsError(f"{path}: its {kind}_pattern holds {pattern[:60]!r}, which is too involved")
        try:
            out.append((re.compile(rf"(.*\.)?({pattern})$"), _number(path, key, value)))
        except (re.error, OverflowError, RecursionError):
            raise WeightsError(f"{path}: its {kind}_pattern holds {pattern[:60]!r}, no regular expression") from None
    return out


def number_of(entry: Entry) -> float:
    return float(map_tensor(entry, {}).float().reshape(-1)[0])

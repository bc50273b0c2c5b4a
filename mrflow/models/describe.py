"""What a checkpoint is, from its headers alone."""

import math
import re
from pathlib import Path
from typing import Any, cast

from mrflow.checkpoints.lora import read_groups, scale_factors
from mrflow.checkpoints.safetensors import Header, open_checkpoint
from mrflow.errors import MrflowError
from mrflow.models.family import families
from mrflow.models.fp8 import with_scales
from mrflow.models.headers import RELATIVES, STRANGERS, kind, part
from mrflow.records.files import spelled
from mrflow.stage import human
from mrflow.upscalers import load_upscaler
from mrflow.upscalers.weights import read_state

# How the names of super-resolution nets begin.
SR = r"^(module\.|_orig_mod\.|model\.)*(body\.0|conv_first|RRDB_trunk\.0|model\.0|model\.1\.sub)\."
PARTS = ("transformer", "vae", "text_encoder", "text_encoder_2")


def describe(where: Path) -> list[str]:
    """Lines about a file, an index, a folder of shards, or a repository (each of its parts)."""
    parts = [folder for part in PARTS if (folder := spelled(where, part)).is_dir()] if where.is_dir() else []
    if parts:
        lines: list[str] = []
        for folder in parts:
            lines += [f"{folder.name}/", *(f"  {line}" for line in checkpoint(open_checkpoint(folder))[:4])]
        return lines
    if where.suffix.lower() not in (".safetensors", ".json") and not where.is_dir():
        return _upscaler(where)
    return checkpoint(open_checkpoint(where))


def _upscaler(file: Path) -> list[str]:
    """What a super-resolution checkpoint holds: the network that `--sr` makes of it, and its first tensors."""
    state = read_state(file)
    rows = [f"  {name}  {str(t.dtype).removeprefix('torch.')}  {list(t.shape)}" for name, t in state.items()]
    return [
        f"{file.name}: {len(rows)} tensors, {human(sum(t.numel() for t in state.values())) or 0} parameters",
        *enlarges(file),
        *rows[:10],
        *([f"  ... and {len(rows) - 10} more"] if len(rows) > 10 else []),
    ]


def enlarges(file: Path) -> list[str]:
    """The super-resolution network of a file, mrflow's own or spandrel's; a problem where it is none."""
    try:
        found = load_upscaler(file)
        net = type(cast(Any, found).network.net).__name__
        return [f"network   super-resolution, {net}, scale {found.scale} (--sr {file.name})"]
    except MrflowError as error:
        return [f"problem   {error}"]


def checkpoint(header: Header) -> list[str]:
    """What it holds, what network that is, and its first tensors."""
    rows = [(name, str(t.dtype).removeprefix("torch."), t.shape) for name, t in header.tensors.items()]
    count, dtypes = sum(math.prod(shape) for _, _, shape in rows), sorted({dtype for _, dtype, _ in rows})
    shards = len({t.file for t in header.tensors.values()})
    files = f" in {shards} files" if shards > 1 else ""
    return [
        f"{header.path.name}: {len(rows)} tensors{files}, {human(count) or 0} parameters, {', '.join(dtypes)}",
        *_network(header),
        *(f"  {name}  {dtype}  {list(shape)}" for name, dtype, shape in rows[:10]),
        *([f"  ... and {len(rows) - 10} more"] if len(rows) > 10 else []),
    ]


def adapter(header: Header) -> list[str]:
    """What a LoRA or pi-Flow adapter changes; nothing where it is none."""
    try:
        groups, extra = read_groups(header)
        scale_factors(header)
    except MrflowError as error:
        return [f"problem   {error}"]
    if not groups:
        return []
    ranks = sorted({group["down"].shape[0] for group in groups.values() if "down" in group})
    heads = [name for name in extra if name.startswith("proj_out")]
    what = "pi-Flow adapter" if heads else "LoRA"
    rank = ", ".join(map(str, ranks)) or "none"
    facts = "".join(f"; {key} {value}" for key, value in header.metadata.items() if len(value) < 40)
    return [f"network   {what} for {len(groups)} layers, rank {rank}, heads {len(heads)}{facts}"]


def _network(header: Header) -> list[str]:
    """The network it is for, its layout and sizes, as far as keys and shapes tell."""
    if "flow.double_blocks.0.img_attn.qkv.weight" in header.tensors:
        return [f"network   pocket, mrflow's embedded model, version {header.metadata.get('version', 'unknown')}"]
    what = kind(header)
    if what is None:
        sr = any(re.search(SR, name) for name in header.tensors)
        return adapter(header) or (enlarges(header.path) if sr else ["network   not known to mrflow"])
    if what == "a super-resolution net":
        return enlarges(header.path)
    if what in (RELATIVES | STRANGERS).values():
        return [f"network   {what}, which mrflow does not load"]
    lines = [f"network   {what.removeprefix('a ')}"]
    try:
        plain = with_scales(part(header, what))
        for family in families():
            if what in (family.transformer, family.autoencoder):
                lines += family.describe(what, plain)
        if any(entry.scale is not None for entry in plain.tensors.values()):
            lines.append("values    8-bit with scales")
    except MrflowError as error:
        lines.append(f"problem   {error}")
    return lines

"""A row of a sweep: one picture, what it is and how it was made; and the one reader of row files.

A folder may come from anywhere, so nothing that a file says is used before its type, size and range are checked.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from mrflow.noise import check_seed
from mrflow.records.files import parse_table, read_regular

FORMAT = 1
MAX_BYTES = 16 << 20  # of a row's file, and of sweep.json without its chains
LARGEST = 1e100  # of any number, so that sums and squares stay finite
MOST = 256  # metrics, tags and the like of one row: every metric has a table of its own

Cause = Literal["", "error", "death", "timeout"]


@dataclass(frozen=True)
class Row:
    """One picture of a sweep: what it is, how it was made, what it cost, how it scored.

    `draw` numbers the pictures of a prompt, `seed` is what its noise was drawn from (`mrflow run --seed`). `tries`
    counts how often it was begun, itself included. `cause` says why a failed row failed: its own error, the death of
    the process that made it, or the time limit. `picture_bytes` and `picture_sha256` tell whether the picture is still
    the one that was measured. `seconds` are those of its batch over the pictures in it; rows of one batch share what
    `timed` says. `machine` names the processor, the system and the Python. `unmeasured` holds, by metric, the error
    that kept it from giving numbers.
    """

    key: str
    status: str
    chain: str
    model: str
    weights: str
    prompt: str
    negative: str
    seed: int
    draw: int = 0
    tags: Mapping[str, str] = field(default_factory=dict[str, str])
    error: str | None = None
    cause: Cause = ""
    tries: int = 1
    seconds: float = 0.0
    nfe: int = 0
    flops: float = 0.0
    peak_bytes: int = 0
    stages: Sequence[Mapping[str, Any]] = ()
    metrics: Mapping[str, float] = field(default_factory=dict[str, float])
    measured: Sequence[str] = ()
    unmeasured: Mapping[str, str] = field(default_factory=dict[str, str])
    picture: str | None = None
    picture_bytes: int = 0
    picture_sha256: str = ""
    stage_pictures: Sequence[Sequence[str]] = ()
    versions: Mapping[str, str] = field(default_factory=dict[str, str])
    device: str = ""
    machine: str = ""
    batch: int = 1
    timed: str = ""
    time: str = ""
    format: int = FORMAT

    @property
    def done(self) -> bool:
        """Whether there is a picture."""
        return self.status == "done"

    @property
    def rendered(self) -> bool:
        """Whether its chain begins with the truth: it has no speed to compare, and is no method to judge."""
        return bool(self.stages) and self.stages[0]["name"] == "Truth"


def seed_of(prompt: str, draw: int) -> int:
    """The seed of a prompt's n-th draw: the first 32 bits of the SHA-256 of both, the same on every machine.

    Prompts must not share their noise: its effect on a mean over prompts would not average out, and no interval over
    prompts would show it.

    Raises:
        PlanError: `draw` is not a whole number that a seed may be.
    """
    digest = hashlib.sha256(json.dumps([prompt, check_seed(draw)]).encode()).digest()
    return int.from_bytes(digest[:4], "big")


def row_key(
    chain: str, model: str, weights: str, prompt: str, negative: str, seed: int, made_by: Mapping[str, str]
) -> str:
    """The SHA-256 of all that a row's picture depends on; `chain` is the last of its `fingerprints`."""
    parts = [chain, model, weights, prompt, negative, seed, sorted(made_by.items())]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def read_row(path: str | Path) -> Row | None:
    """The row that a file holds, or None where it is not there or not a whole and sensible row under its own name.

    Raises:
        Nothing: whatever is wrong with the file, there is no row.
    """
    try:
        table = parse_table(read_regular(path, most=MAX_BYTES))
    except (OSError, ValueError):
        return None
    known = {name: value for name, value in table.items() if name in _CHECKS}
    if known.get("key") != os.path.basename(path).removesuffix(".json"):
        return None
    if not known.keys() >= _NEEDED or not all(_CHECKS[name](value) for name, value in known.items()):
        return None
    if known["status"] == "done" and known.get("picture") is None:
        return None
    return Row(**known)


def sha256_of(data: bytes) -> str:
    """The SHA-256 of a picture's file, in hex."""
    return hashlib.sha256(data).hexdigest()


def _text(value: object) -> bool:
    return isinstance(value, str)


def _count(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 63


def _number(value: object) -> bool:
    return type(value) in (int, float) and -LARGEST <= value <= LARGEST  # type: ignore[operator]


def _amount(value: object) -> bool:
    return _number(value) and value >= 0  # type: ignore[operator]


def _each(check: Callable[[object], bool]) -> Callable[[object], bool]:
    """Holds for a table by text, of at most `MOST` values, which all pass."""
    return lambda value: isinstance(value, dict) and len(value) <= MOST and all(check(v) for v in value.values())  # pyright: ignore


_PICTURE = re.compile(r"pictures/(?!\.)[^/\\\0]{1,100}/(?!\.)[^/\\\0]{1,250}")


def _picture(value: object) -> bool:
    return isinstance(value, str) and _PICTURE.fullmatch(value) is not None


def _stage_pictures(value: object) -> bool:
    if not isinstance(value, list):
        return False
    return all(isinstance(v, list) and len(v) == 2 and _text(v[0]) and _picture(v[1]) for v in value)  # pyright: ignore


_STAGE: Mapping[str, Callable[[object], bool]] = {
    "name": _text, "out": _text, "seconds": _amount, "nfe": _count, "flops": _amount,
    "cached": lambda v: isinstance(v, bool),
}  # fmt: skip


def _stages(value: object) -> bool:
    if not isinstance(value, list):
        return False
    for stage in value:  # pyright: ignore
        if not (isinstance(stage, dict) and {"name", "seconds"} <= stage.keys()):  # pyright: ignore
            return False
        if not all(_STAGE[name](v) for name, v in stage.items() if name in _STAGE):  # pyright: ignore
            return False
    return True


_CHECKS: Mapping[str, Callable[[object], bool]] = {
    "key": _text,
    "status": lambda v: v in ("done", "failed"),
    **dict.fromkeys(("chain", "model", "weights", "prompt", "negative", "device", "machine", "timed", "time"), _text),
    "picture_sha256": _text,
    **dict.fromkeys(("seed", "draw", "nfe", "peak_bytes", "picture_bytes"), _count),
    **dict.fromkeys(("tries", "batch"), lambda v: _count(v) and v > 0),  # type: ignore[operator]
    **dict.fromkeys(("seconds", "flops"), _amount),
    **dict.fromkeys(("tags", "versions", "unmeasured"), _each(_text)),
    "error": lambda v: v is None or isinstance(v, str),
    "cause": lambda v: v in ("", "error", "death", "timeout"),
    "stages": _stages,
    "metrics": _each(_number),
    "measured": lambda v: isinstance(v, list) and all(map(_text, v)),  # pyright: ignore
    "picture": lambda v: v is None or _picture(v),
    "stage_pictures": _stage_pictures,
    "format": lambda v: v == FORMAT,
}
_NEEDED = {f.name for f in fields(Row)[:8]}
assert _CHECKS.keys() == {f.name for f in fields(Row)}

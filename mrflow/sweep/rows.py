"""A row of a sweep: one picture, what it is and how it was made; and the one reader of row files.

A folder may come from anywhere, so nothing that a file says is used before its type, size and range are checked.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from mrflow._checks import check_seed
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


@lru_cache(maxsize=64, typed=True)
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
    known = {name: table[name] for name in _FIELDS if name in table}
    if known.get("key") != os.path.basename(path).removesuffix(".json"):
        return None
    if not known.keys() >= _NEEDED or not _pass(_CHECKS, known):
        return None
    if known["status"] == "done" and known.get("picture") is None:
        return None
    return Row(**known)


def sha256_of(data: bytes) -> str:
    """The SHA-256 of a picture's file, in hex."""
    return hashlib.sha256(data).hexdigest()


Check = Callable[[Collection[Any]], bool]  # of all values of one kind at once: a report checks millions


def _pass(checks: Mapping[tuple[str, ...], Check], table: Mapping[str, Any]) -> bool:
    return all([check([table[name] for name in names if name in table]) for names, check in checks.items()])


def _texts(values: Collection[Any]) -> bool:
    return {*map(type, values)} <= {str}


def _lists(values: Collection[Any]) -> bool:
    return {*map(type, values)} <= {list}


def _counts(values: Collection[Any]) -> bool:
    return {*map(type, values)} <= {int} and all([0 <= v < 1 << 63 for v in values])


def _numbers(values: Collection[Any]) -> bool:
    return {*map(type, values)} <= {int, float} and all([-LARGEST <= v <= LARGEST for v in values])


def _amounts(values: Collection[Any]) -> bool:
    return {*map(type, values)} <= {int, float} and all([0 <= v <= LARGEST for v in values])


def _among(*allowed: object) -> Check:
    return lambda values: all([v in allowed for v in values])


def _tables_of(check: Check) -> Check:
    """Tables by text, of at most `MOST` values each, which pass."""
    return lambda values: all([type(v) is dict and len(v) <= MOST and check(v.values()) for v in values])


_PICTURE = re.compile(r"pictures/(?!\.)[^/\\\0]{1,100}/(?!\.)[^/\\\0]{1,250}")


def _pictures(values: Collection[Any]) -> bool:
    return all([isinstance(v, str) and _PICTURE.fullmatch(v) is not None for v in values])


def _stage_pictures(values: Collection[Any]) -> bool:
    each = [pair for v in values if type(v) is list for pair in v]
    if not _lists(values) or not all([type(pair) is list and len(pair) == 2 for pair in each]):
        return False
    return _texts([name for name, _ in each]) and _pictures([path for _, path in each])


def _stages(values: Collection[Any]) -> bool:
    each = [stage for v in values if type(v) is list for stage in v]
    if not _lists(values) or not all([type(s) is dict and "name" in s and "seconds" in s for s in each]):
        return False
    return all([_pass(_STAGE, stage) for stage in each])


_STAGE: Mapping[tuple[str, ...], Check] = {
    ("name", "out"): _texts,
    ("seconds", "flops"): _amounts,
    ("nfe",): _counts,
    ("cached",): lambda values: {*map(type, values)} <= {bool},
}
_CHECKS: Mapping[tuple[str, ...], Check] = {
    ("key", "chain", "model", "weights", "prompt", "negative", "device", "machine", "timed", "time", "picture_sha256"):
        _texts,
    ("status",): _among("done", "failed"),
    ("seed", "draw", "nfe", "peak_bytes", "picture_bytes"): _counts,
    ("tries", "batch"): lambda values: _counts(values) and 0 not in values,
    ("seconds", "flops"): _amounts,
    ("tags", "versions", "unmeasured"): _tables_of(_texts),
    ("error",): lambda values: {*map(type, values)} <= {str, type(None)},
    ("cause",): _among("", "error", "death", "timeout"),
    ("stages",): _stages,
    ("metrics",): _tables_of(_numbers),
    ("measured",): lambda values: _lists(values) and all(map(_texts, values)),
    ("picture",): lambda values: _pictures([v for v in values if v is not None]),
    ("stage_pictures",): _stage_pictures,
    ("format",): _among(FORMAT),
}  # fmt: skip
_FIELDS = tuple(f.name for f in fields(Row))
_NEEDED = {*_FIELDS[:8]}
assert sorted(name for names in _CHECKS for name in names) == sorted(_FIELDS)

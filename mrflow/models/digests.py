"""The SHA-256 of every file of a model: read whole when a sweep or `mrflow inspect --verify` asks, then remembered.

What was read is remembered by size, time and inode, with a checksum of every tensor, so that a bit that flips on the
disk later is seen and named. A file of the hub's cache is known by the SHA-256 that the hub records as its name.
"""

import hashlib
import json
import re
import struct
import zlib
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from mrflow.checkpoints.safetensors import read_header
from mrflow.errors import MrflowError, ResourceError, WeightsError
from mrflow.records.files import parse_table, read_regular, write_bytes

SHA256 = re.compile(r"[0-9a-f]{64}")
BLOCK, MOST = 1 << 22, 1 << 26
ENDINGS = (".safetensors", ".json", ".model", ".txt", ".jinja")


def weights_of(version: str, files: Iterable[str], memory: Path) -> str:
    """What tells a model's weights: its version, and a digest of every one of its files.

    Raises:
        WeightsError: a file is gone. ResourceError: one cannot be read.
    """
    found = sorted((Path(file).name, _known(Path(file), memory)) for file in files)
    return f"{version}+{hashlib.sha256(repr(found).encode()).hexdigest()[:12]}" if found else version


def _known(path: Path, memory: Path) -> str:
    """The SHA-256 of a file: as the hub records it, as it was remembered, or read now."""
    if recorded := hub_digest(path):
        return recorded
    said = _remembered(path, memory)
    return str(said["sha256"]) if said.get("state") == _state(path) else str(_read(path, memory)["sha256"])


def hub_digest(path: Path) -> str:
    """The SHA-256 that the hub's cache gives a file as its name; empty where there is none."""
    whole = path.resolve()
    return whole.name if path.is_symlink() and whole.parent.name == "blobs" and SHA256.fullmatch(whole.name) else ""


def verify(where: Path, memory: Path) -> list[str]:
    """Read every file of a model whole, and hold it against what is known of it; lines that say what was found.

    Raises:
        WeightsError: a file holds something else than the hub records, or than when it was read last, unchanged by its
            size and time; the text names file and tensors.
    """
    files = (
        [where]
        if where.is_file()
        else sorted(p for p in where.rglob("*") if p.is_file() and p.suffix.lower() in ENDINGS)
    )
    if not files:
        raise WeightsError(f"{where} holds no file of a model")
    lines: list[str] = []
    for path in files:
        recorded, before, state = hub_digest(path), _remembered(path, memory), _state(path)
        same = before.get("state") == state
        now = _scan(path)
        if recorded and now["sha256"] != recorded:
            raise WeightsError(
                f"{path} is damaged: its SHA-256 is {now['sha256']}, the hub's is {recorded}; fetch it again"
            )
        if same and now["sha256"] != before["sha256"]:
            tensors, old = now["tensors"], before.get("tensors", {})
            bad = [name for name, sum_ in tensors.items() if old.get(name) != sum_]
            raise WeightsError(
                f"{path} is damaged: neither its size nor its time changed, but its SHA-256 was {before['sha256']} and "
                f"is {now['sha256']}{'; tensors: ' + ', '.join(bad[:4]) if bad else ''}; copy it again"
            )
        _remember(path, memory, now)
        what = "as the hub records" if recorded else "as when it was read last" if same else "now remembered"
        lines.append(f"{now['sha256']}  {path.name}  {what}")
    return lines


def _state(path: Path) -> list[int]:
    try:
        status = path.stat()
    except OSError as error:
        raise WeightsError(f"{path} is not here: {error.strerror or error}") from None
    return [status.st_size, status.st_mtime_ns, status.st_ino]


def _place(path: Path, memory: Path) -> Path:
    return memory / "digests" / f"{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:32]}.json"


def _remembered(path: Path, memory: Path) -> dict[str, Any]:
    try:
        said = parse_table(read_regular(_place(path, memory), most=MOST))
    except (OSError, ValueError):
        return {}
    right = SHA256.fullmatch(str(said.get("sha256"))) and isinstance(said.get("tensors"), dict)
    return said if right and said.get("path") == str(path.resolve()) else {}


def _read(path: Path, memory: Path) -> dict[str, Any]:
    found = _scan(path)
    _remember(path, memory, found)
    return found


def _remember(path: Path, memory: Path, found: dict[str, Any]) -> None:
    with suppress(OSError, ResourceError):  # without a memory it is read again
        place = _place(path, memory)
        place.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(place, json.dumps(found).encode())


def _scan(path: Path) -> dict[str, Any]:
    """A file's state, SHA-256, and the CRC-32 of every tensor of a checkpoint."""
    state, whole, sums = _state(path), hashlib.sha256(), dict[str, int]()
    try:
        with path.open("rb") as file:
            if path.suffix.lower() == ".safetensors":
                with suppress(MrflowError):  # what is no checkpoint is told by its SHA-256 alone
                    entries = sorted(read_header(path).tensors.items(), key=lambda item: item[1].start)
                    head = file.read(entries[0][1].start if entries else 8)
                    whole.update(head)
                    stops = [entry.start for _, entry in entries[1:]] + [state[0]]
                    for (name, entry), stop in zip(entries, stops, strict=True):
                        left, sum_ = stop - entry.start, 0
                        while left and (block := file.read(min(BLOCK, left))):
                            left, sum_ = left - len(block), zlib.crc32(block, sum_)
                            whole.update(block)
                        sums[name] = sum_
            while block := file.read(BLOCK):
                whole.update(block)
    except (OSError, struct.error) as error:
        raise ResourceError(f"{path} cannot be read: {error}") from None
    return {"path": str(path.resolve()), "state": state, "sha256": whole.hexdigest(), "tensors": sums}

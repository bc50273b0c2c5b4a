"""Results of stages, kept by content: an ablation over refine settings pays for the low-resolution stage once.

A stage's result depends on the model and its weights, the prompt, the seed and the chain up to it; that, hashed, is the
key, one for each item of a batch. Items are found whatever batch they were made in.
"""

import hashlib
import os
import re
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch
from safetensors.torch import load, save
from torch import Tensor

from mrflow._checks import check_path, check_whole
from mrflow.backbone import Backbone, Condition
from mrflow.display.notes import note
from mrflow.flow import finite
from mrflow.records.chains import fingerprint
from mrflow.records.files import read_regular
from mrflow.records.publish import publish
from mrflow.spec import Pixels, Spec, Start, State
from mrflow.stage import A, B, Chain, Plan


class StageCache:
    """Keeps stage results in memory, up to `max_bytes`, and in `folder` where one is given, up to as many again.

    Files are written whole or not at all, so several processes may share a folder. Each carries a SHA-256; one that is
    broken, or that breaks its stage's promise, is made again. The entries used longest ago make room. A folder that
    takes no files is left out with a note.

    Raises:
        PlanError: `max_bytes` is no whole number above 0, or `folder` is no path.
    """

    def __init__(self, folder: str | Path | None = None, *, max_bytes: int = 1 << 30) -> None:
        check_whole("max_bytes", max_bytes, 1, wanted="a whole number above 0")
        self.folder = None if folder is None else check_path("the cache's folder", folder)
        self.max_bytes = max_bytes
        self.hits = 0
        self._memory: OrderedDict[str, Tensor] = OrderedDict()
        self._bytes = 0
        self._room = 0  # bytes that may be written before the folder is looked through
        self._refused = False

    def keys(
        self,
        chain: Chain[A, B],
        model: Backbone,
        prompts: Sequence[str],
        seeds: Sequence[int],
        negative: str,
        first: State[Spec],
        condition: Condition | None,
    ) -> list[list[str]]:
        """For each stage, a key for each item."""
        info = model.info
        out: list[list[str]] = []
        start = [b"" if isinstance(first.spec, Start) else _bytes(item) for item in first.data]
        conds = [b""] * len(prompts)
        if condition is not None:
            whole = condition.repeat(len(prompts))
            conds = [b"".join(_bytes(whole[name][i]) for name in sorted(whole.tensors)) for i in range(len(prompts))]
        device = model.device.type
        running = [
            hashlib.sha256(repr((info.name, info.version, device, prompt, seed, negative)).encode() + s + c).hexdigest()
            for prompt, seed, s, c in zip(prompts, seeds, start, conds, strict=True)
        ]
        for stage in chain:
            own = fingerprint(stage)
            running = [hashlib.sha256((key + own).encode()).hexdigest() for key in running]
            out.append(running)
        return out

    def longest(self, keys: list[list[str]], plan: Plan, device: torch.device) -> tuple[int, Tensor | None]:
        """How many stages need not run, and what the last of them gave for the whole batch.

        What is found is held to the promise of its stage; an entry that breaks it counts as missing.
        """
        for done in range(len(keys), 0, -1):
            out = plan.rows[done - 1].out
            items = [self.get(key) for key in keys[done - 1]]
            found = [item for item in items if item is not None and _keeps(item, out)]
            if len(found) == len(items):
                self.hits += 1
                return done, torch.stack(found).to(device)
        return 0, None

    def get(self, key: str) -> Tensor | None:
        """One item's result, or None: where there is none, or its file is not what was written."""
        if key in self._memory:
            self._memory.move_to_end(key)
            return self._memory[key]
        if self.folder is None:
            return None
        try:
            found = load(read_regular(self._path(key), most=self.max_bytes + HEADER))
            item, seal = found["data"], bytes(found["sha256"].tolist())
        except Exception:  # a broken file, whatever it leads the reader to, is no entry
            return None
        if seal != _seal(key, item):
            return None
        with suppress(OSError):
            os.utime(self._path(key))  # the latest used goes last
        self._keep(key, item)
        return item

    def put(self, keys: Sequence[str], data: Tensor) -> None:
        """Keep a batch's results. Where the folder takes no files, a note says so and nothing more is written."""
        for key, item in zip(keys, data.detach().cpu(), strict=True):
            item = item.contiguous().clone()
            self._keep(key, item)
            if self.folder is None or self._refused or item.nbytes + HEADER > self.max_bytes:
                continue
            seal = torch.tensor(list(_seal(key, item)), dtype=torch.uint8)
            try:
                self._path(key).parent.mkdir(parents=True, exist_ok=True)
                publish({self._path(key): save({"data": item, "sha256": seal})}, force=True)
                self._bound(item.nbytes + HEADER)
            except OSError as error:  # a ResourceError is one
                self._refused = True
                note(f"the stage cache in {self.folder} takes no files and is left out ({error})")

    def _path(self, key: str) -> Path:
        assert self.folder is not None
        return self.folder / key[:2] / f"{key}.safetensors"

    def _keep(self, key: str, item: Tensor) -> None:
        if key in self._memory or item.nbytes > self.max_bytes:
            return
        self._memory[key] = item
        self._bytes += item.nbytes
        while self._bytes > self.max_bytes:
            self._bytes -= self._memory.popitem(last=False)[1].nbytes

    def _bound(self, written: int) -> None:
        """Remove the entries that were used longest ago while the folder holds more than `max_bytes`."""
        assert self.folder is not None
        self._room -= written
        if self._room >= 0:
            return
        entries: list[tuple[int, int, Path]] = []
        for path in self.folder.glob("[0-9a-f][0-9a-f]/*.safetensors"):
            if ENTRY.fullmatch(path.stem) and path.parent.name == path.stem[:2]:
                with suppress(OSError):
                    stat = path.lstat()
                    entries.append((stat.st_mtime_ns, stat.st_size, path))
        total = sum(size for _, size, _ in entries)
        for _, size, path in sorted(entries):
            if total <= self.max_bytes:
                break
            path.unlink(missing_ok=True)
            total -= size
        self._room = min(self.max_bytes - total, self.max_bytes // 16)  # others may write here too: look again soon


HEADER = 1024  # more than a file adds to its numbers
ENTRY = re.compile("[0-9a-f]{64}")


def _seal(key: str, item: Tensor) -> bytes:
    """SHA-256 of an entry: its key, kind, shape and numbers."""
    head = repr((key, str(item.dtype), tuple(item.shape))).encode()
    return hashlib.sha256(head + item.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()).digest()


def _keeps(item: Tensor, out: Spec) -> bool:
    """Whether one item is what its stage promised."""
    if tuple(item.shape) != out.shape[1:] or item.dtype != torch.float32 or not finite(item):
        return False
    return not isinstance(out, Pixels) or (float(item.min()) >= 0 and float(item.max()) <= 1)


def _bytes(item: Tensor) -> bytes:
    return hashlib.sha256(item.detach().float().cpu().contiguous().numpy().tobytes()).digest()

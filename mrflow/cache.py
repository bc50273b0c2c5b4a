"""Results of stages, kept by content: an ablation over refine settings pays for the low-resolution stage once.

A stage's result depends on the model and its weights, the prompt, the seed and the chain up to it; that, hashed, is the
key, one for each item of a batch. Items are found whatever batch they were made in.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from mrflow.records import fingerprint
from mrflow.spec import Spec, Start, State
from mrflow.stage import A, B, Chain, Plan

if TYPE_CHECKING:
    from mrflow.backbone import Backbone, Condition


class StageCache:
    """Keeps stage results in memory, up to `max_bytes`, and in `folder` where one is given.

    Files are written whole or not at all, so several processes may share a folder; a broken file is made again.
    """

    def __init__(self, folder: str | Path | None = None, *, max_bytes: int = 1 << 30) -> None:
        self.folder = None if folder is None else Path(folder)
        self.max_bytes = max_bytes
        self.hits = self.misses = 0
        self._memory: OrderedDict[str, Tensor] = OrderedDict()
        self._bytes = 0

    def keys(
        self,
        chain: Chain[A, B],
        model: "Backbone",
        prompts: Sequence[str],
        seeds: Sequence[int],
        negative: str,
        first: State[Spec],
        condition: "Condition | None",
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
        """How many stages need not run, and what the last of them gave for the whole batch."""
        for done in range(len(keys), 0, -1):
            shape = plan.rows[done - 1].out.shape[1:]
            items = [self.get(key) for key in keys[done - 1]]
            found = [item for item in items if item is not None and tuple(item.shape) == shape]
            if len(found) == len(items):
                self.hits += 1
                return done, torch.stack(found).to(device)
        self.misses += 1
        return 0, None

    def get(self, key: str) -> Tensor | None:
        """One item's result, or None."""
        if key in self._memory:
            self._memory.move_to_end(key)
            return self._memory[key]
        if self.folder is None:
            return None
        try:
            item = load_file(self._path(key))["data"]
        except (OSError, SafetensorError, KeyError):
            return None
        self._keep(key, item)
        return item

    def put(self, keys: Sequence[str], data: Tensor) -> None:
        """Keep a batch's results."""
        from mrflow.io import write_bytes

        for key, item in zip(keys, data.detach().cpu(), strict=True):
            item = item.contiguous().clone()
            self._keep(key, item)
            if self.folder is not None:
                self._path(key).parent.mkdir(parents=True, exist_ok=True)
                write_bytes(self._path(key), save({"data": item}))

    def _path(self, key: str) -> Path:
        assert self.folder is not None
        return self.folder / key[:2] / f"{key}.safetensors"

    def _keep(self, key: str, item: Tensor) -> None:
        if key in self._memory:
            return
        self._memory[key] = item
        self._bytes += item.nbytes
        while self._bytes > self.max_bytes and len(self._memory) > 1:
            self._bytes -= self._memory.popitem(last=False)[1].nbytes


def _bytes(item: Tensor) -> bytes:
    return hashlib.sha256(item.detach().float().cpu().contiguous().numpy().tobytes()).digest()

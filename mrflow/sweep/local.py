"""The engine on this machine: which rows are missing, and one maker for all of them."""

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from mrflow.backbone import Backbone
from mrflow.errors import PlanError
from mrflow.sweep.grid import Sweep, fingerprints, versions
from mrflow.sweep.maker import Maker
from mrflow.sweep.store import Row, Store


@dataclass(frozen=True)
class Progress:
    """How far a sweep is, in rows; `left` is a guess in seconds."""

    done: int
    failed: int
    total: int
    left: float | None
    label: str = ""


@dataclass(frozen=True)
class Summary:
    """What a sweep did: rows made now, there before, failed, and left to others (or to the next time)."""

    made: int
    before: int
    failed: int
    left: int
    stopped: bool
    folder: str


def run_sweep(
    sweep: Sweep,
    model: Backbone,
    folder: str | Path,
    *,
    batch: int = 4,
    shard: tuple[int, int] = (0, 1),
    retry: bool = False,
    on_progress: Callable[[Progress], None] | None = None,
    stop: threading.Event | None = None,
) -> Summary:
    """Make every row of a sweep that is not there yet; call it again after any interruption, it goes on.

    `shard` (i, n) takes every n-th pair of prompt and draw from the i-th on; `retry` makes failed rows again; `stop`
    ends it after the batch that is being made.

    Raises:
        PlanError: a chain cannot work with this model, the batch or the shard make no sense; before anything is made.
        ResourceError: the folder cannot be written, or the disk is full: what is there stays, call it again.
    """
    check_run(batch, shard)
    index, count = shard
    store = Store(folder)
    maker = Maker(sweep, model, store)
    store.open(manifest(sweep, model))
    pairs = sweep.pairs[index::count]
    todo = {pair: sum(1 for _ in maker.missing([pair], retry=retry)) for pair in pairs}
    total = len(pairs) * len(sweep.chains)
    before = total - sum(todo.values())
    wanted = [pair for pair in pairs if todo[pair]]
    made = failed = 0
    began = time.monotonic()

    def seen(row: Row) -> None:
        nonlocal made, failed
        made, failed = made + row.done, failed + (not row.done)
        if on_progress is not None:
            share = (made + failed) / max(1, sum(todo.values()))
            left = (time.monotonic() - began) * (1 / share - 1) if share else None
            on_progress(Progress(before + made + failed, failed, total, left, row.chain))

    with store.holding():
        for start in range(0, len(wanted), batch):
            if stop is not None and stop.is_set():
                break
            maker.make(wanted[start : start + batch], retry=retry, on_row=seen)
        maker.refresh(pairs)
    left = sum(1 for _ in maker.missing(pairs))
    return Summary(made, before, failed, left, bool(stop is not None and stop.is_set()), str(folder))


def check_run(batch: int, shard: tuple[int, int]) -> None:
    """Refuse a batch or a shard that makes no sense."""
    if isinstance(batch, bool) or batch < 1:
        raise PlanError(f"batch must be a whole number above 0, got {batch!r}")
    if not 0 <= shard[0] < shard[1]:
        raise PlanError(f"a shard (i, n) needs 0 <= i < n, got {shard}")


def manifest(sweep: Sweep, model: Backbone) -> Mapping[str, object]:
    """What sweep.json says."""
    return {
        "chains": sweep.encoded(),
        "prints": {label: fingerprints(chain)[-1] for label, chain in sweep.chains.items()},
        "negative": sweep.negative_for(model.info),
        "versions": versions(),
        "model": model.info.name,
        "weights": model.info.version,
        "prompts": len(sweep.prompts),
        "seeds": len(sweep.seeds),
        "rows": sweep.rows,
        "reference": sweep.reference,
    }

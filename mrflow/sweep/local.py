"""The engine on this machine: which rows are missing, and one maker for all of them."""

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mrflow._checks import check_whole
from mrflow.backbone import Backbone
from mrflow.errors import PlanError
from mrflow.records.chains import files_of
from mrflow.sweep.aims import to_plain
from mrflow.sweep.grid import Sweep, fingerprints, model_at, versions, weights
from mrflow.sweep.maker import Maker
from mrflow.sweep.metrics import scales_of
from mrflow.sweep.rows import Row
from mrflow.sweep.store import Store
from mrflow.sweep.trackers import Logs, Tracker


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
    """What a sweep did: rows made now, there before, failed, and left to others (or to the next time).

    `stayed` counts, of those that were there before, rows that had failed and were not made again. `unmeasured` counts
    rows whose picture is there but which lack a metric that failed; `errors` are the first few texts of failed rows and
    metrics.
    """

    made: int
    before: int
    failed: int
    left: int
    stopped: bool
    folder: str
    unmeasured: int = 0
    errors: tuple[str, ...] = ()
    stayed: int = 0


def run_sweep(
    sweep: Sweep,
    model: Backbone,
    folder: str | Path,
    *,
    batch: int = 4,
    shard: tuple[int, int] = (0, 1),
    retry: bool = False,
    row_timeout: float | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    stop: threading.Event | None = None,
    log: Sequence[Tracker] = (),
) -> Summary:
    """Make every row of a sweep that is not there yet; call it again after any interruption, it goes on.

    `shard` (i, n) takes every n-th pair of prompt and draw from the i-th on; `retry` makes failed rows again, those
    whose process died are made again anyway; `row_timeout` is how many seconds a row may take, and each metric for a
    picture; `stop` ends it after the batch that is being made. Rows that a process died with come last, each alone.
    `log` hears of every row as it is made (`mrflow.sweep.trackers`); one that fails on the way is left out with a
    warning.

    Raises:
        PlanError: a chain cannot work with this model, the batch or the shard make no sense; before anything is made.
        ResourceError: the folder cannot be written, or the disk is full. DeviceLostError: the device failed.

    In both cases what is there stays, call it again.
    """
    check_run(batch, shard, row_timeout)
    index, count = shard
    store = Store(folder)
    maker = Maker(sweep, model, store, row_timeout=row_timeout)
    said = manifest(sweep, model)
    store.open(said)
    logs = Logs(log, store.folder, said)
    pairs = sweep.pairs[index::count]
    total = len(pairs) * len(sweep.chains)
    tally = RowTally()
    with store.holding():
        wanted = [(pair, n) for pair, n in zip(pairs, maker.survey(pairs, retry=retry), strict=True) if n]
        before = total - sum(n for _, n in wanted)
        open_ = [pair for pair, _ in wanted]
        began = time.monotonic()

        def seen(row: Row) -> None:
            tally.add(row)
            logs.row(row)
            if on_progress is not None:
                made = tally.made + tally.failed
                left = (time.monotonic() - began) * ((total - before) / made - 1)
                on_progress(Progress(before + made, tally.failed, total, left, row.chain))

        for calm in (True, False):
            for start in range(0, len(open_), batch):
                if stop is not None and stop.is_set():
                    break
                maker.make(open_[start : start + batch], calm=calm, on_row=seen)
            open_ = [pair for pair, n in zip(open_, maker.lacking(open_), strict=True) if n]
        stopped = stop is not None and stop.is_set()
        if not stopped:
            maker.refresh(on_row=tally.look)
        left = sum(maker.lacking(open_))
    logs.finish()
    return tally.summary(before, left, str(folder), stopped=stopped, stayed=maker.stayed)


@dataclass
class RowTally:
    """Rows as they come."""

    made: int = 0
    failed: int = 0
    unmeasured: set[str] = field(default_factory=set[str])
    errors: dict[str, None] = field(default_factory=dict[str, None])

    def add(self, row: Row) -> None:
        """Count one."""
        self.made += row.done
        self.failed += not row.done
        self.look(row)

    def look(self, row: Row) -> None:
        """Note which metrics a row lacks, and no longer lacks."""
        (self.unmeasured.add if row.unmeasured else self.unmeasured.discard)(row.key)
        for text in (row.error, *row.unmeasured.values()):
            if text and len(self.errors) < 3:
                self.errors.setdefault(f"{row.chain}: {text}")

    def summary(self, before: int, left: int, folder: str, *, stopped: bool, stayed: int = 0) -> Summary:
        """All of it."""
        errors = tuple(self.errors)
        return Summary(self.made, before, self.failed, left, stopped, folder, len(self.unmeasured), errors, stayed)


def check_run(batch: int, shard: tuple[int, int], row_timeout: float | None) -> None:
    """Refuse a batch, a shard or a time limit that makes no sense."""
    if row_timeout is not None and not 0 < row_timeout < float("inf"):
        raise PlanError(f"row_timeout must be a number of seconds above 0, got {row_timeout!r}")
    check_whole("batch", batch, 1, wanted="a whole number above 0")
    if not 0 <= shard[0] < shard[1]:
        raise PlanError(f"a shard (i, n) needs 0 <= i < n, got {shard}")


def manifest(sweep: Sweep, model: Backbone) -> Mapping[str, object]:
    """What sweep.json says.

    Raises:
        PlanError: a metric names an aim that there is not.
    """
    needs = {label: files_of(chain) for label, chain in sweep.chains.items()}
    return {
        "chains": sweep.as_data(),
        "prints": {label: fingerprints(chain)[-1] for label, chain in sweep.chains.items()},
        "negative": sweep.negative_for(model.info),
        "versions": versions(),
        "model": model.info.name,
        "weights": weights(model.info),
        "prompts": len(sweep.prompts),
        "seeds": len(sweep.seeds),
        "rows": sweep.rows,
        "reference": sweep.reference,
        "aims": to_plain(scales_of(sweep.metrics)),
        "measures": {repr(metric): sorted(metric.aims) for metric in sweep.metrics},
        "own": {module: file for own, _ in needs.values() for module, file in own.items()},
        "used": {label: used for label, (_, used) in needs.items() if used},
        "model_at": model_at(model.info),
    }

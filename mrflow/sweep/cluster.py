"""The engine over a Ray cluster (extra `[ray]`): actors that hold a model each and pull work; rows stay the truth.

Ray schedules and restarts; what is done is what lies in the folder, which every node must reach. A worker that dies
costs at most the rows that it had in hand: its leases are seen to be dead, and the rows are made again.
"""

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mrflow._checks import is_number, is_whole
from mrflow.backbone import Backbone
from mrflow.errors import DeviceLostError, PlanError, ResourceError
from mrflow.records import sources
from mrflow.records.chains import sources_of
from mrflow.sweep import leases
from mrflow.sweep.grid import Sweep
from mrflow.sweep.limits import RETRY
from mrflow.sweep.local import Progress, RowTally, Summary, check_run, manifest
from mrflow.sweep.maker import Maker, Pair
from mrflow.sweep.rows import Row
from mrflow.sweep.store import MAX_TRIES, Store
from mrflow.sweep.trackers import Logs, Tracker

MOST = 10_000  # workers
ROUNDS = MAX_TRIES + 2  # how often at least what is still missing is handed out: a row may take workers down with it


@dataclass(frozen=True)
class Pool:
    """How many actors, and what each may use. `address` is a running cluster's; None starts one on this machine."""

    workers: int = 2
    cpus: float = 1.0
    gpus: float = 0.0
    address: str | None = None

    def __post_init__(self) -> None:
        if not (is_whole(self.workers, 1, MOST) and is_number(self.cpus, 0) and is_number(self.gpus, 0)):
            raise PlanError(f"a pool needs at least one worker ({MOST} at most), and cpus and gpus from 0, got {self}")


def package() -> Any:  # noqa: ANN401
    """Ray.

    Raises:
        PlanError: it is not installed.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray hides GPUs from actors that ask for none; a worker chooses its device itself.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray  # type: ignore[import-not-found,unused-ignore]  # pyright: ignore
    except ImportError as error:
        raise PlanError(f"--engine ray needs ray, which is not here ({error}): pip install 'mrflow[ray]'") from None
    return ray


class Worker:
    """One actor: loads a model once, then makes rows."""

    def __init__(
        self,
        sweep: Sweep,
        load: Callable[[], Backbone],
        folder: str,
        row_timeout: float | None = None,
        code: Mapping[str, str] | None = None,
    ) -> None:
        sources.know(code or {})  # of classes whose files only the driver has
        self.maker = Maker(sweep, load(), Store(folder), row_timeout=row_timeout)

    def begin(self) -> Mapping[str, Any]:
        """Make the folder ready; what its sweep.json says."""
        said = manifest(self.maker.sweep, self.maker.model)
        self.maker.store.open(said)
        return said

    def survey(self, pairs: Sequence[Pair], *, retry: bool) -> tuple[list[int], dict[str, str]]:
        """How many rows each pair lacks, and which failed ones are among them: what `make` has to be given."""
        return self.maker.survey(pairs, retry=retry), self.maker.again

    def lacking(self, pairs: Sequence[Pair]) -> list[int]:
        """How many rows each pair lacks now."""
        return self.maker.lacking(pairs)

    def make(self, pairs: Sequence[Pair], again: dict[str, str], *, calm: bool) -> list[Row]:
        """Make their rows: those that were made."""
        self.maker.again = again
        try:
            with self.maker.store.holding():
                return self.maker.make(pairs, calm=calm)
        except DeviceLostError:
            os._exit(RETRY)  # Ray starts another process in its place

    def finish(self, pairs: Sequence[Pair], before: int, *, stopped: bool) -> Summary:
        """Labels, tags and metrics as they are now, and what has become of all rows; `before` were there."""
        if not stopped:
            self.maker.refresh(pairs)
        tally, left = RowTally(), 0
        for row in self.maker.rows(pairs):
            if row is None:
                left += 1
            else:
                tally.add(row)
        stayed = self.maker.stayed
        tally.made -= before - stayed
        tally.failed -= stayed
        return tally.summary(before, left, str(self.maker.store.folder), stopped=stopped, stayed=stayed)


def run_on_ray(
    sweep: Sweep,
    load: Callable[[], Backbone],
    folder: str | Path,
    pool: Pool = Pool(),
    *,
    batch: int = 4,
    shard: tuple[int, int] = (0, 1),
    retry: bool = False,
    row_timeout: float | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    stop: threading.Event | None = None,
    log: Sequence[Tracker] = (),
) -> Summary:
    """`run_sweep` with the workers of a pool; `load` makes the model in each of them.

    `log` hears, in this process, of every row that a worker reports; its pictures are read from the folder.

    Raises:
        PlanError: ray is not installed, or a chain, the batch or the shard cannot work.
        ResourceError: the folder cannot be written, or Ray or its workers could not be started.
    """
    check_run(batch, shard, row_timeout)
    ray = package()
    where = str(Path(folder).absolute())
    here = not ray.is_initialized()
    if here:
        own: dict[str, Any] = {"num_cpus": max(1, round(pool.workers * pool.cpus))} if pool.address is None else {}
        dashboard = False if pool.address is None else None
        try:
            ray.init(address=pool.address, include_dashboard=dashboard, log_to_driver=False, **own)
        except Exception as error:  # ray raises whatever its own processes die of
            ray.shutdown()
            where = "on this machine" if pool.address is None else f"at {pool.address}"
            raise ResourceError(f"Ray does not answer {where}: {str(error) or type(error).__name__}") from None
    try:
        return _run(ray, sweep, load, where, pool, batch, shard, retry, row_timeout, on_progress, stop, log)
    finally:
        if here:
            ray.shutdown()


def _run(
    ray: Any,  # noqa: ANN401
    sweep: Sweep,
    load: Callable[[], Backbone],
    folder: str,
    pool: Pool,
    batch: int,
    shard: tuple[int, int],
    retry: bool,  # noqa: FBT001
    row_timeout: float | None,
    on_progress: Callable[[Progress], None] | None,
    stop: threading.Event | None,
    log: Sequence[Tracker],
) -> Summary:
    kind = ray.remote(num_cpus=pool.cpus, num_gpus=pool.gpus, max_restarts=-1, max_task_retries=3)(Worker)
    given = ray.put(sweep)
    code = {
        name: text for chain in sweep.chains.values() for stage in chain for name, text in sources_of(stage).items()
    }
    workers = [kind.remote(given, load, folder, row_timeout, code) for _ in range(pool.workers)]
    first = workers[0]
    try:
        said: Mapping[str, Any] = ray.get(first.begin.remote())
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None
    except ray.exceptions.RayError as error:
        raise ResourceError(f"no worker could be started: {error}") from None
    logs = Logs(log, Path(folder), said)
    pairs = sweep.pairs[shard[0] :: shard[1]]
    total = len(pairs) * len(sweep.chains)
    lacking, again = ray.get(first.survey.remote(pairs, retry=retry))
    before, made, failed = total - sum(lacking), 0, 0
    began = moved = time.monotonic()
    rounds = 0

    def stopped() -> bool:
        return stop is not None and stop.is_set()

    while (open_ := [pair for pair, n in zip(pairs, lacking, strict=True) if n]) and not stopped():
        if rounds:
            time.sleep(leases.BEAT)  # what a dead worker held is held a moment longer
        queue = deque(open_[i : i + batch] for i in range(0, len(open_), batch))
        for row in _make_rows(ray, workers, queue, again, stopped, calm=not rounds):
            logs.row(row)
            made, failed = made + row.done, failed + (not row.done)
            if on_progress is not None:
                left = (time.monotonic() - began) * ((total - before) / (made + failed) - 1)
                on_progress(Progress(before + made + failed, failed, total, max(0.0, left), row.chain))
        rounds += 1
        now: list[int] = ray.get(first.lacking.remote(pairs))
        moved = time.monotonic() if sum(now) < sum(lacking) else moved
        lacking = now
        if rounds >= ROUNDS and time.monotonic() - moved > leases.STALE + 2 * leases.BEAT:
            break  # a process elsewhere holds them, and lives
    done: Summary = ray.get(first.finish.remote(pairs, before, stopped=stopped()))
    logs.finish()
    return done


def _make_rows(
    ray: Any,  # noqa: ANN401
    workers: Sequence[Any],
    queue: "deque[Any]",
    again: Any,  # noqa: ANN401
    stopped: Callable[[], bool],
    *,
    calm: bool,
) -> Iterator[Row]:
    """Rows as workers make them, of all that is in the queue; what one that died had in hand is still missing then."""
    busy: dict[Any, Any] = {}
    idle = list(workers)
    while (queue and not stopped()) or busy:
        while queue and idle and not stopped():
            worker = idle.pop()
            busy[worker.make.remote(queue.popleft(), again, calm=calm)] = worker
        ready, _ = ray.wait(list(busy), timeout=1.0)
        for task in ready:
            idle.append(busy.pop(task))
            try:
                yield from ray.get(task)
            except ray.exceptions.RayTaskError as error:
                if isinstance(error.cause, ResourceError):
                    raise error.cause from None
            except ray.exceptions.RayError:
                continue

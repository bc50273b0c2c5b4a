"""How are two implementations timed against each other on a noisy machine, so that a difference means something?

Both sides do the same work in one process, or in fresh ones. Outputs are compared before anything is timed. Each repeat
calls the reference, the reference again and ours in random order; the second reference is the control (A/A): what it
seems to differ by is noise. Statistics are of paired ratios reference / ours, so above 1 is faster than the reference.
"""

import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Self

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

ROOT = Path(__file__).parents[2]
RUNS = ROOT / "runs" / "bench"
PACKAGES = ("mrflow", "torch", "diffusers", "accelerate", "transformers", "safetensors", "numpy")
LIMITS = ("ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS", "ATEN_CPU_CAPABILITY")  # instructions that are left out
CONTROL = (0.97, 1.03)  # a control whose interval has nothing in common with this says that the run measured noise
RESAMPLES = 2000
FAST = 0.95  # what bars are multiplied with where a machine is shared and lanes are short
MIB = 1 << 20

Call = Callable[[], object]
Clock = Literal["cpu", "wall"]
Verdict = Literal["ahead", "not behind", "behind", "void"]


class Unequal(Exception):
    """The two sides do not compute the same thing: there is nothing to time."""


@dataclass(frozen=True)
class Sample:
    """Seconds of one call: processor time of all threads, and time on the wall."""

    cpu: float
    wall: float


@dataclass(frozen=True)
class Fresh(Sample):
    """One fresh process from start to end, its peaks in MiB, and the JSON of its last line, if that is any."""

    anon: float
    file: float
    report: Mapping[str, Any]


@dataclass(frozen=True)
class Runs:
    """The n-th sample of each list belongs to the n-th repeat; `load` is the machine's before and after."""

    reference: Sequence[Sample]
    again: Sequence[Sample]
    ours: Sequence[Sample]
    threads: int = 1
    load: tuple[float, float] = (0.0, 0.0)
    error: float | None = None


@dataclass(frozen=True)
class Ratio:
    """Median of paired ratios with its 95 % interval, and smallest over smallest."""

    median: float
    low: float
    high: float
    least: float


class Rss(NamedTuple):
    """Resident memory in MiB: a process's own, and pages of mapped files, which the kernel may drop."""

    anon: float
    file: float


@dataclass(frozen=True)
class Row:
    """One comparison: `bar` is the ratio asked for, `notes` are further columns of the table."""

    case: str
    runs: Runs
    bar: float = 1.0
    clock: Clock = "cpu"
    notes: Mapping[str, str] = field(default_factory=dict[str, str])

    @property
    def measured(self) -> Ratio:
        """Reference over ours."""
        return ratio(seconds(self.runs.reference, self.clock), seconds(self.runs.ours, self.clock))

    @property
    def control(self) -> Ratio:
        """Reference over reference."""
        return ratio(seconds(self.runs.reference, self.clock), seconds(self.runs.again, self.clock))

    @property
    def verdict(self) -> Verdict:
        """What the run says."""
        return verdict(self.measured, self.control, self.bar)


def seconds(samples: Sequence[Sample], clock: Clock) -> list[float]:
    """One clock of many samples."""
    return [getattr(sample, clock) for sample in samples]


def relative(got: "Tensor", want: "Tensor") -> float:
    """|got - want| / |want|."""
    return float((got.double() - want.double()).norm() / want.double().norm())


def equal(got: "Tensor", want: "Tensor", *, limit: float, oracle: "Tensor | None" = None) -> float:
    """The relative difference, if it is within `limit`, or if `got` is no further from the oracle than `want` is.

    Raises:
        Unequal: neither.
    """
    if got.shape != want.shape:
        raise Unequal(f"shapes {tuple(got.shape)} and {tuple(want.shape)}")
    error = relative(got, want)
    if error <= limit:
        return error
    if oracle is not None and relative(got, oracle) <= relative(want, oracle):
        return error
    raise Unequal(f"outputs differ by {error:.2e}, at most {limit:.0e}")


def timed(call: Call) -> Sample:
    """One call on both clocks."""
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    return Sample(time.process_time() - cpu, time.perf_counter() - wall)


def repeats_for(once: float) -> int:
    """How many repeats a call of `once` seconds needs."""
    return 60 if once < 0.05 else 25 if once < 0.3 else 15


def paired(
    reference: Call,
    ours: Call,
    *,
    repeats: int | None = None,
    threads: int = 1,
    limit: float | None = None,
    oracle: "Tensor | None" = None,
    seed: int = 0,
) -> Runs:
    """Reference, reference again and ours in random order, `repeats` times, after two calls each that are not counted.

    With a `limit`, the tensors that the first calls give must be `equal`. Repeats follow from the time, unless said.

    Raises:
        Unequal: they are not, and nothing was timed.
    """
    import torch

    calls = {"reference": reference, "again": reference, "ours": ours}
    taken: dict[str, list[Sample]] = {name: [] for name in calls}
    before, rng = torch.get_num_threads(), random.Random(seed)
    torch.set_num_threads(threads)
    try:
        want, got = reference(), ours()
        error = None
        if limit is not None:
            assert isinstance(got, torch.Tensor)
            assert isinstance(want, torch.Tensor)
            error = equal(got, want, limit=limit, oracle=oracle)
        del want, got
        once = max(timed(reference).wall, timed(ours).wall)
        load = os.getloadavg()[0]
        for _ in range(repeats or repeats_for(once)):
            for name in rng.sample(list(calls), len(calls)):
                taken[name].append(timed(calls[name]))
    finally:
        torch.set_num_threads(before)
    return Runs(**taken, threads=threads, load=(load, os.getloadavg()[0]), error=error)


def ratio(above: Sequence[float], below: Sequence[float], *, seed: int = 0) -> Ratio:
    """Ratios of pairs; the interval is that of the median over 2000 resamplings of the pairs."""
    ratios = np.array(above) / np.array(below)
    pick = np.random.default_rng(seed).integers(0, len(ratios), (RESAMPLES, len(ratios)))
    low, high = np.quantile(np.median(ratios[pick], axis=1), (0.025, 0.975))
    return Ratio(float(np.median(ratios)), float(low), float(high), min(above) / min(below))


def verdict(measured: Ratio, control: Ratio, bar: float = 1.0) -> Verdict:
    """Ahead: faster by more than the control's noise, by the smallest times too, and by what the bar asks.

    Not behind: the interval reaches 1 (or a bar below 1). Void: the control says that equal things differ.
    """
    if control.high < CONTROL[0] or control.low > CONTROL[1]:
        return "void"
    noise = (control.high - control.low) / 2
    if measured.low > 1 + noise and measured.least > 1 and measured.median >= bar:
        return "ahead"
    return "not behind" if measured.high >= min(1.0, bar) else "behind"


def resident(pid: int | None = None) -> Rss | None:
    """A process's memory now, or None where it has none any more."""
    try:
        lines = Path(f"/proc/{pid or 'self'}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return None
    found = {line.split(":")[0]: int(line.split()[1]) / 1024 for line in lines if line.startswith(("RssA", "RssF"))}
    return Rss(found["RssAnon"], found["RssFile"]) if len(found) == 2 else None


class Memory:
    """Looks at a process's memory every 4 ms while entered. `start`, `end` and `peak` are in MiB."""

    def __init__(self, pid: int | None = None, *, every: float = 0.004) -> None:
        self.pid, self.every = pid, every
        self.start = self.end = self.peak = Rss(0.0, 0.0)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        self.start = self.end = self.peak = resident(self.pid) or self.start
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join()
        self._look()

    def _watch(self) -> None:
        while not self._stop.wait(self.every):
            self._look()

    def _look(self) -> None:
        if (now := resident(self.pid)) is not None:
            self.end = now
            self.peak = Rss(max(self.peak.anon, now.anon), max(self.peak.file, now.file))

    @property
    def growth(self) -> Rss:
        """Peak over start."""
        return Rss(self.peak.anon - self.start.anon, self.peak.file - self.start.file)


def process(code: str, *, threads: int = 1) -> Fresh:
    """Python code in a process of its own, from start to end."""
    count = str(threads)
    env = {**os.environ, "OMP_NUM_THREADS": count, "MKL_NUM_THREADS": count, "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        began = time.perf_counter()
        child = subprocess.Popen([sys.executable, "-c", code], stdout=out, stderr=err, cwd=ROOT, env=env)
        with Memory(child.pid) as memory:
            _, status, usage = os.wait4(child.pid, 0)
            wall = time.perf_counter() - began
        child.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0), err.seek(0)
        if child.returncode:
            raise RuntimeError(f"a timed process ended with {child.returncode}: {err.read().decode()[-2000:]}")
        lines = out.read().decode().splitlines()
    try:
        report = json.loads(lines[-1]) if lines else {}
    except ValueError:
        report = {}
    report = report if isinstance(report, dict) else {}
    return Fresh(usage.ru_utime + usage.ru_stime, wall, memory.peak.anon, memory.peak.file, report)


def fresh(*codes: str, repeats: int = 5, threads: int = 1, seed: int = 0) -> list[list[Fresh]]:
    """Each code in fresh processes, `repeats` times after one that is not counted, in random order within a repeat.

    The page cache is warm. Giving the reference twice gives a control: see `Runs`.
    """
    for code in dict.fromkeys(codes):
        process(code, threads=threads)
    taken: list[list[Fresh]] = [[] for _ in codes]
    rng = random.Random(seed)
    for _ in range(repeats):
        for i in rng.sample(range(len(codes)), len(codes)):
            taken[i].append(process(codes[i], threads=threads))
    return taken


def environment() -> dict[str, Any]:
    """What a run depends on besides the code."""
    versions: dict[str, str] = {}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    info: dict[str, str] = {}
    if (cpuinfo := Path("/proc/cpuinfo")).exists():
        info = {k.strip(): v.strip() for k, _, v in (line.partition(":") for line in cpuinfo.read_text().splitlines())}
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "versions": versions,
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": info.get("model name", platform.processor()),
        "flags": info.get("flags", "").split(),
        "limits": {name: os.environ[name] for name in LIMITS if name in os.environ},
        "cores": os.cpu_count(),
        "load": os.getloadavg(),
    }


def described(row: Row) -> dict[str, Any]:
    """A row with its samples, for JSON."""
    found = {"measured": asdict(row.measured), "control": asdict(row.control), "verdict": row.verdict}
    return {**asdict(row), **found}


def write(name: str, rows: Sequence[Row], *, folder: Path = RUNS, **more: object) -> Path:
    """One JSON file for one run, with every sample."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}-{datetime.now(UTC):%Y%m%dT%H%M%S%f}.json"
    content = {"name": name, **more, "environment": environment(), "rows": [described(row) for row in rows]}
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return path


def shown(value: float) -> str:
    """Seconds, in the unit that reads best."""
    return f"{1000 * value:.1f} ms" if value < 0.9995 else f"{value:.2f} s"


def table(rows: Sequence[Row]) -> str:
    """The rows in Markdown; times are medians on the row's clock."""
    notes = list(dict.fromkeys(name for row in rows for name in row.notes))
    head = ["case", "reference", "ours", "ratio [95 %]", "min/min", "A/A [95 %]", "n", "bar", "verdict", *notes]
    lines = [head, ["---"] * len(head)]
    for row in rows:
        m, c = row.measured, row.control
        lines.append(
            [
                row.case,
                shown(statistics.median(seconds(row.runs.reference, row.clock))),
                shown(statistics.median(seconds(row.runs.ours, row.clock))),
                f"{m.median:.3f} [{m.low:.3f}, {m.high:.3f}]",
                f"{m.least:.3f}",
                f"{c.median:.3f} [{c.low:.3f}, {c.high:.3f}]",
                str(len(row.runs.ours)),
                f"{row.bar:.2f}",
                row.verdict,
                *(row.notes.get(name, "") for name in notes),
            ]
        )
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def publish(name: str, rows: Sequence[Row], *, folder: Path = RUNS, **more: object) -> Path:
    """Print the table and write the file."""
    print(table(rows))
    path = write(name, rows, folder=folder, **more)
    where = path.relative_to(path.parents[2])
    print(f"\nload {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores; every sample in {where}")
    return path

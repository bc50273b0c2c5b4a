"""Try mutants in forks of one warm process: a pytest plugin that `experiments.mutants` runs in a part's workplace.

The process imports everything and collects the tests once. A fork runs them on the code as it is, and notes how long
each takes and which functions it reaches. Then each mutant gets a fork of its own, which runs the tests that reach the
mutated function until one fails: first those that killed its neighbours, then the quickest. It may run as many as took
`budget` seconds together; a test that takes ten times its usual time (and 10 s) counts as a kill. All this is time of
the processor, so that a busy machine kills no mutant and leaves no test out. Counterexamples are not shrunk.
A function that was called while modules were imported is tried in a process of its own, if its fork survived.
"""

import gc
import hashlib
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from mutmut.mutation import trampoline

MUTANT = "MUTANT_UNDER_TEST"  # which mutant the trampolines call; "stats": none, and each call is recorded
PATIENCE = 60  # seconds by the clock for each usual one of the processor (and 5) before a mutant's tests count as stuck


@dataclass(frozen=True)
class Usual:
    """A test on the code as it is: whether it passed, seconds of the processor, functions of the part it reached."""

    passed: bool
    seconds: float
    reached: frozenset[str]


def processor() -> float:
    """Seconds of the processor that this process and its children took, however busy the machine is."""
    return sum(os.times()[:4])


def function(mutant: str) -> str:
    """The function that a mutant changes, as mutmut writes it."""
    return mutant.partition("__mutmut_")[0]


def order(tests: Mapping[str, Usual], kills: Counter[str], name: str, budget: float) -> list[str]:
    """Tests that reach a function, past killers first, then the quickest, of `budget` seconds together."""
    reach = [test for test, usual in tests.items() if usual.passed and name in usual.reached]
    ordered = sorted(reach, key=lambda test: (-kills[test], tests[test].seconds, test))
    out, spent = list[str](), 0.0
    for test in ordered:
        if out and spent + tests[test].seconds > budget:
            continue
        out.append(test)
        spent += tests[test].seconds
    return out


class Trials:
    """One part's mutants; `task` is a JSON file with `mutants` and their digests, `results` (where to), `budget`."""

    def __init__(self, task: Path) -> None:
        self.task = json.loads(task.read_text(encoding="utf-8"))
        self.at_import = set[str]()
        self.hits = self.at_import
        self.failed = False
        self.on_failure: Callable[[], None] = lambda: None
        trampoline.record_trampoline_hit = lambda name, caller=None: self.hits.add(name)
        os.environ[MUTANT] = "stats"

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Remember that a test failed, or end the fork that tries a mutant."""
        if report.failed:
            self.failed = True
            self.on_failure()

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        """Measure the tests, then try all mutants."""
        items = {item.nodeid: item for item in session.items}
        os.environ[MUTANT] = ""
        tests, modules = self.usual(items)
        for name in modules:
            with suppress(Exception), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                importlib.import_module(name)
        gc.freeze()
        kills = defaultdict[str, Counter[str]](Counter)
        for mutant, digest in self.task["mutants"].items():
            name, start = function(mutant), time.monotonic()
            ordered = order(tests, kills[name], name, self.task["budget"])
            by = self.fork(mutant, [items[test] for test in ordered], tests) if ordered else None
            if by is None and name in self.at_import:
                by = self.alone(mutant, ordered or sorted(tests, key=lambda t: tests[t].seconds), tests)
            if by is not None:
                kills[name][by.partition(": ")[0]] += 1
            seconds = round(time.monotonic() - start, 2)
            line = {"mutant": mutant, "digest": digest, "by": by, "tests": len(ordered), "seconds": seconds}
            with Path(self.task["results"]).open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        return True

    def usual(self, items: Mapping[str, pytest.Item]) -> tuple[dict[str, Usual], list[str]]:
        """What each test does on the code as it is; one that passed before, in a file as it was, is not run again."""
        kept = Path(self.task["results"]).with_name("reached.jsonl")
        digests = {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in {i.path for i in items.values()}}

        def known() -> dict[str, list[Any]]:
            rows = {test: row for test, *row in _lines(kept) if test in items}
            return {test: row for test, row in rows.items() if row[0] == digests[items[test].path]}

        passed = {test for test, row in known().items() if row[1]}
        if new := [item for test, item in items.items() if test not in passed]:
            if (child := os.fork()) == 0:
                self._measure(new, digests, kept)
            os.waitpid(child, 0)
        found = known()
        tests = {test: Usual(row[1], row[2], frozenset(row[3])) for test, row in found.items()}
        if broken := [test for test in items if test not in tests or not tests[test].passed]:
            print(f"left out, as they fail on the code as it is: {', '.join(broken)}", file=sys.stderr)
        return tests, sorted({module for row in found.values() for module in row[4]})

    def _measure(self, items: list[pytest.Item], digests: Mapping[Path, str], kept: Path) -> None:
        os.environ[MUTANT] = "stats"
        for item, following in _pairs(items):
            before, self.hits, self.failed, start = set(sys.modules), set(), False, processor()
            item.ihook.pytest_runtest_protocol(item=item, nextitem=following)
            seconds, new = processor() - start, set(sys.modules) - before
            modules = [module for module in new if module.partition(".")[0] not in {"mrflow", "tests", "experiments"}]
            row = [item.nodeid, digests[item.path], not self.failed, seconds, sorted(self.hits), sorted(modules)]
            with kept.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        os._exit(0)

    def fork(self, mutant: str, items: list[pytest.Item], tests: Mapping[str, Usual]) -> str | None:
        """The test that fails in a fork with this mutant, or None."""
        reader, writer = os.pipe()
        if (child := os.fork()) == 0:
            os.setsid()
            trampoline.set_mutant_under_test(mutant)
            self.on_failure = lambda: os._exit(1)
            try:
                for number, (item, following) in enumerate(_pairs(items)):
                    os.write(writer, number.to_bytes(4, "big"))
                    signal.setitimer(signal.ITIMER_PROF, 10 + 10 * tests[item.nodeid].seconds)
                    item.ihook.pytest_runtest_protocol(item=item, nextitem=following)
                os._exit(0)
            finally:
                os._exit(2)
        os.close(writer)
        number = -1
        try:
            while True:
                limit = PATIENCE * (5 + (tests[items[number].nodeid].seconds if number >= 0 else 0))
                if not select.select([reader], [], [], limit)[0]:
                    os.kill(child, signal.SIGKILL)
                    break
                if not (read := os.read(reader, 4)):
                    break
                number = int.from_bytes(read, "big")
        finally:
            os.close(reader)
            status = os.waitpid(child, 0)[1]
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(child, signal.SIGKILL)  # what its tests left running
        if status == 0:
            return None
        how = "" if os.WIFEXITED(status) else f": {signal.Signals(os.WTERMSIG(status)).name}"
        return items[number].nodeid + how

    def alone(self, mutant: str, ordered: Sequence[str], tests: Mapping[str, Usual]) -> str | None:
        """Whether tests fail in a new process, where this mutant is there before modules are imported."""
        chosen, spent = list[str](), 0.0
        for test in ordered:
            if spent < self.task["budget"] and tests[test].passed:
                chosen.append(test)
                spent += tests[test].seconds
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *chosen]
        with suppress(subprocess.TimeoutExpired):
            done = subprocess.run(
                command,
                env=os.environ | {MUTANT: mutant},
                capture_output=True,
                timeout=PATIENCE * (5 + spent),
                check=False,
            )
            return None if done.returncode == 0 else "a process of its own"
        return "a process of its own: SIGKILL"


def _lines(file: Path) -> Iterator[list[Any]]:
    if file.exists():
        yield from map(json.loads, file.read_text(encoding="utf-8").splitlines())


def _pairs(items: Sequence[pytest.Item]) -> Iterator[tuple[pytest.Item, pytest.Item | None]]:
    for number, item in enumerate(items):
        yield item, items[number + 1] if number + 1 < len(items) else None


settings.register_profile(
    "mutants",
    max_examples=20,
    deadline=None,
    derandomize=True,
    database=None,
    phases=(Phase.explicit, Phase.generate),
    suppress_health_check=list(HealthCheck),
)
if task := os.environ.get("MRFLOW_MUTANT_TASK"):
    TRIALS = Trials(Path(task))
    pytest_runtest_logreport = TRIALS.pytest_runtest_logreport
    pytest_runtestloop = TRIALS.pytest_runtestloop

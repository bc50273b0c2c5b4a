"""Numbered attempts in a forked process, watched from outside: what kills it, hangs it or makes it grow is a result.

The process keeps what its parent imported and made, so an attempt costs no start; after a death the next one is forked.
"""

import contextlib
import gc
import json
import os
import resource
import select
import signal
import time
import traceback
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import NoReturn

Attempt = Callable[[int], str | None]
LOOK = 0.1  # seconds between looks at a process
START = 60.0  # seconds that a process may take to begin: it collects what garbage its parent left


def watched(attempt: Attempt, numbers: range, *, hang: float, growth: int) -> Iterator[tuple[int, str | None]]:
    """Call `attempt` with each number, and give each with what was wrong, or None.

    Args:
        attempt: gives what is wrong, or None.
        hang: seconds on the clock after which an attempt is killed, without those it waited for a processor.
        growth: bytes of memory that an attempt may use beyond what the process held before it.
    """
    at = numbers.start
    while at < numbers.stop:
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(read)
            _child(attempt, range(at, numbers.stop), write)
        os.close(write)
        try:
            at, ended = yield from _reports(pid, read, at, hang, growth)
        finally:
            os.close(read)
            _end(pid)
        if at < numbers.stop:
            yield at, ended
            at += 1


def _child(attempt: Attempt, numbers: range, write: int) -> NoReturn:
    """The forked process: an empty line when it begins, then a line for each attempt.

    Garbage that was there before an attempt and is freed in it would hide as many bytes of what it takes. So what came
    with the fork is never freed here, and what an attempt left is freed before the next one is measured.
    """
    gc.collect()
    gc.freeze()
    os.write(write, b"\n")  # from here on it is an attempt that takes time
    try:
        for number in numbers:
            gc.collect()
            _forget_peak()
            before = _peak()
            wrong = attempt(number)
            line = json.dumps([number, wrong, _peak() - before]) + "\n"
            os.write(write, line.encode())
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def _reports(
    pid: int, read: int, at: int, hang: float, growth: int
) -> Generator[tuple[int, str | None], None, tuple[int, str]]:
    """What a process says of each attempt from number `at` on; returns the number of which it says nothing, and why."""
    began, late, base, rest, limit = time.monotonic(), waited(pid), _held(pid), b"", max(hang, START)
    while True:
        ready, _, _ = select.select([read], [], [], LOOK)
        if ready:
            data = os.read(read, 1 << 16)
            if not data:
                code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                return at, f"the process ended by {signal.Signals(-code).name if code < 0 else f'exit {code}'}"
            *lines, rest = (rest + data).split(b"\n")
            for line in filter(None, lines):
                number, wrong, grown = json.loads(line)
                yield number, wrong or (_grew(grown) if grown > growth else None)
                at = number + 1
            began, late, base, limit = time.monotonic(), waited(pid), _held(pid), hang
        elif (grown := _held(pid) - base) > growth:
            return at, _grew(grown)
        elif time.monotonic() - began - (waited(pid) - late) > limit:
            return at, f"hung for {limit:g} s and was killed"


def _grew(grown: int) -> str:
    return f"grew by {grown >> 20} MiB"


def _end(pid: int) -> None:
    """Kill a process if it still runs, and take its status."""
    with contextlib.suppress(ProcessLookupError, ChildProcessError):
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def waited(pid: int | str = "self") -> float:
    """Seconds that a process was ready and had no processor, because others had it; 0 where the system does not say."""
    try:
        return int(Path(f"/proc/{pid}/schedstat").read_text().split()[1]) / 1e9
    except (OSError, IndexError, ValueError):
        return 0.0


def _held(pid: int) -> int:
    """Bytes of memory that a process holds; 0 where it ended."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize()
    except (OSError, IndexError):
        return 0


def _forget_peak() -> None:
    """Let the peak of this process begin at what it holds now, where the system can."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _peak() -> int:
    """The most bytes of memory that this process held."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

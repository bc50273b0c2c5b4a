"""A limit on the time that something may take, whoever wrote it."""

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from types import FrameType

from mrflow.errors import Interruption

RETRY = 75  # the exit code that says "run the same command again"
GRACE = 30.0  # seconds for what was interrupted to end; at most as long as it was given


class RowTimeoutError(Interruption):
    """It took too long. No Exception, so that nothing on the way takes it for an error of its own."""


@contextmanager
def time_limit(seconds: float | None, stuck: Callable[[], None]) -> Generator[None]:
    """Interrupt what is inside after `seconds`; where that does not end it, call `stuck` and end the process with 75.

    What runs in Python is interrupted; a call into a library that does not return can only be ended with its process.

    Raises:
        RowTimeoutError: the time was up.
    """
    if seconds is None:
        yield
        return
    inside = threading.get_ident()
    done = threading.Event()
    main = threading.current_thread() is threading.main_thread() and hasattr(signal, "setitimer")

    def interrupt(number: int, frame: FrameType | None) -> None:
        if not done.is_set():
            raise RowTimeoutError

    def watch() -> None:
        if done.wait(seconds):
            return
        if not main:
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(inside), ctypes.py_object(RowTimeoutError))
        if done.wait(min(GRACE, max(1.0, seconds))):
            return
        try:
            stuck()
        finally:
            with suppress(OSError, ValueError):
                sys.stderr.write("\na row hangs and cannot be interrupted: ending with 75, run the command again\n")
                sys.stderr.flush()
            os._exit(RETRY)

    before = signal.signal(signal.SIGALRM, interrupt) if main else None
    threading.Thread(target=watch, daemon=True, name="mrflow time limit").start()
    try:
        if main:
            signal.setitimer(signal.ITIMER_REAL, seconds)
        yield
    finally:
        done.set()
        if main:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)

"""Ctrl-C and SIGTERM, which wait while files get their names, and reach a thread of their own at once."""

import os
import signal
import socket
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)
GRACE = 3.0
"""Seconds that what was interrupted has to come to an end; a second signal takes them away."""
naming = threading.RLock()
"""Held while files get their names: whoever ends the process at once takes it first."""

_ears: list[threading.Thread] = []


@contextmanager
def hold_signals() -> Generator[None]:
    """Inside, SIGINT and SIGTERM wait, so that what is begun is finished; their handlers are called at the end.

    Only the main thread is ever interrupted: in another one nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        with naming:
            yield
        return
    waiting: list[tuple[int, FrameType | None]] = []
    # One that was installed by other than Python, or ignores the signal, stays as it is.
    before = {int(number): handler for number in SIGNALS if callable(handler := signal.getsignal(number))}
    try:
        for number in before:
            signal.signal(number, lambda got, frame: waiting.append((got, frame)))
        with naming:
            yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for number, frame in waiting[:1]:
            before[number](number, frame)


@contextmanager
def listening(handler: Callable[[int, FrameType | None], object], told: Callable[[int], None]) -> Generator[None]:
    """Inside, SIGINT and SIGTERM call `handler` in the main thread, as soon as that runs Python again, and `told` at
    once, in a thread of its own; also where a shell let its background job ignore them.

    Outside of the main thread, which alone can ask for signals, nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def listen() -> None:
        while number := hear.recv(1)[0:1]:
            if number[0] in SIGNALS:
                told(number[0])

    say, hear = socket.socketpair()
    say.settimeout(0)
    thread = threading.Thread(target=listen, daemon=True, name="mrflow signals")
    thread.start()
    before = {number: signal.signal(number, handler) for number in SIGNALS}
    old = signal.set_wakeup_fd(say.fileno(), warn_on_full_buffer=False)
    _ears.append(thread)
    try:
        yield
    finally:
        _ears.remove(thread)
        signal.set_wakeup_fd(old)
        for number, previous in before.items():
            if previous is not None:  # one that was installed by other than Python
                signal.signal(number, previous)
        say.close()
        thread.join(1)
        hear.close()


def _unheard() -> None:
    """A process that was forked tells its parent's thread nothing, and does not wait for threads that it lacks."""
    global naming
    naming = threading.RLock()
    if _ears:
        with suppress(ValueError):
            signal.set_wakeup_fd(-1)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_unheard)


def end_at_once(number: int, frame: FrameType | None = None) -> None:
    """End the process as a signal does, when no file is about to get its name; nothing waits for other threads."""
    naming.acquire(timeout=60)
    os._exit(128 + number)

"""What people see of the command line: a console that shows no control characters, and how errors end the program."""

import errno
import logging
import os
import re
import shutil
import signal
import sys
import tempfile
import textwrap
import threading
import traceback
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from contextvars import ContextVar
from typing import NoReturn

from rich.console import Console
from rich.progress import Progress, ProgressColumn

from mrflow.display.notes import printable
from mrflow.errors import MrflowError
from mrflow.machine.failures import words_of
from mrflow.machine.interrupts import GRACE, end_at_once, listening

CRASHED = 1
WORDS: ContextVar[Mapping[str, str] | None] = ContextVar("words", default=None)  # options of the verb, by argument
OUTPUT = (errno.ENOSPC, errno.EIO, errno.EBADF, errno.EFBIG, errno.EDQUOT)


class Plain(Console):
    """A console that shows control characters of texts as escapes, and survives a stream that takes nothing."""

    def print(self, *objects: object, **how: object) -> None:
        """Print, as rich does."""
        with suppress(OSError, ValueError):
            super().print(*(printable(o) if isinstance(o, str) else o for o in objects), **how)  # type: ignore[arg-type]


@contextmanager
def progress_bar(err: Console, *columns: ProgressColumn) -> Generator[Progress]:
    """A bar on stderr that goes when it is done; where that is no terminal, one that writes nothing."""
    bar = Progress(*columns, console=err, transient=True, disable=not err.is_terminal)
    with bar if err.is_terminal else nullcontext():  # before 14.3 rich ends a disabled bar with an empty line
        yield bar


class _Handler(logging.Handler):
    """Messages on stderr, each once: what is true of one batch is true of the next."""

    def __init__(self) -> None:
        super().__init__()
        self._said: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        text = f"{printable(in_options(self.format(record)))}\n"
        with suppress(OSError, ValueError):
            if sys.stderr is not None and text not in self._said:
                self._said.add(text)
                sys.stderr.write(text)


STOPPED = "stopped; every file that was named is whole"


@contextmanager
def console() -> Generator[Console]:
    """A console on stderr. Errors end the program with one text and an exit code, never with a traceback.

    Those of mrflow with their own code; whatever else is raised with `CRASHED`, and its traceback in a file. SIGINT and
    SIGTERM end it with 130 and 143: what runs is interrupted, and what does not let itself be, as a download in other
    threads or one long operation, ends with the process after `GRACE` seconds.
    """
    err = Plain(stderr=True, highlight=False, soft_wrap=True, markup=False, emoji=False)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s", handlers=[_Handler()])
    asked: list[int] = []
    over = threading.Event()

    def interrupt(number: int, frame: object) -> NoReturn:
        raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)

    def told(number: int) -> None:
        asked.append(number)
        if len(asked) == 1:
            threading.Thread(target=leave, args=(GRACE,), daemon=True).start()
        else:
            leave(0)

    def leave(after: float) -> None:
        if not over.wait(after):
            err.print(STOPPED)
            end_at_once(asked[0])

    try:
        with listening(interrupt, told):
            yield err
    except SystemExit as end:
        if asked and end.code != 128 + asked[0]:
            raise SystemExit(_end(err, end, asked)) from None
        raise
    except BaseException as error:
        raise SystemExit(_end(err, error, asked)) from None
    finally:
        over.set()


def _end(err: Console, error: BaseException, asked: Sequence[int]) -> int:
    """Say in one text how the program ends; the exit code. What is raised after a signal came of the signal."""
    if asked or isinstance(error, KeyboardInterrupt):
        err.print(STOPPED)
        return 128 + (*asked, signal.SIGINT)[0]
    if isinstance(error, MrflowError):
        err.print(f"error: {in_options(str(error))}")
        return error.exit_code
    if isinstance(error, MemoryError):
        err.print("error: out of memory; try a smaller --size or --batch")
        return 5
    if isinstance(error, BrokenPipeError):  # whoever read the results has had enough
        _silence()
        return 128 + getattr(signal, "SIGPIPE", 13)
    if isinstance(error, OSError) and error.errno in OUTPUT and error.filename is None:
        _silence()
        err.print(f"error: standard output takes nothing ({error.strerror})")
        return 5
    if isinstance(error, OSError) and error.filename is not None:  # a name too long, a folder that may not be entered
        err.print(f"error: {str(error.filename)[:200]}: {error.strerror}")
        return 5
    return _crash(err, error)


ALIASES = {"upscaler": "--sr", "net": "--sr", "types": "--with", "files": "--file"}
VALUES = {"mrflow.FLUX.shift": "flux1-dev"}


def in_options(text: str) -> str:
    """A text of the library in the words of the verb that runs: "row_timeout must be" becomes "--row-timeout must be".

    Arguments that are options of this verb are named so where they begin the text (also behind a stage's name), or are
    mentioned outside of calls (`device='auto'`); the Python half of "--start FILE or start=" is left out.
    """
    options = WORDS.get() or {}
    known = {**{name: flag for name, flag in ALIASES.items() if flag in options.values()}, **options}

    def mention(found: re.Match[str]) -> str:
        before = text[: found.start()]
        if found[1] not in known or before.count("(") > before.count(")"):
            return found[0]
        value = VALUES.get(found[2], found[2].strip("'"))
        return f"{known[found[1]]} {value}".rstrip()

    text = re.sub(r"(--[a-z-]+(?: [A-Z]+)?),? or (?:pass that class: )?(?:\w+\([^)]*\)|\w+=\S*)", r"\1", text)
    text = re.sub(
        r"^(stage \d+ of \d+, \S+: |pocket takes no |an? )?(\w+)(?= must be |: it is one)",
        lambda found: f"{(found[1] or '').removeprefix('a ')}{known[found[2]]}" if found[2] in known else found[0],
        text,
    )  # fmt: skip
    return re.sub(r"(?<![\w.(-])(\w+)=((?:[\w.']|\([^)]*\))*)", mention, text)


def duration(seconds: float) -> str:
    """A time for people."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def wrap(lines: Iterable[str], columns: int | None) -> list[str]:
    """Lines that are too long for a terminal's columns, if it is one, as several, indented below the first's text."""
    if columns is None:
        return list(lines)
    out: list[str] = []
    for line in lines:
        indent = re.match(r"\s*(?:\S.{0,8}?\s{2,})?", line)
        below = " " * min(len(indent.group()) if indent else 0, columns // 3)
        out += textwrap.wrap(line, columns, subsequent_indent=below, break_on_hyphens=False) or [line]
    return out


def width(console: Console | None = None) -> int | None:
    """The columns of a terminal, of `console` or of standard output; None where it is none."""
    if console is not None:
        return console.width if console.is_terminal else None
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def _silence() -> None:
    """Let nothing more be written to a standard output that takes nothing, also not when the program ends."""
    out = sys.__stdout__
    if out is not None and sys.stdout is out:
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), out.fileno())


def _crash(err: Console, error: BaseException) -> int:
    """One line for an error that nobody expected; its traceback goes into a file."""
    first = (words_of(error).splitlines() or [""])[0][:300]
    try:
        number, path = tempfile.mkstemp(prefix="mrflow-", suffix="-traceback.txt")
        with open(number, "w", encoding="utf-8", errors="backslashreplace") as file:
            traceback.print_exception(error, file=file)
        where = f"the traceback is in {path}"
    except OSError:
        where = "its traceback could not be written"
    err.print(f"error: {type(error).__name__}: {first} (unexpected: a fault of mrflow or of a file of yours; {where})")
    return CRASHED

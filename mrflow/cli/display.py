"""What people see of the command line: a console that shows no control characters, and how errors end the program."""

import errno
import logging
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Generator
from contextlib import contextmanager, suppress
from typing import NoReturn

from rich.console import Console

from mrflow.errors import MrflowError
from mrflow.notes import printable

CRASHED = 1
ARGUMENTS = ("device", "offload", "batch", "row_timeout", "steps", "trials")  # each an option of every verb it reaches
OUTPUT = (errno.ENOSPC, errno.EIO, errno.EBADF, errno.EFBIG, errno.EDQUOT)


class Plain(Console):
    """A console that shows control characters of texts as escapes, and survives a stream that takes nothing."""

    def print(self, *objects: object, **how: object) -> None:
        """Print, as rich does."""
        with suppress(OSError, ValueError):
            super().print(*(printable(o) if isinstance(o, str) else o for o in objects), **how)  # type: ignore[arg-type]


class _Handler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        with suppress(OSError, ValueError):
            if sys.stderr is not None:
                sys.stderr.write(f"{printable(self.format(record))}\n")


@contextmanager
def console() -> Generator[Console]:
    """A console on stderr. Errors end the program with one text and an exit code, never with a traceback.

    Those of mrflow with their own code; whatever else is raised with `CRASHED`, and its traceback in a file.
    """
    err = Plain(stderr=True, highlight=False, soft_wrap=True, markup=False)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s", handlers=[_Handler()])

    def ended(number: int, frame: object) -> NoReturn:
        raise SystemExit(128 + number)

    previous = signal.signal(signal.SIGTERM, ended)
    try:
        yield err
    except MrflowError as error:
        err.print(f"error: {_in_options(str(error))}")
        raise SystemExit(error.exit_code) from None
    except KeyboardInterrupt:
        err.print("stopped; every file that was named is whole")
        raise SystemExit(130) from None
    except MemoryError:
        err.print("error: out of memory; try a smaller --size or --batch")
        raise SystemExit(5) from None
    except BrokenPipeError:  # whoever read the results has had enough
        _silence()
        raise SystemExit(128 + signal.SIGPIPE) from None
    except OSError as error:
        if error.errno in OUTPUT and error.filename is None:
            _silence()
            err.print(f"error: standard output takes nothing ({error.strerror})")
            raise SystemExit(5) from None
        if error.filename is not None:  # a name that is too long, a folder that may not be looked into
            err.print(f"error: {str(error.filename)[:200]}: {error.strerror}")
            raise SystemExit(5) from None
        raise SystemExit(_crash(err, error)) from None
    except Exception as error:
        raise SystemExit(_crash(err, error)) from None
    finally:
        signal.signal(signal.SIGTERM, previous)


def _in_options(text: str) -> str:
    """The text of an error, where "row_timeout must be ..." names an argument that is an option by that option."""
    name, must, rest = text.partition(" must be ")
    return f"--{name.replace('_', '-')}{must}{rest}" if name in ARGUMENTS else text


def _silence() -> None:
    """Let nothing more be written to a standard output that takes nothing, also not when the program ends."""
    out = sys.__stdout__
    if out is not None and sys.stdout is out:
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), out.fileno())


def _crash(err: Console, error: BaseException) -> int:
    """One line for an error that nobody expected; its traceback goes into a file."""
    first = (str(error).strip().splitlines() or [""])[0][:300]
    try:
        number, path = tempfile.mkstemp(prefix="mrflow-", suffix="-traceback.txt")
        with open(number, "w", encoding="utf-8", errors="backslashreplace") as file:
            traceback.print_exception(error, file=file)
        where = f"the traceback is in {path}"
    except OSError:
        where = "its traceback could not be written"
    err.print(f"error: {type(error).__name__}: {first} (unexpected: a fault of mrflow or of a file of yours; {where})")
    return CRASHED

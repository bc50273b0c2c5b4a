"""What a run wants to tell its user: words that a text encoder lost, a fallback to tiles.

`note` logs a warning; while a chain runs it also goes to the listener (`Noted`) and into the stage's record.
"""

import logging
from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar

log = logging.getLogger("mrflow")
_notes: ContextVar[list[str] | None] = ContextVar("notes", default=None)


def note(text: str) -> None:
    """Tell the user, and remember it with what is running."""
    log.warning("%s", text)
    notes = _notes.get()
    if notes is not None:
        notes.append(text)


@contextmanager
def collected() -> Generator[list[str]]:
    """The notes that are made inside, in this thread or task."""
    notes: list[str] = []
    token = _notes.set(notes)
    try:
        yield notes
    finally:
        _notes.reset(token)

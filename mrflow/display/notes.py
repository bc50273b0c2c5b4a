"""What a run wants to tell its user: words that a text encoder lost, a fallback to tiles, what caches left out.

`note` logs a warning; while a chain runs it also goes to the listener (`Noted`) and into the stage's record.
`add_forwards` adds to what a stage computed.
"""

import logging
import re
from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

log = logging.getLogger("mrflow")
_control = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_notes: ContextVar[list[str] | None] = ContextVar("notes", default=None)


@dataclass
class Tally:
    """Forwards that were asked for, pictures times branches times evaluations, and what was computed of them.

    `caches` names those that decided; `forwards` holds the work as (whole forwards of one picture, its image tokens).
    """

    asked: int = 0
    computed: int = 0
    forwards: list[tuple[float, int]] = field(default_factory=list)
    caches: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return f"{', '.join(self.caches)} computed {self.computed} of {self.asked} forwards"


_tally: ContextVar[Tally | None] = ContextVar("tally", default=None)


def counted(count: int, noun: str) -> str:
    """A number of things, of one or several: `1 row`, `2 rows`."""
    return f"{count} {noun}{'s' * (count != 1)}"


def printable(text: str) -> str:
    """A text with control characters, also those that turn the direction of writing, as escapes; lines stay lines."""
    return _control.sub(lambda found: ascii(found.group())[1:-1], text)


def note(text: str) -> None:
    """Tell the user, and remember it with what is running."""
    log.warning("%s", text)
    notes = _notes.get()
    if notes is not None:
        notes.append(text)


@contextmanager
def collect_notes() -> Generator[list[str]]:
    """The notes that are made inside, in this thread or task."""
    notes: list[str] = []
    token = _notes.set(notes)
    try:
        yield notes
    finally:
        _notes.reset(token)


def add_forwards(cache: str | None, asked: int, computed: int, forwards: float, *, tokens: int) -> None:
    """Add forwards to the tally of what is running; `cache` is the name of the one that decided, if any.

    `forwards` is the work, in whole forwards of one picture of so many image tokens.
    """
    tally = _tally.get()
    if tally is None:
        return
    tally.asked += asked
    tally.computed += computed
    tally.forwards.append((forwards, tokens))
    if cache is not None and cache not in tally.caches:
        tally.caches.append(cache)


@contextmanager
def tally_work() -> Generator[Tally]:
    """What is counted inside, in this thread or task."""
    tally = Tally()
    token = _tally.set(tally)
    try:
        yield tally
    finally:
        _tally.reset(token)

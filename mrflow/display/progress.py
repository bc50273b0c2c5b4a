"""A listener that shows how far a run or a sweep is: in a notebook as a bar with previews, else as a line on stderr."""

import html as escaping
import sys
import time
from collections.abc import Callable
from typing import Any, Protocol

import torch

from mrflow._checks import check_whole
from mrflow.backbone import Backbone
from mrflow.display import html
from mrflow.display.notes import printable
from mrflow.records.pictures import png, strip, to_images
from mrflow.runner import Event, Noted, StageBegan, StageEnded, Stepped
from mrflow.solvers import Step

EVERY_SECONDS = 0.1  # how often a line or a bar is drawn again


class Rows(Protocol):
    """How far a sweep is (`mrflow.sweep.Progress`)."""

    @property
    def done(self) -> int:
        """Rows that are there."""
        ...

    @property
    def total(self) -> int:
        """All rows."""
        ...

    @property
    def failed(self) -> int:
        """Rows that failed."""
        ...

    @property
    def left(self) -> float | None:
        """A guess, in seconds."""
        ...


class ShowProgress:
    """For `run(..., on_event=ShowProgress())` and `run_sweep(..., on_progress=ShowProgress())`.

    With `preview`, the model that runs, a notebook also shows the decoded clean estimate after every `every`-th step:
    each costs a pass of the autoencoder, and changes no picture. Elsewhere there are no previews.

    Raises:
        PlanError: `every` is no whole number above 0.
    """

    def __init__(self, preview: Backbone | None = None, *, every: int = 1) -> None:
        check_whole("every", every, 1)
        self.preview, self.every = preview, every
        self._show = _notebook() or (_Terminal() if sys.stderr is not None and sys.stderr.isatty() else _Silent())
        self._stage, self._count, self._name = 0, 0, ""
        self._shown, self._picture, self._began = 0.0, "", time.monotonic()
        self._notes: list[str] = []

    def __call__(self, event: "Event | Rows") -> None:
        """Take an event of a run, or the progress of a sweep."""
        if isinstance(event, StageBegan):
            self._stage, self._count, self._name = event.index, event.count, event.name
            self._draw(f"{event.name}", event.index, event.count)
        elif isinstance(event, Stepped):
            self._look(event.step)
            share = event.step.index / event.step.steps
            rate = event.step.index / max(1e-9, time.monotonic() - self._began)
            text = f"{self._name}: step {event.step.index} of {event.step.steps}, {rate:.3g} steps/s"
            self._draw(text, self._stage + share, self._count)
        elif isinstance(event, StageEnded):
            self._began = time.monotonic()
            if event.index + 1 == self._count:
                self._draw("done", self._count, self._count, last=True)
        elif isinstance(event, Noted):
            self._notes.append(event.text)
        else:
            left = "" if event.left is None else f", {event.left:.0f} s left"
            bad = f", {event.failed} failed" if event.failed else ""
            text = f"{event.done} of {event.total} rows{bad}{left}"
            self._draw(text, event.done, event.total, last=event.done >= event.total)

    def _look(self, step: Step) -> None:
        """Decode the clean estimate for a notebook."""
        if self.preview is None or not self._show.pictures or step.index % self.every or step.denoised.ndim != 4:
            return
        with torch.inference_mode():
            images = to_images(self.preview.decode(step.denoised.float()))
        self._picture = html.picture(png(strip(images)), "preview")

    def _draw(self, text: str, done: float, total: float, *, last: bool = False) -> None:
        now = time.monotonic()
        if not last and now - self._shown < EVERY_SECONDS:
            return
        self._shown = now
        self._show(text, done, total, self._picture, self._notes, last)


class _Terminal:
    """One line on stderr that is written over; nothing where that is no terminal."""

    pictures = False

    def __call__(self, text: str, done: float, total: float, picture: str, notes: list[str], last: bool) -> None:  # noqa: FBT001
        filled = int(20 * done / max(1e-9, total))
        line = f"[{'#' * filled}{'.' * (20 - filled)}] {text}"
        ending = "".join(f"\n{note}" for note in notes) + "\n" if last else ""
        sys.stderr.write(f"\r{printable(line)[:100]:<100}{ending}")
        sys.stderr.flush()


class _Silent:
    pictures = False

    def __call__(self, *said: object) -> None:
        """Nothing."""


class _Notebook:
    """A cell's output that is replaced."""

    pictures = True

    def __init__(self, display: Callable[..., Any], markup: Callable[[str], Any]) -> None:
        self._display, self._markup, self._handle = display, markup, None

    def __call__(self, text: str, done: float, total: float, picture: str, notes: list[str], last: bool) -> None:  # noqa: FBT001
        bar = f'<progress value="{done:g}" max="{total:g}" style="width:300px"></progress> {escaping.escape(text)}'
        more = "".join(f"<br>{escaping.escape(note)}" for note in notes)
        shown = self._markup(f"<div>{bar}{more}</div>{picture}")
        if self._handle is None:
            self._handle = self._display(shown, display_id=True)
        else:
            self._handle.update(shown)


def _notebook() -> "_Notebook | None":
    """The cell that is running, where a notebook's kernel runs this."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    if shell is None or not hasattr(shell, "kernel"):
        return None
    from IPython.display import HTML, display  # type: ignore[import-not-found,unused-ignore]  # pyright: ignore

    return _Notebook(display, HTML)

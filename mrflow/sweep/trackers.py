"""Where people keep their runs: the rows of a sweep are sent to TensorBoard, Weights & Biases or Trackio as they come.

One protocol, and one word for each on the command line (`--log`). A tracker of your own is a class with its methods.
"""

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from mrflow._checks import check_path
from mrflow.errors import PlanError, ResourceError
from mrflow.machine.failures import passes
from mrflow.records.files import check_writable
from mrflow.records.readable import stage_text
from mrflow.sweep.rows import Row
from mrflow.sweep.store import read
from mrflow.sweep.tables import Table, table

log = logging.getLogger(__name__)
PICTURES = 16  # of each chain that are sent
WORDS = "tensorboard:FOLDER, wandb, wandb:PROJECT, trackio or trackio:PROJECT"


class Tracker(Protocol):
    """What is told of a sweep, in this order: `begin` once, `row` for each row that is made, `finish` once."""

    def begin(self, name: str, config: Mapping[str, Any]) -> None:
        """The sweep's folder by name; its model, versions and chains in words, and how many rows were there (`before`).

        May refuse with a PlanError.
        """

    def row(self, row: Row, number: int, picture: Path | None) -> None:
        """A row as it is made; `number` counts on from those of its chain that were there. Pictures of the first."""

    def finish(self, methods: Table) -> None:
        """The table of methods over all rows of the folder; called also where the sweep was stopped."""


def tracker(word: str) -> Tracker:
    """A tracker by its word on the command line.

    Raises:
        PlanError: there is no such word, its package is not installed, or its folder takes no files.
    """
    kind, _, place = word.partition(":")
    if kind == "tensorboard" and place:
        return TensorBoard(check_path("the folder of --log", place))
    if kind in ("wandb", "trackio"):
        return HostedTracker(kind, place or "mrflow")
    raise PlanError(f"--log takes {WORDS}, got {word!r}")


def _package(module: str, extra: str) -> Any:  # noqa: ANN401
    try:
        return import_module(module)
    except ImportError as error:
        raise PlanError(f"--log {extra} cannot be used ({error}): pip install 'mrflow[{extra}]'") from None


def numbers(row: Row) -> dict[str, float]:
    """What is drawn as curves: metrics, seconds, and whether the row failed."""
    return {**row.metrics, "seconds": row.seconds} if row.done else {"failed": 1.0}


class TensorBoard:
    """Event files that `tensorboard --logdir FOLDER` shows: a curve for each metric and chain, pictures, the table.

    Raises:
        PlanError: tensorboard is not installed (extra `[tensorboard]`). ResourceError: the folder takes no files.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._make = _package("torch.utils.tensorboard", "tensorboard").SummaryWriter
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ResourceError(f"--log tensorboard:{folder}: {error.strerror or error}") from None
        check_writable(folder / "events")

    def begin(self, name: str, config: Mapping[str, Any]) -> None:
        """Open the event file."""
        self._writer = self._make(str(self.folder / name))
        lines = [f"- **{key}**: {value}" for key, value in config.items() if key != "chains"]
        lines += [f"- **{label}**: {text}" for label, text in config["chains"].items()]
        self._writer.add_text("sweep", "\n".join(lines))

    def row(self, row: Row, number: int, picture: Path | None) -> None:
        """Points of curves, and a picture."""
        for metric, value in numbers(row).items():
            self._writer.add_scalar(f"{metric}/{row.chain}", value, number)
        if picture is not None:
            with Image.open(picture) as image:
                pixels = np.asarray(image.convert("RGB"))
            self._writer.add_image(f"pictures/{row.chain}", pixels, number, dataformats="HWC")

    def finish(self, methods: Table) -> None:
        """The table, and the end of the file."""
        self._writer.add_text("methods", str(methods))
        self._writer.close()


class HostedTracker:
    """Weights & Biases or Trackio, whose modules have one interface; `WANDB_MODE=offline` and Trackio need no network.

    Each time a sweep is started or resumed is a run, and all runs of a folder are a group: their steps go on where the
    one before ended, and processes that share a folder do not write into one another's run.

    Raises:
        PlanError: the package is not installed (extra of the same name).
    """

    def __init__(self, module: str, project: str) -> None:
        self.module, self.project = _package(module, module), project
        self._step = 0  # rows of all chains

    def begin(self, name: str, config: Mapping[str, Any]) -> None:
        """Begin a run of the project."""
        self._step = config["before"]
        self.module.init(project=self.project, name=name, group=name, config=dict(config))

    def row(self, row: Row, number: int, picture: Path | None) -> None:
        """Numbers by chain, with a step for each row."""
        self._step += 1
        found: dict[str, Any] = {f"{row.chain}/{name}": value for name, value in numbers(row).items()}
        if picture is not None:
            found[f"{row.chain}/picture"] = self.module.Image(str(picture), caption=row.prompt)
        self.module.log(found, step=self._step)

    def finish(self, methods: Table) -> None:
        """The table, and the end of the run."""
        columns, lines = list(methods.heads), [list(line) for line in methods.lines]
        self.module.log({"methods": self.module.Table(columns=columns, data=lines)}, step=self._step + 1)
        self.module.finish()


class Logs:
    """All trackers of a sweep: `begin` may refuse, before any row; afterwards none of them can stop the sweep."""

    def __init__(self, trackers: Sequence[Tracker], folder: Path, said: Mapping[str, Any]) -> None:
        self._trackers, self._folder = list(trackers), folder
        self._rows = _counted(folder) if trackers else Counter[str]()
        config = {key: said[key] for key in ("model", "weights", "reference", "prompts", "seeds", "rows", "versions")}
        config["before"] = self._rows.total()
        for each in trackers:
            each.begin(folder.resolve().name, {**config, "chains": _in_words(said["chains"])})

    def row(self, row: Row) -> None:
        """Tell all of a row."""
        self._rows[row.chain] += 1
        number = self._rows[row.chain]
        picture = self._folder / row.picture if row.picture is not None and number <= PICTURES else None
        self._each(lambda tracker: tracker.row(row, number, picture))

    def finish(self) -> None:
        """Tell all the table of methods."""
        if self._trackers:
            try:
                methods = table(self._folder)
            except PlanError:  # no row is there
                methods = Table(("method",), ())
            self._each(lambda tracker: tracker.finish(methods))

    def _each(self, tell: Callable[[Tracker], None]) -> None:
        for each in list(self._trackers):
            try:
                tell(each)
            except BaseException as error:
                if passes(error):
                    raise
                log.warning("--log %s is left out: %s: %s", type(each).__name__, type(error).__name__, error)
                self._trackers.remove(each)


def _counted(folder: Path) -> Counter[str]:
    """How many rows of each chain are there; none where the rows are made on machines whose folder is not seen here."""
    try:
        return Counter(row.chain for row in read(folder))
    except PlanError:
        return Counter()


def _in_words(chains: Mapping[str, Sequence[object]]) -> dict[str, str]:
    return {label: " >> ".join(" ".join(stage_text(s)).strip() for s in chain) for label, chain in chains.items()}

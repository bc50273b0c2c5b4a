"""A sweep's folder: rows written once and whole, leases that let processes share it, nothing lost when one dies.

    sweep.json            the chains, as plain data, and what tells their rows from those of older settings
    rows/ab/<key>.json    one file a row; that it is there, whole, is the only truth about what is done
    pictures/ab/<key>.png written and on disk before its row
    leases/<key>.json     who is making a row now: host, process, boot, tries; its modification time is the heartbeat

A key is the content of what a row depends on, so changed settings make new rows and leave old ones. A lease whose
process is gone (same host), or whose heartbeat is old by the file system's own clock, is taken over. Files that are
being written begin with `files.TEMPORARY`; but for leases, only those are ever removed.
"""

import json
import os
import socket
import stat
import threading
import uuid
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any, cast

from mrflow.errors import PlanError, ResourceError
from mrflow.files import TEMPORARY, temporary_beside
from mrflow.io import write_bytes

FORMAT = 1
ROOMS = ("rows", "pictures", "leases")
BEAT, STALE = 5.0, 60.0  # seconds between heartbeats, and after which a lease is dead
MAX_TRIES = 3  # how often a row may take its process down with it


@dataclass(frozen=True)
class Row:
    """One picture of a sweep: what it is, how it was made, what it cost, how it scored.

    `draw` numbers the pictures of a prompt, `seed` is what its noise was drawn from (`mrflow run --seed`).
    """

    key: str
    status: str
    chain: str
    model: str
    weights: str
    prompt: str
    negative: str
    seed: int
    draw: int = 0
    tags: Mapping[str, str] = field(default_factory=dict[str, str])
    error: str | None = None
    tries: int = 1
    seconds: float = 0.0
    nfe: int = 0
    flops: float = 0.0
    peak_bytes: int = 0
    stages: Sequence[Mapping[str, Any]] = ()
    metrics: Mapping[str, float] = field(default_factory=dict[str, float])
    measured: Sequence[str] = ()
    picture: str | None = None
    stage_pictures: Sequence[Sequence[str]] = ()
    versions: Mapping[str, str] = field(default_factory=dict[str, str])
    device: str = ""
    batch: int = 1
    time: str = ""
    format: int = FORMAT

    @property
    def done(self) -> bool:
        """Whether there is a picture."""
        return self.status == "done"


_FIELDS = frozenset(f.name for f in fields(Row))


class Store:
    """The folder of a sweep. Several processes may hold one each."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._held: set[str] = set()
        self._lock = threading.Lock()
        self._beating: threading.Thread | None = None
        self._closed = threading.Event()

    def open(self, manifest: Mapping[str, object]) -> None:
        """Make the folder, or go on in it; refuse one that cannot be written, before any work.

        Raises:
            ResourceError: the folder does not take files. PlanError: it holds something else.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            old, new = self._begun(), dict(manifest)
            for part in ("chains", "prints"):  # by label; those of sweeps before stay
                new[part] = {
                    **cast("dict[str, object]", old.get(part, {})),
                    **cast("dict[str, object]", manifest.get(part, {})),
                }
            # Before the folders of its own: whoever sees one of those also sees that this is a sweep's folder.
            write_bytes(self.folder / "sweep.json", json.dumps({"format": FORMAT, **new}, indent=1).encode())
            for name in ROOMS:
                (self.folder / name).mkdir(exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise PlanError(f"{error.filename or self.folder} is not a folder; choose another with --out") from None
        except OSError as error:
            raise ResourceError(f"{self.folder} cannot be written: {error.strerror or error}") from None
        self._sweep_up()

    def _begun(self) -> dict[str, Any]:
        """What sweep.json says of a sweep begun here before; empty in an empty folder.

        Raises:
            PlanError: the folder holds anything and is not a sweep's, so nothing in it may be touched.
        """
        foreign = sorted(p.name for p in self.folder.iterdir() if not p.name.startswith(TEMPORARY))
        # Looked at after the listing: a process that begins beside this one writes it before anything else.
        path, said = self.folder / "sweep.json", self.manifest()
        if not path.exists() and foreign:
            raise PlanError(
                f"{self.folder} holds other files ({foreign[0]!r}) and no sweep.json, so it is not a sweep's "
                "folder; choose a new or an empty one with --out"
            )
        if path.exists() and "format" not in said and not {*ROOMS} <= {*foreign}:  # a power cut may leave it torn
            raise PlanError(f"{path} was not written by a sweep; choose another folder with --out")
        return said

    def manifest(self) -> dict[str, Any]:
        """What sweep.json says; empty where it is not there or not whole."""
        try:
            value: object = json.loads((self.folder / "sweep.json").read_text("utf-8"))
        except (OSError, ValueError):
            return {}
        return cast("dict[str, Any]", value) if isinstance(value, dict) else {}

    def row_path(self, key: str) -> Path:
        """Where a row lies."""
        return self.folder / "rows" / key[:2] / f"{key}.json"

    def picture_path(self, key: str, ending: str = "") -> Path:
        """Where its picture lies, or a stage's."""
        return self.folder / "pictures" / key[:2] / f"{key}{ending}.png"

    def get(self, key: str) -> Row | None:
        """A row, or None where it is not there or not whole."""
        return read_row(self.row_path(key))

    def commit(self, row: Row) -> None:
        """Write a row; its pictures must be there. It appears whole or not at all.

        Raises:
            ResourceError: the disk is full or the folder does not take it; nothing is left behind.
        """
        path = self.row_path(row.key)
        _ready(path.parent)
        if row.picture is not None:
            _sync((self.folder / row.picture).parent)
        write_bytes(path, json.dumps(asdict(row), sort_keys=True).encode())
        _sync(path.parent)

    def write_picture(self, path: Path, data: bytes) -> str:
        """Write a picture; its name relative to the folder."""
        _ready(path.parent)
        write_bytes(path, data)
        return str(path.relative_to(self.folder))

    def claim(self, key: str) -> int | None:
        """Take a row: how often it was begun before, or None where another process has it or it is done."""
        path = self.folder / "leases" / f"{key}.json"
        mine: dict[str, Any] = {"host": socket.gethostname(), "pid": os.getpid(), "boot": boot(), "tries": 0}
        for _ in range(3):
            if _create(path, json.dumps(mine)):
                row = self.get(key)
                if row is not None and row.done:  # another process made it meanwhile
                    path.unlink(missing_ok=True)
                    return None
                with self._lock:
                    self._held.add(key)
                self._beat()
                return int(mine["tries"])
            try:
                text = path.read_text("utf-8")
            except OSError:
                continue
            other = _table(text)
            if not self._dead(path, other):
                return None
            # Only one process can move it away; what was moved must be what was judged.
            aside = temporary_beside(path)
            try:
                os.rename(path, aside)
            except OSError:
                continue
            if aside.read_text("utf-8") != text:
                with suppress(OSError):
                    os.link(aside, path)
                aside.unlink(missing_ok=True)
                return None
            aside.unlink(missing_ok=True)
            mine["tries"] = int(other.get("tries", 0)) + 1
        return None

    def release(self, keys: Iterable[str]) -> None:
        """Give rows back, done or not."""
        for key in keys:
            with self._lock:
                held = key in self._held
                self._held.discard(key)
            if held:
                (self.folder / "leases" / f"{key}.json").unlink(missing_ok=True)

    @contextmanager
    def holding(self) -> Generator[None]:
        """Whatever happens inside, leases are given back."""
        try:
            yield
        finally:
            self._closed.set()
            self.release(list(self._held))
            self._closed = threading.Event()
            self._beating = None

    def _dead(self, path: Path, lease: Mapping[str, Any]) -> bool:
        if lease.get("host") == socket.gethostname() and lease.get("boot") == boot():
            pid = lease.get("pid")
            if not isinstance(pid, int):
                return True
            try:
                os.kill(pid, 0)
            except ProcessLookupError:
                return True
            except PermissionError:
                return False
            return False
        try:
            return _clock(path.parent) - path.stat().st_mtime > STALE
        except OSError:
            return False

    def _beat(self) -> None:
        if self._beating is not None and self._beating.is_alive():
            return
        closed = self._closed

        def beat() -> None:
            while not closed.wait(BEAT):
                with self._lock:
                    keys = list(self._held)
                for key in keys:
                    with suppress(OSError):
                        os.utime(self.folder / "leases" / f"{key}.json")

        self._beating = threading.Thread(target=beat, daemon=True, name="mrflow leases")
        self._beating.start()

    def _sweep_up(self) -> None:
        """Remove own temporary files that a killed process left, if nobody has touched them for long.

        Own ones are told by their prefix, in the folders that a sweep writes to; their age is measured by the clock of
        the file system that they lie on. Nothing else is ever removed.
        """
        with suppress(OSError):
            now = _clock(self.folder)
            for place in (".", "rows/*", "pictures/*", "leases"):
                for file in self.folder.glob(f"{place}/{TEMPORARY}*"):
                    with suppress(OSError):
                        status = file.lstat()
                        if stat.S_ISREG(status.st_mode) and now - status.st_mtime > 10 * STALE:
                            file.unlink()


def read(folder: str | Path) -> list[Row]:
    """All rows of a sweep's folder, in the order of their keys; files that are not whole are left out.

    Raises:
        PlanError: there is no such folder, or it is no sweep's.
    """
    rows = Path(folder) / "rows"
    if not rows.is_dir():
        raise PlanError(f"{folder} is no sweep's folder: it has no rows/")
    found = (read_row(path) for path in sorted(rows.glob("??/*.json")))
    return [row for row in found if row is not None]


def read_row(path: Path) -> Row | None:
    """One row file, or None where it is not there or not whole."""
    try:
        table = _table(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError):
        return None
    if table.get("key") != path.stem or table.get("status") not in ("done", "failed"):
        return None
    try:
        return Row(**{k: v for k, v in table.items() if k in _FIELDS})
    except TypeError:
        return None


@cache
def boot() -> str:
    """What tells this start of the machine from others."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return str(uuid.getnode())


def _table(text: str) -> dict[str, Any]:
    try:
        value: object = json.loads(text)
    except ValueError:
        return {}
    return cast("dict[str, Any]", value) if isinstance(value, dict) else {}


def _clock(folder: Path) -> float:
    """The time by the clock of the folder's own file system, in seconds, as modification times have it."""
    probe = temporary_beside(folder / "clock")
    try:
        probe.touch()
        return probe.stat().st_mtime
    finally:
        probe.unlink(missing_ok=True)


def _create(path: Path, text: str) -> bool:
    """Write a file that must not be there yet: whole under its name at once."""
    draft = temporary_beside(path)
    try:
        draft.write_text(text, "utf-8")
        os.link(draft, path)
    except FileExistsError:
        return False
    except OSError as error:
        raise ResourceError(f"{path} could not be written: {error.strerror or error}") from None
    finally:
        with suppress(OSError):
            draft.unlink(missing_ok=True)
    return True


def _ready(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ResourceError(f"{folder} could not be made: {error.strerror or error}") from None


def _sync(folder: Path) -> None:
    """Make sure that a name which was just written is on disk."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

"""Leases: which process makes which row now, and which rows took their process down with them.

    leases/<key>.json     a line of JSON on the holder, then perhaps one on what it is doing; its modification time is
                          the heartbeat

A lease says who holds it by a random token, and where that process is by host, boot, pid namespace, pid and start time.
The token is looked at before every heartbeat, commit and release, so a process that was stopped for long finds out that
another has taken over. A lease is dead when its process is known to be gone, which can only be seen from the same
namespace of the same boot, or else when its heartbeat is old by the clock of the file system that it lies on.

A row is blamed for a death only while it is being computed, alone, after the warm-up.
"""

import json
import os
import socket
import stat
import threading
import uuid
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from mrflow.errors import ResourceError
from mrflow.records.files import parse_table, read_regular, temporary_beside
from mrflow.records.publish import place

BEAT, STALE = 5.0, 60.0  # seconds between heartbeats, and after which a lease is dead
MAX_BYTES = 1 << 16
POSIX = os.name == "posix"  # elsewhere signal 0 is no question: it ends the process


class LeaseLostError(Exception):
    """Another process has taken the row over: what this one made of it is dropped."""


@dataclass(frozen=True)
class Claim:
    """A row that is held: how often it was begun before, and how often its process died while it made it alone."""

    key: str
    tries: int = 0
    deaths: int = 0

    @property
    def suspect(self) -> bool:
        """Whether a process died while it made this row, perhaps among others."""
        return self.tries > 0


class Leases:
    """The leases of a folder, and those that this process holds."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._held: dict[str, str] = {}  # tokens
        self._lock = threading.Lock()
        self._beating: threading.Thread | None = None
        self._closed = threading.Event()

    def __contains__(self, key: str) -> bool:
        """Whether this process has taken a row and not given it back; another may have taken it over since."""
        return key in self._held

    def path(self, key: str) -> Path:
        """Where a row's lease lies."""
        return self.folder / f"{key}.json"

    def claim(self, key: str, *, calm: bool, wanted: Callable[[], bool]) -> Claim | None:
        """Take a row, or None where another process has it or it is no longer `wanted`.

        With `calm`, a row that a process died with is left where it is.
        """
        path, token = self.path(key), uuid.uuid4().hex
        tries = deaths = 0
        for _ in range(3):
            mine = {"token": token, **_here(), "tries": tries, "deaths": deaths}
            if _create(path, json.dumps(mine) + "\n"):
                with self._lock:
                    self._held[key] = token
                if not wanted():  # another process made it meanwhile
                    self.release([key])
                    return None
                self._beat()
                return Claim(key, tries, deaths)
            text = _read(path)
            if text is None:
                continue
            other = _parse(text)
            if not self._dead(path, other):
                return None
            deaths = _count(other, "deaths") + (other.get("doing") == "alone")
            tries = _count(other, "tries") + ("doing" in other)
            if calm and tries:
                return None
            if not self._take_away(path, text):
                return None
        return None

    def doing(self, keys: Iterable[str], what: str) -> None:
        """Say that rows are being computed, "alone" or "together", so that a death can be laid at their door."""
        for key in keys:
            with suppress(OSError), self._own(key) as handle:
                os.write(handle, (json.dumps({"doing": what}) + "\n").encode())

    def check(self, key: str) -> None:
        """Raise LeaseLostError where a row that this process took is no longer its own."""
        if key in self._held:
            try:
                with self._own(key):
                    pass
            except OSError:
                raise LeaseLostError(key) from None

    def release(self, keys: Iterable[str]) -> None:
        """Give rows back, done or not; one that another process has taken over is left to it."""
        for key in keys:
            with self._lock:
                token = self._held.pop(key, None)
            if token is None:
                continue
            path = self.path(key)
            text = _read(path)
            if text is not None and _parse(text).get("token") == token:
                self._take_away(path, text)

    def abandon(self) -> None:
        """Leave rows as a process leaves them that dies, for others to take over at once."""
        with self._lock:
            keys = list(self._held)
        for key in keys:
            with suppress(OSError), self._own(key) as handle:
                os.write(handle, (json.dumps({"gone": True}) + "\n").encode())
        with self._lock:
            self._held.clear()

    def close(self) -> None:
        """Give everything back."""
        self._closed.set()
        self.release(list(self._held))
        self._closed, self._beating = threading.Event(), None

    def tidy(self, finished: Callable[[str], bool]) -> None:
        """Remove the leases of dead processes that lie beside finished rows."""
        with suppress(OSError):
            for path in sorted(self.folder.glob("*.json")):
                text = _read(path)
                if text is not None and finished(path.stem) and self._dead(path, _parse(text)):
                    self._take_away(path, text)

    def _own(self, key: str) -> "_OpenLease":
        """A lease of this process, open for writing: what is written reaches it and no other."""
        return _OpenLease(self.path(key), self._held.get(key, ""))

    def _take_away(self, path: Path, text: str) -> bool:
        """Remove a lease that says `text`. Only one process can move it away, and it must be what was judged.

        A folder in its place is nobody's lease, and stays.
        """
        if not path.is_symlink() and path.is_dir():
            return False
        aside = temporary_beside(path)
        try:
            os.rename(path, aside)
        except OSError:
            return False
        if same := _read(aside) == text:
            aside.unlink(missing_ok=True)
        else:
            with suppress(OSError):
                place(aside, path)
            aside.unlink(missing_ok=True)
        return same

    def _dead(self, path: Path, lease: Mapping[str, Any]) -> bool:
        if lease.get("gone") is True:
            return True
        here = _here()
        if all(lease.get(part) == here[part] for part in ("boot", "space")) and here["space"]:
            began = _process_start(_count(lease, "pid"))
            return began is None or began != lease.get("began")
        if POSIX and all(lease.get(part) == here[part] for part in ("host", "boot")) and not here["space"]:
            try:
                os.kill(_count(lease, "pid"), 0)
            except ProcessLookupError:
                return True
            except OSError:
                pass
        try:
            # Nor does who lives beat in the future: the clock was put back since, and the next beat shows it.
            return abs(clock(path.parent) - path.stat().st_mtime) > STALE
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
                    with suppress(OSError), self._own(key) as handle:
                        os.utime(handle if os.utime in os.supports_fd else self.path(key))

        self._beating = threading.Thread(target=beat, daemon=True, name="mrflow leases")
        self._beating.start()


class _OpenLease:
    """A lease that is open for appending and bears a token; OSError where it is not there or bears another."""

    def __init__(self, path: Path, token: str) -> None:
        self.path, self.token = path, token

    def __enter__(self) -> int:
        self.handle = os.open(self.path, os.O_RDWR | os.O_APPEND | getattr(os, "O_BINARY", 0))
        if _parse(os.read(self.handle, MAX_BYTES).decode("utf-8", "replace")).get("token") != self.token:
            os.close(self.handle)
            raise FileNotFoundError(f"{self.path} is another's")
        return self.handle

    def __exit__(self, *_: object) -> None:
        os.close(self.handle)


def clock(folder: Path) -> float:
    """The time by the clock of a folder's own file system, in seconds, as modification times have it."""
    probe = temporary_beside(folder / "clock")
    try:
        probe.touch()
        return probe.stat().st_mtime
    finally:
        probe.unlink(missing_ok=True)


def _here() -> dict[str, str | int | None]:
    """What tells this process from all others, on this machine and elsewhere."""
    return {
        "host": socket.gethostname(), "boot": boot(), "space": _space(), "pid": os.getpid(),
        "began": _process_start(os.getpid()),
    }  # fmt: skip


@cache
def boot() -> str:
    """What tells this start of the machine from others."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return str(uuid.getnode())


def _space() -> str:
    """The namespace that pids are counted in; empty where there is none."""
    try:
        return f"{os.readlink('/proc/self/ns/pid')} {os.stat('/proc/self/ns/pid').st_dev}"
    except OSError:
        return ""


def _process_start(pid: int) -> int | None:
    """When a process of this namespace began, in ticks since the machine did; None where there is none."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    after = text.rpartition(")")[2].split()
    return None if after[0] in ("Z", "X") else int(after[19])


def _count(lease: Mapping[str, Any], name: str) -> int:
    value = lease.get(name)
    return value if type(value) is int and 0 <= value < 1 << 31 else 0


def _read(path: Path) -> str | None:
    """A lease's text, or None where there is no file; one that is no lease reads as an empty text."""
    try:
        return read_regular(path, most=MAX_BYTES).decode("utf-8", "replace")
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        return ""


def _parse(text: str) -> dict[str, Any]:
    """What the whole lines of a lease say together; the later ones win."""
    out: dict[str, Any] = {}
    for line in text.splitlines():
        with suppress(ValueError):
            out |= parse_table(line.encode("utf-8", "replace"))
    return out


def _create(path: Path, text: str) -> bool:
    """Write a file that must not be there yet: whole under its name at once, where the file system has links."""
    draft = temporary_beside(path)
    try:
        draft.write_text(text, "utf-8")
        place(draft, path)
    except FileExistsError:
        return False
    except OSError as error:
        raise ResourceError(f"{path} could not be written: {error.strerror or error}") from None
    finally:
        with suppress(OSError):
            draft.unlink(missing_ok=True)
    return True


def is_old_temporary(path: Path, now: float) -> bool:
    """Whether a temporary file was left by a process that is long gone."""
    status = path.lstat()
    return stat.S_ISREG(status.st_mode) and now - status.st_mtime > 10 * STALE

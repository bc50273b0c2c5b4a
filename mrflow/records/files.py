"""Files that a chain names: found where they are, told by their content."""

import hashlib
import json
import math
import os
import shutil
import stat
import tempfile
import uuid
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import fields
from functools import cache, lru_cache
from pathlib import Path
from typing import IO, Any, ClassVar, NoReturn, cast

from mrflow._checks import check_path
from mrflow.errors import ResourceError, WeightsError
from mrflow.machine.interrupts import hold_signals

_known: ContextVar[tuple[Path, ...]] = ContextVar("known", default=())

TEMPORARY = ".mrflow-temporary-"
"""How the name of every file begins that mrflow has not finished writing; files with another name are never removed."""


def temporary_beside(path: Path) -> Path:
    """An unused name in the folder of `path`, for what is to become it."""
    return path.with_name(f"{TEMPORARY}{path.name[:40]}.{uuid.uuid4().hex}")


def read_regular(path: str | Path, *, most: int) -> bytes:
    """What a regular file holds; links, devices and pipes are not followed, opened for long or waited for.

    Raises:
        OSError: it is not there, is no regular file, or cannot be read. ValueError: it is larger than `most` bytes.
    """
    flags = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    handle = os.open(path, flags)
    try:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(f"{path} is no regular file")
        if status.st_size > most:
            raise ValueError(f"{path} is larger than {most} bytes")
        parts, left = list[bytes](), most + 1
        while left and (part := os.read(handle, min(left, max(4096, status.st_size + 1)))):
            parts.append(part)
            left -= len(part)
        if not left:
            raise ValueError(f"{path} is larger than {most} bytes")
        return b"".join(parts)
    finally:
        os.close(handle)


def _constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        _constant(text)
    return value


_json = json.JSONDecoder(parse_float=_finite, parse_constant=_constant)


def parse_table(data: bytes) -> dict[str, Any]:
    """The JSON object that `data` is, of finite numbers; a byte order mark before it is passed over.

    Raises:
        ValueError: it is anything else, or nested too deeply.
    """
    try:
        value: object = _json.decode(data.decode("utf-8-sig"))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError("it is no table")
    return cast("dict[str, Any]", value)


def beneath(folder: Path, name: str) -> Path | None:
    """The regular file `name` of a folder; None where there is none, or where it or a link leads out of the folder."""
    try:
        path = (folder / name).resolve(strict=True)
        return path if path.is_file() and path.is_relative_to(folder.resolve()) else None
    except (OSError, ValueError, RuntimeError):
        return None


def spelled(folder: Path, name: str) -> Path:
    """`name` in a folder; where it is not there, what is there and differs only in capitals, as file systems that tell
    them apart have it (`Transformer/` for `transformer/`, `Config.json` for `config.json`).
    """
    path = folder / name
    if not os.path.lexists(path):
        with suppress(OSError):
            like = sorted(found for found in os.listdir(folder) if found.casefold() == name.casefold())
            return folder / like[0] if like else path
    return path


def check_replaceable(path: Path) -> None:
    """Refuse to write a file under the name of a device, a pipe or a socket, or of a link to one: it would be gone.

    Raises:
        ResourceError: it is one.
    """
    try:
        mode = path.stat().st_mode
    except OSError:
        return
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise ResourceError(f"{path} is a device, a pipe or a socket, which a file would replace; name a file")


def check_writable(path: Path) -> None:
    """Refuse an output file that could not be written, before any work: no folder is made, nothing is left behind.

    Raises:
        ResourceError: the folder is missing, is a file, or does not take files. PlanError: it cannot be a path.
    """
    folder = check_path("the output", path).parent
    if path.is_dir():
        raise ResourceError(f"{path} is a folder; name a file in it, such as {path / 'picture.png'}")
    check_replaceable(path)
    if not folder.is_dir():
        raise ResourceError(f"the folder {folder} does not exist; make it, or choose another with --out")
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ResourceError(
            f"the folder {folder} cannot be written ({error.strerror}); choose another with --out"
        ) from None


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file whole or not at all: see `writing`."""
    with writing(path) as file:
        file.write(data)


@contextmanager
def writing(path: Path) -> Generator[IO[bytes]]:
    """A file that is there whole or not at all: see `drafting`.

    Raises:
        ResourceError: the disk is full or the folder does not take it; the temporary file is removed.
    """
    try:
        with drafting(path) as temporary, temporary.open("xb") as file:
            yield file
    except OSError as error:
        raise ResourceError(
            f"{path} could not be written: {error.strerror or error}; nothing was left behind"
        ) from None


@contextmanager
def drafting(path: Path) -> Generator[Path]:
    """An unused name beside `path`: what is written there is flushed to disk and renamed to `path`, or removed.

    Raises:
        ResourceError: `path` is a device, a pipe or a socket.
    """
    check_replaceable(path)
    temporary = temporary_beside(path)
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        with hold_signals(), suppress(OSError):  # it was renamed, or its folder is none
            temporary.unlink()


@contextmanager
def filling(folder: Path) -> Generator[Path]:
    """A folder inside `folder`, which is empty or new: what is put there lies in `folder` at the end, or is removed."""
    new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    draft = temporary_beside(folder / "draft")
    try:
        draft.mkdir()
        yield draft
        with hold_signals():
            for path in draft.iterdir():
                path.rename(folder / path.name)
            new = False
    finally:
        with hold_signals(), suppress(OSError):
            shutil.rmtree(draft, ignore_errors=True)
            if new:
                folder.rmdir()


@contextmanager
def known_files(paths: Iterable[str | Path]) -> Generator[None]:
    """Inside, a file that is not where its name says is taken from `paths`, where one has that name."""
    token = _known.set((*_known.get(), *(check_path("files", p) for p in paths)))
    try:
        yield
    finally:
        _known.reset(token)


def known_file(name: str) -> Path | None:
    """The file of this name among those that `known_files` was given and those that come with mrflow."""
    if not name or Path(name).name != name or "\0" in name:
        return None
    beside = [p / name if p.is_dir() else p for p in _known.get()]
    beside.append(Path(__file__).parents[1] / "models" / "pocket" / name)
    return next((p.absolute() for p in beside if p.name == name and p.is_file()), None)


def locate(path: str, sha256: str) -> tuple[Path, str]:
    """Where a file lies, and the SHA-256 of what it holds.

    Raises:
        WeightsError: it is not there, or holds something else than `sha256` (if that is not empty) says.
    """
    where = expand_home(path)
    if not where.is_file():
        where = known_file(where.name) or where
    if sha256 and not where.is_file():
        raise WeightsError(
            f"{where} is not here (SHA-256 {sha256[:12]}...): say where it is, --file FILE or files=[file]"
        )
    found = digest(where)
    if sha256 and found != sha256:
        raise WeightsError(
            f"{where} is another file than the one asked for: its SHA-256 begins {found[:12]}, not {sha256[:12]}"
        )
    return where, found


class FileNamed:
    """A frozen dataclass that names files: `files` are the fields that do, each with that of its SHA-256."""

    files: ClassVar[Mapping[str, str]] = {"path": "sha256"}

    def find_file(self, field: str, path: str | Path) -> Path:
        """Have a field say where its file lies, and another its SHA-256; `path` is where it is said to be.

        Raises:
            WeightsError: as `locate`.
        """
        where, found = locate(str(path), getattr(self, self.files[field]))
        object.__setattr__(self, field, str(where))
        object.__setattr__(self, self.files[field], found)
        return where

    def to_record(self) -> dict[str, object]:
        """The fields that go into a record: no folder names."""
        values: dict[str, object] = {each.name: getattr(self, each.name) for each in fields(self)}  # type: ignore[arg-type]
        return values | {name: Path(str(values[name])).name for name in self.files}


def digest(path: Path) -> str:
    """The SHA-256 of a file, in hex; of a file that did not change it is remembered.

    Of an ncnn network (`.param`) it is that of its layers and of its weights beside it, one after the other.

    Raises:
        WeightsError: there is no such file. ResourceError: it cannot be read.
    """
    try:
        if not path.is_file():
            path.stat()
            raise WeightsError(f"{path} is no file")
        beside = path.with_suffix(".bin")
        parts = (path, beside) if path.suffix == ".param" and beside.is_file() else (path,)
        stats = [p.stat() for p in parts]
        state = tuple((s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for s in stats)
        return _digest(tuple(p.resolve() for p in parts), state)
    except FileNotFoundError:
        raise WeightsError(f"there is no file {path}") from None
    except OSError as error:
        raise ResourceError(f"{path} cannot be read: {error.strerror or error}") from None


@lru_cache(maxsize=64)
def _digest(paths: tuple[Path, ...], state: tuple[tuple[int, ...], ...]) -> str:
    total = hashlib.sha256()
    for path in paths:
        with path.open("rb") as f:
            hashlib.file_digest(f, lambda: total)
    return total.hexdigest()


def cache_folder() -> Path:
    """Where results that can be made again are kept: $MRFLOW_CACHE, or mrflow in the user's cache folder.

    Of a user without a home it is a temporary folder that goes with the process.
    """
    if own := os.environ.get("MRFLOW_CACHE"):
        return Path(own)
    try:
        return user_folder("XDG_CACHE_HOME", ".cache") / "mrflow"
    except ResourceError:
        return Path(_passing().name)


@cache
def _passing() -> "tempfile.TemporaryDirectory[str]":
    return tempfile.TemporaryDirectory(prefix="mrflow-cache-")


def user_folder(variable: str, usual: str) -> Path:
    """The folder that an environment variable names, else `usual` in the user's home.

    Raises:
        ResourceError: the variable is not set, and the user has no home.
    """
    if named := os.environ.get(variable):
        return Path(named)
    try:
        return Path.home() / usual
    except RuntimeError:
        raise ResourceError(f"this user has no home folder; set {variable}, or HOME") from None


def expand_home(path: str | Path) -> Path:
    """The path with `~` and `~user` as homes; one whose home is not known stays as it is."""
    try:
        return check_path("the file", path).expanduser()
    except RuntimeError:
        return Path(path)

"""A sweep's folder: rows written once and whole, leases that let processes share it, nothing lost when one dies.

    sweep.json            the chains, as plain data, and what tells their rows from those of older settings
    rows/ab/<key>.json    one file a row; that it is there, whole, is the only truth about what is done
    pictures/ab/<key>.png written and on disk before its row, which holds its size and SHA-256
    leases/<key>.json     who is making a row now (`mrflow.sweep.leases`)
    index.bin             what was read and found right already (`mrflow.sweep.index`); may be removed at any time

A key is the content of what a row depends on, so changed settings make new rows and leave old ones. A row counts while
its picture is whole. Files that are being written begin with `files.TEMPORARY`; but for leases, only those are ever
removed. Whatever lies in the folder may come from anywhere, and is checked before it is used.
"""

import json
import os
import stat
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

from mrflow._checks import check_path
from mrflow.errors import PlanError, ResourceError
from mrflow.records.files import TEMPORARY, parse_table, read_regular, temporary_beside, write_bytes
from mrflow.records.publish import place
from mrflow.sweep.index import Index, Mark, mark
from mrflow.sweep.leases import Claim, LeaseLostError, Leases, clock, is_old_temporary
from mrflow.sweep.rows import FORMAT, MAX_BYTES, Row, read_row, sha256_of

ROOMS = ("rows", "pictures", "leases")
MAX_TRIES = 3  # how often a row may take its process down with it


class Store:
    """The folder of a sweep. Several processes may hold one each."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = check_path("the folder", folder)
        self.leases = Leases(self.folder / "leases")
        self._rows, self._pictures = str(self.folder / "rows"), str(self.folder / "pictures")
        self.index = Index(self.folder)

    def open(self, manifest: Mapping[str, object]) -> None:
        """Make the folder, or go on in it; refuse one that cannot be written, before any work.

        Raises:
            ResourceError: the folder does not take files. PlanError: it holds something else.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            old, new = self._begun(), dict(manifest)
            for part in ("chains", "prints", "own", "used"):  # by label; those of sweeps before stay
                new[part] = {
                    **cast("dict[str, object]", old.get(part, {})),
                    **cast("dict[str, object]", manifest.get(part, {})),
                }
            # Before the folders of its own: whoever sees one of those also sees that this is a sweep's folder.
            write_bytes(self.folder / "sweep.json", json.dumps({"format": FORMAT, **new}, indent=1).encode())
            for name in ROOMS:
                (self.folder / name).mkdir(exist_ok=True)
                if not (self.folder / name).resolve().is_relative_to(self.folder.resolve()):
                    raise PlanError(
                        f"{self.folder / name} is a link that leads out of the folder; link the whole folder"
                    )
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
        """What sweep.json says, as far as it is what a sweep writes; empty where it is not there or not whole."""
        try:
            table = parse_table(read_regular(self.folder / "sweep.json", most=MAX_BYTES))
        except (OSError, ValueError):
            return {}
        return {name: value for name, value in table.items() if name not in _MANIFEST or _MANIFEST[name](value)}

    def row_path(self, key: str) -> Path:
        """Where a row lies."""
        return self.folder / "rows" / key[:2] / f"{key}.json"

    def picture_path(self, key: str, ending: str = "") -> Path:
        """Where its picture lies, or a stage's."""
        return self.folder / "pictures" / key[:2] / f"{key}{ending}.png"

    def get(self, key: str) -> Row | None:
        """A row, or None where it is not there or not whole, or its picture is not the one it was written with."""
        row = read_row(f"{self._rows}/{key[:2]}/{key}.json")
        return None if row is None or not self._whole(row) else row

    def _whole(self, row: Row) -> bool:
        if row.picture is None:
            return True
        path = f"{self.folder}/{row.picture}"
        try:
            status = os.lstat(path)
        except OSError:
            return False
        if not stat.S_ISREG(status.st_mode) or status.st_size != (row.picture_bytes or status.st_size):
            return False
        if not row.picture_sha256:
            return status.st_size > 0
        seen = _picture_mark(row.key, row.picture_sha256, status)
        if self.index.holds(seen):
            return True
        try:
            same = sha256_of(read_regular(path, most=row.picture_bytes)) == row.picture_sha256
        except (OSError, ValueError):
            return False
        if same:
            self.index.add(seen)
        return same

    def look(self, key: str, what: str) -> Mark | None:
        """The mark of a row that is there with its picture and is `what` is wanted of it; None where a file is missing.

        Take it before the row is read; `settle` adds it where the row was found so.
        """
        room = key[:2]
        try:
            states = [os.lstat(f"{self._rows}/{room}/{key}.json"), os.lstat(f"{self._pictures}/{room}/{key}.png")]
        except OSError:
            return None
        return mark(f"row {key} {what}", states)

    def settle(self, row: Row, seen: Mark | None) -> None:
        """Remember that a row is whole and what was wanted of it, until its file or its picture's changes."""
        if seen is not None and row.picture == f"pictures/{row.key[:2]}/{row.key}.png":
            self.index.add(seen)

    def commit(self, row: Row) -> None:
        """Write a row; its pictures must be there. It appears whole or not at all, and not over one that is done.

        Raises:
            ResourceError: the disk is full or the folder does not take it; nothing is left behind.
            LeaseLostError: another process has taken the row over.
        """
        path = self.row_path(row.key)
        _ready(path.parent)
        if row.picture is not None:
            _sync((self.folder / row.picture).parent)
        data, held = json.dumps(asdict(row), sort_keys=True).encode(), row.key in self.leases
        draft = temporary_beside(path)
        write_bytes(draft, data)
        try:
            self.leases.check(row.key)
            try:
                place(draft, path) if held else draft.replace(path)
            except FileExistsError:
                if (old := self.get(row.key)) is not None and old.done:
                    raise LeaseLostError(row.key) from None
                draft.replace(path)
        except OSError as error:
            raise ResourceError(f"{path} could not be written: {error.strerror or error}") from None
        finally:
            with suppress(OSError):
                draft.unlink(missing_ok=True)
        _sync(path.parent)

    def write_picture(self, path: Path, data: bytes) -> str:
        """Write a picture; its name relative to the folder.

        Raises:
            ResourceError, LeaseLostError: as for `commit`.
        """
        key = path.name[:64]
        self.leases.check(key)
        _ready(path.parent)
        write_bytes(path, data)
        if path.stem == key:
            with suppress(OSError):
                self.index.add(_picture_mark(key, sha256_of(data), os.lstat(path)))
        return path.relative_to(self.folder).as_posix()

    def check_places(self, key: str) -> None:
        """Refuse a row of which another thing has the place of a file, before it is computed; nothing is moved.

        Raises:
            PlanError: a folder lies where its row, picture or lease belongs, or something else where a folder does.
        """
        for path in (self.row_path(key), self.picture_path(key), self.leases.path(key)):
            try:
                amiss = f"{path} is a folder" if stat.S_ISDIR(os.lstat(path).st_mode) else ""
            except NotADirectoryError:
                amiss = f"{path.parent} is not a folder"
            except OSError:
                continue
            if amiss:
                raise PlanError(f"{amiss}, which no sweep makes there; move it away and run the same command again")

    def claim(
        self, key: str, *, calm: bool = False, wanted: Callable[[Row | None], bool] = lambda row: not (row and row.done)
    ) -> Claim | None:
        """Take a row: None where another process has it or it is not `wanted` as it is now.

        With `calm`, a row that a process died with is not taken either.
        """
        return self.leases.claim(key, calm=calm, wanted=lambda: wanted(self.get(key)))

    def release(self, keys: Iterable[str]) -> None:
        """Give rows back, done or not."""
        self.leases.release(keys)

    @contextmanager
    def holding(self) -> Generator[None]:
        """Whatever happens inside, leases are given back; those that the dead left beside finished rows are removed."""
        try:
            yield
        finally:
            self.leases.close()
            self.leases.tidy(lambda key: self.get(key) is not None)
            self.index.write()

    def _sweep_up(self) -> None:
        """Remove own temporary files that a killed process left, if nobody has touched them for long.

        Own ones are told by their prefix, in the folders that a sweep writes to; their age is measured by the clock of
        the file system that they lie on. Nothing else is ever removed.
        """
        with suppress(OSError):
            now = clock(self.folder)
            for place in (".", "rows/*", "pictures/*", "leases"):
                for file in self.folder.glob(f"{place}/{TEMPORARY}*"):
                    with suppress(OSError):
                        if is_old_temporary(file, now):
                            file.unlink()


def read(folder: str | Path) -> list[Row]:
    """All rows of a sweep's folder, in the order of their keys; files that are not whole are left out.

    A row whose picture has gone or changed is among them: `Store.get` tells.

    Raises:
        PlanError: there is no such folder, or it is no sweep's.
    """
    rows = check_path("the folder", folder) / "rows"
    try:
        inner = sorted(entry.path for entry in os.scandir(rows) if len(entry.name) == 2 and entry.is_dir())
        paths = [e.path for each in inner for e in sorted(os.scandir(each), key=lambda e: e.name)]
    except (FileNotFoundError, NotADirectoryError):
        raise PlanError(f"{folder} is no sweep's folder: it has no rows/") from None
    except OSError as error:
        raise ResourceError(f"{folder} cannot be read: {error.strerror or error}") from None
    found = (read_row(path) for path in paths if path.endswith(".json"))
    return [row for row in found if row is not None]


def _picture_mark(key: str, sha256: str, status: os.stat_result) -> Mark:
    return mark(f"picture {key} {sha256}", (status,))


def _table_of(kind: type) -> Callable[[object], bool]:
    return lambda value: isinstance(value, dict) and all(isinstance(v, kind) for v in cast("Any", value).values())


_MANIFEST: Mapping[str, Callable[[object], bool]] = {
    **dict.fromkeys(("negative", "model", "weights", "reference", "model_at"), lambda v: isinstance(v, str)),
    **dict.fromkeys(("prints", "versions", "own"), _table_of(str)),
    **dict.fromkeys(("chains", "measures", "used"), _table_of(list)),
    "aims": _table_of(dict),
}


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

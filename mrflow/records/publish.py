"""New files under names that nothing has: all of a set, or none."""

import errno
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from mrflow.errors import PlanError, ResourceError
from mrflow.machine.interrupts import hold_signals
from mrflow.records.files import check_replaceable, temporary_beside

NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EXDEV, errno.EINVAL)


class TakenError(PlanError):
    """A name that was free has been given to another file."""


def publish(files: Mapping[Path, bytes], *, force: bool = False) -> None:
    """Write files, whole, under names that nothing has yet; with `force` they replace what is there.

    Raises:
        TakenError: a name is taken, also by another process since it was chosen; then none of the files is there.
        ResourceError: the disk is full, or a folder takes no file.
    """
    for path in files if force else ():
        check_replaceable(path)
    with hold_signals():
        _publish(files, force=force)


def _publish(files: Mapping[Path, bytes], *, force: bool) -> None:
    drafts = {path: temporary_beside(path) for path in files}
    placed: list[Path] = []
    path = next(iter(files))
    try:
        for path, data in files.items():
            with drafts[path].open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        for path, draft in drafts.items():
            if force:
                draft.replace(path)
            else:
                place(draft, path)
                placed.append(path)
    except OSError as error:
        for own in placed:
            own.unlink(missing_ok=True)
        if isinstance(error, FileExistsError):
            raise TakenError(f"{path} exists; choose another --out, or overwrite it with --force") from None
        raise ResourceError(
            f"{path} could not be written: {error.strerror or error}; nothing was left behind"
        ) from None
    finally:
        for draft in drafts.values():
            with suppress(OSError):
                draft.unlink(missing_ok=True)


def publish_numbered(
    files: Callable[[Path], Mapping[Path, bytes]], target: Path, following: Callable[[], Path]
) -> list[Path]:
    """Write `files(target)`; where a name has been taken meanwhile, under the name that `following` finds next."""
    while True:
        named = files(target)
        try:
            publish(named)
        except TakenError:
            target = following()
        else:
            return list(named)


def place(draft: Path, path: Path) -> None:
    """Give a whole file the name `path`, which no other file has: by a link, or where there are none by claiming the
    name with an empty file first. The draft's own name may stay, for the caller to remove.

    Raises:
        FileExistsError: another file has the name, and keeps it.
    """
    try:
        os.link(draft, path)
    except (OSError, AttributeError) as error:  # not every system has links
        if isinstance(error, OSError) and error.errno not in NO_LINKS:
            raise
        path.open("xb").close()
        draft.replace(path)

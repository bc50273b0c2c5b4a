"""What a sweep's folder need not be read for again: marks of files that were found right, beside the rows.

    index.bin   16 bytes a mark, after a line that says what it is

A mark is a digest of what was found right and of the size, times, inode of each file that it was found in, so a file
that is written, replaced or copied later never has it. A time of the last change cannot be set, so marks that came with
a folder from elsewhere hold for nothing in it. The file may be removed, torn or nonsense: then the rows are read.
"""

import os
from collections.abc import Iterable
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path

from mrflow.errors import ResourceError
from mrflow.records.files import read_regular, write_bytes
from mrflow.sweep.leases import clock

HEAD, SIZE = b"mrflow index 1\n", 16
MAX_MARKS = 1 << 21  # of a million rows; as many again may be read: 64 MiB, and half a gigabyte as a set
SETTLED = 2.0  # seconds

Mark = tuple[bytes, int]  # a digest, and when the newest of the files that it is of was last changed, in ns


def mark(what: str, states: Iterable[os.stat_result]) -> Mark:
    """The mark of `what` in files that look so."""
    digest, newest = blake2b(what.encode("utf-8", "surrogatepass"), digest_size=SIZE), 0
    for s in states:
        digest.update(b"\0%d %d %d %d" % (s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino))
        newest = max(newest, s.st_mtime_ns, s.st_ctime_ns)
    return digest.digest(), newest


class Index:
    """The marks of a folder: those of its file, and those that were added since."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._path = folder, folder / "index.bin"
        self._known: set[bytes] | None = None
        self._new: dict[bytes, int] = {}

    def holds(self, one: Mark) -> bool:
        """Whether it was added, by this process or an earlier one."""
        if self._known is None:
            self._known = self._read()
        return one[0] in self._known or one[0] in self._new

    def add(self, one: Mark) -> None:
        """Add it: whoever looks next need not read those files."""
        self._new[one[0]] = one[1]

    def write(self) -> None:
        """Write down what was added here, beside what other processes wrote meanwhile, where the folder takes a file.

        What was changed a moment ago may be changed once more within one tick of the file system's clock, and is left
        for the next time.
        """
        if not self._new:
            return
        with suppress(ResourceError, OSError):
            settled = (clock(self._folder) - SETTLED) * 1e9
            new = {digest for digest, newest in self._new.items() if newest < settled}
            old = self._read()
            if not new <= old:
                kept = new | old if len(old) < MAX_MARKS else new
                write_bytes(self._path, HEAD + b"".join(sorted(kept)))
            self._known = None
            self._new = {digest: newest for digest, newest in self._new.items() if digest not in new}

    def _read(self) -> set[bytes]:
        try:
            data = read_regular(self._path, most=len(HEAD) + 2 * MAX_MARKS * SIZE)
        except (OSError, ValueError):
            return set()
        if not data.startswith(HEAD) or (len(data) - len(HEAD)) % SIZE:
            return set()
        return {data[at : at + SIZE] for at in range(len(HEAD), len(data), SIZE)}

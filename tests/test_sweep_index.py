"""The marks beside a sweep's rows: what did not change is not read again, what did is, whatever the marks say."""

import errno
import json
import os
import shutil
from pathlib import Path

import pytest

import mrflow as mf
from mrflow.records import files
from mrflow.sweep import Store, index, read, run_sweep
from mrflow.sweep.index import HEAD, Index, mark
from tests.test_reliability import one


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that a store reads; what was written a moment ago is settled at once."""
    found: list[str] = []

    def read_regular(path: str | Path, *, most: int) -> bytes:
        found.append(Path(path).name)
        return files.read_regular(path, most=most)

    monkeypatch.setattr("mrflow.sweep.rows.read_regular", read_regular)
    monkeypatch.setattr("mrflow.sweep.store.read_regular", read_regular)
    monkeypatch.setattr("mrflow.sweep.index.SETTLED", -60)
    return found


def resumed(folder: Path, reads: list[str], sweep: mf.Sweep | None = None) -> tuple[int, int, list[str]]:
    """Rows made, rows there before, and the ends of the names of what was read for it."""
    reads.clear()
    done = run_sweep(sweep or one(), mf.toy(), folder)
    assert done.left == 0
    return done.made, done.before, sorted(Path(name).suffix for name in reads if name != "sweep.json")


def test_what_was_found_right_is_not_read_again(tmp_path: Path, reads: list[str]) -> None:
    resumed(tmp_path, reads)
    assert resumed(tmp_path, reads) == (0, 2, [".json"] * 2)  # its own pictures it knows
    assert resumed(tmp_path, reads) == (0, 2, [])
    tagged = mf.Sweep(one().chains, [mf.Prompt(text, {"kind": "new"}) for text in "ab"])
    kept = (0, 2, [".json"] * 2)
    assert resumed(tmp_path, reads, tagged)[:2] == (0, 2)
    assert {row.tags["kind"] for row in read(tmp_path)} == {"new"}
    assert resumed(tmp_path, reads, tagged) == kept and resumed(tmp_path, reads, tagged) == (0, 2, [])


@pytest.mark.parametrize("harm", ["edited", "touched", "gone", "picture", "picture, its time put back", "another"])
def test_a_row_that_changed_is_read_whatever_the_index_says(tmp_path: Path, reads: list[str], harm: str) -> None:
    resumed(tmp_path, reads)
    resumed(tmp_path, reads)
    assert resumed(tmp_path, reads) == (0, 2, [])
    row = read(tmp_path)[0]
    path, picture = Store(tmp_path).row_path(row.key), tmp_path / str(row.picture)
    if harm == "edited":  # as long as before
        path.write_bytes(path.read_bytes().replace(b'"done"', b'"dome"'))
    elif harm == "touched":
        path.write_bytes(path.read_bytes())
    elif harm == "gone":
        path.unlink()
    elif harm == "another":  # written by another process
        path.write_text(json.dumps(row.__dict__ | {"chain": "other"}, default=dict))
    else:
        status, data = picture.stat(), picture.read_bytes()
        picture.write_bytes(data[:60] + bytes([data[60] ^ 1]) + data[61:])
        if "time" in harm:
            os.utime(picture, ns=(status.st_atime_ns, status.st_mtime_ns))
    made, before, names = resumed(tmp_path, reads)
    assert (made, before) == ((0, 2) if harm in ("touched", "another") else (1, 1))
    assert names.count(".json") >= (harm != "gone")
    assert {r.chain for r in read(tmp_path)} == set(one().chains)
    resumed(tmp_path, reads)
    assert resumed(tmp_path, reads) == (0, 2, [])


@pytest.mark.parametrize("data", [b"", HEAD, HEAD + b"x" * 15, b"[" * 1000, HEAD + bytes(1600), bytes(64), None])
def test_an_index_that_is_lost_nonsense_or_unwritable_costs_time_only(
    tmp_path: Path, reads: list[str], data: bytes | None
) -> None:
    for _ in range(2):
        resumed(tmp_path, reads)
    (tmp_path / "index.bin").unlink()
    if data is None:
        (tmp_path / "index.bin").mkdir()
        (tmp_path / "index.bin" / "mine").write_text("")
    else:
        (tmp_path / "index.bin").write_bytes(data)
    everything = (0, 2, [".json", ".json", ".png", ".png"])
    assert resumed(tmp_path, reads) == everything
    assert resumed(tmp_path, reads) == (everything if data is None else (0, 2, []))


@pytest.mark.parametrize("refused", ["clock", "write_bytes"])
def test_a_folder_that_takes_no_index_costs_time_only(
    tmp_path: Path, reads: list[str], refused: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where it became read-only, or its disk full, after the last row: all rows are there, and that is told."""
    resumed(tmp_path, reads)
    (tmp_path / "index.bin").unlink()

    def refuse(*_: object) -> None:
        if refused == "clock":  # it makes a file to read the time from
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(tmp_path))
        raise mf.errors.ResourceError("index.bin could not be written: No space left on device")

    everything = (0, 2, [".json", ".json", ".png", ".png"])
    with monkeypatch.context() as patched:
        patched.setattr(index, refused, refuse)
        assert resumed(tmp_path, reads) == everything == resumed(tmp_path, reads)
        assert not (tmp_path / "index.bin").exists()
    assert resumed(tmp_path, reads) == everything and resumed(tmp_path, reads) == (0, 2, [])


def test_the_index_of_a_copied_folder_holds_for_nothing(tmp_path: Path, reads: list[str]) -> None:
    for _ in range(2):
        resumed(tmp_path / "a", reads)
    shutil.copytree(tmp_path / "a", tmp_path / "b")  # with their times
    assert resumed(tmp_path / "b", reads) == (0, 2, [".json", ".json", ".png", ".png"])


def test_processes_keep_each_others_marks(tmp_path: Path, reads: list[str]) -> None:
    (tmp_path / "f").write_text("")
    status = os.lstat(tmp_path / "f")
    both = [Index(tmp_path), Index(tmp_path)]
    marks = [mark(name, [status]) for name in "ab"]
    for own, each in zip(both, marks, strict=True):
        assert not own.holds(each)
        own.add(each)
    for own in both:
        own.write()
    assert all(Index(tmp_path).holds(each) for each in marks) and not Index(tmp_path).holds(mark("c", [status]))


def test_what_changed_a_moment_ago_is_not_marked(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("")
    own = Index(tmp_path)
    own.add(new := mark("new", [os.lstat(tmp_path / "f")]))
    own.write()
    assert own.holds(new) and not Index(tmp_path).holds(new)


def test_an_index_larger_than_any_sweeps_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder from elsewhere must not fill the memory: what is beyond the bound counts as no index."""
    monkeypatch.setattr(index, "MAX_MARKS", 4)
    for marks in (8, 9):
        (tmp_path / "index.bin").write_bytes(index.HEAD + bytes(range(16 * marks)))
        assert len(index.Index(tmp_path)._read()) == (8 if marks == 8 else 0)

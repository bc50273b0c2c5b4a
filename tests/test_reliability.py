"""What a sweep does on bad days: hostile folders, dead and stopped processes, lost devices, rows that hang."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

import mrflow as mf
from mrflow.errors import DeviceLostError, MrflowError
from mrflow.models.digests import hub_digest
from mrflow.records.chains import fingerprint
from mrflow.sweep import Measured, Metric, Psnr, Sharpness, Store, leases, maker, read, run_sweep
from mrflow.sweep.failures import is_device_lost
from mrflow.sweep.leases import Claim, LeaseLostError
from mrflow.sweep.report import page
from mrflow.sweep.rows import Row, read_row
from mrflow.sweep.summary import load_rows
from mrflow.sweep.tables import write_csv
from tests.test_cli import call, here  # noqa: F401
from tests.test_sweep import SIZE, paper, small

ROOT = str(Path(__file__).parents[1])


def one(*chains: Any, **more: Any) -> mf.Sweep:
    """Chains named by number, two prompts."""
    return mf.Sweep({f"{i}": chain for i, chain in enumerate(chains or (paper(),))}, ["a", "b"], **more)


@dataclass(frozen=True)
class Acts(mf.Stage[mf.Pixels, mf.Pixels]):
    """Loses the device, or hangs, while `ACTING` holds anything."""

    what: str

    def plan(self, spec: mf.Pixels, model: mf.ModelInfo) -> mf.Pixels:
        return spec

    def apply(self, state: mf.State[mf.Pixels], out: mf.Pixels, ctx: mf.Context) -> Tensor:
        if ACTING and self.what == "lose":
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        if ACTING and self.what == "hang":
            time.sleep(600)
        return state.data


ACTING: set[str] = set()


@pytest.fixture(autouse=True)
def calm() -> Any:
    """No stage acts unless a test says so."""
    ACTING.clear()
    yield
    ACTING.clear()


# Leases


def test_a_process_that_lost_its_row_neither_writes_nor_removes(tmp_path: Path) -> None:
    """A is stopped for long; B takes over and finishes: A's picture and row are dropped, B's lease stays."""
    sweep, model = one(), mf.toy()
    a, b = Store(tmp_path), Store(tmp_path)
    a.open({"chains": {}})
    first, second = maker.Maker(sweep, model, a), maker.Maker(sweep, model, b)
    pair = sweep.pairs[0]
    key = first.key("0", pair)
    assert a.claim(key) == Claim(key)
    lease = tmp_path / "leases" / f"{key}.json"
    text = json.loads(lease.read_text().splitlines()[0])
    lease.write_text(json.dumps(text | {"host": "elsewhere", "space": "another", "boot": "another"}) + "\n")
    os.utime(lease, (time.time() - 10 * leases.STALE,) * 2)
    assert b.claim(key) == Claim(key)
    theirs = lease.read_text()
    with pytest.raises(LeaseLostError):
        a.write_picture(a.picture_path(key), b"late")
    with pytest.raises(LeaseLostError):
        a.commit(Row(key, "failed", "0", "toy", "1", "a", "", 0))
    a.release([key])
    assert lease.read_text() == theirs and not list(tmp_path.glob("rows/??/*.json"))
    b.release([key])
    with b.holding():
        assert len(second.make(sweep.pairs)) == 2
    assert not lease.exists()


def test_a_process_id_that_was_used_again_holds_nothing(tmp_path: Path) -> None:
    """A container that was restarted has the same ids: what tells them apart is when the process began."""
    store = Store(tmp_path)
    store.open({"chains": {}})
    assert store.claim("k")
    lease = tmp_path / "leases" / "k.json"
    mine = json.loads(lease.read_text())
    other = Store(tmp_path)
    assert other.claim("k") is None
    lease.write_text(json.dumps(mine | {"began": mine["began"] - 1}))
    assert other.claim("k") == Claim("k")
    other.release(["k"])
    # Two containers of one name: what cannot be seen from here is judged by its heartbeat alone.
    lease.write_text(json.dumps(mine | {"space": "of another container", "pid": 2**22 + 7}))
    assert other.claim("k") is None


def test_leases_exclude_where_there_are_no_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: object, **__: object) -> None:
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", none)
    a, b = Store(tmp_path), Store(tmp_path)
    a.open({"chains": {}})
    assert a.claim("k") and b.claim("k") is None
    a.release(["k"])
    assert b.claim("k")
    b.release(["k"])
    assert run_sweep(one(), mf.toy(), tmp_path / "s").made == 2


def test_a_dead_lease_beside_a_finished_row_is_removed(tmp_path: Path) -> None:
    run_sweep(one(), mf.toy(), tmp_path)
    key = read(tmp_path)[0].key
    dead = {"token": "t", "boot": leases.boot(), "space": leases._space(), "pid": 2**22 + 7, "doing": "alone"}
    (tmp_path / "leases" / f"{key}.json").write_text(json.dumps(dead))
    alive = {"token": "t", "host": "elsewhere", "boot": "x", "pid": 1}
    (tmp_path / "leases" / f"{read(tmp_path)[1].key}.json").write_text(json.dumps(alive))
    run_sweep(one(), mf.toy(), tmp_path)
    assert [p.stem for p in (tmp_path / "leases").iterdir()] == [read(tmp_path)[1].key]


@pytest.mark.parametrize(("ahead", "free"), [(-3600, True), (-30, False), (30, False), (3600, True), (1e9, True)])
@pytest.mark.parametrize(
    "text", ["", "[]", '{"token": 3, "pid": "x"}', '{"token": "t", "host": "elsewhere", "pid": 1}']
)
def test_a_lease_that_nobody_beats_now_is_dead(tmp_path: Path, ahead: float, free: bool, text: str) -> None:
    store = Store(tmp_path)
    store.open({"chains": {}})
    lease = tmp_path / "leases" / "k.json"
    lease.write_text(text)
    os.utime(lease, (time.time() + ahead,) * 2)
    assert (store.claim("k") is not None) == free
    store.release(["k"])


@pytest.mark.parametrize(("doing", "deaths"), [(None, 0), ("together", 0), ("alone", 1)])
def test_only_the_row_that_was_computed_alone_is_blamed(tmp_path: Path, doing: str | None, deaths: int) -> None:
    store = Store(tmp_path)
    store.open({"chains": {}})
    dead = {"token": "t", "boot": leases.boot(), "space": leases._space(), "pid": 2**22 + 7}
    (tmp_path / "leases" / "k.json").write_text(json.dumps(dead | ({"doing": doing} if doing else {})))
    assert store.claim("k") == Claim("k", tries=int(doing is not None), deaths=deaths)


def test_what_death_left_behind_is_tried_again_and_what_failed_by_itself_is_not(tmp_path: Path) -> None:
    sweep, model = one(), mf.toy()
    run_sweep(sweep, model, tmp_path)
    a, b = read(tmp_path)
    store = Store(tmp_path)
    for row, cause in ((a, "death"), (b, "error")):
        failed = row.__dict__ | {"status": "failed", "cause": cause, "error": "x", "picture": None}
        store.row_path(row.key).write_text(json.dumps(failed, default=dict))
    done = run_sweep(sweep, model, tmp_path)
    assert (done.made, done.before, done.failed) == (1, 1, 0)
    assert {r.key: r.done for r in read(tmp_path)} == {a.key: True, b.key: False}


def test_rows_that_others_hold_end_it_with_75(here: Path) -> None:  # noqa: F811
    Path("s.py").write_text(
        "import mrflow as mf\n"
        "sweep = mf.Sweep({'n': mf.recipes.native(size=(64, 64), steps=1)}, ['a big red circle at the left'])\n"
    )
    assert call("sweep", "s.py")[0] == 0
    (row,) = read("s-sweep")
    Store("s-sweep").row_path(row.key).unlink()
    lease = Path("s-sweep/leases") / f"{row.key}.json"
    lease.write_text(json.dumps({"token": "t", "host": "elsewhere", "boot": "x", "pid": 1}))
    code, _, err = call("sweep", "s.py")
    assert code == 75 and "0 rows made" in err and "run the same command again" in err and lease.exists()
    lease.unlink()
    assert call("sweep", "s.py")[0] == 0


# What counts as done


@pytest.mark.parametrize("harm", ["gone", "cut", "flipped", "link"])
def test_a_row_counts_only_while_its_picture_is_whole(tmp_path: Path, harm: str) -> None:
    sweep, model = one(), mf.toy()
    run_sweep(sweep, model, tmp_path)
    row = read(tmp_path)[0]
    picture = tmp_path / str(row.picture)
    data = picture.read_bytes()
    if harm == "gone":
        picture.unlink()
    elif harm == "cut":
        picture.write_bytes(data[:-20])
    elif harm == "flipped":
        picture.write_bytes(data[:60] + bytes([data[60] ^ 1]) + data[61:])
    else:
        (tmp_path / "elsewhere").write_bytes(data)
        picture.unlink()
        picture.symlink_to(tmp_path / "elsewhere")
    done = run_sweep(sweep, model, tmp_path)
    assert (done.made, done.before, done.left) == (1, 1, 0)
    assert len(picture.read_bytes()) > 100 and not picture.is_symlink()
    assert run_sweep(sweep, model, tmp_path).made == 0


# Devices, metrics, time


def test_a_lost_device_stops_it_and_writes_nothing_off(tmp_path: Path) -> None:
    sweep = one(paper() >> Acts("lose"))
    ACTING.add("a")
    with pytest.raises(DeviceLostError, match="illegal memory access") as caught:
        run_sweep(sweep, mf.toy(), tmp_path)
    assert caught.value.exit_code == 75 and read(tmp_path) == []
    ACTING.clear()
    done = run_sweep(sweep, mf.toy(), tmp_path)
    assert (done.made, done.left) == (2, 0) and not list((tmp_path / "leases").iterdir())


def test_which_errors_say_that_a_device_is_lost() -> None:
    lost = RuntimeError("CUDA error: device-side assert triggered")
    behind = ValueError("stage 3 failed")
    behind.__cause__ = lost
    assert is_device_lost(lost) and is_device_lost(behind)
    assert not is_device_lost(RuntimeError("CUDA error: out of memory"))
    assert not is_device_lost(ValueError("the prompt says: cuda error: x"))


@dataclass(frozen=True)
class Picky(Metric):
    """Fails for one prompt."""

    def __call__(self, made: Measured) -> Mapping[str, float]:
        if made.prompt in ACTING:
            raise ValueError("cannot measure this")
        return {"picky": 1.0}


def test_a_metric_that_fails_costs_its_own_number_only(tmp_path: Path) -> None:
    sweep = one(metrics=[Picky(), Sharpness()])
    ACTING.add("a")
    done = run_sweep(sweep, mf.toy(), tmp_path)
    assert (done.made, done.failed, done.unmeasured) == (2, 0, 1) and "cannot measure this" in done.errors[0]
    rows = {r.prompt: r for r in read(tmp_path)}
    assert set(rows["a"].metrics) == {"sharpness"} and set(rows["b"].metrics) == {"sharpness", "picky"}
    assert "cannot measure this" in rows["a"].unmeasured["Picky()"]
    again = run_sweep(sweep, mf.toy(), tmp_path)
    assert (again.made, again.unmeasured) == (0, 1) and "cannot measure this" in again.errors[
        0
    ]  # said as long as it is so
    ACTING.clear()
    again = run_sweep(sweep, mf.toy(), tmp_path)
    assert (again.made, again.unmeasured) == (0, 0)  # it is measured, not drawn
    assert all(set(r.metrics) == {"sharpness", "picky"} and not r.unmeasured for r in read(tmp_path))


@dataclass(frozen=True)
class Slow(Metric):
    """Hangs for one prompt, and may answer to nothing, as a library would."""

    deaf: bool = False

    def __call__(self, made: Measured) -> Mapping[str, float]:
        while made.prompt in ACTING and self.deaf:
            with suppress(BaseException):
                time.sleep(600)
        if made.prompt in ACTING:
            time.sleep(20)
        return {"slow": 1.0}


@pytest.mark.parametrize("drawn", [False, True])
def test_a_metric_that_hangs_costs_its_own_number_only(tmp_path: Path, drawn: bool) -> None:
    """Of rows that are being made, and of those that were made before it was asked for."""
    sweep = one(metrics=[Sharpness(), Slow(), Picky()])
    if drawn:
        run_sweep(one(metrics=[Sharpness()]), mf.toy(), tmp_path)
    ACTING.update("ab")
    done = run_sweep(sweep, mf.toy(), tmp_path, row_timeout=0.5)
    assert (done.made, done.before, done.failed, done.unmeasured) == ((0, 2, 0, 2) if drawn else (2, 0, 0, 2))
    rows = read(tmp_path)
    assert all(set(r.metrics) == {"sharpness"} and set(r.unmeasured) == {"Slow(deaf=False)", "Picky()"} for r in rows)
    assert all("longer than 0.5 s (--row-timeout)" in r.unmeasured["Slow(deaf=False)"] for r in rows)
    ACTING.clear()
    assert run_sweep(sweep, mf.toy(), tmp_path).unmeasured == 0


DEAF = """
import sys
sys.path.insert(0, {root!r})
import mrflow as mf
from mrflow.sweep import Sharpness, run_sweep
from tests.test_reliability import ACTING, Slow, one
ACTING.add("a")
sweep = one(metrics=[Slow(True), Sharpness()])
done = run_sweep(sweep, mf.toy(), {folder!r}, row_timeout=0.5, retry=bool(sys.argv[1:]))
print(done.made, done.before, done.failed, done.left, done.unmeasured)
"""


@pytest.mark.parametrize("drawn", [False, True])
def test_a_metric_that_cannot_be_interrupted_ends_the_process_once(tmp_path: Path, drawn: bool) -> None:
    """The next run leaves it, and says so; --retry asks it again."""
    folder = tmp_path / "s"
    if drawn:
        run_sweep(one(metrics=[Sharpness()]), mf.toy(), folder)

    def go(*more: str) -> "subprocess.CompletedProcess[str]":
        code = DEAF.format(root=ROOT, folder=str(folder))
        return subprocess.run(
            [sys.executable, "-c", code, *more], capture_output=True, text=True, timeout=120, check=False
        )

    first = go()
    assert first.returncode == 75 and "cannot be interrupted" in first.stderr
    then = go()
    assert then.returncode == 0, then.stderr
    assert then.stdout.split() == (["0", "2", "0", "0", "1"] if drawn else ["1", "1", "0", "0", "1"])
    rows = {r.prompt: r for r in read(folder)}
    assert rows["a"].unmeasured["Slow(deaf=True)"].startswith(maker.HUNG) and "sharpness" in rows["b"].metrics
    assert not rows["b"].unmeasured and not list((folder / "leases").glob("*.json"))
    assert go("retry").returncode == 75
    done = run_sweep(one(metrics=[Slow(True), Sharpness()]), mf.toy(), folder, retry=True)
    assert (done.made, done.unmeasured) == (0, 0)


@dataclass(frozen=True)
class Endless(Metric):
    """Gives numbers that no row holds, or more than a row holds."""

    count: int

    def __call__(self, made: Measured) -> Mapping[str, float]:
        return {f"m{n}": 1.0 if n else 1e200 for n in range(self.count)}


def test_numbers_that_no_row_holds_are_left_out_and_rows_are_read_again(tmp_path: Path) -> None:
    done = run_sweep(one(metrics=[Endless(2), Sharpness()]), mf.toy(), tmp_path / "a")
    assert (done.made, done.unmeasured) == (2, 0)
    assert all(set(r.metrics) == {"m1", "sharpness"} for r in read(tmp_path / "a"))
    done = run_sweep(one(metrics=[Endless(300), Sharpness()]), mf.toy(), tmp_path / "b")
    assert (done.made, done.unmeasured) == (2, 2) and "299 numbers a picture, 256 at most" in done.errors[0]
    assert all(set(r.metrics) == {"sharpness"} for r in read(tmp_path / "b"))


@pytest.mark.parametrize("what", ["metrics", "tags"])
def test_rows_with_endless_tables_are_no_rows(tmp_path: Path, what: str) -> None:
    run_sweep(one(), mf.toy(), tmp_path)
    path = min(tmp_path.glob("rows/??/*.json"))
    table = {f"m{n}": 1.0 if what == "metrics" else "x" for n in range(20_000)}
    path.write_text(json.dumps(json.loads(path.read_text()) | {what: table}))
    assert read_row(path) is None and page(tmp_path)


@pytest.mark.parametrize("room", ["rows", "pictures", "leases"])
def test_nothing_is_written_through_a_link_out_of_the_folder(tmp_path: Path, room: str) -> None:
    run_sweep(one(), mf.toy(), tmp_path / "s")
    (tmp_path / "s" / room).rename(tmp_path / "elsewhere")
    (tmp_path / "s" / room).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(mf.PlanError, match=f"{room} is a link that leads out of the folder"):
        run_sweep(one(), mf.toy(), tmp_path / "s")
    (tmp_path / "whole").symlink_to(tmp_path / "t")
    (tmp_path / "t").mkdir()
    assert run_sweep(one(), mf.toy(), tmp_path / "whole").made == 2


def test_a_picture_that_is_too_large_costs_its_own_numbers_only(tmp_path: Path) -> None:
    """Of a folder that somebody sent: a picture of 400 million pixels in a file of 50 KB."""
    run_sweep(one(), mf.toy(), tmp_path)
    path = min(tmp_path.glob("rows/??/*.json"))
    row = json.loads(path.read_text())
    Image.new("1", (20_000, 20_000)).save(tmp_path / row["picture"])
    bomb = (tmp_path / row["picture"]).read_bytes()
    path.write_text(json.dumps(row | {"picture_bytes": len(bomb), "picture_sha256": hashlib.sha256(bomb).hexdigest()}))
    done = run_sweep(one(metrics=[Sharpness()]), mf.toy(), tmp_path)
    assert done.made == 0
    rows = {r.prompt: r for r in read(tmp_path)}
    other = next(r for name, r in rows.items() if name != row["prompt"])
    assert "more than 67 million" in rows[row["prompt"]].unmeasured["Sharpness()"]
    assert set(other.metrics) == {"sharpness"}


def test_a_row_waits_for_its_reference(tmp_path: Path) -> None:
    """Made before the reference is there, it gets the numbers that need it afterwards."""
    sweep = one(mf.recipes.native(size=SIZE, steps=2), paper(), metrics=[Psnr()])
    store = Store(tmp_path)
    store.open({"chains": {}})
    drawn = maker.Maker(sweep, mf.toy(), store)
    drawn.labels = ["1"]
    with store.holding():
        assert [r.metrics for r in drawn.make(sweep.pairs)] == [{}, {}]
    run_sweep(sweep, mf.toy(), tmp_path)
    assert all(("psnr" in r.metrics) == (r.chain == "1") for r in read(tmp_path))


def test_a_row_that_hangs_is_ended_and_the_others_go_on(tmp_path: Path) -> None:
    sweep = mf.Sweep({"ok": paper(), "hangs": paper() >> Acts("hang")}, ["a"])
    ACTING.add("a")
    done = run_sweep(sweep, mf.toy(), tmp_path, row_timeout=1.0)
    assert (done.made, done.failed, done.left) == (1, 1, 0) and "longer than 1 s (--row-timeout)" in done.errors[0]
    assert next(r for r in read(tmp_path) if not r.done).cause == "timeout"


HANGS = """
import sys, time
sys.path.insert(0, {root!r})
import mrflow as mf
from mrflow.sweep import limits, maker, run_sweep
from tests.test_reliability import one
def stuck(*_, **__):
    while True:  # as a library would that answers to nothing
        try:
            time.sleep(600)
        except BaseException:
            pass
maker.run = stuck
maker.warm_up = lambda *_: None
run_sweep(one(), mf.toy(), {folder!r}, batch=1, row_timeout=0.5)
"""


def test_what_cannot_be_interrupted_ends_with_its_process(tmp_path: Path) -> None:
    code = HANGS.format(root=ROOT, folder=str(tmp_path / "s"))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 75 and "cannot be interrupted" in done.stderr
    (row,) = read(tmp_path / "s")
    assert row.cause == "timeout" and not list((tmp_path / "s" / "leases").glob("*.json"))


WARM = """
import sys, time
sys.path.insert(0, {root!r})
import mrflow as mf
from mrflow.sweep import maker, run_sweep
from tests.test_reliability import one
def stuck(*_, **__):
    while True:
        try:
            time.sleep(600)
        except BaseException:
            pass
maker.warm_up = stuck
done = run_sweep(one(), mf.toy(), {folder!r}, batch=2, row_timeout=0.3)
print(done.made, done.failed, done.left, done.stayed)
"""


def test_rows_that_hang_in_their_warm_up_are_made_alone_and_written_off(tmp_path: Path) -> None:
    """Both rows hang together, then each alone; the fourth run has nothing left to do."""
    code, ended = WARM.format(root=ROOT, folder=str(tmp_path / "s")), list[int]()
    for _ in range(4):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
        ended.append(done.returncode)
    assert ended == [75, 75, 75, 0] and done.stdout.split() == ["0", "0", "0", "2"]
    assert [row.cause for row in read(tmp_path / "s")] == ["timeout", "timeout"]


TWICE = """
import sys, time
from mrflow.cli.sweeps import stopping
with stopping() as (stop, code):
    print("ready", flush=True)
    stop.wait()
    print("asked", flush=True)
    while True:
        try:
            time.sleep(600)
        except BaseException:
            pass
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_second_signal_ends_it_at_once(number: signal.Signals) -> None:
    pipe = subprocess.PIPE
    env = {**os.environ, "PYTHONPATH": ROOT}
    worker = subprocess.Popen([sys.executable, "-c", TWICE], stdout=pipe, stderr=pipe, text=True, env=env)
    assert worker.stdout is not None and worker.stdout.readline() == "ready\n"
    worker.send_signal(number)
    assert worker.stdout.readline() == "asked\n"
    worker.send_signal(number)
    worker.communicate(timeout=60)
    assert worker.returncode == 128 + number


# Stages of users


STAGE = """
import mrflow as mf
from dataclasses import dataclass, replace
from beside import tint
STRENGTH = {k}
class Base(mf.Stage[mf.Pixels, mf.Pixels]):
    def plan(self, spec, model): return spec
    def amount(self): return {b}
@dataclass(frozen=True)
class Mine(Base):
    def apply(self, state, out, ctx): return tint(state.data) * self.amount() * STRENGTH
"""


def test_the_whole_file_of_a_users_stage_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A helper, a constant, a base class, a file beside it: each makes another fingerprint; the same text the same."""
    from mrflow.cli.parsing import load_file

    def mark(k: float = 1.0, b: float = 1.0, f: float = 1.0) -> str:
        (tmp_path / "beside.py").write_text(f"def tint(x): return x * {f}\n")
        (tmp_path / "mine_too.py").write_text(STAGE.format(k=k, b=b))
        sys.modules.pop("beside", None)
        return fingerprint(load_file(tmp_path / "mine_too.py")["Mine"]())  # type: ignore[operator]

    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    marks = [mark(), mark(k=0.51), mark(b=0.511), mark(f=0.5111)]
    assert len({*marks}) == 4 and mark() == marks[0]
    sys.modules.pop("beside", None)


# Weights


def test_a_flipped_bit_of_a_model_is_seen_and_named(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """Read once, remembered; later the same size and time with other bytes is damage, and another time a change."""
    monkeypatch.setenv("MRFLOW_CACHE", str(here / "cache"))
    path = here / "m.safetensors"
    save_file({"one": torch.zeros(8), "two": torch.ones(8)}, path)
    code, out, _ = call("inspect", "--verify", str(path))
    assert code == 0 and "now remembered" in out
    assert "as when it was read last" in call("inspect", "--verify", str(path))[1]
    before, raw = path.stat(), bytearray(path.read_bytes())
    raw[-5] ^= 1
    with path.open("r+b") as file:
        file.write(raw)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    code, _, err = call("inspect", "--verify", str(path))
    assert code == 3 and "is damaged" in err and "tensors: two;" in err
    os.utime(path)
    assert call("inspect", "--verify", str(path))[0] == 0
    blob = here / "blobs" / ("0" * 64)
    blob.parent.mkdir()
    blob.write_bytes(b"x")
    (here / "link.json").symlink_to(blob)
    assert hub_digest(here / "link.json") == "0" * 64
    code, _, err = call("inspect", "--verify", str(here / "link.json"))
    assert code == 3 and "the hub's is 0000" in err


def test_a_sweep_knows_its_model_by_every_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MRFLOW_CACHE", str(tmp_path / "cache"))
    model = mf.toy()
    file = tmp_path / "weights.safetensors"
    file.write_bytes(bytes(10_000))
    info = replace(model.info, files=(str(file),))
    monkeypatch.setattr(type(model), "info", property(lambda _: info))
    assert run_sweep(one(), model, tmp_path / "s").made == 2
    assert run_sweep(one(), model, tmp_path / "s").made == 0
    reads: list[Path] = []
    monkeypatch.setattr("mrflow.models.digests._scan", lambda path: reads.append(path))
    assert run_sweep(one(), model, tmp_path / "s").made == 0 and not reads  # remembered
    monkeypatch.undo()
    monkeypatch.setenv("MRFLOW_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(type(model), "info", property(lambda _: info))
    file.write_bytes(bytes(9_999) + b"x")
    assert run_sweep(one(), model, tmp_path / "s").made == 2


# Folders from elsewhere


@pytest.fixture(scope="module")
def sent(tmp_path_factory: Any) -> Path:
    """A folder that somebody sends."""
    folder: Path = tmp_path_factory.mktemp("sent")
    run_sweep(small(metrics=(Sharpness(),)), mf.toy(), folder)
    return folder


SECRET = b"\x89PNG\r\n\x1a\nTOP-SECRET"
EVIL: dict[str, Any] = {
    "seconds": ["x", None, float("nan"), float("inf"), 1e300, -1, True],
    "metrics": [{"m": float("nan")}, {"m": "x"}, [1]],
    "tags": [["a"], None, {"a": [1]}], "seed": ["x", [1], 2**80, -1], "prompt": [None, [1]], "chain": [None, [1]],
    "stages": [[1], [{}], 3], "stage_pictures": [[1], [["x", "/etc/hostname"]]], "status": [[], "great"],
    "picture": [5, [1], "pictures", "a\0b", "pictures/ab/" + "a" * 5000, "../secret.png", "/etc/hostname", ""],
    "versions": [[1]], "error": [{"a": 1}], "weights": [3], "nfe": [[1], 2**80], "format": [99], "peak_bytes": ["x"],
}  # fmt: skip


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in EVIL.items() for value in values])
def test_a_row_that_no_sweep_writes_is_no_row(sent: Path, tmp_path: Path, name: str, value: object) -> None:
    path = next(sent.glob("rows/??/*.json"))
    whole = read_row(path)
    assert whole is not None
    bad = tmp_path / path.name
    bad.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))
    assert read_row(bad) is None
    bad.write_text(path.read_text())
    assert read_row(bad) == whole


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"a":' * 100_000, "9" * 5000, "\x00", "", "null", '{"key": 1}', "[1e999]"]
)
def test_files_that_are_no_rows(tmp_path: Path, text: str) -> None:
    (tmp_path / "k.json").write_text(text)
    assert read_row(tmp_path / "k.json") is None
    (tmp_path / "link.json").symlink_to("/dev/zero")
    (tmp_path / "folder.json").mkdir()
    os.mkfifo(tmp_path / "pipe.json")
    assert [read_row(tmp_path / f"{name}.json") for name in ("link", "folder", "pipe", "none")] == [None] * 4


@settings(max_examples=40)
@given(data=st.data())
def test_no_change_of_a_folder_ends_in_a_traceback_or_a_leak(
    sent: Path, tmp_path_factory: Any, data: st.DataObject
) -> None:
    """Bytes of rows, manifest and pictures are changed, fields swapped for nonsense, links laid to a secret."""
    import shutil

    folder = tmp_path_factory.mktemp("mutated") / "s"
    shutil.copytree(sent, folder)
    secret = folder.parent / "secret.png"
    secret.write_bytes(SECRET)
    rows = sorted(folder.glob("rows/??/*.json"))
    for _ in range(3):
        path = data.draw(st.sampled_from([*rows, folder / "sweep.json", *sorted(folder.glob("pictures/??/*.png"))]))
        if not path.is_file() or path.is_symlink():
            continue
        raw = bytearray(path.read_bytes())
        kind = data.draw(st.sampled_from(["flip", "cut", "link", "field", "value"]))
        if kind == "flip" and raw:
            raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
            path.write_bytes(raw)
        elif kind == "cut":
            path.write_bytes(raw[: data.draw(st.integers(0, len(raw)))])
        elif kind == "link":
            path.unlink()
            path.symlink_to(secret)
        elif path.suffix == ".json":
            try:
                table = json.loads(raw)
                name = data.draw(st.sampled_from(sorted(table)))
            except (ValueError, TypeError):
                continue
            nonsense = st.recursive(
                st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["../secret.png", "\ud800"]),
                lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
                max_leaves=4,
            )  # fmt: skip
            table.pop(name) if kind == "field" else table.update({name: data.draw(nonsense)})
            path.write_text(json.dumps(table))
    try:
        html = page(folder)
        found, _ = load_rows(folder)
        write_csv(found, folder / "rows.csv")
    except MrflowError:
        return
    assert "TOP-SECRET" not in html and "VE9QLVNFQ1JFVA" not in html and "UT1AtU0VDUkVU" not in html

"""Sweeps: keys, resuming after any death, two processes in one folder, metrics, what is refused."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import mrflow as mf
from experiments.bench import sweeps as bench
from mrflow.records import pictures as io
from mrflow.records.files import TEMPORARY
from mrflow.records.pictures import read_record
from mrflow.sweep import (
    Measured,
    PowerRatios,
    Psnr,
    RoundTrip,
    Row,
    SceneScore,
    Sharpness,
    Ssim,
    Store,
    Stray,
    leases,
    local,
    maker,
    read,
    run_sweep,
    seed_of,
)
from mrflow.sweep.leases import Claim
from mrflow.sweep.maker import Maker
from mrflow.sweep.report import page
from tests.test_cli import call, here  # noqa: F401

LOW, SIZE = (16, 16), (32, 32)


def paper(sigma: float = 0.12, steps: int = 2) -> Any:
    """A staged chain for the toy."""
    return mf.recipes.paper(low=LOW, size=SIZE, steps=steps, sigma=sigma)


def small(**more: Any) -> mf.Sweep:
    """Two chains, three prompts, two draws of each."""
    chains = {"native": mf.recipes.native(size=SIZE, steps=4), "staged": paper()}
    settings: dict[str, Any] = {"seeds": (0, 1), "metrics": (Psnr(), Ssim(), PowerRatios(2), Sharpness(), RoundTrip())}
    return mf.Sweep(chains, [mf.Prompt("a", {"kind": "x"}), mf.Prompt("b", {"kind": "y"}), "c"], **(settings | more))


def facts(rows: list[Row]) -> dict[str, Any]:
    """What of rows must not depend on when and how they were made."""
    return {
        r.key: (r.chain, r.prompt, r.draw, r.status, r.nfe, r.flops, dict(r.metrics), r.picture, dict(r.tags))
        for r in rows
    }


def pictures(folder: Path) -> dict[str, bytes]:
    """Pixels of every picture."""
    return {p.name: io.read_image(p).numpy().tobytes() for p in sorted((folder / "pictures").rglob("*.png"))}


def test_every_row_is_made_once_with_its_picture(tmp_path: Path) -> None:
    sweep = small()
    done = run_sweep(sweep, mf.toy(), tmp_path)
    assert (done.made, done.before, done.failed, done.left) == (12, 0, 0, 0)
    rows = read(tmp_path)
    assert len(rows) == len({r.key for r in rows}) == sweep.rows == 12
    assert {(r.chain, r.prompt, r.draw) for r in rows} == {
        (c, p, s) for c in ("native", "staged") for p in "abc" for s in (0, 1)
    }
    for row in rows:
        assert row.done and row.picture is not None and row.tries == 1 and row.seconds > 0 and row.device == "cpu"
        assert row.tags == {"a": {"kind": "x"}, "b": {"kind": "y"}, "c": {}}[row.prompt]
        record = read_record(tmp_path / row.picture)
        assert (record["prompt"], record["seed"]) == (row.prompt, seed_of(row.prompt, row.draw))
        assert row.seed == record["seed"]
        want = {"sharpness", "round_trip"} | (
            {"psnr", "ssim", "spectrum.1", "spectrum.2"} if row.chain == "staged" else set()
        )
        assert set(row.metrics) == want
        assert [s["name"] for s in row.stages][-1] == "Decode" and row.nfe == sum(s["nfe"] for s in row.stages)
    again = run_sweep(sweep, mf.toy(), tmp_path)
    assert (again.made, again.before) == (0, 12)
    picture = next(r for r in rows if r.chain == "staged")
    replayed = mf.replay(tmp_path / str(picture.picture), model=mf.toy())
    assert float((replayed.pixels - io.read_image(tmp_path / str(picture.picture))).abs().max()) <= 1.01 / 255
    assert not list((tmp_path / "leases").iterdir())


@given(st.text(max_size=9), st.integers(0, 2**40))
def test_a_seed_is_that_of_its_prompt_and_draw(prompt: str, draw: int) -> None:
    seed = seed_of(prompt, draw)
    assert 0 <= seed < 2**32 and seed == seed_of(prompt, draw)
    assert seed not in (seed_of(prompt, draw + 1), seed_of(f"{prompt} ", draw), seed_of(f"{draw}{prompt}", 0))


def test_seeds_are_the_same_on_every_machine_and_spread_evenly() -> None:
    assert (seed_of("a cat", 0), seed_of("a cat", 1)) == (3345321639, 508407531)  # sha256sum of ["a cat", 0], 8 digits
    seeds = [seed_of(f"caption {i}", draw) for i in range(2000) for draw in range(2)]
    assert len(set(seeds)) == len(seeds)
    assert all(0.47 < sum(s >> bit & 1 for s in seeds) / len(seeds) < 0.53 for bit in range(32))
    for bad in (-1, True, 0.5):
        with pytest.raises(mf.PlanError, match="whole number"):
            seed_of("a", bad)  # type: ignore[arg-type]  # pyright: ignore


def test_prompts_do_not_share_their_noise_and_chains_do(tmp_path: Path) -> None:
    """Starting noise, read at the model: one tensor for each prompt and draw, the same for all chains."""
    model, begun = mf.toy(), list[bytes]()
    field = model.field

    def watched(cond: Any, options: mf.FieldOptions = mf.FieldOptions()) -> Any:
        inner = field(cond, options)

        def velocity(x: Tensor, sigma: float) -> Tensor:
            begun.extend(item.numpy().tobytes() for item in x if sigma == 1)
            return inner(x, sigma)

        return velocity

    model.field = watched  # type: ignore[method-assign]
    chains = {"a": mf.recipes.native(size=SIZE, steps=1), "b": mf.recipes.native(size=SIZE, steps=2)}
    sweep = mf.Sweep(chains, ["p", "q", "r"], seeds=(0, 1))
    run_sweep(sweep, model, tmp_path, batch=1)
    drawn = Counter(begun)
    assert sorted(drawn.values()) == [1, *[2] * 6]  # the one is that of warming up
    row = next(r for r in read(tmp_path) if (r.chain, r.prompt, r.draw) == ("b", "q", 1))
    again = mf.run(chains["b"], mf.toy(), "q", seed=row.seed)
    assert float((again.pixels - io.read_image(tmp_path / str(row.picture))).abs().max()) <= 1.01 / 255


@given(count=st.integers(1, 5), batch=st.integers(1, 5))
def test_shards_and_batches_do_not_change_rows(tmp_path_factory: Any, count: int, batch: int) -> None:
    """Every row is in exactly one shard; metrics and pictures are those of one process that makes all."""
    sweep = small(seeds=(0,), metrics=(Psnr(),))
    whole, parts = tmp_path_factory.mktemp("whole"), tmp_path_factory.mktemp("parts")
    run_sweep(sweep, mf.toy(), whole, batch=3)
    made = [run_sweep(sweep, mf.toy(), parts, batch=batch, shard=(i, count)).made for i in range(count)]
    assert sum(made) == 6
    a, b = facts(read(whole)), facts(read(parts))
    assert set(a) == set(b)
    for key in a:
        assert a[key][:6] == b[key][:6]
        assert a[key][6].keys() == b[key][6].keys()
        for name in a[key][6]:
            assert b[key][6][name] == pytest.approx(a[key][6][name], rel=1e-2)


def test_a_shared_stage_is_paid_once(tmp_path: Path) -> None:
    """Eight sigmas: forwards counted at the model; at most half of what eight separate runs take."""
    model, calls = mf.toy(), [0]
    field = model.field

    def counted(cond: Any, options: mf.FieldOptions = mf.FieldOptions()) -> Any:
        inner = field(cond, options)

        def velocity(x: Tensor, sigma: float) -> Tensor:
            calls[0] += 1
            return inner(x, sigma)

        return velocity

    model.field = counted  # type: ignore[method-assign]
    chains = {f"{s}": paper(s / 100, steps=12) for s in range(4, 20, 2)}
    sweep = mf.Sweep(chains, ["a", "b"])
    run_sweep(sweep, model, tmp_path, batch=2)
    alone = sum(mf.plan(c, model.info).nfe for c in chains.values())
    warm = 3  # two steps and one, once, for all of them have the same shapes
    assert calls[0] == 12 + 8 + warm <= alone / 2
    rows = read(tmp_path)
    assert all(r.nfe == 13 for r in rows)
    sampled = {tuple(r.stages[0]["seconds"] for r in rows if r.prompt == p) for p in "ab"}
    assert all(len(set(times)) == 1 and times[0] > 0 for times in sampled)  # the time of the one that was made


def test_keys_change_with_what_they_depend_on(tmp_path: Path) -> None:
    """Another sigma, prompt, seed, negative prompt or model version makes new rows and leaves the old ones."""
    base = {"chains": {"s": paper()}, "prompts": ["a"], "seeds": (0,)}
    run_sweep(mf.Sweep(**base), mf.toy(), tmp_path)  # type: ignore[arg-type]
    for number, change in enumerate(
        ({"chains": {"s": paper(0.2)}}, {"prompts": ["b"]}, {"seeds": (1,)}, {"negative": "no"}), 2
    ):
        assert run_sweep(mf.Sweep(**(base | change)), mf.toy(), tmp_path).made == 1  # type: ignore[arg-type]
        assert len(read(tmp_path)) == number
    assert run_sweep(mf.Sweep(**base), mf.toy(), tmp_path).made == 0  # type: ignore[arg-type]


def test_labels_tags_and_metrics_are_brought_up_to_date_without_drawing(tmp_path: Path) -> None:
    chains = {"native": mf.recipes.native(size=SIZE, steps=4), "old name": paper()}
    run_sweep(mf.Sweep(chains, ["a"]), mf.toy(), tmp_path)
    before = pictures(tmp_path)
    chains = {"native": chains["native"], "new name": paper()}
    sweep = mf.Sweep(chains, [mf.Prompt("a", {"kind": "x"})], metrics=[Psnr(), Sharpness(), RoundTrip()])
    assert run_sweep(sweep, mf.toy(), tmp_path).made == 0
    rows = {r.chain: r for r in read(tmp_path)}
    assert set(rows) == {"native", "new name"} and all(r.tags == {"kind": "x"} for r in rows.values())
    assert set(rows["new name"].metrics) == {"psnr", "sharpness"} and set(rows["native"].metrics) == {"sharpness"}
    fresh = tmp_path / "fresh"
    run_sweep(sweep, mf.toy(), fresh)
    for row in read(fresh):
        for name, value in rows[row.chain].metrics.items():
            assert row.metrics[name] == value
    assert pictures(tmp_path) == before


SCRIPT = """
import sys, time
sys.path.insert(0, {root!r})
import mrflow as mf
from mrflow.sweep import leases, maker, run_sweep
from tests.test_sweep import small
leases.BEAT = 0.2
make = maker.Maker._make_group
def slow(self, label, group):
    time.sleep({pause})
    return make(self, label, group)
maker.Maker._make_group = slow
print("begun", flush=True)
sys.stdin.readline()
done = run_sweep(small(), mf.toy(), {folder!r}, batch=2)
print(done.made, flush=True)
"""


def process(folder: Path, *, pause: float = 0.0) -> "subprocess.Popen[str]":
    """A sweep in a process of its own, which says "begun" and waits for a line before it starts."""
    root = str(Path(__file__).parents[1])
    code = SCRIPT.format(root=root, folder=str(folder), pause=pause)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, "-c", code], stdin=pipe, stdout=pipe, text=True, env=environment)


def begin(*workers: "subprocess.Popen[str]") -> None:
    """Let them all go once the last of them is ready."""
    for worker in workers:
        assert worker.stdout is not None and worker.stdout.readline() == "begun\n"
    for worker in workers:
        assert worker.stdin is not None
        worker.stdin.write("\n")
        worker.stdin.flush()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: Any) -> Path:
    """The folder of a run that nobody disturbed."""
    folder: Path = tmp_path_factory.mktemp("undisturbed")
    run_sweep(small(), mf.toy(), folder, batch=2)
    return folder


@pytest.mark.slow
def test_killed_at_random_moments_it_loses_and_doubles_nothing(tmp_path: Path, undisturbed: Path) -> None:
    """kill -9 after more and more rows, until one run is left to finish: rows and pictures as if nothing had been."""
    for round_ in range(4):
        before = len(read(tmp_path)) if (tmp_path / "rows").is_dir() else 0
        worker = process(tmp_path, pause=0.05)
        begin(worker)
        end = time.monotonic() + 60
        while time.monotonic() < end and len(list((tmp_path / "rows").glob("??/*.json"))) < before + 1 + round_ % 2:
            time.sleep(0.01)
        worker.kill()
        worker.communicate()
        now = read(tmp_path)
        assert all(r.done for r in now) and len(now) > before
        for row in now:
            assert io.read_image(tmp_path / str(row.picture)).shape == (1, 3, *SIZE)
    done = run_sweep(small(), mf.toy(), tmp_path, batch=2)
    assert done.left == done.failed == 0
    assert facts(read(tmp_path)) == facts(read(undisturbed))
    assert pictures(tmp_path) == pictures(undisturbed)


@pytest.mark.slow
def test_two_processes_share_a_folder(tmp_path: Path, undisturbed: Path) -> None:
    workers = [process(tmp_path, pause=0.1) for _ in range(2)]
    begin(*workers)
    made = [int(w.communicate(timeout=120)[0].split()[-1]) for w in workers]
    assert sum(made) >= 12 and all(n < 12 for n in made)  # both worked
    run_sweep(small(), mf.toy(), tmp_path)
    assert facts(read(tmp_path)) == facts(read(undisturbed))
    assert pictures(tmp_path) == pictures(undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_it_after_the_batch(tmp_path: Path, number: signal.Signals, code: int) -> None:
    (tmp_path / "s.py").write_text(
        "import mrflow as mf\n"
        "chain = mf.recipes.native(size=(64, 64), steps=6)\n"
        "sweep = mf.Sweep({'n': chain}, [f'a big red circle {i}' for i in range(400)])\n"
    )
    words = [sys.executable, "-m", "mrflow", "sweep", "s.py", "--batch", "1", "--json"]
    # Started in the background by a shell, a process may be told to ignore SIGINT: here it is not.
    worker = subprocess.Popen(
        words, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    end = time.monotonic() + 90
    while time.monotonic() < end and not list((tmp_path / "s-sweep").glob("rows/??/*.json")):
        time.sleep(0.02)
    worker.send_signal(number)
    out, err = worker.communicate(timeout=60)
    assert worker.returncode == code, err
    summary = json.loads(out)
    assert summary["stopped"] and summary["left"] == 400 - len(read(tmp_path / "s-sweep")) > 0
    assert "run the same command again to resume" in err
    assert not list((tmp_path / "s-sweep" / "leases").glob("*.json"))


@dataclass(frozen=True)
class Bad(mf.Stage[mf.Pixels, mf.Pixels]):
    """Fails for some seeds."""

    seeds: tuple[int, ...]

    def plan(self, spec: mf.Pixels, model: mf.ModelInfo) -> mf.Pixels:
        return spec

    def apply(self, state: mf.State[mf.Pixels], out: mf.Pixels, ctx: mf.Context) -> Tensor:
        if {*self.seeds} & {*ctx.seeds}:
            raise ValueError("this seed is poison")
        return state.data


def test_a_failing_row_is_written_down_and_takes_no_other_with_it(tmp_path: Path) -> None:
    poison = tuple(seed_of(prompt, 1) for prompt in "ab")
    sweep = mf.Sweep({"ok": paper(), "bad": paper() >> Bad(poison)}, ["a", "b"], seeds=(0, 1, 2))
    done = run_sweep(sweep, mf.toy(), tmp_path, batch=6)
    assert (done.made, done.failed, done.left) == (10, 2, 0)
    failed = [r for r in read(tmp_path) if not r.done]
    assert {(r.chain, r.draw) for r in failed} == {("bad", 1)} and {r.seed for r in failed} == {*poison}
    assert all("this seed is poison" in str(r.error) and r.picture is None for r in failed)
    rerun = run_sweep(sweep, mf.toy(), tmp_path)  # they are not tried again by themselves
    assert (rerun.made, rerun.before, rerun.failed, rerun.stayed) == (0, 12, 0, 2) and done.stayed == 0
    again = run_sweep(sweep, mf.toy(), tmp_path, retry=True)
    assert (again.made, again.failed, again.stayed) == (0, 2, 0)


def test_a_row_that_kills_its_process_is_given_up(tmp_path: Path) -> None:
    """A lease of a dead process that began the row three times: it is written down as failed, the rest is made."""
    sweep, model = mf.Sweep({"s": paper()}, ["a", "b"]), mf.toy()
    folder = Store(tmp_path)
    folder.open(local.manifest(sweep, model))
    key = maker.Maker(sweep, model, folder).key("s", (sweep.prompts[0], 0))
    dead = {"host": os.uname().nodename, "pid": 2**22 + 7, "boot": leases.boot(), "space": leases._space(), "tries": 2}
    dead |= {"deaths": 2, "doing": "alone"}
    (tmp_path / "leases" / f"{key}.json").write_text(json.dumps(dead))
    done = run_sweep(sweep, model, tmp_path)
    assert (done.made, done.failed) == (1, 1)
    row = next(r for r in read(tmp_path) if not r.done)
    assert row.prompt == "a" and "the process died 3 times" in str(row.error)


def test_a_stage_made_in_another_batch_costs_what_it_took(tmp_path: Path) -> None:
    """A row whose process died is made alone; a chain that shares its first stage is made in one batch all the same."""
    sweep, model = mf.Sweep({"a": paper(0.1), "b": paper(0.2)}, ["x", "y"]), mf.toy()
    folder = Store(tmp_path)
    folder.open(local.manifest(sweep, model))
    key = maker.Maker(sweep, model, folder).key("a", (sweep.prompts[0], 0))
    dead = {"host": os.uname().nodename, "pid": 2**22 + 7, "boot": leases.boot(), "space": leases._space()}
    dead |= {"doing": "together"}
    (tmp_path / "leases" / f"{key}.json").write_text(json.dumps(dead))
    with folder.holding():
        assert len(maker.Maker(sweep, model, folder).make([(prompt, 0) for prompt in sweep.prompts])) == 4
    rows = read(tmp_path)
    assert {r.nfe for r in rows} == {3}
    sampled = {r.chain: sum(s.stages[0]["seconds"] for s in rows if s.chain == r.chain) for r in rows}
    assert sampled["a"] == pytest.approx(sampled["b"])
    assert len({r.flops for r in rows}) == 1


def test_files_of_the_user_stay(tmp_path: Path) -> None:
    """What a killed process left is removed when it is old; nothing else is, hidden or not, in any of the folders."""
    folder = Store(tmp_path)
    folder.open({"chains": {}})
    (tmp_path / "rows" / "ab").mkdir()
    places = [tmp_path, tmp_path / "rows" / "ab", tmp_path / "pictures", tmp_path / "leases"]
    theirs = [at / name for at in places for name in (".env", ".gitignore", ".probe-1", "k.json.gone", "notes")]
    ours = [at / f"{TEMPORARY}k" for at in places if at.name != "pictures"]
    young = tmp_path / f"{TEMPORARY}young"
    for path in (*theirs, *ours, young):
        path.write_text("secret")
    for path in (*theirs, *ours):
        os.utime(path, (time.time() - 3600,) * 2)
    (tmp_path / "linked").symlink_to(tmp_path)
    link = tmp_path / f"{TEMPORARY}link"
    link.symlink_to(theirs[0])
    os.utime(link, (time.time() - 3600,) * 2, follow_symlinks=False)
    folder.open({"chains": {}})
    assert all(path.read_text() == "secret" for path in (*theirs, young))
    assert not any(path.exists() for path in ours) and link.is_symlink()


@pytest.mark.parametrize("name", [".env", "photo.png", "rows", "sweep.json"])
def test_a_folder_of_somebody_else_is_refused(tmp_path: Path, name: str) -> None:
    """Before anything is written into it."""
    (tmp_path / name).mkdir() if name == "rows" else (tmp_path / name).write_text("{}")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(mf.PlanError, match=r"sweep.*--out"):
        Store(tmp_path).open({"chains": {}})
    assert sorted(tmp_path.rglob("*")) == before


def test_leases(tmp_path: Path) -> None:
    """One holder; a dead process, or an old heartbeat of another host, is taken over; a live one is not."""
    a, b = Store(tmp_path), Store(tmp_path)
    a.open({"chains": {}})
    assert a.claim("k") == Claim("k") and b.claim("k") is None
    a.release(["k"])
    assert b.claim("k") == Claim("k")
    b.release(["k"])
    path = tmp_path / "leases" / "k.json"
    elsewhere = {"token": "theirs", "host": "elsewhere", "pid": 1, "boot": "x", "doing": "alone"}
    path.write_text(json.dumps(elsewhere))
    assert a.claim("k") is None
    old = time.time() - 10 * leases.STALE
    os.utime(path, (old, old))
    assert a.claim("k", calm=True) is None and a.claim("k") == Claim("k", tries=1, deaths=1)
    a.release(["k"])
    path.write_text("not whole")
    assert a.claim("k") is None
    os.utime(path, (old, old))
    assert a.claim("k") == Claim("k")  # nobody had begun it
    a.release(["k"])
    assert not path.exists()


def test_what_a_power_cut_leaves_is_not_taken_for_a_row(tmp_path: Path) -> None:
    sweep = small()
    run_sweep(sweep, mf.toy(), tmp_path)
    whole = facts(read(tmp_path))
    rows = sorted((tmp_path / "rows").rglob("*.json"))
    rows[0].write_bytes(b"")
    rows[1].write_bytes(rows[1].read_bytes()[:100])
    rows[2].write_bytes(b"[1, 2]")
    torn = rows[3].with_name(TEMPORARY + rows[3].name + ".abc")
    torn.write_bytes(b"{")
    (tmp_path / "sweep.json").write_bytes(b"{")
    assert len(read(tmp_path)) == 9
    assert run_sweep(sweep, mf.toy(), tmp_path).made == 3
    assert facts(read(tmp_path)) == whole


def test_a_full_disk_stops_it_and_leaves_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fifth file that is written finds no space; after that there is space again."""
    written, replace = [0], Path.replace

    def full(self: Path, target: Any) -> Path:
        written[0] += 1
        if written[0] == 5:
            raise OSError(28, "No space left on device")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(mf.ResourceError, match="No space left"):
        run_sweep(small(), mf.toy(), tmp_path, batch=1)
    monkeypatch.undo()
    assert all(io.read_image(p).shape == (1, 3, *SIZE) for p in (tmp_path / "pictures").rglob("*.png"))
    assert not list(tmp_path.rglob("leases/*.json")) and not list(tmp_path.rglob(".*.png.*"))
    assert run_sweep(small(), mf.toy(), tmp_path).left == 0


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: mf.Sweep({}, ["a"]), "needs at least one chain"),
        (lambda: mf.Sweep({"a": paper()}, []), "at least one prompt"),
        (lambda: mf.Sweep({"a": paper()}, ["a"], seeds=()), "at least one seed"),
        (lambda: mf.Sweep({"a": paper()}, ["a", "a"]), "the prompt 'a' is there twice"),
        (lambda: mf.Sweep({"a": paper()}, ["a"], seeds=(1, 1)), "a seed is there twice"),
        (lambda: mf.Sweep({"a": paper()}, ["a"], reference="b"), "the reference 'b' is none of the chains: a"),
        (lambda: mf.Sweep({"a": paper()}, {"x": "a"}), "prompts are a list of texts"),
        (lambda: mf.Sweep({"a": paper()}, [3]), "a prompt must be text or a Prompt"),  # type: ignore[list-item]
        (lambda: mf.Sweep({"a": paper()}, ["a"], pictures="all"), "pictures must be last or stages"),  # type: ignore[arg-type]
        (lambda: run(mf.Sweep({"a": mf.Sample(*SIZE)}, ["a"])), "chain 'a' ends in Latents"),
        (lambda: run(mf.Sweep({"a": mf.Upscale()}, ["a"])), "chain 'a': the chain begins with Upscale"),
        (lambda: run(mf.Sweep({"a": mf.recipes.native(size=(33, 32))}, ["a"])), "chain 'a': stage 1 of 2, Sample"),
        (lambda: run(mf.Sweep({"a": paper(), "b": paper()}, ["a"])), "chains 'a' and 'b' are the same"),
        (lambda: run(small(), batch=0), "batch must be"),
        (lambda: run(small(), shard=(2, 2)), "a shard"),
    ],
)
def test_what_cannot_be_swept_is_refused_before_anything_is_made(make: Any, text: str) -> None:
    with pytest.raises(mf.PlanError, match=text):
        make()


def run(sweep: mf.Sweep, **more: Any) -> None:
    """Into a folder that must not be made."""
    folder = Path("/nonexistent/folder")
    try:
        run_sweep(sweep, mf.toy(), folder, **more)
    finally:
        assert not folder.exists()


def test_folders_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(mf.PlanError, match="is not a folder"):
        run_sweep(small(), mf.toy(), tmp_path / "file")
    with pytest.raises(mf.PlanError, match="is no sweep's folder"):
        read(tmp_path)


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("place", ["row", "picture", "lease"])
def test_a_folder_in_the_place_of_a_file_is_named_before_work_and_stays(
    tmp_path: Path, place: str, old: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_sweep(small(), mf.toy(), tmp_path)
    row = read(tmp_path)[0]
    store = Store(tmp_path)
    store.row_path(row.key).unlink()
    store.picture_path(row.key).unlink()
    where = {"row": store.row_path, "picture": store.picture_path, "lease": store.leases.path}[place](row.key)
    where.mkdir()
    (where / "mine").write_text("mine")
    if old:
        os.utime(where, (1, 1))
    with monkeypatch.context() as patched:
        patched.setattr(Maker, "_make_group", None)  # no row is begun
        with pytest.raises(mf.PlanError, match="is a folder, which no sweep makes there; move it away") as said:
            run_sweep(small(), mf.toy(), tmp_path)
    assert str(where) in str(said.value) and (where / "mine").read_text() == "mine"
    store.leases.tidy(lambda key: True)
    assert store.claim(row.key) is None or place != "lease"
    assert (where / "mine").read_text() == "mine"
    store.leases.close()
    where.rename(tmp_path / "elsewhere")
    assert run_sweep(small(), mf.toy(), tmp_path).made == 1


@pytest.mark.parametrize("place", ["rows", "pictures"])
def test_a_file_in_the_place_of_a_folder_is_named_before_work(tmp_path: Path, place: str) -> None:
    run_sweep(small(), mf.toy(), tmp_path)
    key = read(tmp_path)[0].key
    inner = tmp_path / place / key[:2]
    shutil.rmtree(inner)
    inner.write_text("mine")
    with pytest.raises(mf.PlanError, match=f"{inner} is not a folder, which no sweep makes there; move it away"):
        run_sweep(small(), mf.toy(), tmp_path)
    assert inner.read_text() == "mine"


class Looked(str):
    """A text that counts how often it is compared or hashed."""

    __slots__ = ()
    looks = 0

    def __eq__(self, other: object) -> bool:
        Looked.looks += 1
        return str.__eq__(self, other)

    def __hash__(self) -> int:
        Looked.looks += 1
        return str.__hash__(self)


def test_many_prompts_are_looked_at_a_few_times_each() -> None:
    count = 16_000
    texts = [Looked(f"thing {i}") for i in range(count)]
    assert mf.Sweep({"a": paper()}, texts).rows == count
    assert 0 < Looked.looks < 5 * count
    with pytest.raises(mf.PlanError, match="'thing 5' is there twice"):
        mf.Sweep({"a": paper()}, [*texts, Looked("thing 5")])
    assert Looked.looks < 20 * count


def called(work: Callable[[], object]) -> int:
    """How many functions a piece of work calls, Python's and C's, in this thread."""
    count = 0

    def seen(frame: object, event: str, argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(seen)
    try:
        work()
    finally:
        sys.setprofile(None)
    return count


@pytest.mark.parametrize("what", ["resume", "report"])
def test_four_times_the_rows_take_four_times_the_work(tmp_path: Path, what: str) -> None:
    counts: list[int] = []
    for rows in (40, 160, 640):
        folder = tmp_path / str(rows)
        bench.fill(folder, rows)
        asked, model = bench.sweep(rows), mf.toy()
        work = partial(run_sweep, asked, model, folder) if what == "resume" else partial(page, folder)
        work()  # what is done once for all
        counts.append(called(work))
    few, some, many = counts
    assert few < some < many
    assert many - some < 4.5 * (some - few)  # what does not depend on the rows falls out


def test_prompts_may_come_from_a_generator() -> None:
    def some() -> Iterator[str]:
        yield from ("x", "y")

    assert [p.text for p in mf.Sweep({"a": paper()}, some()).prompts] == ["x", "y"]


def test_every_stage_can_be_kept(tmp_path: Path) -> None:
    sweep = mf.Sweep({"s": paper()}, ["a", "b"], pictures="stages")
    run_sweep(sweep, mf.toy(), tmp_path)
    for row in read(tmp_path):
        assert [name for name, _ in row.stage_pictures] == ["Decode", "Upscale"]
        assert io.read_image(tmp_path / row.stage_pictures[0][1]).shape == (1, 3, *LOW)


def test_the_command(here: Path) -> None:  # noqa: F811
    Path("mine.py").write_text(
        "import mrflow as mf\nfrom mrflow.sweep import SceneScore\n"
        "size, low = (64, 64), (32, 32)\n"
        "chains = {'n': mf.recipes.native(size=size, steps=2), 's': mf.recipes.paper(size=size, low=low, steps=2)}\n"
        "sweep = mf.Sweep(chains, ['a big red circle at the left'], metrics=[SceneScore()])\nother = 3\n"
    )
    code, out, _ = call("sweep", "mine.py", "--plan")
    assert code == 0 and "2 chains x 1 prompt x 1 draw: 2 rows" in out and not Path("mine-sweep").exists()
    code, out, err = call("sweep", "mine.py", "--json")
    assert code == 0 and json.loads(out)["made"] == 2 and "2 rows made, 0 were there, 0 failed" in err
    assert all("score" in r.metrics for r in read("mine-sweep"))
    code, out, err = call("sweep", "mine.py:sweep")
    assert code == 0 and out.strip() == "mine-sweep" and "2 were there" in err
    for words, text in (
        (("mine.py:other",), "defines no 'other'"),
        (("gone.py",), "there is no Python file gone.py"),
        (("mine.py", "--shard", "4/4"), "--shard must be i/n"),
        (("mine.py", "--model", "nothing"), "there is no model 'nothing'"),
    ):
        code, _, err = call("sweep", *words)
        assert code == 2 and text in err, err


def measured(**more: Any) -> Measured:
    """A picture to measure."""
    x = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0))
    return Measured(x, "a big red circle at the left", 0, {}, mf.toy(), **more)


def test_metrics_leave_out_what_does_not_apply() -> None:
    assert Psnr()(measured()) == Ssim()(measured()) == PowerRatios()(measured()) == RoundTrip()(measured()) == {}
    other = Measured(measured().pixels, "not of this world at all", 0, {}, mf.toy())
    assert SceneScore()(other) == Stray()(other) == {}
    wide = replace(measured(), pixels=torch.ones(3, 64, 96))
    assert SceneScore()(wide) == Stray()(wide) == {}
    assert set(SceneScore()(measured())) >= {"score", "score.alignment"}
    assert Stray()(measured()) == {"stray": 100.0}  # noise has no pale ground
    same = measured(reference=measured().pixels)
    assert Psnr()(same) == {"psnr": 100.0} and Ssim()(same)["ssim"] == pytest.approx(1)
    assert all(v == pytest.approx(1) for v in PowerRatios()(same).values())


def test_what_killed_processes_left_is_swept_up_when_it_is_old(tmp_path: Path) -> None:
    run_sweep(mf.Sweep({"s": paper()}, ["a"]), mf.toy(), tmp_path)
    place = next((tmp_path / "pictures").iterdir())
    old = [place / f"{TEMPORARY}x.png.abc", tmp_path / "leases" / f"{TEMPORARY}k.json.abc"]
    for file in old:
        file.write_text("")
        os.utime(file, (time.time() - 20 * leases.STALE,) * 2)
    fresh = place / f"{TEMPORARY}y.png.abc"
    fresh.write_text("")
    run_sweep(mf.Sweep({"s": paper()}, ["a"]), mf.toy(), tmp_path)
    assert not any(file.exists() for file in old) and fresh.exists()


def test_chains_whose_stages_share_a_schedule_are_warmed_up_too(tmp_path: Path) -> None:
    chain = mf.recipes.speed(sizes=((32, 32), (64, 64)), steps=(2, 2))
    done = mf.run_sweep(mf.Sweep({"speed": chain}, ["one", "two"], model="toy"), mf.toy(), tmp_path)
    assert (done.made, done.failed) == (2, 0)

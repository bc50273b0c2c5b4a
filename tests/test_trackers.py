"""Runs that are kept elsewhere: one protocol, its three trackers, and what a sweep hands out."""

import csv
import json
import os
import sqlite3
import subprocess
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

import mrflow as mf
from mrflow.sweep import Row, Sharpness, Table, cluster, read, run_sweep, seed_of, tracker
from mrflow.sweep.datasets import write_dataset
from mrflow.sweep.summary import load_rows
from mrflow.sweep.trackers import PICTURES
from tests.test_cli import call, here  # noqa: F401
from tests.test_sweep import SIZE, Bad, paper

POISON = Bad((seed_of("b", 0),))
SWEEP = mf.Sweep({"ok": paper(), "bad": paper() >> POISON}, ["a", "b"], metrics=[Sharpness()])


class Recorded:
    """A tracker of one's own that keeps what it is told, and may fail."""

    def __init__(self, fails: str = "") -> None:
        self.fails, self.told = fails, list[tuple[Any, ...]]()

    def _keep(self, *said: Any) -> None:
        self.told.append(said)
        if self.fails == said[0]:
            raise RuntimeError("the network is gone")

    def begin(self, name: str, config: Any) -> None:
        self._keep("begin", name, config)

    def row(self, row: Row, number: int, picture: Path | None) -> None:
        self._keep("row", row.chain, number, row.done, picture)

    def finish(self, methods: Table) -> None:
        self._keep("finish", methods)


def test_a_tracker_hears_of_every_row_and_of_the_table(tmp_path: Path) -> None:
    own = Recorded()
    run_sweep(SWEEP, mf.toy(), tmp_path / "s", log=[own])
    kinds = [said[0] for said in own.told]
    assert kinds == ["begin", "row", "row", "row", "row", "finish"]
    _, name, config = own.told[0]
    assert name == "s" and config["model"] == "toy" and config["rows"] == 4 and "Reinject" in config["chains"]["ok"]
    rows = {said[1:4] for said in own.told[1:5]}
    assert rows == {("ok", 1, True), ("ok", 2, True), ("bad", 1, True), ("bad", 2, False)}
    assert all((said[4] is not None and said[4].is_file()) == said[3] for said in own.told[1:5])
    assert own.told[-1][1].lines[1][1] == "2 (1 failed)"
    again = Recorded()
    run_sweep(SWEEP, mf.toy(), tmp_path / "s", log=[again])
    assert [said[0] for said in again.told] == ["begin", "finish"]  # rows that were there are in the table alone
    assert (config["before"], again.told[0][2]["before"]) == (0, 4)
    more = Recorded()
    run_sweep(replace(SWEEP, seeds=[0, 1]), mf.toy(), tmp_path / "s", log=[more])
    rows = {said[1:4] for said in more.told[1:-1]}  # numbers count on
    assert rows == {("ok", 3, True), ("ok", 4, True), ("bad", 3, True), ("bad", 4, True)}


class InProcess:
    """What the engine uses of Ray, carried out at once and in this process."""

    exceptions = SimpleNamespace(RayError=ConnectionError, RayTaskError=ChildProcessError)

    class Ref:
        def __init__(self, value: Any) -> None:
            self.value = value

    class Actor:
        def __init__(self, made: object) -> None:
            self._made = made

        def __getattr__(self, name: str) -> SimpleNamespace:
            return SimpleNamespace(remote=lambda *a, **k: InProcess.Ref(getattr(self._made, name)(*a, **k)))

    def is_initialized(self) -> bool:
        return True

    def remote(self, **_: object) -> Any:
        return lambda kind: SimpleNamespace(remote=lambda *a: self.Actor(kind(*a)))

    def put(self, value: Any) -> Any:
        return value

    def get(self, ref: Ref) -> Any:
        return ref.value

    def wait(self, refs: list[Ref], timeout: float) -> tuple[list[Ref], list[Ref]]:
        return refs[:1], refs[1:]


def test_trackers_hear_the_same_of_a_sweep_on_ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "package", InProcess)
    ray, local = Recorded(), Recorded()
    cluster.run_on_ray(SWEEP, mf.toy, tmp_path / "ray" / "s", log=[ray])
    run_sweep(SWEEP, mf.toy(), tmp_path / "local" / "s", log=[local])
    assert [said[0] for said in ray.told] == ["begin", "row", "row", "row", "row", "finish"]
    assert ray.told[0] == local.told[0]
    assert {said[1:4] for said in ray.told[1:5]} == {said[1:4] for said in local.told[1:5]}
    assert all((said[4] is not None and said[4].is_file()) == said[3] for said in ray.told[1:5])
    assert [line[:2] for line in ray.told[-1][1].lines] == [line[:2] for line in local.told[-1][1].lines]
    with pytest.raises(RuntimeError):  # a tracker may refuse before any row is made
        cluster.run_on_ray(SWEEP, mf.toy, tmp_path / "other", log=[Recorded("begin")])
    assert not list((tmp_path / "other").glob("rows/*/*"))


def test_a_tracker_that_fails_costs_no_row(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    broken, whole = Recorded("row"), Recorded()
    done = run_sweep(SWEEP, mf.toy(), tmp_path, log=[broken, whole])
    assert (done.made, done.failed) == (3, 1) and len(broken.told) == 2 and len(whole.told) == 6
    assert "Recorded is left out: RuntimeError: the network is gone" in caplog.text
    with pytest.raises(RuntimeError):  # but it may refuse before any row is made
        run_sweep(SWEEP, mf.toy(), tmp_path / "other", log=[Recorded("begin")])
    assert not list((tmp_path / "other").glob("rows/*/*"))


def test_what_is_no_tracker_is_refused_before_any_work(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    Path("s.py").write_text(
        "import mrflow as mf\nsweep = mf.Sweep({'n': mf.recipes.native(size=(64, 64), steps=1)}, ['a red circle'])\n"
    )
    for name in ("wandb", "trackio", "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, name, None)  # not installed
    for word, text in (
        ("wandb", "pip install 'mrflow[wandb]'"),
        ("trackio:mine", "pip install 'mrflow[trackio]'"),
        ("tensorboard:logs", "pip install 'mrflow[tensorboard]'"),
        ("tensorboard", "--log takes tensorboard:FOLDER, wandb,"),
        ("file", "--log takes"),
    ):
        code, _, err = call("sweep", "s.py", "--log", word)
        assert code == 2 and text in err and not Path("s-sweep").exists(), err
        code, _, err = call("sweep", "s.py", "--engine", "ray", "--log", word)
        assert code == 2 and text in err and not Path("s-sweep").exists(), err


@pytest.mark.parametrize("module", ["wandb", "trackio"])
def test_hosted_trackers_get_numbers_pictures_and_the_table(
    module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[str, Any]] = []
    fake = SimpleNamespace(
        init=lambda **words: told.append(("init", words)),
        log=lambda found, step: told.append(("log", (step, found))),
        finish=lambda: told.append(("finish", None)),
        Image=lambda path, caption: ("image", Path(path).name, caption),
        Table=lambda columns, data: ("table", columns, data),
    )
    monkeypatch.setitem(sys.modules, module, fake)
    run_sweep(SWEEP, mf.toy(), tmp_path / "s", log=[tracker(f"{module}:mine")])
    assert told[0][1]["project"] == "mine" and told[0][1]["name"] == "s" and told[-1] == ("finish", None)
    rows = [found for kind, (_, found) in told[1:-2] if kind == "log"]
    assert len(rows) == 4 and {"bad/failed": 1.0} in rows
    assert sum("ok/sharpness" in found and found["ok/picture"][0] == "image" for found in rows) == 2
    step, last = told[-2][1]
    assert step == 5 and last["methods"][1][:2] == ["method", "rows"] and len(last["methods"][2]) == 2
    told.clear()
    run_sweep(replace(SWEEP, seeds=[0, 1]), mf.toy(), tmp_path / "s", log=[tracker(f"{module}:mine")])
    assert (told[0][1]["name"], told[0][1]["group"]) == ("s", "s")  # a run of its own, in the folder's group
    assert [step for kind, (step, _) in told[1:-1] if kind == "log"] == [5, 6, 7, 8, 9]  # which goes on


def test_only_the_first_pictures_of_a_chain_are_sent(tmp_path: Path) -> None:
    own, count = Recorded(), PICTURES + 2
    run_sweep(mf.Sweep({"ok": paper()}, ["a"], seeds=range(count)), mf.toy(), tmp_path, log=[own], batch=9)
    sent = [said[4] is not None for said in own.told if said[0] == "row"]
    assert sent == [True] * PICTURES + [False] * 2


@pytest.mark.filterwarnings("ignore")
def test_tensorboard_reads_what_was_written(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (tmp_path / "file").touch()
    with pytest.raises(mf.ResourceError, match="--log tensorboard:.*file/in: Not a directory"):
        tracker(f"tensorboard:{tmp_path / 'file' / 'in'}")
    run_sweep(SWEEP, mf.toy(), tmp_path / "s", log=[tracker(f"tensorboard:{tmp_path / 'logs'}")])
    found = EventAccumulator(str(tmp_path / "logs" / "s"))
    found.Reload()
    assert {"sharpness/ok", "seconds/ok", "failed/bad"} <= {*found.Tags()["scalars"]}
    assert [event.step for event in found.Scalars("sharpness/ok")] == [1, 2]
    run_sweep(replace(SWEEP, seeds=[0, 1]), mf.toy(), tmp_path / "s", log=[tracker(f"tensorboard:{tmp_path / 'logs'}")])
    found.Reload()
    assert [event.step for event in found.Scalars("sharpness/ok")] == [1, 2, 3, 4]  # resumed: one curve
    assert set(found.Tags()["images"]) == {"pictures/ok", "pictures/bad"}
    texts = found.Tags()["tensors"]
    assert {"sweep/text_summary", "methods/text_summary"} <= {*texts}


OFFLINE = """
import dataclasses, mrflow as mf, sys
from mrflow.sweep import run_sweep, tracker
from tests.test_trackers import SWEEP
if __name__ == "__main__":
    for seeds in ([0], [0, 1]):  # the second time the folder's sweep goes on
        sweep = dataclasses.replace(SWEEP, seeds=seeds)
        if sys.argv[3] == "ray":
            from mrflow.sweep.cluster import Pool, run_on_ray
            run_on_ray(sweep, mf.toy, sys.argv[1] + "/s", pool=Pool(workers=1), log=[tracker(sys.argv[2])])
        else:
            run_sweep(sweep, mf.toy(), sys.argv[1] + "/s", log=[tracker(sys.argv[2])])
"""


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["local", "ray"])
@pytest.mark.parametrize("module", ["wandb", "trackio"])
def test_without_a_network(module: str, engine: str, tmp_path: Path) -> None:
    """The real packages in their offline modes, in a process of their own: what they wrote is what the rows say."""
    pytest.importorskip(module)
    more = {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "WANDB_SILENT": "true", "HF_HUB_OFFLINE": "1"}
    more |= {"TRACKIO_DIR": str(tmp_path / "trackio"), "HF_HOME": str(tmp_path / "hf"), "HOME": str(tmp_path)}
    words = [sys.executable, "-c", OFFLINE, str(tmp_path), module, engine]
    done = subprocess.run(words, env={**os.environ, **more}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "is left out" not in done.stderr, done.stderr[-2000:]
    made = read(tmp_path / "s")
    assert len(made) == 8
    look = {"wandb": wandb_wrote, "trackio": trackio_wrote}[module]
    runs, numbers, pictures, tables = look(tmp_path)
    assert runs == 2
    assert all(str(row.metrics["sharpness"]) in numbers for row in made if row.done)
    assert pictures == sum(row.done for row in made) == 7
    rows = sorted(sorted(cells[1] for cells in each) for each in tables)
    assert rows == [["2", "2 (1 failed)"], ["4", "4 (1 failed)"]]


Wrote = tuple[int, str, int, list[list[list[str]]]]  # runs, numbers as text, pictures, tables of methods


def wandb_wrote(folder: Path) -> Wrote:
    """What wandb's offline runs hold: records (text within protobuf), and files beside them."""
    runs = sorted(folder.rglob("*.wandb"))
    text = "".join(path.read_bytes().decode("latin-1") for path in runs)
    tables = [json.loads(path.read_text())["data"] for path in folder.rglob("*.table.json")]
    return len(runs), text, len([*folder.rglob("media/images/*/*.png")]), tables


def trackio_wrote(folder: Path) -> Wrote:
    """What Trackio's database holds, and the files beside it; each run's steps go on where the one before ended."""
    with closing(sqlite3.connect(next(folder.rglob("mrflow.db")))) as database:
        kept = database.execute("SELECT step, metrics, run_name FROM metrics ORDER BY id").fetchall()
    assert [step for step, *_ in kept] == [1, 2, 3, 4, 5, 5, 6, 7, 8, 9]  # the fifth of each is the table
    logged = [json.loads(text) for _, text, _ in kept]
    tables = [[[*line.values()] for line in found["methods"]["_value"]] for found in logged if "methods" in found]
    text = "".join(map(str, logged))
    pictures = [*(folder / "trackio" / "media").rglob("*.png")]
    return len(tables), text, len(pictures), tables


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "s"
    run_sweep(SWEEP, mf.toy(), folder)
    return folder


def test_export(made: Path, here: Path) -> None:  # noqa: F811
    code, out, err = call("sweep", "export", str(made), "--out", "rows.csv")
    assert code == 0 and out.strip() == "rows.csv" and "4 rows" in err
    with open("rows.csv", newline="") as file:
        assert len(list(csv.DictReader(file))) == 4
    code, out, err = call("sweep", "export", str(made), "--to", "hf", "--out", "set")
    assert code == 0 and out.strip() == "set" and "3 rows" in err  # the failed one has no picture
    lines = [json.loads(line) for line in Path("set/train/metadata.jsonl").read_text().splitlines()]
    rows = {row.key: row for row in read(made)}
    for line in lines:
        assert line["metric.sharpness"] == rows[line["key"]].metrics["sharpness"] and line["chain"] in ("ok", "bad")
        with Image.open(Path("set/train", line["file_name"])) as image:
            assert image.size == SIZE[::-1]
    assert len({tuple(line) for line in lines}) == 1 and "tags:" in Path("set/README.md").read_text()
    for words, text in (
        (("--to", "xml"), "--to takes csv, parquet, hf, got 'xml'"),
        (("--to", "hf", "--out", "set"), "exists and is not empty"),
    ):
        code, _, err = call("sweep", "export", str(made), *words)
        assert code == 2 and text in err
    assert call("sweep", "export", str(here))[0] == 2


def test_the_datasets_library_loads_the_folder(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets: Any = pytest.importorskip("datasets")
    write_dataset(load_rows(made)[0], made, tmp_path / "set")
    found = datasets.load_dataset("imagefolder", data_dir=str(tmp_path / "set"), cache_dir=str(tmp_path / "cache"))
    assert found["train"].num_rows == 3 and found["train"][0]["image"].size == SIZE[::-1]
    assert set(found["train"]["chain"]) == {"ok", "bad"}


def test_rows_that_stay_failed_and_the_table_are_printed(here: Path) -> None:  # noqa: F811
    Path("s.py").write_text(
        "import mrflow as mf\nfrom mrflow.sweep import SceneScore, seed_of\nfrom tests.test_sweep import Bad\n"
        "low = mf.recipes.native(size=(64, 64), steps=1)\n"
        "chains = {'ok': low, 'bad': low >> Bad((seed_of('a red circle', 0),))}\n"
        "sweep = mf.Sweep(chains, ['a red circle', 'a big red circle'], metrics=[SceneScore()])\n"
    )
    code, _, err = call("sweep", "s.py")
    assert code == 4 and "3 rows made, 0 were there, 1 failed, 0 left" in err
    assert "| method | rows" in err and "2 (1 failed)" in err and "speed-up over ok" in err
    code, _, err = call("sweep", "run", "s.py")
    assert code == 4 and "0 rows made, 4 were there, 0 failed, 1 failed before and stay failed, 0 left" in err
    assert "--retry generates them again" in err
    code, _, err = call("sweep", "s.py", "--retry")
    assert code == 4 and "1 failed, 0 left" in err and "stay failed" not in err

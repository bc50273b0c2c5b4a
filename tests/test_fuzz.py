"""The fuzz harness, briefly, and that it sees what it is there for."""

import gc
import os
import random
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import mrflow as mf
from experiments.reliability import fuzz, mutations, watched
from experiments.reliability.kills import same

COUNTS = {
    "images": 150,
    "records": 60,
    "arguments": 40,
    "pickles": 60,
    "sweeps": 30,
    "headers": 20,
    "configs": 15,
    "folders": 15,
}


@pytest.mark.parametrize(("kind", "count"), COUNTS.items())
def test_mutated_inputs_end_in_errors_of_mrflow(kind: str, count: int) -> None:
    if kind in ("configs", "folders"):
        pytest.importorskip("diffusers")
    assert fuzz.fuzz(kind, count, seed=1, show=False) == {}


def swallow() -> None:
    try:
        while True:
            time.sleep(60)
    except Exception as error:
        raise mf.errors.MrflowError("as any other error") from error


def ignore() -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM, signal.SIGPROF})
    time.sleep(10)  # not for ever: without the detector the test must fail, not hang


def hold() -> None:
    held = bytearray(b"x" * (256 << 20))
    time.sleep(600)
    del held


FAULTS: dict[str, tuple[Callable[[], object], str]] = {
    "a raw error": (lambda: dict[str, int]()["raw"], "KeyError: 'raw'"),
    "a hang that code takes for an error": (swallow, "took more than 10 s of the processor, or 0.5 s on the clock"),
    "a hang that no signal ends": (ignore, "hung for 1 s and was killed"),
    "memory that is held": (hold, r"grew by [1-3]\d\d MiB"),
    "memory that is given back": (lambda: len(b"x" * (256 << 20)), r"grew by [1-3]\d\d MiB"),
    "a crash": (lambda: os.kill(os.getpid(), signal.SIGKILL), "the process ended by SIGKILL"),
    "an end": (lambda: os._exit(7), "the process ended by exit 7"),
    "an end as if all were well": (lambda: os._exit(0), "the process ended by exit 0"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_harness_sees_what_it_is_there_for_and_goes_on(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    act, said = FAULTS[fault]
    monkeypatch.setattr(fuzz, "GROWTH", 128 << 20)
    monkeypatch.setattr(fuzz, "HANG", 20 if "memory" in fault else 0.5)
    monkeypatch.setattr(fuzz, "PATIENCE", 0.5)
    monkeypatch.setattr(watched, "LOOK", 20.0 if "given back" in fault else 0.1)  # its peak alone tells
    third = random.Random("images 0 7").random()
    monkeypatch.setattr(fuzz.Inputs, "try_images", lambda self, rng: act() if rng.random() == third else None)
    bad = fuzz.fuzz("images", 5, first=5, show=False)
    assert list(bad) == [7] and re.fullmatch(said, bad[7]), bad


@pytest.mark.parametrize("left_by", ["the process that was forked", "the input before"])
def test_memory_is_seen_where_as_much_is_freed(left_by: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Garbage in circles, which the collector finds while an input is tried, does not count in its favour."""

    def leave() -> None:
        circle: list[object] = [bytearray(b"x" * (256 << 20))]
        circle.append(circle)

    def collect() -> None:
        gc.collect()
        len(b"x" * (256 << 20))

    acts = iter([leave if left_by == "the input before" else list, collect, list])
    monkeypatch.setattr(fuzz.Inputs, "try_images", lambda self, rng: next(acts)())
    monkeypatch.setattr(fuzz, "GROWTH", 128 << 20)
    monkeypatch.setattr(watched, "LOOK", 20.0)
    gc.disable()
    try:
        if left_by == "the process that was forked":
            leave()
        bad = fuzz.fuzz("images", 3, show=False)
    finally:
        gc.enable()
    assert re.fullmatch(r"grew by [1-3]\d\d MiB", bad.get(1, "")), bad


def test_time_without_a_processor_is_no_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    """The process says that it waited for a processor for as long as it took."""
    began = time.monotonic()
    for module in (fuzz, watched):
        monkeypatch.setattr(module, "waited", lambda *_: time.monotonic() - began)
    monkeypatch.setattr(fuzz, "HANG", 0.2)
    monkeypatch.setattr(fuzz, "PATIENCE", 0.2)
    monkeypatch.setattr(fuzz.Inputs, "try_images", lambda self, rng: time.sleep(1.0))
    assert fuzz.fuzz("images", 1, show=False) == {}


def test_an_input_is_made_again_by_its_number_in_a_folder_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[object] = []
    inputs = fuzz.Inputs("sweeps", tmp_path, 0)
    found = mutations.files_below(tmp_path)

    def note(self: fuzz.Inputs, rng: random.Random) -> None:
        seen.append(rng.random())
        assert mutations.files_below(tmp_path) == found
        next(path for path in found if path.suffix == ".png").unlink()

    monkeypatch.setattr(fuzz.Inputs, "try_sweeps", note)
    assert [inputs.attempt(number) for number in (5, 6, 5, 6)] == [None] * 4
    assert seen[:2] == seen[2:] and seen[0] != seen[1]


def test_every_mutation_leaves_something_whole_and_changes_something() -> None:
    """Half of the files must still be opened far enough to reach what lies behind their first bytes."""
    kept = fuzz.save({"a": fuzz.torch.zeros(3)})
    for how, data in ((mutations.changed_header, kept), (mutations.changed_pickle, mutations.pickles()[0])):
        found = {how(data, random.Random(n)) for n in range(50)}
        assert len(found - {data}) > 40
    tables = [mutations.changed_json(b'{"a": [1, 2], "b": "x"}', random.Random(n)) for n in range(200)]
    assert sum(table.startswith((b"{", b"[")) for table in tables) > 100


def test_pictures_in_a_batch_are_the_same_but_for_rounding() -> None:
    model, chain, prompts = mf.load(), mf.recipes.native(size=(64, 64), steps=2), ["a big red circle", "the word CAT"]
    batch = mf.run(chain, model, prompts, seed=[1, 2]).pixels
    for number, prompt in enumerate(prompts):
        alone = mf.run(chain, model, prompt, seed=number + 1).pixels[0]
        assert float((batch[number] - alone).abs().max()) < 1e-4
    a = np.zeros((8, 8, 3), np.int16)
    near, far = a.copy(), a.copy()
    near[0, 0, 0], far[0, 0, 0] = 1, 2
    assert same(a, near) and not same(a, far) and not same(a, a + 1) and not same(a, "failed")


def test_a_process_that_is_slow_to_begin_hangs_no_input(monkeypatch: pytest.MonkeyPatch) -> None:
    collect, slow = gc.collect, iter([1.0])

    def collect_slowly() -> int:
        time.sleep(next(slow, 0.0))
        return collect()

    monkeypatch.setattr(gc, "collect", collect_slowly)
    assert [*watched.watched(lambda number: None, range(2), hang=0.3, growth=1 << 30)] == [(0, None), (1, None)]

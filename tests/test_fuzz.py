"""The fuzz harness, briefly, and that it sees what it is there for."""

import random

import numpy as np
import pytest

import mrflow as mf
from experiments.reliability import fuzz, mutations
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


def test_the_harness_sees_raw_errors_and_gives_the_same_input_again(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[float] = []

    def raw(self: fuzz.Inputs, rng: object) -> None:
        seen.append(rng.random())  # type: ignore[attr-defined]
        raise KeyError("raw")

    monkeypatch.setattr(fuzz.Inputs, "try_images", raw)
    assert fuzz.fuzz("images", 2, first=5, show=False) == {5: "KeyError: 'raw'", 6: "KeyError: 'raw'"}
    fuzz.fuzz("images", 2, first=5, show=False)
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

"""The fuzz harness, briefly, and that it sees what it is there for."""

import pytest

from experiments.reliability import fuzz


@pytest.mark.parametrize(("kind", "count"), [("images", 150), ("records", 60), ("arguments", 40)])
def test_mutated_inputs_end_in_errors_of_mrflow(kind: str, count: int) -> None:
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

"""The questions about what staged sampling loses: every chain plans, and every table says what its rows say."""

import math
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import mrflow as mf
from experiments.failures import tables
from experiments.failures.__main__ import main
from experiments.failures.crossing import Crossing, crossing
from experiments.failures.details import DETAILS, prompts
from experiments.failures.figure import draw
from experiments.failures.questions import LOSSES, QUESTIONS, Setting
from mrflow.models import info
from mrflow.scenes import render
from mrflow.scenes.hard import draw_scene
from mrflow.sweep import Legible, Row, Sweep
from mrflow.sweep.metrics import Measured
from tests.test_statistics import row

SETTING = Setting(128, 256, 24, 12)


@pytest.mark.parametrize("name", QUESTIONS)
def test_every_chain_of_every_question_can_be_planned(name: str) -> None:
    facts = info("pocket")
    chains = QUESTIONS[name](SETTING, facts)
    plans = Sweep(chains, prompts(1, ["letters"]), model="pocket").plans(facts)
    assert all(plan.out.shape == (1, 3, 256, 256) for plan in plans.values())


def test_methods_of_the_frontier_cost_alike() -> None:
    facts = info("pocket")
    chains = QUESTIONS["frontier"](SETTING, facts)
    whole = mf.plan(chains["native"], facts).work.flops
    speeds = {label: whole / mf.plan(chain, facts).work.flops for label, chain in chains.items()}
    assert len(chains) > 10
    for label, speed in speeds.items():
        if label != "native":
            assert 0.95 <= speed / float(label.rsplit(" ", 1)[1].rstrip("x")) <= 1.25


def test_sizes_can_be_chosen(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    found = prompts(2, ["letters", "texture"], ["8%", "1/32"])
    assert [(p.tags["detail"], p.tags["size"]) for p in found] == [("letters", "8%")] * 2 + [("texture", "1/32")] * 2
    for words, said in (
        (["--details", "letters", "--sizes", "7%"], "no detail has the size 7%; there are 13%, 8%"),
        (
            ["--details", "letters", "--sizes", "8%", "--figure", "a.svg"],
            "a figure needs two sizes of a detail",
        ),
    ):
        monkeypatch.setattr("sys.argv", ["failures", "map", *words])
        assert main() == 2
        assert said in capsys.readouterr().err


def scores(size: float, half: float, rng: np.random.Generator, count: int = 60) -> dict[str, list[float]]:
    """Captions whose share read rises with size, one half at `half`."""
    p = 1 / (1 + (half / size) ** 6)
    return {str(i): [float(rng.binomial(12, p)) / 12] for i in range(count)}


def test_the_crossing_is_where_half_is_read() -> None:
    rng = np.random.default_rng(0)
    sizes = (0.13, 0.08, 0.06, 0.05, 0.04, 0.03)
    inside = 0
    for _ in range(40):
        found = crossing({size: scores(size, 0.055, rng) for size in sizes}, draws=200)
        assert found.size == pytest.approx(0.055, rel=0.08)
        inside += found.low <= 0.055 <= found.high
    assert inside >= 33  # of 40 intervals of 95 %
    other = crossing({size: scores(size, 0.075, rng) for size in sizes}, draws=200)
    assert other.low > 0.055  # another size is told apart


def test_a_crossing_beyond_the_sizes_is_said() -> None:
    never, always = ({s: {"a": [v], "b": [v]} for s in (0.1, 0.2)} for v in (0.0, 1.0))
    assert crossing(never) == Crossing(math.inf, math.inf, math.inf)
    assert crossing(always) == Crossing(0.0, 0.0, 0.0)
    assert crossing(never).text(100, 0, (0.1, 0.2)) == "> 20 [> 20, > 20]"
    assert crossing(always).text(100, 0, (0.1, 0.2)) == "< 10 [< 10, < 10]"


def test_noise_in_the_means_is_smoothed_to_a_rise() -> None:
    up = crossing({0.1: {"a": [0.2]}, 0.2: {"a": [0.6]}, 0.3: {"a": [0.4]}, 0.4: {"a": [1.0]}})
    assert up.size == pytest.approx(0.2)  # 0.6 and 0.4 are one half together
    assert crossing({0.1: {"a": [0.2]}, 0.4: {"a": [0.8]}}).size == pytest.approx(0.2)  # halfway in the logarithm


def test_no_size_is_said_that_was_not_asked() -> None:
    rows = [made("native", i, size, 1.0) for size in ("13%", "8%") for i in range(20)]
    line = next(x for x in tables.half_legible(rows, size=256, low=128, reference="native") if x.startswith("| native"))
    assert line.endswith("| < 8.0 [< 8.0, < 8.0] |")
    alone = tables.half_legible([r for r in rows if r.tags["size"] == "8%"], size=256, low=128, reference="native")
    assert alone == ["No size at which half is legible can be said: each detail was asked at one size alone."]


def made(chain: str, caption: int, size: str, value: float) -> Row:
    """A row of letters."""
    one = row(f"{size} {caption}", 0, None, chain=chain)
    tags = {"detail": "letters", "size": size}
    return replace(one, tags=tags, metrics={"legible.letters": value, "legible": value})


def test_the_budget_adds_up() -> None:
    rng = np.random.default_rng(0)
    order = ["truth", "no refinement", "true picture", "true low picture", "true latents", "staged"]
    assert {label for pair in LOSSES.values() for label in pair} == set(order)
    rows = [
        made(label, i, size, float(np.clip(1 - 0.18 * at + 0.05 * rng.normal(), 0, 1)) if at else 1.0)
        for at, label in enumerate(order)
        for size in DETAILS["letters"].sizes
        for i in range(24)
    ]
    lines = [line.strip("|").split("|") for line in tables.budget(rows) if line.startswith("| letters")]
    assert len(lines) == len(DETAILS["letters"].sizes)
    for cells in lines:
        losses = [float(cell.split()[0]) for cell in cells[2:]]
        assert sum(losses) == pytest.approx(1 - float(cells[1]), abs=0.03)
        assert all("▲" in cell for cell in cells[2:])


def test_the_cheapest_keeps_what_is_read() -> None:
    rows = list[Row]()
    for chain, seconds, value in (("native", 4.0, 1.0), ("good", 2.0, 1.0), ("bad", 1.0, 0.7)):
        for i in range(80):
            value_here = value if i % 3 else min(1.0, value + 0.01)
            rows.append(replace(made(chain, i, "8%", value_here), seconds=seconds, timed=f"{chain}{i // 10}"))
    line = next(line for line in tables.cheapest(rows, "native") if line.startswith("| letters"))
    assert [cell.strip() for cell in line.strip("|").split("|")] == ["letters 8%", "1.00", "good", "2.0", "1.00"]
    shown = tables.by_size(rows, "native")
    bad, good = (next(line for line in shown if line.startswith(f"| {name}")) for name in ("bad", "good"))
    assert "▼" in bad and "▼" not in good


def test_letters_are_read_by_a_sweep() -> None:
    caption = "a blue sign in 13% letters, RED and FOX and HAT"
    picture = torch.tensor(render(draw_scene(caption, random.Random(0)), 256)).permute(2, 0, 1).float() / 255

    def read(prompt: str) -> dict[str, float]:
        return dict(Legible()(Measured(picture, prompt, 0, {}, mf.toy())))

    assert read(caption) == {"legible.letters": 1.0, "legible": 1.0}
    assert read("a blue sign in 13% letters, CAT and SUN and BUG")["legible"] < 0.3
    assert read("a photograph of a dog") == {}


def mapped() -> list[Row]:
    """Native sampling reads letters from 5 % on, staged sampling from 8 % on."""
    least = {"native": 0.05, "staged": 0.08}
    return [
        made(chain, i, size, float(share >= least[chain]))
        for chain in least
        for size, share in DETAILS["letters"].sizes.items()
        for i in range(20)
    ]


def test_the_map_says_from_which_size_on_half_is_legible() -> None:
    lines = tables.half_legible(mapped(), size=256, low=128, reference="native")
    assert "1 % is 2.56 px here and 0.16 latent cells of the low stage" in lines[0]
    found = {line.split("|")[1].strip(): line.split("|")[3].strip() for line in lines if line.startswith("| ")}
    assert found["native"].startswith("4.5 [") and found["staged"].startswith("6.9 [")  # between two sizes, in log


def test_the_map_is_drawn(tmp_path: Path) -> None:
    def drawn(rows: list[Row]) -> str:
        draw(rows, tmp_path / "maps" / "map.svg", size=256, low=128)
        return (tmp_path / "maps" / "map.svg").read_text(encoding="utf-8")

    rows = mapped()
    picture = drawn(rows)
    assert all(f"<!-- {text} -->" in picture for text in ("native", "staged", "letters", "% of the side"))
    worse = [replace(r, metrics={"legible.letters": 0.0}) if r.chain == "staged" else r for r in rows]
    assert drawn(worse) != picture == drawn(rows)  # it shows the rows, and nothing else


def test_the_map_holds_the_truth_and_its_paths() -> None:
    chains = QUESTIONS["map"](SETTING, info("pocket"))
    assert {"truth", "truth, autoencoder", "truth, staged path"} < set(chains) and next(iter(chains)) == "native"

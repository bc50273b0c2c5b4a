"""Control rows: what they draw, what they cost, and that they are no methods."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import mrflow as mf
from experiments.studies import __main__ as studies
from experiments.studies.common import LOW, SIZE
from mrflow.errors import MrflowError
from mrflow.models import info
from mrflow.scenes import score
from mrflow.scenes.fidelity import fidelity
from mrflow.sweep import controls, read, run_sweep
from mrflow.sweep.control_rows import affordable
from mrflow.sweep.summary import summarise
from tests.test_statistics import row

CAPTIONS = ["the big blue word CAT", "a big happy face at the centre"]


def test_the_truth_is_the_scene_of_its_caption_and_seed() -> None:
    model = mf.load("pocket", device="cpu")
    made = mf.run(mf.Truth(128, 128), model, CAPTIONS, seed=[3, 4]).pixels
    assert all(score(x, c).overall == 1 for x, c in zip(made, CAPTIONS, strict=True))
    assert torch.equal(made[1:], mf.run(mf.Truth(128, 128), model, CAPTIONS[1], seed=4).pixels)
    assert not torch.equal(made[1:], mf.run(mf.Truth(128, 128), model, CAPTIONS[1], seed=5).pixels)
    twice = mf.run(mf.Truth(256, 256), model, CAPTIONS, seed=[3, 4]).pixels
    small = torch.nn.functional.avg_pool2d(twice, 2)
    assert float((small - made).abs().mean()) < 0.01  # one scene at every size


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda m: mf.plan(mf.Truth(128, 64), m.info), mf.PlanError, "scenes are square, got 128x64"),
        (lambda m: mf.plan(mf.Truth(64, 64), mf.FLUX), mf.PlanError, "only captions of the embedded model"),
        (lambda m: mf.run(mf.Truth(64, 64), m, "a cat"), MrflowError, "Truth.*should be a size or a colour, not 'cat'"),
    ],
)
def test_what_has_no_truth(make: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        make(mf.load("pocket", device="cpu"))


def test_each_control_loses_what_its_path_loses() -> None:
    """Fitted PSNR falls from the truth over the autoencoder to the staged path, which is the ceiling of staged rows."""
    model = mf.load("pocket", device="cpu")
    chains = controls(model.info, low=LOW, size=SIZE)
    found: dict[str, float] = {}
    for label, chain in chains.items():
        pixels = mf.run(chain, model, CAPTIONS, seed=[3, 4]).pixels
        found[label] = sum(fidelity(x, c)["psnr"] for x, c in zip(pixels, CAPTIONS, strict=True)) / 2
    assert found["truth"] > found["truth, autoencoder"] + 5
    assert found["truth, autoencoder"] > found["truth, staged path"] + 1
    assert "truth, staged path, refined" in found and found["1 forward, unguided"] < found["truth, autoencoder"]


@pytest.mark.parametrize("name", ["pocket", "flux1-dev", "qwen-image"])
def test_native_at_the_same_cost_costs_no_more_and_one_step_more_would(name: str) -> None:
    model = info(name)
    staged = mf.recipes.paper(low=model.low, size=model.size)
    bar = mf.plan(staged, model).work.flops
    same = {label: chain for label, chain in controls(model).items() if "same cost" in label}
    assert len(same) == (1 if name == "flux1-dev" else 2)
    for guidance in (None, mf.CFG(1.0)) if len(same) == 2 else (None,):
        n = affordable(staged, model, size=model.size, guidance=guidance)
        costs = [
            mf.plan(mf.recipes.native(size=model.size, steps=k, guidance=guidance), model).work.flops
            for k in (n, n + 1)
        ]
        assert costs[0] <= bar < costs[1]
    assert any("truth" in label for label in controls(model)) == (name == "pocket")


def test_every_study_has_its_controls_once() -> None:
    sweep = studies.with_controls(mf.Sweep({"one": mf.recipes.native(size=SIZE, steps=1)}, ["a"]), LOW, SIZE)
    assert list(sweep.chains)[:5] == [
        "one", "truth", "truth, autoencoder", "truth, staged path", "truth, staged path, refined"
    ]  # fmt: skip
    again = studies.with_controls(sweep, LOW, SIZE)
    assert again.chains == sweep.chains and again.reference == "one"


@pytest.mark.parametrize("name", ["pocket", "flux1-dev", "qwen-image"])
def test_a_control_that_is_there_already_is_left_out(name: str) -> None:
    """Whatever its label; a staged chain that costs one native step makes "1 forward" no second time."""
    model = info(name)
    whole = controls(model)
    for label, chain in whole.items():
        assert controls(model, beside={"mine": chain}) == {k: c for k, c in whole.items() if k != label}
    cheap = mf.recipes.native(size=model.size, steps=1, guidance=None if model.cfg == 1 else mf.CFG(1.0))
    few = controls(model, staged=cheap)
    assert len(set(few.values())) == len(few) and cheap in few.values()
    mf.Sweep({"mine": cheap, **controls(model, staged=cheap, beside={"mine": cheap})}, ["a"]).plans(model)


def test_a_sweep_draws_its_controls(tmp_path: Path) -> None:
    model = mf.load("pocket", device="cpu")
    sweep = mf.Sweep(controls(model.info, low=(64, 64), size=(128, 128)), CAPTIONS)
    assert run_sweep(sweep, model, tmp_path, batch=2).failed == 0
    assert {r.chain for r in read(tmp_path) if r.rendered} == {c for c in sweep.chains if c.startswith("truth")}


def test_rows_of_the_truth_are_no_methods() -> None:
    """They have no speed, no verdict, and no part in the family."""
    stages = [{"name": "Truth", "seconds": 0.1}]
    made = [row(f"{i}", 0, 0.0, chain=chain) for chain in ("base", "fast", "truth") for i in range(24)]
    made = [
        replace(r, metrics={"legible": float(r.chain != "fast")}, stages=stages if r.chain == "truth" else ())
        for r in made
    ]
    chains = {c["label"]: c for c in summarise(made, "base")["chains"]}
    assert chains["truth"]["speedup"] is None and chains["truth"]["compare"] == {}
    assert chains["fast"]["speedup"] and chains["fast"]["compare"]["legible"]["verdict"] == "lower"
    assert summarise(made, "base")["families"][""] == 1
    lines = studies.table(made, "base")
    assert "sign-flip tests, 1 in this table" in lines[1]
    assert lines[-1].startswith("| truth |  |")

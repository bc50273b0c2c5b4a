"""Tuning: what cannot win is not drawn, what is found is good enough, the front is a file that runs."""

import io
import re
import runpy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import mrflow as mf
from mrflow.cli.options import ModelOptions
from mrflow.cli.tune import tune_chains
from mrflow.cli.verbs import TuneOptions
from mrflow.sweep import Measured, Psnr, Sharpness, Space, Tune, read
from mrflow.sweep.tune import Trial, front_file, lines, outcome, tune
from tests.test_cli import call, here  # noqa: F401

pytest.importorskip("optuna")
SPACE = Space(steps=(1, 12), refine_steps=(1, 2), solvers={"euler": mf.Euler(), "heun": mf.Heun()})


def asked(floor: float = 20.0, **more: Any) -> Tune:
    """Pictures near enough to those of 50 steps; the toy has no net of its own but bilinear."""
    settings: dict[str, Any] = {"prompts": ["a", "b", "c", "d", "e"], "metrics": [Psnr()], "metric": "psnr"}
    return Tune(**(settings | {"floor": floor, "space": SPACE} | more))


class Near(mf.Metric):
    """How near a picture's mean colour is to one of the two that the toy's exact flow ends in: 1 is there."""

    def __call__(self, made: Measured) -> dict[str, float]:
        """`near`."""
        colours = (made.model.condition([made.prompt])["colours"][0] + 1) / 2
        return {"near": 1 - float((colours - made.pixels.mean((1, 2))).abs().mean(1).min())}


def test_it_finds_the_cheapest_that_is_good_enough(tmp_path: Path) -> None:
    """Costs are forwards here; everything cheaper than the best that was drawn is worse than the floor."""
    model = Costly()
    found = tune(asked(0.97, metrics=[Near()], metric="near"), model, tmp_path, trials=25)
    assert found.best is not None and found.best.quality is not None and found.best.quality.mean >= 0.97
    drawn = [t for t in found.tried if t.quality is not None and not t.why]
    assert all(t.quality.mean < 0.97 for t in drawn if t.flops < found.best.flops)  # type: ignore[union-attr]
    assert found.best.flops < found.tried[0].flops  # cheaper than 50 native steps
    skipped = [t for t in found.tried if t.why.startswith("costs more")]
    assert skipped and all(t.flops >= found.best.flops for t in skipped)
    costs = [t.flops for t in found.front]
    qualities = [t.quality.mean for t in found.front if t.quality is not None]
    assert costs == sorted(costs) and qualities == sorted(qualities)
    before = {r.key for r in read(tmp_path)}
    again = tune(asked(0.97, metrics=[Near()], metric="near"), model, tmp_path, trials=25)
    assert [t.label for t in again.tried] == [t.label for t in found.tried]
    assert {r.key for r in read(tmp_path)} == before


@pytest.mark.parametrize("floor", [0.97, 1.0])
def test_a_model_that_counts_no_work_is_tuned(floor: float, tmp_path: Path) -> None:
    """Where every chain costs nothing, also where none is good enough."""
    found = tune(asked(floor, metrics=[Near()], metric="near"), mf.toy(), tmp_path, trials=3)
    assert [t.flops for t in found.tried] == [0.0] * len(found.tried) and len(found.tried) > 1


@dataclass(frozen=True)
class Always(mf.Metric):
    """The same number for every picture."""

    name: str

    def __call__(self, made: Measured) -> dict[str, float]:
        """1."""
        return {self.name: 1.0}


def test_what_never_varies_is_not_called_certain(tmp_path: Path) -> None:
    said = {}
    for name in ("score", "brightness"):  # a share of what can succeed, and any other number
        wanted = asked(0.5, metrics=[Always(name)], metric=name)
        said[name] = str(tune(wanted, Costly(), tmp_path / name, trials=1).tried[0].quality)
    assert said == {"score": "1.000 [0.478, 1.000]", "brightness": "1.000"}  # 0.025^(1/5): five of five


class Costly:
    """The toy with an architecture, so that plans have a cost."""

    def __init__(self) -> None:
        from dataclasses import replace

        self._toy = mf.toy()
        self.info = replace(self._toy.info, architecture=mf.model_info.Architecture(8, 1, 1, 8, 4, 1000), size=(32, 32))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._toy, name)


def test_the_front_is_a_file_that_runs(tmp_path: Path) -> None:
    ask = asked(0.97, metrics=[Near()], metric="near")
    found = tune(ask, Costly(), tmp_path, trials=8)  # type: ignore[arg-type]
    (tmp_path / "front.py").write_text(front_file(found, ask))
    names = runpy.run_path(str(tmp_path / "front.py"))
    good = [t for t in found.front if t.good(0.97, higher=True)]
    assert list(names["chains"]) == [t.label for t in good] and 0 < len(good) < len(found.front)
    for one in good:
        assert names["chains"][one.label] == one.chain
    told = outcome(found, ask)
    assert [row["good"] for row in told["front"]] == [t in good for t in found.front]  # type: ignore[attr-defined]
    marks = [line[0] for line in lines(found, ask)]
    assert marks.count("*") == 1 and marks.count("-") == len(found.front) - len(good)


def test_the_reference_and_every_trial_are_told(tmp_path: Path) -> None:
    told: list[tuple[int, Trial]] = []
    drawing: list[tuple[str, int, int]] = []
    narrow = Space(steps=(1, 3), lows=(0.5, 0.4), upscalers={"none": None}, solvers={"euler": mf.Euler()})
    ask = asked(0.97, metrics=[Near()], metric="near", space=narrow)
    found = tune(
        ask, Costly(), tmp_path, trials=6,  # type: ignore[arg-type]
        on_tried=lambda number, one: told.append((number, one)), on_drawing=lambda *at: drawing.append(at),
    )  # fmt: skip
    assert [number for number, _ in told] == list(range(1, 8)) and told[0][1].label == "native 50"
    assert [one for _, one in told] == list(found.tried)
    assert drawing[0] == ("native 50", 0, 5) and {total for _, _, total in drawing} == {5}
    assert {label for label, _, _ in drawing} == {one.label for _, one in told if one.quality is not None}


def test_floors_lie_in_the_range_of_their_metric() -> None:
    from mrflow.sweep import SceneScore, Stray

    for metric, floor, higher, said in (
        (SceneScore(), 90.0, True, "floor must be at least 0 and at most 1, the range of 'score', got 90"),
        (SceneScore(), -1.0, True, "the range of 'score'"),
        (Psnr(), 101.0, True, "floor must be at most 100, the range of 'psnr'"),
        (Stray(), 1.0, True, "lower values of 'stray' are better; say higher=False"),
    ):
        with pytest.raises(mf.PlanError, match=said):
            asked(floor, metrics=[metric], metric=next(iter(metric.aims)), higher=higher)
    assert asked(1.0, metrics=[Stray()], metric="stray", higher=False).bound == "<="


def test_what_cannot_be_tuned(tmp_path: Path) -> None:
    with pytest.raises(mf.PlanError, match="tuning needs metrics"):
        asked(metrics=[])
    with pytest.raises(mf.PlanError, match="the floor must be a number"):
        asked(float("nan"))
    with pytest.raises(mf.PlanError, match="no native picture has the number 'psnr'"):
        tune(asked(metrics=[Sharpness()]), Costly(), tmp_path, trials=1)  # type: ignore[arg-type]
    with pytest.raises(mf.PlanError, match="trials must be a whole number from 1"):
        tune(asked(), Costly(), tmp_path, trials=0)  # type: ignore[arg-type]


def test_what_is_said_fits_the_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("t.py").write_text(
        "import mrflow as mf\nfrom tests.test_tune import SPACE, Near\n"
        "tune = mf.Tune(['a', 'b'], [Near()], 'near', 0.5, space=SPACE)\n"
    )
    monkeypatch.setattr("mrflow.cli.tune.load_model", lambda *_: Costly())
    screen = io.StringIO()
    err = Console(file=screen, force_terminal=True, soft_wrap=True, width=60, _environ={"TERM": "xterm"})
    tune_chains(err, TuneOptions(file=Path("t.py"), trials=2, out=Path("tuned"), loading=ModelOptions()))
    said = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "\r", re.sub(r"\x1b\[[\d;]*m", "", screen.getvalue()))
    assert "2 of 3  near" in said and " FLOP " in said
    assert max(len(line) for line in re.split(r"[\r\n]", said)) <= 60


@pytest.mark.slow
def test_the_command(here: Path) -> None:  # noqa: F811
    Path("t.py").write_text(
        "import mrflow as mf\nfrom mrflow.sweep import SceneScore, Space\n"
        "space = Space(steps=(1, 4), refine_steps=(1, 1))\n"
        "tune = mf.Tune(['a big red circle at the left'], [SceneScore()], 'score', 0.5, space=space)\n"
    )
    code, out, err = call("tune", "t.py", "--trials", "3", "--floor", "0.4")
    assert code == 0, err
    assert out.split() == ["tuned/front.py", "tuned/report.html"] and Path("tuned/report.html").is_file()
    assert "native 50" in {r.chain for r in read("tuned")}
    Path("u.py").write_text("x = 1\n")
    code, _, err = call("tune", "u.py")
    assert code == 2 and "defines no tune" in err

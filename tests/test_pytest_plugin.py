"""`pytest --mrflow-laws` on modules of others: the tutorial's, and one whose plug-ins are broken."""

import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

import mrflow as mf
from mrflow.errors import PlanError
from mrflow.testing.items import _classes, _instances, _kinds, _make

ROOT = Path(__file__).parents[1]
MODULE = """
from dataclasses import dataclass, replace

import torch
import mrflow as mf


@dataclass(frozen=True)
class Power(mf.Schedule):
    steps: int

    def __call__(self, start, tokens, model):
        return tuple(start BENT * (1 - i / self.steps) ** 2 for i in range(self.steps + 1))


@dataclass(frozen=True)
class Ralston(mf.Solver):
    evals = 2

    def step(self, v, x, sigma, to, past):
        h, here = to - sigma, v(x, sigma)
        there = v(x + (2 / 3) * h * here, sigma + (2 / 3) * h)
        return x + h * (0.25 * here + 0.75 * there), past


@dataclass(frozen=True)
class Noisy(mf.StochasticEuler):
    pass


@dataclass(frozen=True)
class Strong(mf.Guidance):
    scale: float

    @property
    def passes(self):
        return 1

    def field(self, model, cond, negative, options=mf.FieldOptions()):
        return model.field(cond, options)


@dataclass(frozen=True)
class Twice(mf.Stage[mf.Latents, mf.Latents]):
    def plan(self, spec, model):
        sides = {"height": 2 * spec.height, "width": 2 * spec.width}
        return replace(spec, **sides, sigma=mf.schedules.shift_static(spec.sigma, 2.0))

    def apply(self, state, out, ctx):
        from mrflow.rivals.growth import grow

        return grow(state.data, ctx.noise(out.shape), state.spec.sigma)FLIP


EXAMPLES
"""


class Watched:
    """A plugin that keeps each item's outcome by its name, and what failures print."""

    def __init__(self) -> None:
        self.outcomes = dict[str, str]()
        self.printed = ""

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Every phase: the last one that is not passed counts."""
        name = report.nodeid.partition("::")[2]
        if report.when == "call" or not report.passed:
            self.outcomes[name] = report.outcome
            self.printed += report.longreprtext


def laws(folder: Path, text: str) -> tuple[int, dict[str, str], str]:
    """The exit code of `pytest --mrflow-laws mine.py` in this process, each item's outcome, and what failures print."""
    (folder / "mine.py").write_text(text)
    (folder / "pytest.ini").write_text("[pytest]\n")
    watched, where = Watched(), ["-c", str(folder / "pytest.ini"), "--rootdir", str(folder)]
    line = ["-p", "mrflow.pytest_plugin", "-p", "no:cacheprovider", "--import-mode", "importlib", "--mrflow-laws"]
    sys.modules.pop("mine", None)
    code = pytest.main([*line, *where, str(folder / "mine.py")], plugins=[watched])
    return int(code), watched.outcomes, watched.printed


def test_right_plug_ins_pass_one_test_for_each_law(tmp_path: Path) -> None:
    text = MODULE.replace(" BENT", "").replace("FLIP", "").replace("EXAMPLES", "kept = [Power(3), Strong(2.0)]")
    code, found, out = laws(tmp_path, text)
    assert code == 0, out
    assert set(found.values()) == {"passed"}
    for name in (
        "Power: schedule: scales",
        "Ralston: solver: order on uneven levels",
        "Noisy: solver: marginal",
        "Strong: guidance: passes",
    ):
        assert name in found
    assert {"Twice: stage: level", "Twice: transition: white"} <= set(found)


def test_broken_plug_ins_fail_by_law_and_say_what_to_do(tmp_path: Path) -> None:
    text = MODULE.replace(" BENT", " ** 2").replace("FLIP", ".flip(-2)").replace("EXAMPLES", "")
    code, found, out = laws(tmp_path, text)
    assert code == 1
    failed = {name for name, outcome in found.items() if outcome != "passed"}
    assert failed == {
        "Power: schedule: start",
        "Power: schedule: scales",
        "Twice: transition: picture",
        "Strong: example",
    }
    assert "sigma_0 = start" in out and "the law: The first level is the start." in out
    assert "give the module one: example = Strong(...)" in out


DEFINES = """
from abc import abstractmethod
from dataclasses import dataclass
import mrflow as mf
from mrflow import Linear


@dataclass(frozen=True)
class First(mf.Schedule):
    steps: int = 3

    def __call__(self, start, tokens, model):
        return Linear(self.steps)(start, tokens, model)


class _Hidden(First):
    pass


class Open(mf.Schedule):
    @abstractmethod
    def more(self): ...


class Other:
    pass


@dataclass(frozen=True)
class Last(mf.Euler):
    strength: float


Again = First
chain = mf.Chain([mf.Sample(32, 32, First(5), solver=Last(2.0)), mf.Decode()])
kept = [First(5), (Last(3.0),), Linear(4), 7]
"""


def test_what_a_module_defines_is_found_once_each_and_inside_its_chains() -> None:
    module = ModuleType("defines")
    sys.modules["defines"] = module  # where dataclasses look
    exec(DEFINES, vars(module))
    del sys.modules["defines"]
    names = vars(module)
    assert _classes(module) == [names["First"], names["Last"]]  # no private, abstract, imported or other ones
    found = [one for one in _instances(names.values()) if type(one) in (names["First"], names["Last"])]
    assert {repr(one) for one in found} == {"First(steps=5)", "Last(strength=2.0)", "Last(strength=3.0)"}
    assert len(found) == 3
    assert _make(names["First"]) == names["First"](3) and _make(mf.Shifted) == mf.Shifted(8)
    refused = _make(names["Last"])
    words = "Last needs settings to be made; give the module one: example = Last(...)"
    assert isinstance(refused, PlanError) and str(refused) == words


@pytest.mark.parametrize(
    ("subject", "kinds"),
    [
        (mf.Heun(), {"solver": {"order": None}}),
        (mf.Linear(4), {"schedule": {}}),
        (mf.CFG(2.0), {"guidance": {"model": None}}),
        (mf.Lanczos(2), {"upscaler": {}}),
        (mf.Decode(), {"stage": {"spec": None, "model": None}}),
        (mf.Reinject(0.3), {"stage": {"spec": None, "model": None}}),  # refuses noise
        (mf.Refine(), {"stage": {"spec": None, "model": None}}),  # no larger
        (
            mf.Grow(),
            {"stage": {"spec": None, "model": None}, "transition": {"sigma": 0.6, "size": (8, 8)}},
        ),
        (PlanError("none was made"), {}),
    ],
    ids=repr,
)
def test_each_plug_in_is_held_to_the_laws_of_its_kinds(subject: object, kinds: dict[str, object]) -> None:
    assert _kinds(type(subject), subject) == kinds


@pytest.mark.slow
def test_the_tutorials_own_stage_and_solver_keep_their_laws(tmp_path: Path) -> None:
    page = (ROOT / "docs/tutorial.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", page, re.M | re.S)
    code, found, out = laws(tmp_path, "\n".join(blocks))
    assert code == 0, out
    assert {"Sharpen: stage: promise", "Ralston: solver: order"} <= set(found)

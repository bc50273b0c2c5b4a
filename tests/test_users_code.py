"""Whatever code of users raises, and wherever it goes: one clear line, and files where they were asked for."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from PIL import Image

import mrflow as mf
from mrflow.backbone import Condition, Wrapper
from mrflow.errors import Interruption, MrflowError, PromiseError, PromptError, ResourceError
from mrflow.sweep import Sharpness, run_sweep
from mrflow.sweep.store import read
from tests.test_cli import call, here  # noqa: F401

FILE = """
import os, sys
from dataclasses import dataclass
import mrflow as mf

class Stop(BaseException):
    pass

@dataclass(frozen=True)
class Own(mf.Stage[mf.Pixels, mf.Pixels]):
    def plan(self, spec, model):
        {plan}
        return spec

    def apply(self, state, out, ctx):
        {apply}
        return state.data

chain = mf.recipes.native(size=(64, 64), steps=1) >> Own()
sweep = mf.Sweep({{"own": chain}}, ["a"])
{end}
"""
RAISED = {
    "a class of its own": ("raise Stop('enough')", "Stop: enough"),
    "an exit": ("sys.exit(0)", "SystemExit: 0"),
    "an exit with words": ("sys.exit('enough')", "SystemExit: enough"),
    "a generator's": ("raise GeneratorExit", "GeneratorExit:"),
}


def write(**parts: str) -> None:
    Path("mine.py").write_text(FILE.format(**{"plan": "pass", "apply": "pass", "end": "", **parts}))


@pytest.mark.parametrize("what", RAISED)
@pytest.mark.parametrize(
    ("place", "verb", "where"),
    [
        ("end", "plan", "mine.py, line 21: "),
        ("end", "sweep", "mine.py, line 21: "),
        ("plan", "plan", "stage 3 of 3, Own(): its plan failed with "),
        ("apply", "run", "stage 3 of 3, Own(): failed with "),
    ],
)
def test_whatever_is_raised_ends_in_one_line(what: str, place: str, verb: str, where: str, here: Path) -> None:  # noqa: F811
    statement, words = RAISED[what]
    write(**{place: statement})
    asked = {"plan": ["mine.py:chain"], "run": ["mine.py:chain", "a"], "sweep": ["mine.py"]}[verb]
    code, out, err = call(verb, *asked)
    assert code not in (0, 75, 130, 143) and not out
    assert err.strip().startswith(f"error: {where}{words}") and err.count("\n") == 1, err


class StopError(BaseException):
    """What its author lets nothing handle."""


@dataclass(frozen=True)
class Stops(Sharpness):
    """A metric that stops."""

    def __call__(self, made: object) -> dict[str, float]:
        raise StopError("enough")


def test_what_a_metric_raises_costs_its_own_number(tmp_path: Path) -> None:
    sweep = mf.Sweep({"native": mf.recipes.native(size=(32, 32), steps=1)}, ["a"], model="toy", metrics=[Stops()])
    assert run_sweep(sweep, mf.toy(), tmp_path / "s").unmeasured == 1
    (row,) = read(tmp_path / "s")
    assert row.done and list(row.unmeasured.values()) == ["StopError: enough"]


@pytest.mark.parametrize("error", [StopError("enough"), SystemExit("enough"), Interruption()])
def test_what_a_listener_raises_is_no_error_of_a_stage(error: BaseException) -> None:
    def listen(event: object) -> None:
        if type(event).__name__ == "Stepped":
            raise error

    with pytest.raises(type(error)) as caught:
        mf.run(mf.recipes.native(size=(32, 32), steps=1), mf.toy(), "a", on_event=listen)
    assert caught.value is error


@pytest.mark.parametrize("place", ["end", "apply"])
def test_another_folder_moves_no_output(place: str, here: Path) -> None:  # noqa: F811
    (here / "elsewhere").mkdir()
    write(**{place: "os.chdir(os.path.join(os.path.dirname(__file__), 'elsewhere'))"})
    code, out, err = call("run", "mine.py:chain", "a", "--out", "x.png")
    assert (code, out) == (0, "x.png\n"), err
    code, out, err = call("run", "mine.py:chain", "a")
    assert (code, out) == (0, "a-seed0.png\n"), err
    code, out, err = call("sweep", "mine.py")
    assert (code, out) == (0, "mine-sweep\n"), err
    assert all((here / name).exists() for name in ("x.png", "a-seed0.png", "mine-sweep/sweep.json"))
    assert not any((here / "elsewhere").iterdir())


def test_inspect_describes_the_folder_of_a_sweep(here: Path) -> None:  # noqa: F811
    chains = {
        "native": mf.recipes.native(size=(32, 32), steps=1),
        "stops": mf.recipes.native(size=(32, 32), steps=2) >> Half(),
    }
    run_sweep(mf.Sweep(chains, ["a", "b"], model="toy"), mf.toy(), "s")
    for name in ("s", "s/sweep.json", "s/rows", *map(str, Path("s/rows").glob("*/*.json"))):
        code, out, err = call("inspect", name)
        assert code == 0, err
        first, *lines = out.splitlines()
        assert first == "s: a sweep of 2 chains by toy; 2 rows done, 2 failed, 0 to make"
        assert lines[:2] == ["chain     native: 2 rows done", "chain     stops: 0 rows done, 2 failed"]
        assert "Half(): failed with StopError: enough" in lines[2] and "mrflow report " in lines[3]
    for path in Path("s/rows").glob("*/*.json"):
        path.unlink()
    code, out, _ = call("inspect", "s")
    assert code == 0 and "0 rows done, 0 failed, 4 to make" in out and "run mrflow sweep first" in out
    assert "--verify does nothing with a sweep" in call("inspect", "s", "--verify")[2]


@dataclass(frozen=True)
class Half(mf.Stage[mf.Pixels, mf.Pixels]):
    """A stage that stops."""

    def plan(self, spec: mf.Pixels, model: mf.ModelInfo) -> mf.Pixels:
        return spec

    def apply(self, state: object, out: mf.Pixels, ctx: object) -> torch.Tensor:
        raise StopError("enough")


@pytest.mark.parametrize(("name", "words"), [("x.png", "x.png is a picture"), ("s", "s holds no ")])
def test_what_is_no_model_is_said_before_an_upscaler_is_asked_for(name: str, words: str, here: Path) -> None:  # noqa: F811
    Image.new("RGB", (64, 64)).save("x.png")
    (here / "s").mkdir()
    for verb in (["generate", "a"], ["refine", "x.png"]):
        code, _, err = call(*verb, "--model", name)
        assert code and err.splitlines()[-1].startswith(f"error: {words}"), err


@pytest.mark.parametrize("what", RAISED)
@pytest.mark.parametrize("place", ["scale", "call"])
def test_an_upscaler_that_raises_without_a_model_is_named(what: str, place: str, here: Path) -> None:  # noqa: F811
    statement, words = RAISED[what]
    body = {"scale": "pass", "call": "pass", place: statement}
    Path("up.py").write_text(UPSCALER.format(**body))
    Image.new("RGB", (16, 16)).save("x.png")
    code, out, err = call("refine", "x.png", "--sr-only", "--sr", "up.py:net")
    assert code not in (0, 75, 130, 143) and not out
    assert err.strip().startswith(f"error: Own: failed with {words}") and err.count("\n") == 1, err


UPSCALER = """
import sys
import mrflow as mf

class Stop(BaseException):
    pass

class Own(mf.Upscaler):
    @property
    def scale(self):
        {scale}
        return 2

    def __call__(self, pixels):
        {call}
        return mf.Lanczos(2)(pixels)

net = Own()
"""


class Bad(Wrapper):
    """A model whose `condition` does what it was given."""

    def __init__(self, how: Callable[[Sequence[str]], Any]) -> None:
        super().__init__(mf.toy())
        self.how = how

    def condition(self, prompts: Sequence[str]) -> Condition:
        return cast("Condition", self.how(prompts))


def failing(error: BaseException) -> Callable[[object], None]:
    def fail(_: object) -> None:
        raise error

    return fail


@pytest.mark.parametrize(
    ("how", "kind", "words"),
    [
        (failing(KeyError("x")), PromiseError, r"condition\(\): failed with KeyError: 'x'"),
        (failing(MemoryError()), ResourceError, r"condition\(\): out of memory"),
        (failing(SystemExit(3)), PromiseError, "failed with SystemExit"),
        (failing(PromptError("too long")), PromptError, "^too long"),
        (lambda prompts: None, PromiseError, "must give a Condition for 2 prompts, got NoneType"),
        (lambda prompts: mf.toy().condition(prompts[:1]), PromiseError, "for 2 prompts, got one for 1"),
    ],
    ids=["KeyError", "MemoryError", "SystemExit", "PromptError", "None", "too few"],
)
def test_a_model_that_fails_at_the_prompt_is_named(
    how: Callable[[Sequence[str]], Any], kind: type[MrflowError], words: str
) -> None:
    chain = mf.recipes.native(size=(16, 16), steps=1)
    with pytest.raises(kind, match=words) as caught:
        mf.run(chain, Bad(how), ["a", "b"], seed=0)
    assert kind is PromptError or str(caught.value).startswith("toy, condition()")


def test_ctrl_c_while_a_prompt_is_encoded_stays_itself() -> None:
    with pytest.raises(KeyboardInterrupt):
        mf.run(mf.recipes.native(size=(16, 16), steps=1), Bad(failing(KeyboardInterrupt())), "a", seed=0)

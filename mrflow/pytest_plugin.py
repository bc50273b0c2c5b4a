"""The pytest plugin: `pytest --mrflow-laws my_module.py` holds what a module defines to its laws.

It lies outside `mrflow.testing` because every pytest run where mrflow is installed imports it: without the option it
loads nothing.
"""

import dataclasses
import inspect
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from mrflow.testing import Law


def pytest_addoption(parser: pytest.Parser) -> None:
    """The option."""
    text = (
        "hold each Stage, Solver, Schedule, Guidance and Upscaler of the modules named on the command line to its laws"
    )
    parser.getgroup("mrflow").addoption("--mrflow-laws", action="store_true", default=False, help=text)


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> "LawFile | None":
    """A collector for every Python file that is named on the command line itself."""
    wanted = parent.config.getoption("--mrflow-laws") and file_path.suffix == ".py"
    if not wanted or not parent.session.isinitpath(file_path):
        return None
    made: LawFile = LawFile.from_parent(parent, path=file_path)
    return made


class LawFile(pytest.Module):
    """A module whose plug-ins are held to their laws."""

    def collect(self) -> Iterator["LawItem"]:
        """One item for each law of each plug-in."""
        from mrflow.testing import LAWS

        for cls in _classes(self.obj):
            subjects = [one for one in _instances(vars(self.obj).values()) if type(one) is cls] or [_make(cls)]
            for number, subject in enumerate(subjects):
                kinds = _kinds(cls, subject)
                name = f"{cls.__name__}{number or ''}"
                if not kinds:
                    yield LawItem.from_parent(self, name=f"{name}: example", subject=subject, law=None, settings={})
                for law in LAWS:
                    if law.kind in kinds:
                        settings = kinds[law.kind]
                        label = f"{name}: {law.kind}: {law.name}"
                        yield LawItem.from_parent(self, name=label, subject=subject, law=law, settings=settings)


class LawItem(pytest.Item):
    """One plug-in and one law."""

    def __init__(self, *, subject: object, law: "Law | None", settings: dict[str, object], **more: object) -> None:
        super().__init__(**more)  # type: ignore[arg-type]
        self.subject, self.law, self.settings = subject, law, settings

    def runtest(self) -> None:
        """Hold it."""
        if self.law is None:
            raise self.subject  # type: ignore[misc]
        from mrflow.solvers import StochasticSolver
        from mrflow.testing import measured_order

        if self.settings.get("order", 1) is None:  # measured once for all laws
            stochastic = isinstance(self.subject, StochasticSolver)  # has no order
            self.settings["order"] = 1 if stochastic else max(1, round(measured_order(self.subject)))  # type: ignore[arg-type]
        self.law.hold(self.subject, **self.settings)

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: object = None) -> str:
        """What is broken, and the law; a traceback for any other error."""
        from mrflow.errors import MrflowError
        from mrflow.testing import LawBroken

        if not isinstance(excinfo.value, LawBroken | MrflowError):
            return str(super().repr_failure(excinfo))
        law = self.law
        said = "" if law is None else f"\nthe law: {law.sentence}\n         {law.formula}\n         {law.source}"
        return f"{excinfo.value}{said}"

    def reportinfo(self) -> tuple[Path, int | None, str]:
        """Where its class is."""
        source = self.subject if self.law is not None else None
        line = inspect.getsourcelines(type(source))[1] - 1 if source is not None else None
        return self.path, line, self.name


def _slots() -> tuple[type, ...]:
    from mrflow.guidance import Guidance
    from mrflow.schedules import Schedule
    from mrflow.solvers import Solver
    from mrflow.stage import Stage
    from mrflow.upscaler import Upscaler

    return Stage, Solver, Schedule, Guidance, Upscaler


def _classes(module: object) -> list[type]:
    """The plug-ins that a module defines, in its order, without abstract and private ones."""
    own = [v for v in vars(module).values() if isinstance(v, type) and v.__module__ == getattr(module, "__name__", "")]
    public = [c for c in dict.fromkeys(own) if issubclass(c, _slots()) and not c.__name__.startswith("_")]
    return [c for c in public if not inspect.isabstract(c)]


def _instances(values: Iterable[object]) -> list[object]:
    """Different plug-ins among these values and inside their chains, lists and fields."""
    from mrflow.stage import Chain

    found: list[object] = []

    def look(value: object) -> None:
        if isinstance(value, list | tuple | Chain):
            for each in value:
                look(each)
        elif isinstance(value, _slots()):
            if repr(value) not in map(repr, found):
                found.append(value)
            if dataclasses.is_dataclass(value):
                for each in dataclasses.fields(value):
                    look(getattr(value, each.name))

    for value in list(values):
        look(value)
    return found


def _make(cls: type) -> object:
    """One with default settings, or of 8 steps; else the error that says what to do."""
    from mrflow.errors import PlanError

    for settings in ({}, {"steps": 8}):
        try:
            return cls(**settings)
        except TypeError:
            continue
    return PlanError(f"{cls.__name__} needs settings to be made; give the module one: example = {cls.__name__}(...)")


def _kinds(cls: type, subject: object) -> "dict[str, dict[str, object]]":
    """The kinds of laws that a plug-in is held to, each with its settings; none where there is no plug-in."""
    from mrflow.errors import MrflowError
    from mrflow.guidance import Guidance
    from mrflow.schedules import Schedule
    from mrflow.solvers import Solver
    from mrflow.spec import Latents
    from mrflow.stage import Stage
    from mrflow.testing import TOY
    from mrflow.upscaler import Upscaler

    if isinstance(subject, Solver):
        return {"solver": {"order": getattr(subject, "order", None)}}
    if isinstance(subject, Schedule):
        return {"schedule": {}}
    if isinstance(subject, Guidance):
        return {"guidance": {"model": None}}
    if isinstance(subject, Upscaler):
        return {"upscaler": {}}
    if not isinstance(subject, Stage):
        return {}
    kinds: dict[str, dict[str, object]] = {"stage": {"spec": None, "model": None}}
    if issubclass(cls.takes, Latents) and issubclass(cls.gives, Latents):  # type: ignore[attr-defined]
        try:
            out = subject.plan(Latents(1, 8, 8, TOY.space, 0.6), TOY)
        except MrflowError:
            return kinds
        if isinstance(out, Latents) and out.height > 8:
            kinds["transition"] = {"sigma": 0.6, "size": (8, 8)}
    return kinds

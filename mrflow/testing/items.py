"""Laws as tests of pytest: what `pytest --mrflow-laws` collects (`mrflow.pytest_plugin`)."""

import dataclasses
import inspect
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from mrflow.errors import MrflowError, PlanError
from mrflow.guidance import Guidance
from mrflow.protocols.upscaler import Upscaler
from mrflow.schedules import Schedule
from mrflow.solvers import Solver, StochasticSolver
from mrflow.spec import Latents
from mrflow.stage import Chain, Stage
from mrflow.testing import LAWS, TOY, Law, LawBroken, measured_order


class LawFile(pytest.Module):
    """A module whose plug-ins are held to their laws."""

    def collect(self) -> Iterator["LawItem"]:
        """One item for each law of each plug-in."""
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

    def __init__(self, *, subject: object, law: Law | None, settings: dict[str, object], **more: object) -> None:
        super().__init__(**more)  # type: ignore[arg-type]
        self.subject, self.law, self.settings = subject, law, settings

    def runtest(self) -> None:
        """Hold it."""
        if self.law is None:
            raise self.subject  # type: ignore[misc]
        if self.settings.get("order", 1) is None:  # measured once for all laws
            stochastic = isinstance(self.subject, StochasticSolver)  # has no order
            self.settings["order"] = 1 if stochastic else max(1, round(measured_order(self.subject)))  # type: ignore[arg-type]
        self.law.hold(self.subject, **self.settings)

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: object = None) -> str:
        """What is broken, and the law; a traceback for any other error."""
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


SLOTS = (Stage, Solver, Schedule, Guidance, Upscaler)


def _classes(module: object) -> list[type]:
    """The plug-ins that a module defines, in its order, without abstract and private ones."""
    own = [v for v in vars(module).values() if isinstance(v, type) and v.__module__ == getattr(module, "__name__", "")]
    public = [c for c in dict.fromkeys(own) if issubclass(c, SLOTS) and not c.__name__.startswith("_")]
    return [c for c in public if not inspect.isabstract(c)]


def _instances(values: Iterable[object]) -> list[object]:
    """Different plug-ins among these values and inside their chains, lists and fields."""
    found: list[object] = []

    def look(value: object) -> None:
        if isinstance(value, list | tuple | Chain):
            for each in value:
                look(each)
        elif isinstance(value, SLOTS):
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
    for settings in ({}, {"steps": 8}):
        try:
            return cls(**settings)
        except TypeError:
            continue
    return PlanError(f"{cls.__name__} needs settings to be made; give the module one: example = {cls.__name__}(...)")


def _kinds(cls: type, subject: object) -> dict[str, dict[str, object]]:
    """The kinds of laws that a plug-in is held to, each with its settings; none where there is no plug-in."""
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

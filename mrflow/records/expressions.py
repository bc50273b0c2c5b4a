"""Slots as text, in the words of Python: `Karras(12, rho=5)`, `CFG(3.5)`, `TeaCache(0.25)`, and back.

Nothing is evaluated. A text is a public name of mrflow, or a call of one with literals and further such calls; which
names there are, and what they take, is asked of the public types themselves.
"""

import ast
import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from functools import partial
from typing import TypeVar, cast, get_type_hints

import mrflow
from mrflow.errors import MrflowError, PlanError
from mrflow.machine.failures import name_stage, passes
from mrflow.records.chains import ROOMS, name_of, public

T = TypeVar("T")
LONGEST = 100_000  # characters of a text; a thousand levels take 22,000


def parse(text: str, kind: Callable[..., T], *, names: Mapping[str, object] = {}, **fill: object) -> T:
    """The slot that a text describes: `parse("Karras(12, rho=5)", mf.Schedule)`.

    A name without parentheses is called without arguments; `mf.` before a name, and `caches.` before a cache's, may be
    left out. Constructors such as `Shift.fixed(3)` work too. `names` are further types and values, of your own file;
    `fill` holds fields for types that need them where the text leaves them out, such as `steps=12`.

    Raises:
        PlanError: the text is none of these, or the type refuses its arguments; the text says what it takes.
    """
    whole = cast("type", kind)  # asked for as what makes it, so that type checkers take abstract classes
    what = whole.__name__.lower()
    try:
        if len(text) > LONGEST:
            raise ValueError
        tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise PlanError(f"{text[:80]!r} is no {what}; write a name or a call, such as {_example(whole)}") from None
    try:
        value = _Reader(whole, names, fill).value(tree, wanted=True)
    except RecursionError:
        raise PlanError(f"{text[:80]!r} is nested too deeply") from None
    if not isinstance(value, whole):
        raise PlanError(f"{text[:80]!r} is no {what}; there are {', '.join(names_of(whole))}")
    return cast("T", value)


def names_of(kind: type) -> list[str]:
    """The public names of mrflow's types of a kind that can be made: `names_of(mf.Solver)`."""
    return sorted(name.rpartition(".")[2] for name, each in _public_types() if _made(each, kind))


def _public_types() -> Iterator[tuple[str, type]]:
    inside = [f"{room}.{name}" for room in ROOMS for name in vars(getattr(mrflow, room))]
    for name in (*dir(mrflow), *inside):
        found = None if name.startswith("_") else public(name)
        if isinstance(found, type):
            yield name, found


def _made(cls: type, kind: type) -> bool:
    return issubclass(cls, kind) and dataclasses.is_dataclass(cls) and not inspect.isabstract(cls)


def _example(kind: type) -> str:
    names = names_of(kind)
    return names[0] if names else "Name(1)"


class _Reader:
    """Makes the values of one text."""

    def __init__(self, kind: type, names: Mapping[str, object], fill: Mapping[str, object]) -> None:
        self._kind, self._names, self._fill = kind, names, fill

    def value(self, node: ast.expr, *, wanted: bool = False) -> object:
        """What a part of the text stands for; `wanted` where it is the whole."""
        if isinstance(node, ast.Tuple | ast.List):
            return tuple(self.value(each) for each in node.elts)
        if isinstance(node, ast.Call):
            return self._call(node, wanted=wanted)
        if isinstance(node, ast.Name) and node.id in ("inf", "nan") and node.id not in self._names:
            return float(node.id)  # as `expression` writes them; what takes none refuses it
        if isinstance(node, ast.Name | ast.Attribute):
            found = self._name(ast.unparse(node), wanted=wanted)
            return self._make(found, (), {}) if _makes(found) else found
        try:
            return ast.literal_eval(node)
        except (ValueError, TypeError, SyntaxError):
            raise PlanError(
                f"{ast.unparse(node)[:80]!r} is neither a name, a number, a text, nor a list of these"
            ) from None

    def _call(self, node: ast.Call, *, wanted: bool) -> object:
        found = self._name(ast.unparse(node.func), wanted=wanted)
        if not _makes(found):
            raise PlanError(f"{ast.unparse(node.func)} is a value; leave out what follows it")
        if any(isinstance(each, ast.Starred) for each in node.args) or any(k.arg is None for k in node.keywords):
            raise PlanError("* and ** spread nothing here; write the arguments out")
        values = tuple(self.value(each) for each in node.args)
        return self._make(found, values, {str(k.arg): self.value(k.value) for k in node.keywords})

    def _name(self, written: str, *, wanted: bool) -> object:
        """A type, a constructor of one, or a value of the caller's by its name."""
        if written in self._names:
            return self._names[written]
        name = written.removeprefix("mrflow.").removeprefix("mf.")
        for each in (name, *(f"{room}.{name}" for room in ROOMS)):
            found = public(each)
            if (isinstance(found, type) and dataclasses.is_dataclass(found)) or isinstance(found, self._kind):
                return found
        first, _, constructor = name.rpartition(".")
        owner = public(first) if first and not constructor.startswith("_") else None
        if isinstance(owner, type) and isinstance(vars(owner).get(constructor), staticmethod | classmethod):
            return getattr(owner, constructor)
        kind = self._kind if wanted else object
        known = [*names_of(kind), *(own for own, value in self._names.items() if _is(value, kind))]
        near = get_close_matches(name.lower(), [each.lower() for each in known], 1, 0.6)
        guess = next((f"; did you mean {each}?" for each in known if [each.lower()] == near), "")
        listed = f"{' There' if guess else '; there'} are {', '.join(known)}" if wanted else ""
        raise PlanError(f"there is no {kind.__name__.lower() if wanted else 'type'} {written!r}{guess}{listed}")

    def _make(self, make: object, args: tuple[object, ...], given: dict[str, object]) -> object:
        """An instance, from checked arguments."""
        form = _signature(make)
        try:
            for name in list(form.parameters)[len(args) :]:
                if form.parameters[name].default is inspect.Parameter.empty and name in self._fill:
                    given.setdefault(name, self._fill[name])
            bound = form.bind(*args, **given)
        except TypeError as error:
            raise PlanError(f"{_written(make, form)}: {error}") from None
        if isinstance(make, type):
            hints = get_type_hints(make)
            for name, value in bound.arguments.items():
                hint = hints.get(name)
                if not isinstance(hint, type) or not hint.__module__.startswith("mrflow."):
                    continue
                if not isinstance(value, hint):
                    raise PlanError(f"{_written(make, form)}: {name} must be a {hint.__name__}, got {value!r}")
        try:
            return cast("type", make)(*args, **given)
        except MrflowError as error:
            raise name_stage(error, getattr(make, "__qualname__", "")) from None
        except BaseException as error:  # a type of the user's, or arguments that its checks did not foresee
            if passes(error):
                raise
            raise PlanError(f"{_written(make, form)}: {type(error).__name__}: {error}") from None


def _makes(found: object) -> bool:
    """Whether a name stands for a type or a function, not for a value: a schedule can be called too."""
    return isinstance(found, type | partial) or inspect.isroutine(found)


def _is(value: object, kind: type) -> bool:
    return isinstance(value, kind) or (isinstance(value, type) and _made(value, kind))


def _signature(make: object) -> inspect.Signature:
    form = inspect.signature(cast("type", make))
    plain = [p.replace(annotation=inspect.Parameter.empty) for p in form.parameters.values()]
    return form.replace(parameters=plain, return_annotation=inspect.Signature.empty)


def _written(make: object, form: inspect.Signature) -> str:
    return f"{getattr(make, '__qualname__', make)}{form}"


def expression(value: object, prefix: str = "", *, full: bool = False) -> str:
    """Text that makes a stage, a slot or a plain value again, settings at their defaults left out: what `parse` reads.

    `value` is an object, or the plain data of one in a record. `prefix` goes before mrflow's names (`mf.`). `full`
    leaves out none of the outermost settings but those that are None or empty.
    """
    if isinstance(value, Mapping) and "type" in value:
        data = dict(cast("Mapping[str, object]", value))
        name = str(data.pop("type")).rpartition(":")[2]
        cls = public(name)
        return _call_of(name, cls if isinstance(cls, type) else None, data, prefix, full=full)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        data = {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if f.init}
        own = name_of(type(value))
        return _call_of(own.rpartition(":")[2], type(value), data, "" if ":" in own else prefix, full=full)
    if isinstance(value, str) or not isinstance(value, Sequence):
        return repr(value)
    inside = [expression(each, prefix) for each in cast("Sequence[object]", value)]
    return f"({', '.join(inside)}{',' if len(inside) == 1 else ''})"


def _call_of(name: str, cls: type | None, data: Mapping[str, object], prefix: str, *, full: bool) -> str:
    """A call: what can stand by position does, up to the first field that is left out."""
    defaults: dict[str, object] = {}
    leading: list[str] = []
    if cls is not None and dataclasses.is_dataclass(cls):
        for f in dataclasses.fields(cls):
            if f.default is not dataclasses.MISSING:
                defaults[f.name] = f.default
            elif f.default_factory is not dataclasses.MISSING:
                defaults[f.name] = f.default_factory()
            leading += [f.name] if f.init and not f.kw_only else []
    parts, placed = list[str](), list[str]()
    for key in (*(k for k in leading if k in data), *(k for k in data if k not in leading)):
        text = expression(data[key], prefix)
        if text in ("None", "()") if full else key in defaults and text == expression(defaults[key], prefix):
            continue
        place = leading[: len(parts) + 1] == [*placed, key]
        placed += [key] if place else []
        parts.append(text if place else f"{key}={text}")
    return f"{prefix}{name}({', '.join(parts)})"

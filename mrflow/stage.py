"""A stage first *plans*: from facts it says, without a tensor, what it will give. Then it *applies*: it makes that.

`>>` joins stages into a chain. What fits is checked by the editor (types), when chained (`ChainError`), by `plan`
(sizes, noise levels, latent space, cost; no weights), and in `run` (the tensor against the promise).
"""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar, get_args, get_origin, overload

from torch import Tensor

from mrflow._checks import check_whole
from mrflow.errors import ChainError, MrflowError, PlanError, named
from mrflow.spec import Latents, ModelInfo, Pixels, Spec, Start, State

if TYPE_CHECKING:
    from mrflow.backbone import Backbone
    from mrflow.runner import Context

A = TypeVar("A", bound=Spec)
B = TypeVar("B", bound=Spec)
C = TypeVar("C", bound=Spec)


@dataclass(frozen=True)
class Work:
    """What a stage will cost, for the whole batch: network forwards a picture, and floating-point operations.

    `negative` is true where it needs the negative prompt, `estimated` where the picture decides how much there is.
    """

    nfe: int = 0
    flops: float = 0.0
    negative: bool = False
    estimated: bool = False

    def __add__(self, other: "Work") -> "Work":
        return Work(
            self.nfe + other.nfe,
            self.flops + other.flops,
            self.negative or other.negative,
            self.estimated or other.estimated,
        )


class Stage(ABC, Generic[A, B]):
    """One step of a chain, from a value of kind A to a value of kind B: subclass it as a frozen dataclass.

    Its fields are its settings, its `repr` is its record. It holds no state and no tensors. What several stages share
    may be a base between, generic in what it leaves open: `class Base(Stage[S, Latents])`, `class Mine(Base[Start])`.
    """

    scope: ClassVar[str]  # names its noise, so it stays when the class is renamed; the class's own name by default
    takes: ClassVar[type[Spec]]
    gives: ClassVar[type[Spec]]
    _ends: ClassVar[tuple[Any, ...]] = ()  # both as written, with the type variables of a generic base

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "scope" not in cls.__dict__:
            cls.scope = cls.__name__
        for base in cls.__dict__.get("__orig_bases__", ()):
            origin: Any = get_origin(base)
            if origin is Stage:
                cls._ends = get_args(base)
            elif isinstance(origin, type) and issubclass(origin, Stage):
                given = dict(zip(origin.__parameters__, get_args(base), strict=True))  # type: ignore[attr-defined]
                cls._ends = tuple(given.get(end, end) for end in origin._ends)
        if cls._ends and all(isinstance(end, type) and issubclass(end, Spec) for end in cls._ends):
            cls.takes, cls.gives = cls._ends
        left_open = "_ends" in cls.__dict__ and any(isinstance(end, TypeVar) for end in cls._ends)
        if not left_open and not hasattr(cls, "takes"):
            raise ChainError(
                f"{cls.__name__} does not say what it takes and gives; write {cls.__name__}(Stage[Pixels, Pixels])"
            )

    @abstractmethod
    def plan(self, spec: A, model: ModelInfo) -> B:
        """What this stage will give for `spec`; no tensors. Raise PlanError where it cannot."""

    @abstractmethod
    def apply(self, state: State[A], out: B, ctx: "Context") -> Tensor:
        """Make the tensor that `out` promises, without changing `state`."""

    def work(self, spec: A, out: B, model: ModelInfo) -> Work:
        """What it costs; nothing worth counting unless a subclass says so."""
        return Work()

    def evaluations(self, spec: A, model: ModelInfo) -> tuple[float, ...]:
        """Every noise level at which it asks the model for its field, in order; none unless a subclass says so."""
        return ()

    def plan_row(self, spec: A, model: ModelInfo) -> "PlannedStage":
        """All that a plan holds of this stage. Override it where these share what is worth computing once."""
        out = self.plan(spec, model)
        check_gives(self, out)
        work, evaluations = self.work(spec, out, model), self.evaluations(spec, model)
        return PlannedStage(type(self).__name__, spec, out, work, evaluations=evaluations)

    def check(self, model: "Backbone") -> None:
        """Raise PlanError for what only the loaded model can tell; called before any work."""

    @overload
    def __rshift__(self, other: "Stage[B, C]") -> "Chain[A, C]": ...
    @overload
    def __rshift__(self, other: "Chain[B, C]") -> "Chain[A, C]": ...
    def __rshift__(self, other: "Stage[B, C] | Chain[B, C]") -> "Chain[A, C]":
        return Chain[A, B]((self,)) >> other


AnyStage = Stage[Any, Any]  # for code that takes whatever stage it is given


@dataclass(frozen=True)
class Chain(Generic[A, B]):
    """Stages that fit together. Build it with `>>`; a slice of it is a chain too."""

    stages: tuple["Stage[A, B] | AnyStage", ...]

    def __post_init__(self) -> None:
        if not self.stages:
            raise ChainError("a chain needs at least one stage")
        for number, stage in enumerate(self.stages, 1):
            _check_is_stage(stage, number)
        for number, (a, b) in enumerate(zip(self.stages, self.stages[1:], strict=False), 1):
            if not issubclass(a.gives, b.takes):
                hint = _BETWEEN.get((a.gives, b.takes), "")
                raise ChainError(
                    f"{type(a).__name__} (stage {number}) gives {a.gives.__name__}, but "
                    f"{type(b).__name__} (stage {number + 1}) takes {b.takes.__name__}.{hint}"
                )

    @property
    def takes(self) -> type[Spec]:
        """The kind of value that the first stage takes."""
        return self.stages[0].takes

    @property
    def gives(self) -> type[Spec]:
        """The kind of value that the last stage gives."""
        return self.stages[-1].gives

    @overload
    def __rshift__(self, other: Stage[B, C]) -> "Chain[A, C]": ...
    @overload
    def __rshift__(self, other: "Chain[B, C]") -> "Chain[A, C]": ...
    def __rshift__(self, other: "Stage[B, C] | Chain[B, C]") -> "Chain[A, C]":
        if not isinstance(other, Chain):
            _check_is_stage(other, len(self.stages) + 1)
        more = other.stages if isinstance(other, Chain) else (other,)
        return Chain[A, C]((*self.stages, *more))

    def __len__(self) -> int:
        return len(self.stages)

    def __iter__(self) -> Iterator[AnyStage]:
        return iter(self.stages)

    def __getitem__(self, part: slice) -> "Chain[Any, Any]":
        return Chain[Any, Any](self.stages[part])

    def __str__(self) -> str:
        return "\n>> ".join(repr(stage) for stage in self.stages)


AnyChain = Chain[Any, Any]
_BETWEEN: dict[tuple[type[Spec], type[Spec]], str] = {
    (Latents, Pixels): " Put Decode() between them.",
    (Pixels, Latents): " Put Encode() between them.",
    (Start, Pixels): " Put Sample(...) >> Decode() before it.",
}


def _check_is_stage(stage: object, number: int) -> None:
    if isinstance(stage, Stage):
        return
    if isinstance(stage, type) and issubclass(stage, Stage):
        raise ChainError(f"stage {number} is the class {stage.__name__}; make one: {stage.__name__}(...)")
    raise ChainError(f"stage {number} is {stage!r}, which is no stage; use an object of a subclass of mrflow.Stage")


def check_gives(stage: AnyStage, out: object) -> None:
    """Refuse a planned value of another kind than the stage is declared to give.

    Raises:
        PlanError: naming both.
    """
    if not isinstance(out, stage.gives):
        raise PlanError(f"its plan gave {out!r}, but it is declared to give {stage.gives.__name__}")


@dataclass(frozen=True)
class PlannedStage:
    """One row of a plan.

    `sigmas` are the noise levels of its schedule, from where it begins to where it ends; `evaluations` those at which
    the model is asked, in order.
    """

    name: str
    spec: Spec
    out: Spec
    work: Work
    sigmas: tuple[float, ...] = ()
    evaluations: tuple[float, ...] = ()


@dataclass(frozen=True)
class Plan:
    """What every stage of a chain will give and cost, found without weights. `print` it."""

    model: ModelInfo
    rows: tuple[PlannedStage, ...]

    @property
    def out(self) -> Spec:
        """What the chain gives in the end."""
        return self.rows[-1].out

    @property
    def work(self) -> Work:
        """The cost of all stages together."""
        return sum((row.work for row in self.rows), Work())

    @property
    def nfe(self) -> int:
        """Network forwards for one picture."""
        return self.work.nfe

    def __str__(self) -> str:
        cells = [(str(i), r.name, str(r.spec), str(r.out), r.work) for i, r in enumerate(self.rows, 1)]
        name, spec, out = (max(len(c[k]) for c in cells) for k in (1, 2, 3))  # type: ignore[arg-type]
        lines = []
        for number, stage, before, after, work in cells:
            about = "~" if work.estimated else ""
            cost = (
                f"  {about + str(work.nfe or ''):>4}  {human(work.flops):>9}"
                if any(c[4] != Work() for c in cells)
                else ""
            )
            lines.append(f"{number:<2} {stage:<{name}}  {before:<{spec}} -> {after:<{out}}{cost}".rstrip())
        total = self.work
        if total != Work():
            about = "~" if total.estimated else ""
            lines.append(f"{'':<{name + spec + out + 9}}  {about + str(total.nfe):>4}  {human(total.flops):>9}")
            lines.insert(0, f"{'':<{name + spec + out + 9}}   NFE       FLOP")
        if total.estimated:
            lines.append("~ an estimate: the picture decides what its cache leaves out; a run counts it")
        return "\n".join(lines)


def human(value: float) -> str:
    """A count with three digits and a unit prefix: 1.23 T."""
    if not value:
        return ""
    for factor, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")):
        if value >= factor:
            return f"{value / factor:.3g} {prefix}"
    return f"{value:.3g}"


def plan(
    chain: Chain[A, B] | Stage[A, B], model: "ModelInfo | Backbone", *, batch: int = 1, start: Spec | None = None
) -> Plan:
    """Check a whole chain for a model and count its cost, in microseconds and without weights.

    `model` is a model's facts, or a loaded model; `start` what the chain is given, `Start(batch)` unless said.

    Raises:
        PlanError: a stage cannot do what it is asked; the text names the stage and what would work.
    """
    check_whole("batch", batch, 1, wanted="a whole number above 0")
    if not isinstance(chain, Chain | Stage):
        raise PlanError(f"a chain of stages is wanted, got {chain!r}; join stages with >>")
    model = getattr(model, "info", model)
    if not isinstance(model, ModelInfo):
        raise PlanError(f"the facts of a model are wanted, such as mf.load('pocket').info, got {model!r}")
    stages = chain.stages if isinstance(chain, Chain) else Chain[A, B]((chain,)).stages
    spec: Spec = Start(batch) if start is None else start
    if not isinstance(spec, stages[0].takes):
        raise PlanError(
            f"the chain begins with {type(stages[0]).__name__}, which takes {stages[0].takes.__name__}, "
            f"but is given {spec}" + ("; pass start=" if start is None else "")
        )
    rows: list[PlannedStage] = []
    for number, stage in enumerate(stages, 1):
        where = f"stage {number} of {len(stages)}, {short(stage)}"
        try:
            rows.append(stage.plan_row(spec, model))  # type: ignore[arg-type]  # pyright: ignore
        except MrflowError as error:
            raise named(error, where) from error
        except Exception as error:
            raise PlanError(f"{where}: its plan failed with {type(error).__name__}: {error}") from error
        spec = rows[-1].out
    return Plan(model, tuple(rows))


def short(stage: object) -> str:
    """`Sample(...)` or `Decode()`: a stage's name for errors."""
    plain = dataclasses.is_dataclass(stage) and not dataclasses.fields(stage)
    return f"{type(stage).__name__}({'' if plain else '...'})"

"""A stage first *plans*: from facts it says, without a tensor, what it will give. Then it *applies*: it makes that.

`>>` joins stages into a chain. What fits is checked by the editor (types), when chained (`ChainError`), by `plan`
(sizes, noise levels, latent space, cost; no weights), and in `run` (the tensor against the promise).
"""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, ClassVar, Generic, TypeVar, get_args, get_origin, overload

import torch
from torch import Tensor

from mrflow._checks import check_whole
from mrflow.backbone import Backbone, Condition, FieldOptions
from mrflow.checkpoints.adapters import Lora, PiFlow
from mrflow.display import html
from mrflow.display.notes import add_forwards
from mrflow.errors import ChainError, MrflowError, NonFiniteError, PlanError, PromiseError
from mrflow.flow import finite
from mrflow.guidance import Distilled, Guidance
from mrflow.machine.devices import to_device
from mrflow.machine.failures import name_stage, passes, words_of
from mrflow.model_info import ModelInfo
from mrflow.noise import Noise, PerItem
from mrflow.protocols.policies import GM, PolicyField, automatic, follow
from mrflow.protocols.tokens import on_tokens
from mrflow.records.readable import describe_stage
from mrflow.schedules import Sigmas
from mrflow.solvers import FiniteCheck, Solver, Step, integrate
from mrflow.spec import Latents, Pixels, Spec, Start, State

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

    def check(self, model: Backbone) -> None:
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

    def __repr__(self) -> str:
        return f"Chain({' >> '.join(type(stage).__name__ for stage in self.stages)})"

    def _repr_html_(self) -> str:
        """For notebooks: every stage with its settings."""
        lines = [(number, *describe_stage(stage)) for number, stage in enumerate(self.stages, 1)]
        return html.html_table(("", "stage", "settings"), lines)


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
    the model is asked, in order. One forward is given `tokens` image tokens (0: all of what comes out), and what comes
    out is made of `parts` such forwards.
    """

    name: str
    spec: Spec
    out: Spec
    work: Work
    sigmas: tuple[float, ...] = ()
    evaluations: tuple[float, ...] = ()
    tokens: int = 0
    parts: int = 1


@dataclass(frozen=True)
class Plan:
    """What every stage of a chain will give and cost, found without weights. `print` it."""

    model: ModelInfo
    rows: tuple[PlannedStage, ...]
    stages: tuple[AnyStage, ...] = ()

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

    @property
    def notes(self) -> tuple[str, ...]:
        """What should be known before the chain runs: sizes that the model was not trained at. `run` tells it too."""
        sides, scale = self.model.sides, self.model.space.downscale
        grids = [row.out.shape[-2:] for row in self.rows if row.sigmas and isinstance(row.out, Latents)]
        sizes = dict.fromkeys((y * scale, x * scale) for y, x in grids)
        odd = [f"{height}x{width}" for height, width in sizes if height != width or height not in sides]
        if not sides or not odd:
            return ()
        known = ", ".join(map(str, sides))
        return (f"{self.model.name} was trained on squares of {known} pixels; it draws worse at {', '.join(odd)}",)

    def __repr__(self) -> str:
        flops = f", {human(self.work.flops, 'FLOP')}" if self.work.flops else ""
        return f"Plan({self.model.name}: {len(self.rows)} stages, NFE {self.nfe}{flops}, {self.out})"

    def _repr_html_(self) -> str:
        """For notebooks: what each stage takes, gives and costs."""
        lines = [
            (i, r.name, r.spec, r.out, r.work.nfe or None, human(r.work.flops)) for i, r in enumerate(self.rows, 1)
        ]
        return html.html_table(("", "stage", "takes", "gives", "NFE", "FLOP"), lines, caption=repr(self))

    def __str__(self) -> str:
        return self.table()

    def table(self, columns: int | None = None) -> str:
        """Stages and their work in lines; where these are longer than `columns`, without what goes into each stage."""
        ways = [self._table(arrow) for arrow in (" -> ", "-> ", "")]
        return next((way for way in ways if columns is None or max(map(len, way.splitlines())) <= columns), ways[-1])

    def _table(self, arrow: str) -> str:
        with_input = arrow.startswith(" ")
        cells = [
            (str(i), r.name, f"{r.spec if with_input else ''}", str(r.out), r.work) for i, r in enumerate(self.rows, 1)
        ]
        name, spec, out = (max(len(c[k]) for c in cells) for k in (1, 2, 3))  # type: ignore[arg-type]
        lines = list[str]()
        for number, stage, before, after, work in cells:
            about = "~" if work.estimated else ""
            cost = (
                f"  {about + str(work.nfe or ''):>4}  {human(work.flops):>9}"
                if any(c[4] != Work() for c in cells)
                else ""
            )
            lines.append(f"{number:<2} {stage:<{name}}  {before:<{spec}}{arrow}{after:<{out}}{cost}".rstrip())
        total, pad = self.work, name + spec + len(arrow) + out + 5
        if total != Work():
            about = "~" if total.estimated else ""
            lines.append(f"{'':<{pad}}  {about + str(total.nfe):>4}  {human(total.flops):>9}")
            lines.insert(0, f"{'':<{pad}}   NFE       FLOP")
        if total.estimated:
            lines.append("~ an estimate: the picture decides what its cache leaves out; a run counts it")
        return "\n".join(lines)


def human(value: float, unit: str = "") -> str:
    """A count with three digits and a prefix of its unit: 1.23 T, or 1.23 TFLOP."""
    if not value:
        return unit and f"0 {unit}"
    for factor, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")):
        if value >= factor:
            return f"{value / factor:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}".rstrip()


def plan(
    chain: Chain[A, B] | Stage[A, B], model: "ModelInfo | Backbone", *, batch: int = 1, start: Spec | None = None
) -> Plan:
    """Check a whole chain for a model and count its cost, in microseconds and without weights.

    `model` is a model's facts, or a loaded model; `start` what the chain is given (default: `Start(batch)`).

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
            raise name_stage(error, where) from error
        except BaseException as error:
            if passes(error):
                raise
            raise PlanError(f"{where}: its plan failed with {type(error).__name__}: {words_of(error)}") from error
        spec = rows[-1].out
    return Plan(model, tuple(rows), stages)


def short(stage: object) -> str:
    """`Sample(...)`, or `Decode()` where every setting is the default: a stage's name for errors."""
    plain = dataclasses.is_dataclass(stage) and all(
        field.default is not dataclasses.MISSING and getattr(stage, field.name) == field.default
        for field in dataclasses.fields(stage)
    )
    return f"{type(stage).__name__}({'' if plain else '...'})"


@dataclass(frozen=True)
class Context:
    """What a stage may use. Nothing in it changes while a chain runs."""

    model: Backbone
    cond: Condition
    negative: Condition | None
    seeds: tuple[int, ...]
    scope: str
    on_step: Callable[[Step], None] | None = None
    prompts: tuple[str, ...] = ()
    sigmas: Sigmas = ()  # of the stage's schedule, as planned

    def noise(self, shape: tuple[int, ...], *, source: Noise = PerItem(), draw: int = 0) -> Tensor:
        """Standard normal float32 of `shape` on the model's device; `draw` tells draws within one stage apart."""
        return to_device(source(self.seeds, shape, scope=self.scope, draw=draw), self.model.device)

    def integrate(
        self,
        solver: Solver,
        guidance: Guidance,
        x: Tensor,
        sigmas: Sigmas,
        *,
        source: Noise = PerItem(),
        options: FieldOptions = FieldOptions(),
        watch: Callable[[Step], None] | None = None,
    ) -> Tensor:
        """Integrate the model's guided field from x along `sigmas`; `watch` is told of each step.

        `options` says what the field is to have: a cache, adapters, positions. Its sigmas are those the solver asks at.
        """
        if solver.estimated and len(x) > 1:  # each picture has steps of its own
            inner = (self.only(i) for i in range(len(x)))
            parts = zip(inner, x.split(1), strict=True)
            return torch.cat(
                [one.integrate(solver, guidance, item, sigmas, options=options, watch=watch) for one, item in parts]
            )
        draws = iter(range(1, 1 + len(sigmas)))
        info, asked = self.model.info, list[float]()
        options = replace(options, sigmas=() if solver.estimated else tuple(solver.points(sigmas)))
        field = guidance.field(self.model, self.cond, self.negative, options)
        shape, tokens = tuple(x.shape), x.shape[-2] * x.shape[-1] // info.space.patch**2
        packed = on_tokens(field, *x.shape[-2:]) if solver.pointwise else None

        def there(latents: Tensor) -> Tensor:
            return latents if packed is None else packed.pack(latents)

        def back(state: Tensor) -> Tensor:
            return state if packed is None else packed.unpack(state)

        def told(step: Step) -> None:
            step = replace(step, x=back(step.x), denoised=back(step.denoised))
            for listener in (self.on_step, watch):
                if listener is not None:
                    listener(step)

        out = integrate(
            solver,
            field if packed is None else packed.ask,
            there(x),
            sigmas,
            on_step=told if self.on_step or watch else None,
            on_evaluation=asked.append,
            facts=(self.model.info.name,),
            noise=lambda: there(self.noise(shape, source=source, draw=next(draws))),
        )
        if options.cache is None and info.cache is None:
            evals = guidance.evals(asked) * len(x)
            add_forwards(None, evals, evals, evals, tokens=tokens)
        return back(out)

    def follow(
        self,
        adapter: PiFlow,
        x: Tensor,
        sigmas: Sigmas,
        *,
        guidance: Guidance | None = None,
        lora: Sequence[Lora] = (),
    ) -> Tensor:
        """Ask the network for a policy at each level but the last, and follow it to the next one."""
        value = guidance.value if isinstance(guidance, Distilled) else None
        steps, check = len(sigmas) - 1, FiniteCheck()
        heat = automatic(steps) if adapter.temperature == "auto" else adapter.temperature
        options = FieldOptions(guidance=value, sigmas=tuple(sigmas[:-1]), loras=tuple(lora), policy=adapter)
        field = self.model.field(self.cond, options)
        if not isinstance(field, PolicyField):
            raise PlanError(f"{self.model.info.name} gave a velocity where it was asked for pi-Flow's policies")
        for index, (sigma, to) in enumerate(pairwise(sigmas), 1):
            policy = field.policy(x, sigma)
            if heat is not None and index < steps and isinstance(policy, GM):
                policy = policy.with_temperature(heat)
            x = follow(policy, x, sigma, to, shift=field.shift, total=adapter.substeps)
            check.step(x, f"after step {index} of {steps} ({self.model.info.name})")
            if self.on_step is not None:
                self.on_step(Step(index, steps, sigma, to, x, policy.denoised(x, to) if to else x))
        check.end()
        return x

    def only(self, item: int) -> "Context":
        """The context of one item of the batch."""
        negative = None if self.negative is None else self.negative.item(item)
        seeds, prompts = self.seeds[item : item + 1], self.prompts[item : item + 1]
        return replace(self, cond=self.cond.item(item), negative=negative, seeds=seeds, prompts=prompts)

    def through(self, chain: Chain[A, B], state: State[A]) -> State[B]:
        """Run an inner chain on `state`; its stages draw noise of their own."""
        planned = plan(chain, self.model.info, start=state.spec)
        stages, data = tuple(chain), state.data
        for stage, row, scope in zip(stages, planned.rows, scopes(stages), strict=True):
            inner = replace(self, scope=f"{self.scope}/{scope}", sigmas=row.sigmas)
            data = keep_promise(stage, State(row.spec, data), row.out, inner, short(stage))
        return State(planned.out, data)  # type: ignore[arg-type]  # pyright: ignore


def scopes(stages: Sequence[AnyStage]) -> list[str]:
    """`scope/n` for each stage: the n-th use of that scope."""
    names = [stage.scope for stage in stages]
    return [f"{name}/{names[:i].count(name)}" for i, name in enumerate(names)]


def keep_promise(stage: AnyStage, state: State[Spec], out: Spec, ctx: Context, where: str) -> Tensor:
    """One stage's work, held against its promise."""
    given = state.data.clone()
    try:
        data = stage.apply(state, out, ctx)
    except BaseException as error:
        if passes(error):
            raise
        raise name_stage(error, where) from error
    if not isinstance(data, Tensor):
        raise PromiseError(f"{where}: apply must give a tensor, got {type(data).__name__}")
    data = data.detach()
    if data.layout != torch.strided:
        raise PromiseError(f"{where}: apply made a tensor of layout {data.layout}; give an ordinary one (.to_dense())")
    if tuple(data.shape) != out.shape:
        raise PromiseError(f"{where} promised {out} {out.shape} but made a tensor of shape {tuple(data.shape)}")
    if not torch.equal(state.data, given):
        raise PromiseError(f"{where}: apply changed the tensor it was given; work on a copy")
    if data.dtype != torch.float32:
        raise PromiseError(f"{where}: apply made {data.dtype}; between stages everything is float32")
    if data.device.type != ctx.model.device.type:
        raise PromiseError(f"{where}: apply made a tensor on {data.device}, the model lives on {ctx.model.device}")
    if not finite(data):
        raise NonFiniteError(f"{where}: made NaN or infinity ({ctx.model.info.name})")
    if isinstance(out, Pixels) and (float(data.min()) < 0 or float(data.max()) > 1):
        raise PromiseError(f"{where}: pixels must lie in [0, 1], got {float(data.min()):g} to {float(data.max()):g}")
    return data

"""Runs a chain: checks everything first, then lets each stage keep its promise, and keeps a record of it all."""

import logging
import math
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal, cast

import torch
from torch import Tensor

from mrflow._checks import check_seed, require
from mrflow.backbone import Backbone, Condition
from mrflow.cost import forward_flops
from mrflow.display.notes import Tally, collect_notes, note, tally_work
from mrflow.errors import Interruption, MrflowError, PlanError, PromiseError, PromptError
from mrflow.flow import finite
from mrflow.machine.devices import Stopwatch
from mrflow.machine.failures import name_stage, passes
from mrflow.machine.forks import check_process
from mrflow.model_info import ModelInfo
from mrflow.records.stage_cache import StageCache
from mrflow.result import PathStep, Result, StageRecord
from mrflow.solvers import Step
from mrflow.spec import Pixels, Spec, Start, State
from mrflow.stage import A, AnyChain, AnyStage, B, Chain, Context, Plan, Stage, Work, keep_promise, plan, scopes, short

log = logging.getLogger(__name__)
MAX_PROMPT = 1_000_000


@dataclass(frozen=True)
class StageBegan:
    """A stage is about to work."""

    index: int
    count: int
    name: str
    out: Spec


@dataclass(frozen=True)
class Stepped:
    """A stage took one solver step; `step` holds x, the clean estimate and sigma, for progress and previews."""

    index: int
    step: Step


@dataclass(frozen=True)
class StageEnded:
    """A stage kept its promise."""

    index: int
    seconds: float
    cached: bool


@dataclass(frozen=True)
class Noted:
    """Something the user should know: lost words, a fallback. `index` is the stage's, None before the first."""

    index: int | None
    text: str


Event = StageBegan | Stepped | StageEnded | Noted
Listener = Callable[[Event], None]


def run(
    chain: Chain[A, B] | Stage[A, B],
    model: Backbone,
    prompt: str | Sequence[str] = "",
    *,
    seed: int | Sequence[int] = 0,
    negative: str | None = None,
    start: Tensor | State[Spec] | None = None,
    condition: Condition | None = None,
    keep: bool | Literal["path"] = False,
    on_event: Listener | None = None,
    cache: StageCache | None = None,
    planned: Plan | None = None,
) -> Result:
    """Make pictures. One prompt with several seeds, or several prompts with one seed each or one for all, is a batch.

    A picture depends on (chain, model, prompt, seed) alone: not on its neighbours or the device's
    generator; sums of float32 depend on the size of the batch in their last bits, which may change a saved value by one
    of its 256 levels.
    `start` is pixels (b, 3, h, w) in [0, 1] or a State for a chain that does not begin with noise; `condition` replaces
    the encoded prompts; `keep` keeps every stage's tensor, and as "path" also every step's estimate, for
    `Result.animate` (the result then holds the model); `on_event` hears of stages, steps and notes, and stops the run
    by raising an exception, which comes out as it is; `cache` reuses stages that were run before. `planned` is what
    `plan` said of this chain, model and batch, if it was asked.

    Raises:
        PlanError: the arguments or the chain cannot work, or a fork broke CUDA; before any tensor is made.
        PromiseError, NonFiniteError: a stage broke its promise; the text names the stage.
    """
    _check_runnable(chain, model)
    if keep not in (False, True, "path"):
        raise PlanError(f'keep takes False, True or "path", got {keep!r}')
    require(condition is None or isinstance(condition, Condition), "condition", "a Condition", condition)
    require(cache is None or isinstance(cache, StageCache), "cache", "a StageCache(folder)", cache)
    require(on_event is None or callable(on_event), "on_event", "a function of one event", on_event)
    check_process(model.device)
    prompts, seeds = _batch(prompt, seed, condition)
    whole = chain if isinstance(chain, Chain) else Chain[A, B]((chain,))
    first = _first(start, len(prompts), model)
    stages: tuple[AnyStage, ...] = tuple(whole)
    if planned is None:
        planned = plan(whole, model.info, batch=len(prompts), start=first.spec)
    else:
        planned = _same(planned, stages, model.info, first.spec)
    _check_stages(stages, model)
    negative = _negative(negative, model.info)
    if model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(model.device)
    with torch.inference_mode():
        watch = Stopwatch(model.device)
        with collect_notes() as lost:
            for text in planned.notes:
                note(text)
            if negative != model.info.negative and not planned.work.negative:
                note(
                    f"no stage reads the negative prompt {negative[:60]!r}: {model.info.name} draws without a second "
                    "branch; guidance=CFG(scale) reads it"
                )
                negative = model.info.negative
            cond = _encode(model, prompts) if condition is None else condition.repeat(len(prompts))
            cond.check_finite("prompt's")
            other = _encode(model, [negative]).repeat(len(prompts)) if planned.work.negative else None
            if other is not None:
                other.check_finite("negative prompt's")
        for text in lost:
            _emit(on_event, Noted(None, text))
        condition_seconds, _ = watch.stop()
        context = Context(model, cond, other, seeds, "", prompts=prompts)
        keys = cache.keys(whole, model, prompts, seeds, negative, first, condition) if cache is not None else []
        done, found = cache.longest(keys, planned, model.device) if cache is not None else (0, None)
        path: list[PathStep] | None = [] if keep == "path" else None
        records, data = [], first.data if found is None else found
        for index, (stage, row, scope) in enumerate(zip(stages, planned.rows, scopes(stages), strict=True)):
            _emit(on_event, StageBegan(index, len(stages), row.name, row.out))
            watch, cached, notes = Stopwatch(model.device), index < done, list[str]()
            work = Work()
            if not cached:
                inner = replace(context, scope=scope, on_step=_relay(on_event, index, path), sigmas=row.sigmas)
                where = f"stage {index + 1} of {len(stages)}, {short(stage)}"
                with collect_notes() as notes, tally_work() as tally, _heard():
                    data = keep_promise(stage, State(row.spec, data), row.out, inner, where)
                work = _done(row.work, tally, model.info, len(prompts))
                if tally.caches:
                    notes.append(str(tally))
                for text in notes:
                    _emit(on_event, Noted(index, text))
            seconds, own_seconds = watch.stop()
            if cache is not None and not cached:
                cache.put(keys[index], data)
            kept = data if keep and index >= done - 1 else None
            did = (work.nfe, work.flops, cached, kept, tuple(notes))
            records.append(StageRecord(row.name, row.out, seconds, *did, None if cached else own_seconds))
            _emit(on_event, StageEnded(index, seconds, cached))
    wide = AnyChain(stages)
    return Result(
        data,
        planned.out,
        tuple(records),
        planned,
        prompts,
        seeds,
        negative,
        wide,
        condition_seconds,
        _peak(model.device),
        tuple(lost),
        tuple(path or ()),
        None if path is None else lambda latents: model.decode(latents.to(model.device)),
    )


def _check_runnable(chain: object, model: object) -> None:
    """Refuse what is no chain, and what is no model."""
    if not isinstance(chain, Chain | Stage):
        raise PlanError(f"run wants a chain of stages, got {chain!r}; join stages with >>")
    if not isinstance(getattr(model, "info", None), ModelInfo):
        raise PlanError(f"run wants a loaded model, such as mf.load({model if isinstance(model, str) else 'pocket'!r})")


def _check_stages(stages: Sequence[AnyStage], model: Backbone) -> None:
    """Have every stage refuse the model that it cannot work with; the error names the stage."""
    for number, stage in enumerate(stages, 1):
        try:
            stage.check(model)
        except BaseException as error:
            if passes(error):
                raise
            raise name_stage(error, f"stage {number} of {len(stages)}, {short(stage)}") from error


def _done(planned: Work, tally: Tally, info: ModelInfo, pictures: int) -> Work:
    """What a stage did: as planned, or as counted where a plan can only estimate."""
    if not (tally.caches or (tally.computed and planned.estimated)):
        return planned
    flops = sum(forwards * forward_flops(info, tokens) for forwards, tokens in tally.forwards)
    return Work(math.ceil(tally.computed / pictures), flops)


def _encode(model: Backbone, prompts: Sequence[str]) -> Condition:
    """What the model makes of the prompts, or an error that names it."""
    where = f"{model.info.name}, condition()"
    try:
        cond = model.condition(prompts)
    except BaseException as error:
        if passes(error) or isinstance(error, MrflowError):
            raise
        raise name_stage(error, where) from error
    if not isinstance(cond, Condition) or cond.batch != len(prompts):
        given = f"one for {cond.batch}" if isinstance(cond, Condition) else type(cond).__name__
        raise PromiseError(f"{where} must give a Condition for {len(prompts)} prompts, got {given}")
    return cond


def _negative(given: object, info: ModelInfo) -> str:
    """The negative prompt, if it is one: None is the model's own."""
    negative = info.negative if given is None else given
    if not isinstance(negative, str):
        raise PlanError(f"the negative prompt must be text, got {negative!r}")
    _check_length("negative prompt", negative)
    return negative


def _same(planned: Plan, stages: tuple[AnyStage, ...], model: ModelInfo, start: Spec) -> Plan:
    """The plan, if it is of these stages for this model and start; what a model takes of memory may differ."""
    ours = (stages, start, replace(model, footprint=None))
    if (planned.stages, planned.rows[0].spec, replace(planned.model, footprint=None)) != ours:
        raise PlanError(f"planned= is of another chain, model or batch than this run of {model.name} from {start}; "
                        "plan this one, or leave it out")  # fmt: skip
    return replace(planned, model=model)


def _batch(
    prompt: str | Sequence[str], seed: int | Sequence[int], condition: Condition | None
) -> tuple[tuple[str, ...], tuple[int, ...]]:
    require(isinstance(prompt, Iterable), "prompt", "text, or a list of texts", prompt)
    prompts = (prompt,) if isinstance(prompt, str) else tuple(prompt)
    one = not isinstance(seed, Iterable) or isinstance(seed, str)
    seeds: tuple[int, ...] = (cast("int", seed),) if one else tuple(cast("Sequence[int]", seed))
    for each in prompts:
        if not isinstance(each, str):
            raise PlanError(f"a prompt must be text, got {each!r}")
        _check_length("prompt", each)
    if not prompts or not seeds:
        raise PlanError("an empty list of prompts or seeds makes no picture; give at least one of each")
    if condition is not None and len(prompts) == 1:
        prompts = prompts * condition.batch
    if len(prompts) != len(seeds):
        if 1 not in (len(prompts), len(seeds)):
            raise PlanError(f"{len(prompts)} prompts and {len(seeds)} seeds do not pair up; give as many, or one")
        prompts, seeds = (
            prompts * (len(seeds) if len(prompts) == 1 else 1),
            seeds * (len(prompts) if len(seeds) == 1 else 1),
        )
    return prompts, tuple(check_seed(each) for each in seeds)


def _check_length(name: str, text: str) -> None:
    """Refuse a text that no record could hold."""
    if len(text) > MAX_PROMPT:
        raise PromptError(f"the {name} has {len(text)} characters; at most {MAX_PROMPT} are taken")


def _first(start: Tensor | State[Spec] | None, batch: int, model: Backbone) -> State[Spec]:
    """What the chain is given: nothing, pixels, or a state."""
    if start is None:
        return State(Start(batch), torch.zeros((batch, 0), device=model.device))
    if isinstance(start, State):
        spec, data = start.spec, start.data
    else:
        if start.ndim != 4 or start.shape[1] != 3:
            raise PlanError(f"start must be pixels of shape (batch, 3, height, width), got {tuple(start.shape)}")
        spec, data = Pixels(start.shape[0], start.shape[2], start.shape[3]), start
    if tuple(data.shape) != spec.shape:
        raise PlanError(f"start says {spec}, {spec.shape}, but its tensor has shape {tuple(data.shape)}")
    if spec.batch == 1 and batch > 1:
        data = data.expand(batch, *data.shape[1:])
        spec = replace(spec, batch=batch)  # type: ignore[type-var]  # pyright: ignore
    if spec.batch != batch:
        raise PlanError(f"start holds {spec.batch} items, but there are {batch} prompts or seeds")
    data = data.detach().to(model.device, torch.float32)
    if not finite(data):
        raise PlanError("start holds NaN or infinity")
    if isinstance(spec, Pixels) and (float(data.min()) < 0 or float(data.max()) > 1):
        raise PlanError(f"start must be pixels in [0, 1], got {float(data.min()):g} to {float(data.max()):g}")
    return State(spec, data)


class _ListenerError(Interruption):
    """Carries what a listener raised past the stage, whose error it is not."""

    def __init__(self, error: BaseException) -> None:
        self.error = error


@contextmanager
def _heard() -> Generator[None]:
    """What a listener raises inside leaves as it was raised."""
    try:
        yield
    except _ListenerError as carried:
        raise carried.error from carried.error.__cause__


def _relay(listener: Listener | None, index: int, path: list[PathStep] | None) -> Callable[[Step], None] | None:
    """What a stage tells of its steps: to the listener, and into the path where that is kept."""
    if listener is None and path is None:
        return None

    def tell(step: Step) -> None:
        if path is not None:
            path.append(PathStep(index, step.to, step.denoised.detach().float().cpu().clone()))
        try:
            _emit(listener, Stepped(index, step))
        except BaseException as error:
            raise _ListenerError(error) from None

    return tell


def _emit(listener: Listener | None, event: Event) -> None:
    if listener is not None:
        listener(event)


def _peak(device: torch.device) -> int:
    """Peak bytes: of the CUDA allocator, or of the process on a CPU; 0 where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
        import sys
    except ImportError:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

"""Runs a chain: checks everything first, then lets each stage keep its promise, and keeps a record of it all."""

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mrflow.adapters import Lora, PiFlow
from mrflow.backbone import Backbone, Condition, FieldOptions
from mrflow.cost import forward_flops
from mrflow.errors import NonFiniteError, PlanError, PromiseError, PromptError, named
from mrflow.flow import finite
from mrflow.forks import check_process
from mrflow.guidance import Distilled, Guidance
from mrflow.noise import Noise, PerItem, check_seed
from mrflow.notes import collected, count, note, tallied
from mrflow.policies import GM, PolicyField, automatic, follow
from mrflow.schedules import Sigmas
from mrflow.solvers import Solver, Step, integrate
from mrflow.spec import ModelInfo, Pixels, Spec, Start, State
from mrflow.stage import A, AnyChain, AnyStage, B, Chain, Plan, Stage, Work, plan, short

if TYPE_CHECKING:
    from PIL.Image import Image

    from mrflow.records.stage_cache import StageCache

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
        return source(self.seeds, shape, scope=self.scope, draw=draw).to(self.model.device)

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
        draws = iter(range(1, 1 + len(sigmas)))
        options = replace(options, sigmas=tuple(solver.points(sigmas)))
        info = self.model.info
        if options.cache is None and info.cache is None:
            evals, patch = guidance.evals(options.sigmas) * len(x), info.space.patch
            count(None, evals, evals, evals, tokens=(x.shape[-2] // patch) * (x.shape[-1] // patch))

        def told(step: Step) -> None:
            for listener in (self.on_step, watch):
                if listener is not None:
                    listener(step)

        return integrate(
            solver,
            guidance.field(self.model, self.cond, self.negative, options),
            x,
            sigmas,
            on_step=told if self.on_step or watch else None,
            facts=(self.model.info.name,),
            noise=lambda: self.noise(tuple(x.shape), source=source, draw=next(draws)),
        )

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
        steps = len(sigmas) - 1
        heat = automatic(steps) if adapter.temperature == "auto" else adapter.temperature
        options = FieldOptions(guidance=value, sigmas=tuple(sigmas[:-1]), loras=tuple(lora), policy=adapter)
        field = self.model.field(self.cond, options)
        if not isinstance(field, PolicyField):
            raise PlanError(f"{self.model.info.name} gave a velocity where it was asked for pi-Flow's policies")
        for index, (sigma, to) in enumerate(pairwise(sigmas), 1):
            policy = field.policy(x, sigma)
            if heat is not None and index < steps and isinstance(policy, GM):
                policy = policy.tempered(heat)
            x = follow(policy, x, sigma, to, shift=field.shift, total=adapter.substeps)
            if not finite(x):
                raise NonFiniteError(f"NaN or infinity after step {index} of {steps} ({self.model.info.name})")
            if self.on_step is not None:
                self.on_step(Step(index, steps, sigma, to, x, policy.denoised(x, to) if to else x))
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
        for stage, row, scope in zip(stages, planned.rows, _scopes(stages), strict=True):
            inner = replace(self, scope=f"{self.scope}/{scope}", sigmas=row.sigmas)
            data = _apply(stage, State(row.spec, data), row.out, inner, short(stage))
        return State(planned.out, data)  # type: ignore[arg-type]  # pyright: ignore


@dataclass(frozen=True)
class StageRecord:
    """What one stage did. `data` is its tensor where the run was asked to keep it; `nfe` counts forwards a picture.

    With a cache, `nfe` and `flops` are what was computed (a batch's mean, rounded up), and `notes` say so.
    """

    name: str
    spec: Spec
    seconds: float
    nfe: int
    flops: float
    cached: bool
    data: Tensor | None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Result:
    """What a run made."""

    data: Tensor
    spec: Spec
    stages: tuple[StageRecord, ...]
    plan: Plan
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    negative: str
    chain: AnyChain
    condition_seconds: float
    peak_bytes: int
    notes: tuple[str, ...] = ()

    @property
    def seconds(self) -> float:
        """Wall time from prompt to the last stage's tensor."""
        return self.condition_seconds + sum(stage.seconds for stage in self.stages)

    @property
    def nfe(self) -> int:
        """Network forwards for one picture."""
        return sum(stage.nfe for stage in self.stages)

    @property
    def pixels(self) -> Tensor:
        """float32 (batch, 3, height, width) in [0, 1]."""
        if not isinstance(self.spec, Pixels):
            raise PlanError(f"the chain ended in {self.spec}; put Decode() at its end to get pixels")
        return self.data

    @cached_property
    def images(self) -> "list[Image]":
        """PIL pictures, 8 bits a channel."""
        from mrflow.records.pictures import to_images

        return to_images(self.pixels)

    def record(self, item: int = 0) -> dict[str, object]:
        """Everything needed to make picture `item` again, and what it cost: plain data, written into the PNG."""
        from mrflow.records.pictures import make_record

        return make_record(self, item)

    def save(self, path: str | Path) -> list[Path]:
        """Write PNGs with their records: `path`, or `path` with -0, -1, ... before its ending for a batch."""
        from mrflow.records.pictures import save_result

        return save_result(self, Path(path))


def run(
    chain: Chain[A, B] | Stage[A, B],
    model: Backbone,
    prompt: str | Sequence[str] = "",
    *,
    seed: int | Sequence[int] = 0,
    negative: str | None = None,
    start: Tensor | State[Spec] | None = None,
    condition: Condition | None = None,
    keep: bool = False,
    on_event: Listener | None = None,
    cache: "StageCache | None" = None,
) -> Result:
    """Make pictures. One prompt with several seeds, or several prompts with one seed each or one for all, is a batch.

    A picture depends on (chain, model, prompt, seed) alone: not on the batch, its neighbours or the device's generator.
    `start` is pixels (b, 3, h, w) in [0, 1] or a State for a chain that does not begin with noise; `condition` replaces
    the encoded prompts; `keep` keeps every stage's tensor; `cache` reuses stages that were run before.

    Raises:
        PlanError: the arguments or the chain cannot work, or a fork broke CUDA; before any tensor is made.
        PromiseError, NonFiniteError: a stage broke its promise; the text names the stage.
    """
    if not isinstance(chain, Chain | Stage):
        raise PlanError(f"run wants a chain of stages, got {chain!r}; join stages with >>")
    if not isinstance(getattr(model, "info", None), ModelInfo):
        raise PlanError(f"run wants a loaded model, such as mf.load({model if isinstance(model, str) else 'pocket'!r})")
    check_process(model.device)
    prompts, seeds = _batch(prompt, seed, condition)
    whole = chain if isinstance(chain, Chain) else Chain[A, B]((chain,))
    first = _first(start, len(prompts), model)
    planned = plan(whole, model.info, batch=len(prompts), start=first.spec)
    stages: tuple[AnyStage, ...] = tuple(whole)
    for number, stage in enumerate(stages, 1):
        try:
            stage.check(model)
        except Exception as error:
            raise named(error, f"stage {number} of {len(stages)}, {short(stage)}") from error
    negative = model.info.negative if negative is None else negative
    if not isinstance(negative, str):
        raise PlanError(f"the negative prompt must be text, got {negative!r}")
    _check_length("negative prompt", negative)
    unread = negative != model.info.negative and not planned.work.negative

    _reset_peak(model.device)
    with torch.inference_mode():
        began = time.perf_counter()
        with collected() as lost:
            if unread:
                note(
                    f"no stage reads the negative prompt {negative[:60]!r}: {model.info.name} draws without a second "
                    "branch; guidance=CFG(scale) reads it"
                )
                negative = model.info.negative
            cond = model.condition(prompts) if condition is None else condition.repeat(len(prompts))
            cond.check_finite("prompt's")
            other = model.condition([negative]).repeat(len(prompts)) if planned.work.negative else None
            if other is not None:
                other.check_finite("negative prompt's")
        for text in lost:
            _emit(on_event, Noted(None, text))
        _synchronise(model.device)
        condition_seconds = time.perf_counter() - began
        context = Context(model, cond, other, seeds, "", prompts=prompts)
        keys = cache.keys(whole, model, prompts, seeds, negative, first, condition) if cache is not None else []
        done, found = cache.longest(keys, planned, model.device) if cache is not None else (0, None)
        records, data = [], first.data if found is None else found
        for index, (stage, row, scope) in enumerate(zip(stages, planned.rows, _scopes(stages), strict=True)):
            _emit(on_event, StageBegan(index, len(stages), row.name, row.out))
            began, cached, notes = time.perf_counter(), index < done, list[str]()
            work = Work() if cached else row.work
            if not cached:
                inner = replace(context, scope=scope, on_step=_relay(on_event, index), sigmas=row.sigmas)
                where = f"stage {index + 1} of {len(stages)}, {short(stage)}"
                with collected() as notes, tallied() as tally:
                    data = _apply(stage, State(row.spec, data), row.out, inner, where)
                _synchronise(model.device)
                if tally.caches:
                    flops = sum(forwards * forward_flops(model.info, tokens) for forwards, tokens in tally.forwards)
                    work = Work(math.ceil(tally.computed / len(prompts)), flops)
                    notes.append(str(tally))
                for text in notes:
                    _emit(on_event, Noted(index, text))
            seconds = time.perf_counter() - began
            if cache is not None and not cached:
                cache.put(keys[index], data)
            kept = data if keep and index >= done - 1 else None
            records.append(StageRecord(row.name, row.out, seconds, work.nfe, work.flops, cached, kept, tuple(notes)))
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
    )


def _batch(
    prompt: str | Sequence[str], seed: int | Sequence[int], condition: Condition | None
) -> tuple[tuple[str, ...], tuple[int, ...]]:
    prompts = (prompt,) if isinstance(prompt, str) else tuple(prompt)
    seeds = (seed,) if isinstance(seed, int) else tuple(seed)
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


def _scopes(stages: Sequence[AnyStage]) -> list[str]:
    """`scope/n` for each stage: the n-th use of that scope."""
    names = [stage.scope for stage in stages]
    return [f"{name}/{names[:i].count(name)}" for i, name in enumerate(names)]


def _apply(stage: AnyStage, state: State[Spec], out: Spec, ctx: Context, where: str) -> Tensor:
    """One stage's work, held against its promise."""
    given = state.data.clone()
    try:
        data = stage.apply(state, out, ctx)
    except Exception as error:
        raise named(error, where) from error
    if not isinstance(data, Tensor):
        raise PromiseError(f"{where}: apply must give a tensor, got {type(data).__name__}")
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


def _relay(listener: Listener | None, index: int) -> Callable[[Step], None] | None:
    return None if listener is None else lambda step: listener(Stepped(index, step))


def _emit(listener: Listener | None, event: Event) -> None:
    if listener is not None:
        listener(event)


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


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

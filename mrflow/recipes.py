"""Chains worth a name. Each is a plain function that gives an ordinary chain: copy one and change it."""

from collections.abc import Callable, Sequence
from functools import wraps
from inspect import signature
from itertools import pairwise
from typing import Literal, ParamSpec, TypeVar

from mrflow._checks import check_sides, is_whole, require
from mrflow.caches import Cache
from mrflow.checkpoints.adapters import Loras, PiFlow
from mrflow.errors import PlanError
from mrflow.guidance import Guidance
from mrflow.model_info import ModelInfo
from mrflow.noise import Noise, PerItem, Stream
from mrflow.protocols.upscaler import LatentUpscaler, Upscaler
from mrflow.rivals import Grow, SampleAnchors, SampleConverged, SampleRegions, SelfLift
from mrflow.rivals.growth import PowerSpectrum
from mrflow.rivals.jit import JIT_4X, JIT_7X
from mrflow.rivals.ralu import RALU_4X, RALU_7X, fit_shifts
from mrflow.schedules import DirectSigma, FlowMap, Schedule, Shifted
from mrflow.schedules.partial import Level, Part
from mrflow.solvers import Euler, Solver
from mrflow.spec import Pixels, Start
from mrflow.stage import Chain
from mrflow.stages import Decode, Encode, Lift, Quantise, Refine, Reinject, Sample, Tiles, Upscale
from mrflow.students import Student
from mrflow.upscalers.interpolate import Filter

SPECTRUM = PowerSpectrum()
SIGMA = 0.12  # the published noise level of refinement (arXiv 2607.01642; official scripts)


P = ParamSpec("P")
T = TypeVar("T")


def squares(recipe: Callable[P, T]) -> Callable[P, T]:
    """The recipe with its sizes checked: each a (height, width), or one number for a square, and each rises."""
    form = signature(recipe)

    @wraps(recipe)
    def checked(*args: P.args, **kwargs: P.kwargs) -> T:
        bound = form.bind(*args, **kwargs)
        bound.apply_defaults()
        given = bound.arguments
        for name in ("low", "size"):
            if name in given:
                given[name] = check_sides(name, given[name])
        if "sizes" in given:
            given["sizes"] = [check_sides("each of sizes", each) for each in given["sizes"]]
            _check_ladder(given["sizes"])
        if "low" in given:
            _check_rise(given["low"], given["size"], "low ", "size ")
        return recipe(**given)  # type: ignore[call-arg]

    return checked


@squares
def native(
    *,
    size: tuple[int, int] = (1024, 1024),
    steps: int = 50,
    schedule: Schedule | None = None,
    solver: Solver = Euler(),
    guidance: Guidance | None = None,
    cache: Cache | None = None,
    lora: Loras = (),
) -> Chain[Start, Pixels]:
    """Plain sampling at full size: what staged sampling is held against."""
    chosen = schedule or Shifted(steps)
    return Sample(*size, chosen, solver=solver, guidance=guidance, cache=cache, lora=lora) >> Decode()


@squares
def paper(
    upscaler: Upscaler | None = None,
    *,
    low: tuple[int, int] = (512, 512),
    size: tuple[int, int] = (1024, 1024),
    steps: int = 12,
    refine_steps: int = 1,
    sigma: float = SIGMA,
    schedule: Schedule | None = None,
    solver: Solver = Euler(),
    guidance: Guidance | None = None,
    refine_guidance: Guidance | None = None,
    noise: Noise = PerItem(),
    cache: Cache | None = None,
    lora: Loras = (),
    refine_lora: Loras = (),
    tiles: Tiles | None = None,
) -> Chain[Start, Pixels]:
    """MrFlow (arXiv 2607.01642): sample low, super-resolve, encode, inject noise, refine.

    `noise` is what the low-resolution stage begins with, `cache` what leaves out some of its forwards. `lora` are
    adapters of the low-resolution stage, `refine_lora` of the refinement, which works in `tiles` where some are given.
    `upscaler=None` is the model's own net. The published maths with the posterior's mode and per-item noise; `official`
    has the published draws.
    """
    return (
        Sample(*low, schedule or Shifted(steps), solver=solver, guidance=guidance, noise=noise, cache=cache, lora=lora)
        >> Decode()
        >> Upscale(upscaler, size)
        >> Encode()
        >> Reinject(sigma)
        >> Refine(
            DirectSigma(refine_steps),
            solver=solver,
            guidance=refine_guidance or guidance,
            lora=refine_lora,
            tiles=tiles,
        )
        >> Decode()
    )


@squares
def official(
    upscaler: Upscaler | None = None,
    *,
    low: tuple[int, int] = (512, 512),
    size: tuple[int, int] = (1024, 1024),
    steps: int = 12,
    refine_steps: int = 1,
    sigma: float = SIGMA,
    eight_bit: bool = False,
) -> Chain[Start, Pixels]:
    """The published procedure, draw for draw: noise from a generator seeded with the seed; then, from one seeded with
    seed + 1, the posterior sample and the injected noise. `eight_bit` adds its rounding between the stages.
    """
    small = Sample(*low, Shifted(steps), noise=Stream(0)) >> Decode()
    large = (
        small >> Quantise() >> Upscale(upscaler, size) >> Quantise(truncate=True)
        if eight_bit
        else small >> Upscale(upscaler, size)
    )
    return (
        large
        >> Encode(posterior=True, noise=Stream(1))
        >> Reinject(sigma, noise=Stream(1, skip=1))
        >> Refine(DirectSigma(refine_steps))
        >> Decode()
    )


@squares
def ladder(
    sizes: Sequence[tuple[int, int]],
    *,
    steps: int = 12,
    sigmas: Sequence[float] | float = SIGMA,
    refine_steps: int = 1,
    upscalers: Sequence[Upscaler | None] | Upscaler | None = None,
    schedule: Schedule | None = None,
    solver: Solver = Euler(),
    guidance: Guidance | None = None,
    cache: Cache | None = None,
    tiles: Tiles | None = None,
) -> Chain[Start, Pixels]:
    """MrFlow over more than two resolutions: sizes rise, and every rung is upscaled, noised and refined.

    `sigmas` and `upscalers` are one for all rungs above the first, or one for each. Steps of any ratio work, each with
    the aspect of the first: an upscaler runs until it is past the size, and an antialiased resize takes off the rest.
    `schedule` and `cache` are the first rung's. With `tiles`, rungs larger than a tile are refined in tiles.
    """
    rungs = tuple(sizes)
    levels = tuple(sigmas) if isinstance(sigmas, Sequence) else (sigmas,) * (len(rungs) - 1)
    nets = tuple(upscalers) if isinstance(upscalers, Sequence) else (upscalers,) * (len(rungs) - 1)
    for name, given in (("sigmas", levels), ("upscalers", nets)):
        if len(given) != len(rungs) - 1:
            raise PlanError(f"a ladder of {len(rungs)} sizes needs {len(rungs) - 1} {name}, got {len(given)}")
    chain = Sample(*rungs[0], schedule or Shifted(steps), solver=solver, guidance=guidance, cache=cache) >> Decode()
    for size, sigma, net in zip(rungs[1:], levels, nets, strict=True):
        refine = Refine(DirectSigma(refine_steps), solver=solver, guidance=guidance, tiles=tiles)
        chain = chain >> Upscale(net, size) >> Encode() >> Reinject(sigma) >> refine >> Decode()
    return chain


@squares
def latent(
    filter: Filter = "bicubic",
    *,
    low: tuple[int, int] = (512, 512),
    size: tuple[int, int] = (1024, 1024),
    steps: int = 12,
    refine_steps: int = 1,
    sigma: float = SIGMA,
    schedule: Schedule | None = None,
    solver: Solver = Euler(),
    guidance: Guidance | None = None,
    upscaler: LatentUpscaler | None = None,
) -> Chain[Start, Pixels]:
    """`paper` without pixels between: latents are interpolated, the baseline that shows what the SR network is for.

    With an `upscaler`, a network that was trained to (`LatentCheckpoint`) enlarges them.
    """
    return (
        Sample(*low, schedule or Shifted(steps), solver=solver, guidance=guidance)
        >> Lift(size, filter, upscaler=upscaler)
        >> Reinject(sigma)
        >> Refine(DirectSigma(refine_steps), solver=solver, guidance=guidance)
        >> Decode()
    )


@squares
def few(student: Student, *, size: tuple[int, int] = (1024, 1024), steps: int | None = None) -> Chain[Start, Pixels]:
    """A few-step student alone, as it is published (`mrflow.students`)."""
    return native(size=size, schedule=student.schedule(steps), guidance=student.guidance, lora=student.lora)


@squares
def stacked(
    student: Student,
    upscaler: Upscaler | None = None,
    *,
    low: tuple[int, int] = (512, 512),
    size: tuple[int, int] = (1024, 1024),
    steps: int | None = None,
    refine: Literal["student", "base"] = "student",
    refine_steps: int = 1,
    sigma: float = SIGMA,
    full_levels: bool = False,
) -> Chain[Start, Pixels]:
    """MrFlow with a few-step student in its low-resolution stage.

    `refine` says who refines: the student, or the base model with its own guidance. Students were trained on few
    levels, the last of them far above 0.12: whether a refinement at `sigma` suits one is to be measured, as are the
    levels of the low stage: the model's own for that size, or with `full_levels` those of the full size.
    """
    if refine not in ("student", "base"):
        raise PlanError(f"refine must be 'student' or 'base', got {refine!r}")
    grid = student.schedule(steps)
    own = refine == "student"
    return (
        Sample(
            *low,
            Part(grid, size=size) if full_levels else grid,
            guidance=student.guidance,
            lora=student.lora,
        )
        >> Decode()
        >> Upscale(upscaler, size)
        >> Encode()
        >> Reinject(sigma)
        >> Refine(
            DirectSigma(refine_steps), guidance=student.guidance if own else None, lora=student.lora if own else ()
        )
        >> Decode()
    )


@squares
def piflow(
    adapter: PiFlow,
    upscaler: Upscaler | None = None,
    *,
    low: tuple[int, int] = (512, 512),
    size: tuple[int, int] = (1024, 1024),
    steps: int = 4,
    sigma: float | None = None,
) -> Chain[Start, Pixels]:
    """MrFlow's 4 + 1 with pi-Flow (arXiv 2510.14974): 4 evaluations low, one high, each followed along its policy.

    The refinement begins, as in the official code, at the last level of pi-Flow's own schedule with a whole last step:
    0.5161 for 4 steps. That is far above MrFlow's 0.12, which `sigma=0.12` gives, and no level it was trained on.
    """
    whole = FlowMap(steps, final_step=1.0)
    again: float | Level = Level(whole, steps - 1) if sigma is None else sigma
    return (
        Sample(*low, FlowMap(steps), policy=adapter)
        >> Decode()
        >> Upscale(upscaler, size)
        >> Encode()
        >> Reinject(again)
        >> Refine(DirectSigma(1), policy=adapter)
        >> Decode()
    )


@squares
def lift(
    filter: Filter = "nearest",
    *,
    low: tuple[int, int] = (512, 512),
    size: tuple[int, int] = (1024, 1024),
    steps: tuple[int, int] = (8, 4),
    sigma: float | None = None,
    schedule: Schedule | None = None,
    guidance: Guidance | None = None,
) -> Chain[Start, Pixels]:
    """The plain transition of Bottleneck Sampling (arXiv 2503.18940): enlarge the clean estimate, noise it, go on.

    One grid of steps[0] + steps[1] steps for the full size; after the first ones the clean estimate is enlarged and
    noised to the level that was reached, or to `sigma`, from where the refinement has a grid of its own.
    """
    begin, again, rest = _handover(steps, sigma, schedule, size, guidance)
    return Sample(*low, begin, guidance=guidance) >> Lift(size, filter) >> again >> rest >> Decode()


@squares
def selflift(
    *,
    low: tuple[int, int] = (512, 512),
    size: tuple[int, int] = (1024, 1024),
    steps: tuple[int, int] = (8, 4),
    share: float = 0.4,
    weights: tuple[float, float] = (0.5, 1.0),
    sigma: float | None = None,
    schedule: Schedule | None = None,
    guidance: Guidance | None = None,
) -> Chain[Start, Pixels]:
    """SelfLift-zero (arXiv 2609.02036): as `lift`, with a lift over latents and pixels, mixed where they disagree."""
    begin, again, rest = _handover(steps, sigma, schedule, size, guidance)
    mixing = SelfLift(size, share, *weights)
    return Sample(*low, begin, guidance=guidance) >> mixing >> again >> rest >> Decode()


def _handover(
    steps: tuple[int, int],
    sigma: float | None,
    schedule: Schedule | None,
    size: tuple[int, int],
    guidance: Guidance | None,
) -> tuple[Part, Reinject, Refine]:
    """The low part of a grid, what noises its clean estimate again, and what goes on from there."""
    first, rest = counts("steps", steps, 2)
    grid = schedule or Shifted(first + rest)
    again: float | Level = Level(grid, first, size=size) if sigma is None else sigma
    onward: Schedule = Part(grid, first, size=size) if sigma is None else Shifted(rest)
    return Part(grid, 0, first, size=size, clean=True), Reinject(again), Refine(onward, guidance=guidance)


@squares
def speed(
    *,
    sizes: Sequence[tuple[int, int]] = ((256, 256), (512, 512), (1024, 1024)),
    steps: Sequence[int] = (3, 2, 7),
    schedule: Schedule | None = None,
    guidance: Guidance | None = None,
) -> Chain[Start, Pixels]:
    """SPEED (arXiv 2605.18736): one grid, laid for the full size, whose first steps run small; growth by DCT between.

    `steps` are those at each size; (3, 2, 7) is what MrFlow compares itself with on FLUX.1, (1, 1, 5) on Qwen-Image.
    `speed_steps` gives the counts of SPEED's own rule.
    """
    rungs = tuple(sizes)
    each = counts("steps", steps, len(rungs))
    grid, size = schedule or Shifted(sum(each)), rungs[-1]
    chain = Sample(*rungs[0], Part(grid, 0, each[0], size=size), guidance=guidance) >> Grow(rungs[1])
    for i in range(1, len(rungs)):
        done = sum(each[:i])
        whole = chain >> Refine(Part(grid, done, done + each[i], size=size), guidance=guidance)
        chain = whole >> Grow(rungs[i + 1]) if i + 1 < len(rungs) else whole
    return chain >> Decode()


def speed_steps(
    model: ModelInfo,
    sizes: Sequence[tuple[int, int]] = ((512, 512), (1024, 1024)),
    *,
    steps: int = 50,
    delta: float = 0.01,
    spectrum: PowerSpectrum = SPECTRUM,
) -> tuple[int, ...]:
    """How many of `steps` SPEED's rule takes at each size: a size is left at the first level where more would show.

    A size of h x w latent cells holds frequencies up to min(h, w) / 2, so it is left at the first level of the grid
    that is at most `spectrum.leave(min(h, w) / 2, delta)`; a larger `delta` leaves later.
    """
    grid = Shifted(steps)(1.0, model.tokens(*sizes[-1]), model)
    ends = []
    for low in sizes[:-1]:
        level = spectrum.leave(min(low) / model.space.downscale / 2, delta)
        ends.append(next(i for i, s in enumerate(grid) if s <= level))
    marks = (0, *ends, steps)
    return tuple(b - a for a, b in pairwise(marks))


@squares
def ralu(
    *,
    size: tuple[int, int] = (1024, 1024),
    steps: tuple[int, int, int] | None = None,
    ends: tuple[float, float] = (0.3, 0.45),
    share: float = 0.3,
    preset: Literal["4x", "7x"] = "4x",
    shift: float = 3.0,
    guidance: Guidance | None = None,
) -> Chain[Start, Pixels]:
    """RALU (arXiv 2507.08422): coarse, then finer where edges are, then fine.

    With `steps` None a published `preset`; else shifts and z are fitted to these steps, `ends` and the model's own
    static `shift` (`mrflow.rivals.ralu.fit_shifts`).
    """
    if steps is None:
        if preset not in ("4x", "7x"):
            raise PlanError(f"preset must be '4x' or '7x', got {preset!r}")
        given, between, shifts, z, some = RALU_4X if preset == "4x" else RALU_7X
        return SampleRegions(*size, given, between, shifts, z, some, guidance=guidance) >> Decode()
    one, two, three = counts("steps", steps, 3)
    shifts, z = fit_shifts((one, two, three), ends, shift=shift)
    return SampleRegions(*size, (one, two, three), ends, shifts, z, share, guidance=guidance) >> Decode()


@squares
def jit(
    *,
    size: tuple[int, int] = (1024, 1024),
    steps: tuple[int, int, int] | None = None,
    shares: tuple[float, float] | None = None,
    preset: Literal["4x", "7x"] = "4x",
    schedule: Schedule | None = None,
    guidance: Guidance | None = None,
) -> Chain[Start, Pixels]:
    """Just-in-Time (arXiv 2603.10744): a share of the tokens, then more where the velocity varies, then all.

    `steps` and `shares` are those of a published `preset` unless given; `schedule` is the published beta grid.
    """
    if preset not in ("4x", "7x"):
        raise PlanError(f"preset must be '4x' or '7x', got {preset!r}")
    given, some = JIT_4X if preset == "4x" else JIT_7X
    one, two, three = given if steps is None else counts("steps", steps, 3)
    return SampleAnchors(*size, (one, two, three), shares or some, schedule, guidance=guidance) >> Decode()


@squares
def fresco(
    *,
    size: tuple[int, int] = (1024, 1024),
    steps: tuple[int, int, int] = (8, 4, 6),
    share: float = 0.5,
    schedule: Schedule | None = None,
    guidance: Guidance | None = None,
) -> Chain[Start, Pixels]:
    """Fresco (arXiv 2601.07462): coarse, then finer where tokens have converged, then fine, on one noise field."""
    one, two, three = counts("steps", steps, 3)
    return SampleConverged(*size, (one, two, three), share, schedule, guidance=guidance) >> Decode()


def counts(what: str, given: Sequence[int], number: int) -> tuple[int, ...]:
    """Whole numbers above 0, as many as asked for, or PlanError."""
    each = tuple(given)
    right = len(each) == number and all(is_whole(n, 1) for n in each)
    require(right, what, f"{number} whole numbers above 0", given)
    return each


@squares
def enlarge(
    size: tuple[int, int],
    upscaler: Upscaler | None = None,
    *,
    sigma: float = 0.16,
    refine_steps: int = 1,
    schedule: Schedule | None = None,
    solver: Solver = Euler(),
    guidance: Guidance | None = None,
    cache: Cache | None = None,
    tiles: Tiles | None = None,
) -> Chain[Pixels, Pixels]:
    """MrFlow's second half for a picture that exists already: give it to `run` as `start=`; `tiles` as in `ladder`."""
    return (
        Upscale(upscaler, size)
        >> Encode()
        >> Reinject(sigma)
        >> Refine(schedule or DirectSigma(refine_steps), solver=solver, guidance=guidance, cache=cache, tiles=tiles)
        >> Decode()
    )


def _check_ladder(sizes: Sequence[tuple[int, int]]) -> None:
    if len(sizes) < 2:
        raise PlanError(f"a ladder needs at least two sizes, got {len(sizes)}")
    for low, high in pairwise(sizes):
        _check_rise(low, high)


def _check_rise(low: tuple[int, int], high: tuple[int, int], first: str = "", second: str = "") -> None:
    """Refuse a size that does not rise on both sides; `first` and `second` are what the user knows the two by."""
    if not (high[0] > low[0] and high[1] > low[1]):
        raise PlanError(f"sizes must rise: {first}{low[0]}x{low[1]} is followed by {second}{high[0]}x{high[1]}")

"""Chains worth a name. Each is a plain function that gives an ordinary chain: copy one and change it."""

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from mrflow.errors import PlanError
from mrflow.guidance import Guidance
from mrflow.noise import Noise, PerItem, Stream
from mrflow.schedules import DirectSigma, Schedule, Shifted
from mrflow.solvers import Euler, Solver
from mrflow.spec import Pixels, Start
from mrflow.stage import Chain
from mrflow.stages import Decode, Encode, Lift, Quantise, Refine, Reinject, Sample, Upscale
from mrflow.upscalers import Upscaler
from mrflow.upscalers.interpolate import Filter

if TYPE_CHECKING:
    from mrflow.caches import Cache

SIGMA = 0.12  # the published noise level of refinement (arXiv 2607.01642; official scripts)


def native(
    *,
    size: tuple[int, int] = (1024, 1024),
    steps: int = 50,
    schedule: Schedule | None = None,
    solver: Solver = Euler(),
    guidance: Guidance | None = None,
    cache: "Cache | None" = None,
) -> Chain[Start, Pixels]:
    """Plain sampling at full size: what staged sampling is held against."""
    chosen = schedule or Shifted(steps)
    return Sample(*size, chosen, solver=solver, guidance=guidance, cache=cache) >> Decode()


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
    cache: "Cache | None" = None,
) -> Chain[Start, Pixels]:
    """MrFlow (arXiv 2607.01642): sample low, super-resolve, encode, inject noise, refine.

    `noise` is what the low-resolution stage begins with, `cache` what leaves out some of its forwards. `upscaler=None`
    is the model's own net. The published maths with the posterior's mode and per-item noise; `official` has the
    published draws.
    """
    _check_ladder((low, size))
    return (
        Sample(*low, schedule or Shifted(steps), solver=solver, guidance=guidance, noise=noise, cache=cache)
        >> Decode()
        >> Upscale(upscaler, size)
        >> Encode()
        >> Reinject(sigma)
        >> Refine(DirectSigma(refine_steps), solver=solver, guidance=refine_guidance or guidance)
        >> Decode()
    )


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
    _check_ladder((low, size))
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


def ladder(
    sizes: Sequence[tuple[int, int]],
    *,
    steps: int = 12,
    sigmas: Sequence[float] | float = SIGMA,
    refine_steps: int = 1,
    upscalers: Sequence[Upscaler | None] | Upscaler | None = None,
    solver: Solver = Euler(),
    guidance: Guidance | None = None,
) -> Chain[Start, Pixels]:
    """MrFlow over more than two resolutions: sizes rise, and every rung is upscaled, noised and refined.

    `sigmas` and `upscalers` are one for all rungs above the first, or one for each. Steps of any ratio work, each with
    the aspect of the first: an upscaler runs until it is past the size, and an antialiased resize takes off the rest.
    """
    rungs = tuple(sizes)
    _check_ladder(rungs)
    levels = tuple(sigmas) if isinstance(sigmas, Sequence) else (sigmas,) * (len(rungs) - 1)
    nets = tuple(upscalers) if isinstance(upscalers, Sequence) else (upscalers,) * (len(rungs) - 1)
    for name, given in (("sigmas", levels), ("upscalers", nets)):
        if len(given) != len(rungs) - 1:
            raise PlanError(f"a ladder of {len(rungs)} sizes needs {len(rungs) - 1} {name}, got {len(given)}")
    chain = Sample(*rungs[0], Shifted(steps), solver=solver, guidance=guidance) >> Decode()
    for size, sigma, net in zip(rungs[1:], levels, nets, strict=True):
        refine = Refine(DirectSigma(refine_steps), solver=solver, guidance=guidance)
        chain = chain >> Upscale(net, size) >> Encode() >> Reinject(sigma) >> refine >> Decode()
    return chain


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
) -> Chain[Start, Pixels]:
    """`paper` without pixels between: latents are interpolated. The baseline that shows what the SR network is for."""
    _check_ladder((low, size))
    return (
        Sample(*low, schedule or Shifted(steps), solver=solver, guidance=guidance)
        >> Lift(size, filter)
        >> Reinject(sigma)
        >> Refine(DirectSigma(refine_steps), solver=solver, guidance=guidance)
        >> Decode()
    )


def enlarge(
    size: tuple[int, int],
    upscaler: Upscaler | None = None,
    *,
    sigma: float = 0.16,
    refine_steps: int = 1,
    solver: Solver = Euler(),
    guidance: Guidance | None = None,
) -> Chain[Pixels, Pixels]:
    """MrFlow's second half for a picture that exists already: give it to `run` as `start=`."""
    return (
        Upscale(upscaler, size)
        >> Encode()
        >> Reinject(sigma)
        >> Refine(DirectSigma(refine_steps), solver=solver, guidance=guidance)
        >> Decode()
    )


def _check_ladder(sizes: Sequence[tuple[int, int]]) -> None:
    if len(sizes) < 2:
        raise PlanError(f"a ladder needs at least two sizes, got {len(sizes)}")
    for low, high in pairwise(sizes):
        if not (high[0] > low[0] and high[1] > low[1]):
            raise PlanError(f"sizes must rise: {low[0]}x{low[1]} is followed by {high[0]}x{high[1]}")

"""Noise levels that are found by measuring: where a model's flow bends, Euler's steps are short."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mrflow._checks import check_sides, check_whole
from mrflow.backbone import Backbone, FieldOptions
from mrflow.errors import PlanError
from mrflow.flow import Velocity
from mrflow.guidance import Guidance, own_guidance
from mrflow.noise import PerItem
from mrflow.schedules.base import Explicit, Shifted, Sigmas
from mrflow.solvers import RK4, Euler, integrate
from mrflow.spec import check_size


def optimise(
    model: Backbone,
    steps: int,
    prompts: Sequence[str],
    *,
    size: tuple[int, int] | None = None,
    guidance: Guidance | None = None,
    negative: str = "",
    seed: int = 0,
    fine: int = 32,
) -> Explicit:
    """The levels of a fine grid whose `steps` Euler steps from 1 to 0 make the least local error on these prompts.

    In the spirit of Align Your Steps (Sabour et al. 2024, arXiv 2404.14507), by dynamic programming over measured
    errors as in GITS (Chen et al. 2024, arXiv 2405.11326). Each prompt (with `seed`, `seed` + 1, ...) is integrated by
    RK4 along `Shifted(fine)` twice, from the noise of a native picture of that seed and from slightly other noise:
    8 fine - 2 evaluations. The error of a step from level s to t of that grid is

        rms(x_s + (t - s) v_s - x_t) d_0 / d_t,

    averaged over the prompts, d the distance of both trajectories: how much of an error at t is left at the end. Of all
    paths of so many steps the one with the least sum is found; errors that cancel each other are not seen, so of it and
    `Shifted(steps)` the one whose Euler steps end nearer is returned. Other solvers have other errors; the levels are
    for this guidance and size (height, width; None: the model's own). They are plain numbers, kept by every record.

    Raises:
        PlanError: there are no prompts, the model cannot make this size, or `fine` is below `steps`.
    """
    check_whole("steps", steps, 1)
    check_whole("fine", fine, steps)
    if isinstance(prompts, str) or not prompts:
        raise PlanError(f"optimise needs a list of prompts to measure on, got {prompts!r}")
    info = model.info
    height, width = check_sides("size", size, info.size)
    check_size(height, width, info.space)
    scale, patch = info.space.downscale, info.space.patch
    shape = (1, info.space.channels, height // scale, width // scale)
    tokens = shape[2] * shape[3] // patch**2
    sigmas = Shifted(fine)(1.0, tokens, info)
    chosen = guidance or own_guidance(info)
    options = FieldOptions(sigmas=RK4().points(sigmas))
    away = model.condition([negative]) if chosen.passes > 1 else None
    runs = list[tuple[Velocity, Tensor, Tensor]]()
    total = torch.zeros(fine + 1, fine + 1, dtype=torch.float64)
    for index, prompt in enumerate(prompts):
        noise = PerItem()((seed + index,), shape, scope="Sample/0", draw=0).to(model.device)
        field = chosen.field(model, model.condition([prompt]), away, options)
        wrong, end = _errors(field, noise, sigmas)
        total += wrong
        runs.append((chosen.field(model, model.condition([prompt]), away), noise, end))

    def miss(sigmas: Sigmas) -> float:
        with torch.no_grad():
            return sum(float((integrate(Euler(), field, x, sigmas) - end).norm()) for field, x, end in runs)

    found = tuple(sigmas[i] for i in shortest(total.tolist(), steps))
    return Explicit(min((found, Shifted(steps)(1.0, tokens, info)), key=miss))


BESIDE, TINY = 0.01, 1e-12  # how far the second trajectory begins from the first; against a division by 0


@torch.no_grad()
def _errors(field: Velocity, noise: Tensor, sigmas: Sigmas) -> tuple[Tensor, Tensor]:
    """(n, n) of n levels: by how much Euler's step from each to each later one misses the trajectory; its end."""
    seen: dict[float, Tensor] = {}

    def watched(x: Tensor, sigma: float) -> Tensor:
        v = field(x, sigma)
        seen[sigma] = v  # RK4 asks at a level twice, the last time from the state itself
        return v

    def trajectory(x: Tensor) -> list[Tensor]:
        states = [x]
        integrate(RK4(), watched, x, sigmas, on_step=lambda step: states.append(step.x))
        return states

    beside = trajectory(noise + BESIDE * noise.flip(-1))
    states = trajectory(noise)
    apart = [float((a - b).norm()) for a, b in zip(beside, states, strict=True)]
    wrong = torch.zeros(len(sigmas), len(sigmas), dtype=torch.float64)
    for i, sigma in enumerate(sigmas[:-1]):
        for j in range(i + 1, len(sigmas)):
            missed = torch.add(states[i], seen[sigma], alpha=sigmas[j] - sigma) - states[j]
            wrong[i, j] = float(missed.square().mean().sqrt()) * apart[-1] / max(apart[j], TINY)
    return wrong, states[-1]


def shortest(costs: Sequence[Sequence[float]], steps: int) -> tuple[int, ...]:
    """The path 0 < ... < n of exactly so many steps with the least sum of costs[i][j], i < j."""
    n, far = len(costs) - 1, (math.inf, tuple[int, ...]())
    best = [(0.0, (0,)), *[far] * n]
    for _ in range(steps):
        longer = [
            [(cost + costs[i][j], (*path, j)) for i, (cost, path) in enumerate(best[:j]) if path] for j in range(n + 1)
        ]
        best = [min(paths, default=far) for paths in longer]
    return best[n][1]

"""What rivals share that sample in three stages over different tokens."""

from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from mrflow.backbone import FieldOptions, Positions
from mrflow.cost import forward_flops
from mrflow.errors import PlanError
from mrflow.guidance import Guidance, own_guidance
from mrflow.model_info import ModelInfo
from mrflow.schedules import Sigmas
from mrflow.solvers import Euler
from mrflow.stage import Work
from mrflow.tokens import pack, unpack

if TYPE_CHECKING:
    from mrflow.stage import Context


def forwards(
    guidance: Guidance | None,
    sigmas: tuple[Sigmas, ...],
    tokens: tuple[int, ...],
    batch: int,
    model: ModelInfo,
) -> Work:
    """The work of Euler steps along each of `sigmas`, over as many tokens each."""
    chosen, nfe, flops = guidance or own_guidance(model), 0, 0.0
    model.require(chosen.needs)
    for levels, count in zip(sigmas, tokens, strict=True):
        evals = chosen.evals(Euler().points(levels))
        nfe, flops = nfe + evals, flops + evals * forward_flops(model, count)
    return Work(nfe, batch * flops, negative=chosen.passes > 1)


def shared_out(grid: Sigmas, steps: tuple[int, int, int]) -> tuple[Sigmas, Sigmas, Sigmas]:
    """The levels of three stages of one grid.

    Raises:
        PlanError: the grid has another number of steps.
    """
    if len(grid) - 1 != sum(steps):
        raise PlanError(f"the schedule has {len(grid) - 1} steps, and the stages take {sum(steps)}; make both the same")
    a, b = steps[0], steps[0] + steps[1]
    return grid[: a + 1], grid[a : b + 1], grid[b:]


def at_places(
    ctx: "Context",
    guidance: Guidance,
    tokens: Float[Tensor, "b n d"],
    sigmas: Sigmas,
    at: Float[Tensor, "b n 2"],
    h: int,
    w: int,
    patch: int,
) -> Float[Tensor, "b n d"]:
    """Tokens that lie anywhere, integrated; each picture has places of its own, so each is integrated by itself."""
    out: list[Tensor] = []
    for i in range(len(tokens)):
        row = unpack(tokens[i : i + 1], 1, tokens.shape[1], patch=patch)
        options = FieldOptions(positions=Positions(at[i], h, w))
        out.append(pack(ctx.only(i).integrate(Euler(), guidance, row, sigmas, options=options), patch=patch))
    return torch.cat(out)

"""What rivals share that sample in three stages over different tokens."""

from abc import abstractmethod
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from mrflow._checks import is_whole, require
from mrflow.backbone import FieldOptions, Positions
from mrflow.cost import forward_flops
from mrflow.errors import PlanError
from mrflow.guidance import Guidance, own_guidance
from mrflow.model_info import Capabilities, ModelInfo
from mrflow.noise import Noise, PerItem
from mrflow.protocols.tokens import pack, unpack
from mrflow.schedules import Sigmas
from mrflow.solvers import Euler
from mrflow.spec import Latents, Start, check_size
from mrflow.stage import Context, Stage, Work


@dataclass(frozen=True)
class ThreeStages(Stage[Start, Latents]):
    """Noise to clean latents by Euler's method in three stages of `steps`, each over tokens of its own."""

    height: int
    width: int
    steps: tuple[int, int, int]
    guidance: Guidance | None = field(default=None, kw_only=True)
    noise: Noise = field(default=PerItem(), kw_only=True)

    def __post_init__(self) -> None:
        right = len(self.steps) == 3 and all(is_whole(n, 1) for n in self.steps)
        require(right, "steps", "three whole numbers above 0", self.steps)

    @abstractmethod
    def sigmas(self, model: ModelInfo) -> tuple[Sigmas, Sigmas, Sigmas]:
        """The noise levels of each stage.

        Raises:
            PlanError: the schedule has another number of steps than the stages together.
        """

    @abstractmethod
    def tokens(self, model: ModelInfo) -> tuple[int, int, int]:
        """Tokens that go through the network in each stage."""

    def evaluations(self, spec: Start, model: ModelInfo) -> tuple[float, ...]:
        """Where the model's field is asked."""
        return tuple(sigma for stage in self.sigmas(model) for sigma in Euler().points(stage))

    def plan(self, spec: Start, model: ModelInfo) -> Latents:
        """Clean latents of the picture's size."""
        model.require(Capabilities(positions=True))
        check_size(self.height, self.width, model.space)
        _ = self.sigmas(model)
        scale = model.space.downscale
        return Latents(spec.batch, self.height // scale, self.width // scale, model.space)

    def work(self, spec: Start, out: Latents, model: ModelInfo) -> Work:
        """Forwards over the tokens of each stage."""
        chosen, nfe, flops = self.guidance or own_guidance(model), 0, 0.0
        model.require(chosen.needs)
        for sigmas, count in zip(self.sigmas(model), self.tokens(model), strict=True):
            evals = chosen.evals(Euler().points(sigmas))
            nfe, flops = nfe + evals, flops + evals * forward_flops(model, count)
        return Work(nfe, spec.batch * flops, negative=chosen.passes > 1)


@dataclass(frozen=True)
class GrowingTokens(ThreeStages):
    """The first stage on half the sides; some tokens grow first, to four each, then the rest."""

    @abstractmethod
    def chosen(self, coarse: int) -> int:
        """How many of the coarse tokens grow first."""

    def tokens(self, model: ModelInfo) -> tuple[int, int, int]:
        """Tokens of each stage."""
        fine = model.tokens(self.height, self.width)
        coarse = fine // 4
        return coarse, coarse + 3 * self.chosen(coarse), fine

    def plan(self, spec: Start, model: ModelInfo) -> Latents:
        """Clean latents of the picture's size, whose half is a size too."""
        out = super().plan(spec, model)
        if self.height % (2 * model.space.multiple) or self.width % (2 * model.space.multiple):
            raise PlanError(f"half of {self.height}x{self.width} is not a whole number of tokens")
        return out


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
    ctx: Context,
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

"""How conditions become one velocity field: distilled guidance, classifier-free guidance, and where it applies.

Each branch has a field of its own, so a cache that lives in a field never mixes the conditional and the unconditional.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from einops import rearrange, repeat
from torch import Tensor

from mrflow._checks import check_number
from mrflow.backbone import Backbone, Condition, FieldOptions
from mrflow.errors import PlanError, is_out_of_memory
from mrflow.flow import Velocity
from mrflow.notes import note
from mrflow.spec import ModelInfo


class Guidance(ABC):
    """A way to guide. Write your own: a frozen dataclass with `passes` and `field`."""

    @property
    @abstractmethod
    def passes(self) -> int:
        """The most passes of the network that one evaluation of the field takes; above 1 a negative is needed."""

    @abstractmethod
    def field(
        self, model: Backbone, cond: Condition, negative: Condition | None, options: FieldOptions = FieldOptions()
    ) -> Velocity:
        """A fresh guided velocity field for one integration; each field of `model` is asked for with `options`."""

    def evals(self, points: Sequence[float]) -> int:
        """Exact passes of the network for evaluations at these noise levels (a solver's `points`)."""
        return self.passes * len(points)

    def branches(self, points: Sequence[float]) -> tuple[tuple[float, ...], ...]:
        """The levels at which each field of a model is asked, of evaluations at these: what caches are planned by."""
        return (tuple(points),) * self.passes


@dataclass(frozen=True)
class Distilled(Guidance):
    """The conditional field alone; `value` goes to the model's guidance embedding (None: the model's own value)."""

    value: float | None = None

    def __post_init__(self) -> None:
        if self.value is not None:
            check_number("guidance", self.value, 0)

    @property
    def passes(self) -> int:
        return 1

    def field(
        self, model: Backbone, cond: Condition, negative: Condition | None, options: FieldOptions = FieldOptions()
    ) -> Velocity:
        if self.value is not None and model.info.guidance is None:
            raise PlanError(
                f"{model.info.name} has no guidance embedding, so Distilled({self.value:g}) would change nothing; "
                "use Distilled() or CFG(scale)"
            )
        return model.field(cond, replace(options, guidance=self.value))


@dataclass(frozen=True)
class CFG(Guidance):
    """Classifier-free guidance u + scale (c - u) (Ho & Salimans 2022, arXiv 2207.12598); at scale 1, c in one pass.

    `rescale` is Qwen-Image's: m ||c|| / ||m|| with m = u + scale (c - u), norms over each token's latent cells (patch x
    patch of all channels), as in diffusers `QwenImagePipeline`, without an epsilon. `packed`: both branches in one pass
    over the network, where the model can; two passes when memory runs out.
    """

    scale: float
    rescale: bool = field(default=False, kw_only=True)
    packed: bool = field(default=True, kw_only=True)

    def __post_init__(self) -> None:
        check_number("scale", self.scale, 0)

    @property
    def passes(self) -> int:
        return 1 if self.scale == 1.0 else 2

    def field(
        self, model: Backbone, cond: Condition, negative: Condition | None, options: FieldOptions = FieldOptions()
    ) -> Velocity:
        if self.scale == 1.0:
            return model.field(cond, options)
        branches = _branches(model, cond, negative, options, self, packed=self.packed)

        patch = model.info.space.patch

        def guided(x: Tensor, sigma: float) -> Tensor:
            towards, away = branches(x, sigma)
            mixed = _mix(towards, away, self.scale)
            if not self.rescale:
                return mixed
            ratio = token_norm(towards, patch) / token_norm(mixed, patch)
            return mixed * repeat(ratio, "b 1 h w -> b 1 (h p) (w q)", p=patch, q=patch)

        return guided


@dataclass(frozen=True)
class Interval(Guidance):
    """`inner` where low < sigma <= high, the conditional alone elsewhere (Kynkäänniemi et al., arXiv 2404.07724)."""

    inner: Guidance
    low: float
    high: float

    def __post_init__(self) -> None:
        for name, value in (("low", self.low), ("high", self.high)):
            check_number(name, value)
        if not 0.0 <= self.low < self.high <= 1.0:
            raise PlanError(f"an interval must lie in 0 <= low < high <= 1, got low {self.low!r}, high {self.high!r}")

    @property
    def passes(self) -> int:
        return self.inner.passes

    def field(
        self, model: Backbone, cond: Condition, negative: Condition | None, options: FieldOptions = FieldOptions()
    ) -> Velocity:
        inside, outside = self.inner.field(model, cond, negative, options), model.field(cond, options)

        def guided(x: Tensor, sigma: float) -> Tensor:
            return inside(x, sigma) if self._holds(sigma) else outside(x, sigma)

        return guided

    def evals(self, points: Sequence[float]) -> int:
        inside = [sigma for sigma in points if self._holds(sigma)]
        return self.inner.evals(inside) + len(points) - len(inside)

    def branches(self, points: Sequence[float]) -> tuple[tuple[float, ...], ...]:
        inside = tuple(sigma for sigma in points if self._holds(sigma))
        return (*self.inner.branches(inside), tuple(sigma for sigma in points if not self._holds(sigma)))

    def _holds(self, sigma: float) -> bool:
        return self.low < sigma <= self.high


def token_norm(v: Tensor, patch: int) -> Tensor:
    """The Euclidean norm of every token of (batch, channels, height, width), as (batch, 1, rows, columns)."""
    return rearrange(v, "b c (h p) (w q) -> b 1 h w (c p q)", p=patch, q=patch).square().sum(-1).sqrt()


def _mix(c: Tensor, u: Tensor, scale: float) -> Tensor:
    return torch.lerp(u, c, scale)


def _branches(
    model: Backbone,
    cond: Condition,
    negative: Condition | None,
    options: FieldOptions,
    guidance: Guidance,
    *,
    packed: bool,
) -> Callable[[Tensor, float], tuple[Tensor, Tensor]]:
    """Both velocities: from one pass where the model can and memory allows, else from a field each."""
    if negative is None:
        raise PlanError(f"{guidance!r} needs a negative; encode one (the empty prompt will do), or use scale 1")
    other = negative.repeat(cond.batch)
    packed = packed and model.info.capabilities.together and options.cache is None
    joint = model.field(cond, replace(options, beside=(other,))) if packed else None
    apart: list[Velocity] = []
    if joint is None:
        apart.extend((model.field(cond, options), model.field(other, options)))

    def both(x: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
        if joint is not None and not apart:
            try:
                c, u = joint(x, sigma).chunk(2)
                return c, u
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
            note("both branches of the guidance do not fit into memory at once; they take turns from here on")
        if not apart:
            apart.extend((model.field(cond, options), model.field(other, options)))
        return apart[0](x, sigma), apart[1](x, sigma)

    return both


def own_guidance(model: ModelInfo) -> Guidance:
    """What a stage with `guidance=None` uses: the guidance that the model is published with."""
    if model.cfg == 1.0:
        return Distilled()
    return CFG(model.cfg, rescale=model.rescale)

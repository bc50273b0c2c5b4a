"""What a residual cache is: a rule that says which evaluations are computed, and what stands in for the others.

A cache is a slot: a frozen dataclass of plain fields. `Sample(..., cache=TeaCache(0.25))` caches one stage,
`TeaCache(0.25)(model)` a whole model. It holds nothing: memory is opened by each field, so for each integration and
each branch of a guidance, and each picture of a batch decides for itself. Nothing can leak into another run,
resolution, prompt, branch or picture.
"""

import math
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Literal, TypeVar

from torch import Tensor

from mrflow.caches.extrapolate import Extrapolation
from mrflow.errors import PlanError
from mrflow.flow import Velocity
from mrflow.pieces import Pieces, Step, StepFactory
from mrflow.spec import Capabilities, Forecast, ModelInfo

if TYPE_CHECKING:
    from mrflow.backbone import Backbone
    from mrflow.caches.cached import Cached

Feature = Literal["change", "output", "velocity"]
"""What is kept: what the skipped blocks add, the image stream after them, or the velocity behind the whole network."""


class Unseen(Exception):
    """A rule looked at a picture while there is none: it was only planned."""


class Look:
    """What a rule may look at: one picture, about to be evaluated for the `index`-th time (from 0) in its branch.

    `place` is where that lies among the `total` evaluations of the integration (0: not known); they differ where a
    guidance asks a branch at some levels only. What is not looked at is not computed.
    """

    def __init__(
        self,
        index: int,
        place: int,
        total: int,
        sigma: float,
        *,
        probe: Callable[[], Tensor] | None = None,
        change: Callable[[], Tensor] | None = None,
    ) -> None:
        self.index, self.place, self.total, self.sigma = index, place, total, sigma
        self._probe, self._change = probe, change

    @property
    def last(self) -> bool:
        """Whether the integration ends here."""
        return self.place == self.total - 1

    def probe(self) -> Tensor:
        """The embedded image after the first block's modulated norm, before attention: (1, tokens, width)."""
        if self._probe is None:
            raise Unseen
        return self._probe()

    def change(self) -> Tensor:
        """What the blocks before the cached span added to the image stream: (1, tokens, width)."""
        if self._change is None:
            raise Unseen
        return self._change()


Rule = Callable[[Look], bool]
"""Whether an evaluation is computed. Called once for each, in order; what it remembers is its own."""


class Cache(ABC):
    """A way to leave out evaluations. Write your own: a frozen dataclass with `rule`, and the rest where it differs."""

    @abstractmethod
    def rule(self, info: ModelInfo, levels: Sequence[float]) -> Rule:
        """A fresh rule for one picture in one branch of one integration over `levels` (empty: not announced).

        Where nothing is kept yet, the evaluation is computed whatever the rule says.
        """

    def span(self, blocks: int) -> tuple[int, int]:
        """The blocks that may be left out, from the first to before the last; all of them unless said."""
        return 0, blocks

    def feature(self) -> Feature:
        """What is kept of a computed evaluation."""
        return "change"

    def extrapolation(self) -> Extrapolation:
        """How what was kept becomes what is used."""
        return Extrapolation()

    def estimate(self, evaluations: int) -> int:
        """About how many of these are computed, where the picture decides; all of them unless said."""
        return evaluations

    def share(self, info: ModelInfo, tokens: int) -> float:
        """What a computed evaluation costs, as a part of one without the cache."""
        return 1.0

    def field(
        self, open_field: Callable[[StepFactory], Velocity], sigmas: Sequence[float], info: ModelInfo
    ) -> Velocity:
        """A model's field with a fresh memory: what `open_field` gives for this cache's step."""
        clock, patch = Clock(sigmas), info.space.patch
        inner = open_field(partial(self.opened, clock=clock, info=info))

        def velocity(x: Tensor, sigma: float) -> Tensor:
            clock.tick(sigma)
            clock.grid = (x.shape[-2] // patch, x.shape[-1] // patch)
            return inner(x, sigma)

        return velocity

    def forecast(self, info: ModelInfo, sigmas: Sequence[float], branch: Sequence[float]) -> Forecast:
        """What it will do with a branch that is asked at the levels `branch` of an integration over `sigmas`.

        Found by asking the rule, so it cannot differ from a run; where the rule must see the picture, by the estimate.
        """
        a = info.architecture
        blocks = a.double_blocks + a.single_blocks if a else 0
        start, stop = self.span(blocks)
        kept = 1 - max(0, stop - start) / blocks if blocks else 0.0
        asked, computed = len(branch), 0
        rule, clock = self.rule(info, sigmas), Clock(sigmas)
        try:
            for index, sigma in enumerate(branch):
                clock.tick(sigma)
                computed += rule(Look(index, clock.place, clock.total, sigma)) or index == 0
        except Unseen:
            return Forecast(asked, min(asked, max(1, self.estimate(asked))), kept, exact=False)
        return Forecast(asked, computed, kept, exact=True)

    def opened(self, pieces: Pieces, clock: "Clock", info: ModelInfo) -> Step:
        """The step that one field takes; what it remembers dies with it."""
        from mrflow.caches.memory import Memory

        return Memory(self, pieces, clock, info)

    def check(self, info: ModelInfo) -> None:  # noqa: B027  (nothing to check is fine)
        """Raise PlanError where this model cannot be cached so."""

    def __call__(self, model: "Backbone") -> "Cached":
        """The model with this cache in all its fields.

        Raises:
            PlanError: the model cannot be taken apart, or is cached already.
        """
        from mrflow.caches.cached import Cached

        return Cached(model, self)


class Clock:
    """Where among the announced levels a field is being asked."""

    def __init__(self, levels: Sequence[float]) -> None:
        self.levels, self.total = tuple(levels), len(levels)
        self.place, self.sigma = -1, math.nan
        self.grid: tuple[int, int] | None = None  # tokens down and across, of what is being asked for

    def tick(self, sigma: float) -> None:
        """The next evaluation is at `sigma`."""
        after = self.place + 1
        self.place = self.levels.index(sigma, after) if sigma in self.levels[after:] else after
        self.sigma = sigma


def check_cache(cache: object, info: ModelInfo) -> None:
    """Refuse a stage's cache that cannot work for a model; None is fine.

    Raises:
        PlanError: it is no cache, the model is cached as a whole already, or the cache refuses it.
    """
    if cache is None:
        return
    if not isinstance(cache, Cache):
        hint = f"; make one: {cache.__name__}(...)" if isinstance(cache, type) else ""
        raise PlanError(f"cache must be a Cache such as TeaCache(0.25), got {cache!r}{hint}")
    if info.cache is not None:
        raise PlanError(f"{info.name} is cached already, by {info.cache!r}; give the stage a model without a cache")
    info.require(Capabilities(cache=True))
    cache.check(info)


N = TypeVar("N")


def measured(table: Mapping[str, N], info: ModelInfo) -> N | None:
    """What a table of measured numbers has for a model: for this version of it ("pocket-3"), or for its name."""
    return table.get(info.version.partition("+")[0], table.get(info.name))


def between(points: Sequence[tuple[float, float]], x: float) -> float:
    """The value at x of the straight lines through (x, y) `points`, which rise in x; level beyond both ends."""
    at = bisect_right([p[0] for p in points], x)
    if at == 0:
        return points[0][1]
    if at == len(points):
        return points[-1][1]
    (x0, y0), (x1, y1) = points[at - 1], points[at]
    return y0 + (y1 - y0) * (x - x0) / (x1 - x0)


def difference(new: Tensor, old: Tensor) -> float:
    """mean |new - old| / mean |old|, in float32; NaN where both are zero, which no threshold holds back."""
    new, old = new.float(), old.float()
    return float((new - old).abs().mean() / old.abs().mean())

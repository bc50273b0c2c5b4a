"""What a residual cache is: a rule that says which evaluations are computed, and what stands in for the others.

A cache is a slot: a frozen dataclass of plain fields. `Sample(..., cache=TeaCache(0.25))` caches one stage,
`TeaCache(0.25)(model)` a whole model. It holds nothing: memory is opened by each field, so for each integration and
each branch of a guidance, and each picture of a batch decides for itself. Nothing can leak into another run,
resolution, prompt, branch or picture.
"""

import uuid
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

from torch import Tensor

from mrflow._checks import Checked
from mrflow.backbone import Backbone, Condition, FieldOptions, Wrapper
from mrflow.caches.clock import Clock, Evaluation, Feature, Rule, Unseen
from mrflow.caches.extrapolate import Extrapolation, Predictor
from mrflow.caches.memory import CachedStep
from mrflow.errors import PlanError, RecordError
from mrflow.flow import Velocity
from mrflow.model_info import Capabilities, Forecast, ModelInfo
from mrflow.protocols.pieces import Pieces, StepFactory, TransformerStep
from mrflow.protocols.tokens import TokenVelocity, on_tokens
from mrflow.records.chains import fingerprint


class Cache(Checked, ABC):
    """A way to leave out evaluations. Write your own: a frozen dataclass with `rule`, and the rest where it differs."""

    @abstractmethod
    def rule(self, info: ModelInfo, sigmas: Sequence[float]) -> Rule:
        """A fresh rule for one picture in one branch of one integration over `sigmas` (empty: not announced).

        Where nothing is kept yet, the evaluation is computed whatever the rule says.
        """

    def span(self, blocks: int) -> tuple[int, int]:
        """The blocks that may be left out, from the first to before the last (default: all of them)."""
        return 0, blocks

    def feature(self) -> Feature:
        """What is kept of a computed evaluation."""
        return "change"

    def extrapolation(self) -> Predictor:
        """How what was kept becomes what is used."""
        return Extrapolation()

    def estimate(self, evaluations: int) -> int:
        """About how many of these are computed, where the picture decides (default: all of them)."""
        return evaluations

    def share(self, info: ModelInfo, tokens: int) -> float:
        """What a computed evaluation costs, as a part of one without the cache."""
        return 1.0

    def field(
        self, open_field: Callable[[StepFactory], Velocity], sigmas: Sequence[float], info: ModelInfo
    ) -> Velocity:
        """A model's field with a fresh memory: what `open_field` gives for this cache's step."""
        clock = Clock(sigmas)
        return CachedField(open_field(partial(self.make_step, clock=clock, info=info)), clock, info.space.patch)

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
                computed += rule(Evaluation(index, clock.place, clock.total, sigma)) or index == 0
        except Unseen:
            return Forecast(asked, min(asked, max(1, self.estimate(asked))), kept, exact=False)
        return Forecast(asked, computed, kept, exact=True)

    def make_step(self, pieces: Pieces, clock: Clock, info: ModelInfo) -> TransformerStep:
        """The step that one field takes; what it remembers dies with it."""
        return CachedStep(self, pieces, clock, info)

    def check(self, info: ModelInfo) -> None:
        """Raise PlanError where this model cannot be cached so."""

    def __call__(self, model: Backbone) -> "Cached":
        """The model with this cache in all its fields.

        Raises:
            PlanError: the model cannot be taken apart, or is cached already.
        """
        return Cached(model, self)


def check_fits(cache: object, info: ModelInfo) -> None:
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


class Cached(Wrapper):
    """`model`, with `cache` opened anew in every field. Build it with `cache(model)` or directly.

    The branches of a guidance are asked one after another, each with a memory of its own. `info.version` names the
    cache, so that results of stages are never taken for those of the bare model.

    Raises:
        PlanError: the model cannot be taken apart, or is cached already.
    """

    def __init__(self, model: Backbone, cache: Cache) -> None:
        super().__init__(model)
        check_fits(cache, model.info)
        self._cache = cache
        try:
            mark = fingerprint(cache)
        except RecordError:  # a class whose source cannot be read: its results are never reused
            mark = uuid.uuid4().hex
        self._mark = f"+{type(cache).__name__}-{mark[:12]}"

    @property
    def info(self) -> ModelInfo:
        """The model's facts, with this cache among them."""
        info = self.model.info
        can = replace(info.capabilities, cache=False, policy=False, together=False)
        return replace(info, version=info.version + self._mark, capabilities=can, cache=self._cache)

    def check(self, options: FieldOptions) -> None:
        """As the model does, with the cache."""
        self.model.check(self._with_cache(options))

    def field(self, cond: Condition, options: FieldOptions = FieldOptions()) -> Velocity:
        """The model's field with a fresh memory."""
        return self.model.field(cond, self._with_cache(options))

    def _with_cache(self, options: FieldOptions) -> FieldOptions:
        if options.cache is not None:
            raise PlanError(f"{self.info.name} is cached already, by {self._cache!r}; give it a model without a cache")
        self.info.require(options.needs)
        return replace(options, cache=self._cache)


@dataclass(frozen=True)
class CachedField:
    """A field whose step is a cache's: the cache is told what is asked for."""

    inner: Velocity
    clock: Clock
    patch: int

    def __call__(self, x: Tensor, sigma: float) -> Tensor:
        """Velocities of latents (b, c, height, width)."""
        height, width = x.shape[2:]
        self._tell(sigma, height, width, lambda: x)
        return self.inner(x, sigma)

    def on_tokens(self, height: int, width: int) -> TokenVelocity | None:
        """As `TokenField`."""
        if (inner := on_tokens(self.inner, height, width)) is None:
            return None

        def ask(tokens: Tensor, sigma: float) -> Tensor:
            self._tell(sigma, height, width, lambda: inner.unpack(tokens))
            return inner.ask(tokens, sigma)

        return replace(inner, ask=ask)

    def _tell(self, sigma: float, height: int, width: int, latents: Callable[[], Tensor]) -> None:
        self.clock.tick(sigma)
        self.clock.grid, self.clock.latents = (height // self.patch, width // self.patch), latents


N = TypeVar("N")


def look_up(table: Mapping[str, N], info: ModelInfo) -> N | None:
    """What a table of measured numbers has for a model: for this version of it ("pocket-4"), or for its name."""
    return table.get(info.version.partition("+")[0], table.get(info.name))


def require_numbers(own: N | None, table: Mapping[str, N], info: ModelInfo, lacking: str, advice: str) -> N:
    """The numbers that a cache works with for a model: its `own`, or those that were measured of it.

    Raises:
        PlanError: there are none: "TeaCache knows no coefficients" (`lacking`), and the `advice`.
    """
    found = own or look_up(table, info)
    if found is None:
        raise PlanError(f"{lacking} for {info.name}; {advice}")
    return found


def interpolate(points: Sequence[tuple[float, float]], x: float) -> float:
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

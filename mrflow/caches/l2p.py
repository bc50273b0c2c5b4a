"""L2P: skipped evaluations are sums of computed ones, with weights that were fitted to the model step by step."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from mrflow._checks import check_whole
from mrflow.backbone import Backbone
from mrflow.caches.base import Cache
from mrflow.caches.calibrate import Calibration
from mrflow.caches.clock import Evaluation, Feature, Rule
from mrflow.caches.extrapolate import Gram
from mrflow.caches.taylorseer import Of, check_of, regular
from mrflow.errors import PlanError
from mrflow.guidance import Guidance
from mrflow.model_info import ModelInfo
from mrflow.schedules import Schedule, Shifted

Rows = tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class L2P(Cache):
    """L2P, a learnable linear predictor (Shen et al. 2026, arXiv 2604.26365): one row of weights for each evaluation of
    an integration. An empty row is computed; another holds the weights of the newest computed features, the newest
    last, whose sum stands in.

    Rows belong to a model, a schedule and a number of evaluations: `calibrate` fits them. A stage with another number
    is refused. Where a guidance asks a branch so seldom that the features of a row were not computed, the evaluation
    is. `of` as for `TaylorSeer`.
    """

    rows: Rows
    of: Of = field(default="output", kw_only=True)

    def __post_init__(self) -> None:
        check_of(self.of)
        computed = 0
        for step, row in enumerate(self.rows):
            if len(row) > computed or not all(map(math.isfinite, row)):
                raise PlanError(
                    f"row {step} must be empty (computed) or hold finite weights of at most {computed} features "
                    f"computed before it, got {row!r}"
                )
            computed += not row
        if not computed:
            raise PlanError("rows must begin with an empty one, the first evaluation, which is computed")

    @staticmethod
    def calibrate(
        interval: int,
        model: Backbone,
        prompts: Sequence[str],
        *,
        size: tuple[int, int] | None = None,
        schedule: Schedule = Shifted(28),
        guidance: Guidance | None = None,
        seed: int = 0,
        warmup: int = 3,
        history: int = 2,
        of: Of = "output",
    ) -> "L2P":
        """A cache whose weights are fitted while `model` draws these prompts, each whole, at `size` (None: its low
        size). Computed are the evaluations of `TaylorSeer(interval, warmup=warmup)`.

        The weights of a step minimise the squared error of the sum against the feature, over all prompts, branches,
        tokens and channels, as in the paper; here in closed form (normal equations), there by gradient descent. The
        number of features in a sum, the newest `history`, is our choice, since the authors' code is not public: with
        more, weights grow, sums fit better whole trajectories and worse those that the sums themselves have bent.

        Raises:
            PlanError: the model cannot be taken apart, or there are no prompts.
        """
        check_whole("interval", interval, 1)
        check_whole("warmup", warmup, 1)
        check_whole("history", history, 1)
        check_of(of)
        grams = Calibration(model, prompts, size, schedule, guidance, seed).inner_products(of)
        steps = max(map(len, grams))
        computed = [regular(i, interval, warmup) for i in range(steps)]
        whole = [gram for gram in grams if len(gram) == steps]  # not of a branch that was asked in an interval only
        return L2P(fit_weights(np.sum(whole, axis=0), computed, history), of=of)

    def feature(self) -> Feature:
        """What is predicted."""
        return self.of

    def extrapolation(self) -> "_Table":
        """The rows."""
        return _Table(self.rows)

    def rule(self, info: ModelInfo, sigmas: Sequence[float]) -> Rule:
        """The empty rows, and what they need."""
        if sigmas and len(sigmas) != len(self.rows):
            raise PlanError(
                f"this L2P was fitted to {len(self.rows)} evaluations, and the stage has {len(sigmas)}; give it that "
                "many steps, or fit another: L2P.calibrate(interval, model, prompts, schedule=...)"
            )
        table, done = self.extrapolation(), list[int]()

        def due(look: Evaluation) -> bool:
            needed = table.weighed_by(look.place)
            if needed and set(needed) <= set(done[-table.keep :]):
                return False
            done.append(look.place)
            return True

        return due


@dataclass(frozen=True)
class _Table:
    """Weights by row."""

    rows: Rows

    @property
    def keep(self) -> int:
        """The most that a row asks for."""
        return max(1, *map(len, self.rows))

    def weighed_by(self, at: int) -> tuple[int, ...]:
        """The evaluations whose features a row weighs; none where the evaluation is computed."""
        row = self.rows[at] if at < len(self.rows) else ()
        return tuple(step for step in range(at) if not self.rows[step])[-len(row) :] if row else ()

    def weights(self, steps: Sequence[int], at: int, *, total: int = 0, gram: Gram | None = None) -> tuple[float, ...]:
        """The row, and 0 for features that it does not weigh; the rule has made sure that all others are there."""
        row = dict(zip(self.weighed_by(at), self.rows[at], strict=True))
        return tuple(row.get(step, 0.0) for step in steps)


def fit_weights(gram: NDArray[np.float64], computed: Sequence[bool], history: int) -> Rows:
    """Weights that minimise |sum_i w_i F_i - F|^2 at each step that is not computed, from inner products of all steps.

    `gram`: <F_s, F_t> (steps, steps), summed over trajectories; the sum is over the newest `history` computed features.
    """
    rows = list[tuple[float, ...]]()
    for step, kept in enumerate(computed):
        used = [i for i in range(step) if computed[i]][-history:]
        row = () if kept else np.linalg.lstsq(gram[np.ix_(used, used)], gram[used, step], rcond=1e-10)[0]
        rows.append(tuple(map(float, row)))
    return tuple(rows)

"""Means with intervals, and differences that are called so only when their interval says so.

The unit is the prompt: pictures of one prompt are alike, so prompts are resampled and their pictures stay together.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from mrflow.errors import PlanError
from mrflow.sweep.rows import Row

Verdict = Literal["higher", "lower", "no difference shown"]
CHUNK = 4_000_000  # indices drawn at once, to bound memory


@dataclass(frozen=True)
class Interval:
    """A mean, and the middle `level` of its bootstrap distribution over prompts."""

    mean: float
    low: float
    high: float
    prompts: int
    pictures: int

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True)
class Comparison:
    """a - b over the prompts and draws that both have. `missing` counts pictures that only one of them has."""

    metric: str
    difference: Interval
    verdict: Verdict
    missing: int
    groups: Mapping[str, "Comparison"]


def interval(
    values: Mapping[str, Sequence[float]], *, level: float = 0.95, draws: int = 10_000, seed: int = 0
) -> Interval:
    """The mean over all pictures and its interval; `values` are those of each prompt's pictures.

    Percentile bootstrap (Efron and Tibshirani 1993, chapter 13): prompts are drawn with replacement.

    Raises:
        PlanError: there are no values, or the level or the draws make no sense.
    """
    if not 0 < level < 1 or draws < 1:
        raise PlanError(f"level must lie between 0 and 1 and draws be at least 1, got {level} and {draws}")
    groups = [np.asarray(v, dtype=np.float64) for v in values.values() if len(v)]
    if not groups:
        raise PlanError("there is no value to average")
    sums, sizes = np.array([g.sum() for g in groups]), np.array([len(g) for g in groups], dtype=np.float64)
    rng, means = np.random.default_rng(seed), np.empty(draws)
    step = max(1, CHUNK // len(groups))
    for start in range(0, draws, step):
        pick = rng.integers(0, len(groups), (min(step, draws - start), len(groups)))
        means[start : start + step] = sums[pick].sum(1) / sizes[pick].sum(1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(sums.sum() / sizes.sum()), float(low), float(high), len(groups), int(sizes.sum()))


def values(rows: Iterable[Row], metric: str) -> dict[str, list[float]]:
    """A metric's values of each prompt's pictures; failed rows and rows without it are left out."""
    out: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        value = number(row, metric)
        if value is not None:
            out[row.prompt].append(value)
    return dict(out)


def number(row: Row, metric: str) -> float | None:
    """A metric, or `seconds`, `nfe`, `flops`, `peak_bytes`, of a row that is done; None where there is none."""
    if not row.done:
        return None
    if metric in ("seconds", "nfe", "flops", "peak_bytes"):
        return float(getattr(row, metric))
    value = row.metrics.get(metric)
    return None if value is None else float(value)


def compare(
    a: Sequence[Row],
    b: Sequence[Row],
    metric: str,
    *,
    by: str | None = None,
    level: float = 0.95,
    draws: int = 10_000,
    seed: int = 0,
) -> Comparison:
    """How much higher `metric` is in a than in b, paired by prompt and draw; `by` is a tag to split it by.

    Raises:
        PlanError: no prompt and draw has the metric in both.
    """

    def table(rows: Sequence[Row]) -> dict[tuple[str, int], tuple[float, str]]:
        pairs = ((row, number(row, metric)) for row in rows)
        return {(r.prompt, r.draw): (v, r.tags.get(by, "") if by else "") for r, v in pairs if v is not None}

    mine, theirs = table(a), table(b)
    shared = [key for key in mine if key in theirs]
    if not shared:
        raise PlanError(f"no prompt and draw has {metric!r} in both")

    def one(keys: Sequence[tuple[str, int]]) -> tuple[Interval, Verdict]:
        differences: dict[str, list[float]] = defaultdict(list)
        for key in keys:
            differences[key[0]].append(mine[key][0] - theirs[key][0])
        found = interval(differences, level=level, draws=draws, seed=seed)
        # With one prompt the interval is a point, which shows nothing about others.
        shown = found.prompts > 1
        verdict: Verdict = "no difference shown"
        if shown and found.low > 0:
            verdict = "higher"
        elif shown and found.high < 0:
            verdict = "lower"
        return found, verdict

    groups: dict[str, Comparison] = {}
    if by is not None:
        names = sorted({mine[key][1] for key in shared})
        for name in names:
            found, verdict = one([key for key in shared if mine[key][1] == name])
            groups[name] = Comparison(metric, found, verdict, 0, {})
    found, verdict = one(shared)
    return Comparison(metric, found, verdict, len(mine) + len(theirs) - 2 * len(shared), groups)


def grouped(rows: Iterable[Row], key: Callable[[Row], str]) -> dict[str, list[Row]]:
    """Rows by what `key` says, in the order of first appearance."""
    out: dict[str, list[Row]] = {}
    for row in rows:
        out.setdefault(key(row), []).append(row)
    return out


def pareto(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """The names whose (cost, quality) no other has at lower cost and as high quality, cheapest first."""
    order = sorted(points, key=lambda n: (points[n][0], -points[n][1]))
    best, out = -np.inf, list[str]()
    for name in order:
        if points[name][1] > best:
            best = points[name][1]
            out.append(name)
    return out


def array(values: Iterable[float]) -> NDArray[np.float64]:
    """Floats as an array."""
    return np.asarray(list(values), dtype=np.float64)

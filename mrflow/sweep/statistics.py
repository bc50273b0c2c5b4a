"""Means with intervals, and differences that are called so only where a test over the whole table says so.

The unit is the prompt: pictures of one prompt are alike, so prompts are resampled and their pictures stay together.
Verdicts come from sign-flip tests over prompts, corrected for all comparisons of a table (Holm); the intervals beside
them are of one comparison each. Times have units of their own: `mrflow.sweep.timing`.
"""

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from statistics import NormalDist
from typing import Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from mrflow.errors import PlanError
from mrflow.sweep.aims import COSTS
from mrflow.sweep.rows import Row
from mrflow.sweep.significance import MANY, clopper_pearson, holm, rule_of_three, sign_flip

Verdict = Literal["higher", "lower", "no difference shown", "too few prompts"]
K = TypeVar("K", bound=Hashable)
MIN_PROMPTS = 20  # below, a comparison gets no verdict
SHARES = ("score", "text", "legible")  # metrics, with their parts (score.faces), that are shares of what could succeed
CHUNK = 4_000_000  # indices drawn at once, to bound memory


@dataclass(frozen=True)
class ConfidenceInterval:
    """A mean and its interval; `units` are the prompts (of times: the timed batches) that it was made from.

    The ends are NaN where there is no interval.
    """

    mean: float
    low: float
    high: float
    units: int
    pictures: int

    def __str__(self) -> str:
        return f"{self:.3f}"

    def __format__(self, spec: str) -> str:
        """Mean and ends in this form, `.2f` say; the mean alone where numbers all alike have shown no spread."""
        if np.isnan(self.low) or self.low == self.high:
            return format(self.mean, spec)
        return f"{self.mean:{spec}} [{self.low:{spec}}, {self.high:{spec}}]"


@dataclass(frozen=True)
class Comparison:
    """a - b over the prompts and draws that both have. `missing` counts pictures that only one of them has.

    `p` is of the sign-flip test, None below `MIN_PROMPTS` prompts; `adjusted` is it by Holm's correction over the
    `family` comparisons that are read together, and alone decides the verdict. `caveat` says so where the interval is
    no evidence of spread (as the function `caveat` does).
    """

    metric: str
    difference: ConfidenceInterval
    p: float | None
    verdict: Verdict
    missing: int = 0
    groups: Mapping[str, "Comparison"] = field(default_factory=dict[str, "Comparison"])
    adjusted: float | None = None
    family: int = 1
    caveat: str = ""


def interval(
    values: Mapping[str, Sequence[float]],
    *,
    level: float = 0.95,
    draws: int = 10_000,
    seed: int = 0,
    share: bool = False,
) -> ConfidenceInterval:
    """The mean over all pictures and its interval; `values` are those of each prompt's pictures.

    Percentile bootstrap (Efron and Tibshirani 1993, chapter 13): prompts are drawn with replacement; with more than
    `MANY` prompts, its limit, the normal interval of a ratio of sums (Cochran 1977, section 6.4). Where each prompt
    succeeds or fails as a whole (`share`, values of 0 and 1), the exact interval of Clopper and Pearson: with all 48 of
    48 the bootstrap would say that nothing else can be. For scores in [0, 1] it is an outer bound.

    Raises:
        PlanError: there are no values, or the level or the draws make no sense.
    """
    if not 0 < level < 1 or draws < 1:
        raise PlanError(f"level must lie between 0 and 1 and draws be at least 1, got {level} and {draws}")
    groups = [v for v in values.values() if len(v)]
    if not groups:
        raise PlanError("there is no value to average")
    sums = np.array([v[0] if len(v) == 1 else np.sum(v, dtype=np.float64) for v in groups], dtype=np.float64)
    sizes = np.array([len(v) for v in groups], dtype=np.float64)
    each = sums / sizes
    if share and np.isin(each, (0, 1)).all() and 1 in (len({*sizes}), len({*each})):
        ends = clopper_pearson(int(each.sum()), len(groups), level)
        return ConfidenceInterval(float(each.mean()), *ends, len(groups), int(sizes.sum()))
    mean = float(sums.sum() / sizes.sum())
    if len(groups) > MANY:
        reach = NormalDist().inv_cdf((1 + level) / 2) * float(np.square(sums - mean * sizes).sum()) ** 0.5
        reach /= float(sizes.sum())
        return ConfidenceInterval(mean, mean - reach, mean + reach, len(groups), int(sizes.sum()))
    if draws * len(groups) <= CHUNK:
        times = _times(len(groups), draws, seed)
        means = (times @ sums) / (times @ sizes)
    else:
        rng, means = np.random.default_rng(seed), np.empty(draws)
        step = max(1, CHUNK // len(groups))
        for start in range(0, draws, step):
            pick = rng.integers(0, len(groups), (min(step, draws - start), len(groups)))
            means[start : start + step] = sums[pick].sum(1) / sizes[pick].sum(1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return ConfidenceInterval(mean, float(low), float(high), len(groups), int(sizes.sum()))


def caveat(values: Mapping[str, Sequence[float]], found: ConfidenceInterval, *, share: bool) -> str:
    """What a reader must know of an interval that shows no spread; empty for all others.

    A share that is 1 (or 0) for each of n prompts: failures (successes) may still be as frequent as 1 - 0.05^(1/n),
    the one-sided 95 % bound of Clopper and Pearson, about 3 / n (the "rule of three", Hanley and Lippman-Hand 1983).
    """
    each = {v for group in values.values() for v in group}
    if share and each in ({0}, {1}):
        kind = "failure" if each == {1} else "success"
        return f"no {kind} in {found.units}: up to {rule_of_three(found.units):.2g} could hide"
    if found.units == 1:
        return "one prompt: no interval"
    if found.high - found.low <= 1e-12 * max(1.0, abs(found.mean)):
        return f"all {found.units} prompts alike: no interval"
    return ""


@lru_cache(maxsize=2)
def _times(count: int, draws: int, seed: int) -> NDArray[np.float64]:
    """(draws, count): how often each of `count` is drawn; the same for every number of a table."""
    pick = np.random.default_rng(seed).integers(0, count, (draws, count))
    pick += np.arange(draws)[:, None] * count
    return np.bincount(pick.ravel(), minlength=draws * count).reshape(draws, count).astype(np.float64)


@dataclass(frozen=True)
class Columns:
    """Rows that are done, by columns: a report asks for every number many times, and walks the rows once for it.

    `pairs` are prompts and draws, `numbers` by metric what each row has, None where it has none.
    """

    pairs: Sequence[tuple[str, int]]
    numbers: Mapping[str, Sequence[float | None]]

    @classmethod
    def of(cls, rows: Iterable[Row], metrics: Iterable[str]) -> "Columns":
        """Of these rows; a metric may also be one of the costs (`seconds`, `nfe`, `flops`, `peak_bytes`)."""
        done = [row for row in rows if row.status == "done"]
        return cls([(row.prompt, row.draw) for row in done], {name: _column(done, name) for name in metrics})

    def values(self, metric: str) -> dict[str, list[float]]:
        """A metric's values of each prompt's pictures."""
        out: dict[str, list[float]] = defaultdict(list)
        for (prompt, _), value in zip(self.pairs, self.numbers[metric], strict=True):
            if value is not None:
                out[prompt].append(value)
        return dict(out)

    def by_pair(self, metric: str) -> dict[tuple[str, int], float]:
        """A metric's values by prompt and draw."""
        each = zip(self.pairs, self.numbers[metric], strict=True)
        return {pair: value for pair, value in each if value is not None}


def _column(done: Sequence[Row], metric: str) -> list[float | None]:
    if metric in COSTS:
        return [float(getattr(row, metric)) for row in done]
    return [None if (value := row.metrics.get(metric)) is None else float(value) for row in done]


def values(rows: Iterable[Row], metric: str) -> dict[str, list[float]]:
    """A metric's values of each prompt's pictures; failed rows and rows without it are left out."""
    return Columns.of(rows, (metric,)).values(metric)


def number(row: Row, metric: str) -> float | None:
    """A metric, or `seconds`, `nfe`, `flops`, `peak_bytes`, of a row that is done; None where there is none."""
    return _column((row,), metric)[0] if row.status == "done" else None


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

    The whole and its groups are one family; `family` makes one of several comparisons.

    Raises:
        PlanError: no prompt and draw has the metric in both.
    """

    mine, theirs = by_pair(a, metric), by_pair(b, metric)
    shared = [key for key in mine if key in theirs]
    if not shared:
        raise PlanError(f"no prompt and draw has {metric!r} in both")

    def one(keys: Sequence[tuple[str, int]]) -> Comparison:
        kept = {key: mine[key] for key in keys}
        return compare_differences(metric, differences(kept, theirs), level=level, draws=draws, seed=seed)

    tags = {(row.prompt, row.draw): row.tags.get(by, "") for row in a} if by is not None else {}
    names = sorted({tags[key] for key in shared}) if by is not None else []
    groups = {name: one([key for key in shared if tags[key] == name]) for name in names}
    whole = replace(one(shared), missing=len(mine) + len(theirs) - 2 * len(shared), groups=groups)
    return family({"": whole}, level=level)[""]


def by_pair(rows: Iterable[Row], metric: str) -> dict[tuple[str, int], float]:
    """A metric's values by prompt and draw."""
    return Columns.of(rows, (metric,)).by_pair(metric)


def differences(
    mine: Mapping[tuple[str, int], float], theirs: Mapping[tuple[str, int], float]
) -> dict[str, list[float]]:
    """By prompt, mine minus theirs for every draw that both have."""
    out: dict[str, list[float]] = defaultdict(list)
    for key, value in mine.items():
        if key in theirs:
            out[key[0]].append(value - theirs[key])
    return out


def compare_differences(
    metric: str,
    differences: Mapping[str, Sequence[float]],
    *,
    level: float = 0.95,
    draws: int = 10_000,
    seed: int = 0,
    share: bool | None = None,
) -> Comparison:
    """A comparison from the differences of each prompt's pictures; `share` as in `interval`, by the metric's name.

    Raises:
        PlanError: there is no difference.
    """
    share = is_share(metric) if share is None else share
    found = interval(differences, level=level, draws=draws, seed=seed)
    sums = [sum(d) for d in differences.values()]
    said = caveat(differences, found, share=False)
    if share and not any(map(any, differences.values())):
        most = clopper_pearson(0, found.units, level)[1]  # of the prompts that may yet differ, by at most 1
        found = replace(found, low=-most, high=most)
        said = f"equal in all {found.units}: up to {rule_of_three(found.units):.2g} could differ"
    p = sign_flip(sums) if found.units >= MIN_PROMPTS else None
    return family({"": Comparison(metric, found, p, "too few prompts", caveat=said)}, level=level)[""]


def is_share(metric: str) -> bool:
    """Whether a metric is a share of what could succeed, in [0, 1]."""
    return metric.split(".")[0] in SHARES


def family(found: Mapping[K, Comparison], *, level: float = 0.95) -> dict[K, Comparison]:
    """The same comparisons with the verdicts that hold for all of them together, such as for all cells of a table.

    Holm's correction over every comparison and its groups: the chance that any difference is called one where there is
    none is at most 1 - `level`. What has too few prompts gets no verdict and does not count.
    """
    flat = [(key, group, one) for key, c in found.items() for group, one in ((None, c), *c.groups.items())]
    tested = [(key, group, one.p) for key, group, one in flat if one.p is not None]
    adjusted = {(key, g): p for (key, g, _), p in zip(tested, holm([p for *_, p in tested]), strict=True)}

    def judge(key: K, group: str | None, one: Comparison) -> Comparison:
        p, verdict = adjusted.get((key, group)), one.verdict
        if p is not None:
            verdict = "no difference shown" if p > 1 - level else "higher" if one.difference.mean > 0 else "lower"
        return replace(one, adjusted=p, verdict=verdict, family=len(tested))

    return {
        key: replace(judge(key, None, c), groups={name: judge(key, name, g) for name, g in c.groups.items()})
        for key, c in found.items()
    }


def group_rows(rows: Iterable[Row], key: Callable[[Row], str]) -> dict[str, list[Row]]:
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

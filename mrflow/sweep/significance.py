"""Tests and intervals that hold for few samples, and the correction for many comparisons. Plain numbers in and out."""

import math
from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from mrflow.errors import PlanError

MANY = 500  # prompts, beyond which limit laws stand for what is drawn at random
FLIPS = 20_000  # drawn sign patterns; a p-value is at least 1 / (FLIPS + 1)


def sign_flip(differences: Sequence[float], *, flips: int = FLIPS, seed: int = 0) -> float:
    """The two-sided p-value of a paired randomisation test: that the differences add up to 0.

    Were two methods alike, each difference might as well have the other sign: the p-value is the share of sign patterns
    whose sum is at least as far from 0 (Fisher 1935, section 21). All patterns are tried where there are at most
    `flips`, else so many are drawn, and the observed one counts as drawn (Phipson and Smyth 2010).
    With more than `MANY` differences the sum of all patterns is taken as normal, with the fourth-cumulant term of its
    Edgeworth expansion: odd cumulants vanish, and the error falls with the square of their number.
    Differences of 0 say nothing; with none left the p-value is 1. The test is exact for methods that are alike; where
    only their means are, and differences are skewed, 5 % become 7 to 12 % at 48 differences, and 5 to 7 % at 100.
    """
    x = np.asarray(differences, dtype=np.float64)
    x = x[x != 0]
    if not len(x):
        return 1.0
    bar = abs(float(x.sum())) - 1e-12 * float(np.abs(x).sum())  # sums of other orders count as equal
    if len(x) > MANY:
        square = float(np.square(x).sum())
        z: float = abs(float(x.sum())) / math.sqrt(square)
        kurtosis = -2 * float((x**4).sum()) / square**2
        term = math.exp(-z * z / 2) / math.sqrt(2 * math.pi) * kurtosis / 12 * (z**3 - 3 * z)
        return min(1.0, max(math.erfc(z / math.sqrt(2)) + term, 1 / (flips + 1)))
    if 2 ** (len(x) - 1) <= flips:  # the first sign may stay: a pattern and its mirror image are as far from 0
        signs = 1.0 - 2.0 * (np.arange(2 ** (len(x) - 1))[:, None] >> np.arange(len(x)) & 1)
        return float((np.abs(signs @ x) >= bar).mean())
    hits = int((np.abs(_signs(len(x), flips, seed) @ x) >= bar).sum())
    return (hits + 1) / (flips + 1)


@lru_cache(maxsize=2)
def _signs(count: int, flips: int, seed: int) -> NDArray[np.float64]:
    """(flips, count) of -1 and 1."""
    return np.random.default_rng(seed).choice(np.array([-1.0, 1.0]), (flips, count))


def holm(p: Sequence[float]) -> list[float]:
    """P-values adjusted for being one family (Holm 1979): with those up to 0.05 called differences, the chance of any
    false one is at most 5 %, however the comparisons depend on each other.
    """
    out, worst = [0.0] * len(p), 0.0
    for rank, i in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
        worst = max(worst, min(1.0, (len(p) - rank) * p[i]))
        out[i] = worst
    return out


def clopper_pearson(hits: int, count: int, level: float = 0.95) -> tuple[float, float]:
    """The exact interval of a share, from `hits` of `count` (Clopper and Pearson 1934).

    Raises:
        PlanError: `hits` is not from 0 to `count`, or `count` is 0.
    """
    if not 0 <= hits <= count or count < 1:
        raise PlanError(f"a share needs 0 <= hits <= count and count >= 1, got {hits} of {count}")
    tail = (1 - level) / 2
    low = 0.0 if hits == 0 else _root(lambda p: _at_least(hits, count, p) - tail)
    high = 1.0 if hits == count else _root(lambda p: _at_least(hits + 1, count, p) - (1 - tail))
    return low, high


def rule_of_three(count: int, level: float = 0.95) -> float:
    """The largest share that none of `count` still allows: the one-sided exact bound, about 3 / count at 95 %."""
    return float(1 - (1 - level) ** (1 / count))


def _at_least(hits: int, count: int, p: float) -> float:
    """P(X >= hits) of a binomial X, for 0 < p < 1."""
    ks = range(hits, count + 1)
    choose = (math.lgamma(count + 1) - math.lgamma(k + 1) - math.lgamma(count - k + 1) for k in ks)
    return math.fsum(
        math.exp(c + k * math.log(p) + (count - k) * math.log1p(-p)) for c, k in zip(choose, ks, strict=True)
    )


def _root(rising: Callable[[float], float]) -> float:
    """Where a rising function of (0, 1) crosses 0."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if rising(middle) > 0 else (middle, high)
    return (low + high) / 2


@lru_cache(maxsize=64)
def student(level: float, freedom: int) -> float:
    """How many standard errors an interval of Student's law reaches, by the substitution t = sqrt(freedom) tan(a)."""
    angles = np.linspace(0, np.pi / 2, 200_001)
    weights = np.cos(angles) ** (freedom - 1)
    inside = np.concatenate([[0.0], np.cumsum(weights[1:] + weights[:-1])])
    return float(freedom**0.5 * np.tan(np.interp(level, inside / inside[-1], angles)))

"""How fast rows were made. The unit is the timed batch: all rows of a batch carry the same clock reading."""

import math
from collections.abc import Sequence

import numpy as np

from mrflow.sweep.rows import Row
from mrflow.sweep.significance import student
from mrflow.sweep.statistics import ConfidenceInterval, group_rows


def seconds(rows: Sequence[Row], *, level: float = 0.95) -> ConfidenceInterval | None:
    """Seconds a picture, with the interval over timed batches; None where nothing was timed."""
    timed = group_rows((r for r in rows if r.done and r.seconds > 0), batch_of)
    return ratio([(sum(r.seconds for r in rs), len(rs)) for rs in timed.values()], level=level) if timed else None


def speedup(reference: Sequence[Row], rows: Sequence[Row], *, level: float = 0.95) -> ConfidenceInterval | None:
    """Seconds of the reference over seconds of these rows, over prompts and draws that both have.

    The ratio of sums, not the mean of ratios: how much sooner the whole set would be there. Batches of the two methods
    that hold the same prompts and draws are one unit.
    """
    theirs = {(r.prompt, r.draw): r for r in reference if r.done and r.seconds > 0}
    shared = [(theirs[key], r) for r in rows if r.done and r.seconds > 0 and (key := (r.prompt, r.draw)) in theirs]
    unit: dict[str, set[str]] = {}
    for a, b in shared:  # batches that share a pair, directly or through others
        joined = unit.get(f"a {batch_of(a)}", {f"a {batch_of(a)}"}) | unit.get(f"b {batch_of(b)}", {f"b {batch_of(b)}"})
        unit |= dict.fromkeys(joined, joined)
    sums: dict[str, tuple[float, float]] = {}
    for a, b in shared:
        name = min(unit[f"a {batch_of(a)}"])
        slow, fast = sums.get(name, (0.0, 0.0))
        sums[name] = slow + a.seconds, fast + b.seconds
    return ratio(list(sums.values()), level=level, pictures=len(shared)) if sums else None


def batch_of(row: Row) -> str:
    """What the rows of one timed batch share."""
    return row.timed or row.key


def ratio(units: Sequence[tuple[float, float]], *, level: float, pictures: int | None = None) -> ConfidenceInterval:
    """The ratio of two sums over units, both positive, and its interval: Student's on the logarithm, with the
    linearised variance of a ratio (Cochran 1977, section 6.4). One unit gives none.
    """
    tops, bottoms = np.array(units, dtype=np.float64).T
    mean, n = float(tops.sum() / bottoms.sum()), len(units)
    low = high = math.nan
    if n > 1:
        spread = float(np.square(tops - mean * bottoms).sum() * n / (n - 1)) ** 0.5 / float(tops.sum())
        reach = math.exp(student(level, n - 1) * spread)
        low, high = mean / reach, mean * reach
    return ConfidenceInterval(mean, low, high, n, round(float(bottoms.sum())) if pictures is None else pictures)

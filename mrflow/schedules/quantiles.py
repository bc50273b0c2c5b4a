"""The beta distribution in plain floats, for `schedules.Beta`."""

import math
from functools import lru_cache


@lru_cache(maxsize=64)
def beta_grid(steps: int, a: float, b: float) -> tuple[float, ...]:
    """Quantiles of Beta(a, b) at 1 - i / steps, from 1 to 0; for a and b from 0.25 to 100."""
    sigmas = [1.0]
    for i in range(1, steps):
        # Each tail is solved as a lower tail, so that levels near 1 stay as exact as those near 0.
        upper = 2 * i <= steps
        sigmas.append(1.0 - beta_quantile(i / steps, b, a) if upper else beta_quantile((steps - i) / steps, a, b))
    return (*sigmas, 0.0)


def beta_quantile(p: float, a: float, b: float) -> float:
    """The x below which Beta(a, b) holds the probability p, for 0 < p < 1."""
    # Newton in log x (the lower tail is a power law there), kept inside a bracket that bisection shrinks.
    log_b = math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)
    low, high = -800.0, 0.0
    z = min((math.log(p * a) + log_b) / a, math.log(a / (a + b)))
    for _ in range(200):
        x = math.exp(z)
        error = beta_cdf(x, a, b) - p
        low, high = (low, z) if error > 0 else (z, high)
        log_slope = a * z + (b - 1.0) * math.log1p(-x) - log_b if x < 1.0 else 0.0
        near = z - error * math.exp(-log_slope) if log_slope > -700.0 else low - 1.0
        new = near if low < near < high else (low + high) / 2.0
        if abs(new - z) <= 1e-15 * max(1.0, abs(z)):
            return math.exp(new)
        z = new
    return math.exp(z)


def beta_cdf(x: float, a: float, b: float) -> float:
    """The regularised incomplete beta function I_x(a, b), by its continued fraction (DLMF 8.17.22, Lentz's method)."""
    if x <= 0.0 or x >= 1.0:
        return 0.0 if x <= 0.0 else 1.0
    if x > (a + 1.0) / (a + b + 2.0):
        return 1.0 - beta_cdf(1.0 - x, b, a)
    front = a * math.log(x) + b * math.log1p(-x) - (math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b))
    tiny = 1e-300
    c, d = 1.0, 1.0 / ((1.0 - (a + b) * x / (a + 1.0)) or tiny)
    value = d
    for m in range(1, 1000):
        even = m * (b - m) * x / ((a + 2 * m - 1.0) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1.0))
        for term in (even, odd):
            d = 1.0 / ((1.0 + term * d) or tiny)
            c = (1.0 + term / c) or tiny
            value *= c * d
        if abs(c * d - 1.0) < 1e-16:
            break
    return math.exp(front) * value / a

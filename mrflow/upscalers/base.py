"""Checks that upscalers share."""

from mrflow.errors import PlanError


def check_factor(factor: object, *, name: str = "factor", most: int = 16) -> None:
    """Refuse a factor that is not a whole number from 1 to `most`."""
    if isinstance(factor, bool) or not isinstance(factor, int) or not 1 <= factor <= most:
        raise PlanError(f"an upscaler's {name} must be a whole number from 1 to {most}, got {factor!r}")

"""What a seed may be."""

from mrflow._checks import is_whole
from mrflow.errors import PlanError

MAX_SEED = 2**63 - 1


def check_seed(seed: object) -> int:
    """A seed that a generator takes, or PlanError."""
    if not is_whole(seed, 0, MAX_SEED - 1):
        raise PlanError(f"a seed must be a whole number from 0 to {MAX_SEED - 1}, got {seed!r}")
    return seed

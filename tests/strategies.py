"""Settings and hypothesis strategies that several test files share."""

import os

from hypothesis import settings

from mrflow.testing.strategies import counted_schedules as schedules
from mrflow.testing.strategies import falling, models, shifts, sigmas, starts, step_counts, tokens


def law(profile: str) -> settings:
    """What property tests are run with: no time limit, and the same examples in every run but those of the night."""
    return settings(deadline=None, derandomize=profile != "nightly")


LAW = law(os.environ.get("HYPOTHESIS_PROFILE", "default"))
"""For a property test, by the environment's profile."""

FEW = settings(LAW, max_examples=25)
"""The same for a test whose examples are slow."""

__all__ = ["FEW", "LAW", "falling", "models", "schedules", "shifts", "sigmas", "starts", "step_counts", "tokens"]

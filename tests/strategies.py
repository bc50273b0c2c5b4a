"""Settings and hypothesis strategies that several test files share."""

from hypothesis import settings

from mrflow.testing.strategies import counted_schedules as schedules
from mrflow.testing.strategies import falling, levels, models, shifts, starts, step_counts, tokens

LAW = settings(deadline=None, derandomize=True)
"""For a property test: the same examples in every run, no time limit."""

FEW = settings(LAW, max_examples=25)
"""The same for a test whose examples are slow."""

__all__ = ["FEW", "LAW", "falling", "levels", "models", "schedules", "shifts", "starts", "step_counts", "tokens"]

"""Set up for all tests: shapes are checked, examples are bounded, nothing touches a network."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")

from jaxtyping import install_import_hook

import tests.shapes  # noqa: F401  (the hook names it by its path)

install_import_hook("mrflow.models", "tests.shapes.typechecker")

import pytest
import torch
from hypothesis import HealthCheck, settings

SLACK = [HealthCheck.too_slow, HealthCheck.data_too_large]
settings.register_profile("fast", max_examples=20, deadline=None, suppress_health_check=SLACK)
settings.register_profile("default", max_examples=60, deadline=None, suppress_health_check=SLACK)
settings.register_profile("ci", max_examples=60, deadline=None, derandomize=True, suppress_health_check=SLACK)
settings.register_profile("nightly", max_examples=5000, deadline=None, suppress_health_check=SLACK)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked gpu are skipped where there is none, with the reason."""
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="no CUDA device here"))

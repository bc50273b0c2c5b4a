"""Set up for all tests: shapes are checked, examples are bounded, nothing touches a network."""

import atexit
import os
import pkgutil
import shutil
import signal
import tempfile
import zlib
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell leaves it to what runs in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ["MRFLOW_CACHE"] = tempfile.mkdtemp()  # nobody's own, and nothing of another day
atexit.register(shutil.rmtree, os.environ["MRFLOW_CACHE"], ignore_errors=True)
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):  # the processes share the cores, and so do their children
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // int(workers))))

from jaxtyping import install_import_hook

import mrflow
import tests.shapes  # noqa: F401  (the hook names it by its path)

# `mrflow.models` itself is left out: its `load` is given wrong types on purpose, to see what it says. So are
# the kernels: Triton reads a function's own source and names.
parts = pkgutil.iter_modules([str(Path(mrflow.__file__).parent / "models")])
hooked = [f"mrflow.models.{part.name}" for part in parts if part.name != "kernels"]
install_import_hook(hooked, "tests.shapes.typechecker")

import pytest
import torch
from hypothesis import HealthCheck, settings

SLACK = [HealthCheck.too_slow, HealthCheck.data_too_large]
settings.register_profile("fast", max_examples=20, deadline=None, suppress_health_check=SLACK)
settings.register_profile("default", max_examples=60, deadline=None, suppress_health_check=SLACK)
settings.register_profile("ci", max_examples=60, deadline=None, derandomize=True, suppress_health_check=SLACK)
settings.register_profile("nightly", max_examples=1000, deadline=None, print_blob=True, suppress_health_check=SLACK)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests have names that every process gives them, and those marked gpu are skipped where there is none."""
    if lost := [item.nodeid for item in items if " at 0x" in item.nodeid]:
        raise pytest.UsageError(
            f"an address is part of a test's name, which no other process finds; give ids: {lost[0]}"
        )
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="no CUDA device here"))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """What a test draws from torch's own generator is the same in every run, whichever tests came before it."""
    torch.manual_seed(zlib.crc32(item.nodeid.encode()))

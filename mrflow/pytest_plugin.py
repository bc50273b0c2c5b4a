"""The pytest plugin: `pytest --mrflow-laws my_module.py` holds what a module defines to its laws.

It lies outside `mrflow.testing` because every pytest run where mrflow is installed imports it: without the option it
loads nothing.
"""

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from mrflow.testing.items import LawFile


def pytest_addoption(parser: pytest.Parser) -> None:
    """The option."""
    text = (
        "hold each Stage, Solver, Schedule, Guidance and Upscaler of the modules named on the command line to its laws"
    )
    parser.getgroup("mrflow").addoption("--mrflow-laws", action="store_true", default=False, help=text)


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> "LawFile | None":
    """A collector for every Python file that is named on the command line itself."""
    wanted = parent.config.getoption("--mrflow-laws") and file_path.suffix == ".py"
    if not wanted or not parent.session.isinitpath(file_path):
        return None
    from mrflow.testing.items import LawFile  # torch and all

    made: LawFile = LawFile.from_parent(parent, path=file_path)
    return made

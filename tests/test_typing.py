"""The types themselves are tested: what must pass passes, what must fail fails, in mypy and in pyright."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HERE = ROOT / "tests" / "typing"


def marked(file: Path) -> set[int]:
    """The lines that end in `# error`."""
    return {n for n, line in enumerate(file.read_text().splitlines(), 1) if line.endswith("# error")}


def lines_of_mypy(file: Path) -> set[int]:
    """The lines that mypy reports."""
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml"), str(file)],
        capture_output=True, text=True, cwd=ROOT, check=False,
    )  # fmt: skip
    assert done.returncode in (0, 1), done.stdout + done.stderr
    return {int(n) for n in re.findall(rf"{file.name}:(\d+): error", done.stdout)}


def lines_of_pyright(file: Path) -> set[int]:
    """The lines that pyright reports."""
    done = subprocess.run(
        [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", sys.executable, str(file)],
        capture_output=True, text=True, cwd=ROOT, check=False,
    )  # fmt: skip
    assert done.returncode in (0, 1), done.stdout + done.stderr
    found = json.loads(done.stdout[done.stdout.index("{") :])["generalDiagnostics"]
    return {
        d["range"]["start"]["line"] + 1
        for d in found
        if d["severity"] == "error" and d.get("rule") != "reportUnusedExpression"
    }


@pytest.mark.slow
@pytest.mark.parametrize("lines", [lines_of_mypy, lines_of_pyright], ids=["mypy", "pyright"])
@pytest.mark.parametrize("name", ["good.py", "bad.py"])
def test_types(lines, name: str) -> None:  # type: ignore[no-untyped-def]
    file = HERE / name
    assert lines(file) == marked(file)

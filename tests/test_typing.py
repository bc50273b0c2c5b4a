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


def lines_of_mypy(files: list[Path]) -> dict[Path, set[int]]:
    """The lines that mypy reports of each file."""
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml"), *map(str, files)],
        capture_output=True, text=True, cwd=ROOT, check=False,
    )  # fmt: skip
    assert done.returncode in (0, 1), done.stdout + done.stderr
    return {f: {int(n) for n in re.findall(rf"\b{f.name}:(\d+): error", done.stdout)} for f in files}


def lines_of_pyright(files: list[Path]) -> dict[Path, set[int]]:
    """The lines that pyright reports of each file."""
    done = subprocess.run(
        [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", sys.executable, *map(str, files)],
        capture_output=True, text=True, cwd=ROOT, check=False,
    )  # fmt: skip
    assert done.returncode in (0, 1), done.stdout + done.stderr
    out: dict[Path, set[int]] = {file: set() for file in files}
    for d in json.loads(done.stdout[done.stdout.index("{") :])["generalDiagnostics"]:
        if d["severity"] == "error" and d.get("rule") != "reportUnusedExpression":
            out[Path(d["file"])].add(d["range"]["start"]["line"] + 1)
    return out


@pytest.mark.slow
@pytest.mark.parametrize("lines", [lines_of_mypy, lines_of_pyright], ids=["mypy", "pyright"])
def test_types(lines) -> None:  # type: ignore[no-untyped-def]
    files = [HERE / name for name in ("good.py", "bad.py")]
    want = {file: marked(file) for file in files}
    assert not want[files[0]] and want[files[1]]
    assert lines(files) == want

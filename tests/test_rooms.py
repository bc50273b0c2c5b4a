"""What is loaded for what: public names one by one, a transformer from a handful of files."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAW = "from mrflow import __version__; import sys; print(*sorted(m for m in sys.modules if m.startswith('mrflow.')))"


def loaded(line: str) -> set[str]:
    """Modules of ours that a fresh Python holds after this line."""
    done = subprocess.run([sys.executable, "-c", f"{line}\n{LAW}"], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def imports(file: Path) -> set[Path]:
    """Files of ours that a file imports anywhere in it: at the top, in functions, for annotations."""
    found = set[Path]()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module is not None
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        for name in names:
            path = ROOT / name.replace(".", "/")
            found |= {f for f in (path.with_suffix(".py"), path / "__init__.py") if f.is_file()}
    return {f for f in found if f.is_relative_to(ROOT / "mrflow")} - {ROOT / "mrflow/__init__.py"}


def closure(file: Path) -> set[Path]:
    """A file and all of ours that it leads to."""
    seen, left = set[Path](), [file]
    while left:
        if (now := left.pop()) not in seen:
            seen.add(now)
            left += imports(now)
    return seen


def test_a_schedule_loads_no_network_no_scenes_and_no_sweep() -> None:
    got = loaded("import mrflow; mrflow.Shifted")
    assert "mrflow.schedules" in got
    assert not [m for m in got if m.split(".")[1] in ("models", "scenes", "sweep", "bridge", "stages", "caches", "cli")]
    assert "mrflow.stages.sample" in loaded("import mrflow; mrflow.Sample")  # what the measure would show


@pytest.mark.parametrize("name", ["flux", "qwen"])
def test_a_transformer_is_read_from_a_handful_of_files(name: str) -> None:
    files = closure(ROOT / f"mrflow/models/{name}/transformer.py")
    lines = sum(len(file.read_text(encoding="utf-8").splitlines()) for file in files)
    assert len(files) <= 5 and lines <= 800, (lines, sorted(str(f.relative_to(ROOT)) for f in files))


def test_the_measure_sees_imports_in_functions(tmp_path: Path) -> None:
    file = tmp_path / "lazy.py"
    file.write_text("def f():\n    from mrflow.models import lora\n    import mrflow.spec\n")
    assert {f.name for f in imports(file)} == {"lora.py", "spec.py", "__init__.py"}

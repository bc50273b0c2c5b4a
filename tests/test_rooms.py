"""What is loaded for what: public names one by one, a transformer from a handful of files."""

import ast
import subprocess
import sys
from pathlib import Path

import grimp
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


@pytest.mark.parametrize("name", ["flux", "qwen", "zimage"])
def test_a_transformer_is_read_from_a_handful_of_files(name: str) -> None:
    files = closure(ROOT / f"mrflow/models/{name}/transformer.py")
    lines = sum(len(file.read_text(encoding="utf-8").splitlines()) for file in files)
    assert len(files) <= 5 and lines <= 800, (lines, sorted(str(f.relative_to(ROOT)) for f in files))


def test_the_measure_sees_imports_in_functions(tmp_path: Path) -> None:
    file = tmp_path / "lazy.py"
    file.write_text("def f():\n    from mrflow.models import lora\n    import mrflow.spec\n")
    assert {f.name for f in imports(file)} == {"lora.py", "spec.py", "__init__.py"}


def circles(knows: dict[str, set[str]]) -> list[str]:
    """The modules on circles of imports and between them: what stays when those that lead nowhere, either way, go."""
    left = dict(knows)
    while left:
        known = set[str]().union(*left.values())
        ends = [module for module, others in left.items() if not others & left.keys() or module not in known]
        if not ends:
            break
        left = {module: others for module, others in left.items() if module not in ends}
    return sorted(left)


def test_no_imports_run_in_a_circle() -> None:
    graph = grimp.build_graph("mrflow", exclude_type_checking_imports=False, cache_dir=None)
    lists = {module for module in graph.modules if module.endswith("._api")}  # for type checkers: of what lies above
    knows = {module: graph.find_modules_directly_imported_by(module) - lists for module in graph.modules}
    assert not circles(knows)
    below = knows["mrflow.spec"] | {"mrflow.runner"}
    assert "mrflow.stage" in circles(knows | {"mrflow.spec": below})  # the measure sees a circle of several


@pytest.mark.parametrize("package", ["mrflow", "mrflow.sweep"])
def test_no_public_name_is_also_a_file(package: str) -> None:
    """Importing a file puts the module in the place of what has its name."""
    folder = ROOT / package.replace(".", "/")
    files = {path.stem for path in folder.glob("*.py")} | {path.parent.name for path in folder.glob("*/__init__.py")}
    public = ast.parse((folder / "_api.py").read_text(encoding="utf-8")).body
    names = {
        alias.name
        for node in public
        if isinstance(node, ast.ImportFrom) and node.module != package  # a module handed on as such may be one
        for alias in node.names
    }
    assert len(names) > 20 and not names & files

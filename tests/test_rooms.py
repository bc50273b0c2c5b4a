"""What is loaded for what: public names one by one, a transformer from a handful of files."""

import ast
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import get_type_hints

import pytest
from rich.console import Console

from experiments.rooms import circles, closure, inner_imports, knowledge
from mrflow.cli.app import VERBS

ROOT = Path(__file__).parents[1]
LAW = "from mrflow import __version__; import sys; print(*sorted(m for m in sys.modules if m.startswith('mrflow.')))"


def loaded(line: str) -> set[str]:
    """Modules of ours that a fresh Python holds after this line."""
    done = subprocess.run([sys.executable, "-c", f"{line}\n{LAW}"], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_a_schedule_loads_no_network_no_scenes_and_no_sweep() -> None:
    got = loaded("import mrflow; mrflow.Shifted")
    assert "mrflow.schedules" in got
    assert not [m for m in got if m.split(".")[1] in ("models", "scenes", "sweep", "bridge", "stages", "caches", "cli")]
    assert "mrflow.stages.sample" in loaded("import mrflow; mrflow.Sample")  # what the measure would show


def test_imports_stand_at_the_top_but_for_a_few_that_say_why() -> None:
    assert [file for file, _ in inner_imports()] == [
        "cli/__init__.py", "models/kernels/__init__.py", "models/kernels/ops.py", "pytest_plugin.py",
        "schedules/__init__.py",
    ]  # fmt: skip


def test_help_and_completion_load_the_declarations_alone() -> None:
    light = {"app", "display", "options", "verbs"}
    got = {name for name in loaded("import mrflow.cli.app") if name.startswith("mrflow.cli.")}
    assert got == {f"mrflow.cli.{name}" for name in light}


@pytest.mark.parametrize(("options", "does"), [row[2:] for row in VERBS])
def test_what_a_verb_does_takes_the_options_that_are_declared(options: type[object], does: str) -> None:
    module, _, name = does.partition(":")
    hints = get_type_hints(getattr(import_module(f"mrflow.cli.{module}"), name))
    assert list(hints.values()) == [Console, options, type(None)]


@pytest.mark.parametrize("name", ["flux", "qwen", "zimage"])
def test_a_transformer_is_read_from_a_handful_of_files(name: str) -> None:
    files, lines = closure(f"mrflow.models.{name}.transformer", knowledge())
    assert len(files) <= 5 and lines <= 800, (lines, [str(file.relative_to(ROOT)) for file in files])
    more, longer = closure(f"mrflow.models.{name}.family", knowledge())
    assert len(more) > 5 and longer > 800  # what the measure would show


def test_the_measure_sees_imports_in_functions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "house_of_three"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "a.py").write_text("def f():\n    from house_of_three import b\n")
    (package / "b.py").write_text("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import house_of_three.c\n")
    (package / "c.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    assert knowledge("house_of_three") == {
        "house_of_three": set(), "house_of_three.a": {"house_of_three.b"}, "house_of_three.b": {"house_of_three.c"},
        "house_of_three.c": set(),
    }  # fmt: skip


def test_no_imports_run_in_a_circle() -> None:
    knows = knowledge()
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

"""The documentation runs: every Python block, every mrflow command in README, every docstring example, every link."""

import ast
import contextlib
import importlib.util
import json
import re
import shlex
import subprocess
import tomllib
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from mrflow.cli.app import app
from tests.tiny import write_flux_repo, write_qwen_repo

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted(ROOT.glob("docs/**/*.md")),
    ROOT / "mrflow/models/pocket/README.md",
]
IDS = [str(p.relative_to(ROOT)) for p in PAGES]


def blocks(page: Path, language: str) -> list[tuple[int, str]]:
    """(line number, text) of each fenced block of a language."""
    text = page.read_text(encoding="utf-8")
    found = re.finditer(rf"^```{language}\n(.*?)^```", text, re.M | re.S)
    return [(text[: m.start()].count("\n") + 2, m.group(1)) for m in found]


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=IDS)
@pytest.mark.filterwarnings("ignore")
def test_python_blocks_run_in_order(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    if "FLUX.1-dev" in "".join(code for _, code in blocks(page, "python")):
        write_flux_repo(tmp_path / "FLUX.1-dev")  # a tiny one in the real layout
    if '"Qwen-Image"' in "".join(code for _, code in blocks(page, "python")):
        write_qwen_repo(tmp_path / "Qwen-Image")
    monkeypatch.setenv("MRFLOW_CACHE", str(tmp_path / "cache"))
    names: dict[str, object] = {"__name__": "page"}
    for line, code in blocks(page, "python"):
        exec(compile("\n" * (line - 1) + code, str(page), "exec"), names)


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_imports_of_python_blocks_are_there(page: Path) -> None:
    """Fast, so that a renamed function is found at once and not when the blocks run."""
    for line, code in blocks(page, "python"):
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "mrflow":
                for alias in node.names:
                    room, name = importlib.import_module(str(node.module)), f"{node.module}.{alias.name}"
                    is_file = hasattr(room, "__path__") and importlib.util.find_spec(name) is not None
                    assert hasattr(room, alias.name) or is_file, f"line {line}: {name}"


@pytest.mark.slow
def test_readme_commands_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "experiments").symlink_to(ROOT / "experiments")
    lines = [line for _, text in blocks(ROOT / "README.md", "bash") for line in text.splitlines()]
    commands = [line.split("#")[0] for line in lines if line.startswith("mrflow ")]
    assert len(commands) >= 4
    for command in commands:
        result = CliRunner().invoke(app, shlex.split(command)[1:])
        assert result.exit_code == 0, (command, result.stderr)


def test_every_fault_of_the_table_has_a_test_that_exists() -> None:
    text = (ROOT / "docs/reference/reliability.md").read_text(encoding="utf-8").split("## Faults")[1].split("\n## ")[0]
    rows = dict(re.findall(r"^\| (\d+) \|(.*)\|$", text, re.M))
    assert list(rows) == [str(number) for number in range(1, 66)]
    defined: dict[str, set[str]] = {}
    for number, row in rows.items():
        named = re.findall(r"`(test_\w+)?::(test_\w+)`", row)
        assert named, number
        file = ""
        for given, name in named:
            file = given or file
            if file not in defined:
                tree = ast.parse((ROOT / "tests" / f"{file}.py").read_text(encoding="utf-8"))
                defined[file] = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
            assert name in defined[file], f"{number}: {file} has no {name}"


def test_the_two_commands_are_targets_and_ci_calls_them() -> None:
    lines = {line.split("#")[0].strip() for _, text in blocks(ROOT / "README.md", "bash") for line in text.splitlines()}
    ci = (ROOT / ".ci/run").read_text()
    makefile = (ROOT / "Makefile").read_text()
    for command in ("make demo", "make test"):
        assert command in lines
        assert command in ci
        assert re.search(rf"^{command.split()[1]}:", makefile, re.M)


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
        if not re.match(r"[a-z]+:", target):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_every_public_name_is_in_the_reference() -> None:
    api = (ROOT / "mrflow/_api.py").read_text()
    page = (ROOT / "docs/reference/names.md").read_text() + (ROOT / "docs/reference/errors.md").read_text()
    hidden = {
        "Backbone",
        "Condition",
        "Context",
        "Event",
        "History",
        "Plan",
        "Sigmas",
        "Spec",
        "Step",
        "Velocity",
        "Work",
    }
    names = (
        set(re.findall(r" as (\w+)$", api, re.M))
        - hidden
        - {"caches", "metrics", "sweep", "recipes", "schedules", "solvers", "students", "testing"}
    )
    assert not sorted(n for n in names if not re.search(rf"`(?:[\w.]*\.)?{n}[`(]", page))


def test_every_name_of_the_reference_is_there() -> None:
    def there(name: str) -> bool:
        for room in ("mrflow", "mrflow.sweep", "mrflow.flow", "mrflow.schedules"):
            with contextlib.suppress(AttributeError):
                attrgetter(name.removeprefix("mrflow."))(importlib.import_module(room))
                return True
        return importlib.util.find_spec(f"mrflow.{name.removeprefix('mrflow.')}") is not None

    page = (ROOT / "docs/reference/names.md").read_text(encoding="utf-8")
    tables = [line for line in page.splitlines() if line.startswith("|")]
    names = {name for line in tables for name in re.findall(r"`([A-Za-z_][\w.]*)(?:\([^`]*)?`", line)}
    assert len(names) > 150 and not sorted(name for name in names if not there(name))


def site_hooks() -> Any:
    from importlib.util import module_from_spec, spec_from_file_location

    spec = spec_from_file_location("hooks", ROOT / "docs" / "hooks.py")
    assert spec is not None and spec.loader is not None
    hooks = module_from_spec(spec)
    spec.loader.exec_module(hooks)
    return hooks


def test_the_site_shows_every_page_and_every_public_name() -> None:
    """What `make site` would refuse, without its packages: pages that its list leaves out, names without a page."""
    hooks = site_hooks()
    assert sum(map(len, hooks.public().values())) > 300
    listed = set(re.findall(r"[\w/.-]+\.md", (ROOT / "mkdocs.yml").read_text(encoding="utf-8")))
    pages = {str(page.relative_to(ROOT / "docs")) for page in ROOT.glob("docs/**/*.md")}
    assert pages | set(hooks.OUTSIDE) == listed


def test_the_site_shows_the_notebook_as_a_page() -> None:
    hooks = site_hooks()
    page = hooks._moved(ROOT / "docs/notebooks/first.ipynb", "notebooks/first.md")
    cells = json.loads((ROOT / "docs/notebooks/first.ipynb").read_text(encoding="utf-8"))["cells"]
    assert page.startswith("# A first look\n") and '<a href="first.ipynb" download>' in page
    blocks = re.findall(r"```python\n(.*?)\n```", page, re.DOTALL)
    assert blocks == ["".join(c["source"]).strip() for c in cells if c["cell_type"] == "code"]
    assert "[install](../install.md)" in page
    readme = hooks._linked("[first](notebooks/first.ipynb)", Path("docs/README.md"), "README.md")
    assert readme == "[first](notebooks/first.md)"


def test_tables_of_the_site_break_no_interval() -> None:
    html = "<p>a [b, c] d</p><td>0.64 [0.54, 0.74] ▼</td><th>legible [95 %]</th><td>0.3 ▲, and more</td>"
    want = "<p>a [b, c] d</p><td>0.64 [0.54,~0.74]~▼</td><th>legible [95~%]</th><td>0.3~▲, and more</td>"
    assert site_hooks().on_page_content(html) == want.replace("~", "\xa0")


def test_the_site_shows_what_a_slot_must_have_and_what_signatures_name() -> None:
    (kept,) = re.findall(r'filters: \["!(.*?)"\]', (ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    shown = [path for paths in site_hooks().public().values() for path in paths]
    assert len(shown) == len(set(shown))
    hidden, bases = list[str](), set[str]()
    for path in shown:
        found = attrgetter(path.rpartition(".")[2])(importlib.import_module(path.rpartition(".")[0]))
        if not isinstance(found, type):
            continue
        hidden += [
            f"{path}.{name}"
            for name in getattr(found, "__abstractmethods__", ())
            if re.search(kept, name) and name not in vars(object)
        ]
        bases |= {f"{c.__module__}.{c.__name__}" for c in found.__mro__ if c.__module__.startswith("mrflow")}
        for each in vars(found).values():
            for hint in getattr(each, "__annotations__", {}).values() if callable(each) else ():
                bases |= {f"{hint.__module__}.{hint.__name__}"} if _ours(hint) else set()
    assert not hidden
    assert not sorted(base for base in bases - set(shown) if base.rpartition(".")[2][0] != "_")


def _ours(hint: object) -> bool:
    return isinstance(hint, type) and hint.__module__.startswith("mrflow")


def test_install_names_every_extra() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    named = set(re.findall(r"`mrflow\[(\w+)\]`", (ROOT / "docs/install.md").read_text(encoding="utf-8")))
    assert named == set(declared) - {"dev", "site"}  # of a checkout


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a checkout: what is tracked cannot be asked")
def test_the_source_distribution_holds_all_that_its_tests_and_makefile_read() -> None:
    built = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["hatch"]["build"]["targets"]
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    tops = {line.partition("/")[0] for line in tracked.splitlines()}
    assert {top for top in tops if not top.startswith(".")} - set(built["sdist"]["include"]) == {"pyproject.toml"}


def test_readme_says_what_make_demo_writes() -> None:
    demo = re.search(r"^demo:.*?(?=^\w)", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M | re.S)
    assert demo is not None and "--compare native --out $(OUT)/demo.png" in demo[0]
    assert "out/demo-compare.png" in (ROOT / "README.md").read_text(encoding="utf-8")

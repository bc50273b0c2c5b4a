"""What the site has beside the pages in docs/: pages that lie with their code, and the API from the docstrings."""

import ast
import contextlib
import json
import re
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mkdocs.structure.files import Files

ROOT = Path(__file__).parents[1]
OUTSIDE = {
    "how-to/comfyui.md": "integrations/comfyui/README.md",
    "reference/model-card.md": "mrflow/models/pocket/README.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
    "experiments/log.md": "experiments/LOG.md",
    "notebooks/first.md": "docs/notebooks/first.ipynb",
}
"""Pages of the site, and the files of the repository that they are."""
ROOMS = {
    "maths": ("Schedules, solvers, guidance, noise", ("flow", "schedules", "solvers", "guidance", "noise")),
    "stages": (
        "Stages and chains",
        ("stage", "stages", "spec", "model_info", "rivals", "recipes", "students", "tiling"),
    ),
    "running": ("Running, results, records", ("runner", "result", "records", "errors", "display")),
    "models": ("Models and adapters", ("models", "backbone", "checkpoints", "bridge")),
    "upscalers": ("Upscalers and decoders", ("upscalers", "decoders", "protocols.upscaler", "protocols.decoder")),
    "caches": ("Caches", ("caches",)),
    "sweeps": ("Sweeps, metrics, statistics", ("sweep", "metrics")),
    "testing": ("Laws and strategies for tests", ("testing",)),
}
"""Pages of the API, and the rooms of the package that each shows."""


def public() -> dict[str, list[str]]:
    """Every public name, and every type that their signatures name, by the page that shows it, each with its path."""
    found: dict[str, list[str]] = {page: [] for page in ROOMS}
    packages = ("mrflow", "mrflow.caches", "mrflow.sweep", "mrflow.testing", "mrflow.recipes", "mrflow.metrics")
    todo: list[tuple[str, str | None]] = [(path, None) for package in packages for path in _names(package)]
    seen = set[str]()
    while todo:
        path, user = todo.pop(0)  # and the page that names it
        path, node = _definition(path)
        if path in seen:
            continue
        seen.add(path)
        room = path.removeprefix("mrflow.")
        page = next((p for p, (_, rooms) in ROOMS.items() if any(room.startswith(f"{r}.") for r in rooms)), user)
        if page is None:
            raise ValueError(f"{path} has no page of the API: give its room a place in ROOMS, {__file__}")
        found[page].append(path)
        named = (_definition(f"{path.rpartition('.')[0]}.{name}") for name in _types_of(node) if name[0] != "_")
        todo += [(path, page) for path, node in named if _is_type(node)]
    return found


@cache
def _module(name: str) -> tuple[dict[str, ast.stmt], dict[str, str]]:
    """What a module defines, and where what it imports of mrflow comes from, by name."""
    base = ROOT / name.replace(".", "/")
    file = next((f for f in (base.with_suffix(".py"), base / "__init__.py") if f.is_file()), None)
    if file is None or not name.startswith("mrflow"):
        return {}, {}
    tree, own, imported = ast.parse(file.read_text("utf-8")), dict[str, ast.stmt](), dict[str, str]()
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            own[node.name] = node
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            goals = node.targets if isinstance(node, ast.Assign) else [node.target]
            own |= {goal.id: node for goal in goals if isinstance(goal, ast.Name)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mrflow"):
            imported |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return own, imported


def _definition(path: str) -> tuple[str, ast.stmt | None]:
    """Where a name is defined that others hand on, and what defines it."""
    module, _, name = path.rpartition(".")
    own, imported = _module(module)
    if name in own or name not in imported:
        return path, own.get(name)
    return _definition(imported[name])


def _is_type(node: ast.stmt | None) -> bool:
    """Whether it defines a class, or a name for a type (and not a value or a type variable)."""
    return isinstance(node, ast.ClassDef) or (
        isinstance(node, ast.Assign) and isinstance(node.value, ast.Subscript | ast.BinOp)
    )


def _types_of(node: ast.AST | None) -> "Iterator[str]":
    """The names in the signatures, fields and bases of what a module defines."""
    if isinstance(node, ast.ClassDef):
        for base in node.bases:
            yield from _identifiers(base)
        for each in node.body:
            if isinstance(each, ast.AnnAssign):
                yield from _identifiers(each.annotation)
            yield from _types_of(each if isinstance(each, ast.FunctionDef) else None)
    elif isinstance(node, ast.FunctionDef) and (node.name[0] != "_" or node.name in ("__call__", "__init__")):
        for each in ast.walk(node.args):
            yield from _identifiers(each.annotation if isinstance(each, ast.arg) else None)
        yield from _identifiers(node.returns)
    elif isinstance(node, ast.Assign) and _is_type(node):
        yield from _identifiers(node.value)


def _identifiers(written: ast.expr | None) -> "Iterator[str]":
    for each in ast.walk(written) if written is not None else ():
        if isinstance(each, ast.Name):
            yield each.id
        elif isinstance(each, ast.Constant) and isinstance(each.value, str):
            with contextlib.suppress(SyntaxError):  # a quoted type, or a text of Literal
                yield from _identifiers(ast.parse(each.value, mode="eval").body)


def _names(package: str) -> list[str]:
    """The names that a package hands on, by where they are defined; those of a module that defines its own."""
    base = ROOT / package.replace(".", "/")
    text = next(f for f in (base / "_api.py", base / "__init__.py", base.with_suffix(".py")) if f.is_file()).read_text(
        "utf-8"
    )
    tree, out = ast.parse(text), list[str]()
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.module and node.module != "mrflow":
            out += [f"{node.module}.{alias.name}" for alias in node.names if alias.asname == alias.name]
        if (
            base.with_suffix(".py").is_file()
            and isinstance(node, ast.FunctionDef | ast.ClassDef)
            and node.name[0] != "_"
        ):
            out.append(f"{package}.{node.name}")
    return out


def on_files(files: "Files", config: Any) -> "Files":  # noqa: ANN401 (mkdocs has no types for it)
    """Add what lies outside, and the API."""
    from mkdocs.structure.files import File

    for page, source in OUTSIDE.items():
        files.append(File.generated(config, page, content=_moved(ROOT / source, page)))
    for page, names in public().items():
        body = "\n\n".join(f"::: {name}" for name in sorted(names, key=lambda name: name.rpartition(".")[2].lower()))
        files.append(File.generated(config, f"api/{page}.md", content=f"# {ROOMS[page][0]}\n\n{body}\n"))
    return files


def on_config(config: Any) -> Any:  # noqa: ANN401
    """Put the pages of the API where the list says `api/`."""

    def filled(items: list[Any]) -> list[Any]:
        out = list[Any]()
        for item in items:
            if isinstance(item, dict):
                ((key, value),) = item.items()
                if value == "api/":
                    value = [{title: f"api/{page}.md"} for page, (title, _) in ROOMS.items()]
                elif isinstance(value, list):
                    value = filled(value)
                item = {key: value}
            out.append(item)
        return out

    config.nav = filled(config.nav)
    return config


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:  # noqa: ANN401
    """Links of the repository become links of the site."""
    here = Path("docs", page.file.src_uri)
    return _linked(markdown, here, page.file.src_uri)


def on_page_content(html: str, **_: Any) -> str:  # noqa: ANN401
    """Intervals and marks in tables are not broken: "0.64 [0.54, 0.74] ▼" goes on at most two lines."""
    cells = re.compile(r"(<t[dh][^>]*>)(.*?)(</t[dh]>)", re.DOTALL)
    whole = re.compile(r"\[[^\]<>]*\]| (?=[▲▼])")
    return cells.sub(lambda cell: cell[1] + whole.sub(lambda one: one[0].replace(" ", "\xa0"), cell[2]) + cell[3], html)


def _moved(source: Path, page: str) -> str:
    text = source.read_text("utf-8")
    return _linked(_cells(text, source.name) if source.suffix == ".ipynb" else text, source.relative_to(ROOT), page)


def _cells(notebook: str, name: str) -> str:
    """A notebook as a page, with a link to the file to run."""
    first, *rest = (
        text if cell["cell_type"] == "markdown" else f"```python\n{text}\n```"
        for cell in json.loads(notebook)["cells"]
        for text in ["".join(cell["source"]).strip()]
    )
    link = f'To run it, take the notebook: <a href="{name}" download>{name}</a>.'
    return "\n\n".join([first, link, *rest]) + "\n"


def _linked(text: str, source: Path, page: str) -> str:
    """Links from `source` as links from `page`; to a file that is no page of the site: its name alone."""
    places = {source: page for page, source in OUTSIDE.items()}

    def one(match: re.Match[str]) -> str:
        label, target = match.group(1), match.group(2)
        if re.match(r"[a-z]+:|#", target):
            return match.group(0)
        path, _, anchor = target.partition("#")
        whole = (ROOT / source.parent / path).resolve()
        if not whole.exists():
            return match.group(0)
        inside = whole.relative_to(ROOT).as_posix()
        if inside in places:
            goal = places[inside]
        elif inside.startswith("docs/"):
            goal = inside.removeprefix("docs/")
        else:
            return label if label.startswith("`") else f"{label} (`{inside}`)"
        up = "../" * page.count("/")
        return f"[{label}]({up}{goal}{'#' + anchor if anchor else ''})"

    return re.sub(r"(?<!!)\[([^\]]*)\]\(([^)\s]+)\)", one, text)

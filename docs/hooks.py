"""What the site has beside the pages in docs/: pages that lie with their code, and the API from the docstrings."""

import ast
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mkdocs.structure.files import Files

ROOT = Path(__file__).parents[1]
OUTSIDE = {
    "how-to/comfyui.md": "integrations/comfyui/README.md",
    "reference/model-card.md": "mrflow/models/pocket/README.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
    "experiments/log.md": "experiments/LOG.md",
}
"""Pages of the site, and the files of the repository that they are."""
ROOMS = {
    "maths": ("Schedules, solvers, guidance, noise", ("flow", "schedules", "solvers", "guidance", "noise")),
    "stages": (
        "Stages and chains",
        ("stage", "stages", "spec", "model_info", "rivals", "recipes", "students", "tiling"),
    ),
    "running": ("Running, results, records", ("runner", "result", "records", "errors", "progress")),
    "models": ("Models and adapters", ("models", "backbone", "adapters", "policies", "bridge")),
    "upscalers": ("Upscalers and decoders", ("upscaler", "upscalers", "decoder", "decoders")),
    "caches": ("Caches", ("caches",)),
    "sweeps": ("Sweeps, metrics, statistics", ("sweep", "metrics")),
    "testing": ("Laws and strategies for tests", ("testing",)),
}
"""Pages of the API, and the rooms of the package that each shows."""


def public() -> dict[str, list[str]]:
    """Every public name by the page that shows it, each with its full path."""
    found: dict[str, list[str]] = {page: [] for page in ROOMS}
    for package in ("mrflow", "mrflow.caches", "mrflow.sweep", "mrflow.testing", "mrflow.recipes", "mrflow.metrics"):
        for path in _names(package):
            room = path.split(".")[1]
            page = next((page for page, (_, rooms) in ROOMS.items() if room in rooms), None)
            if page is None:
                raise ValueError(f"{path} has no page of the API: give the room {room!r} a place in ROOMS, {__file__}")
            if path not in found[page]:
                found[page].append(path)
    return found


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


def _moved(source: Path, page: str) -> str:
    return _linked(source.read_text("utf-8"), source.relative_to(ROOT), page)


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
        if inside.startswith("docs/"):
            goal = inside.removeprefix("docs/")
        elif inside in places:
            goal = places[inside]
        else:
            return label if label.startswith("`") else f"{label} (`{inside}`)"
        up = "../" * page.count("/")
        return f"[{label}]({up}{goal}{'#' + anchor if anchor else ''})"

    return re.sub(r"(?<!!)\[([^\]]*)\]\(([^)\s]+)\)", one, text)

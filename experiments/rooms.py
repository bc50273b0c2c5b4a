"""How far can a stranger see? The package's rooms in numbers, from its own imports and one picture.

    python -m experiments.rooms

Prints a table; nothing is drawn but one small picture of the embedded model, to count what it calls.
"""

import ast
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import grimp
import torch

import mrflow as mf
from mrflow import spec, stage
from mrflow.guidance import own_guidance
from mrflow.models.layers import attention
from mrflow.schedules import Schedule

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "mrflow"
SOURCES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(PACKAGE.rglob("*.py"))}


def circles(knows: dict[str, set[str]]) -> list[str]:
    """Modules on circles of imports and between them: what stays when those that lead nowhere, either way, go."""
    left = dict(knows)
    while left:
        known = set[str]().union(*left.values())
        ends = [module for module, others in left.items() if not others & left.keys() or module not in known]
        if not ends:
            break
        left = {module: others for module, others in left.items() if module not in ends}
    return sorted(left)


def knowledge(package: str = "mrflow") -> dict[str, set[str]]:
    """What each module imports of its package: at the top, in functions, for annotations.

    Left out are the lists of public names (`_api`), which only type checkers follow.
    """
    graph = grimp.build_graph(package, exclude_type_checking_imports=False, cache_dir=None)
    lists = {module for module in graph.modules if module.endswith("._api")}
    return {module: graph.find_modules_directly_imported_by(module) - lists for module in graph.modules}


def closure(module: str, knows: dict[str, set[str]]) -> tuple[list[Path], int]:
    """The files of a module and of all that it leads to, and their lines together."""
    seen, left = set[str](), [module]
    while left:
        if (now := left.pop()) not in seen:
            seen.add(now)
            left += knows[now]
    files = [file for file in (ROOT / f"{name.replace('.', '/')}.py" for name in sorted(seen)) if file.is_file()]
    return files, sum(len(file.read_text(encoding="utf-8").splitlines()) for file in files)


def inner_imports() -> list[tuple[str, int]]:
    """Imports of our own package inside functions: file, line."""
    found = set[tuple[str, int]]()
    for path, tree in SOURCES.items():
        for function in ast.walk(tree):
            if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
                nodes = (node for node in ast.walk(function) if isinstance(node, ast.Import | ast.ImportFrom))
                own = (node for node in nodes if any(name.split(".")[0] == "mrflow" for name in _imported(node)))
                found |= {(str(path.relative_to(PACKAGE)), node.lineno) for node in own}
    return sorted(found)


def _imported(node: ast.AST) -> list[str]:
    """The modules that a statement imports, or imports from."""
    if isinstance(node, ast.ImportFrom):
        return [node.module or ""]
    return [alias.name for alias in node.names] if isinstance(node, ast.Import) else []


def twice_defined() -> list[str]:
    """Public names of functions and classes that several modules define at their top level."""
    names = Counter(
        node.name
        for tree in SOURCES.values()
        for node in tree.body
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_")
    )
    return sorted(name for name, count in names.items() if count > 1)


def calls(name: str) -> int:
    """How often something is called by its name."""
    return sum(isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == name
               for tree in SOURCES.values() for node in ast.walk(tree))  # fmt: skip


def loaded(line: str) -> int:
    """Modules of ours in a fresh Python after a line."""
    count = f"{line}\nimport sys; print(sum(m.split('.')[0] == 'mrflow' for m in sys.modules))"
    return int(subprocess.run([sys.executable, "-c", count], capture_output=True, text=True, check=True).stdout)


def picture() -> str:
    """Calls of one picture of `recipes.paper`, and the frames of ours between `run` and attention."""
    counts, depth = Counter[str](), list[tuple[int, int]]()
    model = mf.load("pocket", device="cpu")
    watched = {
        stage.plan.__code__: "plan", spec.check_size.__code__: "check_size",
        own_guidance.__code__: "own_guidance",
        **{kind.__call__.__code__: "schedules" for kind in subclasses(Schedule)},
    }  # fmt: skip

    def profile(frame: FrameType, event: str, _: object) -> None:
        code = frame.f_code
        if event == "call" and code in watched:
            counts[watched[code]] += 1
        if event == "call" and code is attention.__code__ and not depth:
            outer: FrameType | None = frame
            ours = list[str]()
            while outer is not None:
                ours.append(outer.f_code.co_filename)
                outer = outer.f_back
            run = next(at for at, file in enumerate(ours) if file.endswith("mrflow/runner.py"))
            own = [file for file in ours[: run + 1] if "/mrflow/" in file]
            depth.append((len(own), len(set(own))))

    sys.setprofile(profile)
    try:
        mf.run(
            mf.recipes.paper(low=(64, 64), size=(128, 128), steps=1),
            model,
            "a big red circle at the left on coarse dots",
        )
    finally:
        sys.setprofile(None)
    frames, files = depth[0]
    said = ", ".join(f"{name} {count}" for name, count in sorted(counts.items()))
    return f"{said}; {frames} frames through {files} files from run to attention"


def subclasses(kind: type[Any]) -> Iterator[type[Any]]:
    """All classes below one, that define how they are called."""
    for below in kind.__subclasses__():
        if "__call__" in below.__dict__:
            yield below
        yield from subclasses(below)


def main() -> None:
    """Print the numbers."""
    torch.set_num_threads(1)
    knows = knowledge()
    text = "\n".join(path.read_text(encoding="utf-8") for path in SOURCES)
    top = [path for path in PACKAGE.iterdir() if path.suffix == ".py" and path.stem != "__init__"]
    folders = [path for path in PACKAGE.iterdir() if (path / "__init__.py").is_file()]
    families = sorted(path.parent.name for path in PACKAGE.glob("models/*/transformer.py"))
    print(f"files, lines: {len(SOURCES)}, {len(text.splitlines())}")
    print(f"modules on a circle of imports, also inside functions and for annotations: {len(circles(knows))}")
    print(f"imports of our own inside functions: {len(inner_imports())}")
    print(f"at the top level: {len(top)} modules, {len(folders)} folders")
    for name in families:
        files, lines = closure(f"mrflow.models.{name}.transformer", knows)
        print(f"the transformer of {name} is read from {len(files)} files of {lines} lines")
    print(f"one picture: {picture()}")
    twice = twice_defined()
    print(f"public names defined in several modules: {len(twice)}: {' '.join(twice)}")
    ignores = len(re.findall(r"# type: ignore", text))
    print(f"casts {calls('cast')}, isinstance {calls('isinstance')}, type-ignores {ignores}")
    print(f"modules loaded by mrflow.Shifted: {loaded('import mrflow; mrflow.Shifted')}")
    weights = sum(path.stat().st_size for path in PACKAGE.rglob("*.safetensors"))
    print(f"weights in the package: {weights / 1e6:.1f} MB")


if __name__ == "__main__":
    main()

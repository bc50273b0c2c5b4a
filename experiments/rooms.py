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

import grimp
import torch

import mrflow as mf
from mrflow import spec, stage
from mrflow.models.layers import attention
from mrflow.schedules import Schedule

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "mrflow"
SOURCES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(PACKAGE.rglob("*.py"))}


def circles(knows: dict[str, set[str]]) -> int:
    """Modules on circles of imports and between them: what stays when those that lead nowhere, either way, go."""
    left = dict(knows)
    while left:
        known = set[str]().union(*left.values())
        ends = [module for module, others in left.items() if not others & left.keys() or module not in known]
        if not ends:
            break
        left = {module: others for module, others in left.items() if module not in ends}
    return len(left)


def transformer(name: str, knows: dict[str, set[str]]) -> str:
    """Files and lines that a family's transformer leads to."""
    seen, left = set[str](), [f"mrflow.models.{name}.transformer"]
    while left:
        if (now := left.pop()) not in seen and knows[now] is not None:
            seen.add(now)
            left += knows[now]
    paths = [ROOT / (module.replace(".", "/") + ".py") for module in seen]
    files = [path for path in paths if path.is_file()]
    return f"{name} {len(files)} files, {sum(len(f.read_text(encoding='utf-8').splitlines()) for f in files)} lines"


def inner_imports() -> int:
    """Imports of our own package inside functions."""
    found = set[tuple[Path, int]]()
    for path, tree in SOURCES.items():
        for function in ast.walk(tree):
            if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
                found |= {(path, node.lineno) for node in ast.walk(function)
                          if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mrflow")}  # fmt: skip
    return len(found)


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
        **{kind.__call__.__code__: "schedules" for kind in subclasses(Schedule)},
    }  # fmt: skip

    def profile(frame: object, event: str, _: object) -> None:
        code = frame.f_code  # type: ignore[attr-defined]
        if event == "call" and code in watched:
            counts[watched[code]] += 1
        if event == "call" and code is attention.__code__ and not depth:
            ours = list[str]()
            while frame is not None:
                ours.append(frame.f_code.co_filename)  # type: ignore[attr-defined]
                frame = frame.f_back  # type: ignore[attr-defined]
            run = next(at for at, file in enumerate(ours) if file.endswith("mrflow/runner.py"))
            own = [file for file in ours[: run + 1] if "/mrflow/" in file]
            depth.append((len(own), len(set(own))))

    sys.setprofile(profile)  # type: ignore[arg-type]
    try:
        mf.run(mf.recipes.paper(low=(64, 64), size=(128, 128), steps=1), model, "a big red circle")
    finally:
        sys.setprofile(None)
    frames, files = depth[0]
    said = ", ".join(f"{name} {count}" for name, count in sorted(counts.items()))
    return f"{said}; {frames} frames through {files} files from run to attention"


def subclasses(kind: type) -> Iterator[type]:
    """All classes below one, that define how they are called."""
    for below in kind.__subclasses__():
        if "__call__" in below.__dict__:
            yield below
        yield from subclasses(below)


def main() -> None:
    """Print the numbers."""
    torch.set_num_threads(1)
    graph = grimp.build_graph("mrflow", exclude_type_checking_imports=False, cache_dir=None)
    lists = {module for module in graph.modules if module.endswith("._api")}
    knows = {module: graph.find_modules_directly_imported_by(module) - lists for module in graph.modules}
    text = "\n".join(path.read_text(encoding="utf-8") for path in SOURCES)
    top = [path for path in PACKAGE.iterdir() if path.suffix == ".py" and path.stem != "__init__"]
    folders = [path for path in PACKAGE.iterdir() if (path / "__init__.py").is_file()]
    families = sorted(path.parent.name for path in PACKAGE.glob("models/*/transformer.py"))
    print(f"files, lines: {len(SOURCES)}, {len(text.splitlines())}")
    print(f"modules on a circle of imports, also inside functions and for annotations: {circles(knows)}")
    print(f"imports of our own inside functions: {inner_imports()}")
    print(f"at the top level: {len(top)} modules, {len(folders)} folders")
    print(f"a transformer is read from: {'; '.join(transformer(name, knows) for name in families)}")
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

"""Does the suite die when the code is wrong? Mutation testing with mutmut, part by part; `make mutate`.

Every part is a few files of `mrflow` and the tests that hold them. mutmut writes each small change (a sign, a constant,
a comparison, a call that is left out) and `experiments.mutant_trials` runs the tests that reach the changed function,
in forks of one process. So many mutants of each part are drawn by a recorded seed; a part's drawn mutants that were run
are not run again, so it may be stopped at any time. All work happens in copies of the working tree below --out, which
are brought up to date by each call; mutants of a function that changed are run again.

    python -m experiments.mutants run flow solvers       # (default: every part; hours)
    python -m experiments.mutants run flow --again       # the survivors too, after tests were written
    python -m experiments.mutants report                 # a Markdown table, and the survivors by name
    python -m experiments.mutants show mrflow.flow.x_add_noise__mutmut_3

A mutant that no test can tell from the code, whatever is tested, is written into `EQUIVALENT` with the reason, and
counts as neither killed nor survived. A mutant that no test of its part reaches counts as survived.
"""

import argparse
import ast
import difflib
import json
import os
import random
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

COPIED = ("tests", "experiments", "docs", "integrations", "README.md", "pyproject.toml")


@dataclass(frozen=True)
class Part:
    """Files of `mrflow` (globs) and the files of tests that hold them."""

    files: tuple[str, ...]
    tests: tuple[str, ...]


def _tests(*names: str) -> tuple[str, ...]:
    return tuple(f"tests/test_{name}.py" for name in names)


PARTS: Mapping[str, Part] = {
    "flow": Part(("mrflow/flow.py",), _tests("flow", "schedules", "solvers", "integrate")),
    "schedules": Part(
        ("mrflow/schedules.py", "mrflow/schedules/*"), _tests("schedules", "laws", "comfyui_schedules", "optimised")
    ),
    "solvers": Part(("mrflow/solvers/*",), _tests("solvers", "integrate", "adaptive", "exponential", "ground_truths")),
    "guidance": Part(("mrflow/guidance.py", "mrflow/guidance/*"), _tests("guidance", "guidance_variants", "nag")),
    "noise": Part(("mrflow/noise.py",), _tests("noise", "flow", "stage", "run")),
    "stages": Part(
        ("mrflow/stages/*",),
        _tests(
            "small_stages",
            "stage",
            "run",
            "controls",
            "tiles",
            "transitions",
            "testing",
            "laws",
            "law_words",
            "policies",
            "field_options",
            "ground_truths",
        ),
    ),
    "rivals": Part(("mrflow/rivals/*",), _tests("transitions", "ladders", "rivals", "ground_truths")),
    "caches": Part(
        ("mrflow/caches/*",),
        _tests("caches", "cache_rules", "cache_forecasts", "extrapolate", "toma", "laws", "ground_truths"),
    ),
    "cost": Part(("mrflow/cost.py",), _tests("cost", "transitions")),
    "statistics": Part(
        ("mrflow/sweep/statistics.py", "mrflow/sweep/significance.py"), _tests("statistics", "statistics_laws")
    ),
    "scenes": Part(
        ("mrflow/scenes/*",),
        _tests(
            "scenes", "hard_scenes", "readable", "fidelity", "legibility", "expressions", "ceilings", "ground_truths"
        ),
    ),
    "testing": Part(("mrflow/testing/*",), _tests("testing", "laws", "law_words", "strategies", "pytest_plugin")),
}
EQUIVALENT: Mapping[tuple[str, str], str] = {
    ("mrflow.caches.memory.CachedStep.__call__", "if len(rows) <= len(due):"): (
        "where every row was computed, what is joined is the computed rows one after the other: what was given"
    ),
    (
        "mrflow.caches.extrapolate.taylor",
        "factors.append([(a - b) / gap for a, b in zip(newest, before, strict=False)])",
    ): "both are the divided differences of one set of streams, of the same length",
    (
        "mrflow.scenes.reading._expression",
        "patch = _cut(ink, face.x * SIDE + dx * r, face.y * SIDE - dy * r, r) * _disc()",
    ): "dy goes through -0.06, 0 and 0.06, so that the same nine places are tried, and the best counts",
    (
        "mrflow.scenes.reading._cut",
        "return np.asarray(padded.resize((PATCH, PATCH), Image.Resampling.BILINEAR, box), )",
    ): "a picture of Pillow's mode F is an array of float32 without being told",
    (
        "mrflow.caches.toma.destinations",
        "best = likeness.gather(2, picked[0][..., None, None].expand(-1, -1, 1, likeness.shape[-2]))[:, :, 0]",
    ): "the table of likeness is square",
    ("mrflow.caches.memory.CachedStep._predicted", "if weights == (2.0,):"): (
        "a shortcut: one weight of 1 gives the stored stream, in float32 and back, by the general way too"
    ),
    ("mrflow.scenes.reading.find_tint", "light = pale @ np.full(3, 2 / 3, np.float32)"): (
        "a factor of the light scales the bins, the cut and both classes alike; only their ratio and sides are used"
    ),
    ("mrflow.scenes.legible._best", "moves = np.r_[0 : most + 1, -most:1]"): (
        "the last move is 0 once more, and of equal values argmax takes the first"
    ),
    (
        "mrflow.scenes.legible._texture",
        "turn = {k: np.exp(+2j * math.pi * at * k / period) for k in (-1, 0, 1)}",
    ): "the light is real, so that the other sign gives the conjugate, whose absolute value is asked",
    (
        "mrflow.solvers.adaptive.AdaptiveSolver.step",
        "for item, length, now in zip(x.split(1), lengths, known, strict=None)",
    ): "None is as False: lengths and velocities are kept for each picture of x, so none of the three is longer",
    ("mrflow.sweep.statistics.interval", "step = max(2, CHUNK // len(groups))"): (
        "how many draws are made at once bounds memory; the generator's stream, and so every draw, is the same"
    ),
    (
        "mrflow.sweep.statistics.interval",
        "sums = np.array([v[0] if len(v) == 1 else np.sum(v, dtype=np.float64) for v in groups], dtype=None)",
    ): "an array of floats, or of sums in float64, is float64 without being told",
    (
        "mrflow.sweep.statistics.interval",
        "sums = np.array([v[0] if len(v) == 1 else np.sum(v, dtype=None) for v in groups], dtype=np.float64)",
    ): "the values are Python floats, which numpy adds in float64 unasked",
}
"""By function and changed line (as `show` prints it): why nothing can tell the mutant from the code."""


@dataclass(frozen=True)
class Trial:
    """What became of a mutant: the test that killed it or None, how many tests were ready to run, and seconds."""

    by: str | None
    tests: int
    seconds: float


def workplace(out: Path, name: str) -> Path:
    """A copy of the working tree for a part, with its mutants written, brought up to date."""
    part, place = PARTS[name], out.resolve() / name
    listed = [Path(line) for line in _git("ls-files", "-co", "--exclude-standard").splitlines()]
    copied = {path for path in listed if path.is_file() and path.parts[0] in {*COPIED, "mrflow"}}
    for path in copied:
        _update(place / path, path.read_bytes())
        if path.parts[0] == "mrflow" and path.suffix != ".py":
            _update(place / "mutants" / path, path.read_bytes())  # mutmut takes over the sources alone
    for root in (place, place / "mutants"):
        for gone in {path.relative_to(root) for path in (root / "mrflow").rglob("*.py")} - copied:
            _remove(root / gone)
    for path in interrupted(place):
        path.unlink()  # or mutmut takes it for finished, as it is newer than its source
    settings = {
        "source_paths": ["mrflow"],
        "only_mutate": list(part.files),
        "also_copy": list(COPIED),
        "use_git_change_detection": False,
    }
    lines = "\n".join(f"{key} = {json.dumps(value)}" for key, value in settings.items())
    text = Path("pyproject.toml").read_text(encoding="utf-8") + f"\n[tool.mutmut]\n{lines}\n"
    _update(place / "pyproject.toml", text.encode())
    make = "from mutmut import __main__ as m; from mutmut.utils import file_utils as f; m.create_mutants(1); f."
    _python(place, "-c", f"{make}copy_also_copy_files()")
    return place


def mutants(place: Path) -> dict[str, str]:
    """Every mutant that mutmut wrote, of files that it finished, with the digest of its function."""
    out: dict[str, str] = {}
    half = {_beside(source, "meta") for source in interrupted(place)}
    for meta in sorted({*(place / "mutants").rglob("*.meta")} - half):
        found = json.loads(meta.read_text(encoding="utf-8"))
        for key in found["exit_code_by_key"]:
            module, _, function = key.partition("__mutmut_")[0].rpartition(".")
            out[key] = found["hash_by_function_name"].get(function, module)
    return out


def interrupted(place: Path) -> list[Path]:
    """Sources among the mutants that are not whole: mutmut was stopped before it wrote the meta file, its last one."""
    found = (source for pattern in PARTS[place.name].files for source in (place / "mutants").glob(pattern))
    sources = sorted(source for source in found if source.suffix == ".py")
    return [s for s in sources if not (m := _beside(s, "meta")).exists() or m.stat().st_mtime_ns < s.stat().st_mtime_ns]


def _beside(source: Path, kind: str) -> Path:
    return source.with_name(f"{source.name}.{kind}")


def _remove(source: Path) -> None:
    """A copied source that the working tree has no longer, and what mutmut wrote beside it."""
    for path in (source, _beside(source, "meta"), _beside(source, "spans")):
        path.unlink(missing_ok=True)


def drawn(names: Sequence[str], count: int, seed: int) -> list[str]:
    """All mutants, or so many drawn by the seed; the first of them stand for all."""
    return random.Random(seed).sample(sorted(names), min(count, len(names)))


def judged(place: Path, count: int, seed: int) -> list[str]:
    """The mutants of a part that are judged: those drawn before that are still there, and new ones."""
    file, every = place / f"drawn-{count}-{seed}.json", mutants(place)
    old = [name for name in json.loads(file.read_text(encoding="utf-8")) if name in every] if file.exists() else []
    out = [*old, *drawn([name for name in every if name not in {*old}], count - len(old), seed)]
    if every:
        file.write_text(json.dumps(out), encoding="utf-8")
    return out


def trials(place: Path) -> dict[str, Trial]:
    """What became of the mutants that were run, of functions that are as they were then."""
    file, digests = place / "results.jsonl", mutants(place)
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []
    last = {row["mutant"]: row for row in rows}
    return {
        key: Trial(row["by"], row["tests"], row["seconds"])
        for key, row in last.items()
        if digests.get(key) == row["digest"]
    }


def run(name: str, out: Path, count: int, seed: int, *, again: bool = False, budget: float = 40.0) -> None:
    """Run the drawn mutants of a part that were not run yet, or that survived (`again`)."""
    place = workplace(out, name)
    found, digests = trials(place), mutants(place)
    chosen = judged(place, count, seed)
    left = [key for key in chosen if key not in found or (again and found[key].by is None)]
    print(f"{name}: {len(left)} of {len(chosen)} to run", file=sys.stderr, flush=True)
    if not left:
        return
    task = place / "task.json"
    todo = {"mutants": {key: digests[key] for key in left}, "results": str(place / "results.jsonl"), "budget": budget}
    task.write_text(json.dumps(todo), encoding="utf-8")
    options = ("-q", "-p", "experiments.mutant_trials", "-p", "no:cacheprovider", "-m", "not slow and not gpu")
    tests = [test for test in PARTS[name].tests if (place / "mutants" / test).exists()]
    _python(place, "-m", "pytest", *options, "--basetemp", str(place / "tmp"), *tests, task=task)
    if missing := [key for key in left if key not in trials(place)]:
        raise SystemExit(f"{name}: {len(missing)} were not run, {missing[0]} first; see {place / 'mutmut.log'}")


def changed(place: Path, mutant: str) -> tuple[str, str, str]:
    """A mutant's function, the line of it that differs, and its unified diff."""
    module, _, name = mutant.rpartition(".")
    source = (place / "mutants" / module.replace(".", "/")).with_suffix(".py")
    if not source.exists():
        source = place / "mutants" / module.replace(".", "/") / "__init__.py"
    stem = name.partition("__mutmut_")[0]
    wanted, text = {f"{stem}__mutmut_orig", name}, source.read_text(encoding="utf-8").splitlines()
    bodies = {
        node.name: [line.replace(node.name, stem) for line in text[node.lineno - 1 : node.end_lineno]]
        for node in _functions(source)
        if node.name in wanted
    }
    lines = list(difflib.unified_diff(bodies[f"{stem}__mutmut_orig"], bodies[name], lineterm="", n=2))[2:]
    new = next((line[1:].strip() for line in lines if line.startswith("+")), "")
    function = stem.removeprefix("x_").removeprefix("xǁ").replace("ǁ", ".")
    return f"{module}.{function}", new, "\n".join(lines)


@lru_cache(maxsize=4)
def _functions(source: Path) -> list[ast.FunctionDef]:
    return [node for node in ast.walk(ast.parse(source.read_bytes())) if isinstance(node, ast.FunctionDef)]


def report(out: Path, count: int, seed: int, names: Sequence[str] = tuple(PARTS)) -> list[str]:
    """A line a part that was run: how many of its mutants were drawn, killed, equivalent; then the survivors."""
    lines = [
        "| part | mutants | drawn and run | killed | equivalent | score | s each |",
        "|---|---|---|---|---|---|---|",
    ]
    rest = list[str]()
    for name in names:
        place = out.resolve() / name
        if half := interrupted(place):
            rest.append(f"{name}: stopped while mutants of {half[0].name} were written; run it again")
            continue
        every = mutants(place)
        chosen = set(judged(place, count, seed))
        found = {key: trial for key, trial in trials(place).items() if key in chosen}
        if not found:
            continue
        lived = [key for key, trial in found.items() if trial.by is None]
        same = [key for key in lived if changed(place, key)[:2] in EQUIVALENT]
        killed, seconds = len(found) - len(lived), sum(trial.seconds for trial in found.values()) / len(found)
        score = killed / max(1, len(found) - len(same))
        counts = f"{len(every)} | {len(found)} | {killed} | {len(same)}"
        lines.append(f"| {name} | {counts} | {score:.0%} | {seconds:.1f} |")
        rest += [f"survived: {key}" for key in lived if key not in same]
    return [*lines, "", *rest]


def _update(path: Path, content: bytes) -> None:
    if not path.exists() or path.read_bytes() != content:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def _python(place: Path, *arguments: str, task: Path | None = None) -> None:
    """Python with these arguments in a workplace, or among its mutants; its own output goes to a file there."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(place / "mutants"), "HYPOTHESIS_PROFILE": "mutants"}
    if task:
        env["MRFLOW_MUTANT_TASK"] = str(task)
    with (place / "mutmut.log").open("a", encoding="utf-8") as log:
        where = place / "mutants" if task else place
        subprocess.run([sys.executable, *arguments], cwd=where, env=env, stdout=log, stderr=log, check=False)


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], check=True, capture_output=True, text=True).stdout.strip()


def main() -> None:
    """Run, report or show."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=("run", "report", "show"))
    parser.add_argument("names", nargs="*", help="parts to run (default: all), or mutants to show")
    parser.add_argument("--draw", type=int, default=100, help="mutants of each part (default: 100)")
    parser.add_argument("--seed", type=int, default=0, help="what draws them (default: 0)")
    parser.add_argument("--budget", type=float, default=40.0, help="seconds of tests a mutant at most (default: 40)")
    parser.add_argument("--again", action="store_true", help="run survivors again too")
    parser.add_argument("--out", type=Path, default=Path("runs/mutants"))
    args = parser.parse_args()
    if args.verb == "report":
        print("\n".join(report(args.out, args.draw, args.seed, args.names or tuple(PARTS))))
        return
    if args.verb == "show":
        for key in args.names:
            place = next((p for p in map(args.out.resolve().joinpath, PARTS) if key in mutants(p)), None)
            print(key, *(changed(place, key)[::2] if place else ["no part has this mutant"]), sep="\n")
        return
    if unknown := set(args.names) - set(PARTS):
        parser.error(f"no part is called {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    for name in args.names or PARTS:
        run(name, args.out, args.draw, args.seed, again=args.again, budget=args.budget)
    print("\n".join(report(args.out, args.draw, args.seed, args.names or tuple(PARTS))))


if __name__ == "__main__":
    main()

"""Does the suite die when the code is wrong? Mutation testing with mutmut, part by part; `make mutate`.

Every part is a few files of `mrflow` and the tests that hold them. mutmut writes each small change (a sign, a constant,
a comparison, a call that is left out) and runs the tests that reach the changed function. So many mutants of each part
are drawn by a recorded seed; a part's drawn mutants that were run are not run again, so it may be stopped at any time.
All work happens in copies below --out, of the commit that a part was first run on; remove one to run a part anew.

    python -m experiments.mutants run flow solvers       # (default: every part; hours)
    python -m experiments.mutants report                 # a Markdown table, and the survivors by name
    python -m experiments.mutants show mrflow.flow.x_add_noise__mutmut_3 --part flow

A mutant that no test can tell from the code, whatever is tested, is written into `EQUIVALENT` with the reason, and
counts as neither killed nor survived. A mutant that no test of its part reaches counts as survived.
"""

import argparse
import json
import os
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

KILLED, SURVIVED = "killed", "survived"
CODES = {0: SURVIVED, 33: SURVIVED, 5: SURVIVED}  # of mutmut: tests passed, no tests reach it, none were collected
CHUNK = 25  # mutants a call of mutmut: what a stop may cost


@dataclass(frozen=True)
class Part:
    """Files of `mrflow` (globs) and the files of tests that hold them."""

    files: tuple[str, ...]
    tests: tuple[str, ...]


def _tests(*names: str) -> tuple[str, ...]:
    return tuple(f"tests/test_{name}.py" for name in names)


PARTS: Mapping[str, Part] = {
    "flow": Part(("mrflow/flow.py",), _tests("flow", "schedules", "solvers", "integrate")),
    "schedules": Part(("mrflow/schedules.py", "mrflow/schedules/*"), _tests("schedules", "laws", "published")),
    "solvers": Part(("mrflow/solvers/*",), _tests("solvers", "integrate", "laws")),
    "guidance": Part(("mrflow/guidance.py", "mrflow/guidance/*"), _tests("guidance", "laws")),
    "noise": Part(("mrflow/noise.py", "mrflow/seeds.py"), _tests("flow", "laws", "stage", "run")),
    "stages": Part(("mrflow/stages/*",), _tests("stage", "run", "controls", "tiles", "transitions", "testing")),
    "rivals": Part(("mrflow/rivals/*",), _tests("transitions", "ladders")),
    "caches": Part(("mrflow/caches/*",), _tests("caches", "cache_rules", "extrapolate", "toma")),
    "cost": Part(("mrflow/cost.py",), _tests("memory", "transitions", "caches", "pocket", "qwen")),
    "statistics": Part(("mrflow/sweep/statistics.py", "mrflow/sweep/significance.py"), _tests("statistics")),
    "scenes": Part(("mrflow/scenes/*",), _tests("scenes", "hard_scenes", "readable", "fidelity", "places")),
    "testing": Part(("mrflow/testing/*",), _tests("testing", "laws", "strategies", "pytest_plugin")),
}
EQUIVALENT: Mapping[str, str] = {
    "mrflow.noise.xǁNestedǁ__call____mutmut_11": "noise has four axes: shape[:+2] is shape[:-2]",
    "mrflow.noise.xǁNestedǁ__call____mutmut_14": "noise has four axes: shape[+2] is shape[-2]",
}
"""By mutant: why nothing can tell it from the code."""


def workplace(out: Path, name: str, *, make: bool = True) -> Path:
    """A copy of the commit that a part was first run on, set up for it; made of the last commit where there is none."""
    part, place = PARTS[name], out / name
    if make and not (place / "pyproject.toml").exists():
        commit = _git("rev-parse", "HEAD")
        place.mkdir(parents=True, exist_ok=True)
        archive = subprocess.run(["git", "archive", commit], check=True, capture_output=True).stdout
        subprocess.run(["tar", "-x", "-C", str(place)], input=archive, check=True)
        settings = {
            "source_paths": ["mrflow"],
            "only_mutate": list(part.files),
            "also_copy": ["tests", "experiments", "docs", "README.md", "integrations", "pyproject.toml"],
            "pytest_add_cli_args_test_selection": [t for t in part.tests if (place / t).exists()],
            "pytest_add_cli_args": ["-q", "-x", "-p", "no:cacheprovider", "-m", "not slow"],
            "process_isolation": "forkserver",
            "use_git_change_detection": False,
        }
        lines = "\n".join(f"{key} = {json.dumps(value)}" for key, value in settings.items())
        (place / "COMMIT").write_text(f"{commit}\n", encoding="utf-8")
        with (place / "pyproject.toml").open("a", encoding="utf-8") as file:
            file.write(f"\n[tool.mutmut]\n{lines}\n")
    return place


def mutants(place: Path) -> dict[str, int | None]:
    """Every mutant that mutmut wrote, with its exit status, None where it was not run."""
    out: dict[str, int | None] = {}
    for meta in sorted((place / "mutants").rglob("*.meta")):
        out |= json.loads(meta.read_text(encoding="utf-8"))["exit_code_by_key"]
    return out


def drawn(names: Sequence[str], count: int, seed: int) -> list[str]:
    """The mutants of a part that are judged: all, or so many drawn by the seed."""
    ordered = sorted(names)
    return ordered if len(ordered) <= count else sorted(random.Random(seed).sample(ordered, count))


def run(name: str, out: Path, count: int, seed: int) -> None:
    """Write a part's mutants and run those that are drawn and were not run yet."""
    place = workplace(out, name)
    if not mutants(place):
        _mutmut(place, "-c", "from mutmut.__main__ import create_mutants; create_mutants(1)")
    chosen = drawn(list(mutants(place)), count, seed)
    while left := [key for key in chosen if mutants(place).get(key) is None]:
        print(f"{name}: {len(chosen) - len(left)} of {len(chosen)}", file=sys.stderr, flush=True)
        _mutmut(place, "-m", "mutmut", "run", "--max-children", "1", *left[:CHUNK])
        if [key for key in chosen if mutants(place).get(key) is None] == left:
            raise SystemExit(f"{name}: mutmut ran none of {', '.join(left[:3])}, ...; see {place}")


def judged(name: str, out: Path, count: int, seed: int) -> dict[str, str]:
    """What became of each drawn mutant that was run."""
    found = mutants(workplace(out, name, make=False))
    chosen = {key: found[key] for key in drawn(list(found), count, seed)}
    return {key: CODES.get(code, KILLED) for key, code in chosen.items() if code is not None}


def report(out: Path, count: int, seed: int) -> list[str]:
    """A line a part that was run: how many of its mutants were drawn, killed, equivalent; then the survivors."""
    lines = ["| part | mutants | drawn and run | killed | equivalent | score |", "|---|---|---|---|---|---|"]
    survivors = list[str]()
    for name in PARTS:
        every = mutants(workplace(out, name, make=False))
        found = judged(name, out, count, seed)
        if not found:
            continue
        same = [key for key in found if key in EQUIVALENT and found[key] == SURVIVED]
        counts = Counter(found.values())
        score = counts[KILLED] / max(1, len(found) - len(same))
        lines.append(f"| {name} | {len(every)} | {len(found)} | {counts[KILLED]} | {len(same)} | {score:.0%} |")
        survivors += [key for key, what in found.items() if what == SURVIVED and key not in same]
    return [*lines, "", *(f"survived: {key}" for key in survivors)]


def _mutmut(place: Path, *arguments: str) -> None:
    """Python with these arguments in a workplace; its own output goes to a file there."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(place / "mutants")}
    with (place / "mutmut.log").open("a", encoding="utf-8") as log:
        subprocess.run([sys.executable, *arguments], cwd=place, env=env, stdout=log, stderr=log, check=False)


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], check=True, capture_output=True, text=True).stdout.strip()


def main() -> None:
    """Run, report or show."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=("run", "report", "show"))
    parser.add_argument("names", nargs="*", help="parts to run (default: all), or mutants to show")
    parser.add_argument("--part", choices=PARTS, help="of the mutants to show")
    parser.add_argument("--draw", type=int, default=100, help="mutants of each part (default: 100)")
    parser.add_argument("--seed", type=int, default=0, help="what draws them (default: 0)")
    parser.add_argument("--out", type=Path, default=Path("runs/mutants"))
    args = parser.parse_args()
    if args.verb == "report":
        print("\n".join(report(args.out, args.draw, args.seed)))
        return
    if args.verb == "show":
        place = workplace(args.out, args.part or parser.error("--part is missing"), make=False)
        for key in args.names:
            shown: Any = subprocess.run(
                [sys.executable, "-m", "mutmut", "show", key], cwd=place, capture_output=True, text=True, check=False
            )
            print(cast(str, shown.stdout))
        return
    if unknown := set(args.names) - set(PARTS):
        parser.error(f"no part is called {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    for name in args.names or PARTS:
        run(name, args.out, args.draw, args.seed)
    print("\n".join(report(args.out, args.draw, args.seed)))


if __name__ == "__main__":
    main()

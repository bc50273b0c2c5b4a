"""Draws the prompts of a benchmark into a folder: what is there stays, what fails is written down, the rest goes on."""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

import mrflow as mf
from mrflow.cli.chains import build
from mrflow.cli.options import ModelOptions
from mrflow.cli.parsing import load_chain, load_model, upscaler
from mrflow.errors import MrflowError, PlanError
from mrflow.records.pictures import write_bytes
from mrflow.result import make_record
from mrflow.stage import AnyChain


@dataclass(frozen=True)
class Task:
    """One prompt: its pictures have the seeds, and are `done` or handed to `keep` together."""

    name: str
    prompt: str
    done: Callable[[], bool]
    keep: Callable[[list[Image.Image], list[object]], None]


def options(parser: argparse.ArgumentParser) -> None:
    """What every benchmark is asked."""
    parser.add_argument("--chain", default="paper", help="a recipe (paper, official, native) or file.py:name")
    parser.add_argument("--model", default="pocket", help="as for `mrflow generate`")
    parser.add_argument("--size", help="HEIGHTxWIDTH, or an aspect")
    parser.add_argument("--steps")
    parser.add_argument("--sr", help="as for `mrflow generate`")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype")
    parser.add_argument("--offload", default="none")
    parser.add_argument("--storage")
    parser.add_argument("--samples", type=int, default=4, help="pictures a prompt")
    parser.add_argument("--seed", type=int, default=0, help="of each prompt's first picture")
    parser.add_argument("--limit", type=int, help="only the first prompts")
    parser.add_argument("--shard", default="0/1", help="i/n: every n-th prompt from the i-th on")


def shard(text: str) -> tuple[int, int]:
    """i and n of i/n."""
    i, _, n = text.partition("/")
    if not (i.isdigit() and n.isdigit() and 0 <= int(i) < int(n)):
        raise PlanError(f"--shard must be i/n with i below n, such as 0/4, got {text!r}")
    return int(i), int(n)


def draw(tasks: Sequence[Task], args: argparse.Namespace, errors: Path) -> int:
    """Make what is not done yet; the number of prompts that failed, which `errors` (JSON lines) names."""
    first, count = shard(args.shard)
    wanted = [task for task in tasks[: args.limit][first::count] if not task.done()]
    if args.samples < 1:
        raise PlanError(f"--samples must be at least 1, got {args.samples}")
    print(f"{len(wanted)} prompts to draw, {args.samples} pictures each", file=sys.stderr)
    if not wanted:
        return 0
    net = upscaler(args.sr)
    own: AnyChain | None = load_chain(args.chain) if ".py:" in args.chain else None
    options = ModelOptions(device=args.device, dtype=args.dtype, offload=args.offload, storage=args.storage)
    model = load_model(args.model, options)
    chain = own or build(args.chain, model.info, size=args.size, steps=args.steps, sr=net)
    mf.plan(chain, model.info, batch=args.samples)
    seeds = [args.seed + i for i in range(args.samples)]
    failed, began = 0, time.monotonic()
    for number, task in enumerate(wanted, 1):
        try:
            result = mf.run(chain, model, task.prompt, seed=seeds)
            task.keep(result.images, [make_record(result, i) for i in range(args.samples)])
        except MrflowError as error:
            if error.exit_code == 5:  # memory or disk: the next prompt would fail alike
                raise
            failed += 1
            row = {"name": task.name, "prompt": task.prompt, "error": f"{type(error).__name__}: {error}"}
            with errors.open("a", encoding="utf-8") as f:
                f.write(json.dumps(row) + "\n")
        left = (time.monotonic() - began) / number * (len(wanted) - number)
        if number % 20 == 0 or number == len(wanted):
            print(f"{number} of {len(wanted)}, {left / 60:.0f} minutes left, {failed} failed", file=sys.stderr)
    return failed


def write_text(path: Path, text: str) -> None:
    """A text file, whole or not at all."""
    write_bytes(path, text.encode("utf-8"))


def read_lines(path: Path) -> list[dict[str, object]]:
    """The tables of a JSON-lines file.

    Raises:
        PlanError: a line is no table; the text names it.
    """
    rows: list[dict[str, object]] = []
    try:
        lines = path.read_text("utf-8").splitlines()
    except OSError as error:
        raise PlanError(f"{path} cannot be read: {error.strerror or error}") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row: object = json.loads(line)
        except json.JSONDecodeError as error:
            raise PlanError(f"{path}, line {number}: {error}") from None
        if not isinstance(row, dict):
            raise PlanError(f"{path}, line {number} is not a table")
        rows.append(row)
    return rows


def resampled(count: int, draws: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Indices of `draws` bootstrap samples of `count` things, (draws, count)."""
    return rng.integers(0, count, (draws, count))


def quantiles(values: Iterable[float] | NDArray[np.float64]) -> tuple[float, float]:
    """The middle 95 %."""
    array = np.asarray(list(values) if not isinstance(values, np.ndarray) else values)
    return float(np.quantile(array, 0.025)), float(np.quantile(array, 0.975))


def guarded(main: Callable[[], int]) -> None:
    """Run a script's main; errors of mrflow end it with their text and code."""
    try:
        code = main()
    except MrflowError as error:
        print(f"error: {error}", file=sys.stderr)
        code = error.exit_code
    raise SystemExit(code)

"""The verb sweep: many pictures into a folder of rows."""

import json
import sys
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.table import Column

from mrflow.cli.display import duration, progress_bar, width, wrap
from mrflow.cli.options import refuse
from mrflow.cli.parsing import load_file, load_model, module_name
from mrflow.cli.verbs import SweepOptions
from mrflow.display.notes import counted
from mrflow.errors import PlanError
from mrflow.machine.interrupts import end_at_once, listening
from mrflow.models import info
from mrflow.records.sources import own_files
from mrflow.stage import human
from mrflow.sweep import Sweep
from mrflow.sweep.cluster import Pool, package, run_on_ray
from mrflow.sweep.limits import RETRY
from mrflow.sweep.local import Progress, check_run, run_sweep
from mrflow.sweep.tables import table
from mrflow.sweep.trackers import tracker


def sweep(err: Console, asked: SweepOptions) -> None:
    """Plan, draw what is missing, say what is left."""
    found = load_sweep(asked.file)
    name = asked.model or found.model
    folder = asked.out or Path(f"{asked.file.stem.partition(':')[0]}-sweep")
    whole = folder.absolute()  # stages may change to another folder
    part = parse_shard(asked.shard)
    planned = plan_sweep(found, name)
    if asked.dry:
        typer.echo(json.dumps(planned) if asked.as_json else "\n".join(wrap(plan_lines(planned), width())))
        return
    if asked.engine not in ("local", "ray"):
        raise PlanError(f"--engine takes local or ray, got {asked.engine!r}")
    of_ray = {"--workers": asked.workers, "--gpus": asked.gpus, "--address": asked.address}
    idle = [option for option, value in of_ray.items() if value is not None]
    refuse(asked.engine == "local" and bool(idle), ", ".join(idle), "without --engine ray")
    check_run(asked.batch, part, asked.row_timeout)
    logs = [tracker(word) for word in asked.log or ()]
    load = partial(load_model, name, asked.loading)
    backbone = load() if asked.engine == "local" else None
    with stopping() as (stop, code), bar(err) as show:
        how: dict[str, Any] = {
            "batch": asked.batch, "shard": part, "retry": asked.retry, "row_timeout": asked.row_timeout,
            "on_progress": show, "stop": stop, "log": logs,
        }  # fmt: skip
        if backbone is None:
            for _, own in own_files(sys.modules[module_name(_file_of(asked.file)[0])]):
                package().cloudpickle.register_pickle_by_value(own)  # workers have no such file
            pool = Pool(2 if asked.workers is None else asked.workers, gpus=asked.gpus or 0.0, address=asked.address)
            done = run_on_ray(found, load, whole, pool, **how)
        else:
            done = run_sweep(found, backbone, whole, **how)
    done = replace(done, folder=str(folder))
    stay = f", {done.stayed} failed before and stay failed" if done.stayed else ""
    counts = f"{counted(done.made, 'row')} made, {done.before} were there, {done.failed} failed{stay}, {done.left} left"
    err.print(f"{counts}: {folder}")
    for text in done.errors:
        err.print(f"  {text}")
    if not asked.as_json and done.made + done.before > done.stayed:
        err.print(table(whole).text(width(err)))
    if asked.as_json:
        typer.echo(json.dumps(done.__dict__))
    else:
        typer.echo(folder)
    if done.stopped:
        err.print("stopped after the current batch; run the same command again to resume")
        raise SystemExit(code[0])
    if done.left:
        err.print(
            f"other processes are making {counted(done.left, 'row')}, or died with them; run the same command again"
        )
        raise SystemExit(RETRY)
    if done.failed or done.stayed:
        err.print(f"failed rows are in {folder}/rows with their errors; --retry generates them again")
    if done.unmeasured:
        where = counted(done.unmeasured, "row")
        err.print(f"a metric failed in {where}; once its cause is gone, the same command measures it there")
    if done.failed or done.stayed or done.unmeasured:
        raise SystemExit(4)


def load_sweep(where: Path) -> Sweep:
    """The sweep that a file defines: `sweep`, or the name behind a colon.

    Raises:
        PlanError: the file fails, or defines no such sweep.
    """
    file, name = _file_of(where)
    names = load_file(file)
    found = names.get(name or "sweep")
    if not isinstance(found, Sweep):
        known = sorted(k for k, v in names.items() if isinstance(v, Sweep))
        raise PlanError(
            f"{where} defines no {name or 'sweep'!r} of mf.Sweep(chains, prompts, seeds=...)"
            + (f"; it defines {', '.join(known)}" if known else "")
        )
    return found


def _file_of(where: Path) -> tuple[Path, str]:
    """The file of file.py:name and the name, which may be left out."""
    file, _, name = str(where).partition(".py:")
    return (Path(f"{file}.py"), name) if name else (where, "")


def parse_shard(text: str) -> tuple[int, int]:
    """i and n of i/n."""
    i, _, n = text.partition("/")
    if not (i.isascii() and i.isdigit() and n.isascii() and n.isdigit() and int(i) < int(n)):
        raise PlanError(f"--shard must be i/n with i below n, such as 0/4, got {text!r}")
    return int(i), int(n)


def plan_sweep(sweep: Sweep, name: str) -> dict[str, Any]:
    """What a sweep will take, as plain data; every chain is planned, no weight is loaded.

    Raises:
        PlanError: a chain cannot work.
    """
    plans = sweep.plans(info(name))
    pictures = len(sweep.prompts) * len(sweep.seeds)
    return {
        "prompts": len(sweep.prompts),
        "draws": len(sweep.seeds),
        "rows": sweep.rows,
        "chains": {label: {"nfe": p.nfe, "flops": p.work.flops} for label, p in plans.items()},
        "flops": pictures * sum(p.work.flops for p in plans.values()),
    }


def plan_lines(planned: dict[str, Any]) -> list[str]:
    """What `plan_sweep` found, for people: labels at the end, where long ones break no column."""
    chains = planned["chains"]
    sizes = {"chain": len(chains)} | {noun: planned[f"{noun}s"] for noun in ("prompt", "draw")}
    rows = f"{' x '.join(counted(n, noun) for noun, n in sizes.items())}: {counted(planned['rows'], 'row')}"
    each = [
        f"{p['nfe']:>6} {'forward' if p['nfe'] == 1 else 'forwards':<8}  {human(p['flops'], 'FLOP'):>10}  {label}"
        for label, p in chains.items()
    ]
    return [rows, *each, f"in all {human(planned['flops'], 'FLOP')}, less what stages share"]


@contextmanager
def stopping() -> Generator[tuple[threading.Event, list[int]]]:
    """The first SIGINT or SIGTERM asks to stop after the batch that is being made, the second stops at once."""
    stop, code = threading.Event(), [130]

    def told(number: int) -> None:
        if stop.is_set():
            end_at_once(number)
        code[0] = 128 + number
        stop.set()
        with suppress(OSError, ValueError):
            sys.stderr.write("\nstopping after this batch; once more stops at once\n")

    with listening(lambda number, frame: None, told):
        yield stop, code


@contextmanager
def bar(err: Console) -> Generator[Callable[[Progress], None]]:
    """Progress on stderr: a bar in a terminal, else a line from time to time."""
    last = [0]
    columns = (
        TextColumn("{task.description}", markup=False, table_column=Column(max_width=err.width // 3, no_wrap=True)),
        BarColumn(30 if err.width >= 80 else 10),
        MofNCompleteColumn(),
        TextColumn("{task.fields[left]}"),
    )
    with progress_bar(err, *columns) as shown:
        task = shown.add_task("", total=None, left="")

        def show(at: Progress) -> None:
            left = "" if at.left is None else f"{duration(at.left)} left"
            bad = f", {at.failed} failed" if at.failed else ""
            shown.update(task, description=at.label, completed=at.done, total=at.total, left=left + bad)
            if not err.is_terminal and (at.done == at.total or at.done * 10 // at.total > last[0]):
                last[0] = at.done * 10 // at.total
                err.print(f"{at.done} of {at.total} rows{bad}, {left}")

        yield show

"""The verbs for many pictures: sweep, report, tune. Thin; nothing heavy is imported before it is needed."""

import json
import sys
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mrflow._checks import check_whole
from mrflow.cli.display import console, duration, width, wrapped
from mrflow.cli.options import Json, ModelOptions, refuse
from mrflow.cli.parsing import load_file, module_name
from mrflow.errors import PlanError
from mrflow.interrupts import end_at_once, listening
from mrflow.notes import printable

if TYPE_CHECKING:
    from rich.console import Console

    from mrflow.sweep import Sweep
    from mrflow.sweep.local import Progress


def sweep(
    file: Annotated[Path, typer.Argument(help="A Python file that defines `sweep = mf.Sweep(...)`, or file.py:name.")],
    out: Annotated[Path | None, typer.Option("--out", help="The folder; named after the file unless said.")] = None,
    model: Annotated[str | None, typer.Option("--model", help="Instead of the model that the file names.")] = None,
    batch: Annotated[int, typer.Option("--batch", help="Pictures of one chain made together.")] = 4,
    shard: Annotated[str, typer.Option("--shard", help="i/n: this process makes every n-th prompt and draw.")] = "0/1",
    retry: Annotated[bool, typer.Option("--retry", help="Make failed rows again.")] = False,
    row_timeout: Annotated[
        float | None, typer.Option("--row-timeout", help="Seconds that a row may take before it fails (default: none).")
    ] = None,
    dry: Annotated[bool, typer.Option("--plan", help="Plan every chain, count rows and work, make nothing.")] = False,
    engine: Annotated[
        str, typer.Option("--engine", help="local, or ray: a pool of workers on a Ray cluster.")
    ] = "local",
    workers: Annotated[
        int | None, typer.Option("--workers", help="ray: how many workers, a model each (default: 2).")
    ] = None,
    gpus: Annotated[float | None, typer.Option("--gpus", help="ray: GPUs of each worker (default: 0).")] = None,
    address: Annotated[
        str | None, typer.Option("--address", help="ray: a running cluster (default: one on this machine).")
    ] = None,
    log: Annotated[
        list[str] | None,
        typer.Option("--log", help="Also to tensorboard:FOLDER, wandb[:PROJECT], trackio[:PROJECT]."),
    ] = None,
    as_json: Json = False,
    *,
    options: ModelOptions,
) -> None:
    """Draw chains x prompts x draws into a folder of rows and pictures; run it again after any interruption.

    mrflow sweep export FOLDER writes the rows as CSV, Parquet or a dataset for Hugging Face.
    """
    with console() as err:
        from mrflow.sweep.limits import RETRY
        from mrflow.sweep.local import check_run, run_sweep
        from mrflow.sweep.trackers import tracker

        asked = load_sweep(file)
        name = model or asked.model
        folder = out or Path(f"{file.stem.partition(':')[0]}-sweep")
        part = parse_shard(shard)
        planned = plan_sweep(asked, name)
        if dry:
            typer.echo(json.dumps(planned) if as_json else "\n".join(wrapped(plan_lines(planned), width())))
            return
        if engine not in ("local", "ray"):
            raise PlanError(f"--engine takes local or ray, got {engine!r}")
        if log and engine != "local":
            raise PlanError("--log works with --engine local; export a sweep of Ray's when it is done")
        of_ray = {"--workers": workers, "--gpus": gpus, "--address": address}
        idle = [option for option, value in of_ray.items() if value is not None]
        refuse(engine == "local" and bool(idle), ", ".join(idle), "without --engine ray")
        check_run(batch, part, row_timeout)
        logs = [tracker(word) for word in log or ()]
        load = partial(options.load, name)
        backbone = load() if engine == "local" else None
        with stopping() as (stop, code), bar(err) as show:
            if backbone is None:
                from mrflow.records.sources import own_files
                from mrflow.sweep.cluster import Pool, package, run_on_ray

                for _, own in own_files(
                    sys.modules[module_name(Path(str(file).partition(".py:")[0]).with_suffix(".py"))]
                ):
                    package().cloudpickle.register_pickle_by_value(own)  # workers have no such file
                pool = Pool(2 if workers is None else workers, gpus=gpus or 0.0, address=address)
                done = run_on_ray(
                    asked, load, folder, pool, batch=batch, shard=part, retry=retry, row_timeout=row_timeout,
                    on_progress=show, stop=stop,
                )  # fmt: skip
            else:
                done = run_sweep(
                    asked, backbone, folder, batch=batch, shard=part, retry=retry, row_timeout=row_timeout,
                    on_progress=show, stop=stop, log=logs,
                )  # fmt: skip
        stay = f", {done.stayed} failed before and stay failed" if done.stayed else ""
        counts = f"{done.made} rows made, {done.before} were there, {done.failed} failed{stay}, {done.left} left"
        err.print(f"{counts}: {folder}")
        for text in done.errors:
            err.print(f"  {text}")
        if not as_json and done.made + done.before > done.stayed:
            from mrflow.sweep.tables import table

            err.print(str(table(folder)))
        if as_json:
            typer.echo(json.dumps(done.__dict__))
        else:
            typer.echo(folder)
        if done.stopped:
            err.print("stopped after the batch that was being made; the same command goes on")
            raise SystemExit(code[0])
        if done.left:
            err.print(f"other processes are making {done.left} rows, or died with them; run the same command again")
            raise SystemExit(RETRY)
        if done.failed or done.stayed:
            err.print(f"failed rows are in {folder}/rows with their errors; --retry makes them again")
        if done.unmeasured:
            err.print(f"{done.unmeasured} rows lack a metric that failed; the same command measures them again")
        if done.failed or done.stayed or done.unmeasured:
            raise SystemExit(4)


def load_sweep(where: Path) -> "Sweep":
    """The sweep that a file defines: `sweep`, or the name behind a colon.

    Raises:
        PlanError: the file fails, or defines no such sweep.
    """
    from mrflow.sweep import Sweep

    file, _, name = str(where).partition(".py:")
    names = load_file(Path(f"{file}.py") if name else where)
    found = names.get(name or "sweep")
    if not isinstance(found, Sweep):
        known = sorted(k for k, v in names.items() if isinstance(v, Sweep))
        raise PlanError(
            f"{where} defines no {name or 'sweep'!r} of mf.Sweep(chains, prompts, seeds=...)"
            + (f"; it defines {', '.join(known)}" if known else "")
        )
    return found


def parse_shard(text: str) -> tuple[int, int]:
    """i and n of i/n."""
    i, _, n = text.partition("/")
    if not (i.isascii() and i.isdigit() and n.isascii() and n.isdigit() and int(i) < int(n)):
        raise PlanError(f"--shard must be i/n with i below n, such as 0/4, got {text!r}")
    return int(i), int(n)


def plan_sweep(asked: "Sweep", name: str) -> dict[str, Any]:
    """What a sweep will take, as plain data; every chain is planned, no weight is loaded.

    Raises:
        PlanError: a chain cannot work.
    """
    from mrflow.models import info

    plans = asked.plans(info(name))
    pictures = len(asked.prompts) * len(asked.seeds)
    return {
        "prompts": len(asked.prompts),
        "draws": len(asked.seeds),
        "rows": asked.rows,
        "chains": {label: {"nfe": p.nfe, "flops": p.work.flops} for label, p in plans.items()},
        "flops": pictures * sum(p.work.flops for p in plans.values()),
    }


def plan_lines(planned: dict[str, Any]) -> list[str]:
    """What `plan_sweep` found, for people."""
    from mrflow.stage import human

    chains = planned["chains"]
    longest = max(map(len, chains))
    rows = f"{len(chains)} chains x {planned['prompts']} prompts x {planned['draws']} draws: {planned['rows']} rows"
    each = [f"  {k:<{longest}}  {p['nfe']:>4} forwards  {human(p['flops'])}FLOP" for k, p in chains.items()]
    return [rows, *each, f"in all {human(planned['flops'])}FLOP, less what stages share"]


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
def bar(err: "Console") -> "Generator[Callable[[Progress], None]]":
    """Progress on stderr: a bar in a terminal, else a line from time to time."""
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
    from rich.progress import Progress as Shown
    from rich.table import Column

    last = [0]
    columns = (
        TextColumn("{task.description}", table_column=Column(max_width=err.width // 3, no_wrap=True)),
        BarColumn(30 if err.width >= 80 else 10),
        MofNCompleteColumn(),
        TextColumn("{task.fields[left]}"),
    )
    with Shown(*columns, console=err, transient=True, disable=not err.is_terminal) as shown:
        task = shown.add_task("", total=None, left="")

        def show(at: "Progress") -> None:
            left = "" if at.left is None else f"{duration(at.left)} left"
            bad = f", {at.failed} failed" if at.failed else ""
            shown.update(task, description=at.label, completed=at.done, total=at.total, left=left + bad)
            if not err.is_terminal and (at.done == at.total or at.done * 10 // at.total > last[0]):
                last[0] = at.done * 10 // at.total
                err.print(f"{at.done} of {at.total} rows{bad}, {left}")

        yield show


def report(
    folder: Annotated[Path, typer.Argument(help="The folder of a sweep.")],
    out: Annotated[Path | None, typer.Option("--out", help="The page; FOLDER/report.html unless said.")] = None,
    title: Annotated[str | None, typer.Option("--title", help="Its heading; the folder's name unless said.")] = None,
    link: Annotated[bool, typer.Option("--link", help="Refer to the pictures instead of embedding them.")] = False,
    table: Annotated[bool, typer.Option("--csv", help="Also the rows as CSV, beside the page.")] = False,
    parquet: Annotated[bool, typer.Option("--parquet", help="Also the rows as Parquet.")] = False,
    plots: Annotated[bool, typer.Option("--plots", help="Also quality against speed-up as PNG and SVG.")] = False,
    metric: Annotated[str | None, typer.Option("--metric", help="The quality of the plots.")] = None,
    as_json: Json = False,
) -> None:
    """Make one HTML page of a sweep: trade-off, categories, table, pictures side by side, the worst first."""
    from mrflow.records.files import check_writable

    with console() as err:
        from mrflow.sweep.plots import write_plots
        from mrflow.sweep.report import write_report
        from mrflow.sweep.store import Store
        from mrflow.sweep.summary import load, summarise
        from mrflow.sweep.tables import write_csv, write_parquet

        refuse(metric is not None and not plots, "--metric", "without --plots")
        rows, reference = load(folder)
        target = out or folder / "report.html"
        if target.suffix.lower() not in (".html", ".htm"):
            raise PlanError(f"--out must end in .html, got {target.name!r}")
        if link and target.resolve().parent != folder.resolve():
            raise PlanError(f"with --link the page must lie in {folder}, beside the pictures: leave out --out")
        check_writable(target)
        write_report(folder, target, title=title, link=link, loaded=(rows, reference))
        made = [target]
        if table:
            made.append(target.with_suffix(".csv"))
            write_csv(rows, made[-1])
        if parquet:
            made.append(target.with_suffix(".parquet"))
            write_parquet(rows, made[-1])
        if plots:
            made += write_plots(
                summarise(rows, reference, Store(folder).manifest()), target.with_suffix(""), metric=metric
            )
        bad = sum(not row.done for row in rows)
        err.print(f"{len(rows)} rows, {bad} failed; {target.stat().st_size / 1e6:.1f} MB")
        if as_json:
            typer.echo(json.dumps({"paths": [str(path) for path in made], "rows": len(rows), "failed": bad}))
        else:
            for path in made:
                typer.echo(path)


def tune(
    file: Annotated[Path | None, typer.Argument(help="A file that defines `tune = mf.Tune(...)`.")] = None,
    floor: Annotated[float | None, typer.Option("--floor", help="What is good enough; the file's, or 0.9.")] = None,
    trials: Annotated[int, typer.Option("--trials", help="Chains to consider.")] = 40,
    captions: Annotated[
        int | None, typer.Option("--captions", help="Held-out captions, where no file is given (default: 24).")
    ] = None,
    out: Annotated[Path, typer.Option("--out", help="The folder of its rows, report and front.py.")] = Path("tuned"),
    model: Annotated[str | None, typer.Option("--model", help="Instead of the model that the file names.")] = None,
    batch: Annotated[int, typer.Option("--batch", help="Pictures of one chain made together.")] = 4,
    seed: Annotated[int, typer.Option("--seed", help="Of the search.")] = 0,
    as_json: Json = False,
    *,
    options: ModelOptions,
) -> None:
    """Find the cheapest chains that are good enough: steps, schedule, solver, sigma, sizes, upscaler, guidance."""
    from dataclasses import replace

    with console() as err:
        from mrflow.scenes import FULL, held_out_captions
        from mrflow.sweep import SceneScore
        from mrflow.sweep.report import write_report
        from mrflow.sweep.tune import Tried, Tune, lines, outcome, write_front
        from mrflow.sweep.tune import tune as search

        check_whole("--trials", trials, 1, 100_000)
        refuse(captions is not None and file is not None, "--captions", f"beside {file}, which says its prompts")
        if file is None:
            check_whole("--captions", 24 if captions is None else captions, 1, 10_000)
            texts = list(dict.fromkeys(held_out_captions(FULL, 24 if captions is None else captions)))
            asked = Tune(texts, [SceneScore()], "score", 0.9)
        else:
            found = load_file(file).get("tune")
            if not isinstance(found, Tune):
                raise PlanError(f"{file} defines no tune = mf.Tune(prompts, metrics, metric, floor)")
            asked = found
        if floor is not None:
            asked = replace(asked, floor=floor)
        backbone = options.load(model or asked.model)
        counted = [0]
        with status(err) as drawing:

            def drawn(label: str, done: int, total: int) -> None:
                drawing(f"{counted[0] + 1} of {trials + 1}: picture {done + 1} of {total}, {label}")

            def show(number: int, one: Tried) -> None:
                counted[0] = number
                found = str(one.why if one.quality is None else f"{asked.metric} {one.quality}")
                early = f", {one.why}" if one.why and one.quality is not None else ""
                whose = "reference, " if number == 1 else ""
                err.print(f"{number:>4} of {trials + 1}  {found}{early}  ({whose}{one.label})")

            result = search(
                asked, backbone, out, trials=trials, batch=batch, seed=seed, on_tried=show, on_drawing=drawn
            )
        write_front(result, asked, out / "front.py")
        write_report(out, out / "report.html", title=f"tuned for {asked.metric} {asked.bound} {asked.floor:g}")
        err.print("\n".join(lines(result, asked)))
        made = [out / "front.py", out / "report.html"]
        if as_json:
            typer.echo(json.dumps({"paths": [str(path) for path in made], **outcome(result, asked)}))
        else:
            for path in made:
                typer.echo(path)


@contextmanager
def status(err: "Console") -> "Generator[Callable[[str], None]]":
    """A line that is written over, on stderr where that is a terminal; nothing elsewhere."""
    from rich.text import Text

    if not err.is_terminal:
        yield lambda text: None
        return
    with err.status("") as shown:
        yield lambda text: shown.update(Text(printable(text), no_wrap=True, overflow="ellipsis"))

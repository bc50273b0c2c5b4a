"""The verbs that draw, generate and run: checks, runs, saves as it goes, says what it cost."""

import json
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, TextColumn
from torch import Tensor

from mrflow.backbone import Backbone
from mrflow.cli.chains import build
from mrflow.cli.display import duration, progress_bar, width
from mrflow.cli.options import ChainOptions, DrawOptions, refuse
from mrflow.cli.parsing import (
    free_path,
    is_embedded,
    load_chain,
    load_model,
    pairs_of,
    save_free,
    staying,
    upscaler,
    without_upscaler,
)
from mrflow.cli.verbs import GenerateOptions, RunOptions
from mrflow.display import sheet
from mrflow.errors import PlanError
from mrflow.model_info import ModelInfo
from mrflow.records.pictures import batch_paths, png, read_image, slug
from mrflow.result import Result, make_record, result_files
from mrflow.runner import Event, Listener, StageBegan, StageEnded, Stepped
from mrflow.runner import run as execute
from mrflow.spec import Pixels
from mrflow.stage import AnyChain, Plan, plan

TOGETHER = 8  # pictures of several prompts that are drawn at once


@dataclass(frozen=True)
class Drawing:
    """What is known before any weights are read: the chains with a plan for each size of a group, and the file.

    `other` is drawn too and compared.
    """

    chain: "AnyChain"
    plans: Mapping[int, Plan]
    other: "AnyChain | None"
    others: Mapping[int, Plan]
    target: Path
    endings: Sequence[str]


def generate(err: Console, asked: GenerateOptions) -> None:
    """Draw by a recipe, and natively beside it if that was asked."""
    chain, compare, model = asked.chain, asked.compare, asked.model
    if compare not in (None, "native"):
        raise PlanError(f"--compare takes native, got {compare!r}")
    if chain.sr in (None, "own") and chain.name in ("paper", "official") and not is_embedded(model):
        raise without_upscaler(model)
    pairs, net = pairs_of(asked.prompts, asked.drawing), upscaler(chain.sr) or chain.sr
    last = chain.ladder.split(",")[-1] if chain.ladder else chain.size
    native = ChainOptions(recipe="native", size=last)

    def make(info: ModelInfo) -> tuple[AnyChain, AnyChain | None]:
        beside = build(native.name, info, **native.words) if compare else None
        return build(chain.name, info, sr=net, **chain.words), beside

    draw(err, make, partial(load_model, model, asked.loading), pairs, asked.drawing)


def run_file(err: Console, asked: RunOptions) -> None:
    """Draw by a chain of the user's own."""
    pairs, own = pairs_of(asked.prompts, asked.drawing), load_chain(asked.chain)
    pixels = None if asked.start is None else read_image(asked.start)
    load = partial(load_model, asked.model, asked.loading)
    draw(err, lambda info: (own, None), load, pairs, asked.drawing, start=pixels)


def draw(
    err: Console,
    make: Callable[[ModelInfo], tuple[AnyChain, AnyChain | None]],
    load: Callable[[Callable[[ModelInfo], object]], Backbone],
    pairs: Sequence[tuple[str, int]],
    options: DrawOptions,
    *,
    start: Tensor | None = None,
    name: Path | None = None,
) -> None:
    """Check, load, run, save, report. `pairs` are prompts and seeds, those of one prompt in a row.

    `make` gives the chain for a model, and another one to compare with, if any. `load` reads the model and hands its
    facts on before it reads weights (`mrflow.load(on_facts=)`): all is planned there, once. `name` is the default of
    --out.

    Raises:
        PlanError: an option cannot be, or does nothing with this chain.
    """
    count = len(pairs)
    each = sum(text == pairs[0][0] for text, _ in pairs[: pairs.count(pairs[0]) and count])
    size = max(TOGETHER // each, 1) * each
    groups = [pairs[i : i + size] for i in range(0, count, size)]
    default = name or Path(f"{slug(pairs[0][0])}-seed{pairs[0][1]}.png")
    found: list[Drawing] = []

    def plans(chain: AnyChain | None, info: ModelInfo) -> dict[int, Plan]:
        starts = {len(group): None if start is None else Pixels(len(group), *start.shape[-2:]) for group in groups}
        return {} if chain is None else {n: plan(chain, info, batch=n, start=spec) for n, spec in starts.items()}

    def check(info: ModelInfo) -> None:
        chain, other = make(info)
        planned = plans(chain, info)
        first = planned[len(groups[0])]
        refuse(
            options.negative is not None and not first.work.negative, "--negative",
            f"with this chain: {info.name} draws without a second branch (--guidance 'CFG(4)' has one)",
        )  # fmt: skip
        endings = [f"-{stage}" for stage in sheet.stage_names(chain)] if options.stages else []
        endings += ["-compare"] if other is not None else []
        target = free_path(options.out, default, count, options.force, endings)
        found.append(Drawing(chain, planned, other, plans(other, info), target, endings))

    backbone = load(check)
    if not found:  # a family of the user's own, which hands on no facts
        check(backbone.info)
    (ready,) = found
    if ready.other is not None:
        sheet.warm_up((ready.chain, ready.other), backbone, len(groups[0]))

    def run(one: AnyChain, planned: Mapping[int, Plan], keep: Callable[[Result, int], None] | None = None) -> Result:
        made: list[Result] = []
        with progress(err, planned[len(groups[0])], [len(group) for group in groups]) as listen:
            for number, group in enumerate(groups):
                first = None if start is None else start.expand(len(group), -1, -1, -1)
                with staying():
                    result = execute(
                        one, backbone, [text for text, _ in group], seed=[seed for _, seed in group], start=first,
                        negative=options.negative, keep=options.stages and one is ready.chain, on_event=listen,
                        planned=planned[len(group)],
                    )  # fmt: skip
                made.append(result)
                if keep is not None:
                    keep(result, number)
        return _join(made)

    paths: list[Path] = []
    records: list[dict[str, object]] = []

    def keep(result: Result, number: int) -> None:
        def files(path: Path) -> dict[Path, bytes]:
            own = batch_paths(path, count)[number * size :][: len(result.seeds)]
            made = result_files(result, path, own)
            for stage, images in sheet.stage_pictures(result) if options.stages else ():
                made |= {p.with_stem(f"{p.stem}-{stage}"): png(i) for p, i in zip(own, images, strict=True)}
            return made

        # Later groups keep to the first one's name.
        fixed = options.out or (None if len(groups) == 1 else ready.target)
        paths.extend(save_free(files, ready.target, fixed, default, count, options.force, ready.endings))
        if options.as_json:
            records.extend(make_record(result, i) for i in range(len(result.seeds)))

    result = run(ready.chain, ready.plans, keep)
    err.print(sheet.stage_table(result, width(err)))
    speedup = None
    if ready.other is not None:
        native = run(ready.other, ready.others)
        err.print(sheet.stage_table(native, width(err)))
        speedup = native.seconds / result.seconds
        side = png(sheet.draw_comparison(result, native))
        beside = ready.target.with_stem(f"{ready.target.stem}-compare")
        paths += save_free(lambda path: {path: side}, beside, options.out, beside, 1, options.force)
        err.print(f"staged {result.seconds:.2f} s, native {native.seconds:.2f} s: {speedup:.1f}x faster")
    if options.as_json:
        typer.echo(json.dumps({"paths": [str(p) for p in paths], "speedup": speedup, "records": records}))
    else:
        for path in paths:
            typer.echo(path)


def _join(results: Sequence[Result]) -> Result:
    """Results of one chain and model as one: pictures in their order, seconds and operations added up."""
    first = results[0]
    if len(results) == 1:
        return first
    total = sum(len(each.seeds) for each in results)

    def whole(spec: Any) -> Any:  # noqa: ANN401
        return replace(spec, batch=total)

    stages = tuple(
        replace(
            rows[0], spec=whole(rows[0].spec), data=None, seconds=sum(row.seconds for row in rows),
            flops=sum(row.flops for row in rows), notes=tuple(dict.fromkeys(n for row in rows for n in row.notes)),
        )
        for rows in zip(*(each.stages for each in results), strict=True)
    )  # fmt: skip
    return replace(
        first, data=torch.cat([each.data for each in results]), spec=whole(first.spec), stages=stages,
        prompts=tuple(p for each in results for p in each.prompts),
        seeds=tuple(s for each in results for s in each.seeds),
        condition_seconds=sum(each.condition_seconds for each in results),
        peak_bytes=max(each.peak_bytes for each in results),
    )  # fmt: skip


@contextmanager
def progress(err: Console, planned: Plan, groups: Sequence[int] = (1,)) -> Generator[Listener]:
    """A listener that shows stage, steps, rate and time left on stderr, and nothing where that is no terminal.

    `groups` are how many pictures each run of the chain makes. The time left is what the floating-point operations of
    the plan leave to do, at the speed of those that are done.
    """
    wide = err.width >= 80
    columns = [
        TextColumn("{task.description}", markup=False),
        BarColumn(30 if wide else 10),
        TextColumn("{task.fields[note]}", markup=False),
    ]
    work = [max(row.work.flops, 1.0) for row in planned.rows]
    began, at, done, total = time.monotonic(), time.monotonic(), 0, sum(groups)

    def left(index: int, share: float) -> str:
        through = done + (sum(work[:index]) + work[index] * share) / sum(work) * groups[min(group, len(groups) - 1)]
        seconds = time.monotonic() - began
        return f", {duration(seconds / through * (total - through))} left" if through and seconds > 1 else ""

    group = 0
    with progress_bar(err, *columns) as bar:
        task = bar.add_task("", total=1, note="")

        def listen(event: Event) -> None:
            nonlocal at, done, group
            if isinstance(event, StageBegan):
                at = time.monotonic()
                which = "" if len(groups) == 1 else f"{done + 1}-{done + groups[group]} of {total} "
                note = f"stage {event.index + 1} of {event.count}{left(event.index, 0)}"
                bar.reset(task, description=f"{which}{event.name}", total=1, note=note)
            elif isinstance(event, Stepped):
                step = event.step
                note = f"{step.index}/{step.steps} {rate(step.index, time.monotonic() - at)}"
                note += left(event.index, step.index / step.steps)
                bar.update(task, completed=step.index, total=step.steps, note=note)
            elif isinstance(event, StageEnded):
                bar.update(task, completed=1, total=1)
                if event.index + 1 == len(work):
                    done, group = done + groups[group], group + 1

        yield listen


def rate(steps: int, seconds: float) -> str:
    """Steps a second, or seconds a step."""
    if not seconds:
        return ""
    each = seconds / steps
    return f"{1 / each:.1f} steps/s" if each < 1 else f"{each:.1f} s/step"

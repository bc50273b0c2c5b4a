"""The verb tune: the cheapest chains that are good enough."""

import json
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import replace

import typer
from rich.console import Console
from rich.text import Text

from mrflow._checks import check_whole
from mrflow.cli.display import width, wrap
from mrflow.cli.options import refuse
from mrflow.cli.parsing import load_file, load_model
from mrflow.cli.verbs import TuneOptions
from mrflow.display.notes import printable
from mrflow.errors import PlanError
from mrflow.scenes import FULL, held_out_captions
from mrflow.sweep import SceneScore
from mrflow.sweep.report import write_report
from mrflow.sweep.tune import Trial, Tune, lines, outcome, tune, write_front


def tune_chains(err: Console, asked: TuneOptions) -> None:
    """Search, and write what was found."""
    file, captions, trials, out = asked.file, asked.captions, asked.trials, asked.out
    check_whole("--trials", trials, 1, 100_000)
    refuse(captions is not None and file is not None, "--captions", f"beside {file}, which says its prompts")
    if file is None:
        check_whole("--captions", 24 if captions is None else captions, 1, 10_000)
        texts = list(dict.fromkeys(held_out_captions(FULL, 24 if captions is None else captions)))
        wanted = Tune(texts, [SceneScore()], "score", 0.9)
    else:
        found = load_file(file).get("tune")
        if not isinstance(found, Tune):
            raise PlanError(f"{file} defines no tune = mf.Tune(prompts, metrics, metric, floor)")
        wanted = found
    if asked.floor is not None:
        wanted = replace(wanted, floor=asked.floor)
    backbone = load_model(asked.model or wanted.model, asked.loading)
    counted, out = [0], out.absolute()  # metrics may change to another folder
    with status(err) as drawing:

        def drawn(label: str, done: int, total: int) -> None:
            drawing(f"{counted[0] + 1} of {trials + 1}: picture {done + 1} of {total}, {label}")

        def show(number: int, one: Trial) -> None:
            counted[0] = number
            found = str(one.why if one.quality is None else f"{wanted.metric} {one.quality}")
            early = f", {one.why}" if one.why and one.quality is not None else ""
            whose = "reference, " if number == 1 else ""
            line = f"{number:>4} of {trials + 1}  {found}{early}  ({whose}{one.label})"
            err.print("\n".join(wrap([line], width(err))))

        result = tune(
            wanted, backbone, out, trials=trials, batch=asked.batch, seed=asked.seed, on_tried=show, on_drawing=drawn
        )
    write_front(result, wanted, out / "front.py")
    write_report(out, out / "report.html", title=f"tuned for {wanted.metric} {wanted.bound} {wanted.floor:g}")
    err.print("\n".join(wrap(lines(result, wanted), width(err))))
    made = [asked.out / "front.py", asked.out / "report.html"]
    if asked.as_json:
        typer.echo(json.dumps({"paths": [str(path) for path in made], **outcome(result, wanted)}))
    else:
        for path in made:
            typer.echo(path)


@contextmanager
def status(err: Console) -> Generator[Callable[[str], None]]:
    """A line that is written over, on stderr where that is a terminal; nothing elsewhere."""
    if not err.is_terminal:
        yield lambda text: None
        return
    with err.status("") as shown:
        yield lambda text: shown.update(Text(printable(text), no_wrap=True, overflow="ellipsis"))

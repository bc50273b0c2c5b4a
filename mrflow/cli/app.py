"""The command line: thin verbs over the library. For people on stderr, results on stdout, exit codes as in `errors`.

What a verb takes is declared in `verbs`. What it does stands in the file named beside it below, which is loaded when it
runs: its imports stand at its top, and help and completion load none of them.
"""

import re
import sys
from collections.abc import Callable
from functools import wraps
from io import TextIOWrapper
from typing import Annotated, Any, ParamSpec, TypeVar

import typer
from typer.core import TyperGroup

import mrflow
from mrflow.cli import verbs
from mrflow.cli.display import console
from mrflow.cli.options import command
from mrflow.display.notes import printable

HELP = "Rectified-flow pictures in stages: sample low, upscale, reinject noise, refine."
FIRST = """Example: mrflow generate "a big red circle at the left". Options of a command: mrflow generate --help."""
HELP_NAMES = {"help_option_names": ["-h", "--help"]}


P = ParamSpec("P")
T = TypeVar("T")


def _harmless(read: Callable[P, T]) -> Callable[P, T]:
    """What is wrong with the words that are read is said without their control characters."""

    @wraps(read)
    def reading(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return read(*args, **kwargs)
        except Exception as error:
            for name in ("message", "option_name"):
                if isinstance(said := getattr(error, name, None), str):
                    setattr(error, name, printable(said))
            raise

    return reading


class Verbs(TyperGroup):
    """All verbs."""

    make_context = _harmless(TyperGroup.make_context)
    invoke = _harmless(TyperGroup.invoke)  # type: ignore[arg-type]  # of a group, where mypy wants any command


app = typer.Typer(
    cls=Verbs,
    help=HELP,
    epilog=FIRST,
    no_args_is_help=True,
    context_settings=HELP_NAMES,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"mrflow {mrflow.__version__}")
        raise typer.Exit


@app.callback(help=HELP)
def common(
    version: Annotated[
        bool, typer.Option("--version", help="Say the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """What is asked before a verb."""


class SweepGroup(TyperGroup):
    """`mrflow sweep FILE` is `mrflow sweep run FILE`: what names no other verb is a file or an option of that one."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:  # noqa: ANN401  # typer's own, under changing names
        """Put the verb that is left out."""
        return super().parse_args(ctx, args if args and args[0] in self.commands else ["run", *args])


def _brief(text: str | None) -> str:
    """What a verb does, up to its first comma, colon or semicolon: as much as a list of verbs has room for."""
    return re.split("[,.:;]", text or "", maxsplit=1)[0] + "."


SWEEPS, NETWORKS = (
    "Draw chains x prompts x draws into a folder; export its rows.",
    "Give networks short names, for --sr.",
)
sweeping = typer.Typer(help=SWEEPS, short_help=_brief(SWEEPS), cls=SweepGroup, context_settings=HELP_NAMES)
networks = typer.Typer(help=NETWORKS, short_help=_brief(NETWORKS), no_args_is_help=True)
app.add_typer(sweeping, name="sweep")
app.add_typer(networks, name="sr")

VERBS: tuple[tuple[typer.Typer, str, type[Any], str], ...] = (
    (app, "generate", verbs.GenerateOptions, "drawing:generate"),
    (app, "run", verbs.RunOptions, "drawing:run_file"),
    (app, "refine", verbs.RefineOptions, "refine:refine"),
    (app, "plan", verbs.PlanOptions, "plan:plan_chain"),
    (sweeping, "run", verbs.SweepOptions, "sweeps:sweep"),
    (sweeping, "export", verbs.ExportOptions, "export:export"),
    (app, "report", verbs.ReportOptions, "report:report_sweep"),
    (app, "tune", verbs.TuneOptions, "tune:tune_chains"),
    (app, "inspect", verbs.InspectOptions, "records:inspect"),
    (app, "replay", verbs.ReplayOptions, "records:replay_picture"),
    (networks, "add", verbs.AddOptions, "networks:add_network"),
    (networks, "list", verbs.ListOptions, "networks:list_networks"),
)
for group, name, options, does in VERBS:
    group.command(name, short_help=_brief(options.__doc__))(command(options, does))


def run_app() -> None:
    """The entry point."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # a name on disk need not be text
            stream.reconfigure(errors="surrogateescape" if stream is sys.stdout else "backslashreplace")
    with console():
        app()

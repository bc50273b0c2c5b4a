"""`mrflow sweep export`: the rows of a sweep for other programs; and the group that keeps `mrflow sweep FILE` short."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from mrflow.cli.display import console
from mrflow.cli.options import Json, with_options
from mrflow.cli.sweeps import sweep
from mrflow.errors import PlanError

KINDS = {"csv": ".csv", "parquet": ".parquet", "hf": ""}


class SweepGroup(TyperGroup):
    """`mrflow sweep FILE` is `mrflow sweep run FILE`: what names no other verb is a file or an option of that one."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:  # noqa: ANN401  # typer's own, under changing names
        """Put the verb that is left out."""
        return super().parse_args(ctx, args if args and args[0] in self.commands else ["run", *args])


sweep_verbs = typer.Typer(
    help="Draw chains x prompts x draws into a folder; export its rows.",
    cls=SweepGroup,
    context_settings={"help_option_names": ["-h", "--help"]},
)
sweep_verbs.command("run")(with_options(sweep))


@sweep_verbs.command()
@with_options
def export(
    folder: Annotated[Path, typer.Argument(help="The folder of a sweep.")],
    to: Annotated[
        str, typer.Option("--to", help="csv, parquet, or hf: a folder that Hugging Face's datasets library loads.")
    ] = "csv",
    out: Annotated[
        Path | None, typer.Option("--out", help="File or new folder (default: FOLDER-export with the kind's ending).")
    ] = None,
    as_json: Json = False,
) -> None:
    """Write the rows of a sweep as CSV, Parquet or a dataset folder with its pictures."""
    with console() as err:
        from mrflow.records.files import check_writable
        from mrflow.sweep.datasets import write_dataset
        from mrflow.sweep.summary import load
        from mrflow.sweep.tables import write_csv, write_parquet

        if to not in KINDS:
            raise PlanError(f"--to takes {', '.join(KINDS)}, got {to!r}")
        name = folder.resolve().name
        target = out or folder.resolve().parent / f"{name}-export{KINDS[to]}"
        rows, _ = load(folder)
        if to == "hf":
            count = write_dataset(rows, folder, target)
        else:
            check_writable(target)
            count = len(rows)
            (write_csv if to == "csv" else write_parquet)(rows, target)
        err.print(f"{count} rows")
        typer.echo(json.dumps({"path": str(target), "rows": count}) if as_json else target)

"""What each verb of the command line takes, and its help. Nothing heavy is imported here."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from mrflow.cli.options import (
    SR_WORDS,
    ChainOptions,
    DrawOptions,
    FactOptions,
    Json,
    ModelName,
    ModelOptions,
    SlotOptions,
)

Prompts = Annotated[
    list[str],
    typer.Argument(help="What to draw; several make a batch. @FILE takes the lines of a file, - those of stdin."),
]
StartPicture = Annotated[Path | None, typer.Option("--start", help="The picture that the chain begins with.")]
Batch = Annotated[int, typer.Option("--batch", help="Pictures of one chain made together.")]
OtherModel = Annotated[str | None, typer.Option("--model", help="Instead of the model that the file names.")]
SweepFolder = Annotated[Path, typer.Argument(help="The folder of a sweep.")]


@dataclass(frozen=True, kw_only=True)
class GenerateOptions:
    """Draw pictures, and say what each stage cost."""

    prompts: Prompts
    chain: ChainOptions
    drawing: DrawOptions
    loading: ModelOptions
    model: ModelName = "pocket"
    compare: Annotated[
        str | None, typer.Option("--compare", help="native: one labelled sheet beside native sampling.")
    ] = None


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Run a chain from a Python file."""

    chain: Annotated[str, typer.Argument(help="A chain of your own: file.py:name.")]
    prompts: Prompts
    drawing: DrawOptions
    loading: ModelOptions
    model: ModelName = "pocket"
    start: StartPicture = None


@dataclass(frozen=True, kw_only=True)
class RefineOptions:
    """Enlarge a picture that exists: super-resolve, reinject a little noise, refine."""

    photo: Annotated[Path, typer.Argument(help="A picture: PNG, JPEG or WebP.")]
    slots: SlotOptions
    drawing: DrawOptions
    loading: ModelOptions
    prompt: Annotated[str, typer.Option("--prompt", help="What it shows; it guides the refinement.")] = ""
    scale: Annotated[float, typer.Option("--scale", help="How many times larger; 1.5 works too.")] = 2.0
    sigma: Annotated[
        float | None, typer.Option("--sigma", help="Noise level that is injected, above 0 to 1 (default: 0.16).")
    ] = None
    crop: Annotated[bool, typer.Option("--crop", help="Take the middle where the sides do not fit the model.")] = False
    model: ModelName = "pocket"
    refine_steps: Annotated[
        int | None, typer.Option("--refine-steps", help="Steps of the refinement (default: 1).")
    ] = None
    sr: Annotated[str | None, typer.Option("--sr", help=f"The upscaler (default: the model's own): {SR_WORDS}.")] = None
    sr_only: Annotated[bool, typer.Option("--sr-only", help="Enlarge by --sr alone: no model, no noise.")] = False


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """Check a chain and count its work, without weights."""

    own: ChainOptions
    facts: FactOptions
    chain: Annotated[str | None, typer.Argument(help="file.py:name (default: a recipe).")] = None
    model: ModelName = "pocket"
    start: StartPicture = None
    batch: Annotated[int, typer.Option("--batch", help="Pictures that are made together.")] = 1
    as_json: Json = False


@dataclass(frozen=True, kw_only=True)
class SweepOptions:
    """Draw chains x prompts x draws into a folder of rows and pictures; run it again after any interruption.

    mrflow sweep export FOLDER writes the rows as CSV, Parquet or a dataset for Hugging Face.
    """

    file: Annotated[Path, typer.Argument(help="A Python file that defines `sweep = mf.Sweep(...)`, or file.py:name.")]
    out: Annotated[Path | None, typer.Option("--out", help="The folder (default: named after the file).")] = None
    model: OtherModel = None
    batch: Batch = 4
    shard: Annotated[str, typer.Option("--shard", help="i/n: this process makes every n-th prompt and draw.")] = "0/1"
    retry: Annotated[bool, typer.Option("--retry", help="Make failed rows again.")] = False
    row_timeout: Annotated[
        float | None, typer.Option("--row-timeout", help="Seconds that a row may take before it fails (default: none).")
    ] = None
    dry: Annotated[bool, typer.Option("--plan", help="Plan every chain, count rows and work, make nothing.")] = False
    engine: Annotated[str, typer.Option("--engine", help="local, or ray: a pool of workers on a Ray cluster.")] = (
        "local"
    )
    workers: Annotated[
        int | None, typer.Option("--workers", help="ray: how many workers, a model each (default: 2).")
    ] = None
    gpus: Annotated[float | None, typer.Option("--gpus", help="ray: GPUs of each worker (default: 0).")] = None
    address: Annotated[
        str | None, typer.Option("--address", help="ray: a running cluster (default: one on this machine).")
    ] = None
    log: Annotated[
        list[str] | None,
        typer.Option("--log", help="Also to tensorboard:FOLDER, wandb[:PROJECT], trackio[:PROJECT]."),
    ] = None
    as_json: Json = False
    loading: ModelOptions


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """Write the rows of a sweep as CSV, Parquet or a dataset folder with its pictures."""

    folder: SweepFolder
    to: Annotated[
        str, typer.Option("--to", help="csv, parquet, or hf: a folder that Hugging Face's datasets library loads.")
    ] = "csv"
    out: Annotated[
        Path | None, typer.Option("--out", help="File or new folder (default: FOLDER-export with the kind's ending).")
    ] = None
    as_json: Json = False


@dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """Make one HTML page of a sweep: trade-off, categories, table, pictures side by side, the worst first."""

    folder: SweepFolder
    out: Annotated[Path | None, typer.Option("--out", help="The page (default: FOLDER/report.html).")] = None
    title: Annotated[str | None, typer.Option("--title", help="Its heading (default: the folder's name).")] = None
    link: Annotated[bool, typer.Option("--link", help="Refer to the pictures instead of embedding them.")] = False
    table: Annotated[bool, typer.Option("--csv", help="Also the rows as CSV, beside the page.")] = False
    parquet: Annotated[bool, typer.Option("--parquet", help="Also the rows as Parquet.")] = False
    plots: Annotated[bool, typer.Option("--plots", help="Also quality against speed-up as PNG and SVG.")] = False
    metric: Annotated[str | None, typer.Option("--metric", help="The quality of the plots.")] = None
    as_json: Json = False


@dataclass(frozen=True, kw_only=True)
class TuneOptions:
    """Find the cheapest chains that are good enough: steps, schedule, solver, sigma, sizes, upscaler, guidance."""

    file: Annotated[Path | None, typer.Argument(help="A file that defines `tune = mf.Tune(...)`.")] = None
    floor: Annotated[float | None, typer.Option("--floor", help="What is good enough; the file's, or 0.9.")] = None
    trials: Annotated[int, typer.Option("--trials", help="Chains to consider.")] = 40
    captions: Annotated[
        int | None, typer.Option("--captions", help="Held-out captions, where no file is given (default: 24).")
    ] = None
    out: Annotated[Path, typer.Option("--out", help="The folder of its rows, report and front.py.")] = Path("tuned")
    model: OtherModel = None
    batch: Batch = 4
    seed: Annotated[int, typer.Option("--seed", help="Of the search.")] = 0
    as_json: Json = False
    loading: ModelOptions


@dataclass(frozen=True, kw_only=True)
class InspectOptions:
    """Say what a file is: how a picture was made, what a checkpoint holds."""

    file: Annotated[Path, typer.Argument(help="A PNG that mrflow made, a checkpoint, a sweep's folder, or pocket.")]
    as_json: Json = False
    verify: Annotated[
        bool, typer.Option("--verify", help="Read a model's files whole and compare them with what is known of them.")
    ] = False


@dataclass(frozen=True, kw_only=True)
class ReplayOptions:
    """Reproduce a picture from its own record."""

    picture: Annotated[Path, typer.Argument(help="A PNG that mrflow made.")]
    loading: ModelOptions
    out: Annotated[
        Path | None, typer.Option("--out", help="File to write (default: the picture's name with -replay).")
    ] = None
    force: Annotated[bool, typer.Option("--force", help="Overwrite a file that exists.")] = False
    check: Annotated[
        bool, typer.Option("--check", help="Compare with the picture's own pixels; write a file only with --out.")
    ] = False
    own: Annotated[
        list[Path] | None, typer.Option("--with", help="A Python file with stages of your own it used; repeatable.")
    ] = None
    model: Annotated[str | None, typer.Option("--model", help="The weights, where the model is not embedded.")] = None
    start: Annotated[Path | None, typer.Option("--start", help="The picture it began with, if it did.")] = None
    file: Annotated[
        list[Path] | None,
        typer.Option("--file", help="The file of a network or adapter it used, or its folder."),
    ] = None
    as_json: Json = False


@dataclass(frozen=True, kw_only=True)
class AddOptions:
    """Keep a network's file under a short name, so that --sr realesrgan-x4, anime or video finds it."""

    file: Annotated[Path, typer.Argument(help="A checkpoint that you have: .pth, .safetensors or ncnn's .param.")]
    name: Annotated[
        str | None, typer.Option("--name", help="Which it is (default: recognised by the file's name).")
    ] = None
    as_json: Json = False


@dataclass(frozen=True, kw_only=True)
class ListOptions:
    """List the short names, and which of their networks are here."""

    as_json: Json = False

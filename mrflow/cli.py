"""The command line: thin verbs over the library. For people on stderr, results on stdout, exit codes as in `errors`.

Long because typer reads every option of every verb from its signature.
"""

import json
import logging
import signal
import sys
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from mrflow.errors import MrflowError, PlanError

if TYPE_CHECKING:
    from rich.console import Console

    from mrflow.backbone import Backbone
    from mrflow.runner import Event, Listener
    from mrflow.spec import ModelInfo, Pixels, Start
    from mrflow.stage import AnyChain, Chain
    from mrflow.upscalers import Upscaler

app = typer.Typer(
    help="Rectified-flow pictures in stages: sample low, upscale, reinject noise, refine.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Prompts = Annotated[list[str], typer.Argument(help="What to draw; several prompts make a batch.")]
ModelName = Annotated[
    str, typer.Option("--model", help="pocket, a hub id (owner/name), a folder, or a file; plan: also flux1-dev, ...")
]
Dtype = Annotated[str | None, typer.Option("--dtype", help="float32, bfloat16 or float16; the files' own unless said.")]
OffloadMode = Annotated[
    str, typer.Option("--offload", help="none, phase or block: weights leave the device when idle.")
]
Storage = Annotated[str | None, typer.Option("--storage", help="fp8: keep the blocks' matrices in 8 bits.")]
Vae = Annotated[str | None, typer.Option("--vae", help="The autoencoder, where it is not beside the model.")]
Text = Annotated[str | None, typer.Option("--text", help="Text encoders and tokenizers, where not beside the model.")]
Compile = Annotated[bool, typer.Option("--compile", help="Compile each block with torch.compile.")]
RecipeName = Annotated[str, typer.Option("--recipe", help="paper, official or native.")]
Size = Annotated[str | None, typer.Option("--size", help="HEIGHTxWIDTH in pixels; the model's own unless said.")]
Low = Annotated[str | None, typer.Option("--low", help="HEIGHTxWIDTH of the low-resolution stage.")]
Steps = Annotated[int | None, typer.Option("--steps", help="Sampling steps: 12 staged, 50 native unless said.")]
RefineSteps = Annotated[int, typer.Option("--refine-steps", help="Steps of the refinement.")]
Sigma = Annotated[float, typer.Option("--sigma", help="Noise level that is reinjected, above 0 to 1.")]
Sr = Annotated[str | None, typer.Option("--sr", help="own, lanczos, bicubic, bilinear or nearest.")]
Seed = Annotated[int, typer.Option("--seed", help="Seed of the first picture.")]
Batch = Annotated[int, typer.Option("--batch", help="Pictures of each prompt, seeds counting up.")]
Negative = Annotated[str | None, typer.Option("--negative", help="Negative prompt; the model's own unless said.")]
Out = Annotated[Path | None, typer.Option("--out", help="File to write; named after the prompt unless said.")]
Force = Annotated[bool, typer.Option("--force", help="Overwrite files that exist.")]
KeepStages = Annotated[bool, typer.Option("--stages", help="Also save every stage's picture.")]
DeviceName = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:N or mps.")]
Json = Annotated[bool, typer.Option("--json", help="Results as JSON on stdout.")]


@app.command()
def generate(
    prompts: Prompts,
    model: ModelName = "pocket",
    recipe: RecipeName = "paper",
    size: Size = None,
    low: Low = None,
    steps: Steps = None,
    refine_steps: RefineSteps = 1,
    sigma: Sigma = 0.12,
    sr: Sr = None,
    seed: Seed = 0,
    batch: Batch = 1,
    negative: Negative = None,
    out: Out = None,
    force: Force = False,
    stages: KeepStages = False,
    compare: Annotated[
        str | None, typer.Option("--compare", help="native: one labelled sheet beside native sampling.")
    ] = None,
    device: DeviceName = "auto",
    dtype: Dtype = None,
    offload: OffloadMode = "none",
    storage: Storage = None,
    vae: Vae = None,
    text: Text = None,
    compile: Compile = False,
    as_json: Json = False,
) -> None:
    """Draw pictures, and say what each stage cost."""
    with console() as err:
        if compare not in (None, "native"):
            raise PlanError(f"--compare takes native, got {compare!r}")
        if sr in (None, "own") and recipe != "native" and not embedded(model):
            raise PlanError(
                f"{model} comes without a super-resolution net; choose one: --sr lanczos, bicubic, bilinear or nearest"
            )
        backbone = load_model(model, device, dtype, offload, storage, vae, text, compile)
        info = backbone.info
        chain = build(recipe, info, size=size, low=low, steps=steps, refine_steps=refine_steps, sigma=sigma, sr=sr)
        other = build("native", info, size=size) if compare else None
        _draw(err, chain, backbone, prompts, seed, batch, negative, out, force, stages, as_json, other=other)


@app.command()
def run(
    chain: Annotated[str, typer.Argument(help="A chain of your own: file.py:name.")],
    prompts: Prompts,
    model: ModelName = "pocket",
    seed: Seed = 0,
    batch: Batch = 1,
    negative: Negative = None,
    out: Out = None,
    force: Force = False,
    stages: KeepStages = False,
    device: DeviceName = "auto",
    dtype: Dtype = None,
    offload: OffloadMode = "none",
    storage: Storage = None,
    vae: Vae = None,
    text: Text = None,
    compile: Compile = False,
    as_json: Json = False,
) -> None:
    """Run a chain from a Python file."""
    with console() as err:
        own = load_chain(chain)
        backbone = load_model(model, device, dtype, offload, storage, vae, text, compile)
        _draw(err, own, backbone, prompts, seed, batch, negative, out, force, stages, as_json)


@app.command()
def plan(
    chain: Annotated[str | None, typer.Argument(help="file.py:name; a recipe unless said.")] = None,
    model: ModelName = "pocket",
    recipe: RecipeName = "paper",
    size: Size = None,
    low: Low = None,
    steps: Steps = None,
    refine_steps: RefineSteps = 1,
    sigma: Sigma = 0.12,
    sr: Sr = None,
    batch: Batch = 1,
    as_json: Json = False,
) -> None:
    """Check a chain and count its work, without weights."""
    from mrflow.cost import report
    from mrflow.models import info as model_info
    from mrflow.stage import plan as make_plan

    with console():
        info = model_info(model)
        if chain is not None:
            own: AnyChain = load_chain(chain)
        else:
            own = build(recipe, info, size=size, low=low, steps=steps, refine_steps=refine_steps, sigma=sigma, sr=sr)
        planned = make_plan(own, info, batch=batch)
        typer.echo(json.dumps(report(planned), indent=2) if as_json else describe_plan(planned))


@app.command()
def inspect(
    file: Annotated[Path, typer.Argument(help="A PNG that mrflow made, or a safetensors file.")], as_json: Json = False
) -> None:
    """Say what a file is: how a picture was made, what a checkpoint holds."""
    from mrflow.io import inspect_file, read_record

    with console():
        if as_json and file.suffix != ".safetensors":
            typer.echo(json.dumps(read_record(file), indent=2))
        else:
            typer.echo("\n".join(inspect_file(file)))


@app.command()
def replay(
    picture: Annotated[Path, typer.Argument(help="A PNG that mrflow made.")],
    out: Out = None,
    force: Force = False,
    own: Annotated[
        Path | None, typer.Option("--with", help="The Python file with the stages of your own it used.")
    ] = None,
    model: Annotated[str | None, typer.Option("--model", help="The weights, where the model is not embedded.")] = None,
    start: Annotated[Path | None, typer.Option("--start", help="The picture it began with, if it did.")] = None,
    device: DeviceName = "auto",
    dtype: Dtype = None,
    offload: OffloadMode = "none",
    storage: Storage = None,
    vae: Vae = None,
    text: Text = None,
    compile: Compile = False,
) -> None:
    """Make a picture again from the record it carries."""
    from mrflow.io import read_image, read_record, save_result
    from mrflow.io import replay as again

    with console() as err:
        target = free_path(out, picture.with_stem(f"{picture.stem}-replay"), 1, force)
        record = read_record(picture)
        types = own_types(own) if own is not None else ()
        pixels = read_image(start) if start is not None else None
        name = model or str(record.get("model", "pocket"))
        backbone = load_model(name, device, dtype, offload, storage, vae, text, compile)
        result = again(picture, model=backbone, types=types, start=pixels)
        for path in save_result(result, target):
            err.print(f"made again in {result.seconds:.2f} s")
            typer.echo(path)


def embedded(where: str) -> bool:
    """Whether a model is one that comes with everything."""
    from mrflow.models import is_pocket

    return where == "pocket" or is_pocket(Path(where)) or not (Path(where).exists() or "/" in where)


def load_model(
    where: str,
    device: str,
    dtype: str | None,
    offload: str,
    storage: str | None,
    vae: str | None,
    text: str | None,
    compile: bool,
) -> "Backbone":
    """A model from the words of the command line."""
    import torch

    from mrflow.models import load
    from mrflow.models.memory import check_offload

    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype is not None and dtype not in dtypes:
        raise PlanError(f"--dtype takes {', '.join(dtypes)}, got {dtype!r}")
    return load(
        where,
        dtype=dtypes[dtype] if dtype else None,
        device=device,
        offload=check_offload(offload),
        storage=storage,  # type: ignore[arg-type]  # pyright: ignore  # load says what it takes
        vae=vae,
        text=text,
        compile=compile,
    )


def build(
    recipe: str,
    info: "ModelInfo",
    *,
    size: str | None = None,
    low: str | None = None,
    steps: int | None = None,
    refine_steps: int = 1,
    sigma: float = 0.12,
    sr: str | None = None,
) -> "Chain[Start, Pixels]":
    """A recipe's chain from the words of the command line."""
    from mrflow import recipes
    from mrflow.cost import half

    full = parse_size("--size", size) if size else info.size
    small = parse_size("--low", low) if low else (half(full, info) if size else info.low)
    if recipe == "native":
        return recipes.native(size=full, steps=50 if steps is None else steps)
    count = 12 if steps is None else steps
    if recipe == "paper":
        return recipes.paper(upscaler(sr), low=small, size=full, steps=count, refine_steps=refine_steps, sigma=sigma)
    if recipe == "official":
        return recipes.official(upscaler(sr), low=small, size=full, steps=count, refine_steps=refine_steps, sigma=sigma)
    raise PlanError(f"there is no recipe {recipe!r}; use paper, official or native")


def upscaler(name: str | None) -> "Upscaler | None":
    """An upscaler by its word; None for the model's own."""
    from mrflow.upscalers import Interpolate, Lanczos

    if name in (None, "own"):
        return None
    if name == "lanczos":
        return Lanczos(2)
    if name in ("bicubic", "bilinear", "nearest"):
        return Interpolate(2, name)  # type: ignore[arg-type]  # pyright: ignore
    raise PlanError(f"--sr takes own, lanczos, bicubic, bilinear or nearest, got {name!r}")


def parse_size(option: str, text: str) -> tuple[int, int]:
    """HEIGHTxWIDTH, or one number for a square."""
    parts = text.lower().split("x")
    if len(parts) not in (1, 2) or not all(p.isascii() and p.isdigit() and len(p) < 6 for p in parts):
        raise PlanError(f"{option} must be HEIGHTxWIDTH in pixels, such as 256x256, got {text!r}")
    return int(parts[0]), int(parts[-1])


def describe_plan(planned: object) -> str:
    """A plan for people: the stages, then what it costs beside native sampling."""
    from mrflow.cost import compared
    from mrflow.stage import Plan

    assert isinstance(planned, Plan)
    return "\n".join([str(planned), "", *compared(planned)])


def _draw(
    err: "Console",
    chain: "AnyChain",
    backbone: "Backbone",
    prompts: list[str],
    seed: int,
    batch: int,
    negative: str | None,
    out: Path | None,
    force: bool,
    keep: bool,
    as_json: bool,
    *,
    other: "Chain[Start, Pixels] | None" = None,
) -> None:
    """Check, run, save, report."""
    from mrflow import sheet
    from mrflow.io import make_record, save_result, slug, write_png
    from mrflow.runner import run as execute
    from mrflow.stage import plan as make_plan

    if batch < 1 or len(prompts) * batch > 1024:
        raise PlanError(
            f"--batch must be at least 1 and give at most 1024 pictures, got {batch} of {len(prompts)} prompts"
        )
    texts = [p for p in prompts for _ in range(batch)]
    seeds = [seed + i for _ in prompts for i in range(batch)]
    count = len(texts)
    make_plan(chain, backbone.info, batch=count)
    suffixes = [f"-{name}" for name in sheet.stage_names(chain)] if keep else []
    suffixes += ["-compare"] if other is not None else []
    target = free_path(out, Path(f"{slug(prompts[0])}-seed{seed}.png"), count, force, suffixes)
    if other is not None:
        make_plan(other, backbone.info, batch=count)
        sheet.warm_up((chain, other), backbone, count)
    with progress(err) as listen:
        result = execute(chain, backbone, texts, seed=seeds, negative=negative, keep=keep, on_event=listen)
    paths = save_result(result, target)
    err.print(sheet.table(result))
    if keep:
        for name, images in sheet.stage_pictures(result):
            extra = [path.with_stem(f"{path.stem}-{name}") for path in paths[:count]]
            for path, image in zip(extra, images, strict=True):
                write_png(path, image)
            paths += extra
    speedup = None
    if other is not None:
        with progress(err) as listen:
            native = execute(other, backbone, texts, seed=seeds, negative=negative, on_event=listen)
        err.print(sheet.table(native))
        speedup = native.seconds / result.seconds
        path = target.with_stem(f"{target.stem}-compare")
        write_png(path, sheet.compare(result, native))
        paths.append(path)
        err.print(f"staged {result.seconds:.2f} s, native {native.seconds:.2f} s: {speedup:.1f}x faster")
    if as_json:
        records = [make_record(result, i) for i in range(count)]
        typer.echo(json.dumps({"paths": [str(p) for p in paths], "speedup": speedup, "records": records}))
    else:
        for path in paths:
            typer.echo(path)


def free_path(out: Path | None, default: Path, count: int, force: bool, extras: Sequence[str] = ()) -> Path:
    """Where to write: a name that overwrites nothing, unless forced, in a folder that takes it.

    `extras` are endings of the names that are written beside each picture.
    """
    from mrflow.io import batch_paths, check_writable

    def names(path: Path) -> list[Path]:
        own = batch_paths(path, count)
        return own + [p.with_stem(p.stem + extra) for p in {path, *own} for extra in extras]

    if out is not None:
        if out.suffix.lower() != ".png":
            raise PlanError(f"--out must end in .png, got {out.name!r}: only a PNG keeps every bit and the record")
        taken = [p for p in names(out) if p.exists() and not p.is_dir()]
        if taken and not force:
            raise PlanError(f"{taken[0]} exists; choose another --out, or overwrite it with --force")
        check_writable(out)
        return out
    path, number = default, 2
    while not force and any(p.exists() for p in names(path)):
        path, number = default.with_stem(f"{default.stem}-{number}"), number + 1
    check_writable(path)
    return path


def load_file(file: Path) -> dict[str, object]:
    """The names that a Python file defines.

    Raises:
        PlanError: there is no such file, or it fails; the text names the line.
    """
    import importlib.util
    import traceback

    file = file.absolute()
    spec = importlib.util.spec_from_file_location(file.stem, file)
    if not file.is_file() or spec is None or spec.loader is None:
        raise PlanError(f"there is no Python file {file.name} in {file.parent}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[file.stem] = module
    try:
        spec.loader.exec_module(module)
    except MrflowError:
        raise
    except Exception as error:
        lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == str(file)]
        line = f", line {lines[-1]}" if lines else f", line {error.lineno}" if isinstance(error, SyntaxError) else ""
        raise PlanError(f"{file.name}{line}: {type(error).__name__}: {error}") from None
    return vars(module)


def load_chain(where: str) -> "AnyChain":
    """The chain that `file.py:name` names."""
    from mrflow.stage import Chain, Stage

    file, _, name = where.rpartition(":")
    if not file.endswith(".py") or not name:
        raise PlanError(f"a chain is named file.py:name, got {where!r}")
    names = load_file(Path(file))
    if name not in names:
        known = sorted(k for k, v in names.items() if isinstance(v, Chain | Stage))
        raise PlanError(f"{file} has no {name!r}; its chains are {', '.join(known) or 'none'}")
    value = names[name]
    if isinstance(value, Stage):
        return Chain((value,))
    if not isinstance(value, Chain):
        raise PlanError(f"{where} is {type(value).__name__}, not a chain; join stages with >>")
    return value


def own_types(file: Path) -> list[type]:
    """The dataclasses that a Python file defines."""
    from dataclasses import is_dataclass

    return [v for v in load_file(file).values() if isinstance(v, type) and is_dataclass(v)]


@contextmanager
def progress(err: "Console") -> "Generator[Listener]":
    """A listener that shows stages and steps on stderr, and nothing where that is no terminal."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from mrflow.runner import StageBegan, StageEnded, Stepped

    columns = (
        TextColumn("{task.description:<10}"),
        BarColumn(30),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bar:
        task = bar.add_task("", total=1, note="")

        def listen(event: "Event") -> None:
            if isinstance(event, StageBegan):
                bar.reset(task, description=event.name, total=1, note=f"stage {event.index + 1} of {event.count}")
            elif isinstance(event, Stepped):
                bar.update(task, completed=event.step.index, total=event.step.steps, note=f"sigma {event.step.to:.3f}")
            elif isinstance(event, StageEnded):
                bar.update(task, completed=1, total=1)

        yield listen


@contextmanager
def console() -> "Generator[Console]":
    """A console on stderr; errors of mrflow end the program with their text and exit code, without a traceback."""
    from rich.console import Console

    err = Console(stderr=True, highlight=False, soft_wrap=True, markup=False)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s", stream=sys.stderr)

    def ended(number: int, frame: object) -> NoReturn:
        raise SystemExit(128 + number)

    previous = signal.signal(signal.SIGTERM, ended)
    try:
        yield err
    except MrflowError as error:
        err.print(f"error: {error}")
        raise SystemExit(error.exit_code) from None
    except KeyboardInterrupt:
        err.print("stopped; every file that was named is whole")
        raise SystemExit(130) from None
    except MemoryError:
        err.print("error: out of memory; try a smaller --size or --batch")
        raise SystemExit(5) from None
    finally:
        signal.signal(signal.SIGTERM, previous)


def main() -> None:
    """The entry point."""
    app()

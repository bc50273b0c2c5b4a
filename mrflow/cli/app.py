"""The command line: thin verbs over the library. For people on stderr, results on stdout, exit codes as in `errors`.

Long because typer reads every option of every verb from its signature.
"""

import json
import sys
from collections.abc import Generator
from contextlib import contextmanager
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mrflow._checks import check_whole
from mrflow.cli.display import console
from mrflow.cli.options import ModelOptions, with_model_options
from mrflow.cli.parsing import (
    RECIPES,
    SR_WORDS,
    build,
    check_scale,
    embedded,
    free_path,
    load_chain,
    own_types,
    parse_tiles,
    refinement,
    save_free,
    upscaler,
)
from mrflow.cli.sweeps import report, sweep, tune
from mrflow.errors import PlanError
from mrflow.notes import printable

if TYPE_CHECKING:
    from rich.console import Console
    from torch import Tensor

    from mrflow.backbone import Backbone
    from mrflow.runner import Event, Listener
    from mrflow.spec import Pixels, Start
    from mrflow.stage import AnyChain, Chain

app = typer.Typer(
    help="Rectified-flow pictures in stages: sample low, upscale, reinject noise, refine.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Prompts = Annotated[list[str], typer.Argument(help="What to draw; several prompts make a batch.")]
ModelName = Annotated[
    str, typer.Option("--model", help="pocket, a hub id (owner/name), a folder, or a file; plan: also flux1-dev, ...")
]
RecipeName = Annotated[str, typer.Option("--recipe", help=f"{RECIPES}.")]
Size = Annotated[
    str | None,
    typer.Option("--size", help="HEIGHTxWIDTH in pixels, or an aspect such as 16:9; the model's own unless said."),
]
Low = Annotated[str | None, typer.Option("--low", help="HEIGHTxWIDTH of the low-resolution stage.")]
Steps = Annotated[
    str | None,
    typer.Option(
        "--steps", help="Sampling steps: 12 staged, 50 native unless said; rivals take one count a size, 8,4."
    ),
]
RefineSteps = Annotated[int, typer.Option("--refine-steps", help="Steps of the refinement.")]
Sigma = Annotated[float, typer.Option("--sigma", help="Noise level that is reinjected, above 0 to 1.")]
Sr = Annotated[str | None, typer.Option("--sr", help=f"The upscaler: {SR_WORDS}.")]
Ladder = Annotated[
    str | None, typer.Option("--ladder", help="Sizes to climb, such as 128,256,512, instead of --size and --low.")
]
TileSides = Annotated[
    str | None,
    typer.Option("--tiles", help="Refine in tiles of so many pixels, such as 1024, or 1024,256 with their overlap."),
]
Seed = Annotated[int, typer.Option("--seed", help="Seed of the first picture.")]
Batch = Annotated[int, typer.Option("--batch", help="Pictures of each prompt, seeds counting up.")]
Negative = Annotated[str | None, typer.Option("--negative", help="Negative prompt; the model's own unless said.")]
Out = Annotated[Path | None, typer.Option("--out", help="File to write; named after the prompt unless said.")]
Force = Annotated[bool, typer.Option("--force", help="Overwrite files that exist.")]
KeepStages = Annotated[bool, typer.Option("--stages", help="Also save every stage's picture.")]
Json = Annotated[bool, typer.Option("--json", help="Results as JSON on stdout.")]


def _version(asked: bool) -> None:
    if asked:
        from mrflow import __version__

        typer.echo(f"mrflow {__version__}")
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool, typer.Option("--version", help="Say the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Rectified-flow pictures in stages: sample low, upscale, reinject noise, refine."""


@app.command()
@with_model_options
def generate(
    prompts: Prompts,
    model: ModelName = "pocket",
    recipe: RecipeName = "paper",
    size: Size = None,
    low: Low = None,
    ladder: Ladder = None,
    steps: Steps = None,
    refine_steps: RefineSteps = 1,
    sigma: Sigma = 0.12,
    sr: Sr = None,
    tiles: TileSides = None,
    seed: Seed = 0,
    batch: Batch = 1,
    negative: Negative = None,
    out: Out = None,
    force: Force = False,
    stages: KeepStages = False,
    compare: Annotated[
        str | None, typer.Option("--compare", help="native: one labelled sheet beside native sampling.")
    ] = None,
    as_json: Json = False,
    *,
    options: ModelOptions,
) -> None:
    """Draw pictures, and say what each stage cost."""
    with console() as err:
        if compare not in (None, "native"):
            raise PlanError(f"--compare takes native, got {compare!r}")
        if sr in (None, "own") and recipe in ("paper", "official") and not embedded(model):
            raise PlanError(f"{model} comes without a super-resolution net; choose one: --sr {SR_WORDS}")
        net = upscaler(sr)
        backbone = options.load(model)
        info = backbone.info
        chain = build(
            recipe,
            info,
            size=size,
            low=low,
            ladder=ladder,
            steps=steps,
            refine_steps=refine_steps,
            sigma=sigma,
            sr=net,
            tiles=tiles,
        )
        last = ladder.split(",")[-1] if ladder else size
        other = build("native", info, size=last) if compare else None
        _draw(err, chain, backbone, prompts, seed, batch, negative, out, force, stages, as_json, other=other)


@app.command()
@with_model_options
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
    as_json: Json = False,
    *,
    options: ModelOptions,
) -> None:
    """Run a chain from a Python file."""
    with console() as err:
        own = load_chain(chain)
        backbone = options.load(model)
        _draw(err, own, backbone, prompts, seed, batch, negative, out, force, stages, as_json)


@app.command()
@with_model_options
def refine(
    photo: Annotated[Path, typer.Argument(help="A picture: PNG, JPEG or WebP.")],
    prompt: Annotated[str, typer.Option("--prompt", help="What it shows; it guides the refinement.")] = "",
    scale: Annotated[float, typer.Option("--scale", help="How many times larger; 1.5 works too.")] = 2.0,
    sigma: Annotated[float, typer.Option("--sigma", help="Noise level that is injected, above 0 to 1.")] = 0.16,
    crop: Annotated[bool, typer.Option("--crop", help="Take the middle where the sides do not fit the model.")] = False,
    model: ModelName = "pocket",
    refine_steps: RefineSteps = 1,
    sr: Sr = None,
    tiles: TileSides = None,
    sr_only: Annotated[bool, typer.Option("--sr-only", help="Enlarge by --sr alone: no model, no noise.")] = False,
    seed: Seed = 0,
    batch: Batch = 1,
    negative: Negative = None,
    out: Out = None,
    force: Force = False,
    stages: KeepStages = False,
    as_json: Json = False,
    *,
    options: ModelOptions,
) -> None:
    """Enlarge a picture that exists: super-resolve, reinject a little noise, refine."""
    from mrflow import recipes
    from mrflow.records.pictures import read_image
    from mrflow.stages import Crop

    with console() as err:
        if sr_only:
            for path in _enlarged(photo, scale, sr, out, force):
                typer.echo(json.dumps({"paths": [str(path)]}) if as_json else path)
            return
        if embedded(model):
            err.print(PHOTOGRAPHS)
        if sr in (None, "own") and not embedded(model):
            raise PlanError(f"{model} comes without a super-resolution net; choose one: --sr {SR_WORDS}")
        check_whole("--refine-steps", refine_steps, 1, 1000)
        net = upscaler(sr)
        if isinstance(net, str):
            raise PlanError(f"--sr {net} enlarges latents; refining a picture goes over pixels")
        pixels = read_image(photo)
        backbone = options.load(model)
        height, width = pixels.shape[-2:]
        part, size = refinement(height, width, scale, backbone.info, crop=crop)
        chain = recipes.enlarge(size, net, sigma=sigma, refine_steps=refine_steps, tiles=parse_tiles(tiles))
        whole: AnyChain = chain if part == (height, width) else Crop(*part) >> chain
        name = Path(f"{photo.stem}-refined.png")
        _draw(
            err, whole, backbone, [prompt], seed, batch, negative, out, force, stages, as_json, start=pixels, name=name
        )


PHOTOGRAPHS = (
    "pocket knows only its own world of shapes, faces and words; it makes mud of a photograph. "
    "To enlarge one without a model: --sr-only --sr FILE"
)


def _enlarged(photo: Path, scale: float, sr: str | None, out: Path | None, force: bool) -> list[Path]:
    """Enlarge a picture by an upscaler alone, and write it."""
    from mrflow.records.pictures import png, read_image, to_images
    from mrflow.spec import MAX_SIDE
    from mrflow.stages.upscale import enlarged, passes_to, resize

    net = None if sr == "own" else upscaler(sr)
    if net is None or isinstance(net, str):
        raise PlanError(f"--sr-only needs an upscaler of pixels: --sr {SR_WORDS}")
    check_scale(scale)
    pixels = read_image(photo)
    height, width = (round(side * scale) for side in pixels.shape[-2:])
    if max(height, width) > MAX_SIDE:
        raise PlanError(f"{height}x{width} is beyond {MAX_SIDE} pixels a side; take a smaller --scale")
    # Once at least: a network of scale 1 may restore.
    passes = max(1, passes_to((height, width), pixels.shape[-2], pixels.shape[-1], net.scale))
    default = Path(f"{photo.stem}-enlarged.png")
    target = free_path(out, default, 1, force)
    for _ in range(passes):
        pixels = enlarged(net, pixels)
    image = png(to_images(resize(pixels, height, width).clamp(0, 1))[0])
    return save_free(lambda path: {path: image}, target, out, default, 1, force)


networks = typer.Typer(help="Super-resolution networks by a short name.", no_args_is_help=True)
app.add_typer(networks, name="sr")


@networks.command("add")
def sr_add(
    file: Annotated[Path, typer.Argument(help="A checkpoint that you have: .pth, .safetensors or ncnn's .param.")],
    name: Annotated[str | None, typer.Option("--name", help="Which it is; by its file's name (default).")] = None,
) -> None:
    """Keep a network's file, so that --sr realesrgan-x4, anime or video finds it."""
    from mrflow.upscalers import shelf

    with console():
        word, path = shelf.add(file, name)
        typer.echo(f"--sr {word}: {shelf.KNOWN[word].title} ({shelf.KNOWN[word].licence}), kept as {path}")


@networks.command("list")
def sr_list() -> None:
    """Say which networks have short names, and which are here."""
    from mrflow.upscalers import shelf

    for word, known in shelf.KNOWN.items():
        try:
            where = str(shelf.found(word))
        except PlanError:
            where = f"not here: mrflow sr add {known.file} (from {known.source})"
        typer.echo(f"{word}: {known.title}, {known.licence}; {where}")


@app.command()
def plan(
    chain: Annotated[str | None, typer.Argument(help="file.py:name; a recipe unless said.")] = None,
    model: ModelName = "pocket",
    recipe: RecipeName = "paper",
    size: Size = None,
    low: Low = None,
    ladder: Ladder = None,
    steps: Steps = None,
    refine_steps: RefineSteps = 1,
    sigma: Sigma = 0.12,
    sr: Sr = None,
    tiles: TileSides = None,
    batch: Batch = 1,
    as_json: Json = False,
) -> None:
    """Check a chain and count its work, without weights."""
    from mrflow.cli.plan import report
    from mrflow.models import info as model_info
    from mrflow.stage import plan as make_plan

    with console():
        info = model_info(model)
        if chain is not None:
            own: AnyChain = load_chain(chain)
        else:
            net = upscaler(sr)
            own = build(
                recipe,
                info,
                size=size,
                low=low,
                ladder=ladder,
                steps=steps,
                refine_steps=refine_steps,
                sigma=sigma,
                sr=net,
                tiles=tiles,
            )
        planned = make_plan(own, info, batch=batch)
        typer.echo(json.dumps(report(planned), indent=2) if as_json else describe_plan(planned))


app.command()(with_model_options(sweep))
app.command()(report)
app.command()(with_model_options(tune))


@app.command()
def inspect(
    file: Annotated[Path, typer.Argument(help="A PNG that mrflow made, or a checkpoint.")],
    as_json: Json = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Read a model's files whole and compare them with what is known of them.")
    ] = False,
) -> None:
    """Say what a file is: how a picture was made, what a checkpoint holds."""
    from mrflow.records.pictures import read_record
    from mrflow.records.replay import inspect_file

    with console():
        if verify:
            from mrflow.models.digests import verify as whole
            from mrflow.records.files import cache_folder

            typer.echo("\n".join(map(printable, whole(file, cache_folder()))))
        elif as_json and file.suffix != ".safetensors":
            typer.echo(json.dumps(read_record(file), indent=2))
        else:
            typer.echo("\n".join(map(printable, inspect_file(file))))


@app.command()
@with_model_options
def replay(
    picture: Annotated[Path, typer.Argument(help="A PNG that mrflow made.")],
    out: Out = None,
    force: Force = False,
    own: Annotated[
        Path | None, typer.Option("--with", help="The Python file with the stages of your own it used.")
    ] = None,
    model: Annotated[str | None, typer.Option("--model", help="The weights, where the model is not embedded.")] = None,
    start: Annotated[Path | None, typer.Option("--start", help="The picture it began with, if it did.")] = None,
    file: Annotated[
        list[Path] | None,
        typer.Option("--file", help="The file of a network or adapter it used, or its folder."),
    ] = None,
    *,
    options: ModelOptions,
) -> None:
    """Make a picture again from the record it carries."""
    from mrflow.records.pictures import read_image, read_record
    from mrflow.records.replay import recorded_model
    from mrflow.records.replay import replay as again
    from mrflow.result import result_files

    with console() as err:
        default = picture.parent / f"{picture.stem}-replay{picture.suffix}"
        target = free_path(out, default, 1, force)
        record = read_record(picture)
        types = own_types(own) if own is not None else ()
        pixels = read_image(start) if start is not None else None
        backbone = options.load(model or recorded_model(record))
        result = again(picture, model=backbone, types=types, start=pixels, files=file or ())
        for path in save_free(lambda path: result_files(result, path), target, out, default, 1, force):
            err.print(f"made again in {result.seconds:.2f} s")
            typer.echo(path)


def describe_plan(planned: object) -> str:
    """A plan for people: the stages, then what it costs beside native sampling."""
    from mrflow.cli.plan import compared, model_facts
    from mrflow.stage import Plan

    assert isinstance(planned, Plan)
    return "\n".join([str(planned), "", *model_facts(planned), *compared(planned)])


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
    start: "Tensor | None" = None,
    name: Path | None = None,
) -> None:
    """Check, run, save, report."""
    from mrflow import sheet
    from mrflow.records.pictures import png, slug
    from mrflow.result import make_record, result_files
    from mrflow.runner import run as execute
    from mrflow.spec import Pixels
    from mrflow.stage import plan as make_plan

    if batch < 1 or len(prompts) * batch > 1024:
        raise PlanError(
            f"--batch must be at least 1 and give at most 1024 pictures, got {batch} of {len(prompts)} prompts"
        )
    texts = [p for p in prompts for _ in range(batch)]
    seeds = [seed + i for _ in prompts for i in range(batch)]
    count = len(texts)
    begin = None if start is None else Pixels(count, *start.shape[-2:])
    pixels = None if start is None else start.expand(count, -1, -1, -1)
    make_plan(chain, backbone.info, batch=count, start=begin)
    suffixes = [f"-{name}" for name in sheet.stage_names(chain)] if keep else []
    suffixes += ["-compare"] if other is not None else []
    default = name or Path(f"{slug(prompts[0])}-seed{seed}.png")
    target = free_path(out, default, count, force, suffixes)
    if other is not None:
        make_plan(other, backbone.info, batch=count)
        sheet.warm_up((chain, other), backbone, count)
    with progress(err) as listen:
        result = execute(
            chain, backbone, texts, seed=seeds, negative=negative, start=pixels, keep=keep, on_event=listen
        )

    def files(path: Path) -> dict[Path, bytes]:
        made = result_files(result, path)
        own = list(made)
        for stage, images in sheet.stage_pictures(result) if keep else ():
            made |= {p.with_stem(f"{p.stem}-{stage}"): png(i) for p, i in zip(own, images, strict=True)}
        return made

    paths = save_free(files, target, out, default, count, force, suffixes)
    err.print(sheet.table(result))
    speedup = None
    if other is not None:
        with progress(err) as listen:
            native = execute(other, backbone, texts, seed=seeds, negative=negative, on_event=listen)
        err.print(sheet.table(native))
        speedup = native.seconds / result.seconds
        side = png(sheet.compare(result, native))
        beside = target.with_stem(f"{target.stem}-compare")
        paths += save_free(lambda path: {path: side}, beside, out, beside, 1, force)
        err.print(f"staged {result.seconds:.2f} s, native {native.seconds:.2f} s: {speedup:.1f}x faster")
    if as_json:
        records = [make_record(result, i) for i in range(count)]
        typer.echo(json.dumps({"paths": [str(p) for p in paths], "speedup": speedup, "records": records}))
    else:
        for path in paths:
            typer.echo(path)


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


def main() -> None:
    """The entry point."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # a name on disk need not be text
            stream.reconfigure(errors="surrogateescape" if stream is sys.stdout else "backslashreplace")
    with console():
        app()

"""The command line: thin verbs over the library. For people on stderr, results on stdout, exit codes as in `errors`."""

import json
import sys
from functools import partial
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mrflow._checks import check_whole
from mrflow.cli import records, sweeps
from mrflow.cli.chains import enlargement
from mrflow.cli.display import console, width
from mrflow.cli.drawing import draw
from mrflow.cli.export import sweep_verbs
from mrflow.cli.networks import networks
from mrflow.cli.options import (
    ChainOptions,
    DrawOptions,
    FactOptions,
    Json,
    ModelName,
    ModelOptions,
    SlotOptions,
    option_of,
    refuse,
    with_options,
)
from mrflow.cli.parsing import (
    SR_WORDS,
    check_scale,
    embedded,
    free_path,
    load_chain,
    parse_shift,
    refinement,
    save_free,
    upscaler,
)
from mrflow.errors import PlanError

if TYPE_CHECKING:
    from mrflow.model_info import ModelInfo
    from mrflow.stage import AnyChain

HELP = "Rectified-flow pictures in stages: sample low, upscale, reinject noise, refine."
app = typer.Typer(
    help=HELP,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Prompts = Annotated[
    list[str],
    typer.Argument(help="What to draw; several make a batch. @FILE takes the lines of a file, - those of stdin."),
]
StartPicture = Annotated[Path | None, typer.Option("--start", help="The picture that the chain begins with.")]


def _version(asked: bool) -> None:
    if asked:
        from mrflow import __version__

        typer.echo(f"mrflow {__version__}")
        raise typer.Exit


@app.callback(help=HELP)
def common(
    version: Annotated[
        bool, typer.Option("--version", help="Say the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """What is asked before a verb."""


@app.command()
@with_options
def generate(
    prompts: Prompts,
    chain: ChainOptions,
    drawing: DrawOptions,
    options: ModelOptions,
    model: ModelName = "pocket",
    compare: Annotated[
        str | None, typer.Option("--compare", help="native: one labelled sheet beside native sampling.")
    ] = None,
) -> None:
    """Draw pictures, and say what each stage cost."""
    with console() as err:
        if compare not in (None, "native"):
            raise PlanError(f"--compare takes native, got {compare!r}")
        if chain.sr in (None, "own") and chain.name in ("paper", "official") and not embedded(model):
            raise PlanError(f"{model} comes without a super-resolution net; choose one: --sr {SR_WORDS}")
        pairs, net = drawing.pairs(prompts), chain.net()
        last = chain.ladder.split(",")[-1] if chain.ladder else chain.size
        native = ChainOptions(recipe="native", size=last)

        def make(info: "ModelInfo") -> "tuple[AnyChain, AnyChain | None]":
            return chain.build(info, net), native.build(info, None) if compare else None

        draw(err, make, partial(options.load, model), pairs, drawing)


@app.command()
@with_options
def run(
    chain: Annotated[str, typer.Argument(help="A chain of your own: file.py:name.")],
    prompts: Prompts,
    drawing: DrawOptions,
    options: ModelOptions,
    model: ModelName = "pocket",
    start: StartPicture = None,
) -> None:
    """Run a chain from a Python file."""
    from mrflow.records.pictures import read_image

    with console() as err:
        pairs, own = drawing.pairs(prompts), load_chain(chain)
        pixels = None if start is None else read_image(start)
        draw(err, lambda info: (own, None), partial(options.load, model), pairs, drawing, start=pixels)


@app.command()
@with_options
def refine(
    photo: Annotated[Path, typer.Argument(help="A picture: PNG, JPEG or WebP.")],
    slots: SlotOptions,
    drawing: DrawOptions,
    options: ModelOptions,
    prompt: Annotated[str, typer.Option("--prompt", help="What it shows; it guides the refinement.")] = "",
    scale: Annotated[float, typer.Option("--scale", help="How many times larger; 1.5 works too.")] = 2.0,
    sigma: Annotated[
        float | None, typer.Option("--sigma", help="Noise level that is injected, above 0 to 1 (default: 0.16).")
    ] = None,
    crop: Annotated[bool, typer.Option("--crop", help="Take the middle where the sides do not fit the model.")] = False,
    model: ModelName = "pocket",
    refine_steps: Annotated[
        int | None, typer.Option("--refine-steps", help="Steps of the refinement (default: 1).")
    ] = None,
    sr: Annotated[
        str | None, typer.Option("--sr", help=f"The upscaler (default: the model's own): {SR_WORDS}.")
    ] = None,
    sr_only: Annotated[bool, typer.Option("--sr-only", help="Enlarge by --sr alone: no model, no noise.")] = False,
) -> None:
    """Enlarge a picture that exists: super-resolve, reinject a little noise, refine."""
    from mrflow.records.pictures import read_image
    from mrflow.stages import Crop

    with console() as err:
        if sr_only:
            said = {"sigma": sigma, "refine_steps": refine_steps, **vars(slots), "negative": drawing.negative}
            idle = [option_of(name) for name, value in said.items() if value is not None]
            idle += [option for option, value in (("--prompt", prompt), ("--crop", crop)) if value]
            refuse(bool(idle), ", ".join(idle), "beside --sr-only, which asks no model")
            for path in _enlarged(photo, scale, sr, drawing.out, drawing.force):
                typer.echo(json.dumps({"paths": [str(path)]}) if drawing.as_json else path)
            return
        if embedded(model):
            err.print(PHOTOGRAPHS)
        if sr in (None, "own") and not embedded(model):
            raise PlanError(f"{model} comes without a super-resolution net; choose one: --sr {SR_WORDS}")
        if refine_steps is not None:
            check_whole("--refine-steps", refine_steps, 1, 1000)
        net = upscaler(sr)
        if isinstance(net, str):
            raise PlanError(f"--sr {net} enlarges latents; refining a picture goes over pixels")
        pairs, pixels = drawing.pairs([prompt]), read_image(photo)

        def make(info: "ModelInfo") -> "tuple[AnyChain, None]":
            height, width = pixels.shape[-2:]
            part, size = refinement(height, width, scale, info, crop=crop)
            chain = enlargement(size, net, info, sigma=sigma, refine_steps=refine_steps, **vars(slots))
            return (chain if part == (height, width) else Crop(*part) >> chain), None

        name = Path(f"{photo.stem}-refined.png")
        draw(err, make, partial(options.load, model), pairs, drawing, start=pixels, name=name)


PHOTOGRAPHS = (
    "pocket knows only its own world of shapes, faces and words; it makes mud of a photograph. "
    "To enlarge one without a model: --sr-only --sr FILE"
)


def _enlarged(photo: Path, scale: float, sr: str | None, out: Path | None, force: bool) -> list[Path]:
    """Enlarge a picture by an upscaler alone, and write it."""
    from mrflow.records.pictures import png, read_image, to_images
    from mrflow.spec import MAX_SIDE
    from mrflow.stages.upscale import resize
    from mrflow.upscaler import enlarged, passes_to

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


@app.command()
@with_options
def plan(
    own: ChainOptions,
    facts: FactOptions,
    chain: Annotated[str | None, typer.Argument(help="file.py:name (default: a recipe).")] = None,
    model: ModelName = "pocket",
    start: StartPicture = None,
    batch: Annotated[int, typer.Option("--batch", help="Pictures that are made together.")] = 1,
    as_json: Json = False,
) -> None:
    """Check a chain and count its work, without weights."""
    from mrflow.cli.plan import describe, report
    from mrflow.models import info as model_info
    from mrflow.records.pictures import read_image
    from mrflow.spec import Pixels
    from mrflow.stage import plan as make_plan

    with console() as err:
        info = model_info(model, shift=parse_shift(facts.shift), text_tokens=facts.text_tokens)
        refuse(start is not None and chain is None, "--start", "with a recipe, which begins with noise")
        if chain is not None:
            refuse(bool(own.given()), ", ".join(own.given()), f"beside {chain}, which says all of it")
            whole: AnyChain = load_chain(chain)
        else:
            whole = own.build(info, own.net())
        begin = None if start is None else Pixels(batch, *read_image(start).shape[-2:])
        planned = make_plan(whole, info, batch=batch, start=begin)
        typer.echo(json.dumps(report(planned), indent=2) if as_json else describe(planned, width()))
        for text in planned.notes:
            err.print(text)


app.add_typer(sweep_verbs, name="sweep")
app.command()(with_options(sweeps.report))
app.command()(with_options(sweeps.tune))
app.command()(with_options(records.inspect))
app.command()(with_options(records.replay))
app.add_typer(networks, name="sr")


def main() -> None:
    """The entry point."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # a name on disk need not be text
            stream.reconfigure(errors="surrogateescape" if stream is sys.stdout else "backslashreplace")
    with console():
        app()

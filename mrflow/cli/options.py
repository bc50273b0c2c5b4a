"""The options that several verbs share, in groups, and the commands made of them. Nothing heavy is imported here."""

import inspect
import re
from collections.abc import Callable
from copy import copy
from dataclasses import MISSING, dataclass, fields, is_dataclass
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, get_args, get_type_hints

import typer

from mrflow.cli.display import WORDS, console
from mrflow.errors import PlanError

RIVALS = ("lift", "speed", "selflift", "ralu", "jit", "fresco")
RECIPES = ("paper", "official", "native", *RIVALS)
RECIPE_WORDS = f"{', '.join(RECIPES[:-1])} or {RECIPES[-1]}"
SR_WORDS = (
    "own, nearest, bilinear, bicubic, lanczos, latent-nearest, latent-bilinear, latent-bicubic, realesrgan-x4, anime, "
    "video (see mrflow sr add), latent:FILE (a network for latents), a checkpoint (.pth, .safetensors, ncnn's "
    ".param), BasicSR options (.yml or .yml:WEIGHTS), or an upscaler of your own, of pixels or latents (file.py:name)"
)
ModelName = Annotated[
    str, typer.Option("--model", help="pocket, a hub id (owner/name), a folder, or a file; plan: also flux1-dev, ...")
]
Json = Annotated[bool, typer.Option("--json", help="Results as JSON on stdout.")]


@dataclass(frozen=True)
class FactOptions:
    """What is said of a model where its files do not say it."""

    shift: Annotated[
        str | None,
        typer.Option(
            "--shift", help="Shift of the noise levels: a factor, or Shift(low, high) (default: the model's)."
        ),
    ] = None
    text_tokens: Annotated[
        int | None, typer.Option("--text-tokens", help="FLUX.1: text tokens, 1 to 512 (default: 512; schnell 256).")
    ] = None


@dataclass(frozen=True)
class ModelOptions(FactOptions):
    """How a model is loaded: once, for every verb that loads one."""

    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:N or mps.")] = "auto"
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="float32, bfloat16 or float16 (default: the files' own).")
    ] = None
    offload: Annotated[
        str, typer.Option("--offload", help="none, phase or block: weights leave the device when idle.")
    ] = "none"
    storage: Annotated[str | None, typer.Option("--storage", help="fp8: keep the blocks' matrices in 8 bits.")] = None
    compute: Annotated[
        str | None, typer.Option("--compute", help="fp8: multiply in 8 bits too (lossy; Ada, Hopper or newer).")
    ] = None
    vae: Annotated[str | None, typer.Option("--vae", help="The autoencoder, where it is not beside the model.")] = None
    text: Annotated[
        str | None, typer.Option("--text", help="Text encoders and tokenizers, where not beside the model.")
    ] = None
    compile: Annotated[bool, typer.Option("--compile", help="Compile what blocks do between matrix products.")] = False
    lora: Annotated[
        list[str] | None, typer.Option("--lora", help="A LoRA to merge into the weights: FILE or FILE:STRENGTH.")
    ] = None


@dataclass(frozen=True)
class SlotOptions:
    """What samples, in the words of Python; `file.py:` before them takes those of your own."""

    solver: Annotated[str | None, typer.Option("--solver", help="Such as Heun or DPMpp2M (default: Euler).")] = None
    schedule: Annotated[
        str | None,
        typer.Option("--schedule", help="Such as Karras or 'Beta(12, alpha=0.5)' (default: the recipe's)."),
    ] = None
    guidance: Annotated[
        str | None,
        typer.Option("--guidance", help="A scale, or such as 'Interval(CFG(4), 0.2, 0.9)' (default: the model's own)."),
    ] = None
    cache: Annotated[str | None, typer.Option("--cache", help="Such as 'TeaCache(0.25)' (default: none).")] = None
    tiles: Annotated[
        str | None,
        typer.Option("--tiles", help="Refine in tiles of so many pixels: 1024, or 1024,256 with their overlap."),
    ] = None
    decoder: Annotated[
        str | None,
        typer.Option(
            "--decoder", help="A tiny autoencoder's file, or such as POCKET_PREVIEW (default: the model's own decoder)."
        ),
    ] = None


@dataclass(frozen=True)
class ChainOptions(SlotOptions):
    """A chain in the words of the command line."""

    recipe: Annotated[str | None, typer.Option("--recipe", help=f"{RECIPE_WORDS} (default: paper).")] = None
    size: Annotated[
        str | None,
        typer.Option("--size", help="HEIGHTxWIDTH in pixels, or an aspect such as 16:9 (default: the model's own)."),
    ] = None
    low: Annotated[
        str | None, typer.Option("--low", help="HEIGHTxWIDTH of the low-resolution stage (default: half of --size).")
    ] = None
    ladder: Annotated[
        str | None, typer.Option("--ladder", help="Sizes to climb, such as 64,128,256, instead of --size and --low.")
    ] = None
    steps: Annotated[
        str | None,
        typer.Option(
            "--steps",
            help="Sampling steps (default: the model's, mostly 12 staged, 50 native); rivals: one a size, as 8,4.",
        ),
    ] = None
    refine_steps: Annotated[
        int | None, typer.Option("--refine-steps", help="Steps of the refinement (default: 1).")
    ] = None
    sigma: Annotated[
        float | None,
        typer.Option(
            "--sigma", help="Noise level that is reinjected, above 0 to 1 (default: the model's, mostly 0.12)."
        ),
    ] = None
    sr: Annotated[str | None, typer.Option("--sr", help=f"The upscaler (default: the model's own): {SR_WORDS}.")] = None

    @property
    def name(self) -> str:
        """The recipe's."""
        return self.recipe or "paper"

    @property
    def words(self) -> dict[str, Any]:
        """All but the recipe and --sr, as `mrflow.cli.chains.build` takes them."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("recipe", "sr")}

    def as_options(self) -> list[str]:
        """Those that were said, as options."""
        return [option_of(f.name) for f in fields(self) if getattr(self, f.name) is not None]


@dataclass(frozen=True)
class DrawOptions:
    """Which pictures, and where they go."""

    seed: Annotated[str, typer.Option("--seed", help="Seed of the first picture, or seeds such as 1,5,9.")] = "0"
    batch: Annotated[int, typer.Option("--batch", help="Pictures of each prompt, seeds counting up.")] = 1
    negative: Annotated[str | None, typer.Option("--negative", help="Negative prompt (default: the model's own).")] = (
        None
    )
    out: Annotated[Path | None, typer.Option("--out", help="File to write (default: named after the prompt).")] = None
    force: Annotated[bool, typer.Option("--force", help="Overwrite files that exist.")] = False
    stages: Annotated[bool, typer.Option("--stages", help="Also save every stage's picture.")] = False
    as_json: Json = False


def option_of(name: str) -> str:
    """`--refine-steps` for `refine_steps`."""
    return f"--{name.replace('_', '-')}"


def refuse(idle: bool, option: str, why: str) -> None:
    """Refuse an option that does nothing.

    Raises:
        PlanError: saying why.
    """
    if idle:
        raise PlanError(f"{option} does nothing {why}; leave it out")


def command(options: type[Any], does: str) -> Callable[..., None]:
    """A verb as typer takes it: its options and help are those of a dataclass, and what it does is another module's.

    `does` names a function of this package, `module:function`, of a console and the options. Its module, with all that
    it imports, is loaded when the verb runs: help and completion are quick. Fields that are dataclasses are groups of
    options; what a group adds comes before what it inherits. Numbers are read by `whole` and `number`. Errors that are
    shown while it runs name its options (`display.WORDS`).
    """
    own, groups = list[inspect.Parameter](), dict[str, type[Any]]()
    kind = inspect.Parameter.KEYWORD_ONLY

    def add(of: type[Any]) -> None:
        hints = get_type_hints(of, include_extras=True)
        for f in sorted(fields(of), key=lambda f: f.name not in of.__annotations__):
            default = inspect.Parameter.empty if f.default is MISSING else f.default
            if is_dataclass(hints[f.name]):
                groups[f.name] = hints[f.name]
            else:
                own.append(inspect.Parameter(f.name, kind, default=default, annotation=_exact(hints[f.name])))

    add(options)
    for group in tuple(groups.values()):
        add(group)
    spelled = {p.name: str(declared[0]) for p in own if (declared := _declared(p.annotation))}
    module, _, name = does.partition(":")

    def call(**given: Any) -> None:  # noqa: ANN401
        made = {name: group(**{f.name: given.pop(f.name) for f in fields(group)}) for name, group in groups.items()}
        token = WORDS.set(spelled)
        try:
            with console() as err:
                getattr(import_module(f"mrflow.cli.{module}"), name)(err, options(**given, **made))
        finally:
            WORDS.reset(token)

    call.__signature__ = inspect.Signature(own)  # type: ignore[attr-defined]
    call.__annotations__ = {p.name: p.annotation for p in own}
    call.__doc__ = options.__doc__
    return call


def whole(word: object) -> int:
    """The whole number of an option: digits alone, so that 1.0 is refused here as in Python.

    Raises:
        typer.BadParameter: it is none.
    """
    if isinstance(word, int):  # a default
        return word
    try:
        return int(word if isinstance(word, str) and re.fullmatch("[-+]?[0-9]+", word) else "")
    except ValueError:  # also of more digits than Python reads
        raise typer.BadParameter(f"it takes a whole number, got {str(word)[:80]!r}") from None


def number(word: object) -> float:
    """The number of an option.

    Raises:
        typer.BadParameter: it is none.
    """
    try:
        return float(word)  # type: ignore[arg-type]  # pyright: ignore
    except ValueError:
        raise typer.BadParameter(f"it takes a number, got {str(word)[:80]!r}") from None


READ: dict[object, tuple[Callable[[object], float], str]] = {int: (whole, "<int>"), float: (number, "<float>")}


def _exact(annotation: Any) -> Any:  # noqa: ANN401
    """An option's annotation, in which numbers are read by `whole` and `number` instead of what typer takes for one."""
    kind, *more = get_args(annotation)
    read = READ.get(next((each for each in (kind, *get_args(kind)) if each in READ), object))
    if read is None or not more:
        return annotation
    info = copy(more[0])  # verbs share it
    info.parser, info.metavar = read
    return Annotated[kind, info]


def _declared(annotation: Any) -> tuple[str, ...]:  # noqa: ANN401
    """How an option is spelled; nothing for an argument."""
    found = list[object]()
    for each in getattr(annotation, "__metadata__", ()):
        found += [getattr(each, "default", None), *(getattr(each, "param_decls", None) or ())]  # typer puts one there
    return tuple(word for word in found if isinstance(word, str) and word.startswith("--"))

"""The options that several verbs share, in groups: each is written once, and a verb takes a group as one parameter."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from mrflow.cli.chains import RECIPES, build
from mrflow.cli.display import WORDS
from mrflow.cli.parsing import SR_WORDS, load_model, parse_seeds, parse_shift, read_prompts, upscaler
from mrflow.errors import PlanError

if TYPE_CHECKING:
    from mrflow.backbone import Backbone
    from mrflow.model_info import ModelInfo
    from mrflow.spec import Pixels, Start
    from mrflow.stage import Chain
    from mrflow.upscaler import Upscaler

MOST = 1024
ModelName = Annotated[
    str, typer.Option("--model", help="pocket, a hub id (owner/name), a folder, or a file; plan: also flux1-dev, ...")
]
Json = Annotated[bool, typer.Option("--json", help="Results as JSON on stdout.")]


@dataclass(frozen=True)
class FactOptions:
    """What is said of a model where its files do not say it."""

    shift: Annotated[
        str | None,
        typer.Option("--shift", help="Its shift of noise levels: a factor, or Shift(low, high) (default: its own)."),
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

    def load(self, model: str, on_facts: "Callable[[ModelInfo], object] | None" = None) -> "Backbone":
        """The model, as `mrflow.load` finds it; `on_facts` is given its facts before weights are read.

        Raises:
            PlanError: an option cannot be. WeightsError: there is no such model.
        """
        return load_model(
            model, self.device, self.dtype, self.offload, self.storage, self.vae, self.text, self.compile, self.lora,
            parse_shift(self.shift), self.text_tokens, on_facts, self.compute,
        )  # fmt: skip


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


@dataclass(frozen=True)
class ChainOptions(SlotOptions):
    """A chain in the words of the command line."""

    recipe: Annotated[str | None, typer.Option("--recipe", help=f"{RECIPES} (default: paper).")] = None
    size: Annotated[
        str | None,
        typer.Option("--size", help="HEIGHTxWIDTH in pixels, or an aspect such as 16:9 (default: the model's own)."),
    ] = None
    low: Annotated[
        str | None, typer.Option("--low", help="HEIGHTxWIDTH of the low-resolution stage (default: half of --size).")
    ] = None
    ladder: Annotated[
        str | None, typer.Option("--ladder", help="Sizes to climb, such as 128,256,512, instead of --size and --low.")
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

    def net(self) -> "Upscaler | str | None":
        """The upscaler, before any model is read; the word itself for one that is none of pixels, None for none said.

        Raises:
            PlanError: there is no such upscaler. WeightsError: its file is broken.
        """
        return upscaler(self.sr) or self.sr

    def build(self, info: "ModelInfo", net: "Upscaler | str | None") -> "Chain[Start, Pixels]":
        """The chain, with the upscaler that `net` gave.

        Raises:
            PlanError: there is no such chain, or an option does nothing with it.
        """
        words = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("recipe", "sr")}
        return build(self.name, info, sr=net, **words)

    def given(self) -> list[str]:
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

    def pairs(self, words: Sequence[str]) -> list[tuple[str, int]]:
        """Each picture's prompt and seed, from the words of the prompts.

        Raises:
            PlanError: prompts or seeds cannot be read, or they are too many.
        """
        texts, seeds = read_prompts(words), parse_seeds(self.seed, min(self.batch, MOST + 1))
        if (count := len(texts) * max(self.batch, len(seeds))) > MOST:
            raise PlanError(
                f"{count} pictures are more than the {MOST} of one command; mrflow sweep draws more, and resumes"
            )
        return [(text, seed) for text in texts for seed in seeds]


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


def with_options(verb: Callable[..., None]) -> Callable[..., None]:
    """The verb with the fields of each group it takes as options of its own, in place of the parameter.

    Errors that are shown while it runs name its options (`display.WORDS`).
    """
    own, groups = list[inspect.Parameter](), dict[str, type]()
    for p in inspect.signature(verb).parameters.values():
        if isinstance(p.annotation, type) and is_dataclass(p.annotation):
            groups[p.name] = p.annotation
        else:
            own.append(p)
    kind = inspect.Parameter.KEYWORD_ONLY
    for group in groups.values():
        hints = get_type_hints(group, include_extras=True)
        own += [inspect.Parameter(f.name, kind, default=f.default, annotation=hints[f.name]) for f in fields(group)]
    options = {p.name: str(declared[0]) for p in own if (declared := _declared(p.annotation))}

    @wraps(verb)
    def call(**given: Any) -> None:  # noqa: ANN401
        made = {name: group(**{f.name: given.pop(f.name) for f in fields(group)}) for name, group in groups.items()}
        token = WORDS.set(options)
        try:
            verb(**given, **made)
        finally:
            WORDS.reset(token)

    call.__signature__ = inspect.Signature([p.replace(kind=kind) for p in own])  # type: ignore[attr-defined]
    call.__annotations__ = {p.name: p.annotation for p in own}
    return call


def _declared(annotation: Any) -> tuple[str, ...]:  # noqa: ANN401
    """How an option is spelled; nothing for an argument."""
    found = list[object]()
    for each in getattr(annotation, "__metadata__", ()):
        found += [getattr(each, "default", None), *(getattr(each, "param_decls", None) or ())]  # typer puts one there
    return tuple(word for word in found if isinstance(word, str) and word.startswith("--"))

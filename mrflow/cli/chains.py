"""Chains from the words of the command line: recipes, sizes, steps, slots. What does nothing is refused."""

from collections.abc import Callable
from inspect import signature
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar, cast

from mrflow import recipes
from mrflow._checks import check_whole
from mrflow.caches import Cache
from mrflow.cli.options import RECIPE_WORDS, RECIPES
from mrflow.cli.parsing import LATENT, LATENT_FILE, load_file, naming, parse_size, parse_tiles, upscaler
from mrflow.cost import half
from mrflow.decoders.tiny import TinyDecoder
from mrflow.errors import PlanError
from mrflow.guidance import CFG, Distilled, Guidance, check_scale
from mrflow.model_info import ModelInfo
from mrflow.protocols.decoder import Decoder
from mrflow.protocols.upscaler import LatentUpscaler, Upscaler
from mrflow.records.expressions import parse
from mrflow.schedules import Schedule
from mrflow.solvers import Solver
from mrflow.spec import Pixels, Spec, Start
from mrflow.stage import AnyChain, Chain
from mrflow.stages import Decode
from mrflow.upscalers.latent import LatentCheckpoint

T = TypeVar("T")
A = TypeVar("A", bound=Spec)


def build(
    recipe: str,
    info: ModelInfo,
    *,
    size: str | None = None,
    low: str | None = None,
    ladder: str | None = None,
    steps: str | None = None,
    sr: Upscaler | LatentUpscaler | str | None = None,
    schedule: str | None = None,
    guidance: str | None = None,
    decoder: str | None = None,
    **said: Any,  # noqa: ANN401
) -> Chain[Start, Pixels]:
    """A recipe's chain from the words of the command line; `sr` is an upscaler, or its word.

    `said` are its other options: `refine_steps`, `sigma`, `solver`, `cache`, `tiles`; None where not given.

    Raises:
        PlanError: a word cannot be read, or an option does nothing with this recipe.
    """
    net = upscaler(sr) if isinstance(sr, str) else sr
    make, label, names = _recipe(recipe, ladder, size or low, net)
    said |= {"schedule": schedule, "guidance": guidance, "sr": sr, "low": low}
    takes = set(signature(make).parameters) | ({"low"} if make is recipes.speed else set())
    for option, value in said.items():
        if value is not None and names.get(option, option) not in takes:
            raise PlanError(f"--{option.replace('_', '-')} does nothing with {label}; leave it out")
    if said.get("refine_steps") is not None:
        check_whole("--refine-steps", said["refine_steps"], 1, 1000)
    settings = _sizes("low" in takes, info, size, low, ladder)
    count = _counts(make, settings, steps, info)
    settings |= {} if count is None else {"steps": count}
    if schedule is not None:
        usual = signature(make).parameters["steps"].default
        settings["schedule"] = _schedule(schedule, count or usual, steps)
    if guidance is not None:
        settings["guidance"] = parse_guidance(guidance, info)
    if isinstance(net, str | LatentUpscaler):
        settings |= _latents(net, info)
    elif net is not None:
        settings[names.get("sr", "sr")] = net
    own = signature(make).parameters.get(names.get("sigma", "sigma"))
    if own is not None and own.default is not None:
        settings[own.name] = info.sigma
    settings |= {names.get(k, k): said[k] for k in ("refine_steps", "sigma") if said.get(k) is not None}
    settings |= _slots(said)
    return _decoded(make(**settings), decoder, info)


def enlargement(
    size: tuple[int, int],
    net: Upscaler | None,
    info: ModelInfo,
    *,
    sigma: float | None = None,
    refine_steps: int | None = None,
    schedule: str | None = None,
    guidance: str | None = None,
    decoder: str | None = None,
    **said: Any,  # noqa: ANN401
) -> Chain[Pixels, Pixels]:
    """The chain that enlarges a picture to `size`, from the words of the command line (`build`).

    Raises:
        PlanError: a word cannot be read.
    """
    settings: dict[str, Any] = {} if sigma is None else {"sigma": sigma}
    if refine_steps is not None:
        settings["refine_steps"] = refine_steps
    if schedule is not None:
        settings["schedule"] = _schedule(schedule, refine_steps or 1, refine_steps, "--refine-steps")
    if guidance is not None:
        settings["guidance"] = parse_guidance(guidance, info)
    return _decoded(recipes.enlarge(size, net, **settings, **_slots(said)), decoder, info)


def _decoded(chain: Chain[A, Pixels], word: str | None, info: ModelInfo) -> Chain[A, Pixels]:
    """The chain with the decoder of a word in its last stage: a file of a tiny autoencoder, or what `slot` reads.

    Raises:
        PlanError: the word is no decoder. WeightsError: its file holds none.
    """
    if word is None:
        return chain
    file = Path(word).suffix == ".safetensors" or Path(word).is_dir()
    own = TinyDecoder(word, info.space.name) if file else slot("--decoder", word, Decoder)
    *stages, _ = chain
    return cast("Chain[A, Pixels]", AnyChain((*stages, Decode(own))))


def _slots(said: dict[str, Any]) -> dict[str, Any]:
    """Solver, cache and tiles, where they were said."""
    kinds: dict[str, Callable[..., Any]] = {"solver": Solver, "cache": Cache}
    found = {k: slot(f"--{k}", said[k], kind) for k, kind in kinds.items() if said.get(k) is not None}
    return found | ({} if said.get("tiles") is None else {"tiles": parse_tiles(said["tiles"])})


def _latents(word: str | LatentUpscaler, info: ModelInfo) -> dict[str, Any]:
    """How latents are enlarged, by the word of --sr: a filter, the network of a file, or one of the user's own."""
    if isinstance(word, LatentUpscaler):
        return {"upscaler": word}
    if word.startswith(LATENT_FILE):
        return {"upscaler": LatentCheckpoint(word.removeprefix(LATENT_FILE), info.space.name)}
    return {"filter": word.removeprefix(LATENT)}


def _recipe(
    recipe: str, ladder: str | None, sized: str | None, net: Upscaler | LatentUpscaler | str | None
) -> tuple[Callable[..., Chain[Start, Pixels]], str, dict[str, str]]:
    """The function that makes the chain, what people call it, and its arguments that options call otherwise."""
    if recipe not in RECIPES:
        raise PlanError(f"there is no recipe {recipe!r}; use {RECIPE_WORDS}")
    if ladder is not None:
        if sized or recipe != "paper":
            raise PlanError("--ladder gives all sizes, of the recipe paper: leave out --size, --low and --recipe")
        if isinstance(net, str | LatentUpscaler):
            raise PlanError(f"--ladder goes over pixels; --sr {net} does not")
        return recipes.ladder, "--ladder", {"sigma": "sigmas", "sr": "upscalers"}
    if isinstance(net, str | LatentUpscaler):
        if recipe != "paper":
            raise PlanError(f"--sr {net} goes with the recipe paper, not {recipe!r}")
        return recipes.latent, f"--sr {net}", {"sr": "filter"}
    return getattr(recipes, recipe), f"the recipe {recipe}", {"sr": "upscaler"}


def _sizes(two: bool, info: ModelInfo, size: str | None, low: str | None, ladder: str | None) -> dict[str, Any]:
    """The sizes of a recipe, one, two or a ladder, by its arguments; each error names those that were given."""
    if ladder is not None:
        sizes = [parse_size("--ladder", each, info) for each in ladder.split(",")]
        for before, after in pairwise(sizes):
            if not (after[0] > before[0] and after[1] > before[1]):
                raise PlanError(
                    f"--ladder {ladder}: sizes must rise, {_size_text(before)} is followed by {_size_text(after)}"
                )
        return {"sizes": sizes}
    full = parse_size("--size", size, info) if size else info.size
    if not two:
        return {"size": full}
    small = parse_size("--low", low, info) if low else (half(full, info) if size else info.low)
    if not (small[0] < full[0] and small[1] < full[1]):
        whose = f"--size {size}" if size else f"{_size_text(full)}, {info.name}'s own size (--size takes another)"
        raise PlanError(f"--low {low} must be smaller, on both sides, than {whose}")
    return {"low": small, "size": full}


def _size_text(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"


def _counts(make: Callable[..., Any], settings: dict[str, Any], steps: str | None, info: ModelInfo) -> Any:  # noqa: ANN401
    """The steps for a recipe: one count (default: the model's), or one a resolution; None for the recipe's own."""
    if isinstance(signature(make).parameters["steps"].default, int):
        usual = info.native_steps if make is recipes.native else info.staged_steps
        return usual if steps is None else one_count(steps)
    if make not in (recipes.lift, recipes.selflift, recipes.speed):
        return None if steps is None else recipes.counts("--steps", some_counts(steps), 3)
    given = (8, 4) if steps is None else some_counts(steps)
    if make is not recipes.speed:
        return recipes.counts("--steps", given, 2)
    low, size = settings.pop("low"), settings.pop("size")
    settings["sizes"] = (low, size) if len(given) == 2 else ((low[0] // 2, low[1] // 2), low, size)
    return recipes.counts("--steps", given, len(settings["sizes"]))


def some_counts(word: str) -> tuple[int, ...]:
    """Whole numbers, commas between."""
    try:
        return tuple(int(each) for each in word.split(","))
    except ValueError:
        raise PlanError(f"--steps takes a count, or counts for each resolution such as 8,4; got {word!r}") from None


def one_count(word: str) -> int:
    """A single count."""
    found = some_counts(word)
    if len(found) != 1:
        raise PlanError(f"--steps {word} gives counts for each resolution; this recipe takes one count")
    check_whole("--steps", found[0], 1, 1000)
    return found[0]


def _schedule(
    word: str, count: int | tuple[int, ...] | None, said: str | int | None, option: str = "--steps"
) -> Schedule:
    """The schedule of a word; one without steps has `count`, which was `said` by an option or is the recipe's.

    Raises:
        PlanError: it is none, or has steps of its own beside --steps.
    """
    if count is None:
        return slot("--schedule", word, Schedule)
    number = count if isinstance(count, int) else sum(count)
    found = slot("--schedule", word, Schedule, steps=number)
    if said is not None and isinstance(count, int) and found == slot("--schedule", word, Schedule, steps=number + 1):
        raise PlanError(f"--schedule {word} has steps of its own; leave out {option} {said}, or the schedule's")
    return found


def parse_guidance(word: str, info: ModelInfo) -> Guidance:
    """A guidance from its word. A number is the model's own way: `Distilled` where it has an embedding, else `CFG`.

    Raises:
        PlanError: it is neither.
    """
    try:
        value = float(word)
    except ValueError:
        return slot("--guidance", word, Guidance)
    check_scale("--guidance", value)
    return Distilled(value) if info.guidance is not None else CFG(value, rescale=info.rescale)


def slot(option: str, word: str, kind: Callable[..., T], **fill: object) -> T:
    """The slot that a word describes (`mrflow.parse`); `file.py:` before it gives it the names of that file.

    Raises:
        PlanError: it is none.
    """
    file, colon, rest = word.partition(".py:")
    names = load_file(Path(f"{file}.py")) if colon else {}
    with naming(option):
        return parse(rest if colon else word, kind, names=names, **fill)

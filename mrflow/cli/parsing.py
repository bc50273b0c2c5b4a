"""From the words of the command line to objects: models, upscalers, sizes, prompts, seeds, files."""

import ast
import importlib.util
import os
import sys
import traceback
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import is_dataclass
from fractions import Fraction
from math import gcd
from pathlib import Path

import torch

from mrflow import models
from mrflow.backbone import Backbone
from mrflow.checkpoints.adapters import Lora
from mrflow.cli.options import SR_WORDS, DrawOptions, ModelOptions
from mrflow.errors import MrflowError, PlanError
from mrflow.machine.failures import name_stage, passes, words_of
from mrflow.model_info import ModelInfo, Shift
from mrflow.models.offload import check_offload
from mrflow.models.pocket.model import embedded_file
from mrflow.protocols.upscaler import LatentUpscaler, Upscaler
from mrflow.records.expressions import parse
from mrflow.records.pictures import batch_paths, check_writable
from mrflow.records.publish import publish, publish_numbered
from mrflow.spec import check_size
from mrflow.spec import size as size_of
from mrflow.stage import AnyChain, Chain, Stage
from mrflow.stages import Tiles
from mrflow.upscalers import BasicSR, Interpolate, Lanczos, load_upscaler, shelf

MOST = 1024  # pictures of one command


def is_embedded(where: str) -> bool:
    """Whether a model is one that comes with everything."""
    return bool(embedded_file(where)) or models.is_pocket(Path(where)) or not (Path(where).exists() or "/" in where)


def without_upscaler(where: str) -> MrflowError:
    """Why a model that does not come with everything cannot draw without --sr: what is wrong with its file goes first.

    Raises:
        MrflowError: what lies there is no model.
    """
    if Path(where).exists():
        models.info(where)
    return PlanError(f"{where} comes without a super-resolution net; choose one: --sr {SR_WORDS}")


def load_model(where: str, options: ModelOptions, on_facts: Callable[[ModelInfo], object] | None = None) -> Backbone:
    """The model, as `mrflow.load` finds it; `on_facts` is given its facts before weights are read.

    Raises:
        PlanError: an option cannot be. WeightsError: there is no such model.
    """
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    dtype, storage, compute = options.dtype, options.storage, options.compute
    if dtype is not None and dtype not in dtypes:
        raise PlanError(f"--dtype takes {', '.join(dtypes)}, got {dtype!r}")
    if storage not in (None, "fp8"):
        raise PlanError(f"--storage takes fp8, got {storage!r}")
    if compute not in (None, "fp8"):
        raise PlanError(f"--compute takes fp8, got {compute!r}")
    return models.load(
        where,
        dtype=dtypes[dtype] if dtype else None,
        device=options.device,
        offload=check_offload(options.offload),
        storage=storage,  # type: ignore[arg-type]  # pyright: ignore  # load says what it takes
        compute=compute,  # type: ignore[arg-type]  # pyright: ignore
        vae=options.vae,
        text=options.text,
        compile=options.compile,
        lora=[parse_lora(word) for word in options.lora or ()],
        shift=parse_shift(options.shift),
        text_tokens=options.text_tokens,
        on_facts=on_facts,
    )


@contextmanager
def naming(option: str) -> Generator[None]:
    """The value of an option is read inside: what is wrong with it is an error that begins with the option."""
    try:
        yield
    except PlanError as error:
        raise error if str(error).startswith(option) else name_stage(error, option) from None


def parse_shift(word: str | None) -> Shift | float | None:
    """A shift from a factor, `Shift(low, high)`, or the name of a published model whose shift it is.

    Raises:
        PlanError: it is none of these.
    """
    if word is None:
        return None
    try:
        return float(word)
    except ValueError:
        known = {facts.name: facts.shift for facts in models.published_models().values()}
    if word in known:
        return known[word]
    try:
        return parse(word, Shift)
    except PlanError as error:
        names = ", ".join(known)
        raise PlanError(f"--shift takes a factor, Shift(low, high), or a model's name ({names}): {error}") from None


def parse_lora(word: str, asked: str = "--lora") -> Lora:
    """An adapter from FILE or FILE:STRENGTH; `asked` is what the user knows the word by.

    Raises:
        PlanError: the strength cannot be.
    """
    path, colon, strength = word.rpartition(":")
    try:
        value = float(strength) if colon and path else None
    except ValueError:
        value = None
    with naming(f"{asked} {word}"):
        return Lora(word) if value is None else Lora(path, value)


def parse_tiles(word: str | None) -> Tiles | None:
    """Tiles of a side in pixels, or of a side and an overlap (default: a quarter of the side): 1024 or 1024,256."""
    if word is None:
        return None
    try:
        found = [int(each) for each in word.split(",")]
    except ValueError:
        found = []
    if len(found) not in (1, 2):
        raise PlanError(f"--tiles takes pixels a side, or side and overlap such as 1024,256; got {word!r}")
    with naming(f"--tiles {word}"):
        return Tiles(found[0], found[1] if len(found) == 2 else found[0] // 4)


MOST_BYTES = 1 << 26  # of a file of prompts
LATENT = "latent-"
LATENT_FILE = "latent:"
FILTERS = ("nearest", "bilinear", "bicubic")
NETWORK_FILES = (".pth", ".pt", ".ckpt", ".bin", ".safetensors", ".param")


def names_network(word: str) -> bool:
    """Whether a word is a file of weights, by its ending: no BasicSR options with weights, no network for latents."""
    options = ".yml:" in word or ".yaml:" in word
    return Path(word).suffix.lower() in NETWORK_FILES and not options and not word.startswith(LATENT_FILE)


def upscaler(name: str | None, asked: str = "--sr") -> Upscaler | LatentUpscaler | str | None:
    """An upscaler by its word; None for the model's own, the word itself for enlarging latents by it.

    `asked` is what the user knows the word by.

    Raises:
        PlanError: the word is none. WeightsError: its file cannot be read.
    """
    if name in (None, "own"):
        return None
    if name == "lanczos":
        return Lanczos(2)
    if name in shelf.KNOWN:
        return load_upscaler(shelf.find_network(name))
    if name in FILTERS:
        return Interpolate(2, name)  # type: ignore[arg-type]  # pyright: ignore
    if name.startswith(LATENT) and name.removeprefix(LATENT) in FILTERS:
        return name
    if name.startswith(LATENT_FILE) and name != LATENT_FILE:
        return name
    if names_network(name):
        return load_upscaler(name)
    file, colon, rest = name.partition(".py:")
    if colon:
        names = load_file(Path(f"{file}.py"))
        own = names.get(rest)
        if not isinstance(own, Upscaler | LatentUpscaler):
            known = sorted(k for k, v in names.items() if isinstance(v, Upscaler | LatentUpscaler))
            upscalers = f"its upscalers are {', '.join(known)}" if known else "it defines none"
            raise PlanError(f"{file}.py has no upscaler {rest!r}; {upscalers}")
        return own
    for ending in (".yml", ".yaml"):
        before, found, after = name.partition(ending)
        if found and (not after or after.startswith(":")):
            return BasicSR(before + found, after.removeprefix(":"))
    raise PlanError(f"{asked} takes {SR_WORDS}; got {name!r}")


def pairs_of(words: Sequence[str], drawing: DrawOptions) -> list[tuple[str, int]]:
    """Each picture's prompt and seed, from the words of the prompts.

    Raises:
        PlanError: prompts or seeds cannot be read, or they are too many.
    """
    texts, seeds = read_prompts(words), parse_seeds(drawing.seed, min(drawing.batch, MOST + 1))
    if (count := len(texts) * max(drawing.batch, len(seeds))) > MOST:
        raise PlanError(
            f"{count} pictures are more than the {MOST} of one command; mrflow sweep draws more, and resumes"
        )
    return [(text, seed) for text in texts for seed in seeds]


def read_prompts(words: Sequence[str]) -> list[str]:
    """Prompts from arguments: one is itself, `@FILE` the lines of a file, `-` those of standard input.

    Empty lines are skipped. A prompt that begins with @ is written @@.

    Raises:
        PlanError: there is no such file, it is no text, or it holds no prompt.
    """
    prompts: list[str] = []
    for word in words:
        if word.startswith("@@"):
            prompts.append(word[1:])
        elif word == "-" or word.startswith("@"):
            prompts += _lines(word)
        else:
            prompts.append(word)
    return prompts


def _lines(word: str) -> list[str]:
    name = "standard input" if word == "-" else word[1:]
    try:
        if word == "-":
            data = sys.stdin.buffer.read(MOST_BYTES + 1)
        else:
            with Path(name).open("rb") as file:
                data = file.read(MOST_BYTES + 1)  # also of a pipe, or of a device that never ends
        if len(data) > MOST_BYTES:
            raise PlanError(f"{name} holds more than {MOST_BYTES >> 20} MiB of prompts; mrflow sweep draws more")
        lines = [line for line in data.decode("utf-8-sig").splitlines() if line.strip()]
    except UnicodeDecodeError:
        raise PlanError(f"the prompts in {name} are not UTF-8 text") from None
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise PlanError(f"{word} names a file of prompts: {why}; a prompt that begins with @ is written @@") from None
    if not lines:
        raise PlanError(f"there is no prompt in {name}; write one a line")
    return lines


def parse_seeds(word: str, batch: int) -> list[int]:
    """The seeds of each prompt: `batch` of them counting up from one, or those of a list such as 1,5,9.

    Raises:
        PlanError: they are no whole numbers, or a list beside --batch.
    """
    try:
        seeds = [int(each) for each in word.split(",")]
    except ValueError:
        raise PlanError(f"--seed takes a whole number, or several such as 1,5,9, got {word!r}") from None
    if batch < 1:
        raise PlanError(f"--batch must be at least 1, got {batch}")
    if len(seeds) == 1:
        return [seeds[0] + i for i in range(batch)]
    if batch > 1:
        raise PlanError(f"--seed {word} gives the seeds of each prompt; leave out --batch {batch}")
    return seeds


def parse_size(option: str, text: str, info: ModelInfo | None = None) -> tuple[int, int]:
    """HEIGHTxWIDTH, one number for a square, or an aspect WIDTH:HEIGHT at about the model's own area."""
    if ":" in text and info is not None:
        area = info.size[0] * info.size[1] / 2**20
        with naming(f"{option} {text}"):
            return size_of(text, megapixels=area, multiple=2 * info.space.multiple)
    parts = text.lower().split("x")
    if len(parts) not in (1, 2) or not all(p.isascii() and p.isdigit() and len(p) < 6 for p in parts):
        raise PlanError(f"{option} must be HEIGHTxWIDTH in pixels, such as 256x256, or an aspect (16:9), got {text!r}")
    height, width = int(parts[0]), int(parts[-1])
    if info is not None:
        with naming(f"{option} {text}"):
            check_size(height, width, info.space)
    return height, width


def check_enlargement(scale: float) -> None:
    """Refuse a --scale that makes no sense."""
    if not 1 <= scale <= 16:
        raise PlanError(f"--scale must be from 1 to 16, got {scale:g}")


def refinement(
    height: int, width: int, scale: float, info: ModelInfo, *, crop: bool
) -> tuple[tuple[int, int], tuple[int, int]]:
    """The part of a picture to take, and the size to bring it to: `scale` times the sides, in whole tokens.

    Raises:
        PlanError: the scale makes no sense, or the picture does not fit and may not be cropped.
    """
    check_enlargement(scale)
    exact = Fraction(scale).limit_denominator(64)
    p, m = exact.numerator, exact.denominator * info.space.multiple
    unit = m // gcd(p, m)
    small = (height // unit * unit, width // unit * unit)
    if 0 in small:
        raise PlanError(
            f"{height}x{width} is too small: {info.name} needs at least {unit} pixels a side at this --scale"
        )
    if small != (height, width) and not crop:
        raise PlanError(
            f"{height}x{width} times {float(exact):g} is not whole tokens of {info.space.multiple} pixels: "
            f"--crop takes the middle {small[0]}x{small[1]}; or cut it yourself, to sides that are multiples of {unit}"
        )
    return small, (int(small[0] * exact), int(small[1] * exact))


def free_path(out: Path | None, default: Path, count: int, force: bool, extras: Sequence[str] = ()) -> Path:
    """Where to write: a name that overwrites nothing, unless forced, in a folder that takes it.

    `extras` are endings of the names that are written beside each picture.
    """

    def names(path: Path) -> list[Path]:
        own = batch_paths(path, count)
        return own + [p.with_stem(p.stem + extra) for p in {path, *own} for extra in extras]

    if out is not None:
        if out.suffix.lower() != ".png":
            raise PlanError(f"--out must end in .png, got {str(out)!r}: only a PNG keeps every bit and the record")
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


def save_free(
    files: Callable[[Path], Mapping[Path, bytes]],
    target: Path,
    out: Path | None,
    default: Path,
    count: int,
    force: bool,
    extras: Sequence[str] = (),
) -> list[Path]:
    """Write what `files` gives for a name, with `free_path`'s promise held to the end: also against other processes.

    A name that mrflow chose takes the next number where another process has taken it meanwhile.

    Raises:
        PlanError: the name that was asked for has been taken.
    """
    if out is None and not force:
        return publish_numbered(files, target, lambda: free_path(None, default, count, False, extras))
    publish(named := files(target), force=force)
    return list(named)


def module_name(file: Path) -> str:
    """What the module of a user's file is called: its stem, unless a module of another file has that name."""
    stem, found = file.stem, sys.modules.get(file.stem)
    if found is not None:
        origin = getattr(found, "__file__", None)
        taken = not getattr(found, OURS, False) and (origin is None or Path(origin) != file.absolute())
    else:
        try:
            spec = importlib.util.find_spec(stem)
        except (ImportError, ValueError, AttributeError):
            spec = None
        taken = spec is not None and (spec.origin is None or Path(spec.origin) != file.absolute())
    return f"file_{stem}" if taken or stem in sys.stdlib_module_names else stem


@contextmanager
def staying() -> Generator[None]:
    """Code of users runs inside: whatever folder it changes to, relative names keep the meaning they had before."""
    try:
        before = os.getcwd()
    except OSError:  # the folder is gone
        yield
        return
    try:
        yield
    finally:
        with suppress(OSError):
            os.chdir(before)


@contextmanager
def blaming(name: str) -> Generator[None]:
    """Code of users runs inside, in no stage: what it raises is an error that begins with a name."""
    try:
        with staying():
            yield
    except BaseException as error:
        if passes(error):
            raise
        raise name_stage(error, name) from error


OURS = "__mrflow_loaded__"


def load_file(file: Path) -> dict[str, object]:
    """The names that a Python file defines. It may import the files beside it; no module is replaced by it.

    Raises:
        PlanError: there is no such file, or it fails. MrflowError: it raised one; the text names file, line, variable.
    """
    file = file.absolute()
    name = module_name(file)
    spec = importlib.util.spec_from_file_location(name, file)
    if not file.is_file() or spec is None or spec.loader is None:
        raise PlanError(f"there is no Python file {file.name} in {file.parent}")
    module = importlib.util.module_from_spec(spec)
    setattr(module, OURS, True)
    sys.modules[name] = module
    if str(file.parent) not in sys.path:
        sys.path.append(str(file.parent))  # last: a neighbour hides no module that is installed
    try:
        with staying():
            spec.loader.exec_module(module)
    except BaseException as error:
        if passes(error):
            raise
        lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == str(file)]
        number = error.lineno if isinstance(error, SyntaxError) and not lines else lines[-1] if lines else None
        where = f"{file.name}{'' if number is None else f', line {number}'}{_assigned(file, number)}"
        if isinstance(error, MrflowError):
            raise name_stage(error, where) from None
        raise PlanError(f"{where}: {type(error).__name__}: {words_of(error)}") from None
    return vars(module)


def _assigned(file: Path, number: int | None) -> str:
    """`, in NAME` for the variable that is assigned in a line of a file."""
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError, OSError, RecursionError):
        return ""
    for node in tree.body:
        if not isinstance(node, ast.Assign | ast.AnnAssign) or number is None:
            continue
        if node.lineno <= number <= (node.end_lineno or node.lineno):
            return f", in {ast.unparse(node.targets[0] if isinstance(node, ast.Assign) else node.target)}"
    return ""


def load_chain(where: str) -> AnyChain:
    """The chain that `file.py:name` names."""
    file, _, name = where.rpartition(":")
    if not file.endswith(".py") or not name:
        raise PlanError(f"a chain is named file.py:name, got {where!r}")
    names = load_file(Path(file))
    if name not in names:
        known = sorted(k for k, v in names.items() if isinstance(v, Chain | Stage))
        chains = f"its chains are {', '.join(known)}" if known else "it defines no chains"
        raise PlanError(f"{file} has no {name!r}; {chains}")
    value = names[name]
    if isinstance(value, Stage):
        return Chain((value,))
    if not isinstance(value, Chain):
        raise PlanError(f"{where} is {type(value).__name__}, not a chain; join stages with >>")
    return value


def own_types(file: Path) -> list[type]:
    """The dataclasses that a Python file defines."""
    return [v for v in load_file(file).values() if isinstance(v, type) and is_dataclass(v)]

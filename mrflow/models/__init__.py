"""Models: what `load` can make, each from its own file."""

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch

from mrflow._checks import check_path, check_whole, is_number
from mrflow.backbone import Backbone
from mrflow.checkpoints.adapters import Lora
from mrflow.checkpoints.blueprint import pause_collection
from mrflow.checkpoints.safetensors import compute_dtype, read_header
from mrflow.errors import MrflowError, PlanError, WeightsError
from mrflow.machine.forks import check_process
from mrflow.model_info import ModelInfo, Offload, Shift
from mrflow.models.family import Family, Loading, families
from mrflow.models.fp8 import check_fp8
from mrflow.models.lora import as_loras, mark_of
from mrflow.models.offload import RuntimeOptions, check_offload
from mrflow.models.pocket.model import SHIPPED, embedded_file, facts, load_pocket
from mrflow.models.sources import find, weights_fingerprint
from mrflow.protocols.upscaler import Upscaler
from mrflow.stage import Chain


@pause_collection()
def load(
    where: str | Path = "pocket",
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "auto",
    offload: Offload = "none",
    storage: Literal["fp8"] | None = None,
    compute: Literal["fp8"] | None = None,
    vae: str | Path | None = None,
    text: str | Path | None = None,
    fold: bool | Chain[Any, Any] = True,
    compile: bool | str | Callable[..., Any] = False,
    graphs: bool = True,
    tile: int | None = None,
    kernels: bool = True,
    upscaler: Upscaler | None = None,
    lora: Lora | str | Path | Sequence[Lora | str | Path] | None = None,
    shift: Shift | float | None = None,
    text_tokens: int | None = None,
    on_facts: Callable[[ModelInfo], object] | None = None,
) -> Backbone:
    """A model ready to run: "pocket", a hub id (`owner/name`, `owner/name@revision`), a folder or a file.

    "pocket" is the newest embedded model; a certain one is loaded by its version, "pocket-4". A folder is a repository
    as diffusers saves it, or one that holds single files; a file is a transformer, whose autoencoder and text encoders
    are beside it or where `vae` and `text` say. Only a hub id touches the network.

    Args:
        dtype: what the transformer computes in; None is the files' own (float32 for pocket, bfloat16 for fp8 files).
        device: "auto" takes CUDA, then MPS, then the CPU.
        offload: "none", "phase" (text encoders leave the device after use, modulations visit it) or "block" (blocks
            visit it one by one).
        storage: "fp8" keeps the blocks' matrices in 8 bits and computes in `dtype`; this changes the pictures a little.
        compute: "fp8" also multiplies in 8 bits, inputs rounded token by token: lossy, and named in every record.
            For GPUs from Ada and Hopper on; a CPU imitates it, which is slow. It implies `storage="fp8"`.
        fold: make the modulations of a schedule once, before its first step; the pictures are the same to the bit. For
            Qwen-Image a chain: those of its levels are made while loading, and kept on disk for the next time, and a
            third of the weights is never loaded; other levels are then refused.
        compile: compile what blocks do between matrix products with torch.compile, once for all resolutions and
            prompts; a string or function is a dynamo backend.
        graphs: on CUDA, replay each step as a graph.
        tile: side of the autoencoder's tiles in latent cells; None works whole, and in tiles only out of memory.
        kernels: on CUDA, where nothing is compiled, Triton's kernels between matrix products; they are held against
            their definitions first.
        upscaler: what `Upscale()` uses when none is named.
        lora: adapters to merge into the weights, a file or `Lora(file, strength)`, or several. A stage takes them too,
            `Sample(..., lora=...)`, and leaves the weights alone.
        shift: the model's curve of noise levels, or a static factor; None is what its scheduler's configuration says,
            or else the published one. Single files have no such configuration.
        text_tokens: how many text tokens FLUX.1 is given; None is 512, of FLUX.1-schnell 256.
        on_facts: called with the model's facts when all headers are checked and no weights are read: plan there, and
            what it raises is raised here.

    Raises:
        WeightsError: there is no such model, or a file is missing, broken, or not what it should be; all headers are
            checked before any weights are read. PlanError: an argument cannot be. ResourceError: the hub says no.
    """
    loras = as_loras(lora)
    chosen = choose_device(device)
    check_process(chosen)
    if dtype not in (None, torch.float32, torch.bfloat16, torch.float16):
        raise PlanError(f"dtype must be torch.float32, torch.bfloat16 or torch.float16, got {dtype}")
    if storage not in (None, "fp8"):
        raise PlanError(f"storage must be None or 'fp8', got {storage!r}")
    if compute not in (None, "fp8"):
        raise PlanError(f"compute must be None or 'fp8', got {compute!r}")
    storage = storage or compute
    runtime = RuntimeOptions(check_offload(offload), bool(fold), compile, graphs, tile, kernels, compute)
    inside = embedded_file(str(where))
    path = check_path("the model", where) if inside is None else inside
    if inside is not None or is_pocket(path):
        given = {
            "offload": offload != "none", "compute": compute, "storage": storage, "vae": vae, "text": text,
            "compile": compile, "fold": isinstance(fold, Chain), "shift": shift is not None,
            "text_tokens": text_tokens is not None,
        }  # fmt: skip
        if odd := [name for name, value in given.items() if value]:
            raise PlanError(f"pocket takes no {odd[0]}: it is one small file")
        return load_pocket(path, device=chosen, dtype=dtype or torch.float32, loras=loras, on_facts=on_facts)
    if not path.exists():
        _check_hub_id(str(where))
    files = find(where, vae=vae, text=text)
    working = dtype or compute_dtype(files.transformer)
    if compute is not None:
        check_fp8(chosen, working)
    kept = (str(working).removeprefix("torch."), *([storage] if storage else []))
    version = "/".join((weights_fingerprint(*files.headers), *kept)) + (mark_of(loras) if loras else "")
    chain = fold if isinstance(fold, Chain) else None
    curve = _curve(shift, text_tokens, files.family)
    said = {"compute": compute, "shift": curve, "text": text_tokens}
    version += "".join(f"+{name} {value}" for name, value in said.items() if value is not None)
    files = replace(files, curve=curve or files.curve, text_tokens=text_tokens)
    options = Loading(files, version, working, dtype, chosen, storage, runtime, upscaler, chain, loras, on_facts)
    return files.family.load(options)


def _check_hub_id(where: str) -> None:
    """Refuse what is no file here and can be no model on the hub."""
    hub = next((hub for hub, facts in published_models().items() if facts.name == where), None)
    if hub is not None:
        raise WeightsError(
            f"{where} is a name for planning (mrflow plan --model {where}); to load it, say where its files are: a hub "
            f"id such as {hub}, a folder or a file"
        )
    if "/" not in where or Path(where).suffix == ".safetensors":
        raise WeightsError(
            f"there is no model or file {where!r}; use 'pocket' ({', '.join(SHIPPED)}), a hub id such as "
            "black-forest-labs/FLUX.1-dev, a folder or a safetensors file"
        )


def _curve(shift: Shift | float | None, text_tokens: int | None, family: Family) -> Shift | None:
    """The curve that `shift` means; `text_tokens` is checked beside it."""
    if text_tokens is not None and not family.text_tokens:
        raise PlanError(f"text_tokens= is for FLUX.1; {family.name} is given a prompt's own tokens")
    curve = Shift.fixed(float(shift)) if is_number(shift) else shift
    if not isinstance(curve, Shift | None):
        raise PlanError(f"shift must be a Shift or a factor, got {shift!r}")
    if text_tokens is not None:
        check_whole("text_tokens", text_tokens, 1, 512)
    return curve


def published_models() -> dict[str, ModelInfo]:
    """The facts of published models by their hub ids."""
    return {hub: facts for family in families() for hub, facts in family.published.items()}


def is_pocket(path: Path) -> bool:
    """Whether a file is an embedded model's; a file that cannot be read is not."""
    try:
        return path.is_file() and any(name.startswith("flow.double_blocks.") for name in read_header(path).tensors)
    except MrflowError:
        return False


def info(name: str, *, shift: Shift | float | None = None, text_tokens: int | None = None) -> ModelInfo:
    """A model's facts without its weights: by name, or of a folder or a file from its headers and configs.

    `shift` and `text_tokens` are what `load` takes by these names.

    Raises:
        PlanError: the name is not known. WeightsError: the folder or the file holds no model that is known, or one that
            `load` would refuse.
    """
    path = embedded_file(str(name))
    where = path or check_path("the model", name)
    if path is not None or is_pocket(where):
        if odd := [what for what, value in (("shift", shift), ("text_tokens", text_tokens)) if value is not None]:
            raise PlanError(f"pocket takes no {odd[0]}: it is one small file")
        return facts(read_header(where))
    known = published_models()
    by_name = known | {facts.name: facts for facts in known.values()}
    if name not in by_name and where.exists():
        files = find(where)
        curve = _curve(shift, text_tokens, files.family)
        return files.family.facts(replace(files, curve=curve or files.curve, text_tokens=text_tokens))
    if name not in by_name:
        names = ("pocket", *SHIPPED, *(facts.name for facts in known.values()), *known)
        raise PlanError(f"there is no model {name!r} to plan; known are {', '.join(names)}")
    found = by_name[name]
    curve = _curve(shift, text_tokens, next(f for f in families() if found in f.published.values()))
    if text_tokens is not None and found.architecture is not None:
        found = replace(found, architecture=replace(found.architecture, text_tokens=text_tokens))
    return found if curve is None else replace(found, shift=curve)


def choose_device(device: str | torch.device) -> torch.device:
    """The device to run on; "auto" is CUDA where there is one, then MPS, then the CPU.

    Raises:
        PlanError: the device is not there.
    """
    if str(device) == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    if not re.fullmatch(r"(cpu|mps|cuda(:\d+)?)", str(device)):
        raise PlanError(f"device must be auto, cpu, cuda, cuda:N or mps, got {str(device)!r}")
    chosen = torch.device(device)
    missing = (chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count()) or (
        chosen.type == "mps" and not torch.backends.mps.is_available()
    )
    if missing:
        raise PlanError(f"there is no device {str(device)!r} here; use device='auto'")
    return chosen

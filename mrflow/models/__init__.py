"""Models: what `load` can make, each from its own file."""

import hashlib
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from mrflow._checks import check_whole, is_number
from mrflow.adapters import Lora
from mrflow.backbone import Backbone
from mrflow.cost import levels
from mrflow.errors import MrflowError, PlanError, WeightsError
from mrflow.models.memory import Offload, Ways, check_offload
from mrflow.spec import FLUX, QWEN, SCHNELL, ModelInfo, Shift
from mrflow.stage import Chain
from mrflow.upscaler import Upscaler

if TYPE_CHECKING:
    from mrflow.models.sources import Files

PLANNED: dict[str, ModelInfo] = {info.name: info for info in (FLUX, SCHNELL, QWEN)}
Device = Literal["auto", "cpu", "cuda", "mps"]


def load(
    where: str | Path = "pocket",
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "auto",
    offload: Offload = "none",
    storage: Literal["fp8"] | None = None,
    vae: str | Path | None = None,
    text: str | Path | None = None,
    fold: bool | Chain[Any, Any] = True,
    compile: bool | str | Callable[..., Any] = False,
    graphs: bool = True,
    tile: int | None = None,
    upscaler: Upscaler | None = None,
    lora: Lora | str | Path | Sequence[Lora | str | Path] | None = None,
    shift: Shift | float | None = None,
    text_tokens: int | None = None,
) -> Backbone:
    """A model ready to run: "pocket", a hub id (`owner/name`, `owner/name@revision`), a folder or a file.

    "pocket" is the newest embedded model; a certain one is loaded by its version, "pocket-3". A folder is a repository
    as diffusers saves it, or one that holds single files; a file is a transformer, whose autoencoder and text encoders
    are beside it or where `vae` and `text` say. Only a hub id touches the network.

    Args:
        dtype: what the transformer computes in; None is the files' own (float32 for pocket, bfloat16 for fp8 files).
        device: "auto" takes CUDA, then MPS, then the CPU.
        offload: "none", "phase" (text encoders leave the device after use, modulations visit it) or "block" (blocks
            visit it one by one).
        storage: "fp8" keeps the blocks' matrices in 8 bits and computes in `dtype`; this changes the pictures a little.
        fold: make the modulations of a schedule once, before its first step; the pictures are the same to the bit. For
            Qwen-Image a chain: those of its levels are made while loading, and kept on disk for the next time, and a
            third of the weights is never loaded; other levels are then refused.
        compile: compile each block with torch.compile, once a resolution; a string or function is a dynamo backend.
        graphs: on CUDA, replay each step as a graph.
        tile: side of the autoencoder's tiles in latent cells; None works whole, and in tiles only out of memory.
        upscaler: what `Upscale()` uses when none is named.
        lora: adapters to merge into the weights, a file or `Lora(file, strength)`, or several. A stage takes them too,
            `Sample(..., lora=...)`, and leaves the weights alone.
        shift: the model's curve of noise levels, or a static factor; None is what its scheduler's configuration says,
            or else the published one. Single files have no such configuration.
        text_tokens: how many text tokens FLUX.1 is given; None is 512, of FLUX.1-schnell 256.

    Raises:
        WeightsError: there is no such model, or a file is missing, broken, or not what it should be; all headers are
            checked before any weights are read. PlanError: an argument cannot be. ResourceError: the hub says no.
    """
    from mrflow.models.lora import as_loras, mark_of
    from mrflow.models.pocket.model import SHIPPED, load_pocket, shipped

    loras = as_loras(lora)
    chosen = choose_device(device)
    if dtype not in (None, torch.float32, torch.bfloat16, torch.float16):
        raise PlanError(f"dtype must be torch.float32, torch.bfloat16 or torch.float16, got {dtype}")
    if storage not in (None, "fp8"):
        raise PlanError(f"storage must be None or 'fp8', got {storage!r}")
    ways = Ways(check_offload(offload), bool(fold), compile, graphs, tile)
    inside = shipped(str(where))
    path = Path(where) if inside is None else inside
    if inside is not None or is_pocket(path):
        given = {"offload": offload != "none", "storage": storage, "vae": vae, "text": text, "compile": compile}
        given |= {"fold": isinstance(fold, Chain), "shift": shift is not None, "text_tokens": text_tokens is not None}
        if odd := [name for name, value in given.items() if value]:
            raise PlanError(f"pocket takes no {odd[0]}: it is one small file")
        return load_pocket(path, device=chosen, dtype=dtype or torch.float32, loras=loras)
    if str(where) in PLANNED and not path.exists():
        (hub,) = (key for key, name in HUB_NAMES.items() if name == str(where))
        raise WeightsError(
            f"{where} is a name for planning (mrflow plan --model {where}); to load it, say where its files are: a hub "
            f"id such as {hub}, a folder or a file"
        )
    from mrflow.models.scheduler import shift_of
    from mrflow.models.sources import find, fingerprint
    from mrflow.models.weights import compute_dtype

    if not path.exists() and ("/" not in str(where) or path.suffix == ".safetensors"):
        raise WeightsError(
            f"there is no model or file {str(where)!r}; use 'pocket' ({', '.join(SHIPPED)}), a hub id such as "
            "black-forest-labs/FLUX.1-dev, a folder or a safetensors file"
        )
    files = find(where, vae=vae, text=text)
    working = dtype or compute_dtype(files.transformer)
    kept = (str(working).removeprefix("torch."), *([storage] if storage else []))
    version = "/".join((fingerprint(files.transformer, files.vae), *kept)) + (mark_of(loras) if loras else "")
    chain = fold if isinstance(fold, Chain) else None
    curve = Shift.fixed(float(shift)) if is_number(shift) else shift
    if not isinstance(curve, Shift | None):
        raise PlanError(f"shift must be a Shift or a factor, got {shift!r}")
    if text_tokens is not None:
        check_whole("text_tokens", text_tokens, 1, 512)
    said = {"shift": curve, "text": text_tokens}
    version += "".join(f"+{name} {value}" for name, value in said.items() if value is not None)
    files = replace(files, curve=curve or shift_of(files.scheduler, where), text_tokens=text_tokens)
    return load_found(Loading(files, where, version, working, dtype, chosen, storage, ways, upscaler, chain, loras))


HUB_NAMES = {
    "black-forest-labs/FLUX.1-dev": "flux1-dev",
    "black-forest-labs/FLUX.1-schnell": "flux1-schnell",
    "Qwen/Qwen-Image": "qwen-image",
}


def is_pocket(path: Path) -> bool:
    """Whether a file is an embedded model's; a file that cannot be read is not."""
    from mrflow.models.checkpoint import read_header

    try:
        return path.is_file() and any(name.startswith("flow.double_blocks.") for name in read_header(path).tensors)
    except MrflowError:
        return False


@dataclass(frozen=True)
class Loading:
    """What was asked of `load`, and the files that were found for it.

    `working` is what the transformer computes in; `resting` is where weights are while they are not used.
    """

    files: "Files"
    where: str | Path
    version: str
    working: torch.dtype
    dtype: torch.dtype | None
    device: torch.device
    storage: Literal["fp8"] | None
    ways: Ways
    upscaler: Upscaler | None
    chain: Chain[Any, Any] | None
    loras: tuple[Lora, ...]

    @property
    def resting(self) -> torch.device:
        """Where weights are read to."""
        return torch.device("cpu") if self.ways.offload != "none" else self.device


def load_found(loading: Loading) -> Backbone:
    """A model from parts that were found: all headers are held against the networks before weights are read."""
    from mrflow.models.sources import FLUX as FLUX_FAMILY

    return load_flux1(loading) if loading.files.family is FLUX_FAMILY else load_qwen(loading)


def load_flux1(loading: Loading) -> Backbone:
    """FLUX.1 from its parts."""
    from mrflow.models.flux_backbone import Flux1, flux1_info
    from mrflow.models.lora import changes, merge
    from mrflow.models.weights import prepare_flux, prepare_vae_flux

    files, where, device, resting = loading.files, loading.where, loading.device, loading.resting
    if loading.chain is not None:
        raise PlanError("fold=chain is for Qwen-Image; FLUX's modulations depend on the prompt too: use fold=True")
    read_vae = prepare_vae_flux(files.vae, dtype=loading.working, device=resting)
    prepared = prepare_flux(files.transformer, dtype=loading.working, device=resting, storage=loading.storage)
    changed = changes(prepared.net, loading.loras, str(where)) if loading.loras else {}
    read_text = None
    if files.text is not None:
        from mrflow.models.text import TextFiles, prepare_text

        assert isinstance(files.text, TextFiles)
        read_text = prepare_text(files.text, dtype=loading.dtype, device=resting)
    vae, flow, text = read_vae(), prepared.read(), None if read_text is None else read_text()
    merge(flow, changed)
    info = flux1_info(flow, vae, text, files.curve, files.text_tokens, version=loading.version, path=where)
    return Flux1(flow=flow, vae=vae, text=text, info=info, device=device, ways=loading.ways, upscaler=loading.upscaler)


def load_qwen(loading: Loading) -> Backbone:
    """Qwen-Image from its parts."""
    from mrflow.models.base import count
    from mrflow.models.lora import changes, merge
    from mrflow.models.qwen_backbone import Qwen, qwen_facts, qwen_info
    from mrflow.models.weights_qwen import prepare_qwen, prepare_vae_qwen

    files, where, device, resting = loading.files, loading.where, loading.device, loading.resting
    if files.text_tokens is not None:
        raise PlanError("text_tokens= is for FLUX.1; Qwen-Image is given a prompt's own tokens")
    read_vae = prepare_vae_qwen(files.vae, dtype=loading.working, device=resting)
    prepared = prepare_qwen(files.transformer, dtype=loading.working, device=resting, storage=loading.storage)
    parameters = count(prepared.net)
    changed = changes(prepared.net, loading.loras, str(where)) if loading.loras else {}
    linears = {id(module) for module in prepared.net.modulators()}
    touched = [path for path in changed if id(prepared.net.get_submodule(path)) in linears]
    if loading.chain is not None and touched:
        raise PlanError(f"the LoRA changes modulations ({touched[0]}), which fold=chain never loads: use fold=True")
    read_text = None
    if files.text is not None:
        from mrflow.models.text_qwen import QwenTextFiles, prepare_text_qwen

        assert isinstance(files.text, QwenTextFiles)
        read_text = prepare_text_qwen(files.text, dtype=loading.dtype, device=resting)
    vae, made = read_vae(), None
    if loading.chain is None:
        flow = prepared.read()
    else:
        asked = levels(loading.chain, qwen_facts(vae, files.curve))
        key = hashlib.sha256(repr((loading.version, asked)).encode()).hexdigest()[:16]
        flow, made = prepared.read_folded(asked, device=device, keep=cache_folder() / f"modulation-{key}.safetensors")
    merge(flow, changed)
    text = None if read_text is None else read_text()
    info = qwen_info(flow, vae, text, files.curve, version=loading.version, parameters=parameters)
    return Qwen(
        flow=flow,
        vae=vae,
        text=text,
        info=info,
        device=device,
        ways=loading.ways,
        upscaler=loading.upscaler,
        tables=made,
    )


def cache_folder() -> Path:
    """Where results that can be made again are kept: $MRFLOW_CACHE, or mrflow in the user's cache folder."""
    if own := os.environ.get("MRFLOW_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "mrflow"


def info(name: str) -> ModelInfo:
    """A model's facts by name, without weights. Of a folder or a file, the published facts of what its headers show.

    Raises:
        PlanError: the name is not known. WeightsError: the folder or the file holds no model that is known.
    """
    from mrflow.models.checkpoint import read_header
    from mrflow.models.pocket.model import SHIPPED, facts, shipped

    path = shipped(name)
    if path is not None:
        return facts(read_header(path))
    path = Path(name)
    if name not in PLANNED and path.exists():
        from mrflow.models.sources import QWEN, find

        if is_pocket(path):
            return facts(read_header(path))
        files = find(path)
        guided = any("guidance" in tensor for tensor in files.transformer.tensors)
        return PLANNED["qwen-image" if files.family is QWEN else "flux1-dev" if guided else "flux1-schnell"]
    if name not in PLANNED and name not in HUB_NAMES:
        known = ("pocket", *SHIPPED, *PLANNED, *HUB_NAMES)
        raise PlanError(f"there is no model {name!r} to plan; known are {', '.join(known)}")
    return PLANNED[HUB_NAMES.get(name, name)]


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

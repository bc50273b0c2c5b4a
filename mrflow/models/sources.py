"""Where the parts of a model lie: a hub repository, a folder, or single files; found and checked before any is read.

Nothing here touches the network unless a hub id was given, and then huggingface_hub alone does (its cache,
`HF_HUB_OFFLINE`, its progress bars).
"""

import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from mrflow._checks import check_path
from mrflow.checkpoints.configs import read_config
from mrflow.checkpoints.hub import first_line
from mrflow.checkpoints.safetensors import Header, checkpoints_in, open_checkpoint, readable
from mrflow.errors import ResourceError, WeightsError
from mrflow.models.family import Family, Files, families
from mrflow.models.headers import kind, looks_like, part, refuse_kind
from mrflow.models.scheduler import shift_of
from mrflow.records.files import spelled

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?")
PATTERNS = [
    "model_index.json",
    *(f"{part}/*.{ending}" for part in ("transformer", "vae") for ending in ("json", "safetensors")),
    *(f"{part}/*.{ending}" for part in ("text_encoder", "text_encoder_2") for ending in ("json", "safetensors")),
    "tokenizer/*",
    "tokenizer_2/*",
    "scheduler/*.json",
]
VAE_PREFIXES = ("vae.", "first_stage_model.")


def find(where: str | Path, *, vae: str | Path | None = None, text: str | Path | None = None) -> Files:
    """The parts of a model in a hub repository (`owner/name` or `owner/name@revision`), a folder or a single file.

    `vae` and `text` say where the autoencoder and the text encoders are, where they are not beside the transformer.

    Raises:
        WeightsError: a part is missing, there are several, or it is not what it should be.
        ResourceError: a hub repository cannot be had.
    """
    path = check_path("the model", where)
    if not path.exists():
        if not HUB_ID.fullmatch(str(where)) or path.suffix == ".safetensors":
            raise WeightsError(f"there is no file or folder {where}")
        path = fetch(str(where))
    if path.is_dir() and spelled(path, "transformer").is_dir():
        files = _repository(path, vae, text)
    elif vae is None and spelled(path, "config.json").is_file() and spelled(path.parent, "vae").is_dir():
        files = _repository(path.parent, vae, text)
    else:
        files = _loose(path, vae, text)
    _fit(files)
    return files


def fetch(repository: str) -> Path:
    """The local folder of a hub repository, with the files that a model needs and no others."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    name, _, revision = repository.partition("@")
    try:
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=PATTERNS))
    except GatedRepoError:
        raise ResourceError(
            f"{name} is gated: accept its licence on huggingface.co and log in with `hf auth login`"
        ) from None
    except LocalEntryNotFoundError as error:
        raise ResourceError(
            f"{name} is not in the local cache and cannot be fetched ({first_line(error)}); with HF_HUB_OFFLINE=1 "
            "nothing is ever fetched"
        ) from None
    except RepositoryNotFoundError:
        raise WeightsError(f"there is no folder {name}, and no such repository on the hub that you may see") from None
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise ResourceError(f"{name} cannot be fetched: {first_line(error)}") from error


def _repository(folder: Path, vae: str | Path | None, text: str | Path | None) -> Files:
    """A folder as diffusers saves a pipeline."""
    index = spelled(folder, "model_index.json")
    name = read_config(index).get("_class_name", "") if index.is_file() else None
    if name is not None and not (isinstance(name, str) and name.isidentifier()):
        raise WeightsError(f"{index} names no pipeline of diffusers: its _class_name is {name!r}")
    known = [family.pipelines for family in families() if family.pipelines]
    if name is not None and all(name not in pipelines for pipelines in known):
        raise WeightsError(
            f"{folder} holds a {name}; mrflow loads {' and '.join(pipelines[0] for pipelines in known)} repositories"
        )
    transformer = open_checkpoint(spelled(folder, "transformer"))
    family = family_of(transformer)
    if name is not None and name not in family.pipelines:
        raise WeightsError(f"{folder} says it holds a {name}, but its transformer is {family.transformer}")
    if vae is None and not spelled(folder, "vae").is_dir():
        raise WeightsError(f"{folder} has no vae folder; say where the autoencoder is: vae=")
    auto = part(open_checkpoint(vae or spelled(folder, "vae")), family.autoencoder)
    scheduler = spelled(spelled(folder, "scheduler"), "scheduler_config.json")
    encoders = (spelled(folder, name) for name in ("text_encoder", "text_encoder_2"))
    words = text or (folder if any(encoder.is_dir() for encoder in encoders) else None)
    settings = read_config(scheduler) if scheduler.is_file() else {}
    curve = shift_of(settings, folder)
    flow = part(transformer, family.transformer)
    return Files(family, flow, auto, find_words(words, family), settings, str(folder), curve)


def _loose(path: Path, vae: str | Path | None, text: str | Path | None) -> Files:
    """Single files, in a folder or named: each is known by its keys."""
    folder = path if path.is_dir() else path.parent
    if path.is_dir():
        headers = readable(checkpoints_in(folder))
        found = [h for h in headers.values() if any(looks_like(h, family.transformer) for family in families())]
        transformer = _only(found, folder, headers)
    else:
        headers = {}
        transformer = open_checkpoint(path)
    family = family_of(transformer)
    if vae is not None:
        auto = open_checkpoint(vae)
    elif any(name.startswith(VAE_PREFIXES) for name in transformer.tensors) or looks_like(
        transformer, family.autoencoder
    ):
        auto = transformer
    else:
        near = readable(_beside(folder, transformer.path)).values()
        fitting = [header for header in near if looks_like(header, family.autoencoder)]
        own = part(transformer, family.transformer)
        fitting = [
            h for h in fitting if _latents(part(h, family.autoencoder)) == _tokens(own, family)[1] // 4
        ] or fitting
        if not fitting:
            raise WeightsError(f"there is no {family.name} autoencoder beside {path}; say where it is: vae=")
        auto = _only(fitting, folder, {})
    found_words = text
    if text is None and spelled(folder, "tokenizer").is_dir():
        found_words = folder
    flow, auto = part(transformer, family.transformer), part(auto, family.autoencoder)
    return Files(family, flow, auto, find_words(found_words, family), {}, str(path))


def _beside(folder: Path, path: Path) -> list[Path]:
    """Checkpoints in a folder that may be the autoencoder: small enough, and not the transformer itself."""
    names = [p for p in checkpoints_in(folder) if p != path and p.is_file() and p.stat().st_size < 1 << 30]
    return names + [p for p in (spelled(folder, "vae"),) if p.is_dir()]


def _only(found: Sequence[Header], folder: Path, headers: Mapping[Path, Header]) -> Header:
    if len(found) == 1:
        return found[0]
    if not found:
        names = ", ".join(f"{p.name} ({kind(h) or 'unknown'})" for p, h in headers.items()) or "no safetensors file"
        wanted = " and no ".join(family.transformer.removeprefix("a ") for family in families())
        raise WeightsError(f"{folder} holds no {wanted}; it holds {names}")
    raise WeightsError(f"{folder} holds several, name one: {', '.join(h.path.name for h in found)}")


# Names of the decoder's first convolution.
DECODERS = ("decoder.conv_in.weight", "decoder.conv1.weight")


def _sizes(header: Header, names: Sequence[str]) -> tuple[int, ...]:
    """The shape of the first of these tensors that is there, as a matrix at least; (0, 0) where none is."""
    shapes = [header.tensors[name].shape for name in names if name in header.tensors]
    return shapes[0] if shapes and len(shapes[0]) > 1 else (0, 0)


def _tokens(transformer: Header, family: Family) -> tuple[int, int]:
    """Channels of the tokens that a transformer takes and gives, by the names of its own layout or the published."""
    takes, gives = ((name, *family.names(name)) for name in (family.takes, family.gives))
    return _sizes(transformer, takes)[1], _sizes(transformer, gives)[0]


def _latents(vae: Header) -> int:
    """Channels of an autoencoder's latents."""
    return _sizes(vae, DECODERS)[1]


def _fit(files: Files) -> None:
    """Refuse an autoencoder whose latents are not what the transformer works on, by their channels."""
    transformer, vae = files.transformer, files.vae
    (takes, gives), latents = _tokens(transformer, files.family), _latents(vae)
    if not (takes and gives and latents):
        return  # what is missing is named when names are compared
    if takes != gives:
        raise WeightsError(
            f"{transformer.path} takes {takes} channels a token and gives {gives}: models with an image condition "
            "(Fill, Canny, Depth) are not supported"
        )
    if 4 * latents != gives:
        whose = {4: ", as Stable Diffusion's and SDXL's", 32: ", as FLUX.2's"}.get(latents, "")
        raise WeightsError(
            f"the autoencoder {vae.path} has {latents} latent channels{whose}; the transformer needs {gives // 4}: say "
            "where its own is, vae="
        )


def family_of(transformer: Header) -> Family:
    """The family of a transformer, or WeightsError where it is none."""
    for family in families():
        if looks_like(transformer, family.transformer):
            return family
    refuse_kind(transformer, " or ".join(family.transformer for family in families()))


def find_words(where: str | Path | None, family: Family) -> object:
    """The text encoders and tokenizers in a folder or hub repository."""
    if where is None:
        return None
    path = check_path("text", where)
    if not path.exists() and HUB_ID.fullmatch(str(where)):
        path = fetch(str(where))
    return family.find_text(path)


def weights_fingerprint(*headers: Header) -> str:
    """Twelve hex digits that change with names, shapes and the first values of every tensor; reads little.

    What lies deeper in a tensor is told by `mrflow.models.digests`, which reads all of it.
    """
    digest = hashlib.sha256()
    for header in headers:
        for file in sorted({entry.file for entry in header.tensors.values()}):
            entries = [(n, e) for n, e in sorted(header.tensors.items()) if e.file == file]
            digest.update(repr([(n, str(e.dtype), e.shape) for n, e in entries]).encode())
            with file.open("rb") as f:
                for _, entry in sorted(entries, key=lambda item: item[1].start):
                    f.seek(entry.start)
                    digest.update(f.read(4096))
    return digest.hexdigest()[:12]

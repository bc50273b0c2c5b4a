"""Networks by a short name: a file that the user gave once (`mrflow sr add FILE`), kept in a folder of mrflow's own."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mrflow.errors import PlanError, ResourceError, WeightsError
from mrflow.records.files import user_folder
from mrflow.records.publish import publish
from mrflow.upscalers.ncnn import weights_beside
from mrflow.upscalers.nets import CompactParams, RRDBParams
from mrflow.upscalers.weights import network, read_state


@dataclass(frozen=True)
class Known:
    """A published network: what it is called, the file to get, and its sizes."""

    title: str
    file: str
    params: RRDBParams | CompactParams
    licence: str = "BSD-3-Clause"
    source: str = "the releases of github.com/xinntao/Real-ESRGAN"


KNOWN: Mapping[str, Known] = {
    "realesrgan-x4": Known("Real-ESRGAN x4plus", "RealESRGAN_x4plus.pth", RRDBParams()),
    "anime": Known("Real-ESRGAN x4plus anime 6B", "RealESRGAN_x4plus_anime_6B.pth", RRDBParams(blocks=6)),
    "video": Known("Real-ESRGAN animevideov3", "realesr-animevideov3.pth", CompactParams(convs=16)),
}
SUFFIXES = (".safetensors", ".pth", ".param")


def folder() -> Path:
    """Where they are kept: `$MRFLOW_SR`, else `mrflow/sr` in the user's data folder (XDG)."""
    named = os.environ.get("MRFLOW_SR")
    return Path(named) if named else user_folder("XDG_DATA_HOME", ".local/share") / "mrflow" / "sr"


def find_network(name: str) -> Path:
    """The file that was added under a name of `KNOWN`.

    Raises:
        PlanError: none was; it says which file to get, where, and how to add it.
    """
    for suffix in SUFFIXES:
        path = folder() / f"{name}{suffix}"
        if path.is_file():
            return path
    known = KNOWN[name]
    raise PlanError(
        f"{known.title} was not added yet: get {known.file} from {known.source} ({known.licence}), "
        f"then `mrflow sr add {known.file}`"
    )


def add(file: Path, name: str | None = None) -> tuple[str, Path]:
    """Copy a network's file (with its weights beside it, where it is ncnn's) to where `find_network` finds it.

    `name` is one of `KNOWN`; None recognises it by the file's name. The file stays where it is. Returns the name and
    the copy.

    Raises:
        WeightsError: it is no such network, or another one than the name says.
        PlanError: the name is unknown, or taken by another file.
        ResourceError: it cannot be copied.
    """
    net = network(read_state(file), file)
    word = name or _describe(file)
    if word is None or word not in KNOWN:
        raise PlanError(f"say which one {file.name} is: --name {', '.join(KNOWN)}")
    known = KNOWN[word]
    if net is None or net.params != known.params:
        raise WeightsError(f"{file} is not {known.title}: its network is {net.params if net else 'of another kind'}")
    target = folder() / f"{word}{file.suffix if file.suffix in SUFFIXES else '.pth'}"
    sources = {target: file}
    if file.suffix == ".param":  # the half that `find_network` looks for comes last
        sources = {target.with_suffix(".bin"): weights_beside(file), **sources}
    taken = [path for suffix in (*SUFFIXES, ".bin") if (path := folder() / f"{word}{suffix}").exists()]
    if taken:
        raise PlanError(f"{word} is taken by {taken[0]}: remove that file first if you want another")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        data = {to: source.read_bytes() for to, source in sources.items()}
    except OSError as error:
        raise ResourceError(f"{file} cannot be copied to {target}: {error.strerror or error}") from None
    publish(data)
    return word, target


def _describe(file: Path) -> str | None:
    stem = file.stem.lower()
    if "animevideo" in stem:
        return "video"
    if "anime" in stem:
        return "anime"
    return "realesrgan-x4" if "x4plus" in stem else None

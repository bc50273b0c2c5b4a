"""Puts the trained parts into the files that mrflow ships, in half precision."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save
from torch import Tensor

from experiments.train_pocket.autoencoder import State
from experiments.train_pocket.loop import log
from mrflow.checkpoints.safetensors import read_header
from mrflow.records.pictures import write_bytes

LARGEST = 15_000_000  # bytes of a file in the repository


def digest(tensors: Mapping[str, Tensor]) -> str:
    """Twelve hex digits that tell these weights from others, in whatever order they come."""
    found = hashlib.sha256()
    for key, tensor in sorted(tensors.items()):
        found.update(key.encode() + tensor.numpy().tobytes())
    return found.hexdigest()[:12]


def write_once(path: Path, tensors: dict[str, Tensor], facts: Mapping[str, str]) -> None:
    """Write a file whose metadata are `facts`; one of the same version stays as it is."""
    if path.exists() and read_header(path).metadata.get("version") == facts["version"]:
        return
    data = save(tensors, metadata=dict(facts))
    write_bytes(path, data)
    log.info("%s: %.2f MB, %s", path, len(data) / 1e6, facts["version"])


def export(name: str, flow: State, autoencoder: State, sr: State, path: Path, facts: Mapping[str, str]) -> str:
    """Write the model's file; gives its version: the name and a digest of the weights.

    What is larger than `LARGEST` is written as two: NAME-autoencoder.safetensors holds the networks of pixels.
    """
    parts: dict[str, State] = {"autoencoder": autoencoder, "flow": {}, "sr": sr, "text": {}}
    for key, value in flow.items():  # keys begin with text. or flow.
        part, _, rest = key.partition(".")
        parts[part][rest] = value
    tensors = {
        f"{part}.{key}": v.half().contiguous() for part, state in parts.items() for key, v in sorted(state.items())
    }
    version = f"{name}+{digest(tensors)}"
    facts = {"version": version, **facts}
    if sum(t.nbytes for t in tensors.values()) <= LARGEST:
        write_once(path, tensors, facts)
        return version
    apart = {key: t for key, t in tensors.items() if key.startswith(("autoencoder.", "sr."))}
    write_once(path.with_name(f"{path.stem}-autoencoder.safetensors"), apart, {"version": version})
    write_once(path, {key: t for key, t in tensors.items() if key not in apart}, facts)
    return version

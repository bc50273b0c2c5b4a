"""Adapters of a transformer's weights as values: named in a chain or when a model is loaded, read when used."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, cast

from mrflow._checks import check_whole, is_number, require
from mrflow.checkpoints.hub import located_folder
from mrflow.checkpoints.lora import read_adapter
from mrflow.errors import MrflowError, PlanError
from mrflow.records.files import expand_home


@dataclass(frozen=True)
class Lora:
    """A low-rank adapter (LoRA) in a safetensors file, with the strength it is added with.

    `path` is a file, or `owner/name/file.safetensors` on the hub. Nothing is read before it is used; a record holds the
    file's name and SHA-256. Files that also change text encoders are refused unless `skip_text` leaves those parts out.
    """

    path: str
    strength: float = 1.0
    skip_text: bool = field(default=False, kw_only=True)
    sha256: str = field(default="", kw_only=True)

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", str(self.path))
        require(is_number(self.strength, -100, 100), "strength", "a number from -100 to 100", self.strength)

    def to_record(self) -> dict[str, object]:
        """The fields that go into a record: no folder names."""
        digest = self.sha256 or read_adapter(self.path)[1]
        return {
            "path": Path(self.path).name,
            "strength": float(self.strength),
            "skip_text": self.skip_text,
            "sha256": digest,
        }


@dataclass(frozen=True)
class PiFlow:
    """A pi-Flow adapter (Chen et al. 2025, arXiv 2510.14974): the network gives a policy instead of a velocity.

    `path` is a folder as published (config.json and one safetensors file), that file, or `owner/name/folder` on the
    hub. The stage's schedule says where the network is asked, `FlowMap(steps)` as it was trained; between, the policy
    is followed in `substeps` small steps to a unit of time. `temperature` narrows Gaussian policies on all steps but
    the last: "auto" is 0.1 (steps - 1) as published, None leaves them as they are.
    """

    path: str
    temperature: float | Literal["auto"] | None = field(default="auto", kw_only=True)
    substeps: int = field(default=128, kw_only=True)
    sha256: str = field(default="", kw_only=True)

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", str(self.path))
        t = self.temperature
        require(t is None or t == "auto" or is_number(t, 0, 1), "temperature", "from 0 to 1, 'auto' or None", t)
        check_whole("substeps", self.substeps, 1, 4096)

    def to_record(self) -> dict[str, object]:
        """The fields that go into a record: no folder names but the adapter's own."""
        file, digest = located_folder(self.path, self.sha256)
        name = file.name if file.parent.name in ("", ".") else f"{file.parent.name}/{file.name}"
        return {
            "path": name,
            "temperature": self.temperature,
            "substeps": self.substeps,
            "sha256": self.sha256 or digest,
        }


Loras = Lora | tuple[Lora, ...] | None


def check_loras(given: object) -> tuple[Lora, ...]:
    """A stage's adapters as a tuple, or PlanError."""
    items = given if isinstance(given, list | tuple) else () if given is None else (given,)
    for item in cast("Sequence[object]", items):
        if not isinstance(item, Lora):
            raise PlanError(f'lora takes Lora("file.safetensors", strength), or several, got {item!r}')
    return tuple(cast("Sequence[Lora]", items))


def flops_per_token(loras: Sequence[Lora]) -> float:
    """Operations that adapters add to a forward, per token; 0 for a file that is not here (yet)."""
    total = 0.0
    for lora in loras:
        try:
            if expand_home(lora.path).is_file():
                total += 2.0 * read_adapter(lora.path, lora.sha256)[0].parameters
        except MrflowError:
            continue
    return total

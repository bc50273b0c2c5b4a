"""Adapters of a transformer's weights as values: named in a chain or when a model is loaded, read when used."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast, runtime_checkable

from mrflow.errors import PlanError

if TYPE_CHECKING:
    from mrflow.backbone import Backbone


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
        s = self.strength
        if isinstance(s, bool) or not isinstance(s, int | float) or not (math.isfinite(s) and abs(s) <= 100):
            raise PlanError(f"strength must be a number from -100 to 100, got {s!r}")

    def recorded(self) -> dict[str, object]:
        """The fields that go into a record: no folder names."""
        from mrflow.models.lora import opened

        digest = self.sha256 or opened(self)[1]
        return {
            "path": Path(self.path).name,
            "strength": float(self.strength),
            "skip_text": self.skip_text,
            "sha256": digest,
        }


@runtime_checkable
class Adaptable(Protocol):
    """A model that can be given adapters."""

    def adapted(self, loras: Sequence[Lora]) -> "Backbone":
        """The same model with these adapters on top; the weights themselves do not change."""
        ...


Loras = Lora | tuple[Lora, ...] | None


def check_loras(given: object) -> tuple[Lora, ...]:
    """A stage's adapters as a tuple, or PlanError."""
    items = given if isinstance(given, list | tuple) else () if given is None else (given,)
    for item in cast("Sequence[object]", items):
        if not isinstance(item, Lora):
            raise PlanError(f'lora takes Lora("file.safetensors", strength), or several, got {item!r}')
    return tuple(cast("Sequence[Lora]", items))


def with_loras(model: "Backbone", loras: Sequence[Lora]) -> "Backbone":
    """The model with these adapters; the model itself where there are none.

    Raises:
        PlanError: the model takes no adapters. WeightsError: one does not fit it.
    """
    if not loras:
        return model
    if not isinstance(model, Adaptable):
        raise PlanError(f"{model.info.name} takes no LoRA; a backbone of your own has adapted(loras) for that")
    return model.adapted(loras)

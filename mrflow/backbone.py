"""The seam between stages and models: four methods, and the condition that goes between them.

`Backbone` is a protocol: a wrapper (a cache, a bridge, a mock) needs no base class.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol, cast, runtime_checkable

import torch
from torch import Tensor

from mrflow.errors import PlanError, WeightsError
from mrflow.flow import Velocity
from mrflow.spec import ModelInfo
from mrflow.upscaler import Upscaler


@dataclass(frozen=True)
class Condition:
    """What a model needs to know of the prompts: named tensors whose first axis is the batch."""

    tensors: Mapping[str, Tensor]

    def __post_init__(self) -> None:
        sizes = {name: t.shape[0] for name, t in self.tensors.items()}
        if len(set(sizes.values())) != 1:
            raise PlanError(f"the tensors of a condition must agree in batch, got {sizes}")

    @property
    def batch(self) -> int:
        """How many prompts."""
        return next(iter(self.tensors.values())).shape[0]

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def repeat(self, batch: int) -> "Condition":
        """The same single prompt for `batch` items; a condition that already has `batch` items is given back."""
        if self.batch == batch:
            return self
        if self.batch != 1:
            raise PlanError(f"a condition for {self.batch} prompts cannot serve a batch of {batch}")
        return Condition({name: t.expand(batch, *t.shape[1:]) for name, t in self.tensors.items()})

    def item(self, index: int) -> "Condition":
        """One item of the batch."""
        return Condition({name: t[index : index + 1] for name, t in self.tensors.items()})

    def save(self, path: str | Path) -> None:
        """Write the encoded prompts as a safetensors file, so that later runs need no text encoder.

        Raises:
            ResourceError: the file cannot be written.
        """
        from mrflow.models.checkpoint import save_file

        save_file(self.tensors, Path(path), metadata={"mrflow": "condition"})

    @staticmethod
    def load(path: str | Path) -> "Condition":
        """What `save` wrote.

        Raises:
            WeightsError: the file is missing, broken, or holds something else.
        """
        from mrflow.models.checkpoint import mapped, read_header

        header = read_header(Path(path))
        if header.metadata.get("mrflow") != "condition":
            raise WeightsError(f"{path} holds no encoded prompts; make one with model.condition([...]).save(path)")
        return Condition({name: mapped(entry, {}).clone() for name, entry in header.tensors.items()})

    def check_finite(self, what: str) -> None:
        """Raise PlanError where a tensor holds NaN or infinity: it would give a black picture minutes later."""
        for name, t in self.tensors.items():
            if t.is_floating_point() and not bool(torch.isfinite(t).all()):
                raise PlanError(f"the {what} condition holds NaN or infinity in {name!r}; encode the prompt again")


@runtime_checkable
class Backbone(Protocol):
    """A model as the stages see it. Its latents are float32 of shape (batch, channels, height, width)."""

    @property
    def info(self) -> ModelInfo:
        """Facts, no weights."""
        ...

    @property
    def device(self) -> torch.device:
        """Where latents and pixels are to live."""
        ...

    @property
    def upscaler(self) -> Upscaler | None:
        """The super-resolution net the model comes with, if any."""
        ...

    def condition(self, prompts: Sequence[str]) -> Condition:
        """Encode prompts, one item each."""
        ...

    def field(self, cond: Condition, *, guidance: float | None = None) -> Velocity:
        """A fresh velocity field (x, sigma) -> d x / d sigma for one integration; what it remembers dies with it.

        `guidance` is the value of a distilled guidance embedding; None is the model's own.
        """
        ...

    def encode(self, pixels: Tensor, noise: Tensor | None = None) -> Tensor:
        """Pixels in [0, 1] to clean latents: the mode of the posterior, or a sample where `noise` is given."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Clean latents to pixels, clamped to [0, 1]."""
        ...


def takes_levels(model: object) -> bool:
    """Whether a model's `field` wants to know, as `levels=`, which noise levels it will be asked for."""
    return getattr(model, "takes_levels", False) is True


class Announced:
    """A model whose fields are told which levels they will be asked for; all else is the model's own."""

    def __init__(self, model: Backbone, levels: Sequence[float]) -> None:
        self._model, self._levels = model, tuple(levels)

    def __getattr__(self, name: str) -> object:
        value = getattr(self._model, name)
        return partial(value, levels=self._levels) if name == "together" else value

    def field(self, cond: Condition, *, guidance: float | None = None) -> Velocity:
        """The model's field, told the levels."""
        field = cast("Callable[..., Velocity]", self._model.field)
        return field(cond, guidance=guidance, levels=self._levels)

"""The seam between stages and models: what a backbone does, the condition it is given, and how its field is asked for.

`Backbone` is a protocol: a model, a bridge or a mock needs no base class. `Wrapper` is one for what stands around
another backbone and changes a little of it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from mrflow._checks import check_path
from mrflow.checkpoints.adapters import Lora, PiFlow
from mrflow.checkpoints.safetensors import map_tensor, read_header, save_file
from mrflow.errors import PlanError, WeightsError
from mrflow.flow import Velocity
from mrflow.model_info import CacheLike, Capabilities, ModelInfo
from mrflow.protocols.upscaler import Upscaler


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
        save_file(self.tensors, check_path("the file", path), metadata={"mrflow": "condition"})

    @staticmethod
    def load(path: str | Path) -> "Condition":
        """What `save` wrote.

        Raises:
            WeightsError: the file is missing, broken, or holds something else.
        """
        header = read_header(check_path("the file", path))
        if header.metadata.get("mrflow") != "condition":
            raise WeightsError(f"{path} holds no encoded prompts; make one with model.condition([...]).save(path)")
        return Condition({name: map_tensor(entry, {}).clone() for name, entry in header.tensors.items()})

    def check_finite(self, what: str) -> None:
        """Raise PlanError where a tensor holds NaN or infinity: it would give a black picture minutes later."""
        for name, t in self.tensors.items():
            if t.is_floating_point() and not bool(torch.isfinite(t).all()):
                raise PlanError(f"the {what} condition holds NaN or infinity in {name!r}; encode the prompt again")


@dataclass(frozen=True, eq=False)
class Positions:
    """Rows and columns (n, 2) of n tokens on a grid of height x width tokens, counted from 0; halves are between.

    A field that is given positions takes its n tokens as latents of one row: (batch, channels, patch, patch n). They
    are `parts` sequences of n / parts tokens, one behind the other; each goes through the network by itself.
    """

    at: Float[Tensor, "n 2"]
    height: int
    width: int
    parts: int = 1

    def __post_init__(self) -> None:
        if len(self.at) % self.parts:
            raise PlanError(f"{len(self.at)} positions are not {self.parts} sequences of equal length")

    def to(self, device: torch.device) -> "Positions":
        """The same positions on a device."""
        return replace(self, at=self.at.to(device))

    def part(self, index: int) -> Float[Tensor, "m 2"]:
        """Where the tokens of one part lie."""
        return self.at.chunk(self.parts)[index]


def split_parts(positions: Positions | None, x: Tensor, *, axis: int = 1) -> tuple[Tensor, ...]:
    """The parts of `positions`, which go through the network one after the other; without positions, all of x.

    `axis` is where parts follow each other: 1 of tokens (b, n, d), -1 of latents of one row.
    """
    if positions is None or positions.parts == 1:
        return (x,)
    return tuple(part.contiguous() for part in x.chunk(positions.parts, axis))


def join_parts(parts: Sequence[Tensor], *, axis: int = 1) -> Tensor:
    """The reverse of `split_parts`: one behind the other; a single one as it is, not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(tuple(parts), axis)


Mix = Callable[[Tensor, Tensor], Tensor]
"""What image tokens are given by attention, (b, heads, n, channels), under the first condition and under the other."""


@dataclass(frozen=True)
class FieldOptions:
    """What an integration knows when it asks for a field. A model is only asked for what its `Capabilities` say.

    `guidance` is the value of a distilled guidance embedding (None: the model's own). `sigmas` are the noise levels of
    all evaluations, in their order, so that what depends on them alone can be made once; empty: not known. `positions`
    says where tokens lie that are on no grid. `cache` leaves evaluations out, `loras` are on in this field alone,
    `policy` has the network give a policy instead of a velocity (the field is then a `PolicyField`). `beside` are
    conditions that are run together with the first: the field takes latents (b, c, h, w) and gives velocities
    (b (1 + n), c, h, w), one condition's items behind another's. `attention` goes with one condition beside: in every
    attention, image tokens go on with what it makes of the two outputs they have, under either condition.

    Raises:
        PlanError: a cache or a policy beside what it cannot be beside, or `attention` without one condition beside.
    """

    guidance: float | None = None
    sigmas: tuple[float, ...] = ()
    positions: Positions | None = None
    cache: CacheLike | None = None
    loras: tuple[Lora, ...] = ()
    policy: PiFlow | None = None
    beside: tuple[Condition, ...] = ()
    attention: Mix | None = None

    def __post_init__(self) -> None:
        if self.cache is not None and self.beside:
            raise PlanError(
                "a cache remembers each branch apart; ask for a field each, not for several conditions at once"
            )
        if self.cache is not None and self.positions is not None and self.positions.parts > 1:
            raise PlanError("a cache remembers one sequence of tokens, not several in turn; leave out one of them")
        if self.policy is not None and (self.cache is not None or self.beside or self.positions is not None):
            raise PlanError("a policy's field takes no cache, positions or other conditions")
        if self.attention is not None and len(self.beside) != 1:
            raise PlanError(f"attention mixes two conditions: one must be beside the first, not {len(self.beside)}")

    @property
    def needs(self) -> Capabilities:
        """What a model must be able to do for it."""
        return Capabilities(
            positions=self.positions is not None,
            cache=self.cache is not None,
            lora=bool(self.loras),
            policy=self.policy is not None,
            together=bool(self.beside),
            attention=self.attention is not None,
        )


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

    def check(self, options: FieldOptions) -> None:
        """Refuse options that cannot be served, before prompts are encoded: `info.require(options.needs)` at the least.

        Raises:
            PlanError: the model cannot. WeightsError: an adapter is missing or does not fit.
        """
        ...

    def field(self, cond: Condition, options: FieldOptions = FieldOptions()) -> Velocity:
        """A fresh velocity field (x, sigma) -> d x / d sigma for one integration; what it remembers dies with it."""
        ...

    def encode(self, pixels: Tensor, noise: Tensor | None = None) -> Tensor:
        """Pixels in [0, 1] to clean latents: the mode of the posterior, or a sample where `noise` is given."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Clean latents to pixels, clamped to [0, 1]."""
        ...


class Wrapper:
    """A backbone around another, which does everything; override what is to differ."""

    def __init__(self, model: Backbone) -> None:
        self.model = model

    @property
    def info(self) -> ModelInfo:
        """The model's facts."""
        return self.model.info

    @property
    def device(self) -> torch.device:
        """Where the model lives."""
        return self.model.device

    @property
    def upscaler(self) -> Upscaler | None:
        """The model's own."""
        return self.model.upscaler

    def condition(self, prompts: Sequence[str]) -> Condition:
        """As the model encodes them."""
        return self.model.condition(prompts)

    def check(self, options: FieldOptions) -> None:
        """As the model does."""
        self.model.check(options)

    def field(self, cond: Condition, options: FieldOptions = FieldOptions()) -> Velocity:
        """The model's field."""
        return self.model.field(cond, options)

    def encode(self, pixels: Tensor, noise: Tensor | None = None) -> Tensor:
        """As the model does."""
        return self.model.encode(pixels, noise)

    def decode(self, latents: Tensor) -> Tensor:
        """As the model does."""
        return self.model.decode(latents)

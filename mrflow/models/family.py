"""What a family of models is: how its files are known, what its tensors are called, what facts follow, how it is built.

A family is one folder and one line in `BUILT_IN`; one of your own is handed to `register`. `plan`, `inspect` and `load`
ask the same family, so that they cannot differ.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch

from mrflow.backbone import Backbone
from mrflow.checkpoints.adapters import Lora
from mrflow.checkpoints.safetensors import Header
from mrflow.errors import PlanError
from mrflow.model_info import ModelInfo, Shift
from mrflow.models.blocks import Transformer
from mrflow.models.offload import RuntimeOptions
from mrflow.protocols.upscaler import Upscaler
from mrflow.stage import Chain

BUILT_IN = (
    "mrflow.models.flux.family:FluxFamily",
    "mrflow.models.qwen.family:QwenFamily",
    "mrflow.models.zimage.family:ZImageFamily",
)


class Family(ABC):
    """One family of models. It holds nothing.

    `transformer` and `autoencoder` are what errors call the two parts ("a FLUX transformer"). `marks` and
    `autoencoder_marks` are tensor names that only such a checkpoint has, in any of the layouts it is published in;
    `text_marks` are those of its text encoders, with what each is. `takes` and `gives` are the parameters of our own
    network that embed tokens and give them, `network` is the class of its transformers, `pipelines` are diffusers'
    classes of its repositories, `published` the facts of its published models by hub id. `text_tokens` says that its
    text has a length of its own to choose.
    """

    name: ClassVar[str]
    transformer: ClassVar[str]
    autoencoder: ClassVar[str]
    marks: ClassVar[tuple[str, ...]]
    autoencoder_marks: ClassVar[tuple[str, ...]]
    text_marks: ClassVar[Mapping[str, str]] = {}
    takes: ClassVar[str] = "img_in.weight"
    gives: ClassVar[str] = "final_layer.linear.weight"
    network: ClassVar[type[Transformer]]
    pipelines: ClassVar[tuple[str, ...]] = ()
    published: ClassVar[Mapping[str, ModelInfo]] = {}
    text_tokens: ClassVar[bool] = False

    @abstractmethod
    def names(self, parameter: str, /) -> tuple[str, ...]:
        """The published names of a parameter, of several where files keep the rows of one matrix apart."""

    def aliases(self, path: str) -> Mapping[str, int | None]:
        """Further names that adapters give to the linear at `path`, with the number of published
        parts whose rows they mean (None: all)."""
        return {}

    def find_text(self, folder: Path, /) -> object:
        """The text encoders in a folder, by their headers.

        Raises:
            WeightsError: they are not there, or not what they should be.
        """
        raise PlanError(f"{self.name} has no text encoders to load; leave out text=")

    @abstractmethod
    def facts(self, files: "Files") -> ModelInfo:
        """All facts but the version, from headers and configs, without reading weights.

        Raises:
            WeightsError: as `load`: names or shapes do not fit.
        """

    @abstractmethod
    def load(self, loading: "Loading") -> Backbone:
        """The model; all headers are held against the networks before weights are read."""

    def describe(self, what: str, header: Header) -> list[str]:
        """Lines for `inspect` about one of its parts (`what` is `transformer` or `autoencoder`)."""
        return []


TOKENIZER = (".json", ".txt", ".model", ".jinja")


@dataclass(frozen=True)
class Files:
    """The parts of a model, by their headers; `text` is None where there are none. `where` is what errors name.

    `curve` is the shift that a configuration or the user states, `text_tokens` the length of a text, where it is given.
    """

    family: Family
    transformer: Header
    vae: Header
    text: object
    scheduler: Mapping[str, Any]
    where: str
    curve: Shift | None = None
    text_tokens: int | None = None

    @property
    def headers(self) -> list[Header]:
        """The checkpoints of all parts."""
        text = [] if self.text is None else [part for part in vars(self.text).values() if isinstance(part, Header)]
        return [self.transformer, self.vae, *text]

    @property
    def paths(self) -> tuple[str, ...]:
        """Every file that a model's pictures depend on: weights, and what its tokenizers are made of."""
        found = {entry.file for header in self.headers for entry in header.tensors.values()}
        folders = [] if self.text is None else [part for part in vars(self.text).values() if isinstance(part, Path)]
        found |= {
            path for folder in folders if folder.is_dir() for path in folder.iterdir() if path.suffix in TOKENIZER
        }
        return tuple(sorted(map(str, found)))


@dataclass(frozen=True)
class Loading:
    """What was asked of `load`, and the files that were found for it.

    `working` is what the transformer computes in; `resting` is where weights are while they are not used.
    `on_facts` is to be given the facts before any weights are read.
    """

    files: Files
    version: str
    working: torch.dtype
    dtype: torch.dtype | None
    device: torch.device
    storage: Literal["fp8"] | None
    runtime: RuntimeOptions
    upscaler: Upscaler | None
    chain: Chain[Any, Any] | None
    loras: tuple[Lora, ...]
    on_facts: Callable[[ModelInfo], object] | None = None

    @property
    def where(self) -> str:
        """What errors name."""
        return self.files.where

    @property
    def resting(self) -> torch.device:
        """Where weights are read to."""
        return torch.device("cpu") if self.runtime.offload != "none" else self.device


_registered: tuple[Family, ...] = ()


@cache
def built_in() -> tuple[Family, ...]:
    """The families that come with mrflow."""
    found = (spec.partition(":") for spec in BUILT_IN)
    return tuple(getattr(import_module(module), name)() for module, _, name in found)


def families() -> tuple[Family, ...]:
    """All families that are known, those of your own first."""
    return (*_registered, *built_in())


def register(family: Family) -> None:
    """Have `load`, `plan` and `inspect` know a family of your own; one of the same name is replaced."""
    global _registered
    _registered = (family, *(f for f in _registered if f.name != family.name))


def family_of_network(net: object) -> Family:
    """The family whose transformer this is.

    Raises:
        PlanError: none that is known.
    """
    for family in families():
        if isinstance(net, family.network):
            return family
    raise PlanError(
        f"{type(net).__name__} is the transformer of no family; hand yours to mrflow.models.family.register"
    )


def marks() -> Iterator[tuple[str, str]]:
    """(tensor name, what has it) of all families: transformers first, for files that hold other networks too."""
    for family in families():
        yield from ((mark, family.transformer) for mark in family.marks)
    for family in families():
        yield from ((mark, family.autoencoder) for mark in family.autoencoder_marks)
    for family in families():
        yield from family.text_marks.items()

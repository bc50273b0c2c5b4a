"""A family of models in a folder of its own: a transformer of two linears, an autoencoder of two convolutions."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import mrflow as mf
from mrflow.checkpoints.safetensors import Header, save_file
from mrflow.model_info import Architecture
from mrflow.models.blocks import Transformer, TransformerParams
from mrflow.models.family import Files
from mrflow.models.headers import layout_by_name
from mrflow.models.latent_model import LatentModel, footprint
from mrflow.models.layers import Merge, Rope
from mrflow.models.prepared import Published, PublishedTransformer
from mrflow.models.transformer_family import TransformerFamily
from mrflow.protocols.pieces import StepFactory
from mrflow.protocols.tokens import pack, unpack

SPACE = mf.LatentSpace("toy-family", 4, 2)


@dataclass(frozen=True)
class ToyParams(TransformerParams):
    """A width of 16; a token is 2 x 2 cells of 4 channels."""

    hidden: int = 16
    heads: int = 2
    axes: tuple[int, ...] = (2, 2, 4)
    mlp_ratio: float = 1.0
    out_channels: int = 16


class ToyNet(Transformer):
    """Tokens to a width, two linears with a residual, and back."""

    def __init__(self) -> None:
        super().__init__()
        self.params = ToyParams()
        self.lift, self.words, self.level = nn.Linear(16, 16), nn.Linear(3, 16), nn.Linear(1, 16)
        self.blocks = nn.ModuleList(nn.Linear(16, 16) for _ in range(2))
        self.out = nn.Linear(16, 16)

    @property
    def dtype(self) -> torch.dtype:
        return self.lift.weight.dtype

    def stack(self) -> list[nn.Module]:
        return list(self.blocks)

    def modulators(self) -> Iterator[nn.Module]:
        yield self.level

    def embed_image(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.lift(tokens)
        return out

    def some_blocks(
        self,
        img: Tensor,
        txt: Tensor,
        rope: Rope,
        modulation: Tensor,
        start: int,
        stop: int,
        *,
        merge: Callable[[str, int], Merge | None] | None = None,
    ) -> tuple[Tensor, Tensor]:
        for block in self.blocks[start:stop]:
            img = img + torch.tanh(block(img + modulation + txt))
        return img, txt

    def head(self, img: Tensor, modulation: Tensor) -> Tensor:
        out: Tensor = self.out(img)
        return out


@dataclass(frozen=True)
class VaeParams:
    """Pixels a latent cell, per side."""

    downscale: int = 2


class ToyVae(nn.Module):
    """Cells of 2 x 2 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.params = VaeParams()
        self.down, self.up = nn.Conv2d(3, 4, 2, 2), nn.ConvTranspose2d(4, 3, 2, 2)

    def moments(self, pixels: Tensor) -> Tensor:
        out: Tensor = self.down(pixels)
        return out

    def posterior(self, moments: Tensor, noise: Tensor | None = None) -> Tensor:
        return moments

    def decode(self, latents: Tensor) -> Tensor:
        return torch.sigmoid(self.up(latents))


class ToyModel(LatentModel):
    """The backbone."""

    def condition(self, prompts: Sequence[str]) -> mf.Condition:
        return mf.Condition({"words": torch.tensor([[float(len(p)), p.count("e"), 1.0] for p in prompts])})

    def conditioning_vector(self, cond: mf.Condition, sigma: float, *, guidance: float | None = None) -> Tensor:
        raise NotImplementedError

    def make_field(self, cond: mf.Condition, options: mf.FieldOptions, step: StepFactory | None) -> mf.Velocity:
        net = self._net
        assert isinstance(net, ToyNet)

        def velocity(x: Tensor, sigma: float) -> Tensor:
            table = net.level(torch.full((1, 1, 1), sigma))
            txt, none = net.words(cond["words"])[:, None], torch.zeros(0)
            img, _ = net.some_blocks(net.embed_image(pack(x)), txt, Rope(none, none), table, 0, 2)
            return unpack(net.head(img, table), x.shape[2] // 2, x.shape[3] // 2)

        return velocity


def toy_names(parameter: str) -> tuple[str, ...]:
    """How the files call a parameter."""
    return (f"toy_{parameter}",)


TRANSFORMER = PublishedTransformer(
    "a Toy transformer",
    names=lambda header: toy_names,
    sizes=lambda header, names: ToyParams(),
    build=lambda sizes, split: ToyNet(),
    layout=layout_by_name,
)
AUTOENCODER = Published(
    "a Toy autoencoder",
    names=lambda header: toy_names,
    sizes=lambda header, names: VaeParams(),
    build=lambda sizes: ToyVae(),
    layout=layout_by_name,
)


class ToyFamily(TransformerFamily):
    """The family."""

    name = "Toy"
    parts = (TRANSFORMER, AUTOENCODER)
    transformer, autoencoder = TRANSFORMER.what, AUTOENCODER.what
    marks = ("toy_lift.weight",)
    autoencoder_marks = ("toy_down.weight",)
    pipelines = ("ToyPipeline",)
    network = ToyNet
    model = ToyModel

    def names(self, parameter: str) -> tuple[str, ...]:
        return toy_names(parameter)

    def info(self, net: ToyNet, vae: ToyVae, text: object, files: Files, parameters: int) -> mf.ModelInfo:
        return mf.ModelInfo(
            "toy-family",
            SPACE,
            files.curve or mf.Shift(0.5, 1.0),
            size=(32, 32),
            low=(16, 16),
            architecture=Architecture(16, 2, 0, 3, 1, parameters),
            footprint=footprint(net, vae, text),
            capabilities=mf.Capabilities(lora=True),
        )

    def describe(self, what: str, header: Header) -> list[str]:
        return [f"sizes     {len(header.tensors)} tensors of a toy"]


def write_repository(folder: Path) -> Path:
    """A repository of the family as diffusers lays them out."""
    torch.manual_seed(0)
    for part, net in (("transformer", ToyNet()), ("vae", ToyVae())):
        (folder / part).mkdir(parents=True)
        save_file({f"toy_{n}": t for n, t in net.state_dict().items()}, folder / part / "model.safetensors")
    (folder / "model_index.json").write_text('{"_class_name": "ToyPipeline"}')
    return folder

"""The decoders of tiny autoencoders that others train, read from a file."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from mrflow._checks import check_path
from mrflow.checkpoints.blueprint import blueprint
from mrflow.checkpoints.safetensors import Entry, Header, Source, chosen_checkpoint, load_into, open_checkpoint
from mrflow.errors import PlanError, WeightsError
from mrflow.protocols.decoder import Decoder
from mrflow.records.files import FileNamed


@dataclass(frozen=True)
class TinyDecoder(FileNamed, Decoder):
    """The decoder of a tiny autoencoder (TAESD, TAEF1; github.com/madebyollin/taesd) from a file of yours.

    `path` is the decoder's own safetensors file, or the whole autoencoder as diffusers' `AutoencoderTiny` saves it, a
    file or a folder. `space` is the name of the latents that it was trained on: TAEF1's are "flux1", which Z-Image
    shares. A record names the file without its folder, and its SHA-256.

    Raises:
        WeightsError: the file is missing, broken, or holds no such decoder.
    """

    path: str
    space: str = "flux1"
    sha256: str = field(default="", kw_only=True)

    def __post_init__(self) -> None:
        where = check_path("the file", self.path)
        if where.is_dir():
            where = chosen_checkpoint(where)
        self.find_file("path", where)
        _ = self.net

    @property
    def net(self) -> "TinyNet":
        """The network, read once for all decoders of the same file."""
        return _tiny(self.path, self.sha256)

    @property
    def scale(self) -> int:
        """2 for each of its enlargements."""
        return self.net.scale

    @property
    def flops_per_pixel(self) -> float:
        """Operations of its convolutions per pixel that it makes."""
        return self.net.flops_per_pixel

    def __call__(self, latents: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 3 H W"]:
        """Decode in float32.

        Raises:
            PlanError: the latents have another number of channels.
        """
        net = self.net.to(latents.device)
        if latents.shape[1] != net.channels:
            raise PlanError(f"{Path(self.path).name} decodes {net.channels} latent channels, got {latents.shape[1]}")
        with torch.inference_mode():
            out: Tensor = net(latents)
        return out


class TinyBlock(nn.Module):
    """ReLU(three convolutions of 3 x 3 + x)."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        sizes = ((width, out), (out, out), (out, out))
        first, second, third = (nn.Conv2d(a, b, 3, padding=1) for a, b in sizes)
        self.conv = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), third)
        self.skip = nn.Conv2d(width, out, 1, bias=False) if width != out else nn.Identity()

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d h w"]:
        """The same sides."""
        return F.relu(self.conv(x) + self.skip(x))


class TinyNet(nn.Module):
    """Latents, softly clamped to 3, through a row of convolutions and blocks; before those without bias, x 2.

    `places` are the numbers of the layers that have parameters, as the file counts them.
    """

    def __init__(self, tensors: Mapping[str, Entry], places: list[int]) -> None:
        super().__init__()
        layers: dict[str, nn.Module] = {}
        self.scale, self.flops_per_pixel, at_scale = 1, 0.0, list[tuple[int, int]]()
        for i in places:
            if f"{i}.conv.0.weight" in tensors:
                out, width = tensors[f"{i}.conv.0.weight"].shape[:2]
                layers[str(i)] = TinyBlock(width, out)
                products = 9 * (width * out + 2 * out * out) + (width * out if width != out else 0)
            else:
                out, width = tensors[f"{i}.weight"].shape[:2]
                layers[str(i)] = nn.Conv2d(width, out, 3, padding=1, bias=f"{i}.bias" in tensors)
                self.scale *= 1 if f"{i}.bias" in tensors else 2
                products = 9 * width * out
            at_scale.append((self.scale, products))
        self.layers = nn.ModuleDict(layers)
        self.flops_per_pixel = sum(2 * products * (scale / self.scale) ** 2 for scale, products in at_scale)
        first = tensors[f"{places[0]}.weight"]
        self.channels = first.shape[1]

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 3 H W"]:
        """Pixels around [0, 1]."""
        x = torch.tanh(x / 3) * 3
        for i, layer in enumerate(self.layers.values()):
            if isinstance(layer, nn.Conv2d) and layer.bias is None:
                x = F.interpolate(x, scale_factor=2.0, mode="nearest")
            x = layer(x)
            x = F.relu(x) if i == 0 else x
        return x


PREFIXES = ("decoder.layers.", "decoder.", "")  # diffusers' whole autoencoder, TAESD's whole one, its decoder alone


@lru_cache(maxsize=8)
def _tiny(path: str, sha256: str) -> TinyNet:
    header = open_checkpoint(path)
    prefix = next((p for p in PREFIXES if any(re.match(rf"{re.escape(p)}\d+\.", n) for n in header.tensors)), None)
    own = {n.removeprefix(prefix): e for n, e in header.tensors.items() if prefix is not None and n.startswith(prefix)}
    places = sorted({int(name.partition(".")[0]) for name in own if name[0].isdigit()})
    ends = [own[f"{i}.weight"].shape for i in places[:1] + places[-1:] if {f"{i}.weight", f"{i}.bias"} <= set(own)]
    if len(ends) < 2 or any(len(shape) != 4 or not math.prod(shape) for shape in ends) or ends[-1][0] != 3:
        names = ", ".join(list(header.tensors)[:3])
        raise WeightsError(f"{path} holds no decoder of a tiny autoencoder (its tensors: {names}, ...)")
    try:
        with blueprint():
            net = TinyNet(own, places)
    except (KeyError, ValueError) as error:
        raise WeightsError(f"{path} holds no decoder of a tiny autoencoder: {error!r}") from None
    inner = Header(header.path, {f"layers.{n}": e for n, e in own.items()}, header.metadata)
    layout = {name: Source((name,), (len(tensor),)) for name, tensor in net.state_dict().items()}
    load_into(net, inner, layout, dtype=torch.float32)
    return net.eval().requires_grad_(False)  # noqa: FBT003

"""Networks that enlarge latents, from files of others: LSSGen's upsampler (arXiv 2507.16154)."""

import math
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from mrflow._checks import check_path
from mrflow.checkpoints.blueprint import blueprint
from mrflow.checkpoints.configs import read_config
from mrflow.checkpoints.safetensors import chosen_checkpoint
from mrflow.errors import PlanError, WeightsError
from mrflow.protocols.upscaler import LatentUpscaler
from mrflow.records.files import FileNamed, spelled
from mrflow.upscalers.weights import State, read_state

Skip = Literal["nearest", "bilinear", "bicubic"]


@dataclass(frozen=True)
class LatentCheckpoint(FileNamed, LatentUpscaler):
    """LSSGen's latent upsampler (Tang et al. 2025, arXiv 2507.16154) from a file or a folder as diffusers saves it.

    `space` is the name of the latents that it was trained on, which no file says: "flux1" for FLUX.1's and Z-Image's.
    Sizes and scale are told from the tensors. `skip` and `groups`, the interpolation beside its convolutions and the
    groups of its norms, are those of config.json beside the file, else the published ones. Pickles are read as those of
    `Checkpoint` are: tensors alone. A record names the file without its folder, and its SHA-256.

    Raises:
        WeightsError: the file is missing, unsafe or broken, or holds another network. PlanError: a wrong setting.
    """

    path: str
    space: str = "flux1"
    sha256: str = field(default="", kw_only=True)
    skip: Skip | None = field(default=None, kw_only=True)
    groups: int | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        where = check_path("the file", self.path)
        if where.is_dir():
            where = chosen_checkpoint(where)
        where = self.find_file("path", where)
        skip, groups = _settings(spelled(where.parent, "config.json"))
        skip, groups = self.skip or skip, groups if self.groups is None else self.groups
        if skip not in get_args(Skip):
            raise PlanError(f"skip must be one of {', '.join(get_args(Skip))}, got {skip!r}")
        object.__setattr__(self, "skip", skip)
        object.__setattr__(self, "groups", groups)
        _ = self.net

    def to_record(self) -> dict[str, object]:
        """The fields that go into a record: no folder names."""
        record = super().to_record()
        return {"path": record.pop("path"), "sha256": record.pop("sha256"), **record}  # fingerprints keep this order

    @property
    def net(self) -> "LatentNet":
        """The network, read once for all upscalers of the same file."""
        assert self.skip is not None and self.groups is not None
        return _read(self.path, self.sha256, self.skip, self.groups)

    @property
    def scale(self) -> int:
        """2 for each of its blocks that enlarges."""
        return self.net.scale

    @property
    def channels(self) -> int:
        """Of the latents that it takes and gives."""
        return self.net.channels

    @property
    def flops_per_cell(self) -> float:
        """Operations of its convolutions per latent cell that comes in."""
        return self.net.flops

    def __call__(self, latents: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c H W"]:
        """Enlarge in float32."""
        with torch.inference_mode():
            out: Tensor = self.net.to(latents.device)(latents.float())
        return out


class LatentBlock(nn.Module):
    """Norm, convolution, SiLU, twice, beside a skip; a transposed convolution of 4 x 4 makes twice the sides."""

    def __init__(self, width: int, out: int, *, up: bool, groups: int, skip: Skip) -> None:
        super().__init__()
        self.skip, self.up = skip, up
        self.norm1, self.norm2 = nn.GroupNorm(groups, width, 1e-6), nn.GroupNorm(groups, out, 1e-6)
        kind = nn.ConvTranspose2d(width, out, 4, 2, 1) if up else nn.Conv2d(width, out, 3, padding=1)
        self.conv1, self.conv2 = kind, nn.Conv2d(out, out, 3, padding=1)
        self.skip_proj = nn.Conv2d(width, out, 1) if width != out else nn.Identity()

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d H W"]:
        """The same sides, or twice."""
        beside: Tensor = self.skip_proj(x)
        if self.up:
            beside = F.interpolate(beside, scale_factor=2.0, mode=self.skip)
        return F.silu(self.conv2(self.norm2(F.silu(self.conv1(self.norm1(x)))))) + beside


class LatentNet(nn.Module):
    """A convolution, blocks, then norm, SiLU and a convolution; `flops` are those of a cell that comes in."""

    def __init__(self, state: State, *, groups: int, skip: Skip) -> None:
        super().__init__()
        first = state["conv_in.weight"]
        width, self.channels, self.scale = first.shape[0], first.shape[1], 1
        self.flops = 18.0 * first.shape[0] * first.shape[1]
        self.conv_in = nn.Conv2d(self.channels, width, 3, padding=1)
        blocks: list[LatentBlock] = []
        while (name := f"up_blocks.{len(blocks)}.conv1.weight") in state:
            up, out = state[name].shape[-1] == 4, state[f"up_blocks.{len(blocks)}.conv2.weight"].shape[0]
            blocks.append(LatentBlock(width, out, up=up, groups=groups, skip=skip))
            self.flops += self.scale**2 * (32 * width * out if up else 18 * width * out)
            self.flops += 2 * self.scale**2 * width * out if width != out else 0
            self.scale *= 2 if up else 1
            self.flops += 18 * self.scale**2 * out * out
            width = out
        self.up_blocks = nn.ModuleList(blocks)
        self.norm_out = nn.GroupNorm(groups, width)
        self.conv_out = nn.Conv2d(width, self.channels, 3, padding=1)
        self.flops += 18 * self.scale**2 * width * self.channels

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c H W"]:
        """Latents of `scale` times the sides."""
        x = self.conv_in(x)
        for block in self.up_blocks:
            x = block(x)
        out: Tensor = self.conv_out(F.silu(self.norm_out(x)))
        return out


def _settings(config: Path) -> tuple[str, int]:
    """Interpolation and groups of a config.json, or the published ones where there is none."""
    if not config.is_file():
        return "bilinear", 32
    table = read_config(config)
    if table.get("act_fn", "silu") != "silu":
        raise WeightsError(f"{config}: act_fn must be 'silu', got {table['act_fn']!r}")
    return str(table.get("interpolate", "nearest")), table.whole("norm_num_groups", 32, high=4096)


@lru_cache(maxsize=8)
def _read(path: str, sha256: str, skip: Skip, groups: int) -> LatentNet:
    state = {name.removeprefix("upsampler."): tensor for name, tensor in read_state(Path(path)).items()}
    names = ", ".join(list(state)[:3])
    if not {"conv_in.weight", "conv_out.weight", "up_blocks.0.conv1.weight"} <= set(state):
        raise WeightsError(
            f"{path} holds no latent upsampler of LSSGen (its tensors: {names}, ...); wrap another network in a "
            "LatentUpscaler of your own"
        )
    try:
        with blueprint():
            net = LatentNet(state, groups=groups, skip=skip)
        net.load_state_dict({name: t.float() for name, t in state.items()}, strict=True, assign=True)
    except (KeyError, ValueError, IndexError, RuntimeError) as error:
        why = " ".join(str(error).replace("Error(s) in loading state_dict for LatentNet:", "").split())[:300]
        raise WeightsError(f"{path} is no latent upsampler as LSSGen saves it: {why}") from None
    if not all(math.prod(t.shape) and bool(t.isfinite().all()) for t in state.values()):
        raise WeightsError(f"{path} holds empty tensors, or values that are not finite")
    return net.eval().requires_grad_(False)  # noqa: FBT003

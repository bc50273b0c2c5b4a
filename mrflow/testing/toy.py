"""A model whose flow is exact in closed form, for tests."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from mrflow.backbone import Condition, FieldOptions, join_parts, split_parts
from mrflow.errors import PlanError
from mrflow.flow import Velocity
from mrflow.model_info import Capabilities, LatentSpace, ModelInfo, Shift
from mrflow.protocols.upscaler import Upscaler
from mrflow.upscalers import Interpolate

TOY = ModelInfo(
    "toy",
    LatentSpace("toy", channels=3, downscale=2, patch=2),
    Shift(0.0, 0.7, 64, 256),
    size=(64, 64),
    low=(32, 32),
    upscale=2,
    capabilities=Capabilities(zero=True),
)


@dataclass(frozen=True)
class Mixture:
    """A mixture of isotropic Gaussians: means (k, d), one standard deviation, equal weights.

    For x = (1 - s) x0 + s eps each part is N((1 - s) m, v) with v = (1 - s)^2 std^2 + s^2, so that
    E[x0 | x] = m + (1 - s) std^2 (x - (1 - s) m) / v and E[eps | x] = s (x - (1 - s) m) / v are exact.
    """

    means: Tensor
    std: float

    def velocity(self, x: Tensor, sigma: float) -> Tensor:
        """E[eps - x0 | x] for x of shape (b, d)."""
        a = 1.0 - sigma
        var = a * a * self.std**2 + sigma * sigma
        rest = x[:, None] - a * self.means.to(x)  # (b, k, d)
        weights = (-rest.square().sum(-1) / (2 * var)).softmax(1)[..., None]
        each = (sigma - a * self.std**2) / var * rest - self.means.to(x)
        return (weights * each).sum(1)


class Toy:
    """A model in closed form: latents are a mixture of two plain colours that the prompt chooses, a little noisy.

    Latents are the 2x-averaged picture on [-1, 1]. Nothing is learned, so samplers can be held against the truth. With
    `positions` it takes tokens that lie anywhere: where they lie is nothing to plain colours.
    """

    upscaler: Upscaler | None = Interpolate(2, "bilinear")

    def __init__(self, *, std: float = 0.1, device: str = "cpu", positions: bool = False) -> None:
        if not std > 0:
            raise PlanError(f"std must be above 0, got {std!r}")
        self.std, self._device = std, torch.device(device)
        self._info = replace(TOY, capabilities=replace(TOY.capabilities, positions=positions))

    @property
    def info(self) -> ModelInfo:
        """Facts."""
        return self._info

    @property
    def device(self) -> torch.device:
        """Where it lives."""
        return self._device

    def condition(self, prompts: Sequence[str]) -> Condition:
        """Two colours for each prompt, from its hash."""
        rows = [torch.tensor(list(hashlib.sha256(p.encode("utf-8", "replace")).digest()[:6])) for p in prompts]
        return Condition({"colours": (torch.stack(rows).float() / 127.5 - 1).view(-1, 2, 3).to(self._device)})

    def mixture(self, colours: Tensor, height: int, width: int) -> Mixture:
        """The distribution of latents of height x width cells for one prompt's (2, 3) colours."""
        means = colours[:, :, None, None].expand(2, 3, height, width).reshape(2, -1)
        return Mixture(means, self.std)

    def check(self, options: FieldOptions) -> None:
        """A closed form has nothing to take apart or to adapt.

        Raises:
            PlanError: options need more than a velocity.
        """
        self.info.require(options.needs)

    def field(self, cond: Condition, options: FieldOptions = FieldOptions()) -> Velocity:
        """The exact velocity."""
        self.check(options)
        colours = cond["colours"]

        def one(x: Tensor, sigma: float) -> Tensor:
            items = [
                self.mixture(c, x.shape[2], x.shape[3]).velocity(item.reshape(1, -1), sigma)
                for c, item in zip(colours, x, strict=True)
            ]
            return torch.cat(items).view_as(x)

        def velocity(x: Tensor, sigma: float) -> Tensor:
            return join_parts([one(part, sigma) for part in split_parts(options.positions, x, axis=-1)], axis=-1)

        return velocity

    def encode(self, pixels: Tensor, noise: Tensor | None = None) -> Tensor:
        """Averaged 2 x 2 and put on [-1, 1]; a posterior sample has standard deviation 0.01."""
        z = 2 * F.avg_pool2d(pixels, 2) - 1
        return z if noise is None else z + 0.01 * noise

    def decode(self, latents: Tensor) -> Tensor:
        """Every cell twice a side."""
        return F.interpolate(0.5 * latents + 0.5, scale_factor=2, mode="nearest").clamp(0, 1)


def toy(*, std: float = 0.1, positions: bool = False) -> Toy:
    """A tiny model with an exact flow: instant, and right."""
    return Toy(std=std, positions=positions)

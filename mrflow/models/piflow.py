"""pi-Flow adapters as published by LakonLab: a LoRA, a new last modulation, and heads whose outputs are a policy.

A file's keys with "lora" in them are low-rank pairs under diffusers' names without a prefix, of scale 1. The others
overwrite `norm_out.linear` and replace `proj_out`: for a Gaussian mixture of K components `proj_out_means` (K rows of
tokens), `proj_out_logweights` (K x 4, one for each latent cell of a token) and `proj_out_logstds` (an MLP of the
embedded level); for grids and polynomials a `proj_out` of N rows of tokens. The metadata's `policy_config` may say
shift, segment and mode; the published values stand in for what it leaves out.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable

import torch
from einops import rearrange
from torch import Tensor, nn

from mrflow.backbone import Condition, FieldOptions
from mrflow.checkpoints.adapters import Lora
from mrflow.checkpoints.blueprint import blueprint
from mrflow.checkpoints.configs import Config, parse_config, read_config
from mrflow.checkpoints.safetensors import Header, map_tensor, open_checkpoint, some
from mrflow.errors import WeightsError
from mrflow.flow import Velocity
from mrflow.models.blocks import Transformer
from mrflow.models.transformer_model import PolicyModel
from mrflow.protocols.policies import DX, GM, Policy
from mrflow.records.files import spelled

PATCH = 2  # latent cells a side of a token
SHIFT, SEGMENT = 3.2, 1 / 3.5  # of the published adapters: 4 evaluations, the last half as long
MEANS, WEIGHTS, STDS, OUT, NORM = (
    "proj_out_means",
    "proj_out_logweights",
    "proj_out_logstds",
    "proj_out",
    "norm_out.linear",
)


@dataclass(frozen=True)
class Head:
    """What an adapter puts in the place of the last linear, and how its outputs are read."""

    modules: Mapping[str, nn.Module]
    names: frozenset[str]
    count: int
    mixture: bool
    deviation: nn.Module | float
    shift: float
    segment: float
    polynomial: bool


@runtime_checkable
class PolicyNetwork(Protocol):
    """A model whose field gives a policy's numbers."""

    def field(self, cond: Condition, options: FieldOptions = ...) -> Velocity:
        """The outputs (b, channels of the head, h, w) for latents at a level."""
        ...

    def conditioning_vector(self, cond: Condition, sigma: float, *, guidance: float | None = None) -> Tensor:
        """SiLU of the embedded level (b, width)."""
        ...


@dataclass(frozen=True)
class Policies(PolicyModel):
    """A model with an adapter: its network is asked once, and gives the policy that holds from there on."""

    model: PolicyNetwork
    head: Head

    def field(self, cond: Condition, options: FieldOptions) -> "HeadField":
        """A fresh field for one integration, asked at the sigmas of the options."""
        inner = self.model.field(cond, replace(options, loras=(), policy=None))
        return HeadField(self, cond, options.guidance, inner)


@dataclass(frozen=True, eq=False)
class HeadField:
    """A field through an adapter's head."""

    asked: Policies
    cond: Condition
    guidance: float | None
    inner: Velocity

    @property
    def shift(self) -> float:
        """The static shift between a policy's time and the noise level."""
        return self.asked.head.shift

    def __call__(self, x: Tensor, sigma: float) -> Tensor:
        """The velocity where the network is asked."""
        return self.policy(x, sigma)(x, sigma)

    def policy(self, x: Tensor, sigma: float) -> Policy:
        """The policy that holds from (x, sigma) on."""
        out, head = self.inner(x, sigma).float(), self.asked.head
        if not head.mixture:
            outputs = rearrange(out, "b (n c) h w -> b n c h w", n=head.count)
            return DX(outputs, x, sigma, head.shift, head.segment, head.polynomial)
        channels = head.count * x.shape[1]
        means = rearrange(out[:, :channels], "b (k c) h w -> b k c h w", k=head.count)
        logweights = out[:, channels:, None].log_softmax(1)
        return GM(means, logweights, self._logstd(sigma), x, sigma)

    def _logstd(self, sigma: float) -> Tensor:
        """(b, 1, 1, 1, 1)."""
        cond, deviation = self.cond, self.asked.head.deviation
        if not isinstance(deviation, nn.Module):
            return torch.full((cond.batch, 1, 1, 1, 1), deviation, device=cond["context"].device)
        vector = self.asked.model.conditioning_vector(cond, sigma, guidance=self.guidance)
        found: Tensor = deviation(vector)
        return found.float().view(-1, 1, 1, 1, 1)


def read_head(file: Path, net: Transformer, *, device: torch.device) -> Head:
    """An adapter's heads for a network.

    Raises:
        WeightsError: a tensor is missing, left over or of a wrong shape, or it is no pi-Flow adapter.
    """
    header = open_checkpoint(file)
    own = {name for name in header.tensors if "lora" not in name}
    mixture, d, tokens = f"{MEANS}.weight" in own, net.params.hidden, net.params.out_channels
    if not mixture and f"{OUT}.weight" not in own:
        raise WeightsError(
            f"{file} is no pi-Flow adapter: it has neither {MEANS} nor {OUT}; its names begin with "
            f"{some(list(header.tensors))}"
        )
    first = header.tensors[f"{MEANS if mixture else OUT}.weight"]
    count = first.shape[0] // tokens
    linears = {NORM: (2 * d, d)}
    if mixture:
        linears |= {MEANS: (count * tokens, d), WEIGHTS: (count * PATCH**2, d)}
        if f"{STDS}.1.weight" in own:
            inner = header.tensors[f"{STDS}.1.weight"].shape[0]
            linears |= {f"{STDS}.1": (inner, d), f"{STDS}.3": (1, inner)}
    else:
        linears |= {OUT: (count * tokens, d)}
    want = {f"{n}.weight": shape for n, shape in linears.items()} | {f"{n}.bias": s[:1] for n, s in linears.items()}
    problems = [f"{name} is missing" for name in want if name not in own]
    problems += [
        f"{name} has shape {header.tensors[name].shape}, expected {shape}"
        for name, shape in want.items()
        if name in own and header.tensors[name].shape != shape
    ]
    problems += [f"{name} is not expected" for name in sorted(own - set(want))]
    if problems or count < 1:
        raise WeightsError(f"{file} does not fit: {some(problems) or f'{OUT} has {first.shape[0]} rows'}")

    def linear(*names: str, swap: bool = False) -> nn.Linear:
        weight, bias = (torch.cat([map_tensor(header.tensors[f"{n}.{leaf}"], {}) for n in names]) for leaf in LEAVES)
        if swap:
            weight, bias = (torch.cat(tuple(reversed(t.chunk(2)))) for t in (weight, bias))
        with blueprint():
            out = nn.Linear(weight.shape[1], weight.shape[0])
        out.weight, out.bias = (nn.Parameter(t.to(device, net.dtype), requires_grad=False) for t in (weight, bias))
        return out

    settings = policy_config(header)
    deviation: nn.Module | float = 0.0
    if mixture:
        deviation = (
            nn.Sequential(linear(f"{STDS}.1"), nn.SiLU(), linear(f"{STDS}.3"))
            if f"{STDS}.1.weight" in own
            else constant(header)
        )
    modules: dict[str, nn.Module] = {
        "final_layer.linear": linear(MEANS, WEIGHTS) if mixture else linear(OUT),
        "final_layer.adaLN_modulation.1": linear(NORM, swap=not net.final_layer.scale_first),
    }
    polynomial = settings.get("mode") == "polynomial"
    segment = settings.get("segment_size", 1.0 if polynomial else SEGMENT)
    shift = float(settings.get("shift", SHIFT))
    return Head(modules, frozenset(own), count, mixture, deviation, shift, float(segment), polynomial)


LEAVES = ("weight", "bias")


def policy_config(header: Header) -> dict[str, Any]:
    """The settings in a file's metadata, those of nested tables too."""
    found = parse_config(header.metadata.get("policy_config", "{}"), f"{header.path}: its policy_config")
    out: dict[str, Any] = {}

    def visit(table: Mapping[str, Any]) -> None:
        for key, value in table.items():
            if isinstance(value, dict):
                visit(cast("dict[str, Any]", value))
            else:
                out[key] = value

    visit(found)
    config = Config(out, f"{header.path}: its policy_config")
    for name in ("shift", "segment_size"):
        config.number(name, 1.0, low=1e-6)
    return out


def constant(header: Header) -> float:
    """The log-deviation that a config.json beside an adapter without an MLP for it gives."""
    beside = spelled(header.path.parent, "config.json")
    config = read_config(beside) if beside.is_file() else Config({}, beside)
    if "constant_logstd" not in config:
        raise WeightsError(f"{header.path} has no {STDS}, and no config.json beside it gives constant_logstd")
    return config.number("constant_logstd", low=-100, high=100)


def lora_of(file: Path) -> Lora | None:
    """The low-rank part of an adapter, if it has one."""
    return Lora(str(file)) if any("lora" in name for name in open_checkpoint(file).tensors) else None

"""Small super-resolution checkpoints in the layouts that are published, made by tests."""

import json
import re
from pathlib import Path

import torch
from torch import Tensor, nn

from mrflow.upscalers.nets import CompactParams, RRDBNet, RRDBParams, SRVGGNetCompact

State = dict[str, Tensor]


def rrdb(params: RRDBParams = RRDBParams(8, 2, 4), *, seed: int = 0) -> State:
    """Random weights under today's names, large enough that every layer shows in the output."""
    return _random(RRDBNet(params), seed)


def compact(params: CompactParams = CompactParams(8, 3, 2), *, seed: int = 0) -> State:
    """Random weights of the small network."""
    return _random(SRVGGNetCompact(params), seed)


def _random(net: nn.Module, seed: int) -> State:
    generator = torch.Generator().manual_seed(seed)
    return {
        k: torch.randn(v.shape, generator=generator) * (0.5 if v.ndim == 1 else (2 / v[0].numel()) ** 0.5)
        for k, v in net.state_dict().items()
    }


def as_trunk(state: State) -> State:
    """Under the names of BSRGAN and RealSR."""
    names = {"conv_body": "trunk_conv", "conv_hr": "HRconv"}
    out: State = {}
    for name, tensor in state.items():
        part, rest = name.split(".", 1)
        new = re.sub(r"^body\.(\d+)\.rdb(\d)", r"RRDB_trunk.\1.RDB\2", name)
        new = new.replace("conv_up", "upconv")
        out[f"{names[part]}.{rest}" if part in names else new] = tensor
    return out


def as_first_generation(state: State) -> State:
    """Under the numbers of the first ESRGAN."""
    blocks = 1 + max(int(n.split(".")[1]) for n in state if n.startswith("body."))
    ups = sum(n.startswith("conv_up") for n in state) // 2
    numbers = {
        "conv_first": "0",
        "conv_body": f"1.sub.{blocks}",
        "conv_hr": f"{3 * ups + 2}",
        "conv_last": f"{3 * ups + 4}",
    }
    numbers |= {f"conv_up{k}": f"{3 * k}" for k in range(1, ups + 1)}
    out: State = {}
    for name, tensor in state.items():
        part, rest = name.split(".", 1)
        if part == "body":
            m = re.fullmatch(r"(\d+)\.rdb(\d)\.conv(\d)\.(\w+)", rest)
            assert m
            out[f"model.1.sub.{m[1]}.RDB{m[2]}.conv{m[3]}.0.{m[4]}"] = tensor
        else:
            out[f"model.{numbers[part]}.{rest}"] = tensor
    return out


def published(name: str) -> State:
    """A published checkpoint's tensors on the meta device: names and shapes, no values (tests/golden/sr.json)."""
    table = json.loads((Path(__file__).parent / "golden" / "sr.json").read_text())[name]
    out: State = {}
    for key, shape in table["tensors"].items():
        for n in range(table["blocks"]) if "*" in key else (0,):
            out[key.replace("*", str(n))] = torch.empty(shape, device="meta")
    assert sum(t.numel() for t in out.values()) == table["parameters"]
    return out

"""Models: what `load` can make, each from its own file."""

import re
from pathlib import Path
from typing import Literal

import torch

from mrflow.backbone import Backbone
from mrflow.errors import PlanError, WeightsError
from mrflow.spec import FLUX, QWEN, SCHNELL, ModelInfo

PLANNED: dict[str, ModelInfo] = {info.name: info for info in (FLUX, SCHNELL, QWEN)}
Device = Literal["auto", "cpu", "cuda", "mps"]


def load(
    where: str | Path = "pocket", *, dtype: torch.dtype = torch.float32, device: str | torch.device = "auto"
) -> Backbone:
    """A model ready to run: "pocket", or the path of a file in its format. Never touches the network.

    `dtype` is what the transformer computes in; `device="auto"` takes CUDA, then MPS, then the CPU.

    Raises:
        WeightsError: there is no such model or file, or the file is broken. PlanError: there is no such device.
    """
    from mrflow.models.pocket.model import WEIGHTS, load_pocket

    chosen = choose_device(device)
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise PlanError(f"dtype must be torch.float32, torch.bfloat16 or torch.float16, got {dtype}")
    if str(where) == "pocket":
        return load_pocket(WEIGHTS, device=chosen, dtype=dtype)
    path = Path(where)
    if path.is_file():
        return load_pocket(path, device=chosen, dtype=dtype)
    if str(where) in PLANNED:
        raise WeightsError(
            f"{where} can be planned (mrflow plan --model {where}), but its weights cannot be loaded yet"
        )
    raise WeightsError(f"there is no model or file {str(where)!r}; use 'pocket', or the path of a pocket file")


def info(name: str) -> ModelInfo:
    """A model's facts by name, without weights.

    Raises:
        PlanError: the name is not known.
    """
    from mrflow.models.pocket.model import POCKET

    known = {"pocket": POCKET, **PLANNED}
    if name not in known:
        raise PlanError(f"there is no model {name!r}; known are {', '.join(known)}")
    return known[name]


def choose_device(device: str | torch.device) -> torch.device:
    """The device to run on; "auto" is CUDA where there is one, then MPS, then the CPU.

    Raises:
        PlanError: the device is not there.
    """
    if str(device) == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    if not re.fullmatch(r"(cpu|mps|cuda(:\d+)?)", str(device)):
        raise PlanError(f"device must be auto, cpu, cuda, cuda:N or mps, got {str(device)!r}")
    chosen = torch.device(device)
    missing = (chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count()) or (
        chosen.type == "mps" and not torch.backends.mps.is_available()
    )
    if missing:
        raise PlanError(f"there is no device {str(device)!r} here; use device='auto'")
    return chosen

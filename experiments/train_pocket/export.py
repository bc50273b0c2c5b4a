"""Puts the trained parts into the one file that mrflow ships, in half precision.

python -m experiments.train_pocket.export --version pocket-1
"""

import argparse
import hashlib
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from mrflow.io import write_bytes
from mrflow.models.pocket.model import WEIGHTS


def main() -> None:
    """Write the file; print its size and version."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, default=Path("runs/pocket"))
    parser.add_argument("--out", type=Path, default=WEIGHTS)
    parser.add_argument("--version", default="pocket-1")
    args = parser.parse_args()
    flow = torch.load(args.runs / "flow.pt", weights_only=True)
    parts: dict[str, dict[str, Tensor]] = {
        "text": {k.removeprefix("text."): v for k, v in flow["ema"].items() if k.startswith("text.")},
        "flow": {k.removeprefix("flow."): v for k, v in flow["ema"].items() if k.startswith("flow.")},
        "autoencoder": torch.load(args.runs / "autoencoder.pt", weights_only=True)["ema"],
        "sr": torch.load(args.runs / "sr.pt", weights_only=True),
    }
    tensors = {
        f"{part}.{name}": v.half().contiguous()
        for part, state in sorted(parts.items())
        for name, v in sorted(state.items())
    }
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(name.encode() + tensor.numpy().tobytes())
    version = f"{args.version}+{digest.hexdigest()[:12]}"
    seen = {str(k): v for k, v in flow["seen"].items()}
    data = save(tensors, metadata={"version": version, "steps": str(flow["step"]), "samples": str(seen)})
    write_bytes(args.out, data)
    print(f"{args.out}: {len(data) / 1e6:.1f} MB, {version}, {flow['step']} steps, samples {seen}")


if __name__ == "__main__":
    main()

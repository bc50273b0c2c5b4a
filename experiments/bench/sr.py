"""C8: is a picture super-resolved whole as fast as through the published 8-bit tiles?

RRDBNet x2 of published size (23 blocks), the same random weights, one picture, float32. The reference re-enacts the
published procedure with spandrel's network: edges repeated by 15 pixels, tiles of 192 with 24 more at each side, four
at a time, stitched without blending. Ours is `Checkpoint`, whole. Before timing, ours is held against spandrel's
network on the whole picture, to 1e-4; what the tiles differ from it by is reported as seams.

    python -m experiments.bench.sr --sizes 128 256
"""

import argparse
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import mrflow as mf
from experiments.bench.protocol import FAST, Row, paired, publish
from mrflow.checkpoints.safetensors import save_file
from mrflow.upscalers.nets import RRDBNet, RRDBParams
from mrflow.upscalers.spandrel import spandrel

PAD, TILE, HALO, BATCH, SCALE = 15, 192, 24, 4, 2
LIMIT = 1e-4


def published(net: Any, pixels: Tensor) -> Tensor:  # noqa: ANN401
    """The published tiles, without their 8-bit roundings."""
    x = F.pad(pixels, (PAD,) * 4, mode="replicate")
    h, w = x.shape[-2:]
    down, right = (-h) % TILE, (-w) % TILE
    x = F.pad(x, (HALO, HALO + right, HALO, HALO + down), mode="replicate")
    size = TILE + 2 * HALO
    places = [(i, j) for i in range(0, h, TILE) for j in range(0, w, TILE)]
    out = x.new_zeros(1, 3, SCALE * (h + down), SCALE * (w + right))
    for k in range(0, len(places), BATCH):
        part = places[k : k + BATCH]
        tiles = net(torch.cat([x[..., i : i + size, j : j + size] for i, j in part]))
        for (i, j), tile in zip(part, tiles, strict=True):
            inner = tile[:, SCALE * HALO : -SCALE * HALO, SCALE * HALO : -SCALE * HALO]
            out[0, :, SCALE * i : SCALE * (i + TILE), SCALE * j : SCALE * (j + TILE)] = inner
    height, width = pixels.shape[-2:]
    return out[..., SCALE * PAD : SCALE * (PAD + height), SCALE * PAD : SCALE * (PAD + width)]


def main() -> None:
    """Print a table and write every sample."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", type=int, default=(128, 256), help="sides of what comes in, in pixels")
    parser.add_argument("--fast", action="store_true", help="64 pixels and two blocks, bars relaxed by 5 %%")
    parser.add_argument("--repeats", type=int, help="unless said, what the time of a call asks for")
    args = parser.parse_args()
    torch.manual_seed(0)
    params = RRDBParams(unshuffle=SCALE, blocks=2 if args.fast else 23)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        file = Path(folder) / "net.safetensors"
        save_file(RRDBNet(params).state_dict(), file)
        ours, theirs = mf.Checkpoint(str(file)), spandrel().ModelLoader().load_from_file(file).model.eval()
        for side in (64,) if args.fast else args.sizes:
            x = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(1))
            whole = theirs(x)
            error = float((ours(x) - whole).abs().max() / whole.abs().max())
            if not error < LIMIT:
                raise SystemExit(f"ours differs from spandrel's by {error:.1e}")
            seams = float((published(theirs, x) - whole).abs().max())
            runs = paired(partial(published, theirs, x), partial(ours, x), repeats=args.repeats, limit=1.0)
            bar = 2.0 if side >= 512 else 1.0
            notes = {"difference": f"{error:.1e}", "seams of the tiles": f"{seams:.1e}"}
            rows.append(Row(f"x2 of {side} px, float32", runs, bar * (FAST if args.fast else 1.0), notes=notes))
    publish("sr", rows)


if __name__ == "__main__":
    main()

"""C5, C6, C7: how long does a FLUX transformer take to load, and how much memory, against diffusers?

Random bfloat16 weights of FLUX.1's width with fewer blocks, written once, in diffusers' sharded layout and as BFL's
single file. Every load is a fresh process, page cache warm; time and memory count from after the imports. Own pages
(RssAnon) are what a load costs; mapped pages (RssFile) are shared with the page cache. Before anything is timed, both
sides must hold the same bits in two tensors, one of which the layouts store in different orders.

diffusers maps files only where `accelerate` is installed; without it a load makes random weights first and copies into
them. Which of the two was measured stands above the table: the fair comparison is the one with it.

    python -m experiments.bench.loading --gigabytes 1.9
"""

import argparse
import hashlib
import json
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from experiments.bench.protocol import MIB, Fresh, Memory, Row, Runs, Sample, Unequal, fresh, process, publish, timed

WIDTH, HEAD = 3072, 128  # diffusers converts BFL's single file at this width only
SHARD = 300_000_000
SINGLE = "native/flux.safetensors"


TENSOR = 7 * WIDTH**2 / MIB  # millions of values in the largest tensor, a single block's fused projection


class Case(NamedTuple):
    """What is loaded and in which dtype, the bar, and how many MiB RssAnon may reach beyond what has to be copied."""

    name: str
    where: str
    dtype: str
    bar: float
    spare: float


CASES = (
    Case("C5 diffusers' shards, same dtype", "diffusers", "bfloat16", 1.3, 20),
    Case("C6 diffusers' shards, to float32", "diffusers", "float32", 1.5, SHARD / MIB),
    Case("C7 BFL's file, same dtype", SINGLE, "bfloat16", 1.0, 2 * TENSOR),
    Case("C7 BFL's file, to float32", SINGLE, "float32", 1.0, 4 * TENSOR),
)


def write_weights(folder: Path, gigabytes: float, *, width: int = WIDTH) -> int:
    """Both layouts of one random transformer, as many double and single blocks as fit; its number of bytes."""
    import torch
    from diffusers import FluxTransformer2DModel

    from mrflow.models.flux.weights import load_flux, save_flux

    pairs = max(1, round(gigabytes * 1e9 / (2 * 51 * width**2)))
    with torch.device("meta"):
        net: Any = FluxTransformer2DModel(
            num_layers=pairs, num_single_layers=pairs, guidance_embeds=True, num_attention_heads=width // HEAD
        )
    net = net.to(torch.bfloat16).to_empty(device="cpu")
    generator = torch.Generator().manual_seed(3)
    for p in net.parameters():
        p.data.normal_(0, 0.02, generator=generator)
    net.save_pretrained(folder / "diffusers", max_shard_size=SHARD)
    size = sum(int(p.nbytes) for p in net.parameters())
    del net
    (folder / SINGLE).parent.mkdir()
    save_flux(load_flux(folder / "diffusers", fuse=True), folder / SINGLE)
    return size


def child(side: str, folder: str, where: str, dtype: str) -> None:
    """One load in this process; prints its time, its memory in MiB, and a digest of two tensors."""
    import torch

    path, kind = Path(folder) / where, getattr(torch, dtype)
    call: Callable[[], Any]
    if side == "ours":
        from mrflow.models.family import families
        from mrflow.models.flux.weights import load_flux

        families()  # a load asks what else a file could be: imports, not loading

        def call() -> Any:  # noqa: ANN401
            return load_flux(path, dtype=kind, device="cpu")
    else:
        from diffusers import FluxTransformer2DModel as Theirs

        def call() -> Any:  # noqa: ANN401
            if path.is_dir():
                return Theirs.from_pretrained(path, torch_dtype=kind)
            return Theirs.from_single_file(str(path), config=str(Path(folder) / "diffusers"), torch_dtype=kind)

    kept: list[Any] = []
    with Memory() as memory:
        sample = timed(lambda: kept.append(call()))
    state: dict[str, torch.Tensor] = kept[0].state_dict()
    if side == "ours":
        start = "double_blocks.0.img_attn.qkv."
        first = state.get(start + "parts.0.weight")
        query = state[start + "weight"][: kept[0].params.hidden] if first is None else first
        last = state["final_layer.adaLN_modulation.1.weight"]
        if kept[0].final_layer.scale_first:  # mapped as diffusers has it: the two vectors are exchanged when it is used
            last = torch.cat(tuple(reversed(last.chunk(2))))
    else:
        query = state["transformer_blocks.0.attn.to_q.weight"]
        scale, shift = state["norm_out.linear.weight"].chunk(2)
        last = torch.cat((shift, scale))
    digest = hashlib.sha256()
    for tensor in (query, last):
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes())
    grown = {"anon": memory.growth.anon, "kept": memory.end.anon - memory.start.anon, "file": memory.growth.file}
    print(json.dumps({**asdict(sample), **grown, "digest": digest.hexdigest()}))


def code(side: str, folder: Path, case: Case) -> str:
    """What a fresh process runs."""
    arguments = ", ".join(repr(a) for a in (side, str(folder), case.where, case.dtype))
    return f"from experiments.bench.loading import child; child({arguments})"


def inside(samples: Sequence[Fresh]) -> list[Sample]:
    """The load alone, as the process timed it."""
    return [Sample(s.report["cpu"], s.report["wall"]) for s in samples]


def grown(samples: Sequence[Fresh], kind: str) -> float:
    """The median of what memory grew by."""
    return float(statistics.median(s.report[kind] for s in samples))


def main() -> None:
    """Write the weights, print a table, write every sample."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.9, help="a whole number of blocks, one pair at least")
    parser.add_argument("--width", type=int, default=WIDTH, help="below 3072: diffusers' shards alone")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--cases", nargs="+", choices=sorted({c.name[:2] for c in CASES}), help="default: all")
    args = parser.parse_args()
    wanted = [c for c in CASES if not args.cases or c.name[:2] in args.cases]
    rows: list[Row] = []
    checks: dict[str, bool] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        size = write_weights(folder, args.gigabytes, width=args.width)
        mapping = find_spec("accelerate") is not None
        print(f"{size / 1e9:.2f} GB = {size / MIB:.0f} MiB in bfloat16; memory in MiB, diffusers / ours;")
        print(f"diffusers runs {'with' if mapping else 'WITHOUT'} accelerate\n")
        for case in (c for c in wanted if args.width == WIDTH or c.where != SINGLE):
            theirs, ours = code("theirs", folder, case), code("ours", folder, case)
            if process(theirs).report["digest"] != process(ours).report["digest"]:
                raise Unequal(f"{case.name}: the two sides loaded different tensors")
            reference, again, mine = fresh(theirs, theirs, ours, repeats=args.repeats)
            memory = {
                label: f"{grown(reference, kind):+.0f} / {grown(mine, kind):+.0f}"
                for label, kind in (("peak RssAnon", "anon"), ("RssAnon kept", "kept"), ("peak RssFile", "file"))
            }
            walls = [statistics.median(s.wall for s in inside(side)) for side in (reference, mine)]
            memory["wall s"] = f"{walls[0]:.2f} / {walls[1]:.2f}"
            limit = case.spare + (2 * size / MIB if case.dtype == "float32" else 0)
            peak = grown(mine, "anon")
            checks[f"{case.name}: RssAnon {peak:+.0f} MiB, at most {limit:.0f}"] = peak <= limit
            rows.append(Row(case.name, Runs(inside(reference), inside(again), inside(mine)), case.bar, notes=memory))
    print("\n".join(f"* {what}: {'kept' if kept else 'MISSED'}" for what, kept in checks.items()) + "\n")
    publish("loading", rows, bytes=size, width=args.width, checks=checks, accelerate=mapping)


if __name__ == "__main__":
    main()

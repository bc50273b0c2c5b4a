"""What do whole chains cost at full size on a GPU, stage by stage? Random weights, which cost what trained ones do.

FLUX.1-dev and Qwen-Image, bfloat16, one picture, encoded prompts, Lanczos instead of a super-resolution net: MrFlow
(12 + 1, 512 to 1024 px) with CUDA graphs and without, and with products in 8 bits; native sampling; one step of the
transformer beside diffusers' of the same size. Pictures are noise: nothing here says anything about quality.

Every sample goes into one JSON file. After `--budget` seconds nothing more is begun, and what was left out is named in
it. `--table FILE` gives the table of docs/performance.md from such a file. `--tiny` rehearses everything with
small networks on a CPU.

    python -m experiments.bench.full --budget 480
    python -m experiments.bench.full --table runs/bench/full-20261201T120000.json --into docs/performance.md
"""

import argparse
import json
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

import mrflow as mf
from experiments.bench.protocol import ROOT, RUNS, environment
from mrflow.backbone import FieldOptions
from mrflow.checkpoints.blueprint import blueprint
from mrflow.cost import memory
from mrflow.machine.devices import synchronise
from mrflow.models.flux.backbone import Flux1
from mrflow.models.flux.transformer import Flux, FluxParams
from mrflow.models.flux.vae import VaeFlux, VaeParams
from mrflow.models.fp8 import Fp8Linear, store_fp8
from mrflow.models.latent_model import LatentModel, footprint
from mrflow.models.offload import RuntimeOptions
from mrflow.models.qwen.backbone import Qwen
from mrflow.models.qwen.family import DECODE, ENCODE
from mrflow.models.qwen.transformer import QwenImage, QwenParams
from mrflow.models.qwen.vae import QwenVaeParams, VaeQwen

HALF = torch.bfloat16
NAMES = {"flux": "FLUX.1-dev", "qwen": "Qwen-Image"}


class Scale(NamedTuple):
    """Sizes of the networks, sides in pixels, text tokens of a prompt and of the negative, native steps, repeats."""

    flux: FluxParams
    qwen: QwenParams
    channels: dict[str, tuple[int, ...]]
    low: int
    high: int
    text: dict[str, tuple[int, int]]
    native: int
    repeats: int


SMALL: dict[str, Any] = {"context": 32, "hidden": 64, "heads": 2, "axes": (8, 12, 12)}
FULL = Scale(
    FluxParams(), QwenParams(), {"flux": VaeParams().channels, "qwen": QwenVaeParams().channels}, 512, 1024,
    {"flux": (512, 512), "qwen": (50, 6)}, 50, 5,
)  # fmt: skip
TINY = Scale(
    FluxParams(**SMALL, pooled=16, double_blocks=1, single_blocks=1), QwenParams(**SMALL, double_blocks=1),
    {"flux": (32,) * 4, "qwen": (8,) * 4}, 64, 128, {"flux": (7, 7), "qwen": (9, 4)}, 2, 2,
)  # fmt: skip


class Lane(NamedTuple):
    """One way to run a chain."""

    chain: Literal["12 + 1", "native"]
    graphs: bool = True
    fp8: bool = False

    @property
    def name(self) -> str:
        """As the table says it."""
        return self.chain + (", fp8 (lossy)" if self.fp8 else "") + ("" if self.graphs else ", no graphs")


LANES = (Lane("12 + 1"), Lane("native"), Lane("12 + 1", graphs=False), Lane("12 + 1", fp8=True))


@dataclass
class Run:
    """What is measured, within a budget of seconds; what does not fit any more is named instead."""

    device: torch.device
    scale: Scale
    budget: float
    rows: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    steps: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    left_out: list[str] = field(default_factory=list[str])
    began: float = field(default_factory=time.perf_counter)

    def room(self, what: str, seconds: float = 0.0) -> bool:
        """Whether something that takes so many seconds is still begun."""
        if time.perf_counter() - self.began + seconds <= self.budget:
            return True
        self.left_out.append(what)
        return False

    def timed(self, call: Callable[[], object], repeats: int, what: str) -> list[float]:
        """Seconds of up to so many calls, after one that is not counted."""
        found: list[float] = []
        for i in range(repeats + 1):
            if i > 1 and not self.room(f"{what}: repeats from {i}", found[-1]):
                break
            synchronise(self.device)
            began = time.perf_counter()
            call()
            synchronise(self.device)
            if i:
                found.append(time.perf_counter() - began)
        return found


def filled(net: nn.Module, device: torch.device) -> nn.Module:
    """A net of the meta device: bfloat16, matrices normal with deviation 0.02, vectors zero, scales one."""
    eight = [module for module in net.modules() if isinstance(module, Fp8Linear)]
    for module in net.modules():
        if module not in eight:
            for p in module.parameters(recurse=False):
                p.data = p.data.to(HALF)
    net = net.to_empty(device=device)
    generator, values = torch.Generator(device).manual_seed(0), set[int]()
    for module in eight:
        rows = torch.empty(module.weight.shape, device=device, dtype=HALF).normal_(0, 0.02, generator=generator)
        module.take([(rows, None)], device)
        values.add(id(module.weight))
    for name, p in net.named_parameters():
        if id(p) in values:
            continue
        if p.ndim > 1 and not name.endswith("gamma"):
            p.data.normal_(0, 0.02, generator=generator)
        else:
            p.data.fill_(1.0 if name.endswith(("scale", "gamma", "norm.weight")) else 0.0)
            p.data = p.data.to(HALF)
    return net


def model_of(family: str, run: Run, lane: Lane, nets: Sequence[nn.Module] = ()) -> Any:  # noqa: ANN401
    """A model of random weights; `nets` are those of an earlier one."""
    scale, info = run.scale, {"flux": mf.FLUX, "qwen": mf.QWEN}[family]
    if nets:
        net, vae = nets
    else:
        with blueprint():
            channels = scale.channels[family]
            net = Flux(scale.flux) if family == "flux" else QwenImage(scale.qwen)
            vae = VaeFlux(VaeParams(channels)) if family == "flux" else VaeQwen(QwenVaeParams(channels))
            for block in net.stack() if lane.fp8 else ():
                store_fp8(block)
        net, vae = filled(net, run.device), filled(vae, run.device)
    assert isinstance(net, Flux | QwenImage)
    p, values = net.params, {} if family == "flux" else {"encode_values": ENCODE, "decode_values": DECODE}
    assert info.architecture is not None
    text = scale.text[family][0]
    info = replace(
        info,
        architecture=replace(info.architecture, hidden=p.hidden, context=p.context, text_tokens=text),
        footprint=footprint(net, vae, None, **values),
        version="random" + ("+compute fp8" if lane.fp8 else ""),
    )
    runtime = RuntimeOptions(graphs=lane.graphs, compute="fp8" if lane.fp8 else None)
    kind: Any = Flux1 if family == "flux" else Qwen
    return kind(flow=net, vae=vae, text=None, info=info, device=run.device, runtime=runtime)


def words(family: str, run: Run, *, negative: bool = False) -> mf.Condition:
    """An encoded prompt."""
    p = getattr(run.scale, family)
    generator = torch.Generator().manual_seed(1 + negative)
    context = torch.randn(1, run.scale.text[family][negative], p.context, generator=generator)
    more = {"pooled": torch.randn(1, p.pooled, generator=generator).to(HALF)} if family == "flux" else {}
    return mf.Condition({"context": context.to(HALF), **more})


def chain_row(family: str, lane: Lane, model: LatentModel, run: Run) -> None:
    """Seconds of a chain's stages and of the whole, and the peak of memory beside the predicted one."""
    low, high = (run.scale.low,) * 2, (run.scale.high,) * 2
    steps = run.scale.native
    chain: Any = (
        mf.recipes.native(size=high, steps=steps)
        if lane.chain == "native"
        else mf.recipes.paper(mf.Lanczos(2), low=low, size=high)
    )
    given, other = words(family, run), words(family, run, negative=True)
    backbone: Any = model  # which it is with a text encoder
    backbone.condition = lambda prompts: other  # the negative, of no text encoder
    results: list[mf.Result] = []
    if run.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    repeats = 1 if lane.chain == "native" else run.scale.repeats
    what = f"{NAMES[family]} {lane.name}"
    whole = run.timed(lambda: results.append(mf.run(chain, backbone, condition=given, seed=0)), repeats, what)
    kept = results[len(results) - len(whole) :]
    planned = memory(kept[0].plan)
    run.rows.append(
        {
            "model": family,
            "lane": lane.name,
            "steps": steps if lane.chain == "native" else None,
            "seconds": whole,
            "stages": [
                {
                    "name": stage.name,
                    "out": str(stage.spec),
                    "seconds": [r.stages[i].seconds for r in kept],
                    "device_seconds": [r.stages[i].device_seconds for r in kept],
                }
                for i, stage in enumerate(kept[0].stages)
            ],
            "peak_bytes": max(r.peak_bytes for r in kept),
            "predicted_bytes": planned.peak if planned else None,
            "notes": sorted({note for r in kept for note in (*r.notes, *(n for s in r.stages for n in s.notes))}),
        }
    )


def theirs(family: str, run: Run) -> Callable[[Tensor, int], object]:
    """One evaluation of diffusers' transformer of this size: guided by a second one for Qwen-Image."""
    from diffusers import FluxTransformer2DModel, QwenImageTransformer2DModel

    p = getattr(run.scale, family)
    sizes = {
        "num_attention_heads": p.heads,
        "attention_head_dim": p.hidden // p.heads,
        "joint_attention_dim": p.context,
        "axes_dims_rope": p.axes,
        "num_layers": p.double_blocks,
    }
    with torch.device("meta"):
        if family == "flux":
            more = {"num_single_layers": p.single_blocks, "pooled_projection_dim": p.pooled, "guidance_embeds": True}
            net: Any = FluxTransformer2DModel(**sizes, **more)
        else:
            net = QwenImageTransformer2DModel(**sizes, out_channels=16)
    net = filled(net, run.device).eval()
    if family == "qwen":  # its rotations are no buffers
        from diffusers.models.transformers.transformer_qwenimage import QwenEmbedRope

        net.pos_embed = QwenEmbedRope(theta=10000, axes_dim=list(p.axes), scale_rope=True)
    half = torch.full((1,), 0.5, device=run.device, dtype=HALF)
    conds = [words(family, run, negative=n) for n in ((False,) if family == "flux" else (False, True))]
    texts = [c["context"].to(run.device) for c in conds]

    def call(tokens: Tensor, side: int) -> object:
        given: dict[str, Any] = {"hidden_states": tokens, "timestep": half, "return_dict": False}
        if family == "qwen":
            more: dict[str, Any] = {"encoder_hidden_states_mask": None, "img_shapes": [[(1, side, side)]]}
            return [net(**given, **more, encoder_hidden_states=text)[0] for text in texts]
        ids = torch.zeros(side, side, 3, device=run.device)
        ids[..., 1], ids[..., 2] = torch.arange(side)[:, None], torch.arange(side)
        more = {"txt_ids": torch.zeros(texts[0].shape[1], 3, device=run.device), "img_ids": ids.flatten(0, 1)}
        more |= {"guidance": 7 * half, "pooled_projections": conds[0]["pooled"].to(run.device)}
        return net(**given, **more, encoder_hidden_states=texts[0])

    return call


def step_rows(family: str, model: LatentModel, run: Run) -> None:
    """One evaluation, guided for Qwen-Image, of ours as a user runs it without graphs and of diffusers'."""
    other = theirs(family, run) if find_spec("diffusers") is not None else None
    beside = () if family == "flux" else (words(family, run, negative=True),)
    for pixels in (run.scale.low, run.scale.high):
        what, side = f"{NAMES[family]} step at {pixels} px", pixels // 16
        if not run.room(what):
            continue
        velocity = model.field(words(family, run), FieldOptions(sigmas=(0.5,), beside=beside))
        x = torch.randn(1, 16, 2 * side, 2 * side, device=run.device)
        tokens = torch.randn(1, side * side, 64, device=run.device, dtype=HALF)
        repeats = 2 * run.scale.repeats
        with torch.inference_mode():
            row = {"ours": run.timed(lambda: velocity(x, 0.5), repeats, what)}  # noqa: B023
            if other is not None:
                row["diffusers"] = run.timed(lambda: other(tokens, side), repeats, f"{what}, diffusers")  # noqa: B023
        run.steps.append({"model": family, "pixels": pixels, **row})


def measured(run: Run, families: Sequence[str], lanes: Sequence[Lane] = LANES) -> None:
    """Everything, the most wanted first."""
    for family in families:
        nets: tuple[nn.Module, ...] = ()
        for lane in lanes:
            if not run.room(f"{NAMES[family]} {lane.name}"):
                continue
            own = () if lane.fp8 else nets
            model: Any = model_of(family, run, lane, own)
            nets = nets if lane.fp8 else (model.transformer, model._vae)
            chain_row(family, lane, model, run)
        if nets:
            step_rows(family, model_of(family, run, Lane("12 + 1", graphs=False), nets), run)


def commit() -> str:
    """The commit that is checked out, or nothing."""
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return done.stdout.strip()


def content(run: Run) -> dict[str, Any]:
    """What the file holds."""
    cuda = run.device.type == "cuda"
    where = torch.cuda.get_device_name(run.device) if cuda else "a CPU, tiny networks"
    more = {"commit": commit(), "torch": torch.__version__, "seconds": time.perf_counter() - run.began}
    measured = {"rows": run.rows, "steps": run.steps, "left_out": run.left_out}
    return {"name": "full", "device": where, **more, "environment": environment(), **measured}


def spread(seconds: Sequence[float]) -> str:
    """The median, and the range where there is one."""
    if not seconds:
        return ""
    middle = f"{statistics.median(seconds):.3f}"
    return middle if len(seconds) == 1 else f"{middle} ({min(seconds):.3f} to {max(seconds):.3f})"


def table(found: Mapping[str, Any]) -> str:
    """The tables of docs/performance.md, in Markdown, all from one file."""
    date = found["environment"]["date"][:10]
    lines = [f"{found['device']}, torch {found['torch']}, commit `{found['commit']}`, {date}; medians with ranges:", ""]
    lines += ["| model | chain | seconds | stages, seconds | peak GB (predicted) |", "|---|---|---|---|---|"]
    for row in found["rows"]:
        each = ", ".join(f"{s['name']} {statistics.median(s['seconds']):.3f}" for s in row["stages"])
        said = f" ({row['predicted_bytes'] / 1e9:.1f})" if row["predicted_bytes"] else ""
        lane = row["lane"] + (f" {row['steps']}" if row["steps"] else "")
        peak = f"{row['peak_bytes'] / 1e9:.1f}{said}"
        lines.append(f"| {NAMES[row['model']]} | {lane} | {spread(row['seconds'])} | {each} | {peak} |")
    lines += ["", "| one evaluation, no graphs | ours, seconds | diffusers | ratio |", "|---|---|---|---|"]
    for row in found["steps"]:
        both = [row["ours"], row.get("diffusers") or []]
        ratio = f"{statistics.median(both[1]) / statistics.median(both[0]):.2f}" if all(both) else ""
        lines.append(f"| {NAMES[row['model']]}, {row['pixels']} px | {spread(both[0])} | {spread(both[1])} | {ratio} |")
    if found["left_out"]:
        lines += ["", f"Left out, for want of time: {'; '.join(found['left_out'])}."]
    return "\n".join(lines)


MARKS = "<!-- made by experiments.bench.full -->", "<!-- end -->"


def put(text: str, page: Path) -> None:
    """Put the tables where a page marks their place.

    Raises:
        ValueError: it does not.
    """
    before, found, rest = page.read_text("utf-8").partition(MARKS[0])
    _, closed, after = rest.partition(MARKS[1])
    if not found or not closed:
        raise ValueError(f"{page} has no place for the tables, between {MARKS[0]} and {MARKS[1]}")
    page.write_text(f"{before}{MARKS[0]}\n\n{text}\n\n{MARKS[1]}{after}", "utf-8")


def main() -> None:
    """Measure, or show what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument("--budget", type=float, default=900.0, help="seconds after which nothing more is begun")
    parser.add_argument("--tiny", action="store_true", help="small networks on a CPU: a rehearsal")
    parser.add_argument("--out", type=Path, help="the file (default: runs/bench/full-DATE.json)")
    parser.add_argument("--table", type=Path, help="print the tables of this file, and measure nothing")
    parser.add_argument("--into", type=Path, help="with --table: put them into this page, between its marks")
    args = parser.parse_args()
    if args.table is not None:
        text = table(json.loads(args.table.read_text("utf-8")))
        print(text) if args.into is None else put(text, args.into)
        return
    if not args.tiny and not torch.cuda.is_available():
        parser.error("a CUDA device is needed; --tiny rehearses on a CPU")
    device, scale = (torch.device("cpu"), TINY) if args.tiny else (torch.device("cuda"), FULL)
    run, path = Run(device, scale, args.budget), args.out or RUNS / f"full-{datetime.now(UTC):%Y%m%dT%H%M%S}.json"
    try:
        measured(run, args.models)
    finally:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content(run), indent=1) + "\n", encoding="utf-8")
        print(table(content(run)))
        print(f"\nevery sample in {path}")


if __name__ == "__main__":
    main()

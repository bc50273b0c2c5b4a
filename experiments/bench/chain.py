"""C3, C11, C12, C15: what does a whole chain cost beside the published procedure on the same weights?

The reference is the procedure of the official scripts with diffusers' pipelines (FluxPipeline, then FluxImg2ImgPipeline
with explicit sigmas), floats between the stages, both sides with the same Lanczos enlargement: what is compared is the
sampling core, not a super-resolution net. Pictures are held against each other first (1e-4 in float32). The native row
compares our own native 50 steps with our staged 12 + 1: its bar is 0.85 of what arithmetic alone would give. Overhead
is the time per step and per call with a network that does nothing. Memory is one picture in a process of its own.

    python -m experiments.bench.chain --sizes tiny
"""

import argparse
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import mrflow as mf
from experiments.bench.forward import scatter
from experiments.bench.protocol import Row, Runs, fresh, paired, publish, seconds
from experiments.bench.vae import autoencoder

STEPS, NATIVE = 12, 50
SEED = 5


class Size(NamedTuple):
    """Parts and pictures; `bar` is for the published procedure."""

    heads: int
    axes: tuple[int, int, int]
    blocks: tuple[int, int]
    channels: tuple[int, ...]
    context: int
    text: int
    low: int
    bar: float


SIZES = {
    "tiny": Size(4, (8, 12, 12), (2, 4), (32, 32, 64, 64), 64, 32, 128, 1.5),
    "small": Size(6, (8, 28, 28), (2, 4), (64, 64, 128, 128), 128, 64, 256, 1.2),
}
POOLED = 64


def pipeline(size: Size) -> Any:  # noqa: ANN401
    """A FluxPipeline of random weights without text encoders."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
    from diffusers.utils.logging import set_verbosity_error

    set_verbosity_error()
    transformer: Any = FluxTransformer2DModel(
        in_channels=64,
        num_layers=size.blocks[0],
        num_single_layers=size.blocks[1],
        attention_head_dim=sum(size.axes),
        num_attention_heads=size.heads,
        joint_attention_dim=size.context,
        pooled_projection_dim=POOLED,
        guidance_embeds=True,
        axes_dims_rope=size.axes,
    )
    vae: Any = autoencoder(size.channels)
    scatter(transformer, 3)
    scatter(vae, 4)
    pipe: Any = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(
            base_image_seq_len=256,
            base_shift=0.5,
            max_image_seq_len=4096,
            max_shift=1.15,
            shift=3.0,
            use_dynamic_shifting=True,
        ),
        vae=vae.eval(),
        transformer=transformer.eval(),
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def words(size: Size) -> dict[str, Tensor]:
    """Encoded prompts."""
    g = torch.Generator().manual_seed(1)
    context = torch.randn(1, size.text, size.context, generator=g)
    return {"context": context, "pooled": torch.randn(1, POOLED, generator=g)}


def published(pipe: Any, size: Size) -> Callable[[], Tensor]:  # noqa: ANN401
    """The official procedure, built once: what a call costs is sampling, enlarging, encoding, refining, decoding."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxImg2ImgPipeline

    parts = {k: v for k, v in pipe.components.items() if k not in ("scheduler", "image_encoder", "feature_extractor")}
    direct = FlowMatchEulerDiscreteScheduler(shift=1.0, use_dynamic_shifting=False)
    refiner: Any = FluxImg2ImgPipeline(**parts, scheduler=direct)
    refiner.set_progress_bar_config(disable=True)
    given = {"prompt_embeds": words(size)["context"], "pooled_prompt_embeds": words(size)["pooled"]}
    up, low, high = mf.Lanczos(2), size.low, 2 * size.low

    def call() -> Tensor:
        small = pipe(
            **given,
            height=low,
            width=low,
            num_inference_steps=STEPS,
            generator=torch.Generator().manual_seed(SEED),
            output_type="pt",
        ).images
        large: Tensor = refiner(
            **given,
            image=up(small).clamp(0, 1),
            strength=1.0,
            sigmas=[0.12],
            height=high,
            width=high,
            num_inference_steps=1,
            guidance_scale=3.5,
            generator=torch.Generator().manual_seed(SEED + 1),
            output_type="pt",
        ).images
        return large

    return call


def ours(model: mf.Backbone, size: Size, chain: mf.Chain[mf.Start, mf.Pixels]) -> Callable[[], Tensor]:
    """A chain as a user runs it."""
    cond = mf.Condition(words(size))
    return lambda: mf.run(chain, model, condition=cond, seed=SEED).pixels


def staged(size: Size) -> mf.Chain[mf.Start, mf.Pixels]:
    """The official recipe at this size."""
    return mf.recipes.official(mf.Lanczos(2), low=(size.low,) * 2, size=(2 * size.low,) * 2, steps=STEPS)


def counted_flops(call: Callable[[], Tensor]) -> int:
    """What a call's matrix products, attention and convolutions come to."""
    with FlopCounterMode(display=False) as counter:
        call()
    return int(counter.get_total_flops())


def whole(name: str, folder: Path, repeats: int | None) -> list[Row]:
    """C11 and C12 at one size."""
    size = SIZES[name]
    pipe = pipeline(size)
    pipe.save_pretrained(folder)
    model = mf.load(folder, device="cpu")
    official = paired(published(pipe, size), ours(model, size, staged(size)), repeats=repeats, limit=1e-4)
    native = mf.recipes.native(size=(2 * size.low,) * 2, steps=NATIVE)
    counted = [counted_flops(ours(model, size, chain)) for chain in (native, staged(size))]
    gain = paired(ours(model, size, native), ours(model, size, staged(size)), repeats=repeats or 9)
    ideal = counted[0] / counted[1]
    return [
        Row(f"{name}: published procedure against ours", official, size.bar, "cpu", {"note": "same picture"}),
        Row(
            f"{name}: our native 50 against our 12 + 1", gain, 0.85 * ideal, "cpu", {"note": f"arithmetic {ideal:.1f}x"}
        ),
    ]


def idle(x: Tensor) -> Callable[..., Any]:
    """A network that gives its answer at once."""
    return lambda *_, **__: (x,)


def overhead(repeats: int) -> list[Row]:
    """C3: a call of 50 steps, and of 10, with a network that does nothing."""
    size = SIZES["tiny"]
    pipe = pipeline(size)
    tokens = (size.low // 16) ** 2
    given = {"prompt_embeds": words(size)["context"], "pooled_prompt_embeds": words(size)["pooled"]}
    pipe.transformer.forward = idle(torch.zeros(1, tokens, 64))
    with tempfile.TemporaryDirectory() as folder:
        pipeline(size).save_pretrained(folder)
        model: Any = mf.load(folder, device="cpu")
    model._step = lambda *_, **__: torch.zeros(1, tokens, 64)
    model.transformer.tables = lambda sigmas, *_: [torch.zeros(1, 1, 1)] * len(sigmas)
    cond = mf.Condition(words(size))
    rows: list[Row] = []
    for steps in (10, 50):
        chain = mf.Sample(size.low, size.low, mf.Shifted(steps))

        def theirs(steps: int = steps) -> object:
            return pipe(
                **given,
                height=size.low,
                width=size.low,
                num_inference_steps=steps,
                generator=torch.Generator().manual_seed(SEED),
                output_type="latent",
            ).images

        def own(chain: Any = chain) -> object:  # noqa: ANN401
            return mf.run(chain, model, condition=cond, seed=SEED).data

        rows.append(Row(f"nothing but {steps} steps", paired(theirs, own, repeats=repeats)))
    each = [[statistics.median(seconds(side, "cpu")) for side in (row.runs.reference, row.runs.ours)] for row in rows]
    for side, name in enumerate(("reference", "ours")):
        step = (each[1][side] - each[0][side]) / 40
        print(f"{name}: {1000 * step:.3f} ms a step, {1000 * (each[0][side] - 10 * step):.2f} ms a call")
    return rows


PICTURE = """
import json, sys, warnings
warnings.simplefilter("ignore")
import torch
torch.set_num_threads(1)
from experiments.bench.chain import SIZES, published, ours, staged
size, folder = SIZES[{name!r}], {folder!r}
if {reference}:
    from diffusers import FluxPipeline
    none = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
    pipe = FluxPipeline.from_pretrained(folder, **none)
    pipe.set_progress_bar_config(disable=True)
    published(pipe, size)()
else:
    import mrflow as mf
    ours(mf.load(folder, device="cpu"), size, staged(size))()
"""


def memory(name: str, repeats: int) -> list[Row]:
    """C15: one picture in a process of its own: time from start to end, and the peak of its own memory."""
    with tempfile.TemporaryDirectory() as folder:
        pipeline(SIZES[name]).save_pretrained(folder)
        codes = [PICTURE.format(name=name, folder=folder, reference=reference) for reference in (True, True, False)]
        first, again, own = fresh(*codes, repeats=repeats)
    peaks = [statistics.median(f.anon for f in side) for side in (first, own)]
    note = f"peak {peaks[0]:.0f} MiB against {peaks[1]:.0f}: {peaks[1] / peaks[0]:.2f}x"
    return [Row(f"{name}: a process for one picture", Runs(first, again, own), 1.0, "cpu", {"note": note})]


def main() -> None:
    """Print a table and write every sample."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--repeats", type=int, help="unless said, what the time of a call asks for")
    args = parser.parse_args()
    rows: list[Row] = []
    for name in args.sizes:
        with tempfile.TemporaryDirectory() as folder:
            rows += whole(name, Path(folder), args.repeats)
    rows += overhead(args.repeats or 60)
    rows += memory(args.sizes[-1], args.repeats or 5)
    publish("chain", rows)


if __name__ == "__main__":
    main()

"""What does the upscaler between the two resolutions change, before and after the refining step?

`paper` 12 + 1 on held-out captions of the embedded model with eight upscalers: its own net, interpolation of pixels,
and interpolation of latents. One low-resolution stage serves them all. For each: PSNR to held-out scenes drawn at the
full size of what it makes of the same scenes at the low size, decoded; what is legible of the caption in the enlarged
picture and in the refined one, of letters alone, the difference to the model's own net (paired by picture, 95 %
bootstrap interval over captions), the energy of the autoencoder's round trip on the latents
that are refined, in units of native latents', sharpness beside native's, and the seconds that the upscaler takes for
one picture.

    python -m experiments.upscalers --picture docs/images/upscalers.png
"""

import argparse
import statistics
import textwrap
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

import mrflow as mf
from experiments.hard_scores import truths
from experiments.pocket_scores import Row, interval, seeds_of
from experiments.studies.common import captions as prompts
from mrflow.errors import MrflowError
from mrflow.metrics import psnr, round_trip_energy, sharpness
from mrflow.records.pictures import check_writable, to_images, write_png
from mrflow.scenes.legible import hard_score
from mrflow.stage import Chain
from mrflow.upscalers.interpolate import Filter

CELL = 112  # pixels a side of each picture on the sheet
SHOWN = ("a blue sign in 13% letters, CAT and DOG", "a 5x5 grid of green circles with a red star in row 2 column 4")
HEAD = "| upscaler | PSNR | enlarged | refined | its letters | refined minus own net | energy | sharpness | seconds |"
FILTERS: tuple[Filter, ...] = ("nearest", "bilinear", "bicubic")


def chains(info: mf.ModelInfo) -> dict[str, Chain[mf.Start, mf.Pixels]]:
    """The methods by name."""
    low, size, paper, latent = info.low, info.size, mf.recipes.paper, mf.recipes.latent
    return {
        "own net": paper(low=low, size=size),
        **{f: paper(mf.Interpolate(2, f), low=low, size=size) for f in FILTERS},
        "lanczos": paper(mf.Lanczos(2), low=low, size=size),
        **{f"latent {f}": latent(f, low=low, size=size) for f in FILTERS},
    }


def stage(result: mf.Result, *names: str) -> Tensor:
    """What the first stage of one of these names gave."""
    found = next(s.data for s in result.stages if s.name in names)
    assert found is not None
    return found


def enlarged(result: mf.Result, model: mf.Backbone) -> tuple[Tensor, Tensor]:
    """The picture before refinement, and the latents that are refined, before noise."""
    if any(s.name == "Lift" for s in result.stages):
        latents = stage(result, "Lift")
        return model.decode(latents), latents
    return stage(result, "Upscale"), stage(result, "Encode")


def enlarging(chain: Chain[mf.Start, mf.Pixels]) -> Chain[mf.Pixels, mf.Pixels]:
    """What a method does to a picture of the low size between its two samplers, through the autoencoder."""
    stages = tuple(chain)
    lift = next((s for s in stages if isinstance(s, mf.Lift)), None)
    if lift is not None:
        return mf.Encode() >> lift >> mf.Decode()
    return mf.Encode() >> mf.Decode() >> next(s for s in stages if isinstance(s, mf.Upscale))


def read(pixels: Tensor, captions: list[str]) -> list[Row]:
    """What is legible of each caption in its picture, by category."""
    return [hard_score(image, caption) for image, caption in zip(pixels.numpy(), captions, strict=True)]


def mean(rows: list[Row], category: str = "overall") -> float:
    """Of a category over the pictures that have it; NaN where none has."""
    there = [row[category] for row in rows if category in row]
    return statistics.fmean(there) if there else float("nan")


def main() -> None:
    """Print a Markdown table; draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="pocket", help="or a version, pocket-4")
    parser.add_argument("--captions", type=int, default=24, help="of each size of detail")
    parser.add_argument("--batch", type=int, default=20)
    parser.add_argument("--picture", type=Path)
    args = parser.parse_args()
    if args.picture:
        try:
            check_writable(args.picture)
        except MrflowError as error:
            parser.error(str(error))
    model, rng = mf.load(args.model, device="cpu"), np.random.default_rng(0)
    methods, cache = chains(model.info), mf.StageCache(max_bytes=4 << 30)
    captions = [prompt.text for prompt in prompts(args.captions)]
    parts = [slice(i, i + args.batch) for i in range(0, len(captions), args.batch)]
    seeds = seeds_of(captions)
    native = mf.recipes.native(size=model.info.size, steps=50)
    with torch.inference_mode():
        energy: list[Tensor] = []
        sharp: list[Tensor] = []
        for p in parts[:1]:  # one batch is enough for a unit
            result = mf.run(native, model, captions[p], seed=seeds[p], keep=True)
            energy.append(round_trip_energy(model, stage(result, "Sample")))
            sharp.append(sharpness(result.pixels))
        whole = statistics.median(mf.run(native, model, captions[0], seed=i).seconds for i in range(3))
        sides = (model.info.low[0], model.info.size[0])
        small, large = (truths(captions, side) for side in sides)
        native_energy, native_sharp = float(torch.cat(energy).mean()), float(torch.cat(sharp).mean())
        print(f"{model.info.version}, {len(captions)} captions")
        print(f"native 50: {whole:.2f} s, round-trip energy {native_energy:.4f}, sharpness {native_sharp:.4f}\n")
        print(HEAD + "\n" + "|---" * (HEAD.count("|") - 1) + "|")
        own: list[Row] = []
        for name, chain in methods.items():
            before: list[Row] = []
            after: list[Row] = []
            energies: list[Tensor] = []
            sharpnesses: list[Tensor] = []
            for p in parts:
                result = mf.run(chain, model, captions[p], seed=seeds[p], keep=True, cache=cache)
                pixels, latents = enlarged(result, model)
                before += read(pixels, captions[p])
                after += read(result.pixels, captions[p])
                energies.append(round_trip_energy(model, latents))
                sharpnesses.append(sharpness(result.pixels))
            own = own or after
            pairs = zip(captions, after, own, strict=True)
            middle, least, most = interval([(c, a["overall"] - b["overall"]) for c, a, b in pairs], rng)
            difference = "" if name == "own net" else f"{middle:+.3f} [{least:+.3f}, {most:+.3f}]"
            fidelity = [
                psnr(mf.run(enlarging(chain), model, [""] * len(x), start=x).pixels, y)
                for x, y in zip(small.split(args.batch), large.split(args.batch), strict=True)
            ]
            times = []
            for i in range(5):
                single = mf.run(chain, model, captions[0], seed=i)
                times.append(next(s.seconds for s in single.stages if s.name in ("Upscale", "Lift")))
            print(
                f"| {name} | {float(torch.cat(fidelity).mean()):.2f} "
                f"| {mean(before):.3f} | {mean(after):.3f} | {mean(after, 'letters'):.3f} | {difference} "
                f"| {float(torch.cat(energies).mean()) / native_energy:.2f} "
                f"| {float(torch.cat(sharpnesses).mean()) / native_sharp:.2f} | {statistics.median(times):.4f} |",
                flush=True,
            )
    if args.picture:
        write_png(args.picture, sheet(methods, model))
        print(f"\n{args.picture}")


def sheet(methods: dict[str, Chain[mf.Start, mf.Pixels]], model: mf.Backbone) -> Image.Image:
    """A column an upscaler; for each caption what it gave, and below that what refinement made of it; rows named."""
    side, gap, head, margin = CELL, 5, 24, 118
    columns, rows, font = len(methods), 2 * len(SHOWN), ImageFont.load_default(12)
    out = Image.new("RGB", (margin + columns * (side + gap) + gap, head + rows * (side + gap) + gap), "white")
    draw = ImageDraw.Draw(out)
    for row in range(rows):
        text = f"{wrapped(SHOWN[row // 2], 17)}\n\n{('enlarged', 'refined')[row % 2]}"
        middle = head + gap + row * (side + gap) + side // 2
        draw.multiline_text((gap + 2, middle), text, fill="black", font=font, anchor="lm", spacing=2)
    for x, (name, chain) in enumerate(methods.items()):
        left = margin + gap + x * (side + gap)
        draw.text((left, 2), name, fill="black", font=font)
        result = mf.run(chain, model, list(SHOWN), seed=1, keep=True)
        with torch.inference_mode():
            before = to_images(enlarged(result, model)[0])
        for i, pair in enumerate(zip(before, result.images, strict=True)):
            for j, image in enumerate(pair):
                out.paste(
                    image.resize((side, side), Image.Resampling.LANCZOS),
                    (left, head + gap + (2 * i + j) * (side + gap)),
                )
    return out


def wrapped(text: str, width: int) -> str:
    """A text in lines of at most so many letters."""
    return "\n".join(textwrap.wrap(text, width))


if __name__ == "__main__":
    main()

"""What do caches in the low-resolution stage save, and what do they change? Fewer steps are beside them.

On the embedded model: `paper` 12 + 1 with a cache in its first stage. Forwards and operations are those that the runs
counted there; PSNR is to the same pictures without a cache; a reader says how much of its caption is legible in each.
`--calibrate` measures what TeaCache and MagCache know of the model (mrflow/caches).

    python -m experiments.caches
    python -m experiments.caches --calibrate
"""

import argparse

import torch

import mrflow as mf
from experiments.pocket_scores import seeds_of
from experiments.studies.common import captions as prompts
from mrflow.caches import DMD, L2P, Cache, DBCache, MagCache, SeaCache, Spectrum, TaylorSeer, TeaCache
from mrflow.scenes.legible import hard_score

CACHES: tuple[Cache, ...] = (
    TeaCache(0.1),
    TeaCache(0.25),
    MagCache(0.15),
    MagCache(0.4),
    DBCache(0.2, front=1, warmup=2),
    DBCache(0.4, front=1, warmup=2),
    DBCache(0.2, front=1, warmup=2, order=1),
    DBCache(0.4, front=1, warmup=2, order=1),
    TaylorSeer(2, order=0),
    TaylorSeer(2),
    TaylorSeer(3),
    TaylorSeer(3, of="velocity"),
    SeaCache(0.15),
    SeaCache(0.3),
    Spectrum(warmup=4),
    Spectrum(warmup=4, mix=0.5),
    DMD(1.0, front=1, warmup=4, limit=2),
)


def main() -> None:
    """Print a Markdown table, or the numbers of the calibration."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--captions", type=int, default=24, help="of each size of detail")
    parser.add_argument("--batch", type=int, default=20)
    parser.add_argument("--calibrate", action="store_true", help="print coefficients and ratios instead")
    args = parser.parse_args()
    model = mf.load("pocket", device="cpu")
    if args.calibrate:
        captions = [prompt.text for prompt in prompts(21, seed=1)]
        tea = TeaCache.calibrated(0.25, model, captions, schedule=mf.Shifted(12), degree=2)
        mag = MagCache.calibrated(0.06, model, captions, schedule=mf.Shifted(12))
        print("coefficients", [float(f"{c:.4g}") for c in tea.coefficients or ()])
        print("ratios", [round(r, 4) for r in mag.ratios or ()])
        return
    captions = [prompt.text for prompt in prompts(args.captions)]
    low, size = model.info.low, model.info.size
    plain = mf.recipes.paper(low=low, size=size)

    def cached(cache: Cache) -> mf.Chain[mf.Start, mf.Pixels]:
        return mf.Sample(*low, cache=cache) >> plain[1:]

    chains = {"no cache": plain}
    chains |= {repr(cache): cached(cache) for cache in CACHES}
    for interval in (2, 3):  # fitted to other captions
        line = L2P.calibrated(interval, model, [p.text for p in prompts(4, seed=1)], schedule=mf.Shifted(12))
        chains[f"L2P({interval})"] = cached(line)
    chains |= {f"{steps} steps": mf.recipes.paper(low=low, size=size, steps=steps) for steps in (8, 6, 4)}
    bare: torch.Tensor | None = None
    whole, seeds = 0.0, seeds_of(captions)
    print("| first stage | forwards a picture | operations | PSNR | legible |\n|---|---|---|---|---|")
    for name, chain in chains.items():
        forwards, flops, parts = 0, 0.0, list[torch.Tensor]()
        for at in range(0, len(captions), args.batch):
            some = captions[at : at + args.batch]
            result = mf.run(chain, model, some, seed=seeds[at : at + args.batch])
            forwards, flops = forwards + result.stages[0].nfe * len(some), flops + result.stages[0].flops
            parts.append(result.pixels)
        pixels = torch.cat(parts)
        if bare is None:
            bare, whole = pixels, flops
        errors = (pixels - bare).square().mean((1, 2, 3))
        psnr = f"{float(-10 * errors.log10().mean()):.1f} dB" if float(errors.max()) > 0 else "same"
        read = [hard_score(x, text)["overall"] for x, text in zip(pixels.numpy(), captions, strict=True)]
        cells = (f"{forwards / len(captions):.1f}", f"{flops / whole:.2f}", psnr, f"{sum(read) / len(read):.3f}")
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()

"""Does staged sampling keep what native sampling draws, by category, and how much faster is it?

On held-out captions: `paper` 12 + 1, native 50 steps, and native with few steps, in one run on one machine. The scorer
reads every picture back against its caption, and against another caption of its kind (chance). Intervals are 95 %
bootstrap over captions; differences are paired by caption. Times are for single pictures, after a warm-up, interleaved.

    python -m experiments.pocket_scores --captions 200 --golden
"""

import argparse
import json
import statistics
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

import mrflow as mf
from mrflow.io import write_bytes
from mrflow.scenes.grammar import POCKET_1, held_out_captions
from mrflow.scenes.score import score
from mrflow.sheet import warm_up

Chain = mf.Chain[mf.Start, mf.Pixels]


def pictures(chain: Chain, model: mf.Backbone, captions: list[str], batch: int) -> NDArray[np.float32]:
    """One picture a caption, seed 0."""
    parts = [mf.run(chain, model, captions[i : i + batch], seed=0).pixels for i in range(0, len(captions), batch)]
    return torch.cat(parts).numpy()


def others(captions: list[str]) -> list[str]:
    """For each caption, another one of the same kind of scene."""
    from mrflow.scenes.grammar import parse

    kinds: dict[str, list[int]] = {}
    for i, caption in enumerate(captions):
        kinds.setdefault(parse(caption).kind, []).append(i)
    out = list(captions)
    for members in kinds.values():
        for a, b in zip(members, members[1:] + members[:1], strict=True):
            out[a] = captions[b]
    return out


def table(images: NDArray[np.float32], captions: list[str]) -> list[dict[str, float]]:
    """Scores of each picture by category."""
    return [score(image, caption).as_dict() for image, caption in zip(images, captions, strict=True)]


def interval(values: list[float], rng: np.random.Generator) -> tuple[float, float, float]:
    """Mean and its 95 % bootstrap interval."""
    array = np.array(values)
    means = array[rng.integers(0, len(array), (2000, len(array)))].mean(1)
    return float(array.mean()), float(np.quantile(means, 0.025)), float(np.quantile(means, 0.975))


def main() -> None:
    """Print a Markdown table, and what the timing found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--captions", type=int, default=200)
    parser.add_argument("--native", type=int, default=80, help="captions that the slow native 50 steps draw")
    parser.add_argument("--batch", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--golden", action="store_true", help="also write tests/golden/pocket.json")
    args = parser.parse_args()
    model, rng = mf.load("pocket", device="cpu"), np.random.default_rng(0)
    low, size = model.info.low, model.info.size
    chains: dict[str, Chain] = {
        "staged 12 + 1": mf.recipes.paper(low=low, size=size),
        "native 50": mf.recipes.native(size=size, steps=50),
        "native 12": mf.recipes.native(size=size, steps=12),
        "native 6": mf.recipes.native(size=size, steps=6),
    }
    if args.golden:
        golden(chains["staged 12 + 1"], model)
    warm_up(tuple(chains.values()), model, 1)
    seconds: dict[str, list[float]] = {name: [] for name in chains}
    for i in range(args.repeats):
        for name, chain in chains.items():
            seconds[name].append(mf.run(chain, model, "a big red circle at the left", seed=i).seconds)
    captions = held_out_captions(POCKET_1, args.captions)
    swapped = others(captions)
    count = {name: args.native if name == "native 50" else args.captions for name in chains}
    rows = {name: pictures(chain, model, captions[: count[name]], args.batch) for name, chain in chains.items()}
    scores = {name: table(images, captions[: count[name]]) for name, images in rows.items()}
    chance = {name: table(rows[name], swapped[: count[name]]) for name in ("staged 12 + 1", "native 50")}
    categories = [*sorted({c for each in scores["staged 12 + 1"] for c in each} - {"overall"}), "overall"]
    drawn = f"{len(captions)} held-out captions ({args.native} for native 50)"
    print(f"{model.info.version}, {drawn}, torch {torch.__version__}\n")
    print(f"| category | n | {' | '.join(scores)} | staged, other caption | native 50, other caption |")
    print("|---|---|" + "---|" * (len(scores) + 2))
    for category in categories:
        cells = []
        for each in (*scores.values(), *chance.values()):
            mean, a, b = interval([s[category] for s in each if category in s], rng)
            cells.append(f"{mean:.2f} ({a:.2f}-{b:.2f})")
        print(f"| {category} | {sum(category in s for s in scores['staged 12 + 1'])} | {' | '.join(cells)} |")
    pairs = zip(scores["staged 12 + 1"], scores["native 50"], strict=False)
    mean, a, b = interval([s["overall"] - n["overall"] for s, n in pairs], rng)
    print(f"\nstaged - native 50, paired, overall: {mean:+.3f} ({a:+.3f} to {b:+.3f})")
    for name, times in seconds.items():
        ratios = [n / t for n, t in zip(seconds["native 50"], times, strict=True)]
        spread = f"{min(ratios):.1f} to {max(ratios):.1f}"
        print(f"{name}: {statistics.median(times):.3f} s a picture, {statistics.median(ratios):.1f}x ({spread})")


def golden(chain: Chain, model: mf.Backbone) -> None:
    """Write the golden of the end-to-end test: block means of one picture."""
    prompt, seed = "a green triangle left of a blue square", 7
    means = torch.nn.functional.avg_pool2d(mf.run(chain, model, prompt, seed=seed).pixels[0], 32)
    data = {
        "how": "python -m experiments.pocket_scores --golden: means over 32 x 32 pixels of the default staged picture",
        "version": model.info.version,
        "prompt": prompt,
        "seed": seed,
        "means": [[[round(v, 4) for v in row] for row in channel] for channel in means.tolist()],
    }
    write_bytes(Path("tests/golden/pocket.json"), (json.dumps(data, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()

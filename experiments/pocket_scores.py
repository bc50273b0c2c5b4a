"""Does staged sampling keep what native sampling draws, by category, and how much faster is it?

On held-out captions: `paper` 12 + 1, native 50 steps, and native with few steps, in one run on one machine. The scorer
reads every picture back against its caption, and against another caption of its kind. Beside the methods are control
rows (`mrflow.sweep.controls`). Intervals are 95 % over distinct captions, which are few for faces; differences are
paired by picture, and called one by sign-flip tests corrected for the table. Times are medians for single pictures,
after a warm-up, the methods taking turns; the range of the ratio is over repeats.

    python -m experiments.pocket_scores --keep runs/scores      # native 50 at 512 px: hours on a processor; goes on
    python -m experiments.pocket_scores --size 256
    python -m experiments.pocket_scores --model pocket-4
"""

import argparse
import hashlib
import json
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

import mrflow as mf
from experiments.train_pocket.data import WORLDS
from mrflow.display.sheet import warm_up
from mrflow.records.chains import encode_chain
from mrflow.records.pictures import check_writable, write_bytes
from mrflow.scenes.grammar import held_out_captions, parse_caption
from mrflow.scenes.score import score
from mrflow.sweep import compare_differences, controls, family, seed_of
from mrflow.sweep import interval as mean_of

Chain = mf.Chain[mf.Start, mf.Pixels]
Row = dict[str, float]  # a picture's scores by category
BLOCK = 8  # pixels of a side of what the golden averages
STAGED, NATIVE = "staged 12 + 1", "native 50"


def pictures(
    chain: Chain, model: mf.Backbone, captions: list[str], seeds: list[int], batch: int
) -> NDArray[np.float32]:
    """One picture a caption, (n, 3, h, w)."""
    parts = [slice(i, i + batch) for i in range(0, len(captions), batch)]
    return torch.cat([mf.run(chain, model, captions[p], seed=seeds[p]).pixels.cpu() for p in parts]).numpy()


def seeds_of(captions: list[str]) -> list[int]:
    """As in sweeps: a seed of its own for each caption, and for each time that it occurs."""
    seen = Counter[str]()
    out: list[int] = []
    for caption in captions:
        out.append(seed_of(caption, seen[caption]))
        seen[caption] += 1
    return out


def other_captions(captions: Sequence[str]) -> list[str | None]:
    """For each caption the next different one of its own kind, going round; None where there is no such caption."""
    kinds = [parse_caption(caption).kind for caption in captions]
    out: list[str | None] = []
    for i, caption in enumerate(captions):
        later = (j % len(captions) for j in range(i + 1, i + len(captions)))
        out.append(next((captions[j] for j in later if kinds[j] == kinds[i] and captions[j] != caption), None))
    return out


def read_back(
    chain: Chain, model: mf.Backbone, captions: list[str], batch: int, keep: Path | None = None
) -> tuple[list[Row], list[Row]]:
    """Scores of a chain's pictures against their captions and against other ones.

    With a folder, those of each batch are kept there, and not drawn again where chain, model and captions are the same.
    """
    swapped, seeds = other_captions(captions), seeds_of(captions)
    own, other = list[Row](), list[Row]()
    for i in range(0, len(captions), batch):
        mine, noise = captions[i : i + batch], seeds[i : i + batch]
        facts = (model.info.version, str(model.device), torch.__version__, noise, mine, swapped[i : i + batch])
        key = repr((encode_chain(chain), *facts))
        path = None if keep is None else keep / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"
        if path is not None and path.exists():
            both = json.loads(path.read_text())
        else:
            images = pictures(chain, model, mine, noise, batch)
            both = [table(images, list(mine)), table(images, swapped[i : i + batch])]
            if path is not None:
                write_bytes(path, json.dumps(both).encode())
        own += both[0]
        other += both[1]
    return own, other


def table(images: NDArray[np.float32], captions: list[str | None]) -> list[Row]:
    """Scores of each picture by category; nothing where there is no caption to hold it against."""
    pairs = zip(images, captions, strict=True)
    return [{} if caption is None else score(image, caption).as_dict() for image, caption in pairs]


def by_caption(values: list[tuple[str, float]]) -> dict[str, list[float]]:
    """The values of each caption."""
    groups: dict[str, list[float]] = {}
    for caption, value in values:
        groups.setdefault(caption, []).append(value)
    return groups


def interval(
    values: list[tuple[str, float]], rng: np.random.Generator, *, share: bool = False
) -> tuple[float, float, float]:
    """Mean of (caption, value) rows and its 95 % interval over captions, as `mrflow.sweep.interval`."""
    found = mean_of(by_caption(values), draws=4000, seed=int(rng.integers(2**32)), share=share)
    return found.mean, found.low, found.high


def main() -> None:
    """Print a Markdown table, and what the timing found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="pocket", help="or a version, pocket-4")
    parser.add_argument("--world", choices=list(WORLDS), default="full", help="of the captions")
    parser.add_argument("--captions", type=int, default=200, help="0: only the speeds")
    parser.add_argument("--batch", type=int, default=20)
    parser.add_argument(
        "--size", type=int, help="of the pictures' side, the low stage's is half; without it, the model's"
    )
    parser.add_argument("--only", nargs="+", default=[], metavar="CHAIN", help='some of them, such as "staged 12 + 1"')
    parser.add_argument("--repeats", type=int, default=9, help="of the timing; 0: only the scores")
    parser.add_argument("--device", default="cpu", help="auto, cpu or cuda")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="of scores, so that an interrupted run goes on")
    parser.add_argument("--golden", action="store_true", help="also write tests/golden/pocket.json")
    args = parser.parse_args()
    if args.size is not None and (args.size < 32 or args.size % 32):
        parser.error(f"--size must be a multiple of 32, got {args.size}")
    if args.keep is not None:
        args.keep.mkdir(parents=True, exist_ok=True)
        check_writable(args.keep / "scores.json")
    model = mf.load(args.model, device=args.device)
    size = model.info.size if args.size is None else (args.size, args.size)
    low = (size[0] // 2, size[1] // 2)
    chains: dict[str, Chain] = {
        STAGED: mf.recipes.paper(low=low, size=size),
        NATIVE: mf.recipes.native(size=size, steps=50),
        "native 12": mf.recipes.native(size=size, steps=12),
        "native 6": mf.recipes.native(size=size, steps=6),
    }
    chains |= controls(model.info, low=low, size=size, staged=chains[STAGED], beside=chains)
    if unknown := set(args.only) - set(chains):
        parser.error(f"no chain is called {', '.join(sorted(unknown))}; there are {', '.join(chains)}")
    chains = {name: chain for name, chain in chains.items() if not args.only or name in args.only}
    if args.golden:
        golden(mf.recipes.paper(low=model.info.low, size=model.info.size), model)
    print(f"{model.info.version}, torch {torch.__version__}, on {model.device}\n")
    if args.captions:
        captions = held_out_captions(WORLDS[args.world], args.captions)
        print("\n".join(scored(chains, model, captions, args.batch, args.keep)))
        print()
    if args.repeats:
        sampled = {name: chain for name, chain in chains.items() if not isinstance(next(iter(chain)), mf.Truth)}
        print("\n".join(timed(sampled, model, args.repeats)))


def timed(chains: Mapping[str, Chain], model: mf.Backbone, repeats: int) -> list[str]:
    """Seconds of one picture and the speed-up over native sampling: medians and ranges of rounds that draw all."""
    warm_up(tuple(chains.values()), model, 1)
    seconds: dict[str, list[float]] = {name: [] for name in chains}
    for i in range(repeats):
        for name, chain in chains.items():
            seconds[name].append(mf.run(chain, model, "a big red circle at the left", seed=i).seconds)
    lines: list[str] = []
    for name, times in seconds.items():
        line = f"- {name}: {statistics.median(times):.3f} s a picture"
        if NATIVE in seconds:
            ratios = [n / t for n, t in zip(seconds[NATIVE], times, strict=True)]
            line += f", {statistics.median(ratios):.1f}x ({min(ratios):.1f} to {max(ratios):.1f})"
        lines.append(line)
    return lines


def scored(
    chains: Mapping[str, Chain], model: mf.Backbone, captions: list[str], batch: int, keep: Path | None = None
) -> list[str]:
    """A Markdown table of scores by category; the verdicts of its last column are one family of tests."""
    rng = np.random.default_rng(0)
    rows = {name: read_back(chain, model, captions, batch, keep) for name, chain in chains.items()}
    scores = {name: own for name, (own, _) in rows.items()}
    wrong = {f"{name}, other caption": rows[name][1] for name in (STAGED, NATIVE) if name in rows}
    columns, first, both = {**scores, **wrong}, next(iter(scores.values())), STAGED in scores and NATIVE in scores
    categories = [*sorted({c for each in first for c in each} - {"overall"}), "overall"]

    def cell(values: list[tuple[str, float]]) -> str:
        if not values:  # no other caption of this kind among so few
            return "-"
        return "{:.2f} ({:.2f} to {:.2f})".format(*interval(values, rng, share=True))

    triples = list(zip(captions, scores[STAGED], scores[NATIVE], strict=True)) if both else []
    differences = {
        category: by_caption([(c, a[category] - b[category]) for c, a, b in triples if category in a])
        for category in (categories if both else [])
    }
    judged = family(
        {name: compare_differences("score", each, draws=4000) for name, each in differences.items() if each}
    )

    heads = [*columns, *(["staged - native 50, paired"] if both else [])]
    lines = [f"| category | pictures | captions | {' | '.join(heads)} |", "|---|---|---|" + "---|" * len(heads)]
    for category in categories:
        own = [caption for caption, s in zip(captions, first, strict=True) if category in s]
        cells = [
            cell([(c, s[category]) for c, s in zip(captions, each, strict=True) if category in s])
            for each in columns.values()
        ]
        if category in judged:
            d = judged[category].difference
            cells.append(f"{d.mean:+.2f} ({d.low:+.2f} to {d.high:+.2f}), {judged[category].verdict}")
        lines.append(f"| {category} | {len(own)} | {len(set(own))} | {' | '.join(cells)} |")
    if judged:
        tests = next(iter(judged.values())).family
        lines += [
            "",
            f"Verdicts: sign-flip tests over captions, {tests} in this table, corrected together (Holm, 5 %).",
        ]
    return lines


def golden(chain: Chain, model: mf.Backbone) -> None:
    """Write the golden of the end-to-end test: block means of one picture."""
    prompt, seed = "a green triangle left of a blue square", 7
    means = torch.nn.functional.avg_pool2d(mf.run(chain, model, prompt, seed=seed).pixels[0], BLOCK)
    data = {
        "how": f"python -m experiments.pocket_scores --golden: means over {BLOCK} x {BLOCK} px of the staged picture",
        "version": model.info.version,
        "prompt": prompt,
        "seed": seed,
        "means": [[[round(v, 4) for v in row] for row in channel] for channel in means.tolist()],
    }
    write_bytes(Path("tests/golden/pocket.json"), (json.dumps(data, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()

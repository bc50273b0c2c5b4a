"""What does the refinement step lose without classifier-free guidance, whose second branch costs a full-size forward?

`paper` 12 + 1 on held-out captions of the embedded model, with guidance in both stages and in the first alone: scores
by category, the difference paired by picture with 95 % bootstrap intervals over distinct captions, and the time of one
picture with the methods taking turns.

    python -m experiments.refine_guidance --captions 200
"""

import argparse

import numpy as np

import mrflow as mf
from experiments.pocket_scores import interval, pictures, seeds_of, table, timed
from mrflow.scenes.grammar import FULL, held_out_captions
from mrflow.scenes.score import CATEGORIES


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="pocket", help="or a version, pocket-3")
    parser.add_argument("--captions", type=int, default=200)
    parser.add_argument("--batch", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=9)
    args = parser.parse_args()
    model, rng = mf.load(args.model, device="cpu"), np.random.default_rng(0)
    low, size = model.info.low, model.info.size
    chains = {
        "guided": mf.recipes.paper(low=low, size=size),
        "refinement unguided": mf.recipes.paper(low=low, size=size, refine_guidance=mf.Distilled()),
    }
    times = timed(chains, model, args.repeats)
    captions = held_out_captions(FULL, args.captions)
    seeds = seeds_of(captions)
    guided, plain = (
        table(pictures(chain, model, captions, seeds, args.batch), list(captions)) for chain in chains.values()
    )
    print("| category | guided | refinement unguided | difference [95 %] |\n|---|---|---|---|")
    for name in (*CATEGORIES, "overall"):
        rows = [(c, g[name], p[name]) for c, g, p in zip(captions, guided, plain, strict=True) if name in g]
        if not rows:  # no caption speaks of it
            continue
        with_it, without = (sum(scores) / len(rows) for scores in ([r[1] for r in rows], [r[2] for r in rows]))
        mean, least, most = interval([(c, p - g) for c, g, p in rows], rng)
        print(f"| {name} | {with_it:.3f} | {without:.3f} | {mean:+.3f} [{least:+.3f}, {most:+.3f}] |")
    print("\n" + "\n".join(times))


if __name__ == "__main__":
    main()

"""Measures what TeaCache and MagCache know of the embedded model (mrflow/caches) and prints it.

What caches save and change there is a study: `python -m experiments.studies caches`.

    python -m experiments.caches
"""

import argparse

import mrflow as mf
from experiments.studies.common import captions
from mrflow.caches import MagCache, TeaCache


def main() -> None:
    """Print TeaCache's coefficients and MagCache's ratios."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    model = mf.load("pocket", device="cpu")
    texts = [prompt.text for prompt in captions(21, seed=1)]
    tea = TeaCache.calibrate(0.25, model, texts, schedule=mf.Shifted(12), degree=2)
    mag = MagCache.calibrate(0.06, model, texts, schedule=mf.Shifted(12))
    print("coefficients", [float(f"{c:.4g}") for c in tea.coefficients or ()])
    print("ratios", [round(r, 4) for r in mag.ratios or ()])


if __name__ == "__main__":
    main()

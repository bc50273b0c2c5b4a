"""C4: how long until `import mrflow` is ready to build a FLUX backbone, against `from diffusers import FluxPipeline`?

Each case is a fresh process from start to end, page cache warm; memory is its peak. Ready means that the modules that
`mrflow.load` and `mrflow.run` need for a FLUX model are imported, without text encoders on both sides.

    python -m experiments.bench.imports
"""

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import asdict

from experiments.bench.protocol import FAST, Fresh, Row, Runs, fresh, publish

REFERENCE = "from diffusers import FluxPipeline"
OURS = "import mrflow, mrflow.models.flux.weights, mrflow.models.flux.backbone; mrflow.load, mrflow.run"
HELP = """
import json, sys
sys.argv = ["mrflow", "--help"]
from mrflow.cli import main
try:
    main()
finally:
    print(json.dumps({"torch": "torch" in sys.modules}))
"""
ALONE = {
    "`from diffusers import FluxPipeline`": REFERENCE,
    "ready to build a FLUX backbone": OURS,
    "`import torch`": "import torch",
    "`import torch, numpy, PIL.Image, safetensors.torch`": "import torch, numpy, PIL.Image, safetensors.torch",
    "`import mrflow`": "import mrflow",
    "`mrflow --help`": HELP,
    "an empty process": "",
}
OVER_TORCH = (0.3, 20.0)  # seconds and MiB that we may need beyond torch
HELP_SECONDS = 0.4


def middle(samples: Sequence[Fresh], name: str) -> float:
    """The median of one number of several processes."""
    return float(statistics.median(getattr(s, name) for s in samples))


def megabytes(samples: Sequence[Fresh]) -> float:
    """The median peak, own and mapped pages together."""
    return statistics.median(s.anon + s.file for s in samples)


def main() -> None:
    """Print tables and write every sample."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--fast", action="store_true", help="three repeats, bar relaxed by 5 %%")
    args = parser.parse_args()
    again, *taken = fresh(REFERENCE, *ALONE.values(), repeats=3 if args.fast else args.repeats)
    found = dict(zip(ALONE, taken, strict=True))
    reference, ours, torch, _, _, help_page, _ = taken

    print("| process | CPU s | wall s | RssAnon MiB | RssFile MiB |\n|---|---|---|---|---|")
    for name, samples in found.items():
        cells = [f"{middle(samples, 'cpu'):.2f}", f"{middle(samples, 'wall'):.2f}"]
        cells += [f"{middle(samples, kind):.0f}" for kind in ("anon", "file")]
        print(f"| {name} | " + " | ".join(cells) + " |")
    more = middle(ours, "cpu") - middle(torch, "cpu"), megabytes(ours) - megabytes(torch)
    loads_torch = any(s.report["torch"] for s in help_page)
    checks = {
        f"over torch: {more[0]:+.2f} s CPU, at most {OVER_TORCH[0]} s": more[0] <= OVER_TORCH[0],
        f"over torch: {more[1]:+.0f} MiB, at most {OVER_TORCH[1]:.0f} MiB": more[1] <= OVER_TORCH[1],
        f"help: {middle(help_page, 'cpu'):.2f} s CPU, below {HELP_SECONDS} s": middle(help_page, "cpu") < HELP_SECONDS,
        f"help: torch is {'' if loads_torch else 'not '}loaded": not loads_torch,
    }
    print("\n" + "\n".join(f"* {what}: {'kept' if kept else 'MISSED'}" for what, kept in checks.items()) + "\n")
    row = Row("ready, against diffusers", Runs(reference, again, ours), 2.5 * (FAST if args.fast else 1))
    publish("imports", [row], checks=checks, samples={n: [asdict(s) for s in v] for n, v in found.items()})


if __name__ == "__main__":
    main()

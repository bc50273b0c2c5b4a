"""Run by the Python of an environment that holds the wheel alone (`make test-wheel`): it draws the golden picture.

python tests/installed.py tests/golden/pocket.json
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch

import mrflow as mf


def main() -> int:
    """0 where the golden picture is drawn, from files that came with the wheel; else 1, with the reason."""
    here = Path(mf.__file__).resolve()
    if "site-packages" not in here.parts:
        print(f"mrflow is not the installed one: {here}")
        return 1
    golden = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    model = mf.load("pocket", device="cpu")
    chain = mf.recipes.paper(low=model.info.low, size=model.info.size)
    pixels = mf.run(chain, model, golden["prompt"], seed=golden["seed"]).pixels[0]
    means = torch.nn.functional.avg_pool2d(pixels, pixels.shape[-1] // len(golden["means"][0])).numpy()
    worst = float(np.abs(means - np.array(golden["means"])).max())
    print(f"mrflow {mf.__version__}: the golden picture to {worst * 255:.2f} levels of 255")
    return int(worst >= 2 / 255)


if __name__ == "__main__":
    sys.exit(main())

"""How far trained networks reach: 8-bit values that change when what lies beyond a margin is cut away.

    python -m experiments.real.reach

A photograph is enlarged whole and without its left 64 columns; at each distance from that cut (pixels that come in),
the largest difference beyond it, and the share of 8-bit values beyond it that are not equal. What remains at the
greatest distances is float32's own noise (convolutions sum in another order at another size). The last column is the
price: work of a tile of 512 pixels, relative to its new pixels, with that margin.
"""

import torch

from experiments.real.packages import NETWORKS, network, photograph
from mrflow.upscalers.files import load_upscaler
from mrflow.upscalers.network import FADE

CUT, MARGINS = 64, (16, 32, 48, 64, 96, 128, 160, 192)


def main() -> None:
    """Print a table for each network."""
    pixels = photograph("chelsea.png")[None, :, 20:212, :384].contiguous()
    for name in NETWORKS:
        up = load_upscaler(network(name))
        with torch.no_grad():
            whole, cut = up(pixels)[..., CUT * up.scale :], up(pixels[..., CUT:].contiguous())
        largest = (whole - cut).abs().amax((0, 1, 2))
        unequal = ((255 * whole.clamp(0, 1)).round() != (255 * cut.clamp(0, 1)).round()).float().mean((0, 1, 2))
        print(f"{name}: a pixel can depend on {up.facts.reach} to each side")  # type: ignore[attr-defined]
        print("| margin | largest difference | 8-bit values not equal | work |\n|---|---|---|---|")
        for margin in MARGINS:
            beyond = slice(margin * up.scale, None)
            work = (512 / (512 - 2 * margin - FADE)) ** 2
            share = 100 * float(unequal[beyond].mean())
            print(f"| {margin} | {float(largest[beyond].max()):.1e} | {share:.4f} % | {work:.2f} |", flush=True)


if __name__ == "__main__":
    main()

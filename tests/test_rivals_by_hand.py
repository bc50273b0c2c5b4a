"""JiT and Fresco once more, token by token in loops, over a field that looks at every token and where it lies."""

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from scipy.stats import beta
from torch import Tensor

import mrflow as mf
from mrflow.backbone import Wrapper
from mrflow.flow import Velocity
from mrflow.protocols.tokens import pack, unpack

H, W, STEPS = 6, 10, (2, 3, 2)  # tokens down and across; each is 2 x 2 cells of three channels, 4 x 4 pixels


def velocity(tokens: Tensor, at: Tensor, sigma: float) -> Tensor:
    """Of tokens (n, 12) at positions (n, 2): no two alike, and each depends on all."""
    turn = (0.7 * at[:, :1] + 1.3 * at[:, 1:] + sigma).sin()
    return tokens.roll(1, -1).tanh() - 0.5 * tokens + turn * (1.5 - sigma) + tokens.mean(0).cos()


class Restless(Wrapper):
    """Such a field as a backbone."""

    def field(self, cond: mf.Condition, options: mf.FieldOptions = mf.FieldOptions()) -> Velocity:
        places = options.positions

        def asked(x: Tensor, sigma: float) -> Tensor:
            h, w = x.shape[2] // 2, x.shape[3] // 2
            at = grid(h, w) if places is None else places.at
            return unpack(torch.stack([velocity(item, at, sigma) for item in pack(x)]), h, w)

        return asked


def grid(h: int, w: int) -> Tensor:
    return torch.tensor([[i, j] for i in range(h) for j in range(w)]).float()


def drawn(stage: mf.Stage[mf.Start, mf.Latents], seed: int = 5) -> Tensor:
    """What the stage makes, (tokens, 12)."""
    return pack(mf.run(stage, Restless(mf.toy(positions=True)), "a", seed=seed).data)[0]


def noise(scope: str, draw: int, seed: int = 5) -> Tensor:
    """What the stage draws, (tokens, 12)."""
    return pack(mf.PerItem()((seed,), (1, 3, 2 * H, 2 * W), scope=f"{scope}/0", draw=draw))[0]


def spread(values: Tensor, at: Sequence[int]) -> Tensor:
    """The nearest anchor's value, a Gaussian of it, and the anchors as they are: (anchors, 12) to (tokens, 12)."""

    def far(cell: int, m: int) -> tuple[int, int]:
        return (cell // W - at[m] // W) ** 2 + (cell % W - at[m] % W) ** 2, m

    hard = [values[min(range(len(at)), key=lambda m: far(cell, m))] for cell in range(H * W)]
    width = max(1.0, 0.4 * math.sqrt(H * W / len(at)))
    reach = range(-math.ceil(3 * width), math.ceil(3 * width) + 1)
    weight = {i: math.exp(-(i**2) / (2 * width**2)) for i in reach}
    total = sum(weight.values()) ** 2

    def at_edge(i: int, j: int) -> Tensor:
        return hard[min(max(i, 0), H - 1) * W + min(max(j, 0), W - 1)]

    soft = [
        sum((weight[a] * weight[b] / total * at_edge(i + a, j + b) for a in reach for b in reach), torch.zeros(12))
        for i in range(H)
        for j in range(W)
    ]
    return torch.stack([values[at.index(cell)] if cell in at else soft[cell] for cell in range(H * W)])


def test_jit_is_its_equations() -> None:
    n, shares = sum(STEPS), (0.35, 0.62)
    quantiles = beta.ppf(1 - np.linspace(0, 1, n), 1.4, 0.42)
    sigmas = [*(1 / n + quantiles * (1 - 1 / n)), 0.0]
    y, eps, order = (noise("SampleAnchors", draw) for draw in (0, 1, 2))
    places = grid(H, W)

    def rank(cell: int) -> tuple[int, float]:
        i, j = divmod(cell, W)
        kind = 0 if i % 2 == j % 2 == 0 else 1 if i in (0, H - 1) or j in (0, W - 1) else 2
        return kind, float(order[cell, 0])

    at = sorted(sorted(range(H * W), key=rank)[: int(H * W * shares[0])])
    step = 0
    for steps, count in zip(STEPS, (int(H * W * shares[1]), H * W, 0), strict=True):
        clean = v = y
        for _ in range(steps):
            s, to = sigmas[step], sigmas[step + 1]
            v = spread(velocity(y[at], places[at], s), at)
            y, clean, step = y + (to - s) * v, y - s * v, step + 1
        if not count:
            break
        square = v.view(H, W, 12)
        around = [
            torch.stack(
                [square[min(max(i + a, 0), H - 1), min(max(j + b, 0), W - 1)] for a in (-1, 0, 1) for b in (-1, 0, 1)]
            )
            for i in range(H)
            for j in range(W)
        ]
        rest = sorted(set(range(H * W)) - set(at), key=lambda cell: (-float(around[cell].var(0).mean()), cell))
        new, s = rest[: count - len(at)], sigmas[step]
        phi, y = spread(clean[at], at), y.clone()
        y[new] = (1 - s) * phi[new] + s * eps[new]
        at = sorted((*at, *new))
    got = drawn(mf.SampleAnchors(4 * H, 4 * W, STEPS, shares))
    torch.testing.assert_close(got, y, rtol=1e-4, atol=1e-4)


SIGNS = torch.tensor([[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]) / 2


def test_fresco_is_its_equations() -> None:
    h, w = H // 2, W // 2
    levels = mf.Shifted(sum(STEPS))(1.0, H * W, mf.toy().info)
    field = noise("SampleConverged", 0)

    def children(cell: int) -> list[int]:
        i, j = 2 * (cell // w), 2 * (cell % w)
        return [(i + a) * W + j + b for a in (0, 1) for b in (0, 1)]

    def euler(z: Tensor, at: Tensor, sigmas: Sequence[float]) -> list[Tensor]:
        states = [z]
        for s, to in pairwise(sigmas):
            states.append(states[-1] + (to - s) * velocity(states[-1], at, s))
        return states

    def four(z: Tensor, cell: int, s: float) -> Tensor:
        bands = s * SIGNS @ field[children(cell)]
        return 2 / (1 + s) * SIGNS.T @ torch.cat((z[None], bands[1:]))

    coarse = torch.stack([SIGNS[0] @ field[children(cell)] for cell in range(h * w)])
    states = euler(coarse, grid(h, w), levels[: STEPS[0] + 1])
    change = torch.stack(states).var(0).mean(-1)
    ranked = sorted(range(h * w), key=lambda cell: (float(change[cell]), cell))
    first, late, s = sorted(ranked[: h * w // 2]), sorted(ranked[h * w // 2 :]), levels[STEPS[0]]
    kept = [(states[-1][cell] + s * coarse[cell]) / (1 + s) for cell in late]
    grown = [fine for cell in first for fine in four(states[-1][cell], cell, s)]
    # a coarse token lies at its row and column, its children at that and half a token on
    at: list[list[float]] = [[cell // w, cell % w] for cell in late]
    at += [[cell // w + a, cell % w + b] for cell in first for a in (0, 0.5) for b in (0, 0.5)]
    middle = (2 * s / (1 + s), *levels[STEPS[0] + 1 : STEPS[0] + STEPS[1] + 1])
    both, s = euler(torch.stack((*kept, *grown)), torch.tensor(at), middle)[-1], middle[-1]
    whole = torch.empty(H * W, 12)
    for cell, z in zip(late, both, strict=False):
        whole[children(cell)] = four(z, cell, s)
    for fine, z in zip((c for cell in first for c in children(cell)), both[len(late) :], strict=True):
        whole[fine] = (z + s * field[fine]) / (1 + s)
    want = euler(whole, grid(H, W), (2 * s / (1 + s), *levels[STEPS[0] + STEPS[1] + 1 :]))[-1]
    torch.testing.assert_close(drawn(mf.SampleConverged(4 * H, 4 * W, STEPS)), want, rtol=1e-4, atol=1e-4)

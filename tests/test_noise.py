"""Sources of noise beside their definitions, written out draw by draw."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

import mrflow as mf
from mrflow._checks import MAX_SEED, check_seed
from mrflow.noise import Noise

SHAPE = (3, 2, 4, 6)
SEEDS = (5, 0, 2**62 + 1)


def draws(seed: int, count: int, shape: tuple[int, ...] = SHAPE[1:]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for _ in range(count)]


@pytest.mark.parametrize("draw", [0, 3])
def test_an_items_generator_is_seeded_by_a_digest(draw: int) -> None:
    """By the first 63 bits of SHA-256 of seed, scope and draw, little-endian."""
    got = mf.PerItem()(SEEDS, SHAPE, scope="Sample/1", draw=draw)
    for item, seed in zip(got, SEEDS, strict=True):
        digest = hashlib.sha256(f"{seed}/Sample/1/{draw}".encode()).digest()
        number = sum(byte << (8 * i) for i, byte in enumerate(digest[:8])) // 2
        assert torch.equal(item, draws(number, 1)[0])


@pytest.mark.parametrize(("offset", "skip", "draw"), [(0, 0, 0), (1, 0, 0), (1, 1, 0), (2, 0, 2), (0, 2, 1)])
def test_a_stream_passes_over_what_came_before(offset: int, skip: int, draw: int) -> None:
    got = mf.Stream(offset, skip=skip)(SEEDS, SHAPE, scope="anything", draw=draw)
    for item, seed in zip(got, SEEDS, strict=True):
        assert torch.equal(item, draws(seed + offset, 8)[skip + draw])


@dataclass(frozen=True)
class Counting(Noise):
    """Cells by number, told apart by seed, scope and draw."""

    def __call__(self, seeds: Sequence[int], shape: tuple[int, ...], *, scope: str, draw: int) -> Tensor:
        """0, 1, 2, ... in each item, plus what it is given."""
        cells = torch.arange(float(np.prod(shape[1:]))).view(1, *shape[1:]).repeat(shape[0], *[1] * len(shape[1:]))
        return cells + torch.tensor(seeds).view(-1, *[1] * len(shape[1:])) * 1000 + 100 * draw + len(scope)


@pytest.mark.parametrize("shape", [SHAPE, (3, 4, 6)])
@pytest.mark.parametrize("factor", [1, 2, 3])
def test_nested_noise_is_the_scaled_mean_of_each_block(factor: int, shape: tuple[int, ...]) -> None:
    seeds = (1, 2, 3)
    got = mf.Nested(factor, inner=Counting())(seeds, shape, scope="abc", draw=2).numpy()
    large = Counting()(seeds, (*shape[:-2], factor * 4, factor * 6), scope="abc", draw=2).numpy()
    assert got.shape == shape
    for y in range(4):
        for x in range(6):
            block = large[..., factor * y : factor * (y + 1), factor * x : factor * (x + 1)]
            np.testing.assert_allclose(got[..., y, x], factor * block.mean((-2, -1)), rtol=1e-6)


def test_what_noise_refuses() -> None:
    with pytest.raises(mf.PlanError, match="^skip must not be negative, got -1$"):
        mf.Stream(skip=-1)
    for bad in (0, 17, 2.0):
        with pytest.raises(mf.PlanError, match="^factor must be"):
            mf.Nested(bad)  # type: ignore[arg-type]
    assert mf.Nested(16).factor == 16 and mf.Nested(1).factor == 1 and mf.Nested().factor == 2


@pytest.mark.parametrize("bad", [-1, MAX_SEED, 1.0, True])
def test_what_a_seed_may_be(bad: object) -> None:
    with pytest.raises(mf.PlanError, match=f"^a seed must be a whole number from 0 to {2**63 - 2}, got {bad!r}$"):
        check_seed(bad)
    assert (check_seed(0), check_seed(2**63 - 2)) == (0, 2**63 - 2)

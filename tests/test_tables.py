"""Modulations of several levels: one product for all of them, and kept between pictures where only levels decide."""

from pathlib import Path
from typing import Any

import pytest
import torch

import mrflow as mf
from experiments.bench.kernels import counting
from mrflow.checkpoints.blueprint import blueprint
from mrflow.models import blocks
from mrflow.models.flux.transformer import Flux, FluxParams
from tests.tiny import write_qwen_repo

SMALL = FluxParams(hidden=64, heads=2, axes=(8, 12, 12), context=32, pooled=16, double_blocks=1, single_blocks=2)
LEVELS = (1.0, 0.7, 0.3)


def made(net: Flux, batch: int, levels: tuple[float, ...] = LEVELS, **where: Any) -> list[torch.Tensor]:
    sigmas = [torch.full((batch,), level, **where) for level in levels]
    return net.tables(sigmas, torch.full((batch,), 3.5, **where), torch.ones(batch, SMALL.pooled, **where))


def test_all_levels_are_one_product_each_on_a_gpu() -> None:
    def products(levels: tuple[float, ...]) -> int:
        with blueprint(), counting() as counts:
            made(Flux(SMALL), 1, levels, device="meta")
        return counts.kernels["product"]

    modulators = 2 * SMALL.double_blocks + SMALL.single_blocks + 1
    embedders = 6
    assert products(LEVELS) == modulators + embedders * len(LEVELS)
    assert products(LEVELS[:1]) == modulators + embedders


@torch.no_grad()
@pytest.mark.parametrize("batch", [1, 2])
def test_one_product_differs_by_rounding_alone(batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    net = Flux(SMALL)
    apart = made(net, batch)
    assert all(torch.equal(a, made(net, batch, (level,))[0]) for a, level in zip(apart, LEVELS, strict=True))
    monkeypatch.setattr(blocks, "ONE_BY_ONE", ())
    for one, other in zip(made(net, batch), apart, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore")
def test_qwen_keeps_them_between_pictures(tmp_path: Path) -> None:
    write_qwen_repo(tmp_path / "r")
    model: Any = mf.load(tmp_path / "r", device="cpu")
    asked = list[int]()
    own = model.transformer.tables
    model.transformer.tables = lambda sigmas: asked.append(len(sigmas)) or own(sigmas)
    stage = mf.Sample(32, 32, mf.Shifted(3))
    first = mf.run(stage, model, "a cat", seed=1).data
    assert asked == [3]
    assert torch.equal(mf.run(stage, model, "a cat", seed=1).data, first)
    mf.run(stage, model, "another prompt", seed=2)
    assert asked == [3]
    mf.run(mf.Sample(32, 32, mf.Linear(5)), model, "a cat")
    assert asked[0] == 3 and len(asked) == 2
    other = model._variant(model.transformer, "+x")
    assert not other._kept and model._kept

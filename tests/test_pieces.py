"""A network in pieces, the way caches use it: offloaded, folded, as graphs, from start to end."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor

import mrflow as mf
from mrflow.caches import Cache, DBCache, TaylorSeer
from mrflow.models.block_runner import BlockRunner
from mrflow.models.cuda_graphs import GraphPool
from mrflow.models.flux.transformer import Flux
from mrflow.models.layers import Rope
from mrflow.models.qwen.transformer import QwenImage
from tests.tiny import write_flux_repo, write_qwen_repo

WRITE = {"flux": write_flux_repo, "qwen": write_qwen_repo}


def sample(cache: Cache, **more: Any) -> mf.Sample:
    return mf.Sample(64, 48, mf.Shifted(6), cache=cache, **more)


def made(stage: mf.Sample, model: mf.Backbone) -> mf.Result:
    return mf.run(stage, model, "a cat", seed=1)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["flux", "qwen"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_cut_of_the_blocks_gives_the_same_bits(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    WRITE[kind](tmp_path / "r")
    model: Any = mf.load(tmp_path / "r", device="cpu", dtype=dtype)
    net: Flux | QwenImage = model.transformer
    pieces = BlockRunner(net)
    g = torch.Generator().manual_seed(0)
    hidden, head = net.params.hidden, net.params.head
    img, txt = (torch.randn(2, n, hidden, generator=g).to(dtype) for n in (6, 4))
    table = torch.randn(2, 12 * pieces.count + 2, hidden, generator=g).to(dtype)
    if isinstance(net, Flux):
        table = table[:, : 12 * net.params.double_blocks + 3 * net.params.single_blocks + 2]
    angles = torch.randn(10, head // 2, generator=g)
    rope = Rope(angles.cos(), angles.sin())
    with torch.no_grad():
        want, _ = net.some_blocks(img, txt, rope, table, 0, len(net.stack()))
        for first in range(pieces.count + 1):
            for second in range(first, pieces.count + 1):
                streams = (img, txt)
                for start, stop in ((0, first), (first, second), (second, pieces.count)):
                    streams = pieces.run(*streams, *rope, table, start, stop)
                assert torch.equal(streams[0], want)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["flux", "qwen"])
def test_offloaded_and_folded_models_are_cached_alike(kind: str, tmp_path: Path) -> None:
    WRITE[kind](tmp_path / "r")
    want = made(sample(DBCache(0.3, front=1, warmup=1, order=1)), mf.load(tmp_path / "r", device="cpu"))
    for way in ({"offload": "phase"}, {"offload": "block"}, {"fold": False}):
        model = mf.load(tmp_path / "r", device="cpu", **cast("dict[str, Any]", way))
        got = made(sample(DBCache(0.3, front=1, warmup=1, order=1)), model)
        assert torch.equal(got.data, want.data), way
        assert got.nfe == want.nfe


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["flux", "qwen"])
def test_runs_of_blocks_can_be_replayed_as_graphs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for CUDA's capture: recorded once for each run of blocks and shape, whatever the field."""
    WRITE[name](tmp_path / "r")
    model: Any = mf.load(tmp_path / "r", device="cpu")
    captured: list[object] = []

    def capture(f: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> tuple[Callable[[], None], Tensor]:
        captured.append(f)
        output = f(*inputs).clone()

        def replay() -> None:
            output.copy_(f(*inputs))

        return replay, output

    pieces = BlockRunner(model.transformer, graphs=GraphPool(capture=capture))
    for cache in (DBCache(0.3, front=1, back=1, warmup=1), TaylorSeer(2)):
        want = made(sample(cache, guidance=mf.Distilled()), model)
        monkeypatch.setattr(model, "_pieces", pieces)
        for _ in range(2):
            got = made(sample(cache, guidance=mf.Distilled()), model)
            assert torch.equal(got.data, want.data)
            assert got.nfe == want.nfe
        monkeypatch.undo()
    assert 3 <= len(captured) <= 4

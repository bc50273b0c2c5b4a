"""What only a CUDA device can show: pictures there are those of the processor, however the weights lie."""

from pathlib import Path

import pytest
import torch

import mrflow as mf
from mrflow.models.cuda_graphs import CudaGraph
from mrflow.models.kernels import errors, fused_kernels
from mrflow.models.kl import norm_silu
from mrflow.models.layers import PLAIN
from tests.tiny import write_flux_repo, write_qwen_repo

pytestmark = pytest.mark.gpu
CHAIN = mf.recipes.paper(mf.Lanczos(2), low=(64, 64), size=(128, 128), steps=4)
WRITERS = {"flux": write_flux_repo, "qwen": write_qwen_repo}


@pytest.fixture(autouse=True)
def exact() -> None:
    """Convolutions in float32 instead of TF32."""
    torch.backends.cudnn.allow_tf32 = False


@pytest.fixture(scope="module", params=WRITERS)
def repo(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small checkpoint in the published layout."""
    folder = tmp_path_factory.mktemp(request.param)
    WRITERS[request.param](folder)
    return folder


def drawn(where: str | Path, device: str, **settings: object) -> torch.Tensor:
    """A staged picture in float32."""
    model = mf.load(where, device=device, dtype=torch.float32, **settings)  # type: ignore[arg-type]
    return mf.run(CHAIN, model, "a cat", seed=3).pixels.cpu()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_kernels_give_what_their_definitions_give(dtype: torch.dtype) -> None:
    """Those of blocks and of autoencoders, none of which is left out."""
    ops, norms = fused_kernels(torch.device("cuda"))
    assert ops is not PLAIN and norms is not norm_silu
    found = errors(ops, torch.device("cuda"), dtype, norms=norms)
    assert max(found.values()) < 1, found


def test_pocket_draws_there_what_it_draws_here() -> None:
    here, there = (drawn("pocket", device) for device in ("cpu", "cuda"))
    assert float((here - there).abs().max()) < 2e-3


def test_large_models_draw_there_what_they_draw_here(repo: Path) -> None:
    assert float((drawn(repo, "cpu") - drawn(repo, "cuda")).abs().max()) < 2e-3


@pytest.mark.parametrize("offload", ["phase", "block"])
def test_where_weights_wait_changes_nothing_but_rounding(repo: Path, offload: str) -> None:
    """On a processor it is the same to the bit; here a matrix elsewhere in memory may be multiplied another way."""
    assert float((drawn(repo, "cuda", graphs=False) - drawn(repo, "cuda", offload=offload)).abs().max()) < 2e-3


def test_steps_are_replayed_as_graphs(repo: Path) -> None:
    """Every resolution whose step runs twice is recorded, and the pictures are those of the steps themselves."""
    model = mf.load(repo, device="cuda", dtype=torch.float32)
    plain = drawn(repo, "cuda", graphs=False)
    for _ in range(3):
        assert float((mf.run(CHAIN, model, "a cat", seed=3).pixels.cpu() - plain).abs().max()) < 2e-3
    step = model._step  # type: ignore[attr-defined]
    assert isinstance(step, CudaGraph) and len(step.recorded) == 2
    assert all(recorded is not None for recorded in step.recorded.values())


def test_weights_in_8_bits_change_little(repo: Path) -> None:
    full, small = drawn(repo, "cuda"), drawn(repo, "cuda", storage="fp8")
    assert 0 < float((full - small).abs().mean()) < 0.05


def test_half_precision_is_near(repo: Path) -> None:
    model = mf.load(repo, device="cuda", dtype=torch.bfloat16)
    found = mf.run(CHAIN, model, "a cat", seed=3).pixels
    assert found.dtype == torch.float32 and found.device.type == "cuda"
    assert float((found.cpu() - drawn(repo, "cuda")).abs().mean()) < 0.05


def test_peaks_stay_near_what_is_predicted(repo: Path) -> None:
    """A small model's weights in each mode, by the allocator's own count."""
    peaks = {}
    for offload in ("none", "block"):
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        drawn(repo, "cuda", offload=offload, graphs=False)
        peaks[offload] = torch.cuda.max_memory_allocated() - before
    assert peaks["block"] < peaks["none"]

"""Our super-resolution networks against spandrel's, from the same files, in every naming."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import mrflow as mf
from mrflow.upscalers.nets import CompactParams, RRDBParams
from mrflow.upscalers.spandrel import spandrel
from tests.sr_files import State, as_first_generation, as_trunk, compact, rrdb

pytestmark = pytest.mark.parity
try:
    package = spandrel()
except mf.PlanError as error:  # the Makefile installs it
    pytest.skip(str(error), allow_module_level=True)

# spandrel takes every growth to be 32.
X1, X2, X4, X8 = (
    RRDBParams(8, 2, unshuffle=4),
    RRDBParams(8, 1, unshuffle=2),
    RRDBParams(6, 2),
    RRDBParams(8, 1, ups=3),
)
CASES: dict[str, State] = {
    "x1": rrdb(X1),
    "x2": rrdb(X2),
    "x4": rrdb(X4),
    "x8": rrdb(X8),
    "x4 trunk": as_trunk(rrdb(X4)),
    "x4 first generation": as_first_generation(rrdb(X4)),
    "x8 first generation": as_first_generation(rrdb(X8)),
    "x2 first generation": as_first_generation(rrdb(RRDBParams(8, 2, ups=1))),
    "compact x4": compact(CompactParams(8, 3, 4)),
    "compact x2": compact(CompactParams(6, 2, 2)),
    "compact x1": compact(CompactParams(6, 1, 1)),
}


@pytest.mark.parametrize("name", CASES)
def test_equals_spandrel(name: str, tmp_path: Path) -> None:
    state, file = CASES[name], tmp_path / "net.safetensors"
    save_file(state, file)
    ours = mf.Checkpoint(str(file))
    theirs = package.ModelLoader().load_from_file(file)
    assert ours.scale == theirs.scale
    # With unshuffling, spandrel pads to multiples of 4, we and Real-ESRGAN to multiples of the factor.
    for size in ((16, 16), (16, 24), (12, 20) if theirs.size_requirements.multiple_of > 1 else (13, 7)):
        x = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(1))
        want = theirs(x.clone())
        error = float((ours(x).clamp(0, 1) - want).abs().max())
        assert error < 1e-5, (size, error)
        assert float(want.std()) > 0.05  # the comparison is not of two plain pictures


def test_spandrel_gives_the_same_through_our_wrapper(tmp_path: Path) -> None:
    file = tmp_path / "net.pth"
    torch.save({"params_ema": rrdb(X2)}, file)
    x = torch.rand(3, 3, 12, 16, generator=torch.Generator().manual_seed(1))
    ours, theirs = mf.Checkpoint(str(file)), mf.Spandrel(str(file))
    assert torch.allclose(ours(x), theirs(x), atol=1e-5)
    assert theirs.scale == 2
    assert theirs.facts.multiple == 4 and theirs.facts.minimum == 4
    assert theirs(x[..., :11, :15]).shape == (3, 3, 22, 30)
    assert theirs.facts.half == ours.facts.half


def test_an_architecture_of_spandrel_alone(tmp_path: Path) -> None:
    """SPAN is none of ours: `load_upscaler` hands it to spandrel, whose own call is the oracle."""
    from spandrel.architectures.SPAN import SPAN

    torch.manual_seed(0)
    net = SPAN(num_in_ch=3, num_out_ch=3, feature_channels=12, upscale=2).eval()
    for values in net.upsampler.parameters():  # a random network makes no pixels, whose range is held
        values.data *= 0.05
    file = tmp_path / "span.pth"
    torch.save(net.state_dict(), file)
    with pytest.raises(mf.WeightsError, match="neither RRDBNet nor SRVGGNetCompact.*try Spandrel"):
        mf.Checkpoint(str(file))
    up = mf.load_upscaler(file)
    assert isinstance(up, mf.Spandrel)
    x = torch.rand(2, 3, 9, 14, generator=torch.Generator().manual_seed(0))
    theirs = package.ModelLoader().load_from_file(file)
    want = torch.cat([theirs(item) for item in x.split(1)])
    assert float((up(x).clamp(0, 1) - want).abs().max()) < 3e-5
    mf.testing.check_stage(mf.Upscale(up))

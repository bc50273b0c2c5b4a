"""Networks from files: recognised, strict, safe; tiles, batches, precision, memory."""

import os
import pickle
import warnings
import zipfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

import mrflow as mf
from mrflow.display.notes import collect_notes
from mrflow.upscalers import network as module
from mrflow.upscalers.nets import CompactParams, RRDBNet, RRDBParams, SRVGGNetCompact
from mrflow.upscalers.network import Network, NetworkFacts, OpenedNetwork, pad_to_multiple
from mrflow.upscalers.weights import recognise, rename
from tests.live import LiveBytes
from tests.sr_files import State, as_first_generation, as_trunk, compact, published, rrdb

PUBLISHED: dict[str, tuple[RRDBParams | CompactParams, int]] = {
    "rrdbnet_x4plus": (RRDBParams(), 4),
    "rrdbnet_x4plus_anime_6B": (RRDBParams(blocks=6), 4),
    "rrdbnet_x2plus": (RRDBParams(unshuffle=2), 2),
    "rrdbnet_x8": (RRDBParams(ups=3), 8),
    "esrgan_old_x4": (RRDBParams(), 4),
    "esrgan_trunk_x4": (RRDBParams(), 4),
    "srvgg_general_x4v3": (CompactParams(), 4),
    "srvgg_animevideov3": (CompactParams(convs=16), 4),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_files_are_recognised(name: str) -> None:
    """Every name and shape of the published files has its place, and no parameter is left without."""
    state = rename(published(name))
    params, scale = PUBLISHED[name]
    assert recognise(state) == params and params.scale == scale
    with torch.device("meta"):
        net = RRDBNet(params) if isinstance(params, RRDBParams) else SRVGGNetCompact(params)
    assert {k: v.shape for k, v in net.state_dict().items()} == {k: v.shape for k, v in state.items()}


def test_arithmetic_is_the_published_count() -> None:
    """2.350 TFLOP for x2 of a 512 x 512 picture, 9.40 for x4; counted again here by torch."""
    assert RRDBParams(unshuffle=2).flops * 512**2 == pytest.approx(2.350e12, rel=1e-3)
    assert RRDBParams().flops * 512**2 == pytest.approx(9.40e12, rel=1e-3)
    from torch.utils.flop_counter import FlopCounterMode

    for params in (RRDBParams(8, 2, 4, unshuffle=2), RRDBParams(6, 1, 4, ups=3), CompactParams(8, 3, 2)):
        net = RRDBNet(params) if isinstance(params, RRDBParams) else SRVGGNetCompact(params)
        with FlopCounterMode(display=False) as counter:
            net(torch.rand(1, 3, 8, 8))
        assert counter.get_total_flops() == pytest.approx(64 * params.flops, rel=1e-9)


@pytest.mark.parametrize("params", [RRDBParams(6, 1, 4), RRDBParams(6, 1, 4, unshuffle=2), RRDBParams(6, 1, 4, ups=3)])
def test_reach_is_exact(params: RRDBParams) -> None:
    """A changed pixel changes nothing farther than `reach` pixels away, and something nearly as far."""
    net = RRDBNet(params).double()
    net.load_state_dict({k: v.double().abs() for k, v in rrdb(params).items()})  # positive: nothing cancels
    side, s = 2 * params.reach + 9 + (2 * params.reach + 9) % 2, params.scale
    x = torch.rand(1, 3, side, 8, dtype=torch.float64)
    y = x.clone()
    at = side // 2
    y[:, :, at] += 1
    with torch.no_grad():
        rows = (net(y) - net(x)).abs().amax((0, 1, 3)).nonzero().flatten() // s
    far = int(max(at - rows.min(), rows.max() - at))
    assert params.reach - 2 * params.unshuffle <= far <= params.reach


@pytest.mark.parametrize("wrap", ["params_ema", "params", "state_dict", "model", None])
@pytest.mark.parametrize("naming", [dict, as_trunk, as_first_generation])
def test_every_layout_gives_the_same_network(wrap: str | None, naming: Any, tmp_path: Path) -> None:
    state = rrdb()
    named = naming(state)
    file = tmp_path / "net.pth"
    torch.save({wrap: named, "iter": 5} if wrap else named, file)
    x = torch.rand(1, 3, 5, 6)
    want = RRDBNet(RRDBParams(8, 2, 4))
    want.load_state_dict(state)
    up = mf.Checkpoint(str(file))
    with torch.no_grad():
        assert torch.allclose(up(x), want(x), atol=1e-5)


def test_params_ema_goes_before_params(tmp_path: Path) -> None:
    torch.save({"params": rrdb(seed=1), "params_ema": rrdb(seed=2)}, tmp_path / "both.pth")
    torch.save(rrdb(seed=2), tmp_path / "ema.pth")
    x = torch.rand(1, 3, 4, 4)
    assert torch.equal(mf.Checkpoint(str(tmp_path / "both.pth"))(x), mf.Checkpoint(str(tmp_path / "ema.pth"))(x))


def test_the_oldest_pickles_and_half_precision_are_read(tmp_path: Path) -> None:
    state = {f"module.{k}": v.half() for k, v in compact().items()}
    torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    up = mf.load_upscaler(tmp_path / "old.pth")
    assert isinstance(up, mf.Checkpoint) and up(torch.rand(1, 3, 4, 4)).dtype == torch.float32


class Evil:
    """Runs a command when it is loaded."""

    def __init__(self, sentinel: Path) -> None:
        self.sentinel = sentinel

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, (f"touch {self.sentinel}",))


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("load", [mf.Checkpoint, mf.load_upscaler, mf.Spandrel])
def test_a_malicious_pickle_is_refused_and_not_run(load: Any, old: bool, tmp_path: Path) -> None:
    file, sentinel = tmp_path / "evil.pth", tmp_path / "ran"
    torch.save({"params": rrdb(), "extra": Evil(sentinel)}, file, _use_new_zipfile_serialization=not old)
    with pytest.raises(mf.WeightsError, match=r"evil\.pth holds more than tensors.*refused.*state_dict"):
        load(str(file))
    file.write_bytes(pickle.dumps(Evil(sentinel)))
    with pytest.raises(mf.WeightsError):
        load(str(file))
    assert not sentinel.exists()


def test_an_archive_that_grows_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "bomb.pth"
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as z:
        z.writestr("archive/data.pkl", b"\0" * 50_000_000)
    with pytest.raises(mf.WeightsError, match="compressed inside"):
        mf.Checkpoint(str(file))


def test_torchscript_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "script.pt"
    with warnings.catch_warnings(action="ignore"):
        torch.jit.trace(nn.Conv2d(3, 3, 1), torch.rand(1, 3, 4, 4)).save(str(file))
    with pytest.raises(mf.WeightsError, match="TorchScript program, which is code"):
        mf.Checkpoint(str(file))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda s: s.pop("body.1.rdb2.conv3.bias"), "body.1.rdb2.conv3.bias is missing"),
        (lambda s: s.update({"body.0.rdb1.conv1x1.weight": torch.ones(4, 8, 1, 1)}), "conv1x1.weight is not expected"),
        (lambda s: s.update({"conv_hr.weight": torch.ones(8, 8, 1, 1)}), r"conv_hr.weight has shape \(8, 8, 1, 1\)"),
        (lambda s: s.update({"conv_hr.bias": torch.ones(8, dtype=torch.int64)}), "conv_hr.bias is torch.int64"),
        (lambda s: s.clear(), "holds no network"),
        (lambda s: (s.clear(), s.update({"a.weight": torch.ones(2)})), "neither RRDBNet nor SRVGGNetCompact"),
    ],
)
def test_what_does_not_fit_is_named(change: Any, text: str, tmp_path: Path) -> None:
    state = rrdb()
    change(state)
    torch.save(state, tmp_path / "net.pth")
    with pytest.raises(mf.WeightsError, match=text):
        mf.Checkpoint(str(tmp_path / "net.pth"))


def test_files_that_are_not_there_or_not_whole(tmp_path: Path) -> None:
    with pytest.raises(mf.WeightsError, match="there is no file .*nowhere.pth"):
        mf.Checkpoint(str(tmp_path / "nowhere.pth"))
    torch.save(rrdb(), tmp_path / "net.pth")
    whole = (tmp_path / "net.pth").read_bytes()
    for cut in (0, 10, 1000, len(whole) // 2, len(whole) - 30):
        (tmp_path / "cut.pth").write_bytes(whole[:cut])
        with pytest.raises(mf.WeightsError, match="cut.pth"):
            mf.Checkpoint(str(tmp_path / "cut.pth"))
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(mf.WeightsError, match="holds list, not named tensors"):
        mf.Checkpoint(str(tmp_path / "list.pth"))
    torch.save({"a": {"x": 1}, "b": 2}, tmp_path / "odd.pth")
    with pytest.raises(mf.WeightsError, match="no network under a name that is known"):
        mf.Checkpoint(str(tmp_path / "odd.pth"))


def _file(tmp_path: Path, state: State, name: str = "net.safetensors") -> str:
    save_file(state, tmp_path / name)
    return str(tmp_path / name)


@given(
    h=st.integers(1, 11),
    w=st.integers(1, 11),
    batch=st.integers(1, 3),
    kind=st.sampled_from(["x1", "x2", "x4", "small"]),
)
def test_size_device_and_batch(tmp_path_factory: Any, h: int, w: int, batch: int, kind: str) -> None:
    up = _nets(tmp_path_factory)[kind]
    x = torch.rand(batch, 3, h, w, generator=torch.Generator().manual_seed(h * 100 + w))
    kept = x.clone()
    y = up(x)
    assert y.shape == (batch, 3, up.scale * h, up.scale * w)
    assert y.dtype == torch.float32 and y.device == x.device and y.is_contiguous()
    assert torch.equal(x, kept) and torch.equal(y, up(x))
    for i in range(batch):
        assert torch.allclose(up(x[i : i + 1]), y[i : i + 1], atol=1e-4)


_cache: dict[str, mf.Checkpoint] = {}


def _nets(factory: Any) -> dict[str, mf.Checkpoint]:
    if not _cache:
        states = {
            "x1": rrdb(RRDBParams(4, 1, 4, unshuffle=4)),
            "x2": rrdb(RRDBParams(4, 1, 4, unshuffle=2)),
            "x4": rrdb(RRDBParams(4, 1, 4)),
            "small": compact(),
        }
        _cache.update({k: mf.Checkpoint(_file(factory.mktemp("sr"), v)) for k, v in states.items()})
    return _cache


def test_padding_reflects_then_repeats() -> None:
    x = torch.arange(6.0).view(1, 1, 2, 3)
    assert pad_to_multiple(x, NetworkFacts(2, multiple=4)).tolist() == [
        [[[0, 1, 2, 1], [3, 4, 5, 4], [0, 1, 2, 1], [0, 1, 2, 1]]]
    ]
    assert pad_to_multiple(x, NetworkFacts(2, minimum=4, square=True)).shape == (1, 1, 4, 4)
    assert pad_to_multiple(x, NetworkFacts(2)) is x


@pytest.mark.parametrize(
    "state", [rrdb(RRDBParams(6, 1, 4)), rrdb(RRDBParams(4, 1, 4, unshuffle=2)), compact(CompactParams(8, 6, 2))]
)
def test_tiles_equal_the_whole(state: State, tmp_path: Path) -> None:
    """Within 1e-5 everywhere, borders too: a tile at a border has the picture's own border."""
    file = _file(tmp_path, state)
    whole, parts = mf.Checkpoint(file, tile=4096), mf.Checkpoint(file, tile=16)
    overlap, margin = parts.overlap()
    assert margin >= whole.facts.reach  # type: ignore[operator]
    x = torch.rand(1, 3, overlap + 150, overlap + 171, generator=torch.Generator().manual_seed(3))
    calls = _count(parts)
    a, b = whole(x), parts(x)
    assert calls[0] > 4
    assert float((a - b).abs().max()) < 1e-5 * float(a.abs().max())


def _count(up: Network) -> list[int]:
    calls, call = [0], up.network.call

    def counted(net: nn.Module, x: Tensor) -> Tensor:
        calls[0] += 1
        return call(net, x)

    up.network.call = counted
    return calls


def test_a_deep_network_in_tiles_has_no_seams(tmp_path: Path) -> None:
    """23 blocks reach 349 pixels; what lies beyond the 128 that are kept changes nothing that float32 shows."""
    params = RRDBParams(4, 23, 4, ups=1)
    torch.manual_seed(0)
    net = RRDBNet(params)  # as it is initialised: trained residuals are small likewise
    file = _file(tmp_path, dict(net.state_dict()))
    x = torch.rand(1, 3, 600, 40, generator=torch.Generator().manual_seed(3))
    a, b = mf.Checkpoint(file, tile=4096)(x), mf.Checkpoint(file, tile=340)(x)
    assert float((a - b).abs().max()) < 1e-5


@pytest.mark.parametrize(
    "params",
    [RRDBParams(16, 2, 8), RRDBParams(16, 2, 8, unshuffle=2), CompactParams(16, 4, 2), CompactParams(16, 4, 4)],
)
def test_predicted_memory_holds_what_lives(params: Any) -> None:
    net = RRDBNet(params) if isinstance(params, RRDBParams) else SRVGGNetCompact(params)
    x = torch.rand(1, 3, 64, 64)
    with torch.inference_mode(), LiveBytes() as live:
        net(x)
    predicted = params.values * 4 * 64 * 64
    assert 0.6 * predicted <= live.peak <= 1.05 * predicted, live.peak / predicted


@dataclass(frozen=True)
class Made(Network):
    """A network made here: fails as memory does above `limit` pixels, overflows in half precision if told to."""

    limit: int = 1 << 30
    overflows: bool = False
    half: bool = True
    tile: int | None = None
    dtype: Any = None

    @cached_property
    def network(self) -> OpenedNetwork:
        def call(net: nn.Module, x: Tensor) -> Tensor:
            sides.append((len(x), *x.shape[-2:], x.dtype))
            if x.shape[-1] * x.shape[-2] > self.limit:
                raise MemoryError
            return net(x) * (1e9 if self.overflows and x.dtype != torch.float32 else 1)

        sides: list[Any] = []
        object.__setattr__(self, "sides", sides)
        facts = NetworkFacts(2, reach=0, values=10, half=("float16",) if self.half else ())
        return OpenedNetwork(nn.Upsample(scale_factor=2), facts, call)


def test_out_of_memory_falls_back_to_tiles_with_one_note() -> None:
    up, x = Made(limit=200 * 200), torch.rand(1, 3, 500, 300)
    with collect_notes() as notes:
        y = up(x)
    assert torch.allclose(y, nn.Upsample(scale_factor=2)(x))
    assert len(notes) == 1 and "ran out of memory at 500x300; it works in tiles" in notes[0]
    assert [s[1:3] for s in up.sides[:3]] == [(500, 300), (250, 250), (125, 125)]  # type: ignore[attr-defined]


def test_out_of_memory_that_tiles_cannot_help() -> None:
    with (
        pytest.raises(mf.ResourceError, match="ran out of memory at 300x300, and smaller tiles cannot help"),
        collect_notes(),
    ):
        Made(limit=100)(torch.rand(1, 3, 300, 300))


def test_predicted_memory_chooses_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.rand(2, 3, 300, 200)
    for free, first in (
        (10**9, (2, 300, 200)),
        (int(1.5 * 300 * 200 * 40), (1, 300, 200)),
        (200_000 * 4, (1, 126, 126)),
    ):
        monkeypatch.setattr(module, "free_memory", lambda device, free=free: free)
        up = Made()
        with collect_notes() as notes:
            assert torch.allclose(up(x), nn.Upsample(scale_factor=2)(x))
        assert up.sides[0][:3] == first and not notes  # type: ignore[attr-defined]


def test_half_precision_that_overflows_is_made_again_in_float32() -> None:
    x = torch.rand(1, 3, 8, 8)
    with collect_notes() as notes:
        up = Made(dtype="float16", overflows=True)
        y, again = up(x), up(x)
    assert torch.equal(y, nn.Upsample(scale_factor=2)(x)) and torch.equal(again, y)
    assert len(notes) == 1 and "NaN or infinity in float16; it works in float32 from now on" in notes[0]
    assert [s[3] for s in up.sides] == [torch.float16, torch.float32, torch.float32]  # type: ignore[attr-defined]
    Made(dtype="float16")(x)


def test_a_network_that_is_broken_says_so(tmp_path: Path) -> None:
    state = compact()
    state["body.0.bias"][0] = float("nan")
    with pytest.raises(mf.WeightsError, match=r"body\.0\.bias holds NaN or infinity"):
        mf.Checkpoint(_file(tmp_path, state))
    huge = {name: torch.full_like(tensor, 3e38) for name, tensor in compact().items()}
    with pytest.raises(mf.NonFiniteError, match="NaN or infinity in float32; are its weights whole"):
        mf.Checkpoint(_file(tmp_path, huge))(torch.rand(1, 3, 4, 4))


@pytest.mark.gpu
def test_half_on_a_gpu(tmp_path: Path) -> None:
    up, x = mf.Checkpoint(_file(tmp_path, compact())), torch.rand(2, 3, 40, 33)
    error = (up(x.cuda()).cpu() - up(x)).abs().max() / up(x).abs().max()
    assert 0 < float(error) < 1e-2


@pytest.mark.parametrize(
    ("settings", "text"), [({"tile": 3}, "tile must be"), ({"tile": 64.0}, "tile"), ({"dtype": "int8"}, "dtype")]
)
def test_settings_are_checked_before_the_file(settings: dict[str, Any], text: str) -> None:
    for make in (mf.Checkpoint, mf.Spandrel):
        with pytest.raises(mf.PlanError, match=text):
            make("nowhere.pth", **settings)


def test_a_picture_with_a_network_from_a_file_is_replayed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The record names the file without its folder and holds its SHA-256; another file is refused."""
    (tmp_path / "weights").mkdir()
    file = _file(tmp_path / "weights", compact())
    up = mf.Blend(mf.Checkpoint(file), mf.Lanczos(2), 0.25)
    chain = mf.recipes.paper(up, low=(32, 32), size=(64, 64), steps=2)
    result = mf.run(chain, mf.toy(), "a", seed=3)
    result.save(tmp_path / "out.png")
    assert str(tmp_path) not in str(mf.read_record(tmp_path / "out.png"))
    with pytest.raises(mf.WeightsError, match="net.safetensors. is not here.*say where it is"):
        mf.replay(tmp_path / "out.png", model=mf.toy())
    again = mf.replay(tmp_path / "out.png", model=mf.toy(), files=[file])
    assert torch.equal(again.pixels, result.pixels)
    again = mf.replay(tmp_path / "out.png", model=mf.toy(), files=[tmp_path / "weights"])
    assert torch.equal(again.pixels, result.pixels)
    monkeypatch.chdir(tmp_path)
    _file(tmp_path, compact(seed=1))
    with pytest.raises(mf.WeightsError, match="is not here.*say where it is"):  # not even from this folder
        mf.replay(tmp_path / "out.png", model=mf.toy())
    with pytest.raises(mf.WeightsError, match="another file than the one asked for"):
        mf.replay(tmp_path / "out.png", model=mf.toy(), files=[tmp_path])


def test_one_file_is_read_once_and_two_files_of_one_name_are_two(tmp_path: Path) -> None:
    file = _file(tmp_path, compact())
    a, b = mf.Checkpoint(file), mf.Checkpoint(file, tile=64)
    assert a.network is b.network and a != b and a == mf.Checkpoint(file)
    _file(tmp_path, compact(seed=1))
    c = mf.Checkpoint(file)
    assert c.network is not a.network and c != a

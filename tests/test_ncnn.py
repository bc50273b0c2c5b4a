"""Networks in ncnn's form: what an independent writer of that form wrote is read back; anything else is refused."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import mrflow
from mrflow.errors import WeightsError
from mrflow.records.files import digest
from mrflow.upscalers import load_upscaler
from mrflow.upscalers.nets import CompactParams, RRDBNet, RRDBParams, SRVGGNetCompact

Net = RRDBNet | SRVGGNetCompact


class Writer:
    """Writes a network as ncnn's converter does: each value that is used twice goes through a Split."""

    def __init__(self, *, half: bool, fused: bool = True) -> None:
        self.half, self.fused = half, fused
        self.lines: list[str] = ["Input in 0 1 data"]
        self.data = b""

    def layer(self, kind: str, inputs: list[str], settings: str = "") -> str:
        name = f"v{len(self.lines)}"
        self.lines.append(
            f"{kind} {kind.lower()}_{len(self.lines)} {len(inputs)} 1 {' '.join(inputs)} {name} {settings}"
        )
        return name

    def split(self, name: str, count: int) -> list[str]:
        outs = [f"{name}_s{i}" for i in range(count)]
        self.lines.append(f"Split split_{name} 1 {count} {name} {' '.join(outs)}")
        return outs

    def conv(self, name: str, part: torch.nn.Module, slope: float | None = None) -> str:
        weight, bias = (getattr(part, k).detach() for k in ("weight", "bias"))
        settings = f"0={len(bias)} 1=3 4=1 5=1 6={weight.numel()}"
        if slope is not None and self.fused:
            settings += f" 9=2 -23310=1,{slope:e}"
        self.data += (0x01306B47 if self.half else 0).to_bytes(4, "little")
        raw = (weight.half() if self.half else weight).numpy().tobytes()
        self.data += raw + bytes(-len(raw) % 4) + bias.numpy().tobytes()
        out = self.layer("Convolution", [name], settings)
        return self.layer("ReLU", [out], f"0={slope}") if slope is not None and not self.fused else out

    def residual(self, change: str, source: str) -> str:
        if self.fused:
            return self.layer("Eltwise", [change, source], "0=1 -23301=2,2.000000e-01,1.000000e+00")
        return self.layer("BinaryOp", [self.layer("BinaryOp", [change], "0=2 1=1 2=0.2"), source], "0=0")

    def save(self, path: Path) -> Path:
        path.write_text(f"7767517\n{len(self.lines)} 999\n" + "\n".join(self.lines) + "\n")
        path.with_suffix(".bin").write_bytes(self.data)
        return path


def rrdb(net: RRDBNet, writer: Writer) -> Writer:
    top, x = writer.split(writer.conv("data", net.conv_first), 2)
    for block in net.body:
        start, x = writer.split(x, 2)
        for dense in block.children():
            seen = writer.split(x, 6)
            source, parts = seen[5], [seen[0]]
            for k in range(1, 5):
                joined = writer.layer("Concat", parts, "0=0") if len(parts) > 1 else parts[0]
                parts.append(writer.conv(joined, dense.get_submodule(f"conv{k}"), 0.2))
            x = writer.residual(writer.conv(writer.layer("Concat", parts), dense.get_submodule("conv5")), source)
        x = writer.residual(x, start)
    x = writer.layer("BinaryOp", [top, writer.conv(x, net.conv_body)], "0=0")
    for k in range(net.params.ups):
        x = writer.conv(writer.layer("Interp", [x], "0=1 1=2.0 2=2.0"), net.get_submodule(f"conv_up{k + 1}"), 0.2)
    writer.conv(writer.conv(x, net.conv_hr, 0.2), net.conv_last)
    return writer


def compact(net: SRVGGNetCompact, writer: Writer) -> Writer:
    low, x = writer.split("data", 2)
    for layer in net.body:
        if isinstance(layer, torch.nn.PReLU):
            x = writer.layer("PReLU", [x], f"0={len(layer.weight)}")
            writer.data += layer.weight.detach().numpy().tobytes()
        else:
            x = writer.conv(x, layer)
    s = net.params.scale
    writer.layer(
        "BinaryOp", [writer.layer("PixelShuffle", [x], f"0={s}"), writer.layer("Interp", [low], f"0=1 1={s} 2={s}")]
    )
    return writer


@pytest.fixture
def net() -> RRDBNet:
    torch.manual_seed(0)
    return RRDBNet(RRDBParams(width=8, blocks=2, growth=4)).eval().requires_grad_(False)


def enlarged(path: Path, pixels: Tensor) -> Tensor:
    return load_upscaler(path)(pixels)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("half", [True, False])
@pytest.mark.parametrize("ups", [1, 2])
def test_rrdb_is_read_back(tmp_path: Path, half: bool, fused: bool, ups: int) -> None:
    torch.manual_seed(ups)
    net = RRDBNet(RRDBParams(width=8, blocks=2, growth=4, ups=ups)).eval().requires_grad_(False)
    path = rrdb(net, Writer(half=half, fused=fused)).save(tmp_path / "x4.param")
    if half:
        for name, p in net.named_parameters():
            if name.endswith("weight"):
                p.copy_(p.half().float())
    pixels = torch.rand(1, 3, 9, 7)
    torch.testing.assert_close(enlarged(path, pixels), net(pixels), rtol=0, atol=1e-6)


@pytest.mark.parametrize("scale", [2, 4])
def test_compact_is_read_back(tmp_path: Path, scale: int) -> None:
    net = SRVGGNetCompact(CompactParams(width=8, convs=3, scale=scale)).eval().requires_grad_(False)
    for index, p in enumerate(m for m in net.modules() if isinstance(m, torch.nn.PReLU)):
        p.weight.copy_(torch.linspace(0.1 * index, 0.5, 8))
    path = compact(net, Writer(half=False)).save(tmp_path / "video.param")
    pixels = torch.rand(2, 3, 8, 6)
    torch.testing.assert_close(enlarged(path, pixels), net(pixels), rtol=0, atol=1e-6)


def edited(path: Path, edit: Callable[[str], str]) -> Path:
    text = path.read_text()
    assert edit(text) != text
    path.write_text(edit(text))
    return path


@pytest.mark.parametrize(
    ("edit", "what"),
    [
        (lambda t: t.replace("2.000000e-01", "1.000000e-01", 1), "wired, or followed by a rectifier"),
        (lambda t: t.replace("2,2.000000e-01", "2,3.000000e-01", 1), "wired, or followed by a rectifier"),
        (lambda t: t.replace("0=1 1=2.0", "0=2 1=2.0", 1), r"Interp\) is a resize that neither has"),
        (lambda t: t.replace("1=3 4=1", "1=3 4=0", 1), r"convolution_1 \(Convolution\) is not a 3x3"),
        (lambda t: t.replace("Concat ", "Softmax ", 1), r"softmax|concat_\d+ \(Softmax\) is no part"),
        (lambda t: re.sub(r"(v\d+_s4) (v\d+_s5)", r"\2 \1", t, count=1), None),
        (lambda t: t.replace("7767517", "7767518", 1), "does not begin with 7767517"),
        (lambda t: t[: len(t) // 2], "broken at its line|lists"),
        (lambda t: t.replace("6=216", "6=217", 1), "announces 217 weights for 8 channels"),
        (lambda t: t.replace("data v1 ", "nothing v1 ", 1), "takes nothing, which none makes"),
        (lambda t: t.replace("0=8", "0=nan", 1), "broken at its line"),
    ],
)
def test_another_graph_is_refused(tmp_path: Path, net: RRDBNet, edit: Callable[[str], str], what: str | None) -> None:
    path = edited(rrdb(net, Writer(half=True)).save(tmp_path / "x4.param"), edit)
    if what is None:  # only names of values changed places: the same network
        pixels = torch.rand(1, 3, 6, 6)
        assert enlarged(path, pixels).shape == (1, 3, 24, 24)
        return
    with pytest.raises(WeightsError, match=what):
        load_upscaler(path)


@pytest.mark.parametrize(
    ("edit", "what"),
    [
        (lambda d: d[:-4], "cut off at layer"),
        (lambda d: d + b"\0\0\0\0", "4 bytes more"),
        (lambda d: (0x000D4B38).to_bytes(4, "little") + d[4:], "stored as 8-bit integers"),
        (lambda d: b"\x01\x02\x03\x04" + d[4:], "a table of 256 values"),
        (lambda _: b"", "another .param|cut off|table"),
    ],
)
def test_other_weights_are_refused(tmp_path: Path, net: RRDBNet, edit: Callable[[bytes], bytes], what: str) -> None:
    path = rrdb(net, Writer(half=True)).save(tmp_path / "x4.param")
    beside = path.with_suffix(".bin")
    beside.write_bytes(edit(beside.read_bytes()))
    with pytest.raises(WeightsError, match=what):
        load_upscaler(path)


def test_weights_must_lie_beside(tmp_path: Path, net: RRDBNet) -> None:
    path = rrdb(net, Writer(half=True)).save(tmp_path / "x4.param")
    path.with_suffix(".bin").rename(tmp_path / "y.bin")
    with pytest.raises(WeightsError, match=r"x4\.bin, must lie beside it"):
        load_upscaler(path)


def test_both_files_make_the_digest(tmp_path: Path, net: RRDBNet) -> None:
    path = rrdb(net, Writer(half=True)).save(tmp_path / "x4.param")
    first = digest(path)
    beside = path.with_suffix(".bin")
    data = bytearray(beside.read_bytes())
    data[40] ^= 1
    beside.write_bytes(bytes(data))
    assert digest(path) != first


def test_is_taken_by_its_word(tmp_path: Path, net: RRDBNet) -> None:
    path = rrdb(net, Writer(half=False)).save(tmp_path / "x4.param")
    from mrflow.cli.parsing import upscaler

    taken = upscaler(str(path))
    assert isinstance(taken, mrflow.Checkpoint) and taken.scale == 4
    assert taken.to_record()["path"] == "x4.param"

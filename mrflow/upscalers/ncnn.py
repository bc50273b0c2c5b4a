"""Super-resolution networks in ncnn's form (a `.param` that lists layers, a `.bin` of their weights beside it).

Upscayl, realesrgan-ncnn-vulkan and waifu2x-extension ship their networks so. The graph of the file is compared with
the graph of the network of `sr.py` that its weights would fit, convolution by convolution, so that a file is either
that network or refused with the first layer that differs.

Source of the format: ncnn's wiki, "param and model file structure", and `ncnn::ModelBinFromDataReader`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor

from mrflow.errors import ResourceError, WeightsError
from mrflow.upscalers.nets import RESIDUAL, SLOPE, CompactParams, RRDBParams

MAGIC = "7767517"
MAX_PARAM = 8 << 20  # bytes of a .param; a published one has 0.1 MB
FLOAT16, FLOAT32 = 0x01306B47, 0
STORED = {0x000D4B38: "8-bit integers", 0x0002C056: "float32 with a scale"}
State = dict[str, Tensor]


def weights_beside(path: Path) -> Path:
    """The file of weights that belongs to a `.param`.

    Raises:
        WeightsError: it is not there.
    """
    beside = path.with_suffix(".bin")
    if not beside.is_file():
        raise WeightsError(f"{path} is half of an ncnn network: its weights, {beside.name}, must lie beside it")
    return beside


def read_ncnn(path: Path) -> State:
    """The tensors of an RRDBNet or an SRVGGNetCompact, in float32, under the names that `sr.py` gives them.

    Raises:
        WeightsError: a file is missing, broken or cut off, or the graph is another one.
        ResourceError: a file cannot be read.
    """
    beside = weights_beside(path)
    try:
        if path.stat().st_size > MAX_PARAM:
            raise WeightsError(f"{path} has {path.stat().st_size} bytes; a list of layers has at most {MAX_PARAM}")
        text = path.read_text("utf-8")
        data = beside.read_bytes()
    except UnicodeDecodeError:
        raise WeightsError(f"{path} is no list of ncnn layers in text (ncnn's binary form is not read)") from None
    except OSError as error:
        raise ResourceError(f"{error.filename or path} cannot be read: {error.strerror or error}") from None
    graph = _read(_layers(text, path), path)
    tensors = _weights(graph, data, beside)
    if any(layer.kind == "PReLU" for layer in graph.weighted):
        return _compact(graph, tensors, path)
    return _rrdb(graph, tensors, path)


@dataclass(frozen=True)
class Layer:
    """One line of a `.param`. `values` are its settings by their number, an array under -(23300 + number)."""

    kind: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    values: dict[int, tuple[float, ...]]

    def get(self, key: int, default: float) -> float:
        """A setting that is one number."""
        return self.values[key][0] if key in self.values else default


@dataclass
class Graph:
    """Values of a network's graph, each distinct one with a number of its own, so that equal numbers mean equal graphs.

    `weighted` are the layers with weights, in the file's order; `made` is what each of them makes.
    """

    numbers: dict[tuple[object, ...], int] = field(default_factory=dict[tuple[object, ...], int])
    terms: list[tuple[object, ...]] = field(default_factory=list[tuple[object, ...]])
    weighted: list[Layer] = field(default_factory=list[Layer])
    made: list[int] = field(default_factory=list[int])
    out: int = -1

    def value(self, *term: object) -> int:
        """The number of what an operation makes."""
        if term not in self.numbers:
            self.numbers[term] = len(self.terms)
            self.terms.append(term)
        return self.numbers[term]

    def conv(self, index: int, x: int, slope: float = 1.0) -> int:
        """A 3x3 convolution with the weights of that index, then a leaky rectifier (a slope of 1 is none)."""
        return self.value("conv", index, x, round(slope, 6))

    def prelu(self, index: int, x: int) -> int:
        """A rectifier whose slopes are the weights of that index."""
        return self.value("prelu", index, x)

    def cat(self, parts: Sequence[int]) -> int:
        """Channels of all parts, one after another."""
        flat: list[object] = []
        for part in parts:
            term = self.terms[part]
            flat += term[1:] if term[0] == "cat" else (part,)
        return self.value("cat", *flat)

    def scale(self, x: int, by: float) -> int:
        """x times a number."""
        return x if by == 1 else self.value("scaled", x, round(by, 6))

    def add(self, *parts: int) -> int:
        """A sum; the order does not matter."""
        return self.value("add", *sorted(parts))


def _layers(text: str, path: Path) -> list[Layer]:
    lines = [line.split() for line in text.splitlines() if line.strip()]
    if not lines or lines[0] != [MAGIC]:
        raise WeightsError(f"{path} is no list of ncnn layers: it does not begin with {MAGIC}")
    layers: list[Layer] = []
    try:
        count = int(lines[1][0])
        for kind, name, takes, gives, *rest in lines[2:]:
            n, m = int(takes), int(gives)
            values: dict[int, tuple[float, ...]] = {}
            for setting in rest[n + m :]:
                key, _, value = setting.partition("=")
                numbers = tuple(float(v) for v in value.split(","))
                values[int(key)] = numbers[1:] if int(key) <= -23300 else numbers
            if n < 0 or m < 0 or len(rest) < n + m or not all(map(math.isfinite, sum(values.values(), ()))):
                raise ValueError
            layers.append(Layer(kind, name, tuple(rest[:n]), tuple(rest[n : n + m]), values))
    except (ValueError, IndexError):
        raise WeightsError(f"{path} is broken at its line {len(layers) + 3}, or cut off") from None
    if len(layers) != count:
        raise WeightsError(f"{path} announces {count} layers and lists {len(layers)}: it is cut off")
    return layers


def _read(layers: list[Layer], path: Path) -> Graph:
    """The graph of a list of layers."""
    graph = Graph()
    blobs: dict[str, int] = {}
    for layer in layers:
        missing = [name for name in layer.inputs if name not in blobs]
        if missing or not layer.outputs:
            raise WeightsError(f"{path}: layer {layer.name} takes {', '.join(missing) or 'nothing'}, which none makes")
        result = _apply(graph, layer, [blobs[name] for name in layer.inputs], path)
        blobs.update(dict.fromkeys(layer.outputs, result))
        graph.out = result
    return graph


def _apply(graph: Graph, layer: Layer, x: list[int], path: Path) -> int:
    """What one layer makes of its inputs."""
    kind, get = layer.kind, layer.get
    if kind == "Input" and not x:
        return graph.value("input")
    if not x:
        _refuse(layer, path)
    if kind in ("Split", "Noop", "Dropout"):
        return x[0]
    if kind == "Convolution":
        across = get(1, 0), get(11, get(1, 0)), get(2, 1), get(3, 1), get(4, 0), get(5, 0)
        if across != (3, 3, 1, 1, 1, 1) or get(9, 0) not in (0, 1, 2):
            _refuse(layer, path, "not a 3x3 convolution with a border of 1, a bias and at most a leaky rectifier")
        slope = {0: 1.0, 1: 0.0, 2: layer.values.get(-23310, (1.0,))[0]}[int(get(9, 0))]
        return _weighted(graph, layer, graph.conv(len(graph.weighted), x[0], slope))
    if kind == "PReLU":
        return _weighted(graph, layer, graph.prelu(len(graph.weighted), x[0]))
    if kind == "ReLU" and graph.terms[x[0]][0] == "conv" and graph.terms[x[0]][3] == 1:
        _, index, source, _ = graph.terms[x[0]]
        result = graph.conv(int(str(index)), int(str(source)), get(0, 0))
        graph.made[int(str(index))] = result
        return result
    if kind == "Concat" and get(0, 0) == 0:
        return graph.cat(x)
    if kind == "Eltwise" and get(0, 0) == 1:
        factors = layer.values.get(-23301, ()) or (1.0,) * len(x)
        if len(factors) == len(x):
            return graph.add(*(graph.scale(a, c) for a, c in zip(x, factors, strict=True)))
    if kind == "BinaryOp" and get(0, 0) == 0 and len(x) == 2:
        return graph.add(*x)
    if kind == "BinaryOp" and get(0, 0) == 2 and get(1, 0) == 1:
        return graph.scale(x[0], get(2, 0))
    if kind == "Interp":
        if get(0, 0) != 1 or get(1, 1) != get(2, 1):
            _refuse(layer, path, "a resize that neither has (is there a file of the network's own scale, x4?)")
        return graph.value("nearest", x[0], get(1, 1))
    if kind == "PixelShuffle" and get(1, 0) == 0:
        return graph.value("shuffle", x[0], get(0, 1))
    _refuse(layer, path)


def _weighted(graph: Graph, layer: Layer, made: int) -> int:
    graph.weighted.append(layer)
    graph.made.append(made)
    return made


def _refuse(layer: Layer, path: Path, why: str = "") -> NoReturn:
    raise WeightsError(
        f"{path} is neither RRDBNet nor SRVGGNetCompact: its layer {layer.name} ({layer.kind}) is "
        f"{why or 'no part of either'}. Give the network as .pth or .safetensors instead"
    )


def _weights(graph: Graph, data: bytes, path: Path) -> list[tuple[Tensor, ...]]:
    """Weights and bias of each convolution, slopes of each rectifier."""
    at, channels, out = 0, 3, list[tuple[Tensor, ...]]()

    def taken(count: int, dtype: torch.dtype, layer: Layer) -> Tensor:
        nonlocal at
        if count < 1 or at + count * dtype.itemsize > len(data):
            raise WeightsError(f"{path} is cut off at layer {layer.name}, or belongs to another .param")
        values = torch.frombuffer(bytearray(data[at : at + count * dtype.itemsize]), dtype=dtype).float()
        at += count * dtype.itemsize
        return values

    for layer in graph.weighted:
        width, size = int(layer.get(0, 0)), int(layer.get(6, 0))
        if layer.kind == "PReLU":
            out.append((taken(width, torch.float32, layer),))
            continue
        flag = int.from_bytes(data[at : at + 4], "little")
        at += 4
        if flag not in (FLOAT16, FLOAT32):
            raise WeightsError(
                f"{path}: layer {layer.name} is stored as {STORED.get(flag, 'a table of 256 values')}; "
                "only float16 and float32 are read"
            )
        channels = size // (9 * width) if width > 0 else 0
        if size != 9 * width * channels:
            raise WeightsError(f"{path}: layer {layer.name} announces {size} weights for {width} channels")
        weight = taken(size, torch.float16 if flag == FLOAT16 else torch.float32, layer)
        at += -at % 4
        out.append((weight.reshape(width, channels, 3, 3), taken(width, torch.float32, layer)))
    if at != len(data):
        raise WeightsError(f"{path} has {len(data) - at} bytes more than its layers; does it belong to this .param?")
    return out


def _rrdb(graph: Graph, tensors: list[tuple[Tensor, ...]], path: Path) -> State:
    """Names of an RRDBNet's tensors: conv_first, 15 in each block, conv_body, conv_up1 ..., conv_hr, conv_last."""
    doublings = sum(term[0] == "nearest" for term in graph.terms)
    blocks, left = divmod(len(tensors) - 4 - doublings, 15)
    if blocks < 1 or left:
        raise WeightsError(f"{path} is neither RRDBNet nor SRVGGNetCompact: it has {len(tensors)} convolutions")
    names = ["conv_first"]
    names += [f"body.{i}.rdb{j}.conv{k}" for i in range(blocks) for j in (1, 2, 3) for k in (1, 2, 3, 4, 5)]
    names += ["conv_body", *(f"conv_up{k + 1}" for k in range(doublings)), "conv_hr", "conv_last"]
    _check_same(graph, expected_rrdb(graph, RRDBParams(blocks=blocks, ups=doublings)), path)
    return {
        f"{name}.{part}": tensor
        for name, pair in zip(names, tensors, strict=True)
        for part, tensor in zip(("weight", "bias"), pair, strict=True)
    }


def _compact(graph: Graph, tensors: list[tuple[Tensor, ...]], path: Path) -> State:
    """Names of an SRVGGNetCompact's tensors: body.0 ..., convolutions and slopes in turn."""
    scale = next((int(float(str(term[2]))) for term in graph.terms if term[0] == "shuffle"), 1)
    _check_same(graph, expected_compact(graph, CompactParams(convs=(len(tensors) - 3) // 2, scale=scale)), path)
    return {
        f"body.{index}.{part}": tensor
        for index, group in enumerate(tensors)
        for part, tensor in zip(("weight", "bias"), group, strict=False)
    }


def expected_rrdb(graph: Graph, params: RRDBParams) -> tuple[list[int], int]:
    """What the convolutions of an RRDBNet without pixel-unshuffle make, as its `forward` has it, and its output."""
    made: list[int] = []

    def conv(x: int, slope: float = 1.0) -> int:
        made.append(graph.conv(len(made), x, slope))
        return made[-1]

    first = x = conv(graph.value("input"))
    for _ in range(params.blocks):
        block = x
        for _ in range(3):
            seen = [x]
            for _ in range(4):
                seen.append(conv(graph.cat(seen) if len(seen) > 1 else x, SLOPE))
            x = graph.add(graph.scale(conv(graph.cat(seen)), RESIDUAL), x)
        x = graph.add(graph.scale(x, RESIDUAL), block)
    x = graph.add(first, conv(x))
    for _ in range(params.ups):
        x = conv(graph.value("nearest", x, 2.0), SLOPE)
    return made, conv(conv(x, SLOPE))


def expected_compact(graph: Graph, params: CompactParams) -> tuple[list[int], int]:
    """What the layers of an SRVGGNetCompact make, as its `forward` has it, and its output."""
    made: list[int] = []
    source = x = graph.value("input")
    for index in range(2 * params.convs + 3):
        x = graph.prelu(index, x) if index % 2 else graph.conv(index, x)
        made.append(x)
    shuffled = graph.value("shuffle", x, params.scale)
    return made, graph.add(shuffled, graph.value("nearest", source, params.scale))


def _check_same(graph: Graph, expected: tuple[list[int], int], path: Path) -> None:
    """Refuse a graph that is another one, by the first layer with weights where it differs, or by its end."""
    made, out = expected
    for layer, found, target in zip(graph.weighted, graph.made, made, strict=False):
        if found != target:
            _refuse(layer, path, "wired, or followed by a rectifier, in another way than there")
    if len(graph.made) != len(made) or graph.out != out:
        raise WeightsError(
            f"{path} is neither RRDBNet nor SRVGGNetCompact: what follows its layer {graph.weighted[-1].name} "
            "is another ending"
        )

"""Super-resolution checkpoints: safetensors, pickles of tensors alone, ncnn; every naming, to the networks of `sr.py`.

A pickle can run code when it is loaded. It is read here with torch's restricted reader, which makes tensors and plain
containers and refuses everything else; sizes are held against the file's before.
"""

import math
import pickle
import re
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from mrflow.checkpoints.blueprint import blueprint
from mrflow.checkpoints.names import common_wrapper, plain
from mrflow.checkpoints.pickles import check_pickles
from mrflow.checkpoints.safetensors import map_tensor, read_header, some
from mrflow.errors import ResourceError, WeightsError
from mrflow.upscalers.ncnn import read_ncnn
from mrflow.upscalers.nets import CompactParams, RRDBNet, RRDBParams, SRVGGNetCompact

MAX_BYTES = 8 << 30  # far above any published network; a guard against archives that grow when they are read
WRAPPERS = ("params_ema", "params-ema", "params", "state_dict", "model_state_dict", "model", "net", "net_g")
MAX_NESTING = 8  # containers around a state_dict
State = dict[str, Tensor]


def read_state(path: Path, *, first: str | None = None) -> State:
    """The named tensors of a checkpoint, out of the containers that training programs put them in.

    `params_ema` is taken before `params`, as Real-ESRGAN does; `first` names a container to take before all others.

    Raises:
        WeightsError: the file is missing, broken, holds more than tensors, or no network.
        ResourceError: it cannot be read.
    """
    if not path.is_file():
        what = "is a folder; name the file in it" if path.is_dir() else "does not exist"
        raise WeightsError(f"{path} {what}")
    if path.suffix == ".param":
        return read_ncnn(path)
    if path.suffix == ".safetensors":
        header = read_header(path)
        files: dict[Path, torch.UntypedStorage] = {}
        state = {name: map_tensor(entry, files) for name, entry in header.tensors.items()}
    else:
        state = _unwrap(_unpickle(path), path, first)
        _check_tensors(state, path)
    for name, x in state.items():
        if x.is_complex() or (str(name).endswith(".weight") and not x.is_floating_point()):
            raise WeightsError(f"{path}: {name} is {str(x.dtype).removeprefix('torch.')}, no real numbers")
        if x.is_floating_point() and not bool(x.float().isfinite().all()):
            raise WeightsError(f"{path}: {name} holds NaN or infinity")
    try:
        state = without_wrappers(plain(state))
    except ValueError as error:
        raise WeightsError(f"{path}: {error}") from None
    # Networks are built as deep as their tensors are numbered.
    numbers = [int(n) for name in state for n in re.findall(r"(?:^|\.)(\d{1,18})(?=\.)", name)]
    most = 16 * len(state) + 64
    if (numbers and max(numbers) > most) or any(re.search(r"\d{19}", name) for name in state):
        raise WeightsError(f"{path} numbers its parts beyond {most}, but holds {len(state)} tensors only")
    return state


def _check_tensors(state: State, path: Path) -> None:
    """Refuse tensors without values of their own, and more values than the file has bytes for."""
    total, most = 0, 2 * path.stat().st_size
    for name, tensor in state.items():
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
            what = "on no device" if tensor.is_meta else "quantised" if tensor.is_quantized else f"{tensor.layout}"
            raise WeightsError(f"{path}: {name} is {what}: save dense tensors")
        size = tensor.numel() * tensor.itemsize
        total += size
        if size > tensor.untyped_storage().nbytes() or total > most:
            raise WeightsError(f"{path}: {name} of shape {tuple(tensor.shape)} repeats values that the file has once")


def _unpickle(path: Path) -> object:
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(64)
        if start.startswith(b"version https://git-lfs"):
            raise WeightsError(f"{path} is a Git LFS pointer, not the file itself: fetch it with `git lfs pull`")
        if start[8:9] == b"{" and int.from_bytes(start[:8], "little") < size:
            raise WeightsError(f"{path} is a safetensors file; let its name end in .safetensors")
        if start.lstrip()[:1] == b"<":
            raise WeightsError(f"{path} is a web page, not the file itself: download it again")
        archive = zipfile.is_zipfile(path)
        if archive:
            with zipfile.ZipFile(path) as z:
                if any(i.filename.endswith("constants.pkl") for i in z.infolist()):
                    raise WeightsError(f"{path} is a TorchScript program, which is code: save its state_dict instead")
                packed = [i for i in z.infolist() if i.compress_type != zipfile.ZIP_STORED]
                if packed or sum(i.file_size for i in z.infolist()) > size:
                    raise WeightsError(f"{path} is compressed inside: refused, torch writes no such files")
        if size > MAX_BYTES:
            raise WeightsError(f"{path} has {size} bytes; super-resolution networks have at most {MAX_BYTES}")
        check_pickles(path)
        # A mapped archive shares memory with the file; older files can only be read whole.
        loaded: object = torch.load(path, map_location="cpu", weights_only=True, mmap=archive)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)|[`']([\w.]+)[`'] (?:was not|is not|that is)", str(error))
        what = next((g for g in found.groups() if g), "") if found else ""
        raise WeightsError(
            f"{path} holds more than tensors{f' ({what})' if what else ''}, and could run code when it is loaded: "
            "refused. Save its state_dict alone, as safetensors"
        ) from None
    except WeightsError:
        raise
    except PermissionError as error:
        raise ResourceError(f"{path} cannot be read: {error.strerror or error}") from None
    except Exception as error:
        raise WeightsError(f"{path} is not a checkpoint that torch can read, or it is cut off ({error})") from None
    return loaded


def _unwrap(loaded: object, path: Path, first: str | None) -> State:
    for _ in range(MAX_NESTING):
        if not isinstance(loaded, Mapping):
            raise WeightsError(f"{path} holds {type(loaded).__name__}, not named tensors: save its state_dict")
        table = cast("Mapping[object, object]", loaded)
        if table and all(isinstance(v, Tensor) for v in table.values()):
            if odd := [type(k).__name__ for k in table if not isinstance(k, str | int)]:
                raise WeightsError(f"{path} names tensors by {odd[0]}, not by text: save its state_dict")
            return {str(k): cast(Tensor, v) for k, v in table.items()}
        inner: Sequence[object] = [table[k] for k in (first, *WRAPPERS) if isinstance(table.get(k), Mapping)]
        inner = inner or [v for v in table.values() if isinstance(v, Mapping)][: len(table) == 1]
        if not inner:
            raise WeightsError(
                f"{path} holds no network under a name that is known ({', '.join(WRAPPERS)}); "
                f"it holds {some([k if isinstance(k, str) else type(k).__name__ for k in table]) or 'nothing'}"
            )
        loaded = inner[0]
    raise WeightsError(f"{path} holds tables in tables, {MAX_NESTING} and more: save its state_dict")


def without_wrappers(state: State) -> State:
    """A network's tensors without the words of wrappers that all names begin with, as far as it takes to know it.

    Of a network that is none of `sr.py`'s only words are taken off that no network uses itself.
    """
    names = state
    while recognise(rename(names)) is None:
        word = common_wrapper(names)
        if not word:
            break
        names = {name.removeprefix(word): tensor for name, tensor in names.items()}
    else:
        return names
    while (word := common_wrapper(state)) in ("module.", "netG.", "generator.", "params_ema.", "params."):
        state = {name.removeprefix(word): tensor for name, tensor in state.items()}
    return state


# The first-generation naming numbers the parts of one sequence; "RRDB_trunk" names them by another word.
_RENAMES = (
    (re.compile(r"model\.1\.sub\.(\d+)\.RDB(\d)\.conv(\d)\.0\.(weight|bias)"), r"body.\1.rdb\2.conv\3.\4"),
    (re.compile(r"RRDB_trunk\.(\d+)\.RDB(\d)\.conv(\d)\.(weight|bias)"), r"body.\1.rdb\2.conv\3.\4"),
    (re.compile(r"model\.0\.(weight|bias)"), r"conv_first.\1"),
    (re.compile(r"model\.1\.sub\.\d+\.(weight|bias)"), r"conv_body.\1"),
    (re.compile(r"trunk_conv\.(weight|bias)"), r"conv_body.\1"),
    (re.compile(r"upconv(\d)\.(weight|bias)"), r"conv_up\1.\2"),
    (re.compile(r"HRconv\.(weight|bias)"), r"conv_hr.\1"),
)


def rename(state: State) -> State:
    """The same tensors under the names of `RRDBNet`; names that are in no known naming stay as they are."""
    numbers = [int(m[1]) for name in state if (m := re.fullmatch(r"model\.(\d+)\.weight", name))]
    last = max(numbers, default=-1)
    out: State = {}
    for name, tensor in state.items():
        new = name
        for pattern, to in _RENAMES:
            if pattern.fullmatch(name):
                new = pattern.sub(to, name)
                break
        else:
            tail = re.fullmatch(r"model\.(\d+)\.(weight|bias)", name)
            if tail:
                index = int(tail[1])
                part = {last: "conv_last", last - 2: "conv_hr"}.get(index, f"conv_up{index // 3}")
                new = f"{part}.{tail[2]}"
        out[new] = tensor
    return out


def recognise(state: State) -> RRDBParams | CompactParams | None:
    """The sizes of the network that tensors (named as `rename` gives them) belong to; None for any other network."""
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    if {"conv_first.weight", "conv_last.weight", "body.0.rdb1.conv1.weight"} <= set(shapes):
        first, last = shapes["conv_first.weight"], shapes["conv_last.weight"]
        growth = shapes["body.0.rdb1.conv1.weight"]
        if len(first) != 4 or len(last) != 4 or len(growth) != 4 or not last[0] or first[1] % last[0]:
            return None
        factor = math.isqrt(first[1] // last[0])
        blocks = {int(m[1]) for name in shapes if (m := re.match(r"body\.(\d+)\.", name))}
        ups = {int(m[1]) for name in shapes if (m := re.match(r"conv_up(\d+)\.", name))}
        params = RRDBParams(first[0], max(blocks) + 1, growth[0], factor, len(ups), last[0])
        fits = factor**2 * last[0] == first[1] and 2 ** len(ups) % factor == 0 and factor in (1, 2, 4)
        return params if fits else None
    convs = [
        int(m[1]) for name in shapes if (m := re.fullmatch(r"body\.(\d+)\.weight", name)) and len(shapes[name]) == 4
    ]
    if convs and min(convs) == 0 and all(name.startswith("body.") for name in shapes):
        first, last = shapes["body.0.weight"], shapes[f"body.{max(convs)}.weight"]
        scale = math.isqrt(last[0] // first[1]) if first[1] else 0
        if scale and scale**2 * first[1] == last[0] and max(convs) >= 2:
            return CompactParams(first[0], (max(convs) - 2) // 2, scale, first[1])
    return None


def network(state: State, path: Path) -> RRDBNet | SRVGGNetCompact | None:
    """The network that a checkpoint holds, in float32; None where it is none of those in `sr.py`.

    Raises:
        WeightsError: it is one of them, but tensors are missing, left over, or of another shape.
    """
    named = rename(state)
    params = recognise(named)
    if params is None:
        return None
    with blueprint():
        net = RRDBNet(params) if isinstance(params, RRDBParams) else SRVGGNetCompact(params)
    problems = misfits(named, net)
    problems += [f"{name} is {t.dtype}" for name, t in named.items() if not t.is_floating_point()]
    problems = problems or [f"{name} holds NaN or infinity" for name, t in named.items() if not t.isfinite().all()]
    if problems:
        raise WeightsError(
            f"{path} looks like {type(net).__name__} but does not fit it: {len(problems)} problems: {some(problems)}"
        )
    # Copies: a file that is replaced while the program runs must not change the network.
    net.load_state_dict({name: _place(tensor) for name, tensor in named.items()}, assign=True)
    net.eval().requires_grad_(False)  # noqa: FBT003
    return net


def misfits(state: State, net: nn.Module) -> list[str]:
    """What keeps tensors from being a network's: missing, left over, or of another shape, each in words."""
    want = net.state_dict()
    problems = [f"{name} is missing" for name in want if name not in state]
    problems += [f"{name} is not expected" for name in state if name not in want]
    return problems + [
        f"{name} has shape {tuple(state[name].shape)}, expected {tuple(target.shape)}"
        for name, target in want.items()
        if name in state and state[name].shape != target.shape
    ]


def _place(tensor: Tensor) -> Tensor:
    if tensor.ndim == 4:
        return tensor.float().contiguous(memory_format=torch.channels_last).clone()
    return tensor.to(torch.float32, copy=True)

"""Safetensors checkpoints, read strictly: headers, then names and shapes, then weights. Pickles are never read here.

`open_checkpoint` reads headers only (one file, or a folder of shards) and checks them against the files' sizes. A
layout says, for each parameter, which tensors of the file it is made of (`Source`). `load_into` compares both lists,
names and shapes, and then maps or copies one tensor after another into a module that was built on the meta device.
"""

import json
import math
import os
import re
import struct
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Generic, NoReturn, TypeVar, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file as write_safetensors  # pyright: ignore[reportUnknownVariableType]
from torch import Tensor, nn

from mrflow._checks import check_path
from mrflow.checkpoints.configs import read_config
from mrflow.checkpoints.names import plain
from mrflow.errors import ResourceError, WeightsError
from mrflow.records.files import drafting

MAX_HEADER = 100_000_000  # the format's own limit
MAX_TENSORS, MAX_AXES, MAX_NUMBER = 100_000, 16, 1 << 62  # far above any published network
DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz, "F8_E8M0": torch.float8_e8m0fnu, "C64": torch.complex64,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U64": torch.uint64,
    "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
PACKED: Mapping[str, int] = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}  # bits; torch has no such values
OTHER_FORMATS = (
    (b"PK\x03\x04", "a PyTorch pickle archive"),
    (b"GGUF", "a GGUF file"),
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself: fetch it with `git lfs pull`"),
)
# Told apart only where no header of tensors can begin so.
NO_TENSORS = (
    *((magic, "a picture") for magic in (b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"RIFF", b"II*\0", b"MM\0*", b"BM")),
    (b"\x89HDF", "an HDF5 file"),
    (b"\x1f\x8b", "a gzip archive"),
    *((magic, "a web page, not the file itself: fetch it again") for magic in (b"<!DOCTYPE", b"<!doctype", b"<html")),
)


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies: `start` counts bytes from the beginning of the file; `scale` multiplies its values.

    `packed` names a type of which several values share a byte; its `dtype` is then that of bytes.
    """

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    scale: "Entry | None" = None
    packed: str = ""

    @property
    def kind(self) -> str:
        """The name of the type of its values."""
        return self.packed or str(self.dtype)


@dataclass(frozen=True)
class Header:
    """What a checkpoint holds, without its weights. `path` is what errors name: the file, or the index of shards."""

    path: Path
    tensors: Mapping[str, Entry]
    metadata: Mapping[str, str] = field(default_factory=dict[str, str])


@dataclass(frozen=True)
class Source:
    """What one parameter is made of: tensors of a file, `rows` of each, one under the other along the first axis.

    `swap` exchanges the halves of the first axis; `squeeze` says that the file leaves out trailing axes of length 1,
    `frame` that its tensor has one axis more, the third, of which the last slice is taken.
    """

    names: tuple[str, ...]
    rows: tuple[int, ...]
    swap: bool = False
    squeeze: bool = False
    frame: bool = False


Layout = Mapping[str, Source]


def read_header(path: Path) -> Header:
    """The header of one safetensors file: 8 bytes of length n (little endian), n bytes of JSON, then the tensors.

    Raises:
        WeightsError: the file is missing, too short, another format, or its header contradicts itself or the file.
        ResourceError: the file cannot be read.
    """
    raw, size = _header_bytes(path)
    begin, items = 8 + len(raw), _header_table(raw, path)
    metadata = items.pop("__metadata__", None) or {}
    if not (isinstance(metadata, dict) and all(isinstance(v, str) for v in cast("dict[str, Any]", metadata).values())):
        _broken(path, "its metadata are not text")
    tensors: dict[str, Entry] = {}
    spans: list[tuple[int, int, str]] = []
    for name, item in items.items():
        tensors[name], start, stop = _entry(path, name, item, begin)
        spans.append((start, stop, name))
    at = 0
    for start, stop, name in sorted(spans):
        if start != at:
            _broken(path, f"{name!r} begins at byte {start}, expected {at}")
        at = stop
    if begin + at != size:
        raise WeightsError(f"{path} is {size} bytes, expected {begin + at}: it is cut off or has extra bytes")
    return Header(path, tensors, cast("dict[str, str]", metadata))


def _broken(path: Path, why: str) -> NoReturn:
    raise WeightsError(f"{path} has a broken header: {why}")


def _header_bytes(path: Path) -> tuple[bytes, int]:
    """The bytes of a file's header, and the size of the file."""
    try:
        with path.open("rb") as f:
            size = os.fstat(f.fileno()).st_size
            first = f.read(32)
            for magic, what in OTHER_FORMATS:
                if first.startswith(magic):
                    raise WeightsError(f"{path} is {what}; mrflow reads safetensors")
            if size < 8:
                raise WeightsError(f"{path} is cut off: {size} bytes, expected at least 8")
            (length,) = struct.unpack("<Q", first[:8])
            beyond = length > MAX_HEADER or 8 + length > size
            if beyond and first[0] == 0x80 and 2 <= first[1] <= 5:
                raise WeightsError(f"{path} is a Python pickle; mrflow reads safetensors")
            for magic, what in NO_TENSORS if beyond else ():
                if first.startswith(magic):
                    raise WeightsError(f"{path} is {what}; mrflow reads safetensors")
            if length > MAX_HEADER:
                raise WeightsError(f"{path} is not safetensors: a header of {length} bytes, {MAX_HEADER} at most")
            if 8 + length > size:
                raise WeightsError(f"{path} is cut off in its header: {size} bytes, expected at least {8 + length}")
            f.seek(8)
            return f.read(length), size
    except FileNotFoundError:
        raise WeightsError(f"{path} does not exist") from None
    except OSError as error:
        raise ResourceError(f"{path} cannot be read: {error.strerror or error}") from error


def _header_table(raw: bytes, path: Path) -> dict[str, Any]:
    """What a header says by name: of each tensor its type, shape and place."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({name for name, _ in pairs}) != len(pairs):
            _broken(path, "a name appears twice")
        return dict(pairs)

    if (found := raw.count(b'"data_offsets"')) > MAX_TENSORS:
        _broken(path, f"it names {found} tensors, {MAX_TENSORS} at most")
    if len(raw) > (most := (16 << 20) + 1000 * found):
        _broken(path, f"it has {len(raw)} bytes for {found} tensors, {most} at most")
    try:
        table = json.loads(raw.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        _broken(path, str(error))
    if not isinstance(table, dict):
        _broken(path, "it is not a table of names")
    return cast("dict[str, Any]", table)


def _entry(path: Path, name: str, item: object, begin: int) -> tuple[Entry, int, int]:
    """One tensor of a file whose data begin at a byte, and where its own begin and end among them."""
    match item:
        case {"dtype": str(code), "shape": [*shape], "data_offsets": [start, stop], **rest} if not rest:
            pass
        case _:
            _broken(path, f"{name!r} needs dtype, shape and two data_offsets")
    if code not in DTYPES and code not in PACKED:
        _broken(path, f"{name!r} has the unknown dtype {code!r}")
    if len(shape) > MAX_AXES:
        _broken(path, f"{name!r} has {len(shape)} axes, {MAX_AXES} at most")
    if not all(type(n) is int and 0 <= n <= MAX_NUMBER for n in (*shape, start, stop)):
        _broken(path, f"{name!r} has a shape or offsets that are not whole numbers from 0")
    bits = math.prod(shape) * (PACKED[code] if code in PACKED else 8 * DTYPES[code].itemsize)
    need = bits // 8
    if bits % 8 or stop - start != need:
        _broken(path, f"{name!r} of shape {shape} needs {need} bytes but is given {stop - start}")
    packed = code if code in PACKED else ""
    return Entry(path, DTYPES.get(code, torch.uint8), tuple(shape), begin + start, packed=packed), start, stop


def checkpoints_in(folder: Path) -> list[Path]:
    """The safetensors files of a folder; none of them are hidden files (macOS's `._name` beside each name), folders,
    pipes and links that lead nowhere.
    """
    named = (p for p in folder.glob("*") if p.suffix.lower() == ".safetensors" and not p.name.startswith("."))
    return sorted(p for p in named if os.path.isfile(p))


SHARD = re.compile(r"-\d{2,}-of-\d{2,}\.safetensors$", re.IGNORECASE)
INDEX = re.compile(r"\.safetensors\.index(\.[\w-]+)?\.json$", re.IGNORECASE)
STEMS = ("diffusion_pytorch_model", "model")  # of the files that diffusers and transformers read in a folder


def chosen_checkpoint(folder: Path) -> Path:
    """The one checkpoint of a folder, a file or the index of its shards.

    Of one name the plain one comes before variants (`.fp16`), an index before a file; an index that is whole comes
    before files of other names. A neighbour that cannot be read is none. But where the plain one cannot be, or an index
    of shards, or the one that diffusers and transformers read, nothing is taken in its stead: whoever opens it says
    what is wrong with it.

    Raises:
        WeightsError: there is none, or there are several.
    """
    indices = sorted(p for p in folder.glob("*") if INDEX.search(p.name) and not p.name.startswith("."))
    shards = {str(shard) for index in indices for shard in _shard_names(index)}
    found = [*indices, *(p for p in checkpoints_in(folder) if p.name not in shards)]
    whole = {p for p in found if len(found) == 1 or _is_whole(p)}
    groups: dict[str, dict[str, Path]] = {}  # by name, then by variant
    for path in sorted(found, key=lambda p: p not in whole):  # else of one name and variant the index comes first
        base, variant = _base_and_variant(path)
        groups.setdefault(base, {}).setdefault(variant, path)
    for base, group in groups.items():
        groups[base] = {"": group[""]} if "" in group else {v: p for v, p in group.items() if p in whole} or group
    good = {base: group for base, group in groups.items() if whole & {*group.values()}}
    broken = {
        base: group
        for base, group in groups.items()
        if base not in good and (base in STEMS or any(p in indices and _shard_names(p) for p in group.values()))
    }
    if plain := {base: group for base, group in good.items() if group.get("") in indices}:
        groups = plain
    elif broken and not any(base in STEMS for base in good):
        groups = broken
    else:
        groups = good or groups
    if len(groups) != 1:
        names = sorted(path.name for group in groups.values() for path in group.values())
        raise WeightsError(f"{folder} should hold one safetensors checkpoint; it holds {_instead(folder, names)}")
    ((_, variants),) = groups.items()
    if len(variants) > 1:
        names = sorted(variants)
        raise WeightsError(f"{folder} holds the variants {', '.join(names)} and no plain checkpoint: name one file")
    return next(iter(variants.values()))


def _base_and_variant(path: Path) -> tuple[str, str]:
    """The name of a checkpoint without its endings, and its variant (`fp16`); empty where it is plain."""
    stem, _, rest = path.name.lower().partition(".safetensors")
    variant = rest.removeprefix(".index").removesuffix("json").strip(".")
    head, _, tail = stem.rpartition(".")
    return (head, tail) if not variant and head and tail.isidentifier() else (stem, variant)


def _shard_names(index: Path) -> list[str]:
    """What an index names; nothing where it cannot be read."""
    try:
        return [str(shard) for shard in _weight_map(index).values()]
    except (WeightsError, ResourceError):
        return []


def _is_whole(path: Path) -> bool:
    """Whether a checkpoint's headers can be read, those of all its shards."""
    try:
        _shards(path) if path.suffix.lower() == ".json" else read_header(path)
    except (WeightsError, ResourceError):
        return False
    return True


def _instead(folder: Path, names: Sequence[str]) -> str:
    """What a folder holds instead of one checkpoint: these files, pickles, or nothing."""
    if names and all(SHARD.search(name) for name in names):
        return f"shards ({some(names)}) without their index: put its .safetensors.index.json there"
    if names:
        return f"several, name one: {some(names)}"
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt"))
    if pickles:
        return f"pickles alone ({some(pickles)}), which are never read: take the safetensors files of that model"
    return "none"


def open_checkpoint(where: str | Path) -> Header:
    """The header of a file, of the shards that an index names, or of what a folder holds (an index wins over files).

    Of variants (`x.fp16.safetensors`) the plain one is taken if it is there. Words that wrappers leave inside names are
    taken out (`names.plain`).

    Raises:
        WeightsError: nothing is there, several are, shards are missing, or the index and its shards disagree.
    """
    where = check_path("the checkpoint", where)
    where = chosen_checkpoint(where) if where.is_dir() else where
    header = _shards(where) if where.suffix.lower() == ".json" else read_header(where)
    try:
        return replace(header, tensors=plain(header.tensors))
    except ValueError as error:
        raise WeightsError(f"{where}: {error}") from None


def readable(paths: Sequence[Path]) -> dict[Path, Header]:
    """The checkpoints among files that lie about: one that cannot be read is none, and stops nothing."""
    out: dict[Path, Header] = {}
    for path in paths:
        with suppress(WeightsError, ResourceError):
            out[path] = open_checkpoint(path)
    return out


def _weight_map(index: Path) -> dict[str, Any]:
    weight_map = read_config(index).get("weight_map")
    if not (isinstance(weight_map, dict) and weight_map):
        raise WeightsError(
            f"{index} has no weight_map, so it is no index of shards; name the model's folder or its file"
        )
    return cast("dict[str, Any]", weight_map)


def _shards(where: Path) -> Header:
    table = _weight_map(where)
    shards = sorted({str(shard) for shard in table.values()})
    outside = [s for s in shards if Path(s).is_absolute() or Path(s).name != s or s in ("", ".", "..")]
    if outside:
        raise WeightsError(f"{where} names files that are not beside it: {some(outside)}")
    missing = [s[:200] for s in shards if not os.path.isfile(where.parent / s)]  # also of names that no file can have
    if missing:
        raise WeightsError(f"{where}: {len(missing)} of {len(shards)} shards are missing: {some(missing)}")
    tensors: dict[str, Entry] = {}
    wrong: list[str] = []
    for shard in shards:
        for name, entry in read_header(where.parent / shard).tensors.items():
            if table.get(name) != shard:
                wrong.append(f"{name} in {shard}")
            tensors[name] = entry
    wrong += [f"{name} not in {shard}" for name, shard in table.items() if name not in tensors]
    if wrong:
        raise WeightsError(f"{where} and its shards disagree about {len(wrong)} tensors: {some(wrong)}")
    return Header(where, tensors)


def check_layout(module: nn.Module, header: Header, layout: Layout, *, dtype: torch.dtype | None = None) -> None:
    """Hold a checkpoint's names, shapes and dtypes against a module's, without reading weights.

    Raises:
        WeightsError: once, for all names that are missing, left over, or of a wrong shape or dtype.
    """
    problems: list[str] = []
    used: set[str] = set()
    for name, target in module.state_dict().items():
        source = layout[name]
        shape = list(target.shape)
        while source.squeeze and shape[-1] == 1:
            shape.pop()
        for part, rows in zip(source.names, source.rows, strict=True):
            used.add(part)
            entry = header.tensors.get(part)
            if entry is None:
                problems.append(f"{part} is missing")
            elif (entry.shape[:2] + entry.shape[3:] if source.frame else entry.shape) != (want := (rows, *shape[1:])):
                problems.append(f"{part} has shape {entry.shape}, expected {want}")
            elif not entry.dtype.is_floating_point or (dtype is None and entry.dtype.itemsize == 1):
                advice = "" if dtype or not entry.dtype.is_floating_point else ": say in which dtype to load it"
                problems.append(f"{part} is {entry.kind}{advice}")
    problems += [f"{name} is not expected" for name in header.tensors if name not in used]
    if problems:
        what = type(module).__name__
        raise WeightsError(f"{header.path} does not fit {what}: {len(problems)} problems: {some(problems)}")


def load_into(
    module: nn.Module,
    header: Header,
    layout: Layout,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> None:
    """`check_layout`, then `fill_module`.

    Raises:
        WeightsError: as `check_layout`, before any weight is read.
    """
    check_layout(module, header, layout, dtype=dtype)
    fill_module(module, header, layout, dtype=dtype, device=device)


def fill_module(
    module: nn.Module,
    header: Header,
    layout: Layout,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    skip: Container[str] = (),
) -> None:
    """Fill parameters and buffers of `module` (built on the meta device), but those in `skip`, from what was checked.

    What needs no change (on the CPU, of the dtype asked for, not joined from parts) stays mapped from the file and is
    read when it is used; the rest is copied tensor by tensor. `dtype=None` keeps the file's.
    """
    files: dict[Path, torch.UntypedStorage] = {}
    modules = dict(module.named_modules(remove_duplicate=False))
    for name, target in module.state_dict().items():
        if name in skip:
            continue
        owner, _, leaf = name.rpartition(".")
        parent = modules[owner]
        take = getattr(parent, "take", None)
        if take is not None and leaf == "weight":
            take([value_and_scale(header, part, files, device) for part in layout[name].names], device)
            continue
        tensor = assemble(header, layout[name], files, dtype=dtype, device=device).reshape(target.shape)
        old = getattr(parent, leaf)
        setattr(parent, leaf, nn.Parameter(tensor, old.requires_grad) if isinstance(old, nn.Parameter) else tensor)
    starts = {storage.data_ptr(): path for path, storage in files.items()}
    kept = {starts.get(t.untyped_storage().data_ptr()) for t in (*module.parameters(), *module.buffers())}
    module.__dict__["_mapped"] = {path: files[path].nbytes() for path in kept if path is not None}


def mapped_files(modules: Iterable[nn.Module]) -> dict[Path, int]:
    """The files that networks' weights are still read from, with their sizes when they were opened."""
    return {path: size for module in modules for path, size in module.__dict__.get("_mapped", {}).items()}


def check_uncut(files: Mapping[Path, int]) -> None:
    """Refuse to read from a mapped file that was cut: reading beyond its end would end the process (SIGBUS).

    A file that was replaced or removed is another one: what is mapped stays readable.

    Raises:
        WeightsError: it is shorter than when it was opened.
    """
    for path, size in files.items():
        try:
            now = path.stat().st_size
        except OSError:
            continue
        if now < size:
            raise WeightsError(
                f"{path} was cut while it was in use: it had {size} bytes when it was opened and has {now} now. "
                "Restore it and load the model again"
            )


def assemble(
    header: Header,
    source: Source,
    files: dict[Path, torch.UntypedStorage],
    *,
    dtype: torch.dtype | None,
    device: torch.device | str,
) -> Tensor:
    """One parameter from its parts; `files` keeps the mappings that were made."""
    pairs = [value_and_scale(header, name, files, device) for name in source.names]
    parts = [v if s is None else (v.to(device).float() * by_row(s.to(device), v)).to(dtype) for v, s in pairs]
    if source.frame:
        parts = [part[:, :, -1].contiguous() for part in parts]
    if source.swap:
        parts = list(reversed(parts[0].chunk(2)))
    if len(parts) == 1:
        return parts[0].to(device, dtype)
    out = torch.empty((sum(source.rows), *parts[0].shape[1:]), dtype=dtype or parts[0].dtype, device=device)
    for target, part in zip(torch.split(out, [len(part) for part in parts]), parts, strict=True):
        target.copy_(part)
    return out


def value_and_scale(
    header: Header, name: str, files: dict[Path, torch.UntypedStorage], device: torch.device | str
) -> tuple[Tensor, Tensor | None]:
    """A tensor as it lies in the file, of 8 bits on `device`, and what its values are to be multiplied with.

    Raises:
        WeightsError: some of its 8-bit values are NaN or infinite. Wider values are read when they are used.
    """
    entry = header.tensors[name]
    values = map_tensor(entry, files)
    if entry.dtype.itemsize == 1 and entry.dtype.is_floating_point:
        values = values.to(device)
        if not finite_8bit(values):
            raise WeightsError(f"{entry.file}: {name} holds values that are NaN or infinite; fetch the file again")
    return values, None if entry.scale is None else map_tensor(entry.scale, files)


# Of each sign, the first pattern of bits that stands for no finite number; the types without one sign have 0x80 alone.
NOT_FINITE = {torch.float8_e4m3fn: 0x7F, torch.float8_e5m2: 0x7C, torch.float8_e8m0fnu: 0xFF}


def finite_8bit(values: Tensor) -> bool:
    """Whether all of these 8-bit floating-point values are finite, by their bits: a fiftieth of what a cast takes."""
    if not values.numel():
        return True
    signed, unsigned = values.view(torch.int8), values.view(torch.uint8)
    first = NOT_FINITE.get(values.dtype, 0x80)
    if first == 0x80:
        return int(signed.amin()) > -0x80
    return int(unsigned.amax()) < first | 0x80 and int(signed.amax()) < first


def by_row(scale: Tensor, values: Tensor) -> Tensor:
    """A scale (one value, or one a row) in float32, shaped to multiply `values`."""
    return scale.float().reshape(-1, *(1,) * (values.ndim - 1))


def map_tensor(entry: Entry, files: dict[Path, torch.UntypedStorage]) -> Tensor:
    """A tensor that lies in the file; writing to it changes a private copy of the page, never the file."""
    if entry.file not in files:
        size = entry.file.stat().st_size
        from_file = cast("Callable[..., torch.UntypedStorage]", torch.UntypedStorage.from_file)  # pyright: ignore
        files[entry.file] = from_file(str(entry.file), shared=False, nbytes=size)
    check_uncut({entry.file: files[entry.file].nbytes()})
    nbytes = math.prod(entry.shape) * entry.dtype.itemsize
    if entry.start + nbytes > files[entry.file].nbytes():
        raise WeightsError(
            f"{entry.file} was cut after its header was read: {files[entry.file].nbytes()} bytes are left"
        )
    first, beyond = divmod(entry.start, entry.dtype.itemsize)
    if beyond:  # a tensor must begin at a multiple of its item size; a header of odd length shifts all of them
        raw = torch.empty(0, dtype=torch.uint8).set_(files[entry.file], entry.start, (nbytes,), (1,))
        return raw.clone().view(entry.dtype).view(entry.shape)
    strides = [math.prod(entry.shape[axis + 1 :]) for axis in range(len(entry.shape))]
    return torch.empty(0, dtype=entry.dtype).set_(files[entry.file], first, entry.shape, strides)


def save_file(tensors: Mapping[str, Tensor], path: Path, *, metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file that appears under its name only when it is complete."""
    whole = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    try:
        with drafting(path) as temporary:
            write_safetensors(whole, temporary, dict(metadata) if metadata else None)
    except (OSError, SafetensorError) as error:
        why = error.strerror if isinstance(error, OSError) else None
        raise ResourceError(f"{path} cannot be written: {why or error}") from error


def to_layout(state: Mapping[str, Tensor], layout: Layout) -> dict[str, Tensor]:
    """Parameters under the names and in the shapes of `layout`: the reverse of loading."""
    out: dict[str, Tensor] = {}
    for name, source in layout.items():
        tensor = state[name]
        if source.swap:
            tensor = torch.cat(tuple(reversed(tensor.chunk(2))))
        if source.squeeze:
            tensor = tensor.flatten(1)
        out.update(zip(source.names, torch.split(tensor, list(source.rows)), strict=True))
    return out


def some(names: Sequence[str], *, count: int = 4) -> str:
    """The first few of many."""
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")


def compute_dtype(header: Header) -> torch.dtype:
    """What a checkpoint's network computes in: the dtype of most of its values; bfloat16 where they are 8-bit."""
    counts: dict[torch.dtype, int] = {}
    for entry in header.tensors.values():
        if entry.dtype.is_floating_point:
            counts[entry.dtype] = counts.get(entry.dtype, 0) + math.prod(entry.shape)
    most = max(counts, key=lambda d: counts[d], default=torch.bfloat16)
    return torch.bfloat16 if most.itemsize == 1 else most


N = TypeVar("N", bound=nn.Module)


@dataclass(frozen=True)
class CheckedNetwork(Generic[N]):
    """A network on the meta device whose checkpoint was checked: `read` fills it, `cast=None` as the file has it."""

    net: N
    header: Header
    layout: Layout
    dtype: torch.dtype
    device: torch.device | str
    cast: torch.dtype | None

    def read(self) -> N:
        """All weights."""
        fill_module(self.net, self.header, self.layout, dtype=self.cast, device=self.device)
        return self.net

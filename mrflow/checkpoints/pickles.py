"""What a pickle asks for, read before anything is made of it: an allow-list of opcodes and names, bounded in every way.

torch's restricted reader makes tensors and plain containers and runs nothing else. It does not bound what it makes: a
few bytes can ask for gigabytes, or for nesting that ends the process. What `torch.save` writes of named tensors needs
few opcodes and few names, little of each.
"""

import pickletools
import zipfile
from pathlib import Path
from typing import Any

from mrflow.errors import WeightsError

MAX_OPS, MAX_DEPTH, MAX_PICKLE = 1_000_000, 100, 64 << 20
OPCODES = frozenset({
    "PROTO", "STOP", "MARK", "POP", "EMPTY_DICT", "EMPTY_LIST", "EMPTY_TUPLE", "EMPTY_SET", "TUPLE", "TUPLE1", "TUPLE2",
    "TUPLE3", "DICT", "LIST", "APPEND", "APPENDS", "SETITEM", "SETITEMS", "BINUNICODE", "SHORT_BINUNICODE", "UNICODE",
    "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BININT", "BININT1", "BININT2", "INT", "LONG1",
    "BINFLOAT", "NONE", "NEWTRUE", "NEWFALSE", "BINPUT", "LONG_BINPUT", "PUT", "BINGET", "LONG_BINGET", "GET",
    "MEMOIZE", "FRAME", "GLOBAL", "REDUCE", "NEWOBJ", "BUILD", "BINPERSID",
})  # fmt: skip
GLOBALS = frozenset({
    "collections OrderedDict", "collections Counter", "collections defaultdict", "torch._utils _rebuild_tensor",
    "torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter", "torch Size", "torch device",
    "torch.serialization _get_layout", "__builtin__ set", "builtins set", "__builtin__ list", "builtins list",
    "__builtin__ dict", "builtins dict", "__builtin__ int", "builtins int", "__builtin__ float", "builtins float",
    "torch.storage UntypedStorage",
})  # fmt: skip


def check_pickles(path: Path) -> None:
    """Refuse a torch file, archive or older, whose pickles ask for more than named tensors and plain values.

    Raises:
        WeightsError: an opcode or a name that such a file does not need, or more of them than it could.
    """
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            for item in archive.infolist():
                if item.filename.endswith(".pkl"):
                    if item.file_size > MAX_PICKLE:
                        raise WeightsError(f"{path} has a pickle of {item.file_size} bytes, {MAX_PICKLE} at most")
                    with archive.open(item) as f:
                        _check(f, path)
        return
    with path.open("rb") as f:  # a magic number, a version, facts of the machine, the tensors, the storages' names
        for _ in range(5):
            if not f.peek(1):
                return
            if _check(f, path) > MAX_PICKLE:
                raise WeightsError(f"{path} has a pickle of more than {MAX_PICKLE} bytes")


def _check(f: Any, path: Path) -> int:  # noqa: ANN401
    """Walk over one pickle; gives its length. Depths of what is on its stack and in its memo are counted."""
    stack: list[int] = []
    memo: dict[int, int] = {}
    place = 0
    try:
        for count, (op, arg, position) in enumerate(pickletools.genops(f)):
            place = position or 0
            if count > MAX_OPS:
                raise WeightsError(
                    f"{path} has a pickle of more than {MAX_OPS} steps: refused, torch writes no such files"
                )
            asked = str(arg).replace(" ", ".", 1)[:80] if op.name == "GLOBAL" else f"the opcode {op.name}"
            if op.name not in OPCODES or (op.name == "GLOBAL" and not _allowed(str(arg))):
                raise WeightsError(
                    f"{path} holds more than tensors ({asked}), and could run code when it is loaded: refused. Save "
                    "its state_dict alone, as safetensors"
                )
            if op.name in ("BINPUT", "LONG_BINPUT", "PUT", "MEMOIZE"):
                memo[len(memo) if arg is None else int(arg)] = stack[-1]
                continue
            if op.name in ("BINGET", "LONG_BINGET", "GET"):
                stack.append(memo[int(arg or 0)])
                continue
            taken = list(op.stack_before)
            depth = 0
            if pickletools.stackslice in taken:
                while (top := stack.pop()) != -1:
                    depth = max(depth, top + 1)
                taken = taken[: taken.index(pickletools.markobject)]
            for _ in taken:
                depth = max(depth, stack.pop() + 1)
            if depth > MAX_DEPTH:
                raise WeightsError(f"{path} nests its values more than {MAX_DEPTH} deep: refused")
            stack += [-1 if op.name == "MARK" else depth for _ in op.stack_after]
    except WeightsError:
        raise
    except Exception as error:
        raise WeightsError(f"{path} is not a checkpoint that torch can read, or it is cut off ({error})") from None
    return place


def _allowed(name: str) -> bool:
    module, _, leaf = name.partition(" ")
    return name in GLOBALS or (module == "torch" and (leaf.endswith("Storage") or leaf in DTYPES))


DTYPES = frozenset({"float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool"})

"""What a pickle asks for, read before anything is made of it: an allow-list of opcodes and names, bounded in every way.

torch's restricted reader makes tensors and plain containers and runs nothing else. It does not bound what it makes: a
few bytes can ask for gigabytes, for nesting that ends the process, or for years of hashing. What `torch.save` writes of
named tensors needs few opcodes and few names, little of each. With these bounds what a pickle makes, beside the tensors
whose sizes are held against the file's, stays below 2 GB, and no process of its own with a limit is needed.
"""

import pickletools
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mrflow.errors import WeightsError

MAX_OPS, MAX_DEPTH, MAX_PICKLE, MAX_WORK = 500_000, 100, 64 << 20, 5_000_000
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


@dataclass(slots=True)
class _Value:
    """What stands on a pickle's stack: how deep it nests, how many values it is with all that it holds, its name."""

    depth: int = 0
    weight: int = 1
    name: str = ""


def _check(f: Any, path: Path) -> int:  # noqa: ANN401
    """Walk over one pickle; gives its length.

    What is on its stack and in its memo is followed by depth and weight. A value that stands in several places weighs
    in each: copying or hashing it takes so much work, however few bytes ask for it.
    """
    stack: list[_Value | None] = []  # None is a mark
    memo: dict[int, _Value] = {}
    place = work = 0
    try:
        for count, (op, arg, position) in enumerate(pickletools.genops(f)):
            place = position or 0
            if count > MAX_OPS:
                raise WeightsError(
                    f"{path} has a pickle of more than {MAX_OPS} steps: refused, torch writes no such files"
                )
            asked = str(arg).replace(" ", ".", 1)[:80] if op.name == "GLOBAL" else f"the opcode {op.name}"
            if op.name not in OPCODES or (op.name == "GLOBAL" and str(arg) not in GLOBALS and not _is_type(str(arg))):
                raise WeightsError(
                    f"{path} holds more than tensors ({asked}), and could run code when it is loaded: refused. Save "
                    "its state_dict alone, as safetensors"
                )
            if op.name in ("BINPUT", "LONG_BINPUT", "PUT", "MEMOIZE"):
                memo[len(memo) if arg is None else int(arg)] = _top(stack)
                continue
            if op.name in ("BINGET", "LONG_BINGET", "GET"):
                stack.append(memo[int(arg or 0)])
                continue
            taken = list(op.stack_before)
            inside: list[_Value] = []
            if pickletools.stackslice in taken:
                while (top := stack.pop()) is not None:
                    inside.append(top)
                taken = taken[: taken.index(pickletools.markobject)]
            inside += [_top(stack, pop=True) for _ in taken]
            if op.name == "MARK":
                stack.append(None)
                continue
            made = _Value(name=str(arg) if op.name == "GLOBAL" else "")
            if op.name in ("APPEND", "APPENDS", "SETITEM", "SETITEMS", "BUILD"):
                made = inside.pop()  # changed in place, also where the memo holds it
            elif op.name in ("REDUCE", "NEWOBJ") and _is_type(inside[-1].name):
                raise WeightsError(
                    f"{path} calls {inside[-1].name.replace(' ', '.')}, which torch never writes: refused"
                )
            held = sum(value.weight for value in inside)
            made.depth = max([made.depth, *(value.depth + 1 for value in inside)])
            made.weight += held
            if made.depth > MAX_DEPTH:
                raise WeightsError(f"{path} nests its values more than {MAX_DEPTH} deep: refused")
            work += held if op.name in ("SETITEM", "SETITEMS", "DICT", "REDUCE", "NEWOBJ", "BUILD") else 0
            if work > MAX_WORK:
                raise WeightsError(f"{path} copies its values more than {MAX_WORK} times: refused")
            stack += [made] if op.stack_after else []
    except WeightsError:
        raise
    except Exception as error:
        raise WeightsError(f"{path} is not a checkpoint that torch can read, or it is cut off ({error})") from None
    return place


def _top(stack: "list[_Value | None]", *, pop: bool = False) -> _Value:
    """The value on top of a stack; ValueError where there is none."""
    value = stack.pop() if pop else stack[-1]
    if value is None:
        raise ValueError("a value is missing before a mark")
    return value


def _is_type(name: str) -> bool:
    """Whether it is a type of storages or of numbers: files of torch name them and never call them."""
    module, _, leaf = name.partition(" ")
    return name == "torch.storage UntypedStorage" or (
        module == "torch" and (leaf.endswith("Storage") or leaf in DTYPES)
    )


DTYPES = frozenset({"float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool"})

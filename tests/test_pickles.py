"""Hostile super-resolution checkpoints: none runs, hangs or takes the machine's memory; each ends in an error."""

import io
import os
import pickle
import re
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from mrflow.checkpoints.pickles import check_pickles
from mrflow.errors import WeightsError
from mrflow.upscalers import load_upscaler
from mrflow.upscalers.nets import RRDBParams
from mrflow.upscalers.spandrel import spandrel
from mrflow.upscalers.weights import read_state
from tests.sr_files import as_first_generation, compact, rrdb
from tests.test_cli import call

HEAD = (0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001, "little_endian": True, "type_sizes": {}})


class Call:
    """What a pickle makes by calling something."""

    def __init__(self, function: Callable[..., Any], *arguments: object) -> None:
        self.made = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[object, ...]]:
        return self.made


def older(body: bytes) -> bytes:
    """A file as torch wrote it before archives, with this pickle in the tensors' place."""
    return b"".join(pickle.dumps(each, 2) for each in HEAD) + body + pickle.dumps([], 2)


def archive(body: bytes) -> bytes:
    """A file as torch writes it, with this pickle in it and no storages."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as z:
        z.writestr("archive/data.pkl", body)
        z.writestr("archive/version", "3\n")
        z.writestr("archive/byteorder", "little")
    return out.getvalue()


def words(count: int) -> bytes:
    """Names of so many values, as a tuple that the memo holds as 0."""
    return b"(" + b"".join(b"J" + struct.pack("<i", i) for i in range(count)) + b"tq\x00"


def nested(depth: int) -> list[Any]:
    out: list[Any] = []
    for _ in range(depth):
        out = [out]
    return out


SELF = b"\x80\x02}q\x00X\x05\x00\x00\x00modelh\x00s."
BODIES: dict[str, tuple[bytes, str]] = {
    "runs a command": (pickle.dumps({"a": Call(os.system, "exit 1")}, 2), r"posix.system\), and could run code"),
    "a newer pickle": (pickle.dumps({"a": Call(os.system, "exit 1")}, 4), "opcode STACK_GLOBAL"),
    "20 GB of bytes": (pickle.dumps({"a": Call(bytearray, 20_000_000_000)}, 2), "bytearray"),
    "a tensor of 4 GB": (pickle.dumps({"a": Call(torch.Tensor, 1_000_000_000)}, 2), r"torch\.Tensor"),
    "deep lists": (pickle.dumps(nested(300), 2), "nests its values more than 100 deep"),
    "deep tuples": (b"\x80\x02)" + b"\x85" * 200_000 + b".", "nests its values more than 100 deep"),
    "a deep key": (b"\x80\x02})" + b"\x85" * 200_000 + b"K\x01s.", "nests its values more than 100 deep"),
    "many of one": (b"\x80\x02]q\x00(" + b"h\x00" * 600_000 + b"e.", "more than 500000 steps"),
    "itself": (SELF, "holds tables in tables, 8 and more"),
    "a long number": (b"\x80\x02\x8b" + struct.pack("<i", 1_000_000) + b"\x7f" * 1_000_000 + b".", "opcode LONG4"),
    "sets of many": (
        b"\x80\x02](" + words(90_000) + b"cbuiltins\nset\nh\x00\x85R" * 500 + b"e.",
        "copies its values more than 5000000 times",
    ),
    "dicts of many": (
        b"\x80\x02](" + words(90_000) + b"ccollections\nCounter\nh\x00\x85R" * 500 + b"e.",
        "copies its values more than 5000000 times",
    ),
    "a key that is hashed for ever": (
        b"\x80\x02](K\x05q\x00" + b"".join(b"h%ch%c\x86q%c" % (i, i, i + 1) for i in range(60)) + b"e}h\x3cK\x01s.",
        "copies its values more than 5000000 times",
    ),
    "a heavy key, many times": (
        b"\x80\x02}(" + words(90_000) + b"K\x01" + b"h\x00K\x01" * 1000 + b"u.",
        "copies its values more than 5000000 times",
    ),
    "a storage of 64 GB": (
        b"\x80\x02}X\x01\x00\x00\x00actorch.storage\nUntypedStorage\n\x8a\x05\x00\x00\x00\x00\x10\x85Rs.",
        r"calls torch.storage.UntypedStorage, which torch never writes",
    ),
    "a value before a mark": (b"\x80\x02(a.", "not a checkpoint that torch can read, or it is cut off"),
    "an empty stack": (b"\x80\x02a.", "not a checkpoint that torch can read, or it is cut off"),
    "a memo that is not there": (b"\x80\x02h\x09.", "not a checkpoint that torch can read, or it is cut off"),
    "cut off": (b"\x80\x02}q\x00X\x05\x00\x00", "not a checkpoint that torch can read, or it is cut off"),
}


@pytest.mark.parametrize("what", BODIES)
@pytest.mark.parametrize("form", [older, archive])
def test_a_pickle_that_asks_for_more_is_refused(form: Callable[[bytes], bytes], what: str, tmp_path: Path) -> None:
    body, words = BODIES[what]
    (tmp_path / "x.pth").write_bytes(form(body))
    with pytest.raises(WeightsError, match=words):
        load_upscaler(tmp_path / "x.pth")


def test_a_long_pickle_is_refused_unread(tmp_path: Path) -> None:
    (tmp_path / "x.pth").write_bytes(archive(b"\x80\x02" + b"N" * (64 << 20) + b"."))
    with pytest.raises(WeightsError, match="a pickle of 67108867 bytes, 67108864 at most"):
        check_pickles(tmp_path / "x.pth")


GOOD = rrdb()
STATES: dict[str, tuple[dict[Any, Any], str]] = {
    "sparse": ({k: v.to_sparse() for k, v in GOOD.items()}, "holds more than tensors"),
    "on no device": ({k: v.to("meta") for k, v in GOOD.items()}, "holds more than tensors"),
    "one value for many": (
        GOOD | {"conv_first.weight": torch.zeros(1).expand(3_000_000, 3, 3, 3)},
        r"conv_first.weight of shape \(3000000, 3, 3, 3\) repeats values",
    ),
    "160 GB": ({k: torch.zeros(1).expand(200_000, 200_000) for k in GOOD}, "repeats values that the file has once"),
    "a block 300000000": (
        {k.replace("body.1.", "body.300000000."): v for k, v in GOOD.items()},
        "numbers its parts beyond 1216, but holds 72 tensors only",
    ),
    "a layer 400000000": (
        {k.replace("body.8.", "body.400000000."): v for k, v in compact().items()},
        "numbers its parts beyond",
    ),
    "a number without end": (
        {k.replace("body.1.", f"body.{'9' * 30}."): v for k, v in GOOD.items()},
        "numbers its parts",
    ),
    "a gap": ({k.replace("body.1.", "body.7."): v for k, v in GOOD.items()}, r"body.1.rdb1.conv1.weight is missing"),
    "NaN": (GOOD | {"conv_hr.weight": GOOD["conv_hr.weight"] * float("nan")}, "conv_hr.weight holds NaN or infinity"),
    "NaN in the other network": ({k: v * float("nan") for k, v in compact().items()}, "holds NaN or infinity"),
    "complex numbers": ({k: v.to(torch.complex64) for k, v in compact().items()}, "is complex64, no real numbers"),
    "quantised": ({k: (9 * v).to(torch.int8) for k, v in compact().items()}, "is int8, no real numbers"),
    "names that are numbers": (GOOD | {5: torch.zeros(1)}, "5 is not expected"),
    "names that are neither": ({(1, 2): torch.zeros(1)}, "names tensors by tuple"),
    "nothing": ({}, "holds no network"),
}


@pytest.mark.parametrize("what", STATES)
def test_a_state_that_is_no_network_is_refused(what: str, tmp_path: Path) -> None:
    state, words = STATES[what]
    torch.save(state, tmp_path / "x.pth")
    with pytest.raises(WeightsError, match=words):
        load_upscaler(tmp_path / "x.pth")


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a Git LFS pointer, not the file itself"),
        (b"\n<!DOCTYPE html><html>404</html>", "a web page, not the file itself"),
        (save({"a": torch.zeros(3)}), r"a safetensors file; let its name end in \.safetensors"),
    ],
)
def test_what_is_something_else_is_named(data: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / "x.pth").write_bytes(data)
    with pytest.raises(WeightsError, match=f"x.pth is {words}"):
        load_upscaler(tmp_path / "x.pth")


def test_what_training_programs_write_is_read(tmp_path: Path) -> None:
    net = torch.nn.Linear(3, 2)
    optimiser = torch.optim.Adam(net.parameters())
    net(torch.ones(1, 3)).sum().backward()
    optimiser.step()
    whole = {"params_ema": GOOD, "optimizer": optimiser.state_dict(), "epoch": 3, "lr": 0.1, "name": "x", "done": None}
    for new in (True, False):
        torch.save(whole, tmp_path / "x.pth", _use_new_zipfile_serialization=new)
        assert set(read_state(tmp_path / "x.pth")) == set(GOOD)
    parameters = {k: torch.nn.Parameter(v) for k, v in GOOD.items()}
    torch.save({"model": {"state_dict": parameters}}, tmp_path / "x.pth")
    assert set(read_state(tmp_path / "x.pth")) == set(GOOD)


# The most memory for the work that is allowed: sets of 77, for which Python keeps 512 places.
MOST = b"\x80\x02](" + words(77) + b"cbuiltins\nset\nh\x00\x85R" * 60_000 + b"e."


@pytest.mark.parametrize(
    ("body", "ends"),
    [(BODIES["20 GB of bytes"][0], "WeightsError"), (MOST, "WeightsError")],
    ids=["20 GB", "work"],
)
def test_a_hostile_file_takes_no_memory_and_no_time(body: bytes, ends: str, tmp_path: Path) -> None:
    (tmp_path / "x.pth").write_bytes(older(body))
    code = (
        "import re, resource, sys; from mrflow.upscalers.weights import read_state; from pathlib import Path\n"
        "try: read_state(Path(sys.argv[1]))\n"
        "except Exception as error: print(type(error).__name__)\n"
        "status = Path('/proc/self/status')  # on Linux what `resource` says is no less than the parent's\n"
        "said = re.search(r'VmHWM:\\s+(\\d+)', status.read_text()) if status.exists() else None\n"
        "print(int(said[1]) >> 10 if said else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 20)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "x.pth")], capture_output=True, text=True, check=True
    )
    name, megabytes = done.stdout.split()
    assert name == ends
    assert int(megabytes) < 2000


def test_inspect_says_what_sr_takes(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    torch.save({"params_ema": GOOD}, tmp_path / "x.pth")
    save_file(compact(), tmp_path / "y.safetensors")
    save_file(GOOD, tmp_path / "z.safetensors")
    save_file({f"module._orig_mod.{k}": v for k, v in compact().items()}, tmp_path / "w.safetensors")
    (tmp_path / "bad.pth").write_bytes(older(BODIES["runs a command"][0]))
    for file, words in (
        ("x.pth", r"72 tensors.*super-resolution, RRDBNet, scale 4 \(--sr x.pth\)"),
        ("y.safetensors", "super-resolution, SRVGGNetCompact, scale 2"),
        ("z.safetensors", "super-resolution, RRDBNet, scale 4"),
        ("w.safetensors", "super-resolution, SRVGGNetCompact, scale 2"),
    ):
        code, out, err = call("inspect", str(tmp_path / file))
        assert code == 0, err
        assert re.search(words, " ".join(out.split()))
    code, _, err = call("inspect", str(tmp_path / "bad.pth"))
    assert code == 3
    assert "could run code" in " ".join(err.split())


def test_spandrel_is_asked_before_a_relative_is_refused(tmp_path: Path) -> None:
    if find_spec("spandrel") is None:
        pytest.skip("spandrel is not installed")
    spandrel()
    from spandrel.architectures.ESRGAN import ESRGANArch  # type: ignore  # pyright: ignore

    state = as_first_generation(rrdb(RRDBParams(8, 2, 32)))
    for block in (0, 1):
        for part in (1, 2, 3):
            state[f"model.1.sub.{block}.RDB{part}.conv1x1.weight"] = torch.randn(32, 8, 1, 1) / 8
    torch.save(state, tmp_path / "plus.pth")
    net = ESRGANArch().load(dict(state)).model
    x = torch.rand(1, 3, 16, 16)
    with torch.inference_mode():
        torch.testing.assert_close(load_upscaler(tmp_path / "plus.pth")(x), net(x), rtol=1e-4, atol=1e-4)

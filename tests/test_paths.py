"""Paths that no file system holds, and outputs that are no files, at every place that takes a path."""

import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import mrflow as mf
from mrflow._checks import check_path
from mrflow.errors import MrflowError, PlanError, ResourceError
from mrflow.models import info
from mrflow.records.files import check_writable, write_bytes
from mrflow.records.publish import publish
from mrflow.sweep.report import page
from mrflow.sweep.summary import load_rows
from mrflow.sweep.tables import table

CONDITION = mf.Condition({"context": torch.zeros(1, 2)})
TAKERS: dict[str, Callable[..., object]] = {
    "cache": mf.StageCache,
    "load": mf.load,
    "load vae": lambda path: mf.load("nowhere", vae=path),
    "load lora": lambda path: mf.load("pocket", lora=str(path) if isinstance(path, str) else path),
    "info": info,
    "load condition": mf.Condition.load,
    "save condition": CONDITION.save,
    "image": mf.read_image,
    "record": mf.read_record,
    "replay": mf.replay,
    "replay files": lambda path: mf.replay("nowhere.png", files=[path]),
    "lora": lambda path: mf.Lora(path).to_record(),
    "upscaler": mf.load_upscaler,
    "checkpoint": mf.Checkpoint,
    "latent checkpoint": mf.LatentCheckpoint,
    "decoder": mf.TinyDecoder,
    "page": page,
    "rows": load_rows,
    "table": table,
    "output": check_writable,
}


@pytest.mark.parametrize("bad", ["a\0b", "\ud800.png", "x" * 5000, "/".join(["y" * 100] * 60), ""])
@pytest.mark.parametrize("taker", TAKERS)
def test_what_no_file_system_holds_is_refused_where_it_is_given(taker: str, bad: str) -> None:
    with pytest.raises(MrflowError):
        TAKERS[taker](bad)


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ("a\0b", r"^the file holds characters that no name of a file can: 'a\\x00b'$"),
        ("\ud800", r"holds characters that no name of a file can: '\\ud800'$"),
        ("x" * 300, r"is longer than the file system takes \(300 bytes\): 'x{60}'\.\.\.$"),
        ("", "^the file must be a path, as text or pathlib.Path, got ''$"),
        (7, "got 7$"),
        (b"x", "got b'x'$"),
        (None, "got None$"),
    ],
)
def test_the_words_say_what_is_wrong(bad: object, said: str) -> None:
    with pytest.raises(PlanError, match=said):
        check_path("the file", bad)


def test_paths_that_could_be_pass(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    for path in (tmp_path, "nowhere/at all", "ü.png", str(tmp_path / "loop"), "x" * 255):
        assert check_path("the file", path) == Path(path)


WRITERS: dict[str, Callable[[Path], object]] = {
    "write": lambda path: write_bytes(path, b"x"),
    "publish": lambda path: publish({path: b"x"}, force=True),
    "condition": CONDITION.save,
    "check": check_writable,
}


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
@pytest.mark.parametrize("linked", [False, True])
@pytest.mark.parametrize("writer", WRITERS)
def test_a_device_or_pipe_is_never_replaced_by_a_file(writer: str, linked: bool, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    named = tmp_path / "link" if linked else pipe
    if linked:
        named.symlink_to(pipe)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ResourceError, match="is a device, a pipe or a socket, which a file would replace"):
        WRITERS[writer](named)
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    assert named.is_symlink() == linked
    assert sorted(tmp_path.iterdir()) == before

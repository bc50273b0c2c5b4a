"""The stage cache's folder: broken, hostile, full and unwritable."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import mrflow as mf
from mrflow.display.notes import collect_notes
from mrflow.records import stage_cache as module

TOY = mf.toy()
CHAIN = mf.recipes.paper(low=(32, 32), size=(64, 64), steps=2)


def entries(folder: Path) -> list[Path]:
    """The cache's files, oldest first: a stage each."""
    return sorted(folder.glob("??/*.safetensors"), key=lambda p: p.stat().st_mtime_ns)


def test_a_broken_entry_is_made_again_whatever_is_broken(tmp_path: Path) -> None:
    want = mf.run(CHAIN, TOY, "a", cache=mf.StageCache(tmp_path)).data
    rng = random.Random(0)
    whole = {path: path.read_bytes() for path in entries(tmp_path)}
    assert len(whole) == len(CHAIN)
    for _ in range(40):
        path = rng.choice(list(whole))
        data = bytearray(whole[path])
        at = rng.randrange(len(data))
        kind = rng.randrange(5)
        if kind == 0:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            data[rng.randrange(100)] = rng.randrange(256)
        elif kind == 2:
            del data[at:]
        elif kind == 3:
            data += b"xx"
        else:
            data = bytearray(rng.choice(list(whole.values())))  # another stage's entry
        path.write_bytes(data)
        assert torch.equal(mf.run(CHAIN, TOY, "a", cache=mf.StageCache(tmp_path)).data, want)
        path.write_bytes(whole[path])


@pytest.mark.parametrize("change", ["nan", "double", "beyond", "whole"])
def test_an_entry_is_held_to_its_stages_promise(tmp_path: Path, change: str) -> None:
    want = mf.run(CHAIN, TOY, "a", cache=mf.StageCache(tmp_path)).data
    changes: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "nan": lambda t: torch.full_like(t, float("nan")),
        "double": lambda t: t.double(),
        "beyond": lambda t: t * 1000 + 2,
        "whole": lambda t: t.to(torch.int32),
    }
    for path in entries(tmp_path)[-1:] if change == "beyond" else entries(tmp_path):
        bad = changes[change](load_file(path)["data"])
        seal = torch.tensor(list(module._seal(path.stem, bad)), dtype=torch.uint8)
        save_file({"data": bad, "sha256": seal}, path)
    again = mf.run(CHAIN, TOY, "a", cache=mf.StageCache(tmp_path))
    assert torch.equal(again.data, want) and not again.stages[-1].cached


def test_the_bound_holds_on_disk_and_in_memory_and_only_entries_are_removed(tmp_path: Path) -> None:
    (tmp_path / "00").mkdir()
    own = [tmp_path / "mine.safetensors", tmp_path / "00" / "mine.safetensors", tmp_path / "00" / f"{'g' * 64}.txt"]
    for path in own:
        path.write_bytes(b"a user's" * 10_000)
    most = 4 * 64 * 64 * 3 * 4
    cache = mf.StageCache(tmp_path, max_bytes=most)
    for seed in range(12):
        mf.run(CHAIN, TOY, "a", seed=seed, cache=cache)
        held = sum(p.stat().st_size for p in entries(tmp_path) if p not in own)
        assert held <= most and cache._bytes <= most
    assert all(path.exists() for path in own)
    newest = mf.run(CHAIN, TOY, "a", seed=11, cache=mf.StageCache(tmp_path, max_bytes=most))
    assert newest.stages[-1].cached
    small = mf.StageCache(tmp_path / "small", max_bytes=100)
    mf.run(CHAIN, TOY, "a", cache=small)
    assert small._bytes <= 100 and not entries(tmp_path / "small")


@pytest.mark.parametrize("most", [0, -5, 1.5, "x", True])
def test_the_bound_is_checked(most: object) -> None:
    with pytest.raises(mf.PlanError, match="max_bytes must be a whole number above 0"):
        mf.StageCache(max_bytes=most)  # type: ignore[arg-type]


def test_a_folder_that_takes_no_files_is_left_out_with_one_note(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    want = mf.run(CHAIN, TOY, "a").data
    for folder in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/none")):
        with collect_notes() as notes:
            made = mf.run(CHAIN, TOY, "a", cache=mf.StageCache(folder))
        assert torch.equal(made.data, want)
        assert len(notes) == 1 and f"the stage cache in {folder} takes no files and is left out" in notes[0]

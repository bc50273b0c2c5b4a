"""Random SIGKILL: two processes fill one folder and die at random moments, until so many kills have hit.

    python -m experiments.reliability.kills --kills 300

Folders are filled one after another; each gets a last undisturbed run, and its rows and pixels are held against those
of a folder that nobody disturbed. The toy model stands for any: what is tried is the folder. Exits 1 on any row that
failed, was lost, written twice or torn.
"""

import argparse
import hashlib
import json
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import mrflow as mf
from mrflow.sweep import Row, Sharpness, Store, read, run_sweep
from mrflow.sweep.rows import read_row

SIZE, LOW = (32, 32), (16, 16)


def sweep() -> mf.Sweep:
    """60 rows."""
    chains = {
        "native": mf.recipes.native(size=SIZE, steps=2),
        "a": mf.recipes.paper(size=SIZE, low=LOW, steps=2, sigma=0.1),
        "b": mf.recipes.paper(size=SIZE, low=LOW, steps=2, sigma=0.2),
    }
    return mf.Sweep(chains, [f"prompt {i}" for i in range(5)], seeds=range(4), metrics=[Sharpness()], model="toy")


def worker(folder: Path, batch: int, pause: float, log: Path) -> int:
    """A process that fills the folder and writes down every row that it commits; its pid."""
    pid = os.fork()
    if pid:
        return pid
    code = 9
    try:
        commit, picture = Store.commit, Store.write_picture

        def committed(self: Store, row: Row) -> None:
            commit(self, row)
            handle = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
            os.write(handle, f"{row.status} {row.key}\n".encode())
            os.close(handle)

        def slowly(self: Store, path: Path, data: bytes) -> str:
            time.sleep(pause)
            return picture(self, path, data)

        Store.commit, Store.write_picture = committed, slowly  # type: ignore[method-assign]
        run_sweep(sweep(), mf.toy(), folder, batch=batch)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def torn(folder: Path) -> list[str]:
    """Files that are there under their name and not whole."""
    bad: list[str] = []
    for path in folder.glob("rows/??/*.json"):
        row = read_row(path)
        if row is None:
            bad.append(path.name)
        elif row.picture is not None and hashlib.sha256((folder / row.picture).read_bytes()).hexdigest() != (
            row.picture_sha256
        ):
            bad.append(row.picture)
    for path in folder.glob("pictures/??/*.png"):
        try:
            with Image.open(path) as image:
                image.load()
        except OSError:
            bad.append(path.name)
    return bad


def count(folder: Path) -> int:
    """How many rows there are."""
    return len(list(folder.glob("rows/??/*.json")))


def pixels(folder: Path) -> "dict[str, np.ndarray | str]":
    """By row: its pixels, or its error."""
    out: dict[str, np.ndarray | str] = {}
    for row in read(folder):
        out[row.key] = f"failed: {row.error}"
        if row.picture is not None:
            with Image.open(folder / row.picture) as image:
                out[row.key] = np.asarray(image.convert("RGB"), dtype=np.int16)
    return out


def same(a: "np.ndarray | str", b: "np.ndarray | str") -> bool:
    """Whether two pictures are one but for rounding: sums of float32 depend on the size of the batch, in their last
    bits, so a value between two of the 256 levels may come out as either.
    """
    if isinstance(a, str) or isinstance(b, str) or a.shape != b.shape:
        return False
    return bool(np.abs(a - b).max() <= 1 and (a != b).mean() < 0.01)


def main() -> None:
    """Kill, finish, compare, print one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=300)
    parser.add_argument("--longest", type=float, default=1.5, help="seconds that a process lives at most")
    parser.add_argument("--pause", type=float, default=0.02, help="seconds that every picture takes besides")
    parser.add_argument("--seed", type=int, default=0)
    said = parser.parse_args()
    torch.set_num_threads(1)
    rng, began = random.Random(said.seed), time.monotonic()
    counts = Counter[str]()
    with tempfile.TemporaryDirectory() as scratch:
        run_sweep(sweep(), mf.toy(), Path(scratch, "whole"))
        want = pixels(Path(scratch, "whole"))
        while counts["kills"] < said.kills:
            folder, log = Path(scratch, f"{counts['folders']}"), Path(scratch, f"{counts['folders']}.log")
            counts["folders"] += 1
            while counts["kills"] < said.kills and count(folder) < len(want):
                alive = {
                    worker(folder, rng.choice((1, 2, 4)), said.pause, log): rng.uniform(0, said.longest) for _ in "ab"
                }
                start = time.monotonic()
                while alive:
                    for pid, life in list(alive.items()):
                        if time.monotonic() - start > life:
                            os.kill(pid, signal.SIGKILL)
                        ended, status = os.waitpid(pid, os.WNOHANG)
                        if ended:
                            del alive[pid]
                            counts["kills"] += os.WIFSIGNALED(status)
                            counts["errors"] += os.WIFEXITED(status) and os.WEXITSTATUS(status) != 0
                    time.sleep(0.002)
                counts["torn"] += len(torn(folder))
            os.waitpid(worker(folder, 4, 0, log), 0)
            got = pixels(folder)
            counts["rows"] += len(got)
            counts["lost"] += len(want.keys() - got.keys())
            counts["failed"] += sum(isinstance(value, str) for value in got.values())
            counts["other pixels"] += sum(not (isinstance(got[key], str) or same(got[key], want[key])) for key in got)
            lines = log.read_text().split("\n") if log.exists() else []
            counts["doubled"] += sum(n > 1 for n in Counter(x for x in lines if x.startswith("done")).values())
            counts["written off on the way"] += sum(x.startswith("failed") for x in lines)
            counts["leases left"] += len(list((folder / "leases").glob("*.json")))
    names = ("kills", "folders", "rows", "failed", "lost", "doubled", "torn", "other pixels", "errors", "leases left")
    print(
        json.dumps(
            {n: counts[n] for n in (*names, "written off on the way")} | {"seconds": round(time.monotonic() - began)}
        )
    )
    sys.exit(any(counts[n] for n in ("failed", "lost", "doubled", "torn", "other pixels", "errors", "leases left")))


if __name__ == "__main__":
    main()

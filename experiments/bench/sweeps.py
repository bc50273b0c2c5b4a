"""Sweeps of many rows: how long until a finished one is seen to be finished, and until its page is there.

A folder is filled with rows that look like a sweep's (the toy model's chains, small pictures), without drawing them;
then fresh processes resume it, once without and once with the index beside it, and report it.

    python -m experiments.bench.sweeps --rows 20000
    python -m experiments.bench.sweeps --rows 200000 --no-report
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

import mrflow as mf
from mrflow.stage import AnyChain
from mrflow.sweep import Row, Store, seed_of
from mrflow.sweep.local import manifest
from mrflow.sweep.maker import Maker

RESUME = """
import sys, torch
from pathlib import Path
import mrflow as mf
from mrflow.sweep import run_sweep
from experiments.bench.sweeps import sweep
done = run_sweep(sweep({rows}), mf.toy(), {folder!r})
assert (done.made, done.before, done.left) == (0, {rows}, 0), done
"""
REPORT = """
from mrflow.cli import main
import sys
sys.argv = ["mrflow", "report", {folder!r}]
main()
"""
NOTHING = "import mrflow as mf, mrflow.sweep, torch; mf.toy()"


def sweep(rows: int) -> mf.Sweep:
    """Four chains; prompts with tags; metrics that are given with the rows."""
    chains: dict[str, AnyChain] = {"native": mf.recipes.native(size=(32, 32), steps=4)}
    chains |= {f"sigma {s}": mf.recipes.paper(low=(16, 16), size=(32, 32), steps=2, sigma=s / 100) for s in (8, 12, 16)}
    prompts = [mf.Prompt(f"a picture of thing {i}, in colour", {"kind": f"kind {i % 5}"}) for i in range(rows // 4)]
    return mf.Sweep(chains, prompts, model="toy")


def lines(asked: mf.Sweep, maker: Maker) -> Iterator[tuple[Row, bytes]]:
    """Every row and its picture."""
    rng = np.random.default_rng(0)
    names = ("score", "score.alignment", "score.text", "score.layout", "sharpness")
    for number, pair in enumerate(asked.pairs):
        image = Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8))
        buffer = BytesIO()
        image.save(buffer, "PNG")
        data = buffer.getvalue()
        for label in maker.labels:
            key = maker.key(label, pair)
            stages = [
                {"name": n, "out": "Latents(1, 4)", "seconds": 0.1, "nfe": 2, "flops": 1e6, "cached": False}
                for n in "ab"
            ]
            yield Row(
                key, "done", label, maker.model.info.name, maker.model.info.version, pair[0].text, maker.negative,
                seed_of(pair[0].text, pair[1]), pair[1], dict(pair[0].tags),
                seconds=0.2 + number % 7 / 100, nfe=4, flops=2e6,
                stages=stages, metrics=dict(zip(names, map(float, rng.random(5)), strict=True)), versions=maker.made_by,
                picture=f"pictures/{key[:2]}/{key}.png", picture_bytes=len(data),
                picture_sha256=hashlib.sha256(data).hexdigest(), device="cpu", time="2026-01-01T00:00:00.000000+00:00",
            ), data  # fmt: skip


def fill(folder: Path, rows: int) -> None:
    """Write the folder as a sweep would, without waiting for the disk."""
    asked, store = sweep(rows), Store(folder)
    maker = Maker(asked, mf.toy(), store)
    store.open(manifest(asked, maker.model))
    for room in ("rows", "pictures"):
        for i in range(256):
            (folder / room / f"{i:02x}").mkdir(exist_ok=True)
    for row, data in lines(asked, maker):
        (folder / str(row.picture)).write_bytes(data)
        store.row_path(row.key).write_text(json.dumps(asdict(row), sort_keys=True))


def measure(code: str) -> tuple[float, float, float]:
    """Wall seconds, seconds of processor time and the peak in MB of a fresh process."""
    before = time.monotonic()
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL, env={**os.environ})
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, process.returncode
    busy = usage.ru_utime + usage.ru_stime
    return time.monotonic() - before, busy, usage.ru_maxrss / 1000 * (1 if sys.platform != "darwin" else 1e-3)


def main() -> None:
    """Fill, resume twice, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--folder", type=Path, help="keep it there; filled only where it is missing")
    parser.add_argument("--report", action=argparse.BooleanOptionalAction, default=True)
    said = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = said.folder or Path(scratch, "sweep")
        if not folder.exists():
            fill(folder, said.rows)
        (folder / "index.bin").unlink(missing_ok=True)
        print("| step | s | processor s | peak MB |\n|---|---|---|---|")
        cases = {"imports alone": NOTHING}
        cases |= dict.fromkeys(("resume, no index", "resume, index"), RESUME.format(rows=said.rows, folder=str(folder)))
        if said.report:
            cases["report"] = REPORT.format(folder=str(folder))
        for name, code in cases.items():
            seconds, busy, peak = measure(code)
            print(f"| {name} | {seconds:.1f} | {busy:.1f} | {peak:.0f} |", flush=True)
        if said.report:
            print(f"\nthe page: {(folder / 'report.html').stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()

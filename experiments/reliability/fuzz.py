"""Mutated files and words of the command line: nothing but mrflow's own errors may come out, in time and memory.

    python -m experiments.reliability.fuzz images --count 10000 --seed 0

Kinds: images (every format that is read), records (PNGs that carry one, read and decoded), arguments (of every verb),
headers (safetensors), pickles (`.pth`), folders (of a model: any of its files), configs (of a model: its JSON files),
sweeps (received folders: read, reported on, resumed). Folders and configs need diffusers and transformers.
Each input is a function of the seed and its number: `--first N --count 1` makes one again. Exit code 1 if one was bad.
They are tried in a forked process that is watched from outside, so that a crash or a hang costs one input.
"""

import argparse
import io
import json
import random
import resource
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from functools import cache, cached_property
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from unittest.mock import patch

import torch
from PIL import Image, PngImagePlugin
from safetensors.torch import save
from typer import Typer, testing
from typer.main import get_command
from typer.testing import CliRunner

import mrflow as mf
from experiments.reliability.mutations import (
    change,
    changed_header,
    changed_json,
    changed_pickle,
    files_below,
    image_seeds,
    mutated,
    networks,
    pickles,
)
from experiments.reliability.watched import waited, watched
from mrflow.errors import Interruption, MrflowError
from mrflow.models import info
from mrflow.models.describe import describe
from mrflow.models.pocket.model import Pocket
from mrflow.records.chains import decode_chain
from mrflow.records.pictures import describe_record, png
from mrflow.sweep import Sharpness, run_sweep
from mrflow.sweep.report import page
from mrflow.sweep.summary import load_rows
from mrflow.sweep.tables import write_csv
from mrflow.upscalers import load_upscaler
from mrflow.upscalers.weights import read_state

LIMIT, HANG = 10, 60  # seconds of the processor, and on the clock: other work may share the machine
PATIENCE = 10  # seconds after HANG, after which the process is killed
GROWTH = 2 << 30  # bytes
VERBS = ("generate", "run", "refine", "plan", "sweep", "report", "tune", "inspect", "replay")
ODD = (
    "", "-1", "0", "nan", "inf", "1e999", "9" * 30, "\0", "\x1b[31m", "../..", "/dev/zero", "/dev/null", "a" * 5000,
    "🙂", "\ud800", "x.png", "x.py:chain", "x.py:", ":", "=", "--", "64x64", "0x0", "64x", "99999x99999", "8,4",
    "8,,4", "1/0", "0/1", "paper", "native", "speed", "ralu", "lift", "pocket", "owner/name", "latent-bicubic",
    "lanczos", "float16", "fp8", "block", "cpu", "cuda:99", "mps",
)  # fmt: skip
OPTIONS = (
    "--model", "--recipe", "--size", "--low", "--ladder", "--steps", "--refine-steps", "--sigma", "--sr", "--seed",
    "--batch", "--out", "--dtype", "--offload", "--storage", "--vae", "--text", "--lora", "--compare",
    "--negative", "--json", "--force", "--stages", "--scale", "--crop", "--prompt", "--shard", "--plan", "--with",
    "--start", "--file", "--floor", "--trials", "--metric", "--title",
)  # fmt: skip
NEEDS = {
    "images": ("images",), "records": ("made",), "headers": ("headers",), "pickles": ("pickles",),
    "folders": ("whole",), "configs": ("whole",), "sweeps": ("sweep",),
}  # fmt: skip
KINDS = ("images", "records", "arguments", "headers", "pickles", "folders", "configs", "sweeps")


class Inputs:
    """The inputs of a kind, each tried by its number."""

    def __init__(self, kind: str, folder: Path, seed: int) -> None:
        self.folder, self.seed, self.kind = folder, seed, kind
        self.kept: dict[Path, dict[Path, bytes]] = {}  # folders that every input finds as they were
        for name in NEEDS.get(kind, ()):
            getattr(self, name)

    @cached_property
    def images(self) -> list[bytes]:
        """Images of every format."""
        return image_seeds()

    @cached_property
    def made(self) -> mf.Result:
        """A picture with its record."""
        chain = mf.recipes.paper(mf.Blend(mf.Lanczos(2), mf.Interpolate(2), 0.5), low=(32, 32), size=(64, 64), steps=2)
        return mf.run(chain, mf.toy(), "a red circle")

    @cached_property
    def headers(self) -> list[bytes]:
        """Safetensors files of every kind that is told apart."""
        out: list[bytes] = []
        for state in networks().values():
            out.append(save(state, {"format": "pt"}))
            out.append(save({name: tensor.half() for name, tensor in state.items()}))
        blocks = "transformer.transformer_blocks.0.attn.to_q.lora_"
        low = {f"{blocks}A.weight": torch.ones(2, 8), f"{blocks}B.weight": torch.ones(8, 2)}
        out.append(save(low, {"lora_adapter_metadata": json.dumps({"transformer.lora_alpha": 4, "transformer.r": 2})}))
        out += [path.read_bytes() for path in self.model.rglob("*.safetensors")] if find_spec("diffusers") else []
        return out

    @cached_property
    def pickles(self) -> list[bytes]:
        """Networks as torch saves them."""
        return pickles()

    @cached_property
    def model(self) -> Path:
        """A small FLUX repository with every part."""
        from tests.tiny import write_flux_repo

        return write_flux_repo(self.folder / "model")

    @cached_property
    def whole(self) -> dict[Path, bytes]:
        """What lies in it."""
        self.kept[self.model] = files_below(self.model)
        return self.kept[self.model]

    @cached_property
    def sweep(self) -> tuple[mf.Sweep, dict[Path, bytes]]:
        """A finished sweep, and what lies in its folder."""
        chains = {"native": mf.recipes.native(size=(32, 32), steps=1), "low": mf.recipes.native(size=(32, 32), steps=2)}
        sweep = mf.Sweep(chains, ["a", "b"], model="toy", metrics=[Sharpness()])
        folder = self.folder / "sweep"
        run_sweep(sweep, mf.toy(), folder)
        self.kept[folder] = files_below(folder)
        return sweep, self.kept[folder]

    def try_images(self, rng: random.Random) -> None:
        """Read one image."""
        path = self.folder / "x.img"
        path.write_bytes(mutated(rng.choice(self.images), rng))
        mf.read_image(path)

    def try_records(self, rng: random.Random) -> None:
        """Read, describe, decode and plan one record."""
        record: object = self.made.record()
        for _ in range(rng.randint(0, 3)):
            record = change(record, rng)
        if rng.random() < 0.5:
            data = png(self.made.images[0], record)
        else:
            text, info = json.dumps(record), PngImagePlugin.PngInfo()
            cut = mutated(text.encode(), rng).decode("latin-1").replace("\0", "")
            buffer = io.BytesIO()
            info.add_itxt("mrflow", cut, zip=rng.random() < 0.5)
            Image.new("RGB", (8, 8)).save(buffer, "PNG", pnginfo=info)
            data = buffer.getvalue()
        path = self.folder / "x.png"
        path.write_bytes(mutated(data, rng) if rng.random() < 0.3 else data)
        found = mf.read_record(path)
        describe_record(found)
        mf.plan(decode_chain(found.get("chain")), mf.toy().info)

    def try_arguments(self, rng: random.Random) -> None:
        """Call one verb; what would draw gets as far as the prompt."""
        from mrflow.cli.app import app

        verb = rng.choice(VERBS)
        words = [rng.choice(ODD) for _ in range(rng.randint(0, 2))]
        for _ in range(rng.randint(0, 4)):
            words += [rng.choice(OPTIONS), rng.choice(ODD)][: rng.choice((1, 2, 2, 2))]
        draws = verb in ("generate", "run", "refine", "sweep", "tune", "replay")
        with patch.object(Pocket, "condition", undrawn), patch.object(testing, "_get_command", command):
            done = CliRunner().invoke(app, [verb, *(["none"] if draws else []), *words])
        if done.exception is not None and not isinstance(done.exception, SystemExit):
            raise done.exception
        if "(unexpected:" in done.stderr or "Traceback" in done.stderr:
            raise AssertionError(done.stderr)

    def try_headers(self, rng: random.Random) -> None:
        """Describe one safetensors file, and give it to what takes such files."""
        path = self.folder / "x.safetensors"
        path.write_bytes(changed_header(rng.choice(self.headers), rng))
        takes = (describe, read_state, load_upscaler, lambda p: mf.load(lora=p), mf.load, lambda p: info(str(p)))
        rng.choice(takes)(path)

    def try_pickles(self, rng: random.Random) -> None:
        """Load one network."""
        path = self.folder / "x.pth"
        path.write_bytes(changed_pickle(rng.choice(self.pickles), rng))
        load_upscaler(path)

    def try_folders(self, rng: random.Random) -> None:
        """Plan, describe or load a model of which up to three files are changed, gone, links or swapped."""
        for path in rng.sample(list(self.whole), rng.randint(1, 3)):
            act = rng.randrange(8)
            if act == 0:
                path.unlink()
            elif act == 1:
                path.unlink()
                path.symlink_to(rng.choice(("/dev/zero", "/nowhere", path.name, "..")))
            elif act == 2:
                path.write_bytes(rng.choice(list(self.whole.values())))
            else:
                how = {".json": changed_json, ".safetensors": changed_header}.get(path.suffix, mutated)
                path.write_bytes(how(self.whole[path], rng))
        self.use_model(rng)

    def try_configs(self, rng: random.Random) -> None:
        """The same with changed values in its JSON files alone."""
        found = [path for path in self.whole if path.suffix == ".json" and "tokenizer" not in str(path.parent)]
        for path in rng.sample(found, rng.randint(1, 2)):
            path.write_bytes(changed_json(self.whole[path], rng))
        self.use_model(rng)

    def use_model(self, rng: random.Random) -> None:
        """Plan, describe or load the folder."""
        rng.choice((lambda p: info(str(p)), mf.load, mf.load, describe))(self.model)

    def try_sweeps(self, rng: random.Random) -> None:
        """Report on a folder that was changed, and go on in it."""
        sweep, whole = self.sweep
        folder = self.folder / "sweep"
        for path in rng.sample(list(whole), rng.randint(1, 4)):
            act = rng.randrange(6)
            if act == 0:
                path.unlink()
                path.symlink_to(rng.choice(("/dev/zero", "/etc/hostname", path.name, "..")))
            elif act == 1:
                path.write_bytes(rng.choice(list(whole.values())))
            else:
                path.write_bytes((changed_json if path.suffix == ".json" else mutated)(whole[path], rng))
        act = rng.randrange(3)
        if act == 0:
            page(folder)
        elif act == 1:
            rows, _ = load_rows(folder)
            write_csv(rows, folder / "rows.csv")
        else:
            run_sweep(sweep, mf.toy(), folder)

    def attempt(self, number: int) -> str | None:
        """What is wrong about input `number`, or None."""
        rng = random.Random(f"{self.kind} {self.seed} {number}")
        one: Callable[[random.Random], None] = getattr(self, f"try_{self.kind}")
        for folder, whole in self.kept.items():
            restore(folder, whole)
        began, wrong, alarms = time.process_time(), None, list[int]()

        start, late_by = time.monotonic(), waited()

        def late(signum: int, frame: FrameType | None) -> None:
            left = HANG - (time.monotonic() - start - (waited() - late_by))
            if signum == signal.SIGALRM and left > 0.01:
                signal.setitimer(signal.ITIMER_REAL, left)
                return
            alarms.append(signum)
            raise LateError

        previous = [signal.signal(number, late) for number in (signal.SIGALRM, signal.SIGPROF)]
        signal.setitimer(signal.ITIMER_REAL, HANG)
        signal.setitimer(signal.ITIMER_PROF, LIMIT)
        try:
            one(rng)
        except MrflowError as error:
            wrong = None if str(error) else f"{type(error).__name__} without words"
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            wrong = f"{type(error).__name__}: {str(error)[:200]}"
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.setitimer(signal.ITIMER_PROF, 0)
            for number, handler in zip((signal.SIGALRM, signal.SIGPROF), previous, strict=True):
                signal.signal(number, handler)
        if alarms:
            return f"took more than {LIMIT} s of the processor, or {HANG} s on the clock"
        took = time.process_time() - began
        return wrong or (f"took {took:.0f} s" if took > LIMIT else None)


class LateError(Interruption):
    """Time is up; nothing that handles errors takes it for one."""


@cache
def command(app: Typer) -> object:
    """The verbs and options, which take three times as long to make as to call."""
    return get_command(app)


def undrawn(model: Pocket, prompts: object) -> mf.Condition:
    """Instead of a condition: what is right would take as long as a picture takes."""
    raise MrflowError(f"{len(str(prompts))} characters would be drawn")


def restore(folder: Path, whole: dict[Path, bytes]) -> None:
    """Bring a folder back to what it held."""
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_symlink() or (path.is_file() and path not in whole):
            path.unlink()
    for path, data in whole.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.is_file() or path.read_bytes() != data:
            path.write_bytes(data)


def fuzz(kind: str, count: int, seed: int = 0, first: int = 0, *, show: bool = True) -> dict[int, str]:
    """Try inputs `first` to `first + count` of a kind; what was wrong, by number."""
    bad: dict[int, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        inputs = Inputs(kind, Path(folder), seed)
        number = first - 1
        numbers = range(first, first + count)
        try:
            for number, wrong in watched(inputs.attempt, numbers, hang=HANG + PATIENCE, growth=GROWTH):
                if wrong is not None:
                    bad[number] = wrong
                if show and (wrong is not None or (number - first + 1) % 500 == 0):
                    print(f"{kind} {number}: {wrong or f'{len(bad)} bad so far'}", flush=True)
        except KeyboardInterrupt:
            sys.exit(f"{number - first + 1} {kind} before it was stopped: {len(bad)} bad")
    return bad


def main() -> int:
    """The entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    began = time.monotonic()
    bad = fuzz(args.kind, args.count, args.seed, args.first)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss >> 10
    took = time.monotonic() - began
    print(
        f"{args.count} {args.kind}: {len(bad)} bad, {took:.0f} s, peak {peak} MiB",
        dict(Counter(bad.values()).most_common(5)),
    )
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())

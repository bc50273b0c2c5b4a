"""Mutated files and words of the command line: nothing but mrflow's own errors may come out, in time and memory.

    python -m experiments.reliability.fuzz images --count 10000 --seed 0

Kinds: images (every format that is read), records (PNGs that carry one, read and decoded), arguments (of every verb).
Each input is a function of the seed and its number: `--first N --count 1` makes one again. Exit code 1 if one was bad.
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
from pathlib import Path
from types import FrameType

import numpy as np
from PIL import Image, PngImagePlugin
from typer.testing import CliRunner

import mrflow as mf
from mrflow.errors import MrflowError
from mrflow.records.chains import decode_chain
from mrflow.records.pictures import describe_record, png

LIMIT = 10  # seconds
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


def mutated(data: bytes, rng: random.Random) -> bytes:
    """A file with up to eight changes: bits, bytes, cuts, doublings, lengths, and pieces moved."""
    out = bytearray(data)
    for _ in range(rng.randint(1, 8)):
        at, kind = rng.randrange(len(out) or 1), rng.randrange(7)
        if kind == 0 and out:
            out[at] ^= 1 << rng.randrange(8)
        elif kind == 1 and out:
            out[at] = rng.choice((0, 1, 127, 128, 255))
        elif kind == 2:
            del out[at : at + rng.randrange(1, 64)]
        elif kind == 3:
            out[at:at] = rng.randbytes(rng.randrange(1, 64))
        elif kind == 4:
            out[at : at + 4] = rng.choice((b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\0\0\0\0", b"\x80\0\0\0"))
        elif kind == 5:
            out[at:at] = out[at : at + rng.randrange(1, 256)]
        elif rng.random() < 0.3:
            del out[at:]
    return bytes(out)


def image_seeds() -> list[bytes]:
    """Small images of every format and mode that is read."""
    rng = np.random.default_rng(0)
    rgb = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
    deep = Image.fromarray(rng.integers(0, 65536, (12, 16), dtype=np.uint16))
    real = Image.fromarray(rng.random((12, 16), dtype=np.float32))
    exif = rgb.getexif()
    exif[0x0112] = 6
    info = PngImagePlugin.PngInfo()
    info.add_itxt("XML:com.adobe.xmp", "<x/>", zip=True)
    kinds: list[tuple[Image.Image, str, dict[str, object]]] = [
        (rgb, form, {}) for form in ("PNG", "JPEG", "WEBP", "AVIF", "TIFF", "BMP", "GIF", "PPM")
    ]
    kinds += [(rgb.convert(mode), "PNG", {"exif": exif, "pnginfo": info}) for mode in ("P", "L", "LA", "RGBA", "1")]
    kinds += [(rgb.convert("CMYK"), form, {"exif": exif}) for form in ("JPEG", "TIFF")]
    kinds += [(deep, "PNG", {}), (deep, "TIFF", {}), (real, "TIFF", {})]
    kinds += [(rgb, "TIFF", {"compression": name}) for name in ("tiff_lzw", "tiff_deflate", "packbits")]
    profile = b"x" * 200
    kinds += [(rgb, form, {"icc_profile": profile, "exif": exif}) for form in ("PNG", "JPEG", "WEBP")]
    out: list[bytes] = []
    for image, form, how in kinds:
        buffer = io.BytesIO()
        image.save(buffer, form, **how)
        out.append(buffer.getvalue())
    return out


def change(value: object, rng: random.Random) -> object:
    """A record with one value replaced, removed, wrapped or repeated."""
    odd: list[object] = [None, True, -1, 10**30, 1e308, "", "\x1b[2J\0", "../x", [], {}, {"type": "Sample"}, [[[[]]]]]
    odd += [{"type": "os:system", "x": 1}, {"type": "Lora", "path": "/dev/zero"}, "9" * 5000, 10**9, 0.5]
    if isinstance(value, dict) and value and rng.random() < 0.8:
        key = rng.choice(list(value))
        out = dict(value)
        if rng.random() < 0.1:
            del out[key]
            return out
        return out | {key: change(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.8:
        at = rng.randrange(len(value))
        return [*value[:at], change(value[at], rng), *value[at + (rng.random() < 0.8) :]]
    return rng.choice([*odd, [value], {"type": value}])


class Inputs:
    """The inputs of a kind, each tried by its number."""

    def __init__(self, kind: str, folder: Path, seed: int) -> None:
        self.folder, self.seed, self.kind = folder, seed, kind
        self.images = image_seeds()
        chain = mf.recipes.paper(mf.Blend(mf.Lanczos(2), mf.Interpolate(2), 0.5), low=(32, 32), size=(64, 64), steps=2)
        self.made = mf.run(chain, mf.toy(), "a red circle")

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
        """Call one verb; what would draw for long is planned."""
        from mrflow.cli.app import app

        verb = rng.choice(VERBS)
        words = [rng.choice(ODD) for _ in range(rng.randint(0, 2))]
        for _ in range(rng.randint(0, 4)):
            words += [rng.choice(OPTIONS), rng.choice(ODD)][: rng.choice((1, 2, 2, 2))]
        draws = verb in ("generate", "run", "refine", "sweep", "tune", "replay")
        words = ["none", *words] if draws else words  # refused last of all, before any work
        done = CliRunner().invoke(app, [verb, *words])
        if done.exception is not None and not isinstance(done.exception, SystemExit):
            raise done.exception
        if "(unexpected:" in done.stderr or "Traceback" in done.stderr:
            raise AssertionError(done.stderr)

    def attempt(self, number: int) -> str | None:
        """What is wrong about input `number`, or None."""
        rng = random.Random(f"{self.kind} {self.seed} {number}")
        one: Callable[[random.Random], None] = getattr(self, f"try_{self.kind}")
        began, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

        def late(signum: int, frame: FrameType | None) -> None:
            raise TimeoutError(f"more than {LIMIT} s")

        previous = signal.signal(signal.SIGALRM, late)
        signal.alarm(LIMIT)
        try:
            one(rng)
        except MrflowError as error:
            if not str(error):
                return f"{type(error).__name__} without words"
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            return f"{type(error).__name__}: {str(error)[:200]}"
        finally:
            signal.alarm(0)
            signal.signal(signal.SIGALRM, previous)
        if (grown := 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)) > GROWTH:
            return f"grew by {grown >> 20} MiB"
        return f"took {time.monotonic() - began:.0f} s" if time.monotonic() - began > LIMIT else None


def fuzz(kind: str, count: int, seed: int = 0, first: int = 0, *, show: bool = True) -> dict[int, str]:
    """Try inputs `first` to `first + count` of a kind; what was wrong, by number."""
    bad: dict[int, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        inputs = Inputs(kind, Path(folder), seed)
        for number in range(first, first + count):
            if (wrong := inputs.attempt(number)) is not None:
                bad[number] = wrong
                if show:
                    print(f"{kind} {number}: {wrong}")
    return bad


def main() -> int:
    """The entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("images", "records", "arguments"))
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    began = time.monotonic()
    bad = fuzz(args.kind, args.count, args.seed, args.first)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    took = time.monotonic() - began
    print(
        f"{args.count} {args.kind}: {len(bad)} bad, {took:.0f} s, peak {peak} MiB",
        dict(Counter(bad.values()).most_common(5)),
    )
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())

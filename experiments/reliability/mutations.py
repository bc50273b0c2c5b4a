"""Mutations of bytes and of tables, and small files to start from."""

import io
import json
import random
import struct
import zipfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image, PngImagePlugin
from torch import Tensor

from mrflow.upscalers.nets import CompactParams, RRDBNet, RRDBParams, SRVGGNetCompact


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


def changed_json(data: bytes, rng: random.Random) -> bytes:
    """A JSON file with one to three values changed, or with changed bytes."""
    if rng.random() < 0.25:
        return mutated(data, rng)
    try:
        value: object = json.loads(data)
    except ValueError:
        return mutated(data, rng)
    for _ in range(rng.randint(1, 3)):
        value = change(value, rng)
    return json.dumps(value).encode("utf-8", "replace")


def changed_header(data: bytes, rng: random.Random) -> bytes:
    """A safetensors file whose header, or its length, is changed; its tensors stay, or are cut."""
    (length,) = struct.unpack("<Q", data[:8])
    header, rest = data[8 : 8 + length], data[8 + length :]
    new = changed_json(header, rng)
    if rng.random() < 0.1:
        length = rng.choice((0, 1, length - 1, 1 << 62, (1 << 64) - 1, rng.randrange(1 << 20)))
    else:
        length = len(new)
    if rng.random() < 0.1:
        rest = rest[: rng.randrange(len(rest) + 1)]
    return struct.pack("<Q", length) + new + rest


def changed_pickle(data: bytes, rng: random.Random) -> bytes:
    """A file of torch's: its bytes, or within an archive the bytes of one member, stored again whole."""
    if not zipfile.is_zipfile(io.BytesIO(data)) or rng.random() < 0.3:
        return mutated(data, rng)
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w") as new:
        for item in old.infolist():
            raw = old.read(item)
            if item.filename.endswith(".pkl") or rng.random() < 0.05:
                raw = mutated(raw, rng)
            new.writestr(item.filename, raw)
    return out.getvalue()


def networks() -> dict[str, dict[str, Tensor]]:
    """Random weights of the two super-resolution networks, small."""
    nets = (RRDBNet(RRDBParams(8, 1, 4)), SRVGGNetCompact(CompactParams(8, 2, 2)))
    return {type(net).__name__: {k: v.detach().clone() for k, v in net.state_dict().items()} for net in nets}


def pickles() -> list[bytes]:
    """Networks as training programs write them, in archives and older files."""
    out: list[bytes] = []
    for state in networks().values():
        for whole in (state, {"params_ema": state, "iter": 5, "lr": [0.1], "best": {"psnr": 30.5}}):
            for new in (True, False):
                buffer = io.BytesIO()
                torch.save(whole, buffer, _use_new_zipfile_serialization=new)
                out.append(buffer.getvalue())
    return out


def files_below(folder: Path) -> dict[Path, bytes]:
    """What lies in a folder."""
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}

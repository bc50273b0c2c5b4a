"""Image files from outside: which are opened, how large they may be, and what their numbers mean.

A file is read once, held to limits before it is decoded, and only by the decoders in `FORMATS`. Whatever a decoder
raises becomes one error of mrflow. A PNG's text is read here and never by Pillow, which refuses long texts.
"""

import warnings
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageCms, UnidentifiedImageError
from torch import Tensor

from mrflow._checks import check_path
from mrflow.display.notes import note
from mrflow.errors import MrflowError, PlanError, ResourceError
from mrflow.records.files import read_regular

FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "TIFF", "BMP", "GIF", "PPM")
"""What is opened. Not all that Pillow knows: an EPS would start Ghostscript."""
MAX_FILE = 1 << 29
MAX_PIXELS = 1 << 26
MAX_TEXT = 1 << 25
MAX_PROFILE = 1 << 24
SIGNATURE = b"\x89PNG\r\n\x1a\n"
PIXELS = {b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND", b"eXIf"}  # the chunks that Pillow is given
ORIENTED = {"XML:com.adobe.xmp", "Raw profile type exif"}  # the texts that may say which side is up


def read_image(path: str | Path) -> Tensor:
    """An image file as float32 (1, 3, height, width) in [0, 1] of sRGB.

    Upright by its EXIF; transparency over white; colours converted from the file's profile, CMYK included. Levels
    follow the kind of the file, never its brightest pixel: integers of n bits are divided by 2^n - 1, floating-point
    numbers must lie in [0, 1]. A colour profile or EXIF that is broken is reported and ignored.

    Raises:
        ResourceError: the file cannot be read. PlanError: it is no image in one of `FORMATS`, is broken, holds NaN or
            numbers of no known scale, or has more than `MAX_FILE` bytes or `MAX_PIXELS` pixels.
    """
    return decode_image(image_bytes(path), path)


def decode_image(data: bytes, path: str | Path) -> Tensor:
    """`read_image` of a file's bytes; errors and notes name its `path`."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        pixels = _decode(data, str(path))
    for text in dict.fromkeys(str(each.message).strip() for each in said):
        if "EXIF" in text:
            note(f"{path}: its EXIF is broken and was ignored ({text})")
        elif "Palette images" not in text:  # those are converted with their transparency here
            note(f"{path}: {text}")
    return pixels


def image_bytes(path: str | Path, *, wrong: type[MrflowError] = PlanError) -> bytes:
    """A picture's file, as it is.

    Raises:
        ResourceError: it cannot be read. `wrong`: it has more than `MAX_FILE` bytes, or cannot be a path.
    """
    try:
        return read_regular(check_path("the picture", path).resolve(), most=MAX_FILE)
    except OSError as error:
        raise ResourceError(f"{path} cannot be read: {error.strerror or error}") from None
    except (ValueError, RuntimeError) as error:  # too large, a circle of links
        raise wrong(f"{path} cannot be read: {error}") from None


def _decode(data: bytes, path: str) -> Tensor:
    """The pixels of a file's bytes."""
    try:
        profile = None
        if data.startswith(SIGNATURE):
            data, profile = _bare(data, path)
        with Image.open(BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
            if not 0 < width * height <= MAX_PIXELS:
                raise PlanError(
                    f"{path} has {width}x{height} pixels, more than {MAX_PIXELS / 1e6:.0f} million: scale it down first"
                )
            image.load()
            profile = profile or _info(image, "icc_profile")
            levels = _levels(image, path) if image.mode[0] in "IF" else _colours(image, profile, path)
            if image.mode[0] in "IF" and profile:
                note(f"{path}: the colour profile of greys of more than 8 bits is ignored; they are taken as sRGB")
            return _upright(levels, image, path)
    except PlanError:
        raise
    except UnidentifiedImageError:
        known = ", ".join(FORMATS)
        raise PlanError(f"{path} is not an image that mrflow reads; give a whole file of {known}") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise PlanError(f"{path} has more than {MAX_PIXELS / 1e6:.0f} million pixels: scale it down first") from None
    except MemoryError:
        raise ResourceError(f"{path} does not fit into memory; scale it down first") from None
    except Exception as error:  # decoders raise whatever a broken file leads them to
        raise PlanError(f"{path} is a broken picture ({type(error).__name__}: {error}); copy it again") from None


def _info(image: Image.Image, key: str) -> bytes | None:
    value: object = image.info.get(key)
    return value if isinstance(value, bytes) and 0 < len(value) <= MAX_PROFILE else None


def _levels(image: Image.Image, path: str) -> Tensor:
    """Greys of more than 8 bits as float32 (height, width) in [0, 1]."""
    tags = getattr(image, "tag_v2", {})  # a TIFF's: how many bits, signed or not, which end is white
    bits, kind = (int(np.ravel(tags.get(tag, usual))[0]) for tag, usual in ((258, 16), (339, 1)))
    values = np.array(image)
    if image.mode == "F":
        if not np.isfinite(values).all():
            raise PlanError(f"{path} holds NaN or infinity")
        low, high = float(values.min()), float(values.max())
        if low < -1e-3 or high > 1 + 1e-3:
            raise PlanError(
                f"{path} holds floating-point numbers from {low:g} to {high:g}; divide them so that white is 1"
            )
    elif kind not in (1, 2) or bits not in (12, 16, 32):
        raise PlanError(f"{path} holds integers whose scale is not known; save it with 8 or 16 bits")
    else:
        whole = values.astype(np.int64)
        if kind == 1:
            whole &= (1 << bits) - 1 if image.mode == "I" else -1  # Pillow gives 32 bits with a sign
        elif int(whole.min()) < 0:
            raise PlanError(f"{path} holds numbers below 0, which are no brightness; save it with 8 or 16 bits")
        values = whole / ((1 << (bits - (kind == 2))) - 1)
    levels = torch.from_numpy(values.astype(np.float32)).clamp(0, 1)
    if tags.get(262) == 0:
        levels = 1 - levels
    clear: object = image.info.get("transparency")
    if isinstance(clear, int):
        levels[torch.from_numpy(np.array(image).astype(np.int64) == clear)] = 1.0
    return levels.expand(3, *levels.shape)


def _colours(image: Image.Image, profile: bytes | None, path: str) -> Tensor:
    """Float32 (3, height, width) in [0, 1] of sRGB, over white where the image is transparent."""
    alpha = None
    if image.mode in ("La", "RGBa"):
        image = image.convert("LA" if image.mode == "La" else "RGBA")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        alpha = image.convert("RGBA").getchannel("A")
        image = image.convert("L" if image.mode == "LA" else "RGB")
    rgb = _srgb(image, profile, path)
    if alpha is not None:
        rgb = rgb.convert("RGBA")
        rgb.putalpha(alpha)
        rgb = Image.alpha_composite(Image.new("RGBA", rgb.size, "white"), rgb).convert("RGB")
    return torch.from_numpy(np.array(rgb)).permute(2, 0, 1) / 255


def _srgb(image: Image.Image, profile: bytes | None, path: str) -> Image.Image:
    """The colours as sRGB, by LittleCMS with the perceptual intent."""
    source: Any
    if image.mode == "LAB":
        source = ImageCms.createProfile("LAB")
    elif profile is None:
        return image.convert("RGB")
    else:
        try:
            source = ImageCms.ImageCmsProfile(BytesIO(profile))
            space = source.profile.xcolor_space.strip()
            if space == "GRAY" and image.mode in ("1", "L"):
                image = image.convert("L")
            elif space == "RGB" and image.mode != "CMYK":
                image = image.convert("RGB")
            elif not (space == "CMYK" and image.mode == "CMYK"):
                raise ValueError(f"it is for {space}, the image is {image.mode}")
        except (OSError, ValueError, TypeError) as error:
            note(f"{path}: its colour profile is broken and was ignored ({str(error) or type(error).__name__})")
            return image.convert("RGB")
    try:
        found = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except ImageCms.PyCMSError as error:
        note(f"{path}: its colour profile is broken and was ignored ({error})")
        found = None
    return image.convert("RGB") if found is None else found


def _upright(pixels: Tensor, image: Image.Image, path: str) -> Tensor:
    """(1, 3, height, width), turned as the EXIF says."""
    try:
        orientation: object = image.getexif().get(0x0112, 1)
    except Exception as error:  # a broken EXIF raises whatever its bytes lead to
        note(f"{path}: its EXIF is broken and was ignored ({type(error).__name__})")
        orientation = 1
    if orientation in (5, 6, 7, 8):
        pixels = pixels.transpose(-1, -2)
    if orientation in (2, 3, 7, 6):
        pixels = pixels.flip(-1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels.flip(-2)
    return pixels[None].contiguous()


@dataclass(frozen=True)
class Chunk:
    """One chunk of a PNG: its four-letter type, its data, and its bytes in the file."""

    kind: bytes
    data: bytes
    raw: bytes


def chunks(data: bytes) -> Iterator[Chunk]:
    """The chunks of a PNG, up to IEND.

    Raises:
        ValueError: a chunk is cut short, its checksum is wrong, or IEND is missing.
    """
    at = len(SIGNATURE)
    while at + 12 <= len(data):
        end = at + 12 + int.from_bytes(data[at : at + 4], "big")
        kind, body = data[at + 4 : at + 8], data[at + 8 : end - 4]
        if end > len(data) or zlib.crc32(kind + body) != int.from_bytes(data[end - 4 : end], "big"):
            break
        yield Chunk(kind, body, data[at:end])
        if kind == b"IEND":
            return
        at = end
    raise ValueError("it is not a whole PNG")


def decompress(data: bytes, most: int) -> bytes:
    """What zlib packed.

    Raises:
        ValueError: it is broken, or larger than `most` bytes.
    """
    stream = zlib.decompressobj()
    try:
        found = stream.decompress(data, most + 1)
    except zlib.error as error:
        raise ValueError(f"it cannot be unpacked ({error})") from None
    if len(found) > most:
        raise ValueError(f"it is larger than {most} bytes")
    if not stream.eof:
        raise ValueError("it is cut short")
    return found


def png_text(chunk: Chunk) -> tuple[str, bytes] | None:
    """Keyword and text of a text chunk, UTF-8 or Latin-1 as its type says; None for chunks of other types.

    Raises:
        ValueError: the text is broken, or larger than `MAX_TEXT` bytes.
    """
    if chunk.kind not in (b"tEXt", b"zTXt", b"iTXt"):
        return None
    word, _, rest = chunk.data.partition(b"\0")
    packed = chunk.kind == b"zTXt"
    if chunk.kind == b"iTXt":
        packed, rest = rest[:1] == b"\1", rest[2:].split(b"\0", 2)[-1]
    elif packed:
        rest = rest[1:]
    return word.decode("latin-1"), decompress(rest, MAX_TEXT) if packed else rest


def _bare(data: bytes, path: str) -> tuple[bytes, bytes | None]:
    """A PNG without what its pixels do not need, and its colour profile; a broken PNG is cut off where it breaks."""
    kept, profile, coded = [SIGNATURE], None, dict[bytes, bytes]()
    try:
        for chunk in chunks(data):
            coded[chunk.kind] = chunk.data
            if chunk.kind == b"iCCP":
                try:
                    profile = decompress(chunk.data.partition(b"\0")[2][1:], MAX_PROFILE)
                except ValueError as error:
                    note(f"{path}: its colour profile is broken and was ignored ({error})")
            elif chunk.kind in PIXELS or _orients(chunk):
                kept.append(chunk.raw)
    except ValueError:
        if not any(raw[4:8] == b"IDAT" for raw in kept):
            raise
    if coded.get(b"IHDR", b"")[9:10] == b"\3" and b"PLTE" not in coded:
        raise ValueError("its palette is missing")
    if profile is None and (coding := _coding(coded)):
        note(f"{path}: its colours are coded with {coding}, which is not converted; they are taken as sRGB")
    return b"".join(kept), profile


def _coding(coded: Mapping[bytes, bytes]) -> str:
    """What a PNG's chunks say of its colours where that is neither sRGB nor near it; else empty."""
    if (points := coded.get(b"cICP", b"\1\r"))[:2] not in (b"\1\r", b"\1\1"):
        return f"cICP {'/'.join(map(str, points[:2]))}"
    exponent = int.from_bytes(coded.get(b"gAMA", b""), "big") or 45455
    if b"sRGB" in coded or b"cICP" in coded or 40000 <= exponent <= 50000:
        return ""
    return f"a gamma of {100000 / exponent:.3g}"


def _orients(chunk: Chunk) -> bool:
    try:
        found = png_text(chunk) if len(chunk.data) < 1 << 16 else None
    except ValueError:
        return False
    return found is not None and found[0] in ORIENTED and len(found[1]) < 1 << 20

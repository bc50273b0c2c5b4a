"""Image files from outside: levels, colours, limits, and what broken files end in."""

import io
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, ImageOps, PngImagePlugin

import mrflow as mf
from mrflow.display.notes import collect_notes
from mrflow.records import images

RAMP = np.linspace(0, 1, 24 * 32).reshape(24, 32)
COLOURS = np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8)


def icc(gamma: float = 563 / 256) -> bytes:
    """An ICC v2 profile with the D50 colorants of Adobe RGB (1998) and a gamma."""

    def fixed(*values: float) -> bytes:
        return b"".join(struct.pack(">i", round(v * 65536)) for v in values)

    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256)) + b"\0\0"
    text = b"wide\0"
    name = b"desc\0\0\0\0" + struct.pack(">I", len(text)) + text + b"\0" * 78
    tags = {b"desc": name + b"\0" * (-len(name) % 4), b"cprt": b"text\0\0\0\0none\0\0\0\0"}
    whites = {b"wtpt": (0.9642, 1.0, 0.8249), b"rXYZ": (0.60974, 0.31111, 0.01947)}
    whites |= {b"gXYZ": (0.20528, 0.62567, 0.06087), b"bXYZ": (0.14919, 0.06322, 0.74457)}
    tags |= {tag: b"XYZ \0\0\0\0" + fixed(*xyz) for tag, xyz in whites.items()}
    tags |= dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve)
    table, body, at = b"", b"", 132 + 12 * len(tags)
    for tag, value in tags.items():
        table += tag + struct.pack(">II", at + len(body), len(value))
        body += value
    head = struct.pack(">I4sI12s", at + len(body), b"", 0x02100000, b"mntrRGB XYZ ") + b"\0" * 12 + b"acsp"
    head = head.ljust(68, b"\0") + fixed(0.9642, 1.0, 0.8249)
    return head.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + body


def png(*chunks: tuple[bytes, bytes], size: tuple[int, int] = (2, 2), indexed: bool = False) -> bytes:
    """A black grey PNG with more chunks before its pixels; `indexed` says that they are numbers of a palette."""
    head = struct.pack(">IIBBBBB", *size, 8, 3 if indexed else 0, 0, 0, 0)
    rows = zlib.compress(b"\0" * (size[1] * (size[0] + 1))) if size[0] < 100 else b""
    whole = images.SIGNATURE
    for kind, data in ((b"IHDR", head), *chunks, (b"IDAT", rows), (b"IEND", b"")):
        whole += struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return whole


def saved(form: str, mode: str = "RGB", **how: Any) -> bytes:
    """A small image as Pillow writes it."""
    buffer = io.BytesIO()
    Image.fromarray(COLOURS).convert(mode).save(buffer, form, **how)
    return buffer.getvalue()


TURNED = Image.Exif()
TURNED[0x0112], TURNED[0x9003] = 6, "x" * 100
EXIF = TURNED.tobytes()


@pytest.mark.parametrize(
    ("data", "name", "want"),
    [
        (RAMP.astype(np.float32), "float.tif", RAMP),
        (np.round(RAMP * 65535).astype(np.uint16), "bright.png", RAMP),
        (np.round(RAMP * 255).astype(np.uint16), "dark.png", np.round(RAMP * 255) / 65535),
        (np.round(RAMP * 200).astype(np.uint16), "dark.tif", np.round(RAMP * 200) / 65535),
        (np.round(RAMP * 65535).astype(np.uint16), "bright.pgm", RAMP),
        (np.round(RAMP * 2_000_000).astype(np.int32), "deep.tif", RAMP * 2e6 / (2**31 - 1)),
        (np.round(RAMP * 255).astype(np.uint8), "grey.jpg", RAMP),
        (RAMP > 0.5, "two.png", RAMP > 0.5),
    ],
)
def test_levels_follow_the_kind_of_the_file(tmp_path: Path, data: np.ndarray, name: str, want: np.ndarray) -> None:
    Image.fromarray(data).save(tmp_path / name)
    got = mf.read_image(tmp_path / name)
    assert got.shape == (1, 3, 24, 32) and got.is_contiguous()
    assert float((got - torch.from_numpy(want.astype(np.float32))).abs().max()) < (
        0.02 if name.endswith("jpg") else 3e-3
    )


def test_a_tiff_says_which_end_is_white_and_how_many_bits(tmp_path: Path) -> None:
    data = np.round(RAMP * 60000).astype(np.uint16)
    Image.fromarray(data).save(tmp_path / "a.tif", tiffinfo={262: 0})
    got = mf.read_image(tmp_path / "a.tif")[0, 0]
    assert torch.allclose(got, torch.from_numpy(1 - data / 65535).float(), atol=1e-6)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (np.where(RAMP > 0.5, np.nan, RAMP).astype(np.float32), "NaN or infinity"),
        (np.where(RAMP > 0.5, np.inf, RAMP).astype(np.float32), "NaN or infinity"),
        ((RAMP * 255).astype(np.float32), "from 0 to 255; divide them"),
        ((RAMP * 9 - 5).astype(np.int32), "below 0"),
    ],
)
def test_numbers_of_no_known_scale_are_refused(tmp_path: Path, data: np.ndarray, words: str) -> None:
    Image.fromarray(data).save(tmp_path / "x.tif")
    with pytest.raises(mf.PlanError, match=words):
        mf.read_image(tmp_path / "x.tif")


@pytest.mark.parametrize("ending", ["png", "tif", "jpg", "webp"])
def test_colour_profiles_are_converted_to_srgb(tmp_path: Path, ending: str) -> None:
    file, profile = tmp_path / f"x.{ending}", icc()
    smooth = np.stack([RAMP * 180 + 40, RAMP.T.reshape(24, 32) * 180 + 40, 220 - RAMP * 180], -1).astype(np.uint8)
    how: dict[str, Any] = {"jpg": {"quality": 100, "subsampling": 0}, "webp": {"lossless": True}}.get(ending, {})
    Image.fromarray(smooth).save(file, icc_profile=profile, **how)
    with Image.open(file) as opened:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        want = ImageCms.profileToProfile(opened.convert("RGB"), source, ImageCms.createProfile("sRGB"))
    got = mf.read_image(file)[0].permute(1, 2, 0) * 255
    assert want is not None and float((got - torch.from_numpy(np.array(want))).abs().max()) < 1
    assert float((got - torch.from_numpy(np.array(Image.open(file).convert("RGB")))).abs().max()) > 5


def test_a_profile_for_rgb_serves_greys_and_transparent_images(tmp_path: Path) -> None:
    grey = Image.fromarray((RAMP * 255).astype(np.uint8))
    for name, image in {"grey": grey, "clear": Image.merge("LA", (grey, Image.new("L", grey.size, 255)))}.items():
        image.save(tmp_path / f"{name}.png", icc_profile=icc(1.0))
        got = mf.read_image(tmp_path / f"{name}.png")[0, 1, 12]
        linear = torch.from_numpy(np.round(RAMP[12] * 255) / 255)
        srgb = torch.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
        assert float((got - srgb).abs().max()) < 0.02, name


def test_cmyk_and_lab_become_rgb(tmp_path: Path) -> None:
    Image.fromarray(COLOURS).convert("CMYK").save(tmp_path / "x.tif")
    got = mf.read_image(tmp_path / "x.tif")[0].permute(1, 2, 0) * 255
    assert float((got - torch.from_numpy(COLOURS)).abs().max()) < 2
    transform = ImageCms.buildTransform(ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB")
    lab = transform.apply(Image.new("RGB", (4, 4), (200, 60, 90)))
    lab.save(tmp_path / "lab.tif")
    pixel = mf.read_image(tmp_path / "lab.tif")[0, :, 0, 0] * 255
    assert float((pixel - torch.tensor([200.0, 60, 90])).abs().max()) < 3


@pytest.mark.parametrize(
    "profile", [b"no profile at all", icc()[:150], icc()[:40] + b"\xff" * 200, icc().replace(b"RGB ", b"CMYK")]
)
def test_a_broken_profile_is_reported_and_ignored(tmp_path: Path, profile: bytes) -> None:
    Image.fromarray(COLOURS).save(tmp_path / "x.png", icc_profile=profile)
    with collect_notes() as notes:
        got = mf.read_image(tmp_path / "x.png")[0].permute(1, 2, 0) * 255
    assert float((got - torch.from_numpy(COLOURS)).abs().max()) < 0.01
    assert len(notes) == 1 and "x.png: its colour profile is broken and was ignored" in notes[0]


@pytest.mark.parametrize("orientation", range(1, 10))
@pytest.mark.parametrize("ending", ["png", "jpg", "tif", "webp"])
def test_images_stand_upright(tmp_path: Path, orientation: int, ending: str) -> None:
    image = Image.fromarray(COLOURS)
    exif = image.getexif()
    exif[0x0112] = orientation
    image.save(tmp_path / f"x.{ending}", exif=exif)
    with Image.open(tmp_path / f"x.{ending}") as opened:
        want = np.array(ImageOps.exif_transpose(opened).convert("RGB"))
    got = mf.read_image(tmp_path / f"x.{ending}")[0].permute(1, 2, 0) * 255
    assert got.shape == want.shape and float((got - torch.from_numpy(want)).abs().max()) < 0.01


@pytest.mark.parametrize("kind", ["iTXt", "zTXt"])
def test_long_texts_do_not_matter_to_pixels(tmp_path: Path, kind: str) -> None:
    info = PngImagePlugin.PngInfo()
    text = "0, " * 1_000_000
    (info.add_itxt if kind == "iTXt" else info.add_text)("workflow", text, zip=True)
    Image.fromarray(COLOURS).save(tmp_path / "x.png", pnginfo=info)
    got = mf.read_image(tmp_path / "x.png")[0].permute(1, 2, 0) * 255
    assert float((got - torch.from_numpy(COLOURS)).abs().max()) < 0.01
    with pytest.raises(mf.RecordError, match="carries no mrflow record"):
        mf.read_record(tmp_path / "x.png")


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("bomb.png", png(size=(60000, 60000)), "more than 67 million pixels"),
        ("large.png", png(size=(8000, 9000)), "8000x9000 pixels, more than 67 million"),
        ("exif.png", png((b"eXIf", b"MM\0*\xff\xff\xff\xff")), None),
        ("packed.png", png((b"zTXt", b"Comment\0\0" + b"no zlib")), None),
        ("profile.png", png((b"iCCP", b"x\0\0" + zlib.compress(b"\0" * (1 << 25)))), None),
        ("cut.png", png()[:40], "broken picture"),
        ("palette.png", png(indexed=True), "broken picture .ValueError: its palette is missing"),
        ("drawing.eps", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "not an image that"),
        ("empty.png", b"", "not an image that"),
        ("a.psd", b"8BPS" + b"\0" * 40, "not an image that"),
    ],
)
def test_odd_files_are_read_or_refused_in_one_line(tmp_path: Path, name: str, data: bytes, words: str | None) -> None:
    (tmp_path / name).write_bytes(data)
    if words is None:
        assert mf.read_image(tmp_path / name).shape == (1, 3, 2, 2)
        return
    with pytest.raises(mf.PlanError, match=words) as caught:
        mf.read_image(tmp_path / name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("exif.jpg", saved("JPEG", exif=EXIF[:20]), "its EXIF is broken and was ignored"),
        ("exif.webp", saved("WEBP", exif=EXIF[:25]), "its EXIF is broken and was ignored"),
        ("clear.png", saved("PNG", mode="P", transparency=bytes([0, 128, *[255] * 254])), None),
        ("hdr.png", png((b"cICP", b"\x09\x10\0\1")), "coded with cICP 9/16, which is not converted"),
        ("linear.png", png((b"gAMA", (100000).to_bytes(4, "big"))), "coded with a gamma of 1, which is not converted"),
        ("usual.png", png((b"gAMA", (45455).to_bytes(4, "big")), (b"cICP", b"\1\r\0\1")), None),
        ("srgb.png", png((b"sRGB", b"\0"), (b"gAMA", (100000).to_bytes(4, "big"))), None),
    ],
)
def test_what_is_ignored_is_said_in_one_line_and_nothing_else_is(
    tmp_path: Path, name: str, data: bytes, words: str | None, recwarn: pytest.WarningsRecorder
) -> None:
    (tmp_path / name).write_bytes(data)
    with collect_notes() as notes:
        mf.read_image(tmp_path / name)
    assert not recwarn.list and len(notes) == (words is not None)
    assert words is None or (words in notes[0] and notes[0].startswith(str(tmp_path / name)) and "\n" not in notes[0])


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_pipes_devices_and_folders_are_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    for path in (tmp_path / "pipe.png", tmp_path, Path("/dev/zero")):
        for read in (mf.read_image, mf.read_record):
            with pytest.raises(mf.ResourceError, match="cannot be read"):
                read(path)
    (tmp_path / "x.png").write_bytes(png())
    (tmp_path / "link.png").symlink_to("x.png")
    assert mf.read_image(tmp_path / "link.png").shape == (1, 3, 2, 2)


def test_whatever_a_decoder_raises_is_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.png").write_bytes(png())
    for error in (struct.error("s"), IndexError("i"), SyntaxError("no"), RecursionError("deep")):
        monkeypatch.setattr(images, "_colours", lambda *a, error=error: (_ for _ in ()).throw(error))
        with pytest.raises(mf.PlanError, match="broken picture"):
            mf.read_image(tmp_path / "x.png")
    monkeypatch.setattr(images, "_colours", lambda *a: (_ for _ in ()).throw(MemoryError()))
    with pytest.raises(mf.ResourceError, match="does not fit into memory"):
        mf.read_image(tmp_path / "x.png")

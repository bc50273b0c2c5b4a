"""What the super-resolution stage alone adds and loses: real photographs and small text through six upscalers.

    python -m experiments.real.study [--out out/real] [--photographs 4]

Round trip: the middle 512x512 pixels of a photograph, made a quarter of the side (antialiased bicubic), enlarged x4 and
rounded to 8 bits; PSNR in decibels (per photograph, then the mean), SSIM (scikit-image's, Gaussian weights), the power
of the upper half of frequencies relative to the photograph's in decibels (0 is right, below is blur, above is invented
detail), and seconds on this machine.

Small text: words in DejaVu Sans on a photograph, at font sizes of 6 to 24 pixels of the final picture, through half
the side and back as the second stage of MrFlow does (a x4 network is followed by an antialiased resize). PP-OCR reads
each word's line, cut out and enlarged to 48 pixels of height. The score is one less the edits over the word's letters,
at least 0; the interval is 95 %, by bootstrap over words. Rows that must differ: the picture itself, and the same
readings held against another's word, which must be near 0.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from experiments.legibility import Box, legible
from experiments.real.packages import NETWORKS, PHOTOGRAPHS, network, photograph, shipped
from experiments.real.reader import read_line
from mrflow.protocols.upscaler import Upscaler
from mrflow.sweep.metrics import Lpips
from mrflow.sweep.statistics import interval
from mrflow.upscalers import Interpolate, Lanczos, load_upscaler

WORDS = (
    "harbour", "Market", "lantern", "VELVET", "quarter", "Juniper", "bridge", "OXFORD", "window", "Copper", "thistle",
    "GRAVEL", "meadow", "Signal", "walnut", "HEATHER",
)  # fmt: skip
HEIGHTS = (6, 8, 10, 12, 16, 24)


def middle(pixels: Tensor, side: int) -> Tensor:
    """The middle of a picture."""
    top, left = ((n - side) // 2 for n in pixels.shape[-2:])
    return pixels[..., top : top + side, left : left + side]


def upscalers(scale: int) -> dict[str, Upscaler]:
    """Two plain ones and the four trained networks, each to a given scale."""
    plain: dict[str, Upscaler] = {"bicubic": Interpolate(scale, "bicubic"), "lanczos": Lanczos(scale)}
    return plain | {name: load_upscaler(network(name)) for name in NETWORKS}


def resized(pixels: Tensor, side: int) -> Tensor:
    """Antialiased bicubic, in [0, 1]."""
    out = torch.nn.functional.interpolate(pixels, (side, side), mode="bicubic", antialias=True)
    return out.clamp(0, 1)


def eight_bit(pixels: Tensor) -> Tensor:
    """Rounded as a saved picture is."""
    return (255 * pixels.clamp(0, 1)).round() / 255


def high_band(pixels: Tensor) -> float:
    """Power above half of the highest frequency."""
    grey = pixels[0].mean(0)
    window = torch.hann_window(grey.shape[0], periodic=False)
    power = torch.fft.fft2((grey - grey.mean()) * window[:, None] * window).abs().square()
    f = torch.fft.fftfreq(grey.shape[0])
    return float(power[(f[:, None].square() + f.square()).sqrt() > 0.25].sum())


def perceptual(alexnet: Path | None) -> Callable[[Tensor, Tensor], float] | None:
    """LPIPS with the real linear weights, where the user gives torchvision's AlexNet checkpoint."""
    if alexnet is None:
        return None
    lpips = Lpips(str(alexnet), str(shipped("lpips", "weights/v0.1/alex.pth")))
    return lpips.distance


def round_trip(names: tuple[str, ...], out: Path, lpips: Callable[[Tensor, Tensor], float] | None) -> None:
    """The table and the picture of photographs."""
    from skimage.metrics import structural_similarity

    photos = [
        middle(photograph(name), min(512, *(n // 4 * 4 for n in photograph(name).shape[-2:])))[None] for name in names
    ]
    tiles: list[list[Tensor]] = [[resized(middle(p, 160), 160) for p in photos]]
    labels = ["photograph"]
    columns = ["upscaler", "PSNR", "SSIM", "upper band", *(["LPIPS"] if lpips else []), "seconds"]
    print("| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")
    for name, up in upscalers(4).items():
        rows, seconds = [], 0.0
        tiles.append([])
        labels.append(name)
        for photo in photos:
            low = eight_bit(resized(photo, photo.shape[-1] // 4))
            begin = time.perf_counter()
            made = eight_bit(up(low))
            seconds += time.perf_counter() - begin
            a, b = (x[0].permute(1, 2, 0).numpy() for x in (photo, made))
            ssim = structural_similarity(
                a, b, channel_axis=2, data_range=1.0, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
            )
            psnr = float(-10 * (photo - made).square().mean().log10())
            distance = lpips(made, photo) if lpips else 0.0
            rows.append((psnr, float(ssim), 10 * np.log10(high_band(made) / high_band(photo)), distance))
            tiles[-1].append(middle(made, 160))
        psnr, ssim, band, distance = np.mean(rows, axis=0)
        more = f" {distance:.3f} |" if lpips else ""
        print(f"| {name} | {psnr:.2f} | {ssim:.3f} | {band:+.1f} dB |{more} {seconds / len(photos):.2f} |", flush=True)
    sheet(tiles, labels, out / "real-upscalers.jpg")


def sheet(tiles: list[list[Tensor]], labels: list[str], path: Path) -> None:
    """One column an upscaler, one row a photograph."""
    side = tiles[0][0].shape[-1]
    image = Image.new("RGB", (len(tiles) * (side + 4), len(tiles[0]) * (side + 4) + 18), "white")
    draw = ImageDraw.Draw(image)
    for i, (column, label) in enumerate(zip(tiles, labels, strict=True)):
        draw.text((i * (side + 4) + 4, 3), label, fill="black")
        for j, tile in enumerate(column):
            values = (255 * tile[0].permute(1, 2, 0)).round().byte().numpy()
            image.paste(Image.fromarray(values), (i * (side + 4), j * (side + 4) + 18))
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, quality=92)


def page(height: int) -> tuple[Tensor, list[Box]]:
    """Words on a pale photograph, in 8 rows and 2 columns; and the box of each (left, top, right, bottom)."""
    ground = 0.35 + 0.65 * resized(middle(photograph("coffee.png"), 400)[None], 512)
    image = Image.fromarray((255 * ground[0].permute(1, 2, 0)).round().byte().numpy())
    font = ImageFont.truetype(str(shipped("matplotlib", "mpl-data/fonts/ttf/DejaVuSans.ttf")), height)
    draw, boxes = ImageDraw.Draw(image), list[Box]()
    for i, word in enumerate(WORDS):
        corner = 256 * (i % 2) + 24, 64 * (i // 2) + 32 - height // 2
        draw.text(corner, word, font=font, fill=(20, 20, 30))
        left, top, right, bottom = (int(v) for v in draw.textbbox(corner, word, font=font))
        room = max(2, height // 4)
        boxes.append((left - room, top - room, right + room, bottom + room))
    values = np.asarray(image, dtype=np.float32) / 255
    return torch.from_numpy(values).permute(2, 0, 1)[None].contiguous(), boxes


def small_text(out: Path) -> None:
    """The table and a picture of small text."""
    print("\n| path | " + " | ".join(f"{h} px" for h in HEIGHTS) + " |\n" + "|---" * (len(HEIGHTS) + 1) + "|")
    made = {h: page(h) for h in HEIGHTS}
    tiles, labels = list[list[Tensor]](), list[str]()

    def row(name: str, pictures: dict[int, Tensor], shift: int = 0) -> None:
        cells = []
        for h in HEIGHTS:
            scores = legible(pictures[h], WORDS, made[h][1], read_line, shift=shift)
            found = interval({word: [score] for word, score in zip(WORDS, scores, strict=True)}, draws=4000, share=True)
            cells.append(f"{found:.2f}")
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)
        if not shift:
            labels.append(name)
            tiles.append([pictures[h][..., 300:460, 10:170] for h in (6, 8, 12)])

    truth = {h: eight_bit(made[h][0]) for h in HEIGHTS}
    row("the picture itself", truth)
    row("control: another's word", truth, shift=1)
    for name, up in upscalers(2).items():
        row(name, {h: eight_bit(resized(up(eight_bit(resized(truth[h], 256))), 512)) for h in HEIGHTS})
    sheet(tiles, labels, out / "real-small-text.png")


def main() -> None:
    """Both tables, both pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/real"), help="folder of the pictures")
    parser.add_argument("--photographs", type=int, default=len(PHOTOGRAPHS), help="how many of them")
    parser.add_argument("--only", choices=("photographs", "text"), help="one of the two tables; both (default)")
    parser.add_argument("--alexnet", type=Path, help="torchvision's AlexNet checkpoint: adds a column of LPIPS")
    args = parser.parse_args()
    with torch.no_grad():
        if args.only != "text":
            round_trip(PHOTOGRAPHS[: args.photographs], args.out, perceptual(args.alexnet))
        if args.only != "photographs":
            small_text(args.out)


if __name__ == "__main__":
    main()

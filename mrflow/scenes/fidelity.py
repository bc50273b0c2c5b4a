"""How near a picture is to the best exact rendering of its caption: continuous scores beside those of reading.

All are taken against `fit`'s scene, so none punishes what the caption leaves open. Pixels are the picture's own. Edges
are looked at in coverage: 0 on what lies under a thing, 1 on the thing, by projection on the line between the two.
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from mrflow.scenes.fit import Adjustable, Edge, fit, pixels, render_floats
from mrflow.scenes.letters import Array
from mrflow.scenes.parameters import OpenScene
from mrflow.scenes.reading import scorable

CEILING = 60.0  # dB: rounding to 8 bits alone leaves 58.9
REACH = 4  # pixels within which a displaced edge is looked for
FINER = 4  # samples a pixel, of masks
BANDS = 4  # rings of spatial frequency, each 1/8 of a cycle a pixel wide
CORNER = 3  # half-width in pixels of the window about a corner
SOFT = 1.5  # standard deviation in pixels of the blur that a corner is told from


def fidelity(image: Array | Tensor, caption: str) -> dict[str, float]:
    """The scores of a picture, float (3, side, side) in [0, 1] with a side of at least 64; see `measure`.

    Raises:
        CaptionError: the caption is outside the grammar. PlanError: the picture cannot be scored.
        NonFiniteError: NaN or infinity in it.
    """
    target = scorable(image)
    return measure(target, fit(target, OpenScene.of(caption, target)))


def measure(image: Array, scene: Adjustable) -> dict[str, float]:
    """The scores of a picture (side, side, 3) against a scene that was fitted to it, by name.

    `psnr`: dB, at most 60. `boundary_iou`: of the things' inner boundaries (Cheng et al. 2021), in [0, 1]. `edge`: mean
    displacement of edges along their normals, in pixels, 0 to 4. `corner`: contrast kept at corners; 1 is all, less is
    rounded, more is sharpened. `glyph`, `expression`: mean margin of the right symbol over the best wrong one, 1 where
    all is right, 0 where both fit alike, -1 where it is the wrong one; `glyph.right`, `expression.right`: the share of
    margins above 0. `spectrum.1` (coarse) to `spectrum.4`: amplitude of the error over the rendering's, 0 and up.
    `rank.tint` and so on: where in its law's draws the scene lies, in [0, 1]; see `law_distance`. What the
    caption does not have is left out.
    """
    side = len(image)
    true, under = render_floats(scene, side), render_floats(scene.ground(), side)
    covers = [(_cover(image, under, edge), _cover(true, under, edge)) for edge in scene.edges]
    out = {"psnr": _psnr(image, true)}
    if covers:
        out |= {"boundary_iou": _boundary_iou(covers, side), "edge": _displacement(covers)}
    corners = [c for c in scene.corners if all(CORNER < v * side < side - CORNER for v in c)]
    if corners:
        out["corner"] = _corner(image, true, corners)
    out |= _margins(image, true, scene)
    out |= {f"spectrum.{i + 1}": v for i, v in enumerate(_spectrum(image, true))}
    return out | {f"rank.{name}": value for name, value in scene.ranks.items()}


def law_distance(ranks: Sequence[float] | NDArray[np.float64]) -> float:
    """How far ranks of many pictures are from uniform, in [0, 0.5]: the Wasserstein-1 distance, the area between the
    two distribution functions.

    0.25 where all pictures sit in the middle of the law, up to 0.5 where all sit at one of its ends. n true pictures
    give 0.31 / sqrt(n) on average.
    """
    at = np.sort(np.asarray(ranks, np.float64))
    steps = np.arange(len(at) + 1) / len(at)
    knots = np.unique(np.concatenate([[0.0, 1.0], at, steps]))
    share = np.searchsorted(at, knots[:-1], side="right") / len(at)
    low, high = knots[:-1], knots[1:]  # no crossing inside: every value of the step function is a knot
    return float(np.abs(share - (low + high) / 2) @ (high - low))


def _psnr(image: Array, true: Array) -> float:
    error = float(np.square(image - true, dtype=np.float64).mean())
    return min(CEILING, -10 * math.log10(max(error, 1e-12)))


def _cover(picture: Array, under: Array, edge: Edge) -> Array:
    """How much of each pixel about an edge's box is its paint, in [0, 1]."""
    at = pixels(edge.box, len(picture), margin=REACH + 2)
    start = under[at] if edge.under is None else np.asarray(edge.under, np.float32)
    way = np.asarray(edge.paint, np.float32) - start
    along = np.einsum("...c,...c->...", picture[at] - start, way)
    cover: Array = np.clip(along / np.maximum(np.einsum("...c,...c->...", way, way), 1e-6), 0, 1)
    return cover


def _boundary_iou(covers: Sequence[tuple[Array, Array]], side: int) -> float:
    """Masks are coverage of at least 1/2 on a grid `FINER` times finer, between pixels linear; boundaries are 1/128 of
    the side wide (2 pixels at 256)."""
    width, both, either = round(FINER * side / 128), 0, 0
    for pair in covers:
        a, b = (_boundary(_finer(cover) >= 0.5, width) for cover in pair)
        both, either = both + int((a & b).sum()), either + int((a | b).sum())
    return both / max(either, 1)


def _finer(cover: Array) -> Array:
    high, wide = cover.shape
    return np.asarray(Image.fromarray(cover).resize((FINER * wide, FINER * high), Image.Resampling.BILINEAR))


def _boundary(mask: NDArray[np.bool_], width: int) -> NDArray[np.bool_]:
    """The mask's pixels within a square of `width` pixels of what is not in it; beyond the borders all goes on."""
    core = mask
    for axis in (0, 1):
        left = width
        while left:  # an erosion by a, then by b, is one by a + b
            some = min(left, max(1, width - left))
            padded = np.pad(core, [(some, some) if a == axis else (0, 0) for a in (0, 1)], mode="edge")
            n = mask.shape[axis]
            core = np.logical_and.reduce([padded.take(range(i, i + n), axis) for i in (0, some, 2 * some)])
            left -= some
    boundary: NDArray[np.bool_] = mask & ~core
    return boundary


def _displacement(covers: Sequence[tuple[Array, Array]]) -> float:
    """The mean over the length of all edges; where none is within `REACH` pixels, that."""
    total = weight = 0.0
    for pair in covers:
        slope_y, slope_x = (np.gradient(pair[1], axis=axis) for axis in (0, 1))
        for found, true, along, across in (
            (*pair, slope_x, slope_y),
            (pair[0].T, pair[1].T, slope_y.T, slope_x.T),
        ):
            way, side = (np.abs(slope[:, :-1] + slope[:, 1:]) for slope in (along, across))
            crossing, at = _crossings(true)
            there = (crossing != 0) & (way >= side)  # the other edges are looked at in the other direction
            cosine = way[there] / np.hypot(way[there], side[there])
            apart = np.minimum(_nearest(found, crossing, at)[there] * cosine, REACH)
            total += float((apart / cosine).sum())  # each stands for a length of 1 / cosine
            weight += float((1 / cosine).sum())
    return total / max(weight, 1e-9)


def _crossings(cover: Array) -> tuple[NDArray[np.int8], Array]:
    """Where a row passes 1/2 between a pixel and the next (1 upwards, -1 downwards, else 0), and how far between."""
    above = cover >= 0.5
    way = above[:, 1:].astype(np.int8) - above[:, :-1].astype(np.int8)
    rise = cover[:, 1:] - cover[:, :-1]
    between = np.where(way != 0, (0.5 - cover[:, :-1]) / np.where(way != 0, rise, 1), 0)
    return way, between.astype(np.float32)


def _nearest(found: Array, crossing: NDArray[np.int8], at: Array) -> Array:
    """Pixels to the nearest crossing of the same direction in the same row; where none is near, twice `REACH`."""
    other, there = _crossings(np.pad(found, ((0, 0), (REACH, REACH)), mode="edge"))
    best = np.full(crossing.shape, 2 * REACH, np.float32)
    n = crossing.shape[1]
    for shift in range(-REACH, REACH + 1):
        window = slice(REACH + shift, REACH + shift + n)
        apart = np.abs(shift + there[:, window] - at)
        best = np.where((other[:, window] == crossing) & (apart < best), apart, best)
    return best


def _corner(image: Array, true: Array, corners: Sequence[tuple[float, float]]) -> float:
    """The regression of the picture's fine detail (less a blurred copy) on the rendering's, over all windows."""
    side = len(image)
    both = whole = 0.0
    for x, y in corners:
        at, wide = (pixels((x, y, x, y), side, margin=margin) for margin in (CORNER, CORNER + 6))
        inner = tuple(slice(a.start - b.start, a.stop - b.start) for a, b in zip(at, wide, strict=True))
        fine = [(picture[wide] - _soften(picture[wide]))[inner] for picture in (image, true)]
        both += float((fine[0] * fine[1]).sum())
        whole += float(np.square(fine[1]).sum())
    return both / max(whole, 1e-9)


def _soften(patch: Array) -> Array:
    """Blurred by a Gaussian of `SOFT` pixels; edges of the patch are repeated."""
    offsets = np.arange(-6, 7)
    row = np.exp(-(offsets**2) / (2 * SOFT**2)).astype(np.float32)
    for axis in (0, 1):
        padded = np.pad(patch, [(6, 6) if a == axis else (0, 0) for a in range(3)], mode="edge")
        n = patch.shape[axis]
        weights = enumerate(row / row.sum())
        patch = np.add.reduce([w * np.take(padded, np.arange(i, i + n), axis) for i, w in weights])
    return patch


def _margins(image: Array, true: Array, scene: Adjustable) -> dict[str, float]:
    """min over wrong symbols w of (|image - w|^2 - |image - right|^2) / |right - w|^2, the mean over slots."""
    side = len(image)
    out: dict[str, float] = {}
    for alphabet in sorted({slot.alphabet for slot in scene.slots}):
        slots = [slot for slot in scene.slots if slot.alphabet == alphabet]
        margins = np.full(len(slots), np.inf)
        for symbol in scene.alphabets[alphabet]:
            other = render_floats(scene.with_symbol(alphabet, symbol), side)
            for i, slot in enumerate(slots):
                if symbol != slot.symbol:
                    at = pixels(slot.box, side, margin=1)
                    way, rest = (other[at] - true[at]).ravel(), (image[at] - true[at]).ravel()
                    margins[i] = min(margins[i], 1 - 2 * float(rest @ way) / float(way @ way))
        out |= {alphabet: float(margins.mean()), f"{alphabet}.right": float((margins > 0).mean())}
    return out


def _spectrum(image: Array, true: Array) -> list[float]:
    """The amplitude of the error's luma over the rendering's, a ring each; the constant part and corners beyond 1/2 of
    a cycle a pixel are left out, and 1e-8 of the largest power keeps plain pictures finite."""
    side = len(image)
    luma = np.array([0.299, 0.587, 0.114], np.float32)
    radius = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None])
    ring = np.minimum(np.floor(radius * 2 * BANDS), BANDS).astype(np.int64)
    ring[0, 0] = BANDS
    twice = np.where((np.arange(side // 2 + 1) % (side / 2)) == 0, 1.0, 2.0)  # columns that stand for two
    powers = []
    for picture in (image - true, true):
        power = np.square(np.abs(np.fft.rfft2(picture @ luma))) * twice
        powers.append(np.bincount(ring.ravel(), power.ravel(), BANDS + 1)[:BANDS])
    return [math.sqrt(error / (whole + 1e-8 * side**4)) for error, whole in zip(*powers, strict=True)]

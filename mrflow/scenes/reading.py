"""Reads a picture back into facts, without a network and without knowing what should be in it.

The ground is found by its paleness, things by their distance from it; each is then classified among everything that the
grammar can say. All templates are drawn by `render` itself, on first use.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from mrflow.errors import NonFiniteError, PlanError
from mrflow.scenes.grammar import (
    COLOURS,
    EXPRESSIONS,
    LETTER_ADVANCE,
    LETTER_HEIGHT,
    PERIOD,
    SHAPES,
    SKIN,
    TEXTURES,
    Background,
    Face,
    Object,
    Scene,
    Word,
)
from mrflow.scenes.letters import SIDE, Array, darkness, length, letters_area, read_letters
from mrflow.scenes.render import INK, TEXTURE, render, stroke_of

PATCH = 32  # shapes and faces are compared on PATCH x PATCH samples
EXTENT = 1.75  # half-width of a shape's patch, in radii of the disc of equal area
FOREGROUND = 0.17  # RGB distance from the ground's colours beyond which a pixel belongs to a thing
MIN_AREA = 0.006  # smallest thing, as a fraction of the picture; the smallest drawn one is 0.019
MIN_SHAPE, MIN_EXPRESSION, MIN_TEXTURE = 0.80, 0.55, 0.50  # similarities below which nothing is read
MIN_WORD = 0.12  # share of a picture's ink that a word must explain
MIN_CONTRAST = 0.08  # darkening below which a ground is plain; a drawn texture has 0.24
UNKNOWN = "unknown"
_NAMES = (*COLOURS, "skin")
_PALETTE = np.array([*COLOURS.values(), SKIN], np.float32)
_WHITE = Background((1.0, 1.0, 1.0))


@dataclass(frozen=True)
class Facts:
    """What was found in a picture; shapes, expressions and letters that match nothing are "unknown", "none" and "?".

    `ground` is None where no pale ground was found; then nothing else is read either.
    """

    ground: Background | None = None
    objects: tuple[Object, ...] = ()
    faces: tuple[Face, ...] = ()
    word: Word | None = None

    def __str__(self) -> str:
        """One line for people."""
        if self.ground is None:
            return "nothing: no pale ground"
        parts = [f"{o.colour} {o.shape} of radius {o.radius:.2f} at ({o.x:.2f}, {o.y:.2f})" for o in self.objects]
        parts += [f"face ({f.expression}) of radius {f.radius:.2f} at ({f.x:.2f}, {f.y:.2f})" for f in self.faces]
        parts += [f"{self.word.colour} word {self.word.text!r} of height {self.word.height:.2f}"] if self.word else []
        texture, period = self.ground.texture, self.ground.period
        return "; ".join([*parts, f"{texture} ground" + ("" if texture == "plain" else f" of period {period:g}")])


def read_facts(pixels: Array | Tensor) -> Facts:
    """What is in a picture, float (3, side, side) in [0, 1], without knowing what should be."""
    image = _working_copy(pixels)
    tint = find_tint(image)
    if tint is None:
        return Facts()
    # Distance from the segment between the tint and its texture's colour, a little longer at both ends.
    along = np.clip(image @ tint / float(tint @ tint), TEXTURE - 0.06, 1.06)
    distance = length((image - along[..., None] * tint).astype(np.float32))
    things = distance > FOREGROUND
    objects: list[Object] = []
    faces: list[Face] = []
    for mask in _components(things):
        thing = _thing(image, distance, mask)
        if thing.colour == "skin" and thing.shape == "circle":
            faces.append(Face(_expression(image, thing), thing.x, thing.y, thing.radius))
        else:
            objects.append(thing)
    texture, period = _texture(image @ tint / float(tint @ tint), ~_grow(things))
    ground = Background((float(tint[0]), float(tint[1]), float(tint[2])), texture, period)
    word = _word(image, tint) if texture == "plain" else None
    if word is not None:  # its letters are no objects
        objects = [o for o in objects if o.shape != UNKNOWN or abs(o.y - word.y) > word.height / 2]
    return Facts(ground, tuple(objects), tuple(faces), word)


def scorable(pixels: Array | Tensor) -> Array:
    """A picture that can be scored as (side, side, 3), clipped to [0, 1].

    Raises:
        PlanError: another shape. NonFiniteError: NaN or infinity in it.
    """
    array = pixels.detach().float().cpu().numpy() if isinstance(pixels, Tensor) else np.asarray(pixels, np.float32)
    if array.ndim != 3 or array.shape[0] != 3 or array.shape[1] != array.shape[2] or array.shape[1] < 64:
        raise PlanError(f"a picture of shape {array.shape} cannot be scored; give (3, side, side), side 64 or more")
    if not np.isfinite(array).all():
        raise NonFiniteError("a picture with NaN or infinity cannot be scored; look at the stage that made it")
    image: Array = np.clip(array.transpose(1, 2, 0), 0, 1)
    return image


def _working_copy(pixels: Array | Tensor) -> Array:
    """(SIDE, SIDE, 3), resized by an antialiased triangle filter."""
    image = scorable(pixels)
    if image.shape[0] == SIDE:
        return np.ascontiguousarray(image)
    octets = Image.fromarray((image * 255 + 0.5).astype(np.uint8))
    return np.asarray(octets.resize((SIDE, SIDE), Image.Resampling.BILINEAR), np.float32) / np.float32(255)


def find_tint(image: Array) -> Array | None:
    """The ground's lighter colour: the median of the pale pixels, or of their lighter class where there are two."""
    pale = image[np.minimum(np.minimum(image[..., 0], image[..., 1]), image[..., 2]) > 0.5]
    if len(pale) < 0.2 * image.shape[0] * image.shape[1]:
        return None
    light = pale @ np.full(3, 1 / 3, np.float32)
    counts, edges = np.histogram(light, 64)
    centres = (edges[:-1] + edges[1:]) / 2
    below, total = np.cumsum(counts)[:-1], len(light)
    sums = np.cumsum(counts * centres)
    between = np.square(sums[-1] * below / total - sums[:-1]) / np.maximum(below * (total - below), 1)  # Otsu
    cut = float(edges[1 + int(between.argmax())])
    upper, lower = pale[light >= cut], pale[light < cut]
    two = min(len(upper), len(lower)) > 0.1 * total and lower.mean() / upper.mean() < (1 + TEXTURE) / 2
    tint: Array = np.median(upper if two else pale, axis=0)
    return tint


def _components(mask: NDArray[np.bool_]) -> list[NDArray[np.bool_]]:
    """The 4-connected parts of a mask that are larger than `MIN_AREA`, by union-find over the runs of each row."""
    parent: list[int] = []
    runs: list[tuple[int, int, int]] = []

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    steps = np.diff(np.pad(mask, ((0, 0), (1, 1))).astype(np.int8), axis=1)
    starts, stops = np.argwhere(steps == 1).tolist(), np.argwhere(steps == -1).tolist()
    previous = first = 0
    for i, ((row, start), (_, stop)) in enumerate(zip(starts, stops, strict=True)):
        parent.append(i)
        if i and runs[-1][0] != row:
            previous, first = (first, i) if runs[-1][0] == row - 1 else (i, i)
        for j in range(previous, first):
            if runs[j][1] < stop and start < runs[j][2]:
                parent[root(j)] = root(i)
        runs.append((row, start, stop))
    groups: dict[int, list[tuple[int, int, int]]] = {}
    for i, run in enumerate(runs):
        groups.setdefault(root(i), []).append(run)
    found: list[NDArray[np.bool_]] = []
    for group in groups.values():
        if sum(stop - start for _, start, stop in group) >= MIN_AREA * mask.size:
            part = np.zeros_like(mask)
            for row, start, stop in group:
                part[row, start:stop] = True
            found.append(part)
    return found


def _grow(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The mask with two more pixels on every side."""
    for _ in range(2):
        p = np.pad(mask, 1)
        mask = p[1:-1, 1:-1] | p[:-2, 1:-1] | p[2:, 1:-1] | p[1:-1, :-2] | p[1:-1, 2:]
    return mask


def _colour(colours: Array) -> str:
    """The palette's name that most of the pixels (n, 3) are nearest to."""
    nearest = np.square(colours[:, None] - _PALETTE).sum(-1).argmin(-1)
    return _NAMES[int(np.bincount(nearest, minlength=len(_NAMES)).argmax())]


def _thing(image: Array, distance: Array, mask: NDArray[np.bool_]) -> Object:
    """Name the shape and colour of one part; the centre and radius are those of the best template."""
    middle = float(np.median(distance[mask]))
    cover: Array = np.where(mask, np.clip(distance / middle, 0, 1), 0).astype(np.float32)
    patch, x, y, radius = _patch(cover)
    templates = _shape_templates()
    total = float(patch.sum())
    agree = {name: 1 - float(np.abs(patch - t[0]).sum() / (total + t[0].sum())) for name, t in templates.items()}
    shape = max(agree, key=lambda name: agree[name])
    _, dx, dy, unit = templates[shape]
    radius /= unit
    if agree[shape] < MIN_SHAPE:
        shape, dx, dy = UNKNOWN, 0.0, 0.0
    return Object(shape, _colour(image[mask & (distance > 0.75 * middle)]), x - dx * radius, y - dy * radius, radius)


def _patch(cover: Array) -> tuple[Array, float, float, float]:
    """A cover map cut out about its centroid, scaled by its area; the centroid and the equal-area radius."""
    n = len(cover)
    area = float(cover.sum())
    at = np.arange(n, dtype=np.float32) + 0.5
    x, y, radius = float(cover.sum(0) @ at) / area, float(cover.sum(1) @ at) / area, math.sqrt(area / math.pi)
    return _cut(cover, x, y, EXTENT * radius), x / n, y / n, radius / n


def _cut(values: Array, x: float, y: float, half: float) -> Array:
    """PATCH x PATCH samples of a square about (x, y), in pixels; outside the picture is 0."""
    pad = max(0, math.ceil(half - min(x, y, len(values) - x, len(values) - y)))
    box = (x - half + pad, y - half + pad, x + half + pad, y + half + pad)
    padded = Image.fromarray(np.pad(values, pad).astype(np.float32))
    return np.asarray(padded.resize((PATCH, PATCH), Image.Resampling.BILINEAR, box), np.float32)


@cache
def _shape_templates() -> dict[str, tuple[Array, float, float, float]]:
    """For each shape: its patch, centroid minus centre in radii, and equal-area radius in radii."""
    found: dict[str, tuple[Array, float, float, float]] = {}
    for shape in SHAPES:
        drawn = render(Scene("object", _WHITE, (Object(shape, "black", 0.5, 0.5, 0.25),)), SIDE)
        patch, x, y, radius = _patch(darkness(drawn))
        found[shape] = (patch, (x - 0.5) / 0.25, (y - 0.5) / 0.25, radius / 0.25)
    return found


def _expression(image: Array, face: Object) -> str:
    """The expression whose mouth fits best, if there is a mouth and there are eyes."""
    ink = _ink(image)
    r = face.radius * SIDE
    fits = {name: [0.0, 0.0] for name in EXPRESSIONS}
    for dy in (-0.06, 0.0, 0.06):
        for dx in (-0.06, 0.0, 0.06):
            patch = _cut(ink, face.x * SIDE + dx * r, face.y * SIDE + dy * r, r) * _disc()
            for name, template in _face_templates().items():
                for half in (0, 1):  # eyes above, mouth below
                    rows = slice(half * PATCH // 2, (half + 1) * PATCH // 2)
                    fits[name][half] = max(fits[name][half], _fit(patch[rows], template[rows]))
    best = max(fits, key=lambda name: fits[name][1])
    return best if min(fits[best]) >= MIN_EXPRESSION else "none"


def _fit(a: Array, t: Array) -> float:
    """Cosine between two patches; 0 where the ink is too faint to be meant."""
    dot, energy = float((a * t).sum()), float(np.square(t).sum())
    return dot / math.sqrt(energy * float(np.square(a).sum())) if dot > 0.4 * energy else 0.0


@cache
def _face_templates() -> dict[str, Array]:
    """For each expression: its ink inside the face's disc."""
    found: dict[str, Array] = {}
    for expression in EXPRESSIONS:
        drawn = render(Scene("face", _WHITE, faces=(Face(expression, 0.5, 0.5, 0.3),)), SIDE)
        ink = _ink(drawn.astype(np.float32) / np.float32(255))
        found[expression] = _cut(ink, SIDE / 2, SIDE / 2, 0.3 * SIDE) * _disc()
    return found


@cache
def _disc() -> Array:
    """1 inside 0.85 of a face's radius, where all its features are."""
    at = (np.arange(PATCH, dtype=np.float32) + 0.5) * 2 / PATCH - 1
    return (np.square(at)[:, None] + np.square(at)[None] < 0.85**2).astype(np.float32)


def _ink(image: Array) -> Array:
    """How far each pixel is on the way from skin to ink, in [0, 1]."""
    skin = np.array(SKIN, np.float32)
    towards = np.array(INK, np.float32) - skin
    return np.clip((image - skin) @ towards / float(towards @ towards), 0, 1).astype(np.float32)


def _texture(light: Array, visible: NDArray[np.bool_]) -> tuple[str, float]:
    """The texture and period that correlate best with the visible ground's darkness, in any phase, or plain.

    Visible pixels are summed over all tiles of one period, then correlated with one tile of the texture in every
    shift: this is the correlation of the whole ground with the whole texture.
    """
    seen = visible.astype(np.float32)
    n = float(seen.sum())
    best, answer = MIN_TEXTURE, ("plain", PERIOD["medium"])
    if n < 0.1 * seen.size:
        return answer
    dark = (1 - light) * seen
    dark -= seen * (dark.sum() / n)
    power = max(float(np.square(dark).sum()), 1e-9)
    both = np.stack([seen, dark])
    for (texture, period), wave in _texture_waves().items():
        side = len(wave)
        folds = both.reshape(2, SIDE // side, side, SIDE // side, side).sum((1, 3))
        sums = np.fft.irfft2(np.fft.rfft2(folds) * wave, s=(side, side))
        spread = np.maximum(sums[0] * (1 - sums[0] / n), 1)  # squares of the centred mask, summed
        fit = np.where(sums[1] > MIN_CONTRAST * spread, sums[1] / np.sqrt(spread * power), 0)
        if fit.max() > best:
            best, answer = float(fit.max()), (texture, period)
    return answer


@cache
def _texture_waves() -> dict[tuple[str, float], NDArray[np.complexfloating]]:
    """For every texture and density: the conjugate Fourier transform of one period (whole pixels), where 1 is dark."""
    found: dict[tuple[str, float], NDArray[np.complexfloating]] = {}
    for texture in TEXTURES:
        for period in PERIOD.values():
            side = round(period * SIDE)
            drawn = render(Scene("object", Background((1.0, 1.0, 1.0), texture, period)), SIDE)[:side, :side, 0]
            tile = (255 - drawn.astype(np.float32)) / (255 * (1 - TEXTURE))
            found[texture, period] = np.conj(np.fft.rfft2(tile))
    return found


def _word(image: Array, tint: Array) -> Word | None:
    """Read one row of capitals: its height from the rows with ink, then every slot among 26 letters and blank.

    The colour is the tint minus what the row lacks of it over the letters' area, which no blur changes.
    """
    distance = length(image - tint)
    things = distance > FOREGROUND
    if things.sum() < 0.002 * things.size:
        return None
    ink: Array = np.clip(distance / np.float32(np.percentile(distance[things], 85)), 0, 1)
    rows = (ink > 0.5).sum(1) >= 2
    edges = np.flatnonzero(np.diff(np.pad(rows, 1).astype(np.int8))).reshape(-1, 2)
    if not len(edges):
        return None
    top, bottom = max(edges.tolist(), key=lambda edge: float(ink[edge[0] : edge[1]].sum()))
    heights = {size: SIDE * (h + stroke_of(h, LETTER_ADVANCE[size])) for size, h in LETTER_HEIGHT.items()}
    size = nearest_size(bottom - top, heights)
    text, explained = read_letters(ink, size, round((top + bottom) / 2))
    if 2 * sum(letter.isalpha() for letter in text) < max(len(text), 1) or explained < MIN_WORD:
        return None
    lacking = (tint - image[max(0, top - 3) : bottom + 3]).sum((0, 1))
    colour = _colour((tint - lacking / letters_area(text, size))[None])
    return Word(text, colour, (top + bottom) / 2 / SIDE, LETTER_HEIGHT[size], LETTER_ADVANCE[size])


def nearest_size(value: float, sizes: Mapping[str, float]) -> str:
    """The name of the size that is nearest in ratio."""
    return min(sizes, key=lambda name: abs(math.log(value / sizes[name])))

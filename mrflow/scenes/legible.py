"""Reads what a caption of the hard world names: every letter, face, cell and object against all it might have been.

Where things are and how the ground is tinted is fitted first, for no caption names it. Then each part is compared
with renderings of its alternatives, moved by up to a hundredth of the side, by normalised correlation. A part is right
if the named alternative fits best, well enough, and strongly enough to be meant.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from mrflow.scenes.grammar import (
    COLOURS,
    DAYLIGHT,
    LETTERS,
    SHAPES,
    SKIN,
    Background,
    CaptionError,
    Face,
    Object,
    Scene,
    Word,
)  # fmt: skip
from mrflow.scenes.hard import FEELINGS, HARD, PERIODS, WEAVES, parse_hard
from mrflow.scenes.letters import Array, length
from mrflow.scenes.looks import restyle
from mrflow.scenes.reading import find_tint, scorable
from mrflow.scenes.render import TEXTURE, letter_boxes, render, render_window

LEAST = 256  # smaller pictures are enlarged to this side before they are read
SLACK = 0.02  # how far beyond the world's freedom things are looked for, of the side
MIN_LETTER, MIN_FACE, MIN_SHAPE, MIN_TEXTURE = 0.6, 0.7, 0.8, 0.5  # correlations below which nothing is read
LIGHTEST = 1.06  # of a ground's channel, in the light of the look: what is lighter was drawn in another
FAINT = 0.35  # of the drawn contrast, below which nothing is read
READ_BY = ("letters", "expressions", "cells", "odd", "binding", "texture")
_NAMES = (*COLOURS, "skin")
_PALETTE = np.array([*COLOURS.values(), SKIN], np.float32)


@dataclass(frozen=True)
class CaptionPart:
    """One thing that a caption names: its category of `READ_BY`, what was said and what was read ("" for nothing)."""

    category: str
    said: str
    read: str

    @property
    def right(self) -> bool:
        """Whether the picture shows what was said."""
        return self.said == self.read


def read_parts(pixels: Array | Tensor, caption: str, *, look: str = "") -> list[CaptionPart]:
    """Every part of a picture, float (3, side, side) in [0, 1], of a caption of the hard world.

    `look` names another way to draw (`mrflow.scenes.looks`): its letters and shapes are what is looked for.

    Raises:
        CaptionError: the caption is of neither grammar, or of the older world. PlanError: the picture cannot be
            scored, or there is no such look.
    """
    scene, image = restyle(parse_hard(caption), look), _working_copy(scorable(pixels))
    if scene.look is not None and scene.look.light != DAYLIGHT:
        image = (image / np.array(scene.look.light, np.float32)).astype(np.float32)
        scene = replace(scene, look=replace(scene.look, light=DAYLIGHT))
    if scene.kind not in _READERS:
        raise CaptionError(f"caption {caption[:80]!r} is of the older world; mrflow.scenes.score reads it")
    tint = find_tint(image)
    if tint is None or tint.max() > LIGHTEST:
        return [replace(part, read="") for part in _named_scene(scene)]
    red, green, blue = (float(channel) for channel in tint)
    scene = replace(scene, background=replace(scene.background, tint=(red, green, blue)))
    return _READERS[scene.kind](image, scene)


def hard_score(pixels: Array | Tensor, caption: str, *, look: str = "") -> dict[str, float]:
    """The share of right parts in each category that the caption speaks of, and their mean as `overall`."""
    return _shares(read_parts(pixels, caption, look=look))


def _shares(parts: Iterable[CaptionPart]) -> dict[str, float]:
    found: dict[str, list[bool]] = {}
    for part in parts:
        found.setdefault(part.category, []).append(part.right)
    shares = {name: sum(rights) / len(rights) for name, rights in found.items()}
    return {**shares, "overall": sum(shares.values()) / len(shares)}


def _working_copy(image: Array) -> Array:
    """The picture (side, side, 3), of at least `LEAST`."""
    if len(image) >= LEAST:
        return image
    octets = Image.fromarray((image * 255 + 0.5).astype(np.uint8))
    return np.asarray(octets.resize((LEAST, LEAST), Image.Resampling.BICUBIC), np.float32) / np.float32(255)


def _named_scene(scene: Scene) -> list[CaptionPart]:
    """What the caption names, as if all of it were read."""
    if scene.kind == "sign":
        return [CaptionPart("letters", letter, letter) for word in scene.words for letter in word.text]
    if scene.kind == "faces":
        return [CaptionPart("expressions", face.expression, face.expression) for face in scene.faces]
    names = [_name(o.colour, o.shape) for o in scene.objects]
    if scene.kind == "grid":
        odd = _odd(scene)
        return [CaptionPart("odd" if i == odd else "cells", name, name) for i, name in enumerate(names)]
    parts = [CaptionPart("binding", name, name) for name in names]
    ground = _weave(scene.background.texture, scene.background.period)
    return parts if scene.kind == "objects" else [*parts, CaptionPart("texture", ground, ground)]


def _name(colour: str, shape: str) -> str:
    return f"{colour} {shape}"


def _weave(texture: str, period: float) -> str:
    return f"1/{1 / period:.0f} {texture}"


def _odd(scene: Scene) -> int:
    """The cell that is like no other."""
    first, second, third = ((o.colour, o.shape) for o in scene.objects[:3])
    common = first if first in (second, third) else second
    return next(i for i, o in enumerate(scene.objects) if (o.colour, o.shape) != common)


# ------------------------------------------------------------------------------------------------------------ readers


def _sign(image: Array, scene: Scene) -> list[CaptionPart]:
    map_ = _distance(scene.background)
    scene = _move(scene, *_place(map_(image), map_(_render(scene, len(image))), len(image)))
    parts: list[CaptionPart] = []
    for word in scene.words:
        for i, (letter, (x, y, w, h)) in enumerate(zip(word.text, letter_boxes(word), strict=True)):
            box = _box(x - 0.3 * w, y - 0.18 * h, x + 1.3 * w, y + 1.18 * h, len(image))
            left = word.x + (i - (len(word.text) - 1) / 2) * word.advance  # of a word of this letter alone
            singles = {other: Word(other, word.colour, word.y, word.height, word.advance, left) for other in LETTERS}
            scenes = {name: _only(scene, words=(one,)) for name, one in singles.items()}
            parts.append(CaptionPart("letters", letter, _nearest(map_, image, scenes, box, MIN_LETTER)[0]))
    return parts


def _faces(image: Array, scene: Scene) -> list[CaptionPart]:
    map_ = _distance(scene.background)
    scene = _move(scene, *_place(map_(image), map_(_render(scene, len(image))), len(image)))
    parts: list[CaptionPart] = []
    for f in scene.faces:
        r = 1.15 * f.radius
        box = _box(f.x - r, f.y - r, f.x + r, f.y + r, len(image))
        scenes = {feeling: _only(scene, faces=(Face(feeling, f.x, f.y, f.radius),)) for feeling in FEELINGS}
        parts.append(CaptionPart("expressions", f.expression, _nearest(_plain, image, scenes, box, MIN_FACE)[0]))
    return parts


def _grid(image: Array, scene: Scene) -> list[CaptionPart]:
    map_ = _distance(scene.background)
    odd = _odd(scene)
    scene = _move(scene, *_place(map_(image), map_(_render(scene, len(image))), len(image)))
    return [
        CaptionPart("odd" if i == odd else "cells", _name(o.colour, o.shape), _thing(map_, image, scene, o))
        for i, o in enumerate(scene.objects)
    ]


def _objects(image: Array, scene: Scene) -> list[CaptionPart]:
    map_ = _distance(scene.background)
    seen = map_(image)
    plain = Background(scene.background.tint)
    parts: list[CaptionPart] = []
    for o in scene.objects:
        alone = replace(_only(scene, objects=(o,)), background=plain)
        reach = o.radius + HARD.free + 2 * SLACK
        box = _box(o.x - reach, o.y - reach, o.x + reach, o.y + reach, len(image))
        best, found = -1.0, o
        for shape in SHAPES:  # each is looked for in all of the object's room
            place, fit = _best(seen, map_(_render(replace(alone, objects=(replace(o, shape=shape),)), len(image))), box)
            if fit > best:
                best, found = fit, replace(o, x=o.x + place[0], y=o.y + place[1])
        parts.append(
            CaptionPart(
                "binding", _name(o.colour, o.shape), _thing(map_, image, replace(scene, background=plain), found)
            )
        )
    return parts


def _texture(image: Array, scene: Scene) -> list[CaptionPart]:
    """The object, and the weave and period of the strongest pattern of the ground."""
    parts = _objects(image, scene)
    tint = np.array(scene.background.tint, np.float32)
    hidden = _distance(scene.background)(image)[..., 0] > 0.17
    for _ in range(3):
        p = np.pad(hidden, 1)
        hidden = p[1:-1, 1:-1] | p[:-2, 1:-1] | p[2:, 1:-1] | p[1:-1, :-2] | p[1:-1, 2:]
    light = np.where(hidden, 0, image @ tint / float(tint @ tint))
    seen = float((~hidden).sum())
    said = _weave(scene.background.texture, scene.background.period)
    if seen < 0.1 * hidden.size:
        return [*parts, CaptionPart("texture", said, "")]
    light = np.where(hidden, 0, light - light.sum() / seen)
    power = float(np.square(light).sum()) + 1e-9
    at = (np.arange(len(image)) + 0.5) / len(image)
    best, read = MIN_TEXTURE, ""
    for weave in WEAVES:
        ways = ((1, 0),) if weave == "stripes" else ((1, 1), (1, -1))
        for period in PERIODS.values():
            turn = {k: np.exp(-2j * math.pi * at * k / period) for k in (-1, 0, 1)}
            found = sum(2 * abs(turn[dy] @ light @ turn[dx]) ** 2 / seen for dx, dy in ways)
            share = (8 / math.pi**2) ** len(ways)  # of a square wave's power in its fundamental; of checks, the square
            drawn = share * seen * ((1 - TEXTURE) / 2) ** 2
            if found / (power * share) > best and found > FAINT**2 * drawn:
                best, read = found / (power * share), _weave(weave, period)
    return [*parts, CaptionPart("texture", said, read)]


_READERS: dict[str, Callable[[Array, Scene], list[CaptionPart]]] = {
    "sign": _sign,
    "faces": _faces,
    "grid": _grid,
    "objects": _objects,
    "texture": _texture,
}


# ---------------------------------------------------------------------------------------------------------- machinery


def _thing(map_: "Map", image: Array, scene: Scene, o: Object) -> str:
    """Colour and shape of the object there: "" if it is like none."""
    r = 1.12 * o.radius
    box = _box(o.x - r, o.y - r, o.x + r, o.y + r, len(image))
    scenes = {shape: _only(scene, objects=(replace(o, shape=shape),)) for shape in SHAPES}
    shape, (dx, dy) = _nearest(map_, image, scenes, box, MIN_SHAPE)
    if not shape:
        return ""
    cover = map_(_window(scenes[shape], len(image), box))[..., 0]
    left, top, right, bottom = box
    there = np.pad(image, ((64, 64), (64, 64), (0, 0)), mode="edge")
    there = there[top + dy + 64 : bottom + dy + 64, left + dx + 64 : right + dx + 64]
    inside = there[cover > 0.9 * cover.max()]
    nearest = np.square(np.median(inside, axis=0) - _PALETTE).sum(-1).argmin()
    return _name(_NAMES[int(nearest)], shape)


Map = Callable[[Array], Array]


def _plain(image: Array) -> Array:
    return image


def _distance(ground: Background) -> Map:
    """How far each pixel's colour is from the ground's, (h, w, 1): linear in how much of the pixel a thing covers."""
    tint = np.array(ground.tint, np.float32)
    plain = ground.texture == "plain"  # else any tone of it is ground: of a fine texture, its lightest is hard to find

    def distance(image: Array) -> Array:
        if plain:
            return length(image - tint)[..., None]
        along = np.clip(image @ tint / float(tint @ tint), TEXTURE - 0.1, 1 / TEXTURE + 0.1)
        return length((image - along[..., None] * tint).astype(np.float32))[..., None]

    return distance


def _render(scene: Scene, side: int) -> Array:
    """A rendering on a plain ground."""
    drawn = render(replace(scene, background=Background(scene.background.tint)), side)
    return drawn.astype(np.float32) / np.float32(255)


def _window(scene: Scene, side: int, box: tuple[int, int, int, int]) -> Array:
    return render_window(scene, side, box).astype(np.float32) / np.float32(255)


def _box(left: float, top: float, right: float, bottom: float, side: int) -> tuple[int, int, int, int]:
    return math.floor(left * side), math.floor(top * side), math.ceil(right * side), math.ceil(bottom * side)


def _only(
    scene: Scene, *, objects: tuple[Object, ...] = (), faces: tuple[Face, ...] = (), words: tuple[Word, ...] = ()
) -> Scene:
    """The scene's ground and look with these things alone."""
    return replace(scene, objects=objects, faces=faces, words=words)


def _move(scene: Scene, dx: float, dy: float) -> Scene:
    return replace(
        scene,
        objects=tuple(replace(o, x=o.x + dx, y=o.y + dy) for o in scene.objects),
        faces=tuple(replace(f, x=f.x + dx, y=f.y + dy) for f in scene.faces),
        words=tuple(replace(w, x=w.x + dx, y=w.y + dy) for w in scene.words),
    )


def _place(seen: Array, drawn: Array, side: int) -> tuple[float, float]:
    """The move, in sides, that lays `drawn` best upon `seen`, among those that the world has."""
    return _best(seen, drawn, (0, 0, side, side))[0]


def _best(seen: Array, drawn: Array, box: tuple[int, int, int, int]) -> tuple[tuple[float, float], float]:
    """The move (in sides) of the largest normalised correlation of two maps (side, side, 1) in a box, and its value."""
    side, most = len(seen), math.ceil((HARD.free + SLACK) * len(seen))
    left, top, right, bottom = box[0] - most, box[1] - most, box[2] + most, box[3] + most
    pad = max(0, -left, -top, right - side, bottom - side)

    def cut(map_: Array) -> Array:
        padded = np.pad(map_[..., 0], pad)
        return padded[top + pad : bottom + pad, left + pad : right + pad]

    a, t = cut(seen), cut(drawn)
    power = float(np.square(t).sum())
    spectrum = np.fft.rfft2(a) * np.conj(np.fft.rfft2(t))
    dots = np.fft.irfft2(spectrum, a.shape)
    moves = np.r_[0 : most + 1, -most:0]
    table = dots[np.ix_(moves, moves)]
    j, i = np.unravel_index(int(table.argmax()), table.shape)
    dy, dx = int(moves[j]), int(moves[i])
    y, x = dy + _peak(dots, dy, dx, 0), dx + _peak(dots, dy, dx, 1)
    under = np.roll(t > 0.02, (dy, dx), (0, 1))
    grown = under | np.roll(under, 2, 0) | np.roll(under, -2, 0) | np.roll(under, 2, 1) | np.roll(under, -2, 1)
    fit = float(table.max()) / math.sqrt(power * float(np.square(a[grown]).sum()) + 1e-9)
    return (x / side, y / side), fit


def _peak(dots: NDArray[np.float64], dy: int, dx: int, axis: int) -> float:
    """Where between pixels a parabola through three values is highest."""
    low, mid, high = (float(dots[dy + s * (axis == 0), dx + s * (axis == 1)]) for s in (-1, 0, 1))
    bend = low - 2 * mid + high
    return 0.0 if bend >= 0 else max(-0.5, min(0.5, 0.5 * (low - high) / bend))


def _nearest(
    map_: Map, image: Array, scenes: dict[str, Scene], box: tuple[int, int, int, int], least: float
) -> tuple[str, tuple[int, int]]:
    """The name of the scene whose rendering in the box correlates best with the picture, and its move in pixels.

    "" where the best correlation is below `least`, or its contrast is below `FAINT` of the drawn one.
    """
    side, most = len(image), math.ceil(len(image) / 128)
    left, top, right, bottom = box
    pad = max(0, most - left, most - top, right + most - side, bottom + most - side)
    padded = np.pad(image, ((pad, pad), (pad, pad), (0, 0)), mode="edge")
    here = padded[top - most + pad : bottom + most + pad, left - most + pad : right + most + pad]
    mapped = map_(here)
    shape = (bottom - top, right - left)
    windows = np.lib.stride_tricks.sliding_window_view(mapped, shape, axis=(0, 1))
    moves = windows.shape[0], windows.shape[1]
    a = windows.reshape(moves[0] * moves[1], -1)
    a = a - a.mean(1, keepdims=True)
    rows = [map_(_window(scene, side, box)).transpose(2, 0, 1).ravel() for scene in scenes.values()]
    t = np.stack(rows)
    t = t - t.mean(1, keepdims=True)
    dots = a @ t.T
    power = np.square(t).sum(1)
    fits = dots / np.sqrt(np.square(a).sum(1)[:, None] * power + 1e-9)
    move, name = divmod(int(fits.argmax()), len(rows))
    dy, dx = divmod(move, moves[1])
    if fits[move, name] < least or dots[move, name] < FAINT * power[name]:
        return "", (0, 0)
    return tuple(scenes)[name], (dx - most, dy - most)

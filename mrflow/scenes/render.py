"""Draws a scene at any resolution, antialiased: the same scene at 128 and at 1024 pixels shows the same things."""

import math

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from mrflow.scenes.grammar import COLOURS, DAYLIGHT, SKIN, Background, Face, Look, Object, Point, Scene, Word

INK = (0.10, 0.08, 0.08)
TEXTURE = 0.76  # how much darker a texture is than its ground
DOT = 0.30  # radius of a dot, as a fraction of the period
STROKE = 0.20  # stroke width of a letter, as a fraction of its height
USUAL = Look()


def arc(cx: float, cy: float, rx: float, ry: float, start: float, stop: float, n: int = 14) -> tuple[Point, ...]:
    """Points on an ellipse, angles in degrees, 0 to the right, growing clockwise on the screen."""
    angles = [math.radians(start + (stop - start) * i / n) for i in range(n + 1)]
    return tuple((cx + rx * math.cos(a), cy + ry * math.sin(a)) for a in angles)


# Letters as strokes in the unit square (x right, y down).
GLYPHS: dict[str, tuple[tuple[Point, ...], ...]] = {
    "A": (((0, 1), (0.5, 0), (1, 1)), ((0.2, 0.65), (0.8, 0.65))),
    "B": (
        ((0, 0), (0, 1)),
        ((0, 0), (0.6, 0), *arc(0.6, 0.25, 0.3, 0.25, -90, 90), (0, 0.5)),
        ((0.6, 0.5), *arc(0.65, 0.75, 0.35, 0.25, -90, 90), (0, 1)),
    ),
    "C": (arc(0.5, 0.5, 0.5, 0.5, -50, -310, 22),),
    "D": (((0, 0), (0, 1), (0.4, 1), *arc(0.4, 0.5, 0.6, 0.5, 90, -90), (0, 0)),),
    "E": (((1, 0), (0, 0), (0, 1), (1, 1)), ((0, 0.5), (0.8, 0.5))),
    "F": (((1, 0), (0, 0), (0, 1)), ((0, 0.5), (0.8, 0.5))),
    "G": (arc(0.5, 0.5, 0.5, 0.5, -50, -360, 24), ((1, 0.5), (0.6, 0.5))),
    "H": (((0, 0), (0, 1)), ((1, 0), (1, 1)), ((0, 0.5), (1, 0.5))),
    "I": (((0.5, 0), (0.5, 1)),),
    "J": (((0.9, 0), (0.9, 0.65), *arc(0.5, 0.65, 0.4, 0.35, 0, 180)),),
    "K": (((0, 0), (0, 1)), ((1, 0), (0, 0.55)), ((0.3, 0.4), (1, 1))),
    "L": (((0, 0), (0, 1), (0.9, 1)),),
    "M": (((0, 1), (0, 0), (0.5, 0.6), (1, 0), (1, 1)),),
    "N": (((0, 1), (0, 0), (1, 1), (1, 0)),),
    "O": (arc(0.5, 0.5, 0.5, 0.5, 0, 360, 28),),
    "P": (((0, 1), (0, 0), (0.6, 0), *arc(0.6, 0.28, 0.4, 0.28, -90, 90), (0, 0.56)),),
    "Q": (arc(0.5, 0.5, 0.5, 0.5, 0, 360, 28), ((0.6, 0.65), (1, 1))),
    "R": (((0, 1), (0, 0), (0.6, 0), *arc(0.6, 0.27, 0.4, 0.27, -90, 90), (0, 0.54)), ((0.45, 0.54), (1, 1))),
    "S": ((*arc(0.5, 0.27, 0.45, 0.27, -30, -260), *arc(0.5, 0.76, 0.48, 0.24, -80, 150)),),
    "T": (((0, 0), (1, 0)), ((0.5, 0), (0.5, 1))),
    "U": (((0, 0), (0, 0.6), *arc(0.5, 0.6, 0.5, 0.4, 180, 0), (1, 0)),),
    "V": (((0, 0), (0.5, 1), (1, 0)),),
    "W": (((0, 0), (0.25, 1), (0.5, 0.35), (0.75, 1), (1, 0)),),
    "X": (((0, 0), (1, 1)), ((1, 0), (0, 1))),
    "Y": (((0, 0), (0.5, 0.5), (1, 0)), ((0.5, 0.5), (0.5, 1))),
    "Z": (((0, 0), (1, 0), (0, 1), (1, 1)),),
}


def _shape(shape: str, cx: float, cy: float, r: float) -> list[tuple[Point, ...]]:
    """Outlines that together fill the shape (a ring is drawn as two: the second is a hole)."""
    if shape == "circle":
        return [arc(cx, cy, r, r, 0, 360, 64)]
    if shape == "ring":
        return [arc(cx, cy, r, r, 0, 360, 64), arc(cx, cy, 0.55 * r, 0.55 * r, 0, 360, 64)]
    if shape == "square":
        s = 0.87 * r
        return [((cx - s, cy - s), (cx + s, cy - s), (cx + s, cy + s), (cx - s, cy + s))]
    if shape == "diamond":
        return [((cx, cy - r), (cx + 0.7 * r, cy), (cx, cy + r), (cx - 0.7 * r, cy))]
    if shape == "triangle":
        return [((cx, cy - r), (cx + r, cy + 0.8 * r), (cx - r, cy + 0.8 * r))]
    if shape == "cross":
        a = 0.36 * r
        bar = ((cx - a, cy - r), (cx + a, cy - r), (cx + a, cy + r), (cx - a, cy + r))
        return [bar, tuple((cx + (y - cy), cy + (x - cx)) for x, y in bar)]
    if shape == "star":
        radii = [r if i % 2 == 0 else 0.42 * r for i in range(10)]
        turns = [(q, math.pi * i / 5) for i, q in enumerate(radii)]
        return [tuple((cx + q * math.sin(a), cy - q * math.cos(a)) for q, a in turns)]
    points: list[Point] = []
    for i in range(64):
        t = 2 * math.pi * i / 64
        x = 16 * math.sin(t) ** 3
        y = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
        points.append((cx + r * x / 16.5, cy - r * (y + 2) / 15))
    return [tuple(points)]


def _ground(background: Background, n: int) -> Image.Image:
    """The background, n x n: the tint, darkened where the texture's mask is set."""
    ground = Image.new("RGB", (n, n), _rgb(background.tint))
    if background.texture == "plain":
        return ground
    across, down = ((((np.arange(n) + 0.5) / n / background.period) + move) % 1.0 for move in background.phase)
    if background.texture == "stripes":
        mask = np.broadcast_to((across < 0.5)[None, :], (n, n))
    elif background.texture == "checks":
        mask = (across < 0.5)[None, :] ^ (down < 0.5)[:, None]
    else:
        square = [((way - 0.5) ** 2).astype(np.float32) for way in (across, down)]
        mask = square[0][None, :] + square[1][:, None] < DOT**2
    dark = (TEXTURE * background.tint[0], TEXTURE * background.tint[1], TEXTURE * background.tint[2])
    ground.paste(_rgb(dark), mask=Image.fromarray(mask.astype(np.uint8) * 255))
    return ground


class _Canvas:
    """Draws on an image that shows a picture n pixels wide from the pixel (left, top) on."""

    def __init__(self, image: Image.Image, n: int, left: int = 0, top: int = 0) -> None:
        self.draw, self.n, self.left, self.top = ImageDraw.Draw(image), n, left, top

    def pixels(self, points: tuple[Point, ...]) -> list[Point]:
        return [(x * self.n - self.left, y * self.n - self.top) for x, y in points]

    def polygon(self, points: tuple[Point, ...], colour: tuple[int, int, int]) -> None:
        self.draw.polygon(self.pixels(points), fill=colour)

    def stroke(self, points: tuple[Point, ...], width: float, colour: tuple[int, int, int]) -> None:
        pixels = self.pixels(points)
        self.draw.line(pixels, fill=colour, width=max(1, round(width * self.n)), joint="curve")
        r = width * self.n / 2
        for x, y in (pixels[0], pixels[-1]):
            self.draw.ellipse((x - r, y - r, x + r, y + r), fill=colour)


def _rgb(colour: tuple[float, float, float]) -> tuple[int, int, int]:
    return (round(255 * colour[0]), round(255 * colour[1]), round(255 * colour[2]))


def _object(canvas: _Canvas, o: Object, ground: tuple[float, float, float], look: Look) -> None:
    if (own := look.outlines.get(o.shape)) is not None:
        outlines = [tuple((o.x + o.radius * x, o.y + o.radius * y) for x, y in own)]
    else:
        outlines = _shape(o.shape, o.x, o.y, o.radius)
    for i, outline in enumerate(outlines):
        hole = o.shape == "ring" and i == 1
        canvas.polygon(outline, _rgb(ground if hole else o.rgb or COLOURS[o.colour]))


def _face(canvas: _Canvas, f: Face) -> None:
    r, ink = f.radius, _rgb(INK)
    canvas.polygon(arc(f.x, f.y, r, r, 0, 360, 64), _rgb(SKIN))
    for side in (-1, 1):
        if side == 1 and f.expression == "winking":
            canvas.stroke(((f.x + 0.2 * r, f.y - 0.28 * r), (f.x + 0.56 * r, f.y - 0.28 * r)), 0.14 * r, ink)
        else:
            canvas.polygon(arc(f.x + side * 0.38 * r, f.y - 0.28 * r, 0.15 * r, 0.2 * r, 0, 360, 32), ink)
    if f.expression == "calm":
        canvas.stroke(((f.x - 0.45 * r, f.y + 0.42 * r), (f.x + 0.45 * r, f.y + 0.42 * r)), 0.16 * r, ink)
    elif f.expression in ("happy", "winking"):
        canvas.stroke(arc(f.x, f.y + 0.12 * r, 0.5 * r, 0.45 * r, 15, 165), 0.16 * r, ink)
    elif f.expression == "sad":
        canvas.stroke(arc(f.x, f.y + 0.72 * r, 0.5 * r, 0.42 * r, 195, 345), 0.16 * r, ink)
    else:
        canvas.polygon(arc(f.x, f.y + 0.42 * r, 0.24 * r, 0.3 * r, 0, 360, 32), ink)


def stroke_of(height: float, advance: float) -> float:
    """The width of the strokes of a letter so high, whose next one stands so far along, as fractions of the side."""
    return STROKE * min(height, 1.1 * advance)


def letter_boxes(word: Word) -> list[tuple[float, float, float, float]]:
    """For each letter of `word`: left, top, width, height of its glyph box, as fractions of the side."""
    width, left = 0.62 * word.advance, word.x - 0.5 * len(word.text) * word.advance
    top = word.y - word.height / 2
    return [(left + (i + 0.19) * word.advance, top, width, word.height) for i in range(len(word.text))]


def _word(canvas: _Canvas, word: Word, look: Look) -> None:
    width, colour = stroke_of(word.height, word.advance), _rgb(word.rgb or COLOURS[word.colour])
    for letter, (x, y, w, h) in zip(word.text, letter_boxes(word), strict=True):
        for stroke in look.glyphs.get(letter, GLYPHS[letter]):
            canvas.stroke(tuple((x + w * px, y + h * py) for px, py in stroke), width, colour)


def render(scene: Scene, size: int, *, oversample: int = 4) -> NDArray[np.uint8]:
    """The picture of `scene` as uint8 RGB of shape (size, size, 3), antialiased by box-filtering `oversample` x."""
    n = size * oversample
    image = _ground(scene.background, n)
    _things(_Canvas(image, n), scene)
    return _tone(np.asarray(image.reduce(oversample)), scene)


def render_window(scene: Scene, size: int, box: tuple[int, int, int, int], *, oversample: int = 4) -> NDArray[np.uint8]:
    """The window (left, top, right, bottom) in pixels of `render(scene, size)`, drawn alone, on a plain ground.

    uint8 RGB of shape (bottom - top, right - left, 3). What lies outside the picture is drawn too.
    """
    left, top, right, bottom = (oversample * edge for edge in box)
    image = Image.new("RGB", (right - left, bottom - top), _rgb(scene.background.tint))
    _things(_Canvas(image, size * oversample, left, top), scene)
    return _tone(np.asarray(image.reduce(oversample)), scene)


def _things(canvas: _Canvas, scene: Scene) -> None:
    look = scene.look or USUAL
    for item in scene.objects:
        _object(canvas, item, scene.background.tint, look)
    for face in scene.faces:
        _face(canvas, face)
    for word in scene.words:
        _word(canvas, word, look)


def _tone(image: NDArray[np.uint8], scene: Scene) -> NDArray[np.uint8]:
    if scene.look is None or scene.look.light == DAYLIGHT:
        return image
    dim: NDArray[np.uint8] = (image * np.array(scene.look.light, np.float32) + 0.5).astype(np.uint8)
    return dim

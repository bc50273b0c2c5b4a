"""What a procedural scene is, how it is said in words, and how the words are read back.

A `Scene` is a small tree of facts (objects, faces, words, background). `caption` says the facts in plain English;
`parse_caption` reads such a sentence back into the same facts, so that a picture can be scored against its caption
alone. Coordinates are fractions of the picture's side, x to the right and y down, so a scene has no resolution.
"""

import hashlib
import random
from collections.abc import Container, Mapping
from dataclasses import dataclass, field, replace

from mrflow.errors import MrflowError

SHAPES = ("circle", "square", "triangle", "cross", "star", "ring", "heart", "diamond")
COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.86, 0.10, 0.12),
    "green": (0.08, 0.58, 0.20),
    "blue": (0.10, 0.25, 0.85),
    "black": (0.08, 0.08, 0.10),
    "orange": (0.98, 0.52, 0.05),
    "purple": (0.52, 0.14, 0.66),
    "pink": (0.98, 0.38, 0.66),
    "brown": (0.45, 0.26, 0.12),
}
SKIN = (0.99, 0.80, 0.16)
EXPRESSIONS = ("happy", "sad", "surprised")
TEXTURES = ("stripes", "dots", "checks")
NUMBERS = ("one", "two", "three", "four", "five", "six")
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"

PLACES: dict[str, tuple[float, float]] = {
    "centre": (0.5, 0.5),
    "left": (0.25, 0.5),
    "right": (0.75, 0.5),
    "top": (0.5, 0.25),
    "bottom": (0.5, 0.75),
}
RELATIONS: dict[str, tuple[tuple[float, float], tuple[float, float]]] = {
    "left of": ((0.25, 0.5), (0.75, 0.5)),
    "right of": ((0.75, 0.5), (0.25, 0.5)),
    "above": ((0.5, 0.25), (0.5, 0.75)),
    "below": ((0.5, 0.75), (0.5, 0.25)),
}
COUNT_SLOTS: dict[int, tuple[tuple[float, float], ...]] = {
    1: ((0.5, 0.5),),
    2: ((0.25, 0.25), (0.75, 0.75)),
    3: ((0.25, 0.25), (0.75, 0.25), (0.5, 0.75)),
    4: ((0.25, 0.25), (0.75, 0.25), (0.25, 0.75), (0.75, 0.75)),
    5: ((0.25, 0.25), (0.75, 0.25), (0.5, 0.5), (0.25, 0.75), (0.75, 0.75)),
    6: ((0.2, 0.25), (0.5, 0.25), (0.8, 0.25), (0.2, 0.75), (0.5, 0.75), (0.8, 0.75)),
}
OBJECT_RADIUS = {"big": 0.21, "small": 0.125}
PAIR_RADIUS, COUNT_RADIUS = 0.17, 0.125
FACE_RADIUS = {"big": 0.36, "small": 0.20}
LETTER_HEIGHT = {"big": 0.30, "medium": 0.20, "small": 0.13}
LETTER_ADVANCE = {"big": 0.25, "medium": 0.1875, "small": 0.125}
PERIOD = {"coarse": 0.25, "medium": 0.125, "fine": 0.0625}


class CaptionError(MrflowError, ValueError):
    """A sentence that the scene grammar cannot read."""


Rgb = tuple[float, float, float]


@dataclass(frozen=True)
class Object:
    """One coloured shape; `radius` and the centre are fractions of the side; `rgb` (None: the colour's) its tint."""

    shape: str
    colour: str
    x: float
    y: float
    radius: float
    rgb: Rgb | None = None


@dataclass(frozen=True)
class Face:
    """A round face with an expression."""

    expression: str
    x: float
    y: float
    radius: float


@dataclass(frozen=True)
class Word:
    """Capitals in one row, centred at (x, y); `height` and `advance` are fractions of the side; `rgb` as `Object`'s."""

    text: str
    colour: str
    y: float
    height: float
    advance: float
    x: float = 0.5
    rgb: Rgb | None = None


@dataclass(frozen=True)
class Background:
    """A pale ground, plain or with a texture of a given period (fraction of the side).

    `phase` moves the texture left and up by so many periods.
    """

    tint: Rgb = (0.93, 0.93, 0.93)
    texture: str = "plain"
    period: float = 0.125
    phase: tuple[float, float] = (0.0, 0.0)


Point = tuple[float, float]
Strokes = tuple[tuple[Point, ...], ...]
DAYLIGHT: Rgb = (1.0, 1.0, 1.0)


@dataclass(frozen=True, eq=False)
class Look:
    """Another way to draw the same scenes (`mrflow.scenes.looks`): what a fine-tune of the model is taught.

    Strokes of each letter in the unit square, an outline of each shape about the origin, within the unit circle; and
    the light, by which red, green and blue of every pixel are multiplied.
    """

    glyphs: Mapping[str, Strokes] = field(default_factory=dict[str, Strokes])
    outlines: Mapping[str, tuple[Point, ...]] = field(default_factory=dict[str, tuple[Point, ...]])
    light: Rgb = DAYLIGHT


@dataclass(frozen=True)
class Scene:
    """Everything that is in a picture. `kind` is one of object, pair, count, face, word, or one of `hard.KINDS`.

    `look` is how it is drawn, None as the model's own world is.
    """

    kind: str
    background: Background
    objects: tuple[Object, ...] = ()
    faces: tuple[Face, ...] = ()
    words: tuple[Word, ...] = ()
    caption: str = field(default="", compare=False)
    look: Look | None = None


@dataclass(frozen=True)
class World:
    """Which scenes exist: the vocabulary a model is trained and scored on.

    `jitter` moves every object by up to that fraction of the side; `kinds` gives each kind of scene its weight.
    """

    shapes: tuple[str, ...] = SHAPES
    colours: tuple[str, ...] = tuple(COLOURS)
    max_count: int = 6
    letters: str = LETTERS
    word_lengths: tuple[int, ...] = (2, 3, 4, 5)
    letter_sizes: tuple[str, ...] = ("big", "medium", "small")
    expressions: tuple[str, ...] = EXPRESSIONS
    face_sizes: tuple[str, ...] = ("big", "small")
    textures: tuple[str, ...] = TEXTURES
    densities: tuple[str, ...] = ("coarse", "medium", "fine")
    jitter: float = 0.01
    kinds: tuple[tuple[str, float], ...] = (
        ("object", 1.0),
        ("pair", 1.0),
        ("count", 1.0),
        ("face", 1.0),
        ("word", 1.5),
    )


FULL = World()


def sample_scene(world: World, rng: random.Random) -> Scene:
    """Draw one scene from `world`; equal states of `rng` give equal scenes."""
    names = [name for name, _ in world.kinds]
    kind = rng.choices(names, [weight for _, weight in world.kinds])[0]
    caption = _sample_caption(world, kind, rng)
    return fill(parse_caption(caption), world, rng)


def fill(scene: Scene, world: World, rng: random.Random) -> Scene:
    """Draw what the caption leaves open: the tint of the ground, and the jitter of places."""
    base = rng.uniform(0.86, 0.97)
    tint = tuple(min(1.0, max(0.80, base + rng.uniform(-0.05, 0.05))) for _ in range(3))
    background = replace(scene.background, tint=(tint[0], tint[1], tint[2]))

    def moved(value: float) -> float:
        return value + rng.uniform(-world.jitter, world.jitter)

    return replace(
        scene,
        background=background,
        objects=tuple(replace(o, x=moved(o.x), y=moved(o.y)) for o in scene.objects),
        faces=tuple(replace(f, x=moved(f.x), y=moved(f.y)) for f in scene.faces),
        words=tuple(replace(w, y=moved(w.y)) for w in scene.words),
    )


def sample_caption(world: World, rng: random.Random) -> str:
    """Draw one caption from `world`."""
    return sample_scene(world, rng).caption


def held_out(caption: str) -> bool:
    """Whether this caption is kept from training: about one in ten, by its SHA-256."""
    return hashlib.sha256(caption.encode()).digest()[0] % 10 == 0


def held_out_captions(world: World, count: int, *, seed: int = 0) -> list[str]:
    """`count` captions that no training run has seen, drawn from `world`."""
    rng, out = random.Random(seed), list[str]()
    while len(out) < count:
        caption = sample_caption(world, rng)
        if held_out(caption):
            out.append(caption)
    return out


def _sample_caption(world: World, kind: str, rng: random.Random) -> str:
    ground = ""
    if world.textures and rng.random() < (0.0 if kind == "word" else 0.5):
        ground = f" on {rng.choice(world.densities)} {rng.choice(world.textures)}"
    colour, shape = rng.choice(world.colours), rng.choice(world.shapes)
    if kind == "object":
        size, place = rng.choice(tuple(OBJECT_RADIUS)), rng.choice(tuple(PLACES))
        return f"a {size} {colour} {shape} at the {place}{ground}"
    if kind == "pair":
        colour_2, shape_2 = rng.choice(world.colours), rng.choice(world.shapes)
        relation = rng.choice(tuple(RELATIONS))
        return f"{article(colour)} {colour} {shape} {relation} {article(colour_2)} {colour_2} {shape_2}{ground}"
    if kind == "count":
        return f"{NUMBERS[rng.randint(2, world.max_count) - 1]} {colour} {plural(shape)}{ground}"
    if kind == "face":
        size = rng.choice(world.face_sizes)
        place = "centre" if size == "big" else rng.choice(("left", "right"))
        return f"a {size} {rng.choice(world.expressions)} face at the {place}{ground}"
    if kind == "word":
        length = rng.choice(world.word_lengths)
        sizes = [s for s in world.letter_sizes if length * LETTER_ADVANCE[s] <= 1.0]
        text = "".join(rng.choice(world.letters) for _ in range(length))
        return f"the {rng.choice(sizes)} {colour} word {text}"
    raise CaptionError(f"no scene of kind {kind!r}; use one of object, pair, count, face, word")


def article(word: str) -> str:
    """ "a" or "an"."""
    return "an" if word[0] in "aeiou" else "a"


def plural(shape: str) -> str:
    """The plural of a shape's name."""
    return shape + ("es" if shape.endswith("s") else "s")


_SINGULAR = {plural(shape): shape for shape in SHAPES}


def parse_caption(caption: str) -> Scene:
    """Read a caption back into its scene, without jitter and on the default tint.

    Raises:
        CaptionError: the sentence is not one of the grammar's; the text names the word where reading stopped.
    """
    words = Words(caption)
    scene = _parse_body(words)
    texture, period = "plain", PERIOD["medium"]
    if words.take_if("on"):
        period = PERIOD[words.take(PERIOD, "a density")]
        texture = words.take(TEXTURES, "a texture")
    words.end()
    return replace(scene, background=Background(texture=texture, period=period), caption=caption)


def _parse_body(words: "Words") -> Scene:
    ground = Background()
    if words.take_if("the"):
        size = words.take(LETTER_HEIGHT, "a letter size")
        colour = words.take(COLOURS, "a colour")
        words.take(("word",), "'word'")
        text = words.rest_capitals()
        return Scene("word", ground, words=(Word(text, colour, 0.5, LETTER_HEIGHT[size], LETTER_ADVANCE[size]),))
    if words.peek() in NUMBERS:
        count = NUMBERS.index(words.next()) + 1
        colour = words.take(COLOURS, "a colour")
        shape = _SINGULAR[words.take(_SINGULAR, "shapes")]
        return Scene("count", ground, tuple(Object(shape, colour, x, y, COUNT_RADIUS) for x, y in COUNT_SLOTS[count]))
    words.take(("a", "an"), "'a', 'the' or a number")
    if words.peek() in COLOURS:
        first = (words.next(), words.take(SHAPES, "a shape"))
        relation = words.take(("left", "right", "above", "below"), "a relation")
        if relation in ("left", "right"):
            words.take(("of",), "'of'")
            relation += " of"
        words.take(("a", "an"), "'a'")
        second = (words.take(COLOURS, "a colour"), words.take(SHAPES, "a shape"))
        slots = RELATIONS[relation]
        pair = tuple(Object(s, c, x, y, PAIR_RADIUS) for (c, s), (x, y) in zip((first, second), slots, strict=True))
        return Scene("pair", ground, pair)
    size = words.take(OBJECT_RADIUS, "a size or a colour")
    if words.peek() in EXPRESSIONS:
        expression = words.next()
        words.take(("face",), "'face'")
        x, y = words.place()
        return Scene("face", ground, faces=(Face(expression, x, y, FACE_RADIUS[size]),))
    colour, shape = words.take(COLOURS, "a colour"), words.take(SHAPES, "a shape")
    x, y = words.place()
    return Scene("object", ground, (Object(shape, colour, x, y, OBJECT_RADIUS[size]),))


class Words:
    """A cursor over the words of one caption."""

    def __init__(self, caption: str) -> None:
        self.caption, self.words, self.at = caption, caption.split(), 0

    def peek(self) -> str:
        return self.words[self.at] if self.at < len(self.words) else ""

    def fail(self, wanted: str) -> CaptionError:
        got = repr(self.peek()) if self.peek() else "the end"
        return CaptionError(f"caption {self.caption[:80]!r}: word {self.at + 1} should be {wanted}, not {got}")

    def take(self, allowed: Container[str], wanted: str) -> str:
        word = self.peek()
        if word not in allowed:
            raise self.fail(wanted)
        return self.next()

    def next(self) -> str:
        """A word that was looked at."""
        self.at += 1
        return self.words[self.at - 1]

    def take_if(self, word: str) -> bool:
        if self.peek() != word:
            return False
        self.at += 1
        return True

    def rest_capitals(self) -> str:
        word = self.peek()
        if not (1 <= len(word) <= 5 and all(c in LETTERS for c in word)):
            raise self.fail("one to five capitals")
        return self.next()

    def place(self) -> tuple[float, float]:
        self.take(("at",), "'at'")
        self.take(("the",), "'the'")
        return PLACES[self.take(PLACES, "a place")]

    def end(self) -> None:
        if self.at < len(self.words):
            raise self.fail("the end")

"""A world in which a caption leaves much open, with detail that is fine in latent cells.

Five kinds of scene: objects bound to places, signs of several words, groups of faces, dense grids with one odd cell,
fine textures. A caption names what is scored. It does not name exact places (everything moves freely by up to `free` of
the side), the tint of a colour and of the ground, or the phase of a texture: the mean of all pictures of a caption is a
blur, and one forward can draw no more than that. Sizes of detail are named in the caption, in per cent of the side.

In latent cells of 1/8 of a picture's pixels, a letter of 8 % of the side is 2.6 cells high at 256 px and 1.3 at 128 px;
`cells` gives these numbers.
"""

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from mrflow.scenes import grammar
from mrflow.scenes.grammar import (
    COLOURS,
    EXPRESSIONS,
    FULL,
    LETTERS,
    NUMBERS,
    SHAPES,
    Background,
    CaptionError,
    Face,
    Object,
    Rgb,
    Scene,
    Word,
    World,
    article,
    plural,
)

KINDS = ("objects", "sign", "faces", "grid", "texture")
FEELINGS = (*EXPRESSIONS, "calm", "winking")
COUNTS = (*NUMBERS, "seven", "eight", "nine")
LETTER_SIZES = ("13%", "8%", "6%", "5%", "4%", "3%")  # height of a letter, of the side
FACE_SIZES = ("20%", "12%", "8%", "5%")  # diameter, of the side
GRIDS = {f"{n}x{n}": n for n in range(4, 9)}
PERIODS = {f"1/{n}": 1 / n for n in (16, 24, 32, 48, 64)}  # of the side
WEAVES = ("stripes", "checks")
CELLS: dict[str, tuple[float, float]] = {
    f"{down} {across}": ((1 + 2 * i) / 6, (1 + 2 * j) / 6)
    for j, down in enumerate(("top", "middle", "bottom"))
    for i, across in enumerate(("left", "centre", "right"))
}
ADVANCE = 0.125 / 0.13  # of a letter's height, from one letter to the next
LINE = 1.5  # of a letter's height, from one line to the next
LONGEST, MOST = 4, 8  # letters of a word; words of a sign
COLUMN = 4  # words in a sign's one column; more are set in two
OBJECT, FOREMOST = 0.09, 0.10  # radius of an object among others, and of one on a texture
_SINGULAR = {plural(shape): shape for shape in SHAPES}


@dataclass(frozen=True)
class HardWorld:
    """What is drawn how often, and how much is left open.

    `free` is how far things move from their named places, a fraction of the side, each way; `tint` how far each channel
    of a colour is from the named one. A sign's words have `length` letters. `plain` is the share of scenes that are of
    the older world.
    """

    kinds: Mapping[str, float] = field(default_factory=lambda: dict.fromkeys(KINDS, 1.0) | {"sign": 2.0})
    letters: Mapping[str, float] = field(
        default_factory=lambda: dict(zip(LETTER_SIZES, (3.0, 4.0, 2.0, 1.0, 1.0, 1.0), strict=True))
    )
    faces: Mapping[str, float] = field(default_factory=lambda: dict(zip(FACE_SIZES, (3.0, 3.0, 1.5, 1.0), strict=True)))
    grids: Mapping[str, float] = field(default_factory=lambda: dict.fromkeys(GRIDS, 1.0))
    periods: Mapping[str, float] = field(default_factory=lambda: dict.fromkeys(PERIODS, 1.0))
    free: float = 0.07
    tint: float = 0.07
    length: int = 3
    plain: float = 0.12


HARD = HardWorld()


def cells(size: str, side: int) -> float:
    """How many latent cells (8 pixels) a named size is in a picture of `side` pixels: `cells("8%", 256)` is 2.56."""
    part = float(size[:-1]) / 100 if size.endswith("%") else PERIODS[size]
    return part * side / 8


def sample(world: HardWorld | World, rng: random.Random) -> Scene:
    """Draw one scene; equal states of `rng` give equal scenes."""
    if isinstance(world, World):
        return grammar.sample_scene(world, rng)
    if rng.random() < world.plain:
        return grammar.sample_scene(FULL, rng)
    return fill_hard(parse_hard(caption_of(world, rng)), world, rng)


def caption_of(world: HardWorld, rng: random.Random, kind: str = "") -> str:
    """Draw a caption of the hard world, of one kind or of any."""
    kind = kind or _weighted(world.kinds, rng)
    colour, shape = rng.choice(tuple(COLOURS)), rng.choice(SHAPES)
    if kind == "objects":
        places = rng.sample(tuple(CELLS), rng.randint(4, 6))
        things = ((rng.choice(tuple(COLOURS)), rng.choice(SHAPES), place) for place in places)
        return ", ".join(f"{article(c)} {c} {s} at the {place}" for c, s, place in things)
    if kind == "sign":
        size = _weighted(world.letters, rng)
        count = rng.randint(3, COLUMN if size == LETTER_SIZES[0] else MOST)
        words = ("".join(rng.choices(LETTERS, k=world.length)) for _ in range(count))
        return f"{article(colour)} {colour} sign in {size} letters, {' and '.join(words)}"
    if kind == "faces":
        count = rng.randint(2, 9)
        return f"{COUNTS[count - 1]} {_weighted(world.faces, rng)} faces, {' '.join(rng.choices(FEELINGS, k=count))}"
    if kind == "grid":
        name = _weighted(world.grids, rng)
        other = rng.choice([c for c in COLOURS if c != colour]), rng.choice([s for s in SHAPES if s != shape])
        row, column = (rng.randint(1, GRIDS[name]) for _ in range(2))
        return (
            f"a {name} grid of {colour} {plural(shape)} with {article(other[0])} {other[0]} {other[1]} "
            f"in row {row} column {column}"
        )
    if kind == "texture":
        period, weave, place = _weighted(world.periods, rng), rng.choice(WEAVES), rng.choice(tuple(grammar.PLACES))
        return f"{period} {weave} with {article(colour)} {colour} {shape} at the {place}"
    raise CaptionError(f"no scene of kind {kind!r}; use one of {', '.join(KINDS)}")


def _weighted(weights: Mapping[str, float], rng: random.Random) -> str:
    return rng.choices(tuple(weights), tuple(weights.values()))[0]


def fill_hard(scene: Scene, world: HardWorld, rng: random.Random) -> Scene:
    """Draw what the caption leaves open: places, tints, phase.

    Objects move each by itself; words, faces and cells of a grid move together.
    """

    def move() -> tuple[float, float]:
        return rng.uniform(-world.free, world.free), rng.uniform(-world.free, world.free)

    def near(rgb: Rgb) -> Rgb:
        red, green, blue = (min(1.0, max(0.0, channel + rng.uniform(-world.tint, world.tint))) for channel in rgb)
        return red, green, blue

    dx, dy = move()
    tints = {colour: near(COLOURS[colour]) for colour in (*(o.colour for o in scene.objects), *_ink(scene))}
    together = scene.kind == "grid"
    objects = list[Object]()
    for o in scene.objects:
        x, y = (dx, dy) if together else move()
        objects.append(replace(o, x=o.x + x, y=o.y + y, rgb=tints[o.colour] if together else near(COLOURS[o.colour])))
    base = rng.uniform(0.86, 0.97)
    red, green, blue = (min(1.0, max(0.80, base + rng.uniform(-0.05, 0.05))) for _ in range(3))
    ground = replace(scene.background, tint=(red, green, blue), phase=(rng.random(), rng.random()))
    return replace(
        scene,
        background=ground,
        objects=tuple(objects),
        faces=tuple(replace(f, x=f.x + dx, y=f.y + dy) for f in scene.faces),
        words=tuple(replace(w, x=w.x + dx, y=w.y + dy, rgb=tints[w.colour]) for w in scene.words),
    )


def draw_scene(caption: str, rng: random.Random) -> Scene:
    """A scene of a caption of either world, with what the caption leaves open drawn by that world's law.

    Raises:
        CaptionError: the caption is of neither.
    """
    scene = parse_hard(caption)
    return fill_hard(scene, HARD, rng) if scene.kind in KINDS else grammar.fill(scene, FULL, rng)


def _ink(scene: Scene) -> tuple[str, ...]:
    return tuple(word.colour for word in scene.words[:1])


def held_out_hard_captions(world: HardWorld, count: int, *, kind: str = "", seed: int = 0) -> list[str]:
    """`count` different captions of the hard world that no training run has seen, of one kind or of any."""
    rng, out = random.Random(seed), dict[str, None]()
    while len(out) < count:
        caption = caption_of(world, rng, kind)
        if grammar.held_out(caption):
            out[caption] = None
    return list(out)


def parse_hard(caption: str) -> Scene:
    """Read a caption of the hard world, or of the older one, back into its scene, everything at its named place.

    Raises:
        CaptionError: the sentence is of neither grammar; the text names the word where reading stopped.
    """
    words = caption.replace(",", " , ").split()
    for kind, told in _TELLTALE.items():
        if told(words):
            cursor = _Cursor(caption, words)
            scene = _BODIES[kind](cursor)
            cursor.end()
            return replace(scene, caption=caption)
    return grammar.parse_caption(caption)


class _Cursor(grammar.Words):
    def __init__(self, caption: str, words: list[str]) -> None:
        super().__init__(caption)
        self.words = words

    def cell(self) -> tuple[float, float]:
        self.take(("at",), "'at'")
        self.take(("the",), "'the'")
        down = self.take(("top", "middle", "bottom"), "a row")
        return CELLS[f"{down} {self.take(('left', 'centre', 'right'), 'a column')}"]

    def thing(self) -> tuple[str, str]:
        self.take(("a", "an"), "'a'")
        return self.take(COLOURS, "a colour"), self.take(SHAPES, "a shape")

    def capitals(self) -> str:
        word = self.peek()
        if not (1 <= len(word) <= LONGEST and all(c in LETTERS for c in word)):
            raise self.fail("one to four capitals")
        self.at += 1
        return word

    def number(self, most: int) -> int:
        return int(self.take([str(i + 1) for i in range(most)], f"a number from 1 to {most}"))


def _objects(words: _Cursor) -> Scene:
    found = list[Object]()
    while not found or words.take_if(","):
        colour, shape = words.thing()
        found.append(Object(shape, colour, *words.cell(), OBJECT))
    return Scene("objects", Background(), tuple(found))


def _sign(words: _Cursor) -> Scene:
    words.take(("a", "an"), "'a'")
    colour = words.take(COLOURS, "a colour")
    words.take(("sign",), "'sign'")
    words.take(("in",), "'in'")
    size = words.take(LETTER_SIZES, "a size of letters")
    words.take(("letters",), "'letters'")
    words.take((",",), "a comma")
    texts = [words.capitals()]
    while words.take_if("and"):
        texts.append(words.capitals())
    if len(texts) > MOST:
        raise CaptionError(f"caption {words.caption[:80]!r}: a sign has at most {MOST} words, not {len(texts)}")
    return Scene("sign", Background(), words=sign(texts, colour, float(size[:-1]) / 100))


def sign(texts: list[str], colour: str, height: float) -> tuple[Word, ...]:
    """Words in one column, or from five on in two, read row by row; each is centred in its column."""
    columns = 1 if len(texts) <= COLUMN else 2
    rows = -(-len(texts) // columns)
    advance = ADVANCE * height
    wide = (LONGEST + 0.5) * advance
    return tuple(
        Word(
            text,
            colour,
            0.5 + (i // columns - (rows - 1) / 2) * LINE * height,
            height,
            advance,
            0.5 + (i % columns - (columns - 1) / 2) * wide,
        )
        for i, text in enumerate(texts)
    )


def _faces(words: _Cursor) -> Scene:
    count = COUNTS.index(words.take(COUNTS, "a number")) + 1
    size = words.take(FACE_SIZES, "a size of faces")
    words.take(("faces",), "'faces'")
    words.take((",",), "a comma")
    feelings = [words.take(FEELINGS, "an expression") for _ in range(count)]
    radius = float(size[:-1]) / 200
    columns = next(n for n in (2, 3) if n * n >= count) if count > 1 else 1
    rows, pitch = -(-count // columns), 2.6 * radius
    return Scene(
        "faces",
        Background(),
        faces=tuple(
            Face(
                feeling,
                0.5 + (i % columns - (columns - 1) / 2) * pitch,
                0.5 + (i // columns - (rows - 1) / 2) * pitch,
                radius,
            )
            for i, feeling in enumerate(feelings)
        ),
    )


def _grid(words: _Cursor) -> Scene:
    words.take(("a",), "'a'")
    n = GRIDS[words.take(GRIDS, "a size of grid")]
    words.take(("grid",), "'grid'")
    words.take(("of",), "'of'")
    colour, shape = words.take(COLOURS, "a colour"), _SINGULAR[words.take(_SINGULAR, "shapes")]
    words.take(("with",), "'with'")
    other = words.thing()
    words.take(("in",), "'in'")
    words.take(("row",), "'row'")
    row = words.number(n) - 1
    words.take(("column",), "'column'")
    column = words.number(n) - 1
    pitch = 0.8 / n
    objects = list[Object]()
    for j in range(n):
        for i in range(n):
            c, s = other if (j, i) == (row, column) else (colour, shape)
            objects.append(Object(s, c, 0.1 + (i + 0.5) * pitch, 0.1 + (j + 0.5) * pitch, 0.36 * pitch))
    return Scene("grid", Background(), tuple(objects))


def _texture(words: _Cursor) -> Scene:
    period = PERIODS[words.next()]
    weave = words.take(WEAVES, "stripes or checks")
    words.take(("with",), "'with'")
    colour, shape = words.thing()
    x, y = words.place()
    return Scene("texture", Background(texture=weave, period=period), (Object(shape, colour, x, y, FOREMOST),))


_TELLTALE: Mapping[str, Callable[[list[str]], bool]] = {
    "sign": lambda words: "sign" in words,
    "faces": lambda words: "faces" in words,
    "grid": lambda words: "grid" in words,
    "texture": lambda words: bool(words) and words[0].startswith("1/"),
    "objects": lambda words: "," in words,
}
_BODIES = {"objects": _objects, "sign": _sign, "faces": _faces, "grid": _grid, "texture": _texture}
VOCABULARY = (
    "sign",
    "letters",
    "faces",
    "grid",
    "row",
    "column",
    "with",
    "and",
    "middle",
    *(size for size in dict.fromkeys((*LETTER_SIZES, *FACE_SIZES))),
    *COUNTS[len(NUMBERS) :],
    *FEELINGS[len(EXPRESSIONS) :],
    *GRIDS,
    *(str(n + 1) for n in range(8)),
    *PERIODS,
)
"""The words that the hard world adds to the older one's."""

"""Three other looks of the same scenes: what fine-tunes of the embedded model are taught, and read by.

Captions stay the world's own, so a caption that is held out is held out in every look, and methods can be compared on
one caption between the model and its fine-tunes. `dusk` is a style (dim, bluish light), `shapes` are new things under
the old names, `runes` is a new alphabet.
"""

from collections.abc import Mapping
from dataclasses import replace

from mrflow.errors import PlanError
from mrflow.scenes.grammar import LETTERS, Look, Point, Scene, Strokes
from mrflow.scenes.render import arc

_RUNES = (  # strokes over the points 012, 345, 678 of a letter's box, chosen to be unlike each other and Latin letters
    *("23 3478", "10 85", "13 63", "546 25", "3057", "73 10", "7521", "2458 842", "678 04", "38 51", "56 0365"),
    *("6342 34", "56 2105", "4856 13", "5870", "4612 67", "2367 75", "30 47", "014 48", "51 610", "258 76"),
    *("215 137", "4276", "87 13", "5213 018", "01 8745"),
)


def _strokes(code: str) -> Strokes:
    return tuple(tuple((int(at) % 3 / 2, int(at) // 3 / 2) for at in stroke) for stroke in code.split())


_OUTLINES: dict[str, tuple[Point, ...]] = {
    "circle": (*arc(0.25, 0, 0.95, 0.95, 90, 270, 32),),  # half of one
    "square": ((-0.95, -0.3), (0.95, -0.3), (0.95, 0.3), (-0.95, 0.3)),  # a bar
    "triangle": ((-0.8, -0.8), (0.8, -0.8), (-0.8, 0.8), (0.8, 0.8)),  # an hourglass
    "cross": tuple((0.9 * x, 0.9 * y) for x, y in ((-0.6, -1), (0, -0.4), (0.6, -1), (1, -0.6), (0.4, 0), (1, 0.6)))
    + tuple((0.9 * x, 0.9 * y) for x, y in ((0.6, 1), (0, 0.4), (-0.6, 1), (-1, 0.6), (-0.4, 0), (-1, -0.6))),
    "star": ((0.3, -1), (-0.6, 0.2), (-0.05, 0.2), (-0.3, 1), (0.6, -0.2), (0.05, -0.2)),  # a bolt
    "ring": (*arc(0, 0, 0.95, 0.95, -40, 220, 32), *arc(0, -0.3, 0.68, 0.68, 205, -25, 24)),  # a crescent
    "heart": ((0, -0.95), (0.8, 0), (0.3, 0), (0.3, 0.9), (-0.3, 0.9), (-0.3, 0), (-0.8, 0)),  # an arrow
    "diamond": ((-0.75, -0.8), (-0.2, -0.8), (-0.2, 0.25), (0.8, 0.25), (0.8, 0.8), (-0.75, 0.8)),  # a corner
}
LOOKS: Mapping[str, Look] = {
    "dusk": Look(light=(0.75, 0.80, 0.95)),
    "shapes": Look(outlines=_OUTLINES),
    "runes": Look(glyphs=dict(zip(LETTERS, map(_strokes, _RUNES), strict=True))),
}


def look_of(name: str) -> Look | None:
    """A look by its name; None for "", the model's own world.

    Raises:
        PlanError: there is none of that name.
    """
    if name and name not in LOOKS:
        raise PlanError(f"no look is called {name!r}; there are {', '.join(LOOKS)}")
    return LOOKS.get(name)


def restyle(scene: Scene, name: str) -> Scene:
    """The scene in a look."""
    return replace(scene, look=look_of(name))

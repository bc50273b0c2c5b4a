"""Holds the facts that were read from a picture against its caption, without a network.

`read_facts` never sees the caption, `score_facts` never sees the picture. A thing counts as *the named thing* if its
shape or its colour is the named one, so that a picture with one wrong fact loses the category of that fact and no
other.
"""

import math
from dataclasses import dataclass, fields
from itertools import permutations

from torch import Tensor

from mrflow.scenes.grammar import FACE_RADIUS, OBJECT_RADIUS, PLACES, Face, Object, Scene, Word, parse_caption
from mrflow.scenes.letters import Array
from mrflow.scenes.reading import Facts, nearest_size, read_facts

CATEGORIES = ("alignment", "counting", "position", "text", "faces", "detail")
PLACE_RADIUS = 0.15  # how far from its named place a thing may be, as a fraction of the side


@dataclass(frozen=True)
class Scores:
    """How well a picture shows its caption, per category in [0, 1]; None where the caption does not speak of it."""

    alignment: float | None = None
    counting: float | None = None
    position: float | None = None
    text: float | None = None
    faces: float | None = None
    detail: float | None = None

    def as_dict(self) -> dict[str, float]:
        """The categories that the caption speaks of, in the order of `CATEGORIES`, and `overall`."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) is not None}
        return {**values, "overall": sum(values.values()) / len(values)}

    @property
    def overall(self) -> float:
        """The mean over the categories that the caption speaks of."""
        return self.as_dict()["overall"]


def score(pixels: Array | Tensor, caption: str) -> Scores:
    """How well a picture, float (3, side, side) in [0, 1] with a side of at least 64, shows its caption.

    Raises:
        CaptionError: the caption is outside the grammar. PlanError: the picture cannot be scored.
    """
    parse_caption(caption)  # refused before the picture is read
    return score_facts(read_facts(pixels), caption)


# ---------------------------------------------------------------------------------------------------- facts to scores


def score_facts(facts: Facts, caption: str) -> Scores:
    """Hold the facts of a picture against a caption.

    alignment: the share of named looks (shape, colour, size) that is right; objects beyond the named ones count as
    wrong, except where their number is itself named (counting). counting, position, faces, detail: right or wrong.
    text: letters right over the longer of the two words.
    """
    wanted = parse_caption(caption)
    detail: float | None = None
    if wanted.background.texture != "plain":
        ground, said = facts.ground, wanted.background
        detail = float(ground is not None and (ground.texture, ground.period) == (said.texture, said.period))
    if wanted.kind == "word":
        return _compare_word(facts.word, wanted.words[0])
    if wanted.kind == "face":
        said_face = wanted.faces[0]
        best = max(facts.faces, key=lambda f: f.radius, default=None)
        if best is None:
            return Scores(alignment=0.0, position=0.0, faces=0.0, detail=detail)
        right_size = nearest_size(best.radius, FACE_RADIUS) == nearest_size(said_face.radius, FACE_RADIUS)
        return Scores(
            alignment=right_size / len(facts.faces),
            position=float(_is_placed(best, said_face)),
            faces=float(best.expression == said_face.expression),
            detail=detail,
        )
    if wanted.kind == "count":
        said_object = wanted.objects[0]
        looks = [_look(o, said_object, sized=False) for o in facts.objects]
        named = sum(1 for look in looks if look > 0)
        alignment = sum(looks) / len(looks) if looks else 0.0
        return Scores(alignment=alignment, counting=float(named == len(wanted.objects)), detail=detail)
    alignment, position = _compare_objects(facts.objects, wanted)
    return Scores(alignment=alignment, position=position, detail=detail)


def _compare_objects(found: tuple[Object, ...], wanted: Scene) -> tuple[float, float]:
    """Alignment and position, with named and found objects paired so that the looks, then the position, fit best."""
    best, sized = (0.0, 0.0), wanted.kind == "object"
    slots: list[Object | None] = [*found, *([None] * len(wanted.objects))]
    for chosen in permutations(slots[:8], len(wanted.objects)):
        pairs = [(o, said) for o, said in zip(chosen, wanted.objects, strict=True) if o is not None]
        looks = sum(_look(o, said, sized=sized) for o, said in pairs) / max(len(found), len(wanted.objects))
        there = len(pairs) == len(wanted.objects) and all(_look(o, said, sized=False) > 0 for o, said in pairs)
        if there and len(pairs) == 1:
            there = _is_placed(*pairs[0])
        elif there:
            (a, said_a), (b, said_b) = pairs
            along = (b.x - a.x) * (said_b.x - said_a.x) + (b.y - a.y) * (said_b.y - said_a.y)
            across = (b.x - a.x) * (said_b.y - said_a.y) - (b.y - a.y) * (said_b.x - said_a.x)
            there = along > abs(across) and along > 0.05  # both were multiplied by the drawn distance, 0.5
        best = max(best, (looks, float(there)))
    return best


def _look(found: Object, said: Object, *, sized: bool) -> float:
    right = [found.shape == said.shape, found.colour == said.colour]
    if sized:
        right.append(nearest_size(found.radius, OBJECT_RADIUS) == nearest_size(said.radius, OBJECT_RADIUS))
    return sum(right) / len(right)


def _is_placed(found: Object | Face, said: Object | Face) -> bool:
    nearest = min(PLACES.values(), key=lambda place: math.dist(place, (found.x, found.y)))
    return nearest == (said.x, said.y) and math.dist(nearest, (found.x, found.y)) < PLACE_RADIUS


def _compare_word(found: Word | None, said: Word) -> Scores:
    if found is None:
        return Scores(alignment=0.0, text=0.0)
    ends = (zip(found.text, said.text, strict=False), zip(found.text[::-1], said.text[::-1], strict=False))
    right = max(sum(a == b for a, b in end) for end in ends)
    alignment = ((found.colour == said.colour) + (found.height == said.height)) / 2
    return Scores(alignment=alignment, text=right / max(len(found.text), len(said.text)))

"""What the captions of `grammar` leave open, for `fit`: the ground's tint and the jitter of every thing."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Self

import numpy as np
from numpy.typing import NDArray

from mrflow.scenes.fit import Box, Edge, FreePart, Slot, Values
from mrflow.scenes.grammar import COLOURS, EXPRESSIONS, FULL, LETTERS, SKIN, Face, Object, Scene, Word, parse_caption
from mrflow.scenes.letters import Array
from mrflow.scenes.reading import find_tint
from mrflow.scenes.render import INK, letter_boxes, render, stroke_of

REACH = 0.024  # how far from its named place a thing is looked for, as a fraction of the side; jitter is 0.01
DRAWS = 4096  # of the law, to rank against


@dataclass(frozen=True)
class OpenScene:
    """A scene of the grammar as `fit.Adjustable`: the tint, and places of objects and faces, and heights of words.

    `jitter` is that of the world whose law the picture is held against.
    """

    scene: Scene
    jitter: float = FULL.jitter

    @classmethod
    def of(cls, caption: str, image: Array) -> Self:
        """As the caption says, on the tint that a picture (side, side, 3) seems to have.

        Raises:
            CaptionError: the caption is outside the grammar.
        """
        scene, tint = parse_caption(caption), find_tint(image)
        if tint is not None:
            scene = replace(scene, background=replace(scene.background, tint=_three(tint.tolist())))
        return cls(scene)

    @property
    def parts(self) -> Sequence[FreePart]:
        """The ground's three channels, then (x, y) of objects and faces and y of words."""
        named = parse_caption(self.scene.caption)
        ground = FreePart((0.0, 0.0, 1.0, 1.0), self.scene.background.tint, ("paint",) * 3, ((0.0, 1.0),) * 3)
        parts = [ground]
        things: list[Object | Face] = [*self.scene.objects, *self.scene.faces]
        slots: list[Object | Face] = [*named.objects, *named.faces]
        for thing, said in zip(things, slots, strict=True):
            bounds = ((said.x - REACH, said.x + REACH), (said.y - REACH, said.y + REACH))
            parts.append(FreePart(_square(said, REACH), (thing.x, thing.y), ("place", "place"), bounds))
        for word, row in zip(self.scene.words, named.words, strict=True):
            parts.append(FreePart(_row(row, REACH), (word.y,), ("place",), ((row.y - REACH, row.y + REACH),)))
        return parts

    @property
    def edges(self) -> Sequence[Edge]:
        """Outlines on the ground, and ink on faces."""
        out = [Edge(_square(o, 0.0), COLOURS[o.colour]) for o in self.scene.objects]
        for f in self.scene.faces:
            out += [Edge(_square(f, 0.0), SKIN), Edge(_square(f, -0.28 * f.radius), INK, SKIN)]
        return out + [Edge(_row(w, 0.0), COLOURS[w.colour]) for w in self.scene.words]

    @property
    def corners(self) -> Sequence[tuple[float, float]]:
        """Those of the objects; letters have round ends, faces none."""
        return [
            (o.x + o.radius * x, o.y + o.radius * y) for o in self.scene.objects for x, y in CORNERS.get(o.shape, ())
        ]

    @property
    def slots(self) -> Sequence[Slot]:
        """Letters and faces."""
        out = [Slot("expression", _square(f, 0.0), f.expression) for f in self.scene.faces]
        for w in self.scene.words:
            margin = stroke_of(w.height, w.advance) / 2
            for letter, (x, y, width, height) in zip(w.text, letter_boxes(w), strict=True):
                box = (x - margin, y - margin, x + width + margin, y + height + margin)
                out.append(Slot("glyph", box, letter))
        return out

    @property
    def alphabets(self) -> dict[str, Sequence[str]]:
        """All capitals, all expressions."""
        return {"glyph": LETTERS, "expression": EXPRESSIONS}

    @property
    def ranks(self) -> dict[str, float]:
        """Of the tint's mean (`tint`), its channels' spread (`cast`) and the things' RMS jitter (`place`)."""
        tint = np.asarray(self.scene.background.tint)
        means, spreads = _tints()
        moved, named = self.parts[1:], OpenScene(parse_caption(self.scene.caption)).parts[1:]
        jitter = [a - b for p, q in zip(moved, named, strict=True) for a, b in zip(p.values, q.values, strict=True)]
        rms = math.sqrt(sum(v * v for v in jitter) / len(jitter)) / self.jitter
        return {
            "tint": _rank(float(tint.mean()), means),
            "cast": _rank(float(tint.max() - tint.min()), spreads),
            "place": _rank(rms, _jitters(len(jitter))),
        }

    def with_values(self, values: Values) -> Self:
        """Other tint and places, in the order of `parts`."""
        tint, *places = values
        n, m = len(self.scene.objects), len(self.scene.objects) + len(self.scene.faces)
        return replace(
            self,
            scene=replace(
                self.scene,
                background=replace(self.scene.background, tint=_three(tint)),
                objects=tuple(replace(o, x=x, y=y) for o, (x, y) in zip(self.scene.objects, places[:n], strict=True)),
                faces=tuple(replace(f, x=x, y=y) for f, (x, y) in zip(self.scene.faces, places[n:m], strict=True)),
                words=tuple(replace(w, y=y) for w, (y,) in zip(self.scene.words, places[m:], strict=True)),
            ),
        )

    def with_symbol(self, alphabet: str, symbol: str) -> Self:
        """Every face with that expression, or every letter that one."""
        scene = self.scene
        if alphabet == "expression":
            return replace(self, scene=replace(scene, faces=tuple(replace(f, expression=symbol) for f in scene.faces)))
        words = tuple(replace(w, text=symbol * len(w.text)) for w in scene.words)
        return replace(self, scene=replace(scene, words=words))

    def ground(self) -> Self:
        """Without objects, faces and words."""
        return replace(self, scene=replace(self.scene, objects=(), faces=(), words=()))

    def draw(self, side: int) -> NDArray[np.uint8]:
        """As `render` does."""
        return render(self.scene, side)


def _three(values: Sequence[float]) -> tuple[float, float, float]:
    red, green, blue = (min(1.0, max(0.0, v)) for v in values)
    return red, green, blue


def _square(thing: Object | Face, more: float) -> Box:
    half = thing.radius + more
    return (thing.x - half, thing.y - half, thing.x + half, thing.y + half)


def _row(word: Word, more: float) -> Box:
    stroke = stroke_of(word.height, word.advance) / 2
    half, high = len(word.text) * word.advance / 2, word.height / 2 + stroke + more
    return (0.5 - half, word.y - high, 0.5 + half, word.y + high)


def _corners() -> dict[str, tuple[tuple[float, float], ...]]:
    """Corners about (0, 0) in radii, as `render` draws them."""
    s, a = 0.87, 0.36
    star = [(r * math.sin(math.pi * i / 5), -r * math.cos(math.pi * i / 5)) for i, r in enumerate((1.0, 0.42) * 5)]
    signs = [(x, y) for x in (-1, 1) for y in (-1, 1)]
    return {
        "square": tuple((s * x, s * y) for x, y in signs),
        "diamond": ((0, -1), (0.7, 0), (0, 1), (-0.7, 0)),
        "triangle": ((0, -1), (1, 0.8), (-1, 0.8)),
        "cross": tuple(c for x, y in signs for c in ((a * x, y), (x, a * y), (a * x, a * y))),
        "star": tuple(star),
        "heart": ((0, -7 / 15), (0, 1)),
    }


CORNERS = _corners()


def _rank(value: float, draws: NDArray[np.float64]) -> float:
    return float(np.searchsorted(draws, value)) / len(draws)


@cache
def _tints() -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Means and spreads of tints by the law of `grammar.sample_scene`, sorted."""
    rng = np.random.default_rng(0)
    base = rng.uniform(0.86, 0.97, (DRAWS, 1))
    tints = np.clip(base + rng.uniform(-0.05, 0.05, (DRAWS, 3)), 0.80, 1.0)
    return np.sort(tints.mean(1)), np.sort(np.ptp(tints, 1))


@cache
def _jitters(count: int) -> NDArray[np.float64]:
    """RMS of `count` uniform draws in [-1, 1], sorted."""
    moves = np.random.default_rng(0).uniform(-1, 1, (DRAWS, count))
    return np.sort(np.sqrt(np.square(moves).mean(1)))

"""Fits what a caption leaves open, such as places and tints, to a picture: the exact rendering nearest to it.

The fit sees a scene only through `Adjustable`, so it knows no world: which numbers are free, where each shows, and how
the scene is drawn with other numbers. The error is the mean squared difference of pixels, lowered by Gauss-Newton steps
part by part (Nocedal and Wright 2006, section 10.3), first on a small copy. Parts whose boxes do not meet are moved in
one drawing: the derivatives of many things cost as many drawings as those of one (Curtis, Powell and Reid 1974).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, Self, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mrflow.scenes.letters import Array

Box = tuple[float, float, float, float]  # left, top, right, bottom as fractions of the side
Paint = tuple[float, float, float]
Values = tuple[tuple[float, ...], ...]  # those of each part

T = TypeVar("T", bound="Adjustable")

PAINT_STEP = 0.02  # by which a colour is moved to see what it changes
COPIES = (64, 128)  # sides of the small copies; the ground is fitted on these alone
ROUNDS = 4  # Gauss-Newton steps a copy, at most


@dataclass(frozen=True)
class FreePart:
    """Free numbers that change the picture only inside `box`, wherever they are moved within their bounds.

    A "place" is a fraction of the side; a "paint" is one channel of a colour, in [0, 1].
    """

    box: Box
    values: tuple[float, ...]
    kinds: tuple[Literal["place", "paint"], ...]
    bounds: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Edge:
    """Inside `box`, pixels of `paint` stand on `under` (None: on the ground as it is drawn without things)."""

    box: Box
    paint: Paint
    under: Paint | None = None


@dataclass(frozen=True)
class Slot:
    """A place that holds one symbol of an alphabet, such as a letter or an expression."""

    alphabet: str
    box: Box
    symbol: str


class Adjustable(Protocol):
    """A scene with free numbers. Sides and boxes are fractions of the picture's side, y down."""

    @property
    def parts(self) -> Sequence[FreePart]:
        """The free numbers, as they stand."""
        ...

    @property
    def edges(self) -> Sequence[Edge]:
        """What stands on what."""
        ...

    @property
    def corners(self) -> Sequence[tuple[float, float]]:
        """(x, y) of every corner of the things."""
        ...

    @property
    def slots(self) -> Sequence[Slot]:
        """Every letter and expression."""
        ...

    @property
    def alphabets(self) -> Mapping[str, Sequence[str]]:
        """The symbols that each alphabet of the slots has."""
        ...

    @property
    def ranks(self) -> Mapping[str, float]:
        """The share of the law's draws below what the scene has, in [0, 1], by name: uniform for true scenes."""
        ...

    def with_values(self, values: Values) -> Self:
        """The same with other free numbers, one tuple for each part."""
        ...

    def with_symbol(self, alphabet: str, symbol: str) -> Self:
        """The same with that symbol in every slot of the alphabet."""
        ...

    def ground(self) -> Self:
        """The same without things."""
        ...

    def draw(self, side: int) -> NDArray[np.uint8]:
        """The picture, RGB of shape (side, side, 3)."""
        ...


def fit(image: Array, scene: T) -> T:
    """The scene with the free numbers that draw it nearest to a picture, (side, side, 3) in [0, 1].

    The start must be near: a thing is found where it overlaps what it is drawn as by more than its thinnest stroke.
    """
    side = len(image)
    for copy in (*(c for c in COPIES if c < side), side):
        target = _reduce(image, copy)
        for _ in range(ROUNDS):
            before = _values(scene)
            for group in _disjoint(scene.parts):
                if copy <= max(COPIES) or not _whole(scene.parts[group[0]]):
                    scene = _step(target, scene, group)
            if _moved_by(before, _values(scene)) < 0.05 / copy:
                break
    return _polish(image, scene)


def _values(scene: Adjustable) -> Values:
    return tuple(part.values for part in scene.parts)


def _whole(part: FreePart) -> bool:
    return part.box == (0.0, 0.0, 1.0, 1.0)


def _moved_by(before: Values, after: Values) -> float:
    pairs = zip(before, after, strict=True)
    return max((abs(a - b) for old, new in pairs for a, b in zip(old, new, strict=True)), default=0.0)


def _reduce(image: Array, side: int) -> Array:
    """An averaged copy, (side, side, 3)."""
    n = len(image)
    if n == side:
        return image
    if n % side == 0:
        k = n // side
        small: Array = image.reshape(side, k, side, k, 3).mean((1, 3), dtype=np.float32)
        return small
    planes = [Image.fromarray(image[..., c]).resize((side, side), Image.Resampling.BOX) for c in range(3)]
    return np.stack([np.asarray(plane, np.float32) for plane in planes], -1)


def render_floats(scene: Adjustable, side: int) -> Array:
    """The scene's picture as floats in [0, 1]."""
    return scene.draw(side).astype(np.float32) / np.float32(255)


def pixels(box: Box, side: int, *, margin: int = 0) -> tuple[slice, slice]:
    """Rows and columns of a box, and `margin` more on every side."""
    left, top, right, bottom = (round(v * side) for v in box)
    return (
        slice(max(0, top - margin), min(side, bottom + margin)),
        slice(max(0, left - margin), min(side, right + margin)),
    )


def _disjoint(parts: Sequence[FreePart]) -> list[list[int]]:
    """The parts in groups of which no two boxes meet; first come, first served."""
    groups: list[list[int]] = []
    for i, part in enumerate(parts):
        for group in groups:
            if not any(_meet(part.box, parts[j].box) for j in group):
                group.append(i)
                break
        else:
            groups.append([i])
    return groups


def _meet(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _with(scene: T, changes: dict[int, tuple[float, ...]]) -> T:
    """Other numbers for some parts, kept in their bounds."""
    values = list(_values(scene))
    for i, new in changes.items():
        bounds = scene.parts[i].bounds
        values[i] = tuple(min(max(v, low), high) for v, (low, high) in zip(new, bounds, strict=True))
    return scene.with_values(tuple(values))


def _errors(picture: Array, target: Array, parts: Sequence[FreePart], group: list[int]) -> list[float]:
    """The squared error inside the box of each part of a group."""
    side, out = len(target), list[float]()
    for i in group:
        at = pixels(parts[i].box, side)
        difference = (picture[at] - target[at]).ravel()
        out.append(float(difference @ difference))
    return out


def _step(target: Array, scene: T, group: list[int]) -> T:
    """One Gauss-Newton step of each part of a group; one that does not lower its error is halved, then left out."""
    side, parts = len(target), scene.parts
    here = render_floats(scene, side)
    columns: dict[int, list[Array]] = {i: [] for i in group}
    for k in range(max(len(parts[i].values) for i in group)):
        some = [i for i in group if k < len(parts[i].values)]
        ends: list[Array] = []
        for sign in (-1, 1):
            values = [list(part.values) for part in parts]
            for i in some:
                values[i][k] += sign * _unit(parts[i], k, side)
            ends.append(render_floats(scene.with_values(tuple(map(tuple, values))), side))
        for i in some:
            at = pixels(parts[i].box, side)
            columns[i].append(((ends[1][at] - ends[0][at]) / (2 * _unit(parts[i], k, side))).ravel())
    steps: dict[int, NDArray[np.floating]] = {}
    for i in group:
        slopes = np.stack(columns[i]).astype(np.float64)
        left = (target[pixels(parts[i].box, side)] - here[pixels(parts[i].box, side)]).ravel()
        normal = slopes @ slopes.T
        normal[np.diag_indices_from(normal)] += 1e-9 * normal.trace() + 1e-12
        steps[i] = np.linalg.solve(normal, slopes @ left)
    old = dict(zip(group, _errors(here, target, parts, group), strict=True))
    for scale in (1.0, 0.5):
        tried = {i: tuple(np.add(parts[i].values, scale * step).tolist()) for i, step in steps.items()}
        trial = _with(scene, tried)
        new = _errors(render_floats(trial, side), target, parts, list(steps))
        good = {i for i, error in zip(steps, new, strict=True) if error < old[i]}
        scene = _with(scene, {i: trial.parts[i].values for i in good})
        steps = {i: step for i, step in steps.items() if i not in good}
        if not steps:
            break
    return scene


def _unit(part: FreePart, k: int, side: int) -> float:
    return 1 / side if part.kinds[k] == "place" else PAINT_STEP


def _polish(image: Array, scene: T) -> T:
    """Places moved by a quarter, then an eighth of a pixel where that helps: renderers draw on a grid of subpixels."""
    side = len(image)
    for step in (0.25 / side, 0.125 / side):
        for group in _disjoint(scene.parts):
            best = dict(zip(group, _errors(render_floats(scene, side), image, scene.parts, group), strict=True))
            for changes in _moves(scene.parts, group, step):
                new = {i: tuple(np.add(scene.parts[i].values, change).tolist()) for i, change in changes.items()}
                trial = _with(scene, new)
                errors = _errors(render_floats(trial, side), image, scene.parts, list(new))
                better = {i: e for i, e in zip(new, errors, strict=True) if e < best[i]}
                best |= better
                scene = _with(scene, {i: trial.parts[i].values for i in better})
    return scene


def _moves(parts: Sequence[FreePart], group: list[int], step: float) -> Iterator[dict[int, list[float]]]:
    """Each place of every part of a group to and fro."""
    for k in range(max(len(parts[i].values) for i in group)):
        some = [i for i in group if k < len(parts[i].values) and parts[i].kinds[k] == "place"]
        for sign in (-1, 1) if some else ():
            yield {i: [sign * step * (k == m) for m in range(len(parts[i].values))] for i in some}

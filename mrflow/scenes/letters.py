"""Reads a row of capitals from an ink map: every letter among all 26 and blank, without knowing the word."""

import math
from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from mrflow.scenes.grammar import COLOURS, LETTER_ADVANCE, LETTER_HEIGHT, LETTERS, Background, Scene, Word
from mrflow.scenes.render import render, stroke_of

Array = NDArray[np.float32]

SIDE = 128  # every picture is read at this size
SOFT = 1.5  # blur, in pixels of the working copy, of the second set of letters
MIN_LETTER = 0.45  # correlation below which a letter is not read
FAINT = 0.3  # part of a template's ink below which a slot is blank


def read_letters(ink: Array, size: str, middle: int) -> tuple[str, float]:
    """The text of the row about `middle`, and the share of all ink (squared) that its letters explain.

    A slot's letter is the template t of the largest <a, t>^2 / |t|^2, the squared error of the ink a that t explains
    with a free gain. The row's place and whether its length is odd or even are those that explain most in all slots.
    """
    templates, high, wide = _templates(size)[0], *_window(size)
    sizes = length(templates)
    windows = np.lib.stride_tricks.sliding_window_view(np.pad(ink, high), (high, wide))
    top = middle + high // 2
    best, best_total = "", 0.0

    def look(left: int, most: int, dy: NDArray[np.int64], dx: NDArray[np.int64]) -> tuple[Array, Array]:
        """<a, t> / |t| for every move down, move right, slot and template; |a| for every move and slot."""
        slots = left + wide * np.arange(most)
        a = windows[top + dy[:, None, None], dx[:, None] + slots].reshape(len(dy), len(dx), most, -1)
        a = a - a.mean(-1, keepdims=True)
        return np.maximum(a @ (templates.T / sizes), 0), length(a)

    for most in (4, min(5, SIDE // wide - (SIDE // wide + 1) % 2)):  # even and odd lengths have different slots
        left = (SIDE - most * wide) // 2 + high
        dy, dx = np.arange(-2, 3, 2), np.arange(-4, 5, 2)
        total = np.square(look(left, most, dy, dx)[0].max(-1)).sum(-1)
        i, j = divmod(int(total.argmax()), len(dx))
        gains, lengths = look(left, most, dy[i] + np.arange(-1, 2), dx[j] + np.arange(-1, 2))
        explained = float(np.square(gains.max(-1)).sum(-1).max())
        if explained > best_total:
            best, best_total = _spell(gains.reshape(9, most, -1), lengths.reshape(9, most), sizes), explained
    return best, best_total / float(np.square(ink).sum())


def _spell(gains: Array, lengths: Array, sizes: Array) -> str:
    """The best letter of every slot over moves; " " where too faint, "?" where like none; no blanks at the ends."""
    text = ""
    for slot in range(lengths.shape[1]):
        move, letter = divmod(int(gains[:, slot].argmax()), len(sizes))
        gain = float(gains[move, slot, letter])
        if gain < FAINT * sizes[letter]:
            text += " "
        else:
            text += LETTERS[letter % len(LETTERS)] if gain >= MIN_LETTER * lengths[move, slot] else "?"
    return text.strip()


def letters_area(text: str, size: str) -> float:
    """The area that a text's letters cover, in pixels of the working copy; unread ones count as the average letter."""
    areas = [float(_templates(size)[1][LETTERS.index(letter)]) for letter in text if letter in LETTERS]
    return sum(areas) * len(text.replace(" ", "")) / len(areas)


def _window(size: str) -> tuple[int, int]:
    """Height and width in pixels of the window that a letter is looked for in: a stroke more, and one advance."""
    high, wide = LETTER_HEIGHT[size], LETTER_ADVANCE[size]
    return 2 * math.ceil(SIDE * (high / 2 + stroke_of(high, wide) / 2)) + 2, round(SIDE * wide)


@cache
def _templates(size: str) -> tuple[Array, Array]:
    """The 26 letters, sharp and then soft, as rows of mean 0; and the area of each sharp one, in pixels."""
    high, wide = _window(size)
    rows: list[Array] = []
    for blur in (0.0, SOFT):
        for letter in LETTERS:
            word = Word(letter, "black", 0.5, LETTER_HEIGHT[size], LETTER_ADVANCE[size])
            drawn = Image.fromarray(render(Scene("word", Background((1.0, 1.0, 1.0)), words=(word,)), SIDE))
            ink = darkness(np.asarray(drawn.filter(ImageFilter.GaussianBlur(blur))))
            top, left = (SIDE - high) // 2, (SIDE - wide) // 2
            rows.append(ink[top : top + high, left : left + wide].ravel())
    templates = np.stack(rows)
    return templates - templates.mean(1, keepdims=True), templates[: len(LETTERS)].sum(1)


def darkness(drawn: NDArray[np.uint8]) -> Array:
    """How much of a pixel is black ink on white ground, in [0, 1]."""
    ink: Array = np.clip((255 - drawn[..., 0].astype(np.float32)) / (255 * (1 - COLOURS["black"][0])), 0, 1)
    return ink


def length(vectors: Array) -> Array:
    """Euclidean, over the last axis."""
    lengths: Array = np.sqrt(np.einsum("...c,...c->...", vectors, vectors))
    return lengths

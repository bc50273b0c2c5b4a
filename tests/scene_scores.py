"""Means of the scores of pictures of pocket's worlds, and what wrong captions score."""

from collections.abc import Iterable, Sequence

from torch import Tensor

from experiments.pocket_scores import other_captions
from mrflow.scenes.legible import READ_BY, hard_score
from mrflow.scenes.letters import Array
from mrflow.scenes.score import CATEGORIES, Scores, score


def score_many(pixels: Array | Tensor, captions: Sequence[str]) -> dict[str, float]:
    """The mean per category over pictures (n, 3, side, side); a category averages the pictures that have it."""
    return _means(score(picture, caption) for picture, caption in zip(pixels, captions, strict=True))


def chance(pixels: Array | Tensor, captions: Sequence[str]) -> dict[str, float]:
    """What `score_many` gives for wrong captions: each picture gets the next different caption of its own kind.

    Pictures whose caption is the only one of its kind are left out.
    """
    pairs = zip(pixels, other_captions(captions), strict=True)
    return _means(score(picture, other) for picture, other in pairs if other is not None)


def _means(scores: Iterable[Scores]) -> dict[str, float]:
    table = [s.as_dict() for s in scores]
    columns = {name: [row[name] for row in table if name in row] for name in (*CATEGORIES, "overall")}
    return {name: sum(values) / len(values) for name, values in columns.items() if values}


def hard_score_many(pixels: Array | Tensor, captions: Sequence[str]) -> dict[str, float]:
    """The mean of `hard_score` per category over pictures (n, 3, side, side) that have it."""
    rows = [hard_score(picture, caption) for picture, caption in zip(pixels, captions, strict=True)]
    columns = {name: [row[name] for row in rows if name in row] for name in (*READ_BY, "overall")}
    return {name: sum(values) / len(values) for name, values in columns.items() if values}

"""How methods look in every figure: a colour each, and a marker for each family of them."""

import re
from collections.abc import Callable, Iterable
from typing import NamedTuple

COLOURS = (
    "#2458c5", "#b4500a", "#1d7a4c", "#7a3fc2", "#b8216b", "#00798c", "#8a6d00", "#5b616e", "#c23a2b", "#4a7a00",
)  # fmt: skip
MARKERS = "osD^vP*X"  # matplotlib's names; the page draws the same eight


class Style(NamedTuple):
    """Places in `COLOURS` and `MARKERS`."""

    colour: int
    marker: int


def _kind(label: str) -> str:
    """What the labels of a family share: `sigma` of `sigma 0.12`, `native` of `native 12`."""
    return " ".join(re.sub(r"[-+]?\d[\d.,x]*", " ", label).replace("+", " ").split()) or label


def styles(labels: Iterable[str], family: Callable[[str], str] = _kind) -> dict[str, Style]:
    """For each label its own colour (they come again after ten), and the marker of its family.

    Where both have come already, it has the next marker: no two of up to 80 labels look the same.
    """
    families: dict[str, int] = {}
    out: dict[str, Style] = {}
    for label in labels:
        colour, marker = len(out) % len(COLOURS), families.setdefault(family(label), len(families))
        ways = [Style(colour, (marker + i) % len(MARKERS)) for i in range(len(MARKERS))]
        out[label] = next((way for way in ways if way not in out.values()), ways[0])
    return out

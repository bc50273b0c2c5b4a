"""The sizes of detail that questions are asked about: held-out captions of the hard world, tagged by kind and size."""

from dataclasses import dataclass, replace

from mrflow.errors import PlanError
from mrflow.scenes.hard import FACE_SIZES, GRIDS, HARD, LETTER_SIZES, PERIODS, HardWorld, held_out_hard_captions
from mrflow.sweep import Prompt


@dataclass(frozen=True)
class Detail:
    """One kind of detail: the numbers of `Legible` that say how much was read, and the world of each size.

    `sizes` are fractions of the side: a letter's height, a face's diameter, the pitch of a grid, a texture's period.
    """

    kind: str
    metric: str
    chance: float
    sizes: dict[str, float]
    worlds: dict[str, HardWorld]


def _percent(sizes: tuple[str, ...]) -> dict[str, float]:
    return {size: float(size.rstrip("%")) / 100 for size in sizes}


DETAILS = {
    "letters": Detail(
        "sign",
        "legible.letters",
        1 / 26,
        _percent(LETTER_SIZES),
        {size: replace(HARD, letters={size: 1.0}) for size in LETTER_SIZES},
    ),
    "faces": Detail(
        "faces",
        "legible.expressions",
        1 / 5,
        _percent(FACE_SIZES),
        {size: replace(HARD, faces={size: 1.0}) for size in FACE_SIZES},
    ),
    "grid": Detail(
        "grid",
        "legible.cells",
        1 / 64,
        {name: 0.8 / n for name, n in GRIDS.items()},
        {name: replace(HARD, grids={name: 1.0}) for name in GRIDS},
    ),
    "texture": Detail(
        "texture", "legible.texture", 1 / 10, PERIODS, {name: replace(HARD, periods={name: 1.0}) for name in PERIODS}
    ),
}


def prompts(count: int, details: list[str] | None = None, sizes: list[str] | None = None) -> list[Prompt]:
    """So many held-out captions of each size of each kind of detail, tagged `detail` and `size`.

    Raises:
        PlanError: no such detail has one of the sizes.
    """
    known = [size for name in details or DETAILS for size in DETAILS[name].sizes]
    if sizes is not None and (unknown := set(sizes) - set(known)):
        raise PlanError(f"no detail has the size {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    out = list[Prompt]()
    for name in details or DETAILS:
        detail = DETAILS[name]
        for size, world in detail.worlds.items():
            if sizes is not None and size not in sizes:
                continue
            texts = held_out_hard_captions(world, count, kind=detail.kind)
            out += [Prompt(text, {"detail": name, "size": size}) for text in texts]
    return out

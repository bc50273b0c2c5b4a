"""How methods look in every figure of the experiments: one colour and one marker each, the same in all of them."""

from collections.abc import Iterable
from itertools import cycle, product

from mrflow.sweep.styles import COLOURS

NATIVE, STAGED = ("#1c1d21", "o"), ("#2458c5", "s")
KNOWN = {
    "native": NATIVE,
    "fewer steps": NATIVE,  # the same method: native sampling
    "fewer steps, unguided": ("#8c8f96", "o"),
    "one forward": ("#1d7a4c", "o"),
    "truth, autoencoder": NATIVE,  # dashed: what the paths of both keep of the truth
    "truth, staged path": STAGED,
    "staged": STAGED,
    "staged, more refining steps": ("#3aa0d8", "s"),
    "latent nearest": ("#8a6d00", "D"),
    "staged, latents": ("#8a6d00", "D"),
    "latent bicubic": ("#d0a400", "D"),
    "student": ("#b4500a", "*"),
    "student, then staged": ("#e08a3c", "*"),
    "lift": ("#b8216b", "v"),
    "SelfLift": ("#c23a2b", "v"),
    "SPEED": ("#7a3fc2", "v"),
    "RALU": ("#00798c", "v"),
    "JiT": ("#1d7a4c", "v"),
    "Fresco": ("#5b616e", "v"),
    "TaylorSeer": ("#1d7a4c", "^"),
    "Spectrum": ("#7a3fc2", "^"),
    "MagCache": ("#00798c", "^"),
    "L2P": ("#c23a2b", "^"),
    "DBCache": ("#b8216b", "^"),
    "DBTaylor": ("#d98bb3", "^"),
    "TeaCache": ("#b4500a", "^"),
    "SeaCache": ("#4a7a00", "^"),
    "DMD": ("#5b616e", "^"),
}
"""Circles sample at one size, squares in stages (D: latents enlarged); v: other transitions, ^: caches, *: students."""


def looks(methods: Iterable[str]) -> dict[str, tuple[str, str]]:
    """A colour and a marker of each method: those of `KNOWN`, and for others ones that no method beside them has."""
    wanted = list(dict.fromkeys(methods))
    found = {method: KNOWN[method] for method in wanted if method in KNOWN}
    others = [(colour, marker) for marker, colour in product("^D*Xdhp", COLOURS[1:])]
    free = cycle(look for look in others if look not in found.values())
    return {method: found.get(method) or next(free) for method in wanted}

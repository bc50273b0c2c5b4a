"""When a cache is asked, and what its rule may look at."""

import math
from collections.abc import Callable, Sequence
from typing import Literal

from torch import Tensor

Feature = Literal["change", "output", "velocity"]
"""What is kept: what the skipped blocks add, the image stream after them, or the velocity behind the whole network."""


class Unseen(Exception):
    """A rule looked at a picture while there is none: it was only planned."""


class Evaluation:
    """What a rule may look at: one picture, about to be evaluated for the `index`-th time (from 0) in its branch.

    `place` is where that lies among the `total` evaluations of the integration (0: not known); they differ where a
    guidance asks a branch at some levels only. What is not looked at is not computed.
    """

    def __init__(
        self,
        index: int,
        place: int,
        total: int,
        sigma: float,
        *,
        modulated_input: Callable[[], Tensor] | None = None,
        change: Callable[[], Tensor] | None = None,
        latents: Callable[[], Tensor] | None = None,
        grid: tuple[int, int] | None = None,
    ) -> None:
        self.index, self.place, self.total, self.sigma = index, place, total, sigma
        self.grid = grid  # tokens down and across
        self._modulated_input, self._change, self._latents = modulated_input, change, latents

    @property
    def last(self) -> bool:
        """Whether the integration ends here."""
        return self.place == self.total - 1

    def modulated_input(self) -> Tensor:
        """The embedded image after the first block's modulated norm, before attention: (1, tokens, width)."""
        if self._modulated_input is None:
            raise Unseen
        return self._modulated_input()

    def change(self) -> Tensor:
        """What the blocks before the cached span added to the image stream: (1, tokens, width)."""
        if self._change is None:
            raise Unseen
        return self._change()

    def latents(self) -> Tensor:
        """The noisy latents that the network is asked about: (1, channels, height, width)."""
        if self._latents is None:
            raise Unseen
        return self._latents()


Rule = Callable[[Evaluation], bool]
"""Whether an evaluation is computed. Called once for each, in order; what it remembers is its own."""


class Clock:
    """Where among the announced levels a field is being asked."""

    def __init__(self, sigmas: Sequence[float]) -> None:
        self.sigmas, self.total = tuple(sigmas), len(sigmas)
        self.place, self.sigma = -1, math.nan
        self.grid: tuple[int, int] | None = None  # tokens down and across, of what is being asked for
        self.latents: Callable[[], Tensor] | None = None  # (items, channels, height, width), what is being asked for

    def tick(self, sigma: float) -> None:
        """The next evaluation is at `sigma`."""
        after = self.place + 1
        self.place = self.sigmas.index(sigma, after) if sigma in self.sigmas[after:] else after
        self.sigma = sigma

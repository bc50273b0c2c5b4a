"""What one field remembers while it is integrated: the step of a network in which some evaluations are left out."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mrflow.caches.clock import Clock, Evaluation, Feature, Rule
from mrflow.caches.extrapolate import Predictor
from mrflow.display.notes import add_forwards
from mrflow.flow import double
from mrflow.model_info import ModelInfo
from mrflow.protocols.pieces import Pieces

Streams = tuple[Tensor, ...]


class Item:
    """One picture's rule, and what was kept of it: (place, features), oldest first."""

    def __init__(self, rule: Rule, most: int) -> None:
        self.rule, self.most = rule, most
        self.kept: list[tuple[int, Streams]] = []

    def keep(self, place: int, features: Streams) -> None:
        """Remember a computed evaluation; the newest `most` are."""
        self.kept = [*self.kept, (place, features)][-self.most :]


class Settings(Protocol):
    """What a step asks of its cache (`mrflow.caches.Cache`)."""

    def rule(self, info: ModelInfo, sigmas: Sequence[float]) -> Rule:
        """A fresh rule for one picture."""
        ...

    def span(self, blocks: int) -> tuple[int, int]:
        """The blocks that may be left out."""
        ...

    def feature(self) -> Feature:
        """What is kept of a computed evaluation."""
        ...

    def extrapolation(self) -> Predictor:
        """How what was kept becomes what is used."""
        ...


class CachedStep:
    """A step with a cache: blocks in front, the span computed or stood in for, blocks behind, head.

    Pictures of a batch that are computed go through the span together. A batch of other shapes starts anew.
    """

    def __init__(self, cache: Settings, pieces: Pieces, clock: Clock, info: ModelInfo) -> None:
        self.cache, self.pieces, self.clock, self.info = cache, pieces, clock, info
        self.extrapolation, self.feature = cache.extrapolation(), cache.feature()
        start, stop = (0, pieces.count) if self.feature == "velocity" else cache.span(pieces.count)
        self.start = min(max(start, 0), pieces.count)
        self.stop = max(self.start, min(stop, pieces.count))
        self.items: list[Item] = []
        self.index = 0
        self.shapes: tuple[torch.Size, torch.Size] | None = None

    def __call__(
        self, tokens: Tensor, text: Tensor, cos: Tensor, sin: Tensor, table: Tensor, /, *, key: object = None
    ) -> Tensor:
        """The velocity's tokens."""
        if (tokens.shape, text.shape) != self.shapes:
            self._open(tokens.shape, text.shape)
        p = self.pieces
        img = p.embed(tokens)
        before = p.run(img, text, cos, sin, table, 0, self.start)
        due = self._due(img, before[0], table)
        self._count(due, img.shape[1])
        rows = [i for i, computed in enumerate(due) if computed]
        after = self._computed(rows, before, (cos, sin, table))
        if len(rows) < len(due):
            after = self._joined(due, before, after)
        self.index += 1
        if self.feature == "velocity":
            return after[0]
        if self.stop < p.count:
            after = p.run(after[0], after[1], cos, sin, table, self.stop, p.count)
        return p.head(after[0], table)

    def _computed(self, rows: Sequence[int], before: Streams, conditioning: Streams) -> Streams:
        """What these pictures have after the span, remembered; nothing where there are none."""
        if not rows:
            return ()
        p, (cos, sin, table) = self.pieces, conditioning
        if len(rows) < len(self.items):
            before = tuple(stream[rows] for stream in before)
            table = table[rows] if len(table) == len(self.items) else table
        img, txt = p.run(before[0], before[1], cos, sin, table, self.start, self.stop)
        after: Streams = (img, txt) if self.stop < p.count else (img,)  # the text is for blocks behind
        if self.feature == "velocity":
            after = (p.head(img, table),)
        features = after
        if self.feature == "change":
            features = tuple(new - old for new, old in zip(after, before, strict=False))
        for n, i in enumerate(rows):
            self.items[i].keep(self.clock.place, tuple(f[n : n + 1] for f in features))
        return after

    def _open(self, tokens: torch.Size, text: torch.Size) -> None:
        self.shapes, self.index = (tokens, text), 0
        self.items = [
            Item(self.cache.rule(self.info, self.clock.sigmas), self.extrapolation.keep) for _ in range(tokens[0])
        ]

    def _due(self, img: Tensor, front: Tensor, table: Tensor) -> list[bool]:
        """Whether each picture is computed: its rule says so, nothing is kept of it, or no block can be left out."""
        seen: dict[str, Tensor] = {}

        clock, due = self.clock, list[bool]()
        shown: dict[str, Callable[[], Tensor]] = {
            "modulated_input": lambda: self.pieces.modulated_input(img, table),
            "change": lambda: front - img,
            **({} if clock.latents is None else {"latents": clock.latents}),
        }

        def show(name: str, i: int) -> Tensor:
            if name not in seen:
                seen[name] = shown[name]()
            return seen[name][i : i + 1]

        for i, item in enumerate(self.items):
            eyes = {name: partial(show, name, i) for name in shown}
            look = Evaluation(self.index, clock.place, clock.total, clock.sigma, **eyes, grid=clock.grid)
            due.append(item.rule(look) or not item.kept or self.start == self.stop)
        return due

    def _joined(self, due: Sequence[bool], before: Streams, fresh: Streams) -> Streams:
        """What was computed and what stands in for the rest, in the pictures' order."""
        rows: list[Streams] = []
        at = 0
        for i, computed in enumerate(due):
            if computed:
                rows.append(tuple(f[at : at + 1] for f in fresh))
                at += 1
            else:
                features = self._predicted(self.items[i])
                if self.feature == "change":
                    features = tuple(b[i : i + 1] + f for b, f in zip(before, features, strict=False))
                rows.append(features)
        if len(rows) == 1:
            return rows[0]
        return tuple(torch.cat(stream) for stream in zip(*rows, strict=True))

    def _predicted(self, item: Item) -> Streams:
        """The features at this place, from those that were kept; sums are float32."""
        places, clock, out = [place for place, _ in item.kept], self.clock, list[Tensor]()
        for stream in zip(*(features for _, features in item.kept), strict=True):
            gram = partial(products, stream, stream)
            weights = self.extrapolation.weights(places, clock.place, total=clock.total, gram=gram)
            if weights == (1.0,):
                out.append(stream[0])
                continue
            total = torch.zeros_like(stream[0], dtype=torch.float32)
            for weight, feature in zip(weights, stream, strict=True):
                if weight:
                    total.add_(feature, alpha=weight)
            out.append(total.to(stream[0].dtype))
        return tuple(out)

    def _count(self, due: Sequence[bool], tokens: int) -> None:
        blocks, span = self.pieces.count, self.stop - self.start
        kept = 0.0 if self.feature == "velocity" else 1 - span / blocks
        forwards = sum(due) + kept * (len(due) - sum(due))
        add_forwards(type(self.cache).__name__, len(due), sum(due), forwards, tokens=tokens)


def products(left: Sequence[Tensor], right: Sequence[Tensor]) -> NDArray[np.float64]:
    """Inner products (left, right) of features of one shape, summed in float64, a piece at a time."""
    total = double(torch.zeros(len(left), len(right), device=left[0].device))
    pieces = [[f.flatten().split(1 << 20) for f in side] for side in (left, right)]
    for ours, theirs in zip(zip(*pieces[0], strict=True), zip(*pieces[1], strict=True), strict=True):
        total += double(torch.stack(ours)) @ double(torch.stack(theirs)).T
    return total.cpu().numpy()

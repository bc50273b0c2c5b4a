"""What caches are fitted to: how a model's features change from one evaluation to the next."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import cast

import numpy as np
import torch
from torch import Tensor

from mrflow.backbone import Backbone, Condition
from mrflow.caches.base import Pieces, difference
from mrflow.caches.cached import check_open
from mrflow.errors import PlanError
from mrflow.flow import Velocity
from mrflow.guidance import Guidance
from mrflow.runner import run
from mrflow.schedules import Schedule
from mrflow.spec import ModelInfo
from mrflow.stages.sample import Sample
from mrflow.upscaler import Upscaler


@dataclass(frozen=True)
class Change:
    """From one evaluation to the next: relative L1 of the modulated input and of the network's output, and the mean
    over tokens of the ratio of lengths of what the blocks add."""

    probe: float
    output: float
    ratio: float


Track = list[Change]


class Witness:
    """A step that computes everything and writes down how it changed."""

    def __init__(self, pieces: Pieces, *, tracks: list[Track]) -> None:
        self.pieces, self.track = pieces, Track()
        self.before: tuple[Tensor, Tensor, Tensor] | None = None
        tracks.append(self.track)

    def __call__(
        self, tokens: Tensor, text: Tensor, cos: Tensor, sin: Tensor, table: Tensor, /, *, key: object = None
    ) -> Tensor:
        """The velocity's tokens."""
        p = self.pieces
        img = p.embed(tokens)
        out, _ = p.run(img, text, cos, sin, table, 0, p.count)
        velocity = p.head(out, table)
        now = (p.probe(img, table), velocity, (out - img).float().norm(dim=-1))
        if self.before is not None:
            probe, output, size = self.before
            ratio = float((now[2] / (size + 1e-8)).mean())
            self.track.append(Change(difference(now[0], probe), difference(now[1], output), ratio))
        self.before = now
        return velocity


class Watched:
    """A model whose fields write down how they change; all else is the model's own."""

    takes_levels = True

    def __init__(self, model: Backbone, tracks: list[Track]) -> None:
        self._model, self._tracks = model, tracks

    @property
    def info(self) -> ModelInfo:
        """The model's facts."""
        return self._model.info

    @property
    def device(self) -> torch.device:
        """Where it lives."""
        return self._model.device

    @property
    def upscaler(self) -> Upscaler | None:
        """Its own."""
        return self._model.upscaler

    def condition(self, prompts: Sequence[str]) -> Condition:
        """As the model encodes them."""
        return self._model.condition(prompts)

    def field(
        self, cond: Condition, *, guidance: float | None = None, levels: Sequence[float] | None = None
    ) -> Velocity:
        """The model's field, watched."""
        field = cast("Callable[..., Velocity]", self._model.field)
        return field(cond, guidance=guidance, levels=levels, step=partial(Witness, tracks=self._tracks))

    def encode(self, pixels: Tensor, noise: Tensor | None = None) -> Tensor:
        """As the model does."""
        return self._model.encode(pixels, noise)

    def decode(self, latents: Tensor) -> Tensor:
        """As the model does."""
        return self._model.decode(latents)


def observe(
    model: Backbone,
    prompts: Sequence[str],
    *,
    size: tuple[int, int] | None,
    schedule: Schedule,
    guidance: Guidance | None,
    seed: int,
) -> list[Track]:
    """The changes of each prompt in each branch of the guidance, while it is sampled with `schedule`.

    Raises:
        PlanError: the model cannot be taken apart, or there are no prompts.
    """
    check_open(model)
    if not prompts:
        raise PlanError("calibration needs at least one prompt; a dozen different ones are better")
    tracks: list[Track] = []
    stage = Sample(*(size or model.info.low), schedule, guidance=guidance)
    for prompt in prompts:
        run(stage, cast("Backbone", Watched(model, tracks)), prompt, seed=seed)
    return tracks


def fit(pairs: Sequence[tuple[float, float]], degree: int) -> tuple[float, ...]:
    """Coefficients, highest power first, of the polynomial nearest to (x, y) `pairs` in least squares.

    Raises:
        PlanError: there are too few different pairs for the degree.
    """
    x, y = np.array(pairs, dtype=np.float64).reshape(-1, 2).T
    advice = "give more prompts or steps, or a lower degree"
    if len(x) <= degree:
        raise PlanError(f"{len(x)} changes do not fix a polynomial of degree {degree}; {advice}")
    found, _, rank, _, _ = np.polyfit(x, y, degree, full=True)
    if rank <= degree or not np.isfinite(found).all():
        raise PlanError(f"the changes are too alike to fix a polynomial of degree {degree}; {advice}")
    return tuple(float(c) for c in found)

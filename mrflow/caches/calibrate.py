"""What caches are fitted to: how a model's features change from one evaluation to the next."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mrflow._checks import check_sides
from mrflow.backbone import Backbone, Condition, FieldOptions, Wrapper
from mrflow.caches.base import Cache, difference
from mrflow.caches.clock import Clock, Rule
from mrflow.caches.memory import products
from mrflow.caches.taylorseer import Of
from mrflow.errors import PlanError
from mrflow.flow import Velocity
from mrflow.guidance import Guidance, own_guidance
from mrflow.model_info import Capabilities, ModelInfo
from mrflow.protocols.pieces import Pieces, StepFactory, TransformerStep
from mrflow.schedules import Schedule
from mrflow.solvers import Euler
from mrflow.spec import Latents, check_size
from mrflow.stage import Context


@dataclass(frozen=True)
class FeatureChange:
    """From one evaluation to the next: relative L1 of the modulated input and of the network's output, and the mean
    over tokens of the ratio of lengths of what the blocks add."""

    modulated_input: float
    output: float
    ratio: float


Track = list[FeatureChange]


class RecordingStep:
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
        now = (p.modulated_input(img, table), velocity, (out - img).float().norm(dim=-1))
        if self.before is not None:
            modulated, output, size = self.before
            ratio = float((now[2] / (size + 1e-8)).mean())
            self.track.append(FeatureChange(difference(now[0], modulated), difference(now[1], output), ratio))
        self.before = now
        return velocity


class ProductsStep:
    """A step that computes everything and writes down the inner products of its features: a row for each evaluation,
    with all evaluations before and itself."""

    def __init__(self, pieces: Pieces, *, rows: list[list[NDArray[np.float64]]], of: Of) -> None:
        self.pieces, self.of, self.row, self.features = pieces, of, list[NDArray[np.float64]](), list[Tensor]()
        rows.append(self.row)

    def __call__(
        self, tokens: Tensor, text: Tensor, cos: Tensor, sin: Tensor, table: Tensor, /, *, key: object = None
    ) -> Tensor:
        """The velocity's tokens."""
        p = self.pieces
        out, _ = p.run(p.embed(tokens), text, cos, sin, table, 0, p.count)
        velocity = p.head(out, table)
        feature = out if self.of == "output" else velocity
        self.features.append(feature.clone())
        self.row.append(products([feature], self.features)[0])
        return velocity


class Recording(Cache):
    """A cache that leaves nothing out and writes down what `step` sees in each branch."""

    def __init__(self, step: StepFactory) -> None:
        self.step = step

    def rule(self, info: ModelInfo, sigmas: Sequence[float]) -> Rule:
        """Everything is computed."""
        return lambda look: True

    def make_step(self, pieces: Pieces, clock: Clock, info: ModelInfo) -> TransformerStep:
        """The step that writes down."""
        return self.step(pieces)


class RecordingModel(Wrapper):
    """A model whose fields are opened around `step`, which writes down what it sees; all else is the model's own."""

    def __init__(self, model: Backbone, step: StepFactory) -> None:
        super().__init__(model)
        self._cache = Recording(step)

    @property
    def info(self) -> ModelInfo:
        """The model's facts; each branch is written down by itself, so none are run together."""
        info = self.model.info
        return replace(info, capabilities=replace(info.capabilities, together=False))

    def field(self, cond: Condition, options: FieldOptions = FieldOptions()) -> Velocity:
        """The model's field, watched."""
        return self.model.field(cond, replace(options, cache=self._cache))


@dataclass(frozen=True)
class Calibration:
    """What a cache is fitted to: each prompt sampled by itself at `size` (None: the model's low size)."""

    model: Backbone
    prompts: Sequence[str]
    size: tuple[int, int] | None
    schedule: Schedule
    guidance: Guidance | None
    seed: int

    def record(self, step: StepFactory) -> None:
        """Sample all prompts, through a new `step` in each branch of the guidance.

        Raises:
            PlanError: the model cannot be taken apart, or there are no prompts.
        """
        info = self.model.info
        info.require(Capabilities(cache=True))
        if not self.prompts:
            raise PlanError("calibration needs at least one prompt; a dozen different ones are better")
        height, width = check_sides("size", self.size, info.low)
        check_size(height, width, info.space)
        scale = info.space.downscale
        out = Latents(1, height // scale, width // scale, info.space, 1.0)
        sigmas, guidance = self.schedule(1.0, out.tokens, info), self.guidance or own_guidance(info)
        watched = RecordingModel(self.model, step)
        with torch.inference_mode():
            negative = self.model.condition([info.negative]) if guidance.passes > 1 else None
            for prompt in self.prompts:
                cond = self.model.condition([prompt])
                ctx = Context(watched, cond, negative, (self.seed,), "Sample/0", prompts=(prompt,))
                ctx.integrate(Euler(), guidance, ctx.noise(out.shape), sigmas)

    def observe(self) -> list[Track]:
        """The changes of each prompt in each branch of the guidance.

        Raises:
            PlanError: as `record`.
        """
        tracks: list[Track] = []
        self.record(partial(RecordingStep, tracks=tracks))
        return tracks

    def inner_products(self, of: Of) -> list[NDArray[np.float64]]:
        """<F_s, F_t> (evaluations, evaluations) for each prompt in each branch; F is the last block's output or the
        velocity, as `of` says.

        Raises:
            PlanError: as `record`.
        """
        tracks: list[list[NDArray[np.float64]]] = []
        self.record(partial(ProductsStep, rows=tracks, of=of))
        found = list[NDArray[np.float64]]()
        for rows in tracks:
            lower = np.stack([np.pad(row, (0, len(rows) - len(row))) for row in rows])
            found.append(lower + np.tril(lower, -1).T)
        return found


def fit_polynomial(pairs: Sequence[tuple[float, float]], degree: int) -> tuple[float, ...]:
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

"""A model with a cache in all its fields: a backbone like any other."""

import uuid
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import cast

import torch
from torch import Tensor

from mrflow.adapters import Lora, with_loras
from mrflow.backbone import Backbone, Condition
from mrflow.caches.base import Cache, Clock, check_cache
from mrflow.errors import PlanError, RecordError
from mrflow.flow import Velocity
from mrflow.records import fingerprint
from mrflow.spec import ModelInfo
from mrflow.upscaler import Upscaler


def takes_step(model: object) -> bool:
    """Whether a model's `field` takes `step=`: something that is given its pieces and gives the step to use instead."""
    return getattr(model, "takes_step", False) is True


class Cached:
    """`model`, with `cache` opened anew in every field. Build it with `cache(model)` or directly.

    The branches of a guidance are asked one after another, each with a memory of its own: it has no `together`.
    `info.version` names the cache, so that results of stages are never taken for those of the bare model.
    """

    takes_levels = True

    def __init__(self, model: Backbone, cache: Cache) -> None:
        check_cache(cache, model.info)
        check_open(model)
        self._model, self._cache = model, cache
        try:
            mark = fingerprint(cache)
        except RecordError:  # a class whose source cannot be read: its results are never reused
            mark = uuid.uuid4().hex
        version = f"{model.info.version}+{type(cache).__name__}-{mark[:12]}"
        self._info = replace(model.info, version=version, cache=cache)

    @property
    def info(self) -> ModelInfo:
        """The model's facts, with this cache among them."""
        return self._info

    @property
    def device(self) -> torch.device:
        """Where the model lives."""
        return self._model.device

    @property
    def upscaler(self) -> Upscaler | None:
        """The model's own."""
        return self._model.upscaler

    def condition(self, prompts: Sequence[str]) -> Condition:
        """As the model encodes them."""
        return self._model.condition(prompts)

    def adapted(self, loras: Sequence[Lora]) -> "Cached":
        """The model with adapters, in this cache."""
        return Cached(with_loras(self._model, loras), self._cache)

    def field(
        self, cond: Condition, *, guidance: float | None = None, levels: Sequence[float] | None = None
    ) -> Velocity:
        """The model's field with a fresh memory; `levels` are the sigmas it will be asked for."""
        clock, patch = Clock(levels or ()), self._model.info.space.patch
        open_field = cast("Callable[..., Velocity]", self._model.field)
        step = partial(self._cache.opened, clock=clock, info=self._model.info)
        inner = open_field(cond, guidance=guidance, levels=levels, step=step)

        def velocity(x: Tensor, sigma: float) -> Tensor:
            clock.tick(sigma)
            clock.grid = (x.shape[-2] // patch, x.shape[-1] // patch)
            return inner(x, sigma)

        return velocity

    def encode(self, pixels: Tensor, noise: Tensor | None = None) -> Tensor:
        """As the model does."""
        return self._model.encode(pixels, noise)

    def decode(self, latents: Tensor) -> Tensor:
        """As the model does."""
        return self._model.decode(latents)


def check_open(model: Backbone) -> None:
    """Refuse a model whose network cannot be taken apart.

    Raises:
        PlanError: its `field` takes no `step`.
    """
    if not takes_step(model):
        raise PlanError(
            f"{model.info.name} cannot be cached: its network cannot be taken apart; a backbone of your own says "
            "takes_step = True and hands its pieces to field(..., step=...)"
        )

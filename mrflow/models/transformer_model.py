"""What models share whose field is one transformer's: how each option of a field is served."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from mrflow.backbone import Condition, FieldOptions
from mrflow.checkpoints.adapters import Lora, PiFlow
from mrflow.errors import PlanError
from mrflow.flow import Velocity
from mrflow.model_info import ModelInfo
from mrflow.models.mixed_attention import MixedStep
from mrflow.protocols.pieces import StepFactory
from mrflow.protocols.policies import PolicyField
from mrflow.protocols.tokens import CombinedField


class TransformerModel(ABC):
    """A model of one transformer. A family adds `make_field`, and `with_loras`, the model with adapters."""

    _info: ModelInfo
    _device: torch.device

    @property
    def info(self) -> ModelInfo:
        """Facts, with the version of these weights."""
        return self._info

    @property
    def device(self) -> torch.device:
        """Where latents and pixels live."""
        return self._device

    @abstractmethod
    def make_field(self, cond: Condition, options: FieldOptions, step: StepFactory | None) -> Velocity:
        """The velocity for guidance, sigmas, positions and conditions beside; `step` takes the network's own place."""

    @abstractmethod
    def with_loras(self, loras: Sequence[Lora]) -> "TransformerModel":
        """The same model with these adapters on top: all weights are shared, and none is changed.

        Raises:
            WeightsError: a file is missing, holds no LoRA, or does not fit.
        """

    def policies(self, adapter: PiFlow, loras: Sequence[Lora]) -> "PolicyModel":
        """The same model with a pi-Flow adapter on top. A model whose facts say `policy` has its own.

        Raises:
            PlanError: the model takes none. WeightsError: a file is missing or does not fit.
        """
        raise PlanError(f"{self.info.name} takes no pi-Flow adapter; load FLUX.1 or Qwen-Image, without a cache")

    def check(self, options: FieldOptions) -> None:
        """Refuse what the model cannot do, and adapters that do not fit.

        Raises:
            PlanError, WeightsError: as `field`.
        """
        self.info.require(options.needs)
        if options.policy is not None:
            self.policies(options.policy, options.loras)
        elif options.loras:
            self.with_loras(options.loras)

    def field(self, cond: Condition, options: FieldOptions = FieldOptions()) -> Velocity:
        """The velocity of the flow; announced sigmas have their modulations made first.

        Raises:
            PlanError: the model cannot do what is asked. WeightsError: an adapter is missing or does not fit.
        """
        self.info.require(options.needs)
        if options.policy is not None:
            return self.policies(options.policy, options.loras).field(cond, options)
        if options.loras:
            return self.with_loras(options.loras).field(cond, replace(options, loras=()))
        if options.cache is not None:
            return options.cache.field(partial(self.make_field, cond, options), options.sigmas, self.info)
        if options.attention is not None:
            return self.make_field(cond, options, partial(MixedStep, mix=options.attention))
        return self.make_field(cond, options, None)


class PolicyModel(ABC):
    """A model with a pi-Flow adapter."""

    @abstractmethod
    def field(self, cond: Condition, options: FieldOptions) -> PolicyField:
        """A fresh field for one integration, whose network gives policies."""


def side_by_side(cond: Condition, beside: Sequence[Condition]) -> Condition:
    """Conditions of equal shapes as one over a larger batch."""
    conds = (cond, *beside)
    return Condition({name: torch.cat([c[name] for c in conds]) for name in cond.tensors})


def repeat(field: Velocity, times: int) -> Velocity:
    """A field over a larger batch as one of latents that serve each part of it."""

    def combine(inner: Velocity) -> Velocity:
        def velocity(x: Tensor, sigma: float) -> Tensor:
            return inner(x.repeat(times, *[1] * (x.ndim - 1)), sigma)

        return velocity

    return CombinedField(combine, (field,)) if times > 1 else field

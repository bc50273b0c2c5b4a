"""Qwen-Image as a backbone: text encoder, transformer and autoencoder behind the methods that stages use."""

import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mrflow.backbone import Condition, FieldOptions
from mrflow.errors import PlanError
from mrflow.flow import Velocity
from mrflow.models.blocks import Transformer
from mrflow.models.fields import ModulationTables
from mrflow.models.folded import FoldedLinear
from mrflow.models.language_conditioned import LanguageConditioned
from mrflow.models.qwen.field import QwenField, qwen_step
from mrflow.models.qwen.transformer import QwenImage
from mrflow.protocols.pieces import StepFactory
from mrflow.protocols.tokens import CombinedField

KEPT = 64  # levels whose modulations stay: 4.4 MB each in bfloat16


class Qwen(LanguageConditioned):
    """Qwen-Image, or a model of its architecture. Build it with `mrflow.load`."""

    step = staticmethod(qwen_step)

    def __init__(self, *, tables: Mapping[float, Tensor] | None = None, **parts: Any) -> None:  # noqa: ANN401
        super().__init__(**parts)
        self._folded = (
            None
            if tables is None
            else {k: t.to(self._device, self.transformer.stream_dtype) for k, t in tables.items()}
        )
        self._kept: OrderedDict[float, Tensor] = OrderedDict()
        self._keeping = threading.Lock()

    def _variant(self, net: Transformer, mark: str) -> "Qwen":
        """As for all models; modulations are kept apart, since adapters may change them."""
        other = super()._variant(net, mark)
        other._kept, other._keeping = OrderedDict(), threading.Lock()
        return other

    def _check_changes(self, changed: Mapping[str, object]) -> None:
        """Modulations that were made beforehand cannot change any more."""
        touched = [path for path in changed if isinstance(self.transformer.get_submodule(path), FoldedLinear)]
        if touched:
            raise PlanError(
                f"the LoRA changes modulations ({touched[0]}), which were made while loading, fold=chain: load the "
                "model with fold=True"
            )

    @property
    def transformer(self) -> QwenImage:
        """The network itself: `embed_image`, `some_blocks`, `head` and `attention` are open to wrappers."""
        assert isinstance(self._net, QwenImage)
        return self._net

    def make_field(self, cond: Condition, options: FieldOptions, step: StepFactory | None) -> Velocity:
        """The velocity of the flow: all conditions in one pass, linears over all tokens, attention by item.

        With a `step`: one for all items, or one each where their texts differ in length, which it could not tell apart.
        """
        if options.guidance is not None:
            raise PlanError(f"{self._info.name} has no guidance embedding; use CFG(scale, rescale=True)")
        table = ModulationTables(self._tables, options.sigmas if self._runtime.fold else None)
        using = partial(self._offload.using, "main")
        make = partial(QwenField, self.transformer, table=table, using=using, positions=options.positions)
        if step is None or options.attention is not None:
            branches = [self._states(each) for each in (cond, *options.beside)]
            own = self._step if step is None else step(self._pieces)
            return make(branches, step=own, padded=options.attention is not None)
        items = self._states(cond)
        alike = len({len(item) for item in items}) == 1
        fields = [
            make([group], step=step(self._pieces)) for group in ([items] if alike else [[item] for item in items])
        ]

        def combine(*inner: Velocity) -> Velocity:
            def velocity(x: Tensor, sigma: float) -> Tensor:
                if x.shape[0] != len(items):
                    raise PlanError(f"latents for {x.shape[0]} pictures met a condition for {len(items)}")
                parts = x.split(len(x) // len(inner))
                return torch.cat([field(part, sigma) for field, part in zip(inner, parts, strict=True)])

            return velocity

        return CombinedField(combine, tuple(fields))

    def _tables(self, sigmas: Sequence[float]) -> list[Tensor]:
        """Modulations at these levels: made beforehand, kept from an earlier picture, or made now."""
        if self._folded is None and not self._runtime.fold:
            return self._made(sigmas)
        if self._folded is None:
            with self._keeping:
                if new := [sigma for sigma in sigmas if sigma not in self._kept]:
                    self._kept.update(zip(new, self._made(new), strict=True))
                found = [self._kept[sigma] for sigma in sigmas]
                for sigma in sigmas:
                    self._kept.move_to_end(sigma)
                while len(self._kept) > KEPT:
                    self._kept.popitem(last=False)
            return found
        if unknown := [sigma for sigma in sigmas if sigma not in self._folded]:
            raise PlanError(
                f"{self._info.name} was loaded with fold=chain, for the levels of that chain; sigma {unknown[0]:g} is "
                "not among them: load it with fold=True, or with the chain that is run"
            )
        return [self._folded[sigma] for sigma in sigmas]

    def _made(self, sigmas: Sequence[float]) -> list[Tensor]:
        return self.transformer.tables([torch.full((1,), sigma, device=self._device) for sigma in sigmas])

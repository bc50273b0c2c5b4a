"""Z-Image as a backbone: text encoder, transformer and FLUX's autoencoder behind the methods that stages use."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from mrflow.backbone import Condition, FieldOptions
from mrflow.errors import PlanError
from mrflow.flow import Velocity
from mrflow.models.fields import ModulationTables
from mrflow.models.language_conditioned import LanguageConditioned
from mrflow.models.zimage.field import ZImageField, alike
from mrflow.models.zimage.transformer import ZImage
from mrflow.protocols.pieces import StepFactory
from mrflow.protocols.tokens import CombinedField


class ZImageModel(LanguageConditioned):
    """Z-Image, Turbo or not, or a model of its architecture. Build it with `mrflow.load`."""

    @property
    def transformer(self) -> ZImage:
        """The network itself: `embed_image`, `some_blocks`, `head` and `attention` are open to wrappers."""
        assert isinstance(self._net, ZImage)
        return self._net

    def make_field(self, cond: Condition, options: FieldOptions, step: StepFactory | None) -> Velocity:
        """The velocity of the flow, branch by branch; texts that fill up to one length are a batch."""
        if options.guidance is not None:
            raise PlanError(f"{self._info.name} has no guidance embedding; use CFG(scale)")
        batch = cond.batch
        texts = [states for each in (cond, *options.beside) for states in self._states(each)]
        table = ModulationTables(self._tables, options.sigmas if self._runtime.fold else None)
        groups = [list(range(len(texts)))] if options.attention is not None else alike(texts)
        fields = [
            ZImageField(
                self.transformer,
                [texts[i] for i in rows],
                step=self._step if step is None else step(self._pieces),
                table=table,
                using=partial(self._offload.using, "main"),
                positions=options.positions,
            )
            for rows in groups
        ]
        to = [torch.tensor(rows, device=self._device) for rows in groups]
        of = [torch.tensor([i % batch for i in rows], device=self._device) for rows in groups]

        def combine(*inner: Velocity) -> Velocity:
            def velocity(x: Tensor, sigma: float) -> Tensor:
                if x.shape[0] != batch:
                    raise PlanError(f"latents for {x.shape[0]} pictures met a condition for {batch}")
                out = torch.empty(len(texts), *x.shape[1:], device=x.device)
                for rows, items, field in zip(to, of, inner, strict=True):
                    out.index_copy_(0, rows, field(x.index_select(0, items), sigma))
                return out

            return velocity

        return CombinedField(combine, tuple(fields))

    def _tables(self, sigmas: Sequence[float]) -> list[Tensor]:
        """Modulations at these levels."""
        return self.transformer.tables([torch.full((1,), sigma, device=self._device) for sigma in sigmas])

"""Where tokens lie when they are no grid: some regions finer than others."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import cast

from jaxtyping import Float
from torch import Tensor

from mrflow.backbone import Backbone, Condition
from mrflow.errors import PlanError
from mrflow.flow import Velocity


@dataclass(frozen=True, eq=False)
class Places:
    """Rows and columns (n, 2) of n tokens on a grid of height x width tokens, counted from 0; halves are between.

    A field that is given places takes its n tokens as latents of one row of tokens: (batch, channels, patch, patch n).
    """

    at: Float[Tensor, "n 2"]
    height: int
    width: int


class Placed:
    """A model whose fields are told where their tokens lie; all else is the model's own.

    Raises:
        PlanError: the model cannot be told.
    """

    takes_levels = True

    def __init__(self, model: Backbone, places: Places) -> None:
        check_places(model)
        self._model, self._places = model, places

    def __getattr__(self, name: str) -> object:
        value = getattr(self._model, name)
        return partial(value, places=self._places) if name == "together" else value

    def field(
        self, cond: Condition, *, guidance: float | None = None, levels: Sequence[float] | None = None
    ) -> Velocity:
        """The model's field, told the places."""
        inner = cast("Callable[..., Velocity]", self._model.field)
        return inner(cond, guidance=guidance, levels=levels, places=self._places)


def check_places(model: Backbone) -> None:
    """Refuse a model that works on whole grids only.

    Raises:
        PlanError: its `field` takes no `places`.
    """
    if getattr(model, "takes_places", False) is not True:
        raise PlanError(
            f"{model.info.name} draws on whole grids only; a backbone of your own says takes_places = True and takes "
            "field(..., places=...)"
        )

"""An integration of packed latents gives the bits of one that packs in every step."""

from typing import Any

import pytest
import torch
from torch import Tensor

import mrflow as mf
from mrflow import solvers
from mrflow.models.flux.backbone import Flux1
from mrflow.models.flux.transformer import Flux, FluxParams
from mrflow.models.flux.vae import VaeFlux, VaeParams
from mrflow.solvers import Solver, Step
from mrflow.tokens import TokenField

POINTWISE = [
    kind() for kind in vars(solvers).values() if isinstance(kind, type) and issubclass(kind, Solver) and kind.pointwise
]


@pytest.fixture(scope="module")
def context() -> mf.Context:
    """Of two pictures of a small FLUX.1."""
    torch.manual_seed(0)
    sizes: Any = {"context": 16, "pooled": 8, "hidden": 32, "heads": 2, "axes": (4, 6, 6)}
    flow = Flux(FluxParams(**sizes, double_blocks=1, single_blocks=1))
    vae = VaeFlux(VaeParams(channels=(32,) * 4, blocks=1))
    model = Flux1(flow=flow, vae=vae, text=None, info=mf.FLUX, device=torch.device("cpu"))
    cond = mf.Condition({"context": torch.randn(2, 5, 16), "pooled": torch.randn(2, 8)})
    return mf.Context(model, cond, None, (1, 2), "test")


def drawn(context: mf.Context, solver: Solver, *, packed: bool, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The end of an integration, and what its steps told."""
    monkeypatch.setattr(type(solver), "pointwise", packed)
    told, x = list[Step](), torch.randn(2, 16, 6, 10, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        end = context.integrate(solver, mf.Distilled(), x, (1.0, 0.8, 0.5, 0.2, 0.0), watch=told.append)
    return [end, *(t for step in told for t in (step.x, step.denoised))]


@pytest.mark.parametrize("solver", POINTWISE, ids=repr)
def test_packed_once_is_packed_in_every_step(
    context: mf.Context, solver: Solver, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert isinstance(context.model.field(context.cond), TokenField)
    once, always = (drawn(context, solver, packed=packed, monkeypatch=monkeypatch) for packed in (True, False))
    assert all(torch.equal(a, b) for a, b in zip(once, always, strict=True))


def test_solvers_that_look_at_neighbours_are_given_latents(
    context: mf.Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control: packed, such a step would be another. No solver is taken for pointwise that does not say so."""

    class Smooth(Solver):
        def step(self, v: Any, x: Tensor, sigma: float, to: float, past: Any) -> Any:
            return (x + x.roll(1)) / 2 + (to - sigma) * v(x, sigma), ()

    assert len(POINTWISE) >= 12 and not Smooth.pointwise and not mf.DormandPrince.pointwise
    once, always = (drawn(context, Smooth(), packed=packed, monkeypatch=monkeypatch) for packed in (True, False))
    assert not torch.equal(once[0], always[0])

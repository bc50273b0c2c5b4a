"""An integration of packed latents gives the bits of one that packs in every step, and packs once."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import mrflow as mf
from mrflow import solvers
from mrflow.caches import SeaCache
from mrflow.models.flux.backbone import Flux1
from mrflow.models.flux.transformer import Flux, FluxParams
from mrflow.models.flux.vae import VaeFlux, VaeParams
from mrflow.protocols import tokens
from mrflow.protocols.tokens import TokenField
from mrflow.solvers import Solver, Step
from tests.tiny import write_flux_repo, write_qwen_repo, write_zimage_repo

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


MODELS: dict[str, Any] = {"flux": write_flux_repo, "qwen": write_qwen_repo, "zimage": write_zimage_repo}
PROMPTS = ["a red cat", "a much longer tale of two towns, and of what is left of them"]
ONCE = {
    "distilled": mf.Distilled(),
    "cfg": mf.CFG(3.0),
    "two passes": mf.CFG(3.0, packed=False),
    "interval": mf.Interval(mf.CFG(3.0), 0.3, 0.8),
    "rescaled": mf.CFG(3.0, rescale=True),
    "nag": mf.NAG(3.0),
    "cached": mf.CFG(3.0),
}
ALWAYS = {"apg": mf.APG(3.0), "tcfg": mf.TCFG(3.0), "cfg zero": mf.CFGZero(3.0)}  # they sum over pictures


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return mf.load(MODELS[request.param](tmp_path_factory.mktemp("tokens") / "repo"), device="cpu")


class Packs:
    """How often latents were packed and unpacked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made = {"pack": 0, "unpack": 0}
        for name in self.made:
            monkeypatch.setattr(tokens, name, partial(self._counted, name, getattr(tokens, name)))

    def _counted(self, name: str, f: Any, *args: Any, **options: Any) -> Tensor:
        self.made[name] += 1
        return f(*args, **options)

    def of(self, chain: Any, model: Any, prompts: Sequence[str]) -> tuple[Tensor, tuple[int, int]]:
        """The latents of a run, and the calls of `pack` and `unpack` in it."""
        self.made.update(pack=0, unpack=0)
        latents = mf.run(chain, model, prompts, seed=list(range(len(prompts)))).data
        return latents, (self.made["pack"], self.made["unpack"])


@pytest.mark.parametrize("name", [*ONCE, *ALWAYS])
def test_a_picture_is_packed_once_whatever_guides_it(name: str, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two prompts of different lengths, three steps, every family; the bits are those of packing in every step."""
    guidance = (ONCE | ALWAYS)[name]
    cache = SeaCache(1e-3) if name == "cached" else None
    chain = mf.Sample(32, 48, mf.Shifted(3), guidance=guidance, cache=cache)
    packs = Packs(monkeypatch)
    latents, made = packs.of(chain, model, PROMPTS)
    monkeypatch.setattr(mf.Euler, "pointwise", False)
    assert made == (1, 1) if name in ONCE else made > (1, 1)
    want, each = packs.of(chain, model, PROMPTS)
    assert torch.equal(latents, want) and each[0] >= 2


def test_a_cache_that_looks_at_latents_sees_them(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unpacked for each look, and for nothing else; without the control, a cache of packed latents would see tokens."""
    chain = mf.Sample(32, 48, mf.Shifted(4), guidance=mf.CFG(2.0), cache=SeaCache(0.5, of="latents"))
    packs = Packs(monkeypatch)
    latents, made = packs.of(chain, model, PROMPTS[:1])
    monkeypatch.setattr(mf.Euler, "pointwise", False)
    assert made[0] == 1 < made[1] and torch.equal(latents, packs.of(chain, model, PROMPTS[:1])[0])

"""Nothing in a step waits for the device: steps run on the meta device, from which no number can be read at all."""

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import mrflow as mf
from mrflow.backbone import FieldOptions, Positions
from mrflow.checkpoints.blueprint import blueprint
from mrflow.errors import NonFiniteError
from mrflow.models.flux.backbone import Flux1
from mrflow.models.flux.transformer import Flux, FluxParams
from mrflow.models.flux.vae import VaeFlux, VaeParams
from mrflow.models.qwen.backbone import Qwen
from mrflow.models.qwen.transformer import QwenImage, QwenParams
from mrflow.models.qwen.vae import QwenVaeParams, VaeQwen
from mrflow.models.zimage.backbone import ZImageModel
from mrflow.models.zimage.facts import TURBO
from mrflow.models.zimage.transformer import ZImage, ZImageParams
from mrflow.solvers import FiniteCheck, Step

META = torch.device("meta")
READ = ("_local_scalar_dense", "equal", "is_nonzero", "nonzero", "masked_select", "unique_dim", "_unique2")


class Syncs(TorchDispatchMode):
    """Refuses what makes a CPU wait for a device: reading a number, and copies between the two."""

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        name = func.overloadpacket.__name__
        if name in READ:
            raise AssertionError(f"{name} waits for the device")
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and (t.ndim or name == "copy_")]
        devices = {t.device.type for t in given}
        if name == "_to_copy":
            devices |= {torch.device((kwargs or {}).get("device") or args[0].device).type}
        if len(devices) > 1:
            raise AssertionError(f"{name} copies between devices")
        return func(*args, **(kwargs or {}))


class Lists(TorchFunctionMode):
    """Refuses numbers of Python's that are copied to the device, which no operator shows."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        index = args[1] if func in (Tensor.__getitem__, Tensor.__setitem__) else ()
        if func is torch.tensor or any(isinstance(i, list) for i in (index if isinstance(index, tuple) else (index,))):
            raise AssertionError(f"{func.__name__} copies between devices")
        return func(*args, **(kwargs or {}))


SIGMAS = (1.0, 0.8, 0.5, 0.2, 0.0)
SMALL: dict[str, Any] = {"context": 16, "hidden": 32, "heads": 2, "axes": (4, 6, 6)}


def made(family: str) -> Any:
    """A model that lies on the meta device, without text encoders."""
    with blueprint():
        if family == "flux":
            parts: dict[str, Any] = {
                "flow": Flux(FluxParams(**SMALL, pooled=8, double_blocks=2, single_blocks=2)),
                "vae": VaeFlux(VaeParams()),
                "info": mf.FLUX,
            }
            return Flux1(**parts, text=None, device=META)
        if family == "qwen":
            parts = {"flow": QwenImage(QwenParams(**SMALL, double_blocks=2)), "vae": VaeQwen(QwenVaeParams())}
            return Qwen(**parts, text=None, info=mf.QWEN, device=META)
        parts = {"flow": ZImage(ZImageParams(**SMALL, layers=2)), "vae": VaeFlux(VaeParams())}
        info = replace(TURBO, architecture=replace(mf.FLUX.architecture, context=16))
        return ZImageModel(**parts, text=None, info=info, device=META)


def words(lengths: Sequence[int]) -> mf.Condition:
    """Encoded prompts of these lengths."""
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    tensors = {"context": torch.randn(len(lengths), max(lengths), 16), "mask": mask}
    return mf.Condition({**tensors, "pooled": torch.randn(len(lengths), 8)})


@pytest.fixture(scope="module", params=["flux", "qwen", "zimage"])
def away(request: pytest.FixtureRequest) -> mf.Context:
    """The context of a stage of two pictures, of a model from which nothing can be read."""
    return mf.Context(made(request.param), words((40, 6)), words((6, 40)), (1, 2), "test")


def guarded(ctx: mf.Context, monkeypatch: pytest.MonkeyPatch, size: tuple[int, int] = (8, 12), **settings: Any) -> int:
    """Integrate with all steps after the first under `Syncs`; how many states wait to be looked at."""
    left, guard = list[int](), ExitStack()
    monkeypatch.setattr(FiniteCheck, "end", lambda self: left.append(len(self.waiting)))

    def told(step: Step) -> None:
        if step.index == 1:
            guard.enter_context(Syncs())
            guard.enter_context(Lists())
        if step.index == step.steps:
            guard.close()

    x = torch.empty(2, ctx.model.info.space.channels, *size, device=META)
    given = {"solver": mf.Euler(), "guidance": mf.CFG(3.0), **settings}
    with guard:
        out = ctx.integrate(x=x, sigmas=SIGMAS, watch=told, **given)
    assert out.shape == x.shape and out.device == META
    return left[-1]  # those before are of schedules that were planned


@pytest.mark.parametrize(
    "guidance",
    [mf.Distilled(), mf.CFG(3.0), mf.CFG(3.0, packed=False), mf.CFG(3.0, rescale=True), mf.APG(3.0), mf.CFGZero(3.0)],
    ids=repr,
)
@pytest.mark.parametrize("solver", [mf.Euler(), mf.UniPC()], ids=repr)
def test_no_step_waits_for_the_device(
    away: mf.Context, guidance: mf.Guidance, solver: mf.Solver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In no family, with one pass and with two, of texts of equal and of different lengths; states are read at once."""
    assert guarded(away, monkeypatch, guidance=guidance, solver=solver) == len(SIGMAS) - 1


def test_nor_where_tokens_lie_on_no_grid(away: mf.Context, monkeypatch: pytest.MonkeyPatch) -> None:
    options = FieldOptions(positions=Positions(torch.rand(24, 2) * 4, 4, 6, parts=2))
    assert guarded(away, monkeypatch, (2, 48), options=options) == len(SIGMAS) - 1


@pytest.mark.parametrize(
    ("wait", "said"),
    [
        (lambda x: float(x.sum()), "_local_scalar_dense waits"),
        (lambda x: bool((x > 0).any()), "_local_scalar_dense waits"),
        (lambda x: torch.equal(x, x), "equal waits"),
        (lambda x: torch.ones(2).to(x.device), "copies between"),
        (lambda x: x.to("cpu"), "copies between"),
        (lambda x: x[torch.tensor([1, 0])], "copies between"),
        (lambda x: x[[1, 0]], "copies between"),
        (lambda x: torch.tensor([1.0, 2.0], device=x.device), "copies between"),
    ],
)
def test_a_step_that_waits_is_seen(away: mf.Context, wait: Any, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control."""

    class Waiting(mf.Euler):
        def step(self, v: Any, x: Tensor, *args: Any) -> Any:
            if args[0] < 1.0 and x.ndim:
                wait(x)
            return super().step(v, x, *args)

    with pytest.raises(AssertionError, match=said):
        guarded(away, monkeypatch, solver=Waiting())


@pytest.mark.parametrize(("value", "what"), [(math.nan, "NaN"), (-math.inf, "infinity")])
def test_states_that_were_remembered_are_refused_with_their_step(value: float, what: str) -> None:
    """Of a device from which nothing is read before the last step was asked for."""
    check, good, bad = FiniteCheck(), torch.full((2, 3), -3e38), torch.tensor([1.0, value])
    check.waiting = [(torch.linalg.vector_norm(x, math.inf), f"after step {i}") for i, x in enumerate((good, bad, bad))]
    with pytest.raises(NonFiniteError, match=f"^{what} after step 1$"):
        check.end()
    check.waiting = check.waiting[:1]
    check.end()  # large numbers, whose sum is infinite, are finite

"""Chains, plans and their error texts."""

from dataclasses import dataclass
from typing import Generic, TypeVar

import pytest
import torch
from torch import Tensor

import mrflow as mf
from mrflow.stage import Work
from mrflow.testing.laws import LawBroken

FULL = (
    mf.Sample(512, 512, mf.Shifted(12))
    >> mf.Decode()
    >> mf.Upscale(mf.Lanczos(2))
    >> mf.Encode()
    >> mf.Reinject(sigma=0.12)
    >> mf.Refine(mf.Linear(1))
    >> mf.Decode()
)


@dataclass(frozen=True)
class Wrong(mf.Stage[mf.Pixels, mf.Pixels]):
    """Plans one thing."""

    fault: str

    def plan(self, spec: mf.Pixels, model: mf.ModelInfo) -> mf.Pixels:
        if self.fault == "plan raises":
            raise RuntimeError("oops")
        if self.fault == "plan lies":
            return mf.Start(1)  # type: ignore[return-value]
        return spec

    def apply(self, state: mf.State[mf.Pixels], out: mf.Pixels, ctx: mf.Context) -> Tensor:
        x = state.data
        if self.fault == "shape":
            return x[..., :-1]
        if self.fault == "dtype":
            return x.double()
        if self.fault == "range":
            return x + 2
        if self.fault == "nan":
            return x * float("nan")
        if self.fault == "none":
            return None  # type: ignore[return-value]
        if self.fault == "raises":
            raise mf.PlanError("no luck")
        if self.fault == "mutates":
            return state.data.mul_(0.5)
        return x


def test_the_printed_plan_reads_as_in_the_readme() -> None:
    lines = str(mf.plan(FULL, mf.FLUX)).splitlines()
    assert lines[1].split() == ["1", "Sample", "Start(batch=1)", "->", "Latents", "64x64", "sigma=0", "12", "258", "T"]
    assert lines[5].split() == [
        "5",
        "Reinject",
        "Latents",
        "128x128",
        "sigma=0",
        "->",
        "Latents",
        "128x128",
        "sigma=0.12",
    ]
    assert lines[7].split()[:-2] == ["7", "Decode", "Latents", "128x128", "sigma=0", "->", "Pixels", "1024x1024"]
    assert mf.plan(FULL, mf.FLUX).nfe == 13
    assert mf.plan(FULL, mf.QWEN).nfe == 26


@pytest.mark.parametrize(
    ("make", "kind", "text"),
    [
        (
            lambda: mf.Sample(512, 512) >> mf.Upscale(mf.Lanczos()),  # type: ignore[operator]
            mf.ChainError,
            "Sample (stage 1) gives Latents, but Upscale (stage 2) takes Pixels. Put Decode() between them.",
        ),
        (
            lambda: FULL >> mf.Reinject(0.1),  # type: ignore[operator]
            mf.ChainError,
            "Decode (stage 7) gives Pixels, but Reinject (stage 8) takes Latents. Put Encode() between them.",
        ),
        (lambda: mf.Sample(64, 64) >> mf.Decode, mf.ChainError, "stage 2 is the class Decode; make one: Decode(...)"),  # type: ignore[operator]
        (
            lambda: mf.plan(mf.Sample(512, 500) >> mf.Decode(), mf.FLUX),
            mf.PlanError,
            "stage 1 of 2, Sample(...): size 512x500 is not a multiple of 16; try 512x496",
        ),
        (
            lambda: mf.plan(mf.Sample(512, 512) >> mf.Refine(mf.Linear(1)), mf.FLUX),
            mf.PlanError,
            "stage 2 of 2, Refine(...): latents are already clean (sigma 0); put Reinject(sigma=...) before Refine()",
        ),
        (
            lambda: mf.plan(FULL[:5] >> mf.Decode(), mf.FLUX),  # type: ignore[operator]
            mf.PlanError,
            "stage 6 of 6, Decode(): latents still hold noise (sigma 0.12); put Refine() before Decode()",
        ),
        (
            lambda: mf.plan(mf.Sample(512, 512, stop=0.5) >> mf.Reinject(0.6), mf.FLUX),
            mf.PlanError,
            "put Refine() before Reinject()",
        ),
        (lambda: mf.plan(mf.Sample(0, 512), mf.FLUX), mf.PlanError, "height must be from 16 to 32768 pixels, got 0"),
        (lambda: mf.plan(mf.Sample(-16, 512), mf.FLUX), mf.PlanError, "got -16"),
        (lambda: mf.plan(mf.Sample(512, 99999), mf.FLUX), mf.PlanError, "width must be from 16 to 32768"),
        (lambda: mf.plan(mf.Sample(512.0, 512), mf.FLUX), mf.PlanError, "height must be a whole number"),  # type: ignore[arg-type]
        (lambda: mf.plan(FULL, mf.FLUX, batch=0), mf.PlanError, "batch must be a whole number above 0, got 0"),
        (
            lambda: mf.plan(mf.Decode(), mf.FLUX),
            mf.PlanError,
            "takes Latents, but is given Start(batch=1); pass start=",
        ),
        (
            lambda: mf.plan(mf.Decode(), mf.FLUX, start=mf.Latents(1, 8, 8, mf.QWEN.space)),
            mf.PlanError,
            "latents are of qwen-image, the model flux1-dev works in flux1",
        ),
        (
            lambda: mf.plan(FULL[:2] >> mf.Upscale(mf.Lanczos(), (1024, 1000)), mf.FLUX),  # type: ignore[operator]
            mf.PlanError,
            "1024x1000 has another aspect than 512x512; 1008x1008 would keep it",
        ),
        (
            lambda: mf.plan(FULL[:2] >> mf.Upscale(mf.Lanczos(), (256, 256)), mf.FLUX),  # type: ignore[operator]
            mf.PlanError,
            "256x256 is smaller than what comes in (512x512)",
        ),
        (
            lambda: mf.plan(FULL[:2] >> Wrong("plan raises"), mf.FLUX),  # type: ignore[operator]
            mf.PlanError,
            "stage 3 of 3, Wrong(...): its plan failed with RuntimeError: oops",
        ),
        (
            lambda: mf.plan(FULL[:2] >> Wrong("plan lies"), mf.FLUX),  # type: ignore[operator]
            mf.PlanError,
            "its plan gave Start(batch=1), but it is declared to give Pixels",
        ),
        *(
            (
                lambda s=s: mf.plan(FULL[:4] >> mf.Reinject(s), mf.FLUX),
                mf.PlanError,
                "sigma must be above 0 and at most 1",
            )  # type: ignore[misc,operator]
            for s in (0.0, -0.1, 1.5, float("nan"), float("inf"))
        ),
    ],
)
def test_error_texts(make, kind, text) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(kind) as caught:
        make()
    assert text in str(caught.value)
    assert isinstance(caught.value, mf.MrflowError)


def test_a_stage_must_say_what_it_takes_and_gives() -> None:
    with pytest.raises(mf.ChainError, match="does not say what it takes and gives"):

        class Silent(mf.Stage):  # type: ignore[type-arg]
            pass


S = TypeVar("S", bound=mf.Spec)
T = TypeVar("T", bound=mf.Spec)


class Between(mf.Stage[S, mf.Latents]):
    """A base that leaves open what it takes."""


class Wider(Between[S], Generic[S, T]):
    """Another one on top."""


def test_a_base_between_may_leave_its_ends_open() -> None:
    class Mine(Between[mf.Start]):
        pass

    class Deeper(Wider[mf.Pixels, mf.Start]):
        pass

    assert (Mine.takes, Mine.gives) == (mf.Start, mf.Latents)
    assert (Deeper.takes, Deeper.gives) == (mf.Pixels, mf.Latents)
    assert not hasattr(Between, "takes")
    assert (mf.Sample.takes, mf.Refine.takes) == (mf.Start, mf.Latents)

    class Same(Mine):
        pass

    assert Same.takes is mf.Start
    with pytest.raises(mf.ChainError, match="Undecided does not say what it takes and gives"):

        class Undecided(Between):  # type: ignore[type-arg]
            pass


@pytest.mark.parametrize(
    ("fault", "kind", "text"),
    [
        ("shape", mf.PromiseError, "promised Pixels 64x64 (1, 3, 64, 64) but made a tensor of shape (1, 3, 64, 63)"),
        ("dtype", mf.PromiseError, "torch.float64; between stages everything is float32"),
        ("range", mf.PromiseError, "pixels must lie in [0, 1]"),
        ("nan", mf.NonFiniteError, "NaN or infinity"),
        ("none", mf.PromiseError, "must give a tensor, got NoneType"),
        ("raises", mf.PlanError, "stage 3 of 3, Wrong(...): no luck"),
    ],
)
def test_a_broken_promise_is_named(fault: str, kind: type[Exception], text: str) -> None:
    with pytest.raises(kind) as caught:
        mf.run(mf.Sample(64, 64) >> mf.Decode() >> Wrong(fault), mf.toy())
    assert text in str(caught.value)
    assert "stage 3 of 3, Wrong(...)" in str(caught.value)


def test_a_stage_that_changes_what_it_was_given_is_caught() -> None:
    with pytest.raises(LawBroken, match="changed the tensor it was given"):
        mf.testing.check_stage(Wrong("mutates"))


def test_slices_and_repr() -> None:
    assert len(FULL[:4]) == 4
    assert FULL[:4].gives is mf.Latents
    assert FULL[4:].takes is mf.Latents
    assert str(FULL).count(">>") == 6
    assert "Reinject(sigma=0.12" in str(FULL)
    assert hash(FULL) == hash(FULL[:7])


def test_work_adds_up_and_is_counted_for_every_solver_and_guidance() -> None:
    def nfe(**settings: object) -> int:
        return mf.plan(mf.Sample(512, 512, mf.Shifted(8), **settings), mf.QWEN).nfe  # type: ignore[arg-type]

    assert nfe(guidance=mf.Distilled()) == 8
    assert nfe() == 16
    assert nfe(solver=mf.Heun(), guidance=mf.Distilled()) == 15  # the last step, to 0, is Euler's
    assert nfe(solver=mf.AB2(), guidance=mf.CFG(3.0)) == 16
    assert Work(1, 2.0) + Work(2, 3.0, True) == Work(3, 5.0, True)


def test_speed_up_by_arithmetic_matches_the_published_count() -> None:
    """FLUX.1-dev 12+1 at 1024 x 1024: 10.5x less arithmetic than 50 native steps, Qwen-Image with CFG 13.1x."""
    for model, expected in ((mf.FLUX, 10.48), (mf.QWEN, 13.08)):
        native = mf.plan(mf.recipes.native(), model).work.flops
        staged = mf.plan(mf.recipes.paper(mf.Lanczos()), model).work.flops
        assert native / staged == pytest.approx(expected, rel=0.025)


def test_plan_makes_no_tensor() -> None:
    before = torch.get_rng_state()
    mf.plan(FULL, mf.FLUX)
    assert torch.equal(before, torch.get_rng_state())

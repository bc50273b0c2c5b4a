"""Every law lets through what is right; `test_law_words` holds what each catches."""

from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, replace
from types import ModuleType

import pytest
import torch

import mrflow as mf
from mrflow.backbone import Backbone, Condition, FieldOptions
from mrflow.flow import Velocity
from mrflow.solvers import integrate
from mrflow.testing import (
    LAWS,
    LawBroken,
    check_backbone,
    check_cache,
    check_guidance,
    check_noise,
    check_schedule,
    check_solver,
    check_stage,
    check_transition,
    check_upscaler,
    of_caches,
    of_schedules,
    of_slots,
    of_solvers,
    of_stages,
)
from tests.spoiled import (
    Even,
    SpoiledCache,
    SpoiledGrowth,
    SpoiledGuidance,
    SpoiledModel,
    SpoiledNoise,
    SpoiledUpscaler,
)
from tests.spoiled import SpoiledEuler as Step
from tests.spoiled import SpoiledReinjection as Reinjection


def test_laws_have_names_sentences_formulas_and_sources() -> None:
    assert len({(law.kind, law.name) for law in LAWS}) == len(LAWS)
    for law in LAWS:
        assert law.sentence.endswith(".") and law.formula and law.source


RIGHT: list[Callable[[], None]] = [
    lambda: check_schedule(Even()),
    lambda: check_solver(Step(), order=1),
    lambda: check_stage(Reinjection()),
    lambda: check_transition(SpoiledGrowth()),
    lambda: check_transition(SpoiledGrowth(), sigma=0.3, size=(4, 6)),
    lambda: check_guidance(SpoiledGuidance()),
    lambda: check_noise(SpoiledNoise()),
    lambda: check_cache(SpoiledCache()),
    lambda: check_upscaler(SpoiledUpscaler()),
    lambda: check_backbone(SpoiledModel()),
    lambda: check_backbone(mf.load("pocket", device="cpu")),
    *(lambda g=g: check_guidance(g) for g in (mf.Distilled(), mf.CFG(3.0), mf.CFG(3.0, rescale=True), mf.CFG(1.0))),
    lambda: check_guidance(mf.Interval(mf.CFG(2.0), 0.2, 0.9)),
    *(lambda n=n: check_noise(n) for n in (mf.PerItem(), mf.Stream(1, skip=1), mf.Nested(2))),
    *(lambda u=u: check_upscaler(u) for u in (mf.Lanczos(3), mf.Interpolate(2))),
    *(lambda c=c: check_cache(c) for c in (mf.caches.TaylorSeer(2), mf.caches.DBCache(0.1))),
    *(lambda c=c: check_cache(c) for c in (mf.caches.Spectrum(warmup=2), mf.caches.SeaCache(), mf.caches.DMD(1.0))),
    *(lambda c=c: check_cache(c) for c in (mf.caches.TeaCache(0.25), mf.caches.DBCache(0.4, front=2, warmup=1))),
    *(lambda c=c: check_cache(c) for c in (mf.caches.ToMA(0.5), mf.caches.TaylorSeer(2, of="velocity"))),
    lambda: check_cache(mf.caches.L2P(((), (), (-1.0, 2.0), (), (-0.5, 1.5)))),
    lambda: check_transition(mf.Grow(), sigma=0.8),
]


@pytest.mark.parametrize("check", RIGHT)
def test_a_counterexample_with_nothing_spoiled_keeps_all_laws(check: Callable[[], None]) -> None:
    check()


@pytest.mark.parametrize(
    ("room", "laws", "check"),
    [
        (of_schedules, "SCHEDULE_LAWS", lambda: check_schedule(Even())),
        (of_solvers, "SOLVER_LAWS", lambda: check_solver(Step(), order=1)),
        (of_stages, "STAGE_LAWS", lambda: check_stage(Reinjection())),
        (of_stages, "TRANSITION_LAWS", lambda: check_transition(SpoiledGrowth())),
        (of_slots, "GUIDANCE_LAWS", lambda: check_guidance(SpoiledGuidance())),
        (of_slots, "NOISE_LAWS", lambda: check_noise(SpoiledNoise())),
        (of_caches, "CACHE_LAWS", lambda: check_cache(SpoiledCache())),
        (of_slots, "UPSCALER_LAWS", lambda: check_upscaler(SpoiledUpscaler())),
        (of_slots, "BACKBONE_LAWS", lambda: check_backbone(SpoiledModel())),
    ],
)
def test_a_check_holds_every_law(
    room: ModuleType, laws: str, check: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    held, every = list[str](), getattr(room, laws)
    watched = [replace(law, check=lambda *_, name=law.name, **__: held.append(name)) for law in every]
    monkeypatch.setattr(room, laws, copy(every))
    getattr(room, laws)[:] = watched
    check()
    assert held == [law.name for law in every] and all(law in LAWS for law in every)


def test_a_transition_that_keeps_the_mean_alone_is_caught() -> None:
    with pytest.raises(LawBroken, match="'picture': from 8x8 at 0.6: channel 0 of a cosine of 0 half-waves down and 1"):
        check_transition(SpoiledGrowth("mean"))


def test_a_stochastic_solver_is_held_to_its_marginal() -> None:
    check_solver(mf.StochasticEuler(), order=1)
    check_solver(mf.StochasticEuler(3.0), order=1)


def test_a_solver_that_chooses_its_steps_is_held_to_its_tolerance() -> None:
    check_solver(mf.BogackiShampine(), order=3)


def test_the_variance_that_a_stochastic_solver_leaves_is_that_of_many_draws() -> None:
    """Unit responses, summed exactly, against 200,000 random trajectories of four steps."""
    generator, count, n = torch.Generator().manual_seed(0), 200_000, 4

    def true(sigma: float) -> float:
        return sigma**2 + (1 - sigma) ** 2

    sigmas = [0.9 - 0.2 * i for i in range(n + 1)]
    x = true(0.9) ** 0.5 * torch.randn(count, 1, generator=generator)
    draw = lambda: torch.randn(count, 1, generator=generator)  # noqa: E731
    end = integrate(mf.StochasticEuler(1.0), lambda x, s: (2 * s - 1) / true(s) * x, x, sigmas, noise=draw)
    assert of_solvers._variance(mf.StochasticEuler(1.0), n, 0.9) == pytest.approx(
        float(end.var()) / true(0.1), rel=0.02
    )


def test_a_guidance_that_asks_for_the_levels_to_come_keeps_all_laws() -> None:
    """They are announced, as an integration announces them."""

    class ByLevels(SpoiledGuidance):
        def field(
            self, model: Backbone, cond: Condition, negative: Condition | None, options: FieldOptions = FieldOptions()
        ) -> Velocity:
            assert options.sigmas is not None and len(options.sigmas) > 1
            return super().field(model, cond, negative, options)

    check_guidance(ByLevels())


@dataclass(frozen=True)
class Leaves(SpoiledCache):
    """Leaves out every second evaluation, whatever its threshold."""

    threshold: float = 1.0


@pytest.mark.parametrize("threshold", [0.5, 1.0])
def test_a_threshold_of_0_is_tried_whatever_the_caches_own_is(threshold: float) -> None:
    with pytest.raises(LawBroken, match="has threshold 0 and leaves out blocks"):
        check_cache(Leaves(threshold=threshold))


def test_the_toy_encodes_with_a_deviation_of_a_hundredth() -> None:
    pixels, noise = torch.rand(2, 3, 8, 8), torch.randn(2, 3, 4, 4)
    mean = mf.toy().encode(pixels)
    torch.testing.assert_close(mf.toy().encode(pixels, noise) - mean, 0.01 * noise, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(mean, 2 * pixels.unflatten(2, (4, 2)).unflatten(4, (4, 2)).mean((3, 5)) - 1)

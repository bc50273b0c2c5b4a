"""Every law lets through what is right; `test_law_words` holds what each catches."""

from collections.abc import Callable
from dataclasses import replace
from types import ModuleType

import pytest

import mrflow as mf
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
from mrflow.testing.of_caches import SpoiledCache
from mrflow.testing.of_schedules import Even
from mrflow.testing.of_slots import SpoiledGuidance, SpoiledModel, SpoiledNoise, SpoiledUpscaler
from mrflow.testing.of_solvers import SpoiledEuler as Step
from mrflow.testing.of_stages import SpoiledGrowth
from mrflow.testing.of_stages import SpoiledReinjection as Reinjection


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
    monkeypatch.setattr(room, laws, tuple(watched))
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

"""APG, CFG-Zero* and TCFG: they reduce to CFG, and are diffusers' guiders; what each leaves in the direction of CFG."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import mrflow as mf
from mrflow import flow
from mrflow.errors import PlanError
from mrflow.guidance import APG, CFG, TCFG, CFGZero, Guidance
from mrflow.testing import check_guidance
from tests.test_guidance import Mock, parts

NEUTRAL: list[Callable[[float], Guidance]] = [
    lambda scale: APG(scale, momentum=0.0, eta=1.0),
    lambda scale: CFGZero(scale, zero=0, star=False),
    lambda scale: TCFG(scale, damping=0.0),
]
LAWFUL: list[Guidance] = [
    APG(3.0),
    APG(3.0, momentum=0.0, eta=0.3, threshold=0.5),
    CFGZero(3.0, zero=0),
    TCFG(3.0),
    TCFG(3.0, damping=0.4),
    *(make(2.0) for make in NEUTRAL),
]


@pytest.mark.parametrize("guidance", LAWFUL, ids=repr)
def test_they_keep_the_laws_of_guidance(guidance: Guidance) -> None:
    check_guidance(guidance)


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, 4.0])
@pytest.mark.parametrize("make", NEUTRAL)
def test_their_neutral_setting_is_cfg(make: Callable[[float], Guidance], scale: float) -> None:
    model = Mock()
    x, _, _, cond, negative = parts(model)
    got = make(scale).field(model, cond, negative)
    want = CFG(scale).field(model, cond, negative)
    for sigma in (1.0, 0.3):
        torch.testing.assert_close(got(x, sigma), want(x, sigma), rtol=0, atol=2e-6)


@pytest.mark.parametrize("guidance", [APG(1.0), CFGZero(1.0, zero=0), TCFG(1.0)], ids=repr)
def test_scale_one_is_the_conditional_in_one_pass(guidance: Guidance) -> None:
    model = Mock()
    x, c, _, cond, _ = parts(model)
    assert torch.equal(guidance.field(model, cond, None)(x, 0.3), c)
    assert len(model.calls) == guidance.passes == 1


# diffusers' guiders


@pytest.mark.parity
@pytest.mark.parametrize("threshold", [None, 0.5])
@pytest.mark.parametrize("momentum", [0.0, -0.5])
@pytest.mark.parametrize("eta", [0.0, 0.4])
def test_apg_is_that_of_diffusers_on_clean_estimates(eta: float, momentum: float, threshold: float | None) -> None:
    from diffusers.guiders.adaptive_projected_guidance import MomentumBuffer, normalized_guidance

    model = Mock()
    x, _, _, cond, negative = parts(model)
    field = APG(4.0, momentum=momentum, eta=eta, threshold=threshold).field(model, cond, negative)
    buffer: Any = MomentumBuffer(momentum)
    for sigma in (0.9, 0.7, 0.3):
        clean = [flow.denoised(x, model.field(each.repeat(2))(x, sigma), sigma) for each in (cond, negative)]
        want = normalized_guidance(*clean, 3.0, buffer, eta, threshold or 0.0, use_original_formulation=True)
        got = flow.denoised(x, field(x, sigma), sigma)
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


@pytest.mark.parity
def test_tcfg_is_that_of_diffusers() -> None:
    from diffusers.guiders.tangential_classifier_free_guidance import normalized_guidance

    model = Mock()
    x, c, u, cond, negative = parts(model)
    got = TCFG(4.0).field(model, cond, negative)(x, 0.3)
    torch.testing.assert_close(got, normalized_guidance(c, u, 4.0), rtol=0, atol=2e-5)


@pytest.mark.parity
def test_the_scale_of_cfg_zero_is_that_of_diffusers() -> None:
    from diffusers.guiders.classifier_free_zero_star_guidance import cfg_zero_star_scale

    model = Mock()
    x, c, u, cond, negative = parts(model)
    s = cfg_zero_star_scale(c.flatten(1), u.flatten(1))[:, :, None, None]
    got = CFGZero(4.0).field(model, cond, negative)(x, 0.3)
    torch.testing.assert_close(got, s * u + 4.0 * (c - s * u), rtol=0, atol=1e-5)


# What they do


def inner(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum((1, 2, 3))


def test_apg_without_eta_leaves_the_length_along_the_estimate() -> None:
    model = Mock()
    x, c, _, cond, negative = parts(model)
    clean = flow.denoised(x, c, 0.3)
    got = flow.denoised(x, APG(8.0, momentum=0.0).field(model, cond, negative)(x, 0.3), 0.3)
    torch.testing.assert_close(inner(got - clean, clean), torch.zeros(2), rtol=0, atol=1e-3)
    assert float((got - clean).norm()) > 1


def test_the_threshold_bounds_the_change() -> None:
    model = Mock()
    x, c, _, cond, negative = parts(model)
    got = APG(3.0, momentum=0.0, eta=1.0, threshold=0.25).field(model, cond, negative)(x, 0.3)
    change = (0.3 * (got - c)).flatten(1).norm(dim=1)
    torch.testing.assert_close(change, torch.full((2,), 2 * 0.25), rtol=1e-4, atol=0)
    far, none = (APG(3.0, threshold=t).field(model, cond, negative)(x, 0.3) for t in (1e6, None))
    assert torch.equal(far, none)


def test_cfg_zero_takes_no_pass_at_the_beginning_from_sigma_one() -> None:
    model = Mock()
    x, _, _, cond, negative = parts(model)
    guidance = CFGZero(4.0, zero=2)
    points = (1.0, 0.8, 0.5, 0.3)
    field = guidance.field(model, cond, negative)
    zero = [not bool(field(x, sigma).any()) for sigma in points]
    assert zero == [True, True, False, False]
    assert [sigma for _, sigma in model.calls] == [0.5, 0.5, 0.3, 0.3]
    assert guidance.evals(points) == 4
    assert guidance.branches(points) == ((0.5, 0.3), (0.5, 0.3))
    later = guidance.field(model, cond, negative)
    assert bool(later(x, 0.8).any())
    assert guidance.evals(points[1:]) == 6


def test_a_plan_counts_what_cfg_zero_leaves_out() -> None:
    chain = mf.Sample(32, 32, mf.Linear(6), guidance=CFGZero(3.0)) >> mf.Decode()
    result = mf.run(chain, mf.toy(), "a")
    assert result.nfe == result.plan.nfe == 10


def test_damping_leaves_what_both_share() -> None:
    """Where u is orthogonal to a longer c, nothing of it is left: scale c."""
    c, u = torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2, 2)
    c[0, 0, 0, 0], u[0, 0, 1, 1] = 2.0, 1.0
    mix = TCFG(3.0).mix(Mock().info)
    torch.testing.assert_close(mix(c, 0.5, c, u), 3.0 * c, rtol=0, atol=1e-6)


BAD: list[tuple[Callable[[], Guidance], str]] = [
    (lambda: APG(-1.0), "scale must be"),
    (lambda: APG(2.0, momentum=1.5), "momentum must be from -1 to 1"),
    (lambda: APG(2.0, eta=-0.1), "eta must be from 0"),
    (lambda: APG(2.0, threshold=-1.0), "threshold must be"),
    (lambda: CFGZero(2.0, zero=-1), "zero must be a whole number"),
    (lambda: TCFG(2.0, damping=1.1), "damping must be from 0 to 1"),
]


@pytest.mark.parametrize(("make", "text"), BAD)
def test_settings_are_checked(make: Callable[[], Guidance], text: str) -> None:
    with pytest.raises(PlanError, match=text):
        make()


@pytest.mark.parametrize("make", [APG, CFGZero, TCFG])
def test_two_branches_need_a_negative(make: Callable[[float], Guidance]) -> None:
    model = Mock()
    with pytest.raises(PlanError, match="needs a negative; encode one"):
        make(3.0).field(model, model.condition(["abc"]), None)

"""Guidance against its formulas, on a backbone whose velocity is told by its condition."""

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor

import mrflow as mf
from mrflow.backbone import Backbone, Condition
from mrflow.display.notes import collect_notes
from mrflow.errors import PlanError
from mrflow.flow import Velocity
from mrflow.guidance import CFG, Distilled, Guidance, Interval, own_guidance, token_norm
from mrflow.model_info import FLUX, QWEN, SCHNELL, ModelInfo
from mrflow.schedules import Linear
from mrflow.solvers import RK4, Heun, Solver, integrate

SHAPE = (2, 16, 6, 4)


class Mock:
    """A backbone whose velocity is W x + sigma, W drawn from the condition's number; it writes down every call."""

    def __init__(self, info: ModelInfo = QWEN) -> None:
        self._info = replace(info, capabilities=mf.Capabilities())
        self.calls: list[tuple[float, float]] = []
        self.guidance: list[float | None] = []

    @property
    def info(self) -> ModelInfo:
        return self._info

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    @property
    def upscaler(self) -> None:
        return None

    def condition(self, prompts: Sequence[str]) -> Condition:
        return Condition({"number": torch.tensor([[float(len(p))] for p in prompts])})

    def check(self, options: mf.FieldOptions) -> None:
        raise NotImplementedError

    def field(self, cond: Condition, options: mf.FieldOptions = mf.FieldOptions()) -> Velocity:
        self.guidance.append(options.guidance)
        number = cond["number"]

        def velocity(x: Tensor, sigma: float) -> Tensor:
            self.calls.append((number[0, 0].item(), sigma))
            return torch.sin(x * number[:, :, None, None]) + sigma

        return velocity

    def encode(self, pixels: Tensor, noise: Tensor | None = None) -> Tensor:
        raise NotImplementedError

    def decode(self, latents: Tensor) -> Tensor:
        raise NotImplementedError


def parts(model: Mock) -> tuple[Tensor, Tensor, Tensor, Condition, Condition]:
    """A state, the conditional and the unconditional velocity there (sigma 0.3), and the two conditions."""
    cond, negative = model.condition(["abc", "defgh"]), model.condition([" "])
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    c, u = model.field(cond)(x, 0.3), model.field(negative)(x, 0.3)
    model.calls.clear()
    model.guidance.clear()
    return x, c, u, cond, negative


def test_the_mock_is_a_backbone() -> None:
    assert isinstance(Mock(), Backbone)


@pytest.mark.parametrize("scale", [0.0, 0.5, 2.0, 4.0])
def test_cfg_is_its_formula(scale: float) -> None:
    model = Mock()
    x, c, u, cond, negative = parts(model)
    got = CFG(scale).field(model, cond, negative)(x, 0.3)
    torch.testing.assert_close(got, u + scale * (c - u))
    assert len(model.calls) == CFG(scale).passes == 2


@pytest.mark.parametrize("scale", [0.5, 4.0])
def test_rescaled_cfg_is_the_formula_on_packed_tokens(scale: float) -> None:
    """The reference's way: pack to (batch, tokens, 64), norms over the last axis, unpack."""

    def pack(v: Tensor) -> Tensor:
        b, c, h, w = v.shape
        return v.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, h // 2 * (w // 2), c * 4)

    model = Mock()
    x, c, u, cond, negative = parts(model)
    combined = pack(u) + scale * (pack(c) - pack(u))
    want = combined * (pack(c).square().sum(-1, keepdim=True) / combined.square().sum(-1, keepdim=True)).sqrt()
    got = CFG(scale, rescale=True).field(model, cond, negative)(x, 0.3)
    torch.testing.assert_close(pack(got), want)
    torch.testing.assert_close(token_norm(got, 2), token_norm(c, 2))
    assert len(model.calls) == CFG(scale, rescale=True).passes == 2


@pytest.mark.parametrize(
    "guidance", [CFG(1.0), CFG(1), CFG(1.0, rescale=True), Distilled(), Interval(CFG(1.0), 0.0, 1.0)]
)
def test_one_pass_needs_no_negative(guidance: Guidance) -> None:
    model = Mock()
    x, c, _, cond, _ = parts(model)
    assert torch.equal(guidance.field(model, cond, None)(x, 0.3), c)
    assert len(model.calls) == guidance.passes == 1


@pytest.mark.parametrize("guidance", [CFG(4.0), CFG(2.0, rescale=True), Interval(CFG(3.0), 0.2, 0.8)])
def test_two_passes_need_a_negative(guidance: Guidance) -> None:
    model = Mock()
    with pytest.raises(PlanError, match=r"CFG\(scale=.*\) needs a negative; encode one"):
        guidance.field(model, model.condition(["abc"]), None)


def test_a_negative_for_another_batch_is_refused() -> None:
    model = Mock()
    with pytest.raises(PlanError, match="a condition for 3 prompts cannot serve a batch of 2"):
        CFG(4.0).field(model, model.condition(["a", "b"]), model.condition(["", "", ""]))


def test_distilled_hands_its_value_on() -> None:
    model = Mock(FLUX)
    cond = model.condition(["abc"])
    Distilled().field(model, cond, None)
    Distilled(2.5).field(model, cond, None)
    assert model.guidance == [None, 2.5]


def test_distilled_on_a_model_without_the_embedding() -> None:
    model = Mock(QWEN)
    with pytest.raises(
        PlanError, match=r"qwen-image has no guidance embedding, so Distilled\(3.5\) would change nothing"
    ):
        Distilled(3.5).field(model, model.condition(["abc"]), None)


@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf, True, "4"])
@pytest.mark.parametrize("kind", [CFG, partial(CFG, rescale=True), Distilled])
def test_bad_scales(kind: type[CFG], value: float) -> None:
    with pytest.raises(PlanError, match=r"(scale|guidance) must be a finite number of at least 0, got "):
        kind(value)


@pytest.mark.parametrize(
    ("low", "high"), [(0.5, 0.5), (0.6, 0.5), (-0.1, 0.5), (0.5, 1.1), (math.nan, 1.0), (0.0, True)]
)
def test_bad_intervals(low: float, high: float) -> None:
    with pytest.raises(
        PlanError, match=r"(an interval must lie in 0 <= low < high <= 1|must be a finite number), got "
    ):
        Interval(CFG(2.0), low, high)


@pytest.mark.parametrize(("sigma", "guided"), [(0.81, False), (0.8, True), (0.5, True), (0.2, False), (0.1, False)])
def test_interval_guides_above_low_up_to_high(sigma: float, *, guided: bool) -> None:
    model = Mock()
    x, _, _, cond, negative = parts(model)
    inner: Guidance = CFG(3.0) if guided else Distilled()
    want = inner.field(model, cond, negative)(x, sigma)
    model.calls.clear()
    got = Interval(CFG(3.0), 0.2, 0.8).field(model, cond, negative)(x, sigma)
    assert torch.equal(got, want)
    assert len(model.calls) == (2 if guided else 1)


@pytest.mark.parametrize(
    "guidance",
    [
        Distilled(),
        CFG(4.0),
        CFG(1.0),
        CFG(4.0, rescale=True),
        Interval(CFG(4.0), 0.25, 0.75),
        Interval(Interval(CFG(4.0, rescale=True), 0.3, 1.0), 0.0, 0.6),
    ],
)
@pytest.mark.parametrize("solver", [Heun(), RK4()])
def test_passes_are_counted_exactly(guidance: Guidance, solver: Solver) -> None:
    model = Mock()
    x, _, _, cond, negative = parts(model)
    sigmas = Linear(7)(1.0, 1, QWEN)
    integrate(solver, guidance.field(model, cond, negative), x, sigmas)
    assert len(model.calls) == guidance.evals(solver.points(sigmas))


def test_fields_are_fresh_for_every_branch_and_integration() -> None:
    model = Mock()
    cond, negative = model.condition(["abc"]), model.condition([" "])
    guidance = CFG(2.0)
    assert guidance.field(model, cond, negative) is not guidance.field(model, cond, negative)
    assert len(model.guidance) == 4


def test_what_models_are_published_with() -> None:
    assert own_guidance(FLUX) == Distilled()
    assert own_guidance(SCHNELL) == Distilled()
    assert own_guidance(QWEN) == CFG(4.0, rescale=True)


class Tight(Mock):
    """A backbone that takes both branches at once, where there is room."""

    def __init__(self, *, room: bool = False) -> None:
        super().__init__()
        self.room = room
        self._info = replace(self._info, capabilities=mf.Capabilities(together=True))
        self.options: list[mf.FieldOptions] = []

    def field(self, cond: Condition, options: mf.FieldOptions = mf.FieldOptions()) -> Velocity:
        self.options.append(options)
        inner = super().field(cond, options)

        def velocity(x: Tensor, sigma: float) -> Tensor:
            if options.beside and not self.room:
                raise MemoryError
            others = (Mock.field(self, other, options)(x, sigma) for other in options.beside)
            return torch.cat((inner(x, sigma), *others))

        return velocity


def test_branches_that_fit_are_asked_for_at_once() -> None:
    roomy, mock, options = Tight(room=True), Mock(), mf.FieldOptions(sigmas=(1.0, 0.5))
    cond, negative = mock.condition(["a", "b"]), mock.condition(["xyz"])
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    together, apart = (CFG(2.0).field(model, cond, negative, options) for model in (roomy, mock))
    assert all(torch.equal(together(x, sigma), apart(x, sigma)) for sigma in options.sigmas)
    (own,) = roomy.options
    assert own == replace(options, beside=own.beside) and len(own.beside) == 1
    CFG(2.0, packed=False).field(roomy, cond, negative, options)
    assert roomy.options[1:] == [options, options]


@pytest.mark.parametrize(
    "guidance", [mf.CFGZero(2.0), mf.APG(2.0), mf.TCFG(2.0), mf.CFGZero(1.0), mf.CFG(1.0)], ids=repr
)
def test_what_the_field_is_to_have_reaches_the_model(guidance: Guidance) -> None:
    roomy, options = Tight(room=True), mf.FieldOptions(sigmas=(1.0, 0.5))
    guidance.field(roomy, roomy.condition(["a"]), roomy.condition(["xyz"]), options)
    assert [o.sigmas for o in roomy.options] == [options.sigmas]


def test_a_value_without_an_embedding_says_what_to_take() -> None:
    with pytest.raises(PlanError, match=r"Distilled\(3.5\) would change nothing; use Distilled\(\) or CFG\(scale\)$"):
        Distilled(3.5).field(Mock(), Mock().condition(["a"]), None)


def test_the_branches_of_an_interval() -> None:
    """The inner guidance's where it holds, then the conditional alone elsewhere."""
    interval = Interval(CFG(2.0), 0.2, 0.8)
    assert interval.branches((1.0, 0.8, 0.5, 0.2)) == ((0.8, 0.5), (0.8, 0.5), (1.0, 0.2))


def test_branches_that_do_not_fit_take_turns_with_the_same_options() -> None:
    tight, options = Tight(), mf.FieldOptions(sigmas=(1.0, 0.5))
    cond, negative = tight.condition(["a", "b"]), tight.condition(["xyz"])
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    with collect_notes() as notes:
        field = CFG(2.0).field(tight, cond, negative, options)
        got = [field(x, sigma) for sigma in options.sigmas]
    mock = Mock()
    apart = CFG(2.0).field(mock, cond, negative, options)
    assert all(torch.equal(a, apart(x, sigma)) for a, sigma in zip(got, options.sigmas, strict=True))
    assert [bool(o.beside) for o in tight.options] == [True, False, False] and tight.options[1:] == [options, options]
    assert notes == ["both branches of the guidance do not fit into memory at once; they take turns from here on"]

"""How a field is asked for: what a model cannot do is refused by its facts, and a wrapper hides nothing."""

from dataclasses import replace

import pytest
import torch

import mrflow as mf
from mrflow.backbone import Backbone, Positions, Wrapper
from mrflow.caches import TaylorSeer
from mrflow.checkpoints.adapters import PiFlow

TOY = mf.toy()
PROMPT = "a big red circle at the left"
POSITIONS = Positions(torch.zeros(1, 2), 1, 1)


@pytest.mark.parametrize(
    ("stage", "options", "text"),
    [
        (mf.Sample(64, 64, cache=TaylorSeer(2)), mf.FieldOptions(cache=TaylorSeer(2)), "cannot be cached"),
        (mf.Sample(64, 64, lora=mf.Lora("no.safetensors")), mf.FieldOptions(loras=(mf.Lora("no"),)), "takes no LoRA"),
        (mf.Sample(64, 64, policy=PiFlow("no")), mf.FieldOptions(policy=PiFlow("no")), "takes no pi-Flow adapter"),
        (mf.SampleRegions(64, 64), mf.FieldOptions(positions=POSITIONS), "whole grids only"),
        (None, mf.FieldOptions(beside=(TOY.condition(["a"]),)), "one condition at a time"),
    ],
)
def test_what_a_model_cannot_do_is_refused_by_its_facts(
    stage: mf.Stage[mf.Start, mf.Latents] | None, options: mf.FieldOptions, text: str
) -> None:
    if stage is not None:
        with pytest.raises(mf.PlanError, match=text):
            mf.plan(stage >> mf.Decode(), TOY.info)
    with pytest.raises(mf.PlanError, match=text):
        TOY.check(options)
    with pytest.raises(mf.PlanError, match=text):
        TOY.field(TOY.condition(["a"]), options)


def test_every_capability_is_asked_for_by_name() -> None:
    """One that nobody checks would be one that nobody can rely on."""
    able = mf.Capabilities(positions=True, cache=True, lora=True, policy=True, together=True, attention=True)
    for name in ("positions", "cache", "lora", "policy", "together", "attention"):
        lacking = replace(TOY.info, capabilities=replace(able, **{name: False}))
        replace(lacking, capabilities=able).require(able)
        with pytest.raises(mf.PlanError):
            lacking.require(able)


def test_options_that_contradict_each_other() -> None:
    beside = (TOY.condition(["a"]),)
    with pytest.raises(mf.PlanError, match="remembers each branch apart"):
        mf.FieldOptions(cache=TaylorSeer(2), beside=beside)
    with pytest.raises(mf.PlanError, match="a policy's field takes no"):
        mf.FieldOptions(policy=PiFlow("x"), beside=beside)


def test_a_wrapper_is_ordinary() -> None:
    """It forwards all that the model can do: guidance in one pass, announced sigmas, caches."""
    model = mf.load("pocket", device="cpu")
    asked: list[mf.FieldOptions] = []

    class Listening(Wrapper):
        def field(self, cond: mf.Condition, options: mf.FieldOptions = mf.FieldOptions()) -> mf.Velocity:
            asked.append(options)
            return super().field(cond, options)

    wrapped = Listening(model)
    assert isinstance(wrapped, Backbone)
    for stage in (mf.Sample(64, 64, mf.Shifted(3)), mf.Sample(64, 64, mf.Shifted(3), cache=TaylorSeer(2))):
        asked.clear()
        want, got = (mf.run(stage, m, PROMPT).data for m in (model, wrapped))
        assert torch.equal(want, got)
        assert all(len(options.sigmas) == 3 for options in asked)
        assert len(asked) == (1 if stage.cache is None else 2)  # both branches beside each other, or a memory each


def test_conditions_beside_each_other_are_their_own_fields() -> None:
    model = mf.load("pocket", device="cpu")
    cond, other = model.condition([PROMPT, "two small blue rings"]), model.condition(["", ""])
    x = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        c, u = model.field(cond, mf.FieldOptions(beside=(other,)))(x, 0.6).chunk(2)
        torch.testing.assert_close(c, model.field(cond)(x, 0.6), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(u, model.field(other)(x, 0.6), rtol=1e-4, atol=1e-5)

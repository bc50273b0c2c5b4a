"""What a chain costs: operations against counted ones, memory against what lies where, times against both bounds."""

import math
import re
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch.utils.flop_counter import FlopCounterMode

import mrflow as mf
from mrflow.cost import (
    H200,
    decode_flops,
    encode_flops,
    evaluated_sigmas,
    floor_seconds,
    forward_flops,
    half,
    memory,
    sampling_work,
)
from mrflow.errors import PlanError
from mrflow.model_info import Architecture, Capabilities, Footprint, Forecast, LatentSpace, ModelInfo, Shift
from mrflow.stage import Plan, PlannedStage, Work
from tests.strategies import FEW

SPACE = LatentSpace("test", channels=3, downscale=4, patch=2)
ARCHITECTURE = Architecture(8, 2, 3, context=5, text_tokens=7, parameters=10_000, mlp_ratio=2.0)
# Each part has a decimal place of its own, so that a sum shows what is in it.
FOOTPRINT = Footprint(
    rest=1,
    autoencoder=10,
    blocks=200,
    block_pair=4_000,
    modulation=60_000,
    modulation_pair=800_000,
    text=1_000_000,
    text_layers=20_000_000,
    text_pair=300_000_000,
    forward_values=3.0,
    encode_values=5.0,
    decode_values=7.0,
)
MODEL = ModelInfo(
    "test",
    SPACE,
    Shift(0.5, 1.15),
    architecture=ARCHITECTURE,
    footprint=FOOTPRINT,
    encode=(3.0, 0.5),
    decode=(7.0, 0.25),
    capabilities=Capabilities(lora=True, cache=True, attention=True),
)


# Operations


def counted(a: Architecture, space: LatentSpace, tokens: int) -> int:
    """Operations of a transformer of these sizes, whose products are counted on no device."""
    d, wide, cells = a.hidden, int(a.mlp_ratio * a.hidden), space.channels * space.patch**2

    def linear(x: torch.Tensor, out: int) -> torch.Tensor:
        return x @ torch.empty(x.shape[1], out)

    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        image, text = torch.empty(tokens, cells), torch.empty(a.text_tokens, a.context)
        x = torch.cat([linear(image, d), linear(text, d)])
        for _ in range(a.double_blocks + a.single_blocks):
            q, k, v = (linear(x, d) for _ in range(3))
            x = linear(q @ k.T @ v, d)
            x = linear(linear(x, wide), d)
        linear(x[:tokens], cells)
    return counter.get_total_flops()


SIZES = st.builds(
    Architecture,
    st.integers(1, 40),
    st.integers(0, 4),
    st.integers(0, 4),
    context=st.integers(1, 30),
    text_tokens=st.integers(1, 20),
    parameters=st.just(1),
    mlp_ratio=st.sampled_from([1.0, 2.0, 4.0]),
)


@settings(FEW, max_examples=8)  # a polynomial
@given(SIZES, st.integers(1, 9), st.integers(1, 4), st.integers(1, 60))
def test_a_forward_costs_what_a_transformer_of_its_sizes_is_counted_to(
    sizes: Architecture, channels: int, patch: int, tokens: int
) -> None:
    space = LatentSpace("any", channels=channels, patch=patch)
    model = replace(MODEL, architecture=sizes, space=space)
    assert forward_flops(model, tokens) == counted(sizes, space, tokens)


def test_a_model_of_unknown_sizes_costs_nothing_that_could_be_named() -> None:
    unknown = replace(MODEL, architecture=None)
    assert forward_flops(unknown, 64) == 0
    assert memory(mf.plan(mf.recipes.native(size=(32, 32), steps=2), unknown)) is None
    nowhere = replace(MODEL, footprint=None)
    assert memory(mf.plan(mf.recipes.native(size=(32, 32), steps=2), nowhere)) is None


def test_the_autoencoder_costs_a_line_and_a_square_in_the_pixels() -> None:
    assert decode_flops(MODEL, 3, 5) == 7 * 15 + 0.25 * 225
    assert encode_flops(MODEL, 3, 5) == 3 * 15 + 0.5 * 225
    for cost, linear in ((decode_flops, 7.0), (encode_flops, 3.0)):  # pixels that meet pixels are squared, others not
        assert cost(MODEL, 8, 4) - 4 * cost(MODEL, 4, 2) == pytest.approx(cost(MODEL, 8, 4) * 0.75 - 0.75 * linear * 32)


def sampled(model: ModelInfo = MODEL, *, batch: int = 1, steps: int = 4, **how: object) -> Work:
    stage = mf.Sample(schedule=mf.Shifted(steps), height=32, width=48, **how)  # type: ignore[arg-type]
    return mf.plan(stage, model, batch=batch).rows[0].work


ONE = forward_flops(MODEL, 4 * 6)


@pytest.mark.parametrize("batch", [1, 3])
def test_a_sampling_costs_its_forwards(batch: int) -> None:
    plain = sampled(batch=batch)
    assert plain == Work(nfe=4, flops=4 * batch * ONE)
    assert sampled(batch=batch, guidance=mf.CFG(4.0)) == Work(nfe=8, flops=8 * batch * ONE, negative=True)
    assert sampled(batch=batch, solver=mf.Heun()).nfe == 7  # the last step ends at 0, where nothing is asked
    own, out = replace(MODEL, cfg=4.0), mf.Latents(batch, 8, 12, SPACE)
    assert sampling_work(own, out, (1.0, 0.5, 0.0), mf.Euler(), None).nfe == sampled(own, steps=2).nfe == 4
    assert sampled(solver=mf.BogackiShampine()).estimated


def test_adapters_cost_two_operations_a_parameter_and_token(tmp_path: Path) -> None:
    low = {"lora_A": torch.zeros(2, 8), "lora_B": torch.zeros(24, 2)}
    name = "transformer.single_transformer_blocks.0.attn.to_q"
    save_file({f"{name}.{key}.weight": value for key, value in low.items()}, tmp_path / "a.safetensors")
    adapter = mf.Lora(str(tmp_path / "a.safetensors"))
    work = sampled(lora=(adapter, adapter), batch=2)
    assert work.flops - sampled(batch=2).flops == 4 * 2 * (4 * 6 + 7) * 2 * 2 * (2 * 8 + 24 * 2)
    assert sampled(replace(MODEL, architecture=None), lora=(adapter,)).flops == 0


@dataclass(frozen=True)
class Told(mf.caches.Cache):
    """A cache that computes so many of each branch's evaluations, at a quarter of the work where it does not."""

    computed: int = 1
    exact: bool = True
    part: float = 1.0

    def rule(self, info: ModelInfo, levels: object) -> mf.caches.Rule:
        raise AssertionError("only its forecast is asked")

    def share(self, info: ModelInfo, tokens: int) -> float:
        assert tokens == 4 * 6
        return self.part

    def forecast(self, info: ModelInfo, sigmas: object, branch: object) -> Forecast:
        assert len(sigmas) == 4 and {*branch} <= {*sigmas}  # type: ignore[arg-type, misc]
        return Forecast(len(branch), min(self.computed, len(branch)), 0.25, self.exact)  # type: ignore[arg-type]


def test_a_cache_costs_what_it_computes_and_the_part_that_it_keeps() -> None:
    cached = sampled(cache=Told(computed=1), batch=2)
    assert cached == Work(nfe=1, flops=pytest.approx(2 * (1 + 3 / 4) * ONE))
    assert sampled(replace(MODEL, cache=Told(computed=1)), batch=2) == cached  # the model's own
    both = sampled(cache=Told(computed=3, exact=False, part=0.5), guidance=mf.CFG(4.0))
    assert both == Work(nfe=6, flops=pytest.approx(0.5 * 2 * (3 + 1 / 4) * ONE), negative=True, estimated=True)


def test_guidance_inside_attention_and_a_cache_exclude_each_other() -> None:
    assert sampled(guidance=mf.NAG(4.0)).nfe == 8
    with pytest.raises(PlanError, match=r"NAG\(.*\) works inside attention, which Told\(.*\) leaves out; take one"):
        sampled(guidance=mf.NAG(4.0), cache=Told())
    with pytest.raises(PlanError, match="lets no guidance into its attention"):
        sampled(replace(MODEL, capabilities=Capabilities()), guidance=mf.NAG(4.0))


def test_levels_are_those_of_all_stages_once_each_in_their_order() -> None:
    chain = mf.Chain(
        [
            mf.Sample(schedule=mf.Explicit((1.0, 0.6, 0.3, 0.0)), height=32, width=32),
            mf.Decode(),
            mf.Upscale(mf.Lanczos(2)),
            mf.Encode(),
            mf.Reinject(0.6),
            mf.Refine(schedule=mf.Explicit((0.6, 0.5, 0.0))),
        ]
    )
    assert evaluated_sigmas(chain, MODEL) == (1.0, 0.6, 0.3, 0.5)


# Half a size


@given(st.integers(1, 512), st.integers(1, 512), st.integers(1, 3))
def test_half_a_size_is_half_or_the_offer_is_the_nearest_that_has_one(high: int, wide: int, whole: int) -> None:
    model = replace(MODEL, space=replace(SPACE, whole=whole))
    multiple = 8 * whole
    size = high * multiple, wide * multiple
    if high % 2 == wide % 2 == 0:
        assert half(size, model) == (high // 2 * multiple, wide // 2 * multiple)
        return
    with pytest.raises(PlanError) as refused:
        half(size, model)
    said = re.fullmatch(
        rf"half of {size[0]}x{size[1]} is not a multiple of {multiple}; try (\d+)x(\d+), or say the low size too",
        str(refused.value),
    )
    assert said
    offer = int(said[1]), int(said[2])
    assert half(offer, model) == (offer[0] // 2, offer[1] // 2)
    for given_side, offered, count in zip(size, offer, (high, wide), strict=True):
        assert abs(given_side - offered) == (0 if count % 2 == 0 else multiple)


def test_sizes_that_are_none_are_refused_before_they_are_halved() -> None:
    with pytest.raises(PlanError, match="multiple of 8"):
        half((36, 32), MODEL)


# Time


def row(name: str, out: mf.Latents | mf.Pixels, *, nfe: int = 0, flops: float = 0.0, **more: object) -> PlannedStage:
    spec = more.pop("spec", mf.Start())
    negative = bool(more.pop("negative", False))
    return PlannedStage(name, spec, out, Work(nfe, flops, negative), **more)  # type: ignore[arg-type]


def test_the_least_time_is_bound_by_arithmetic_or_by_reading_the_weights_stage_by_stage() -> None:
    latents = mf.Latents(1, 8, 8, SPACE)
    heavy, light = row("Sample", latents, nfe=2, flops=1e6), row("Refine", latents, nfe=5, flops=10.0)
    # 1e6 operations at 1e3 a second take longer than 2 x 20,000 bytes at 1e5; 10 are nothing beside 5 x 20,000.
    assert floor_seconds(Plan(MODEL, (heavy, light)), flops=1e3, bandwidth=1e5) == pytest.approx(1000 + 1)
    assert floor_seconds(Plan(MODEL, (light,))) == pytest.approx(5 * 20_000 / H200[2])
    assert floor_seconds(Plan(MODEL, (heavy,)), bandwidth=math.inf) == pytest.approx(1e6 / H200[1])
    assert floor_seconds(Plan(replace(MODEL, architecture=None), (heavy, light)), flops=1e3, bandwidth=1e5) == (
        pytest.approx(1000.01)
    )
    assert (
        floor_seconds(Plan(replace(MODEL, architecture=None), (replace(light, work=Work(nfe=5)),)), bandwidth=1.0) == 0
    )
    assert H200[1] == 790e12 and H200[2] == 4.3e12


# Memory


LATENTS = mf.Latents(2, 8, 12, SPACE)
PIXELS = mf.Pixels(2, 32, 48)
SAMPLE = row("Sample", LATENTS, nfe=4)
DECODE = row("Decode", PIXELS, spec=LATENTS)
ENCODE = row("Encode", LATENTS, spec=PIXELS)
VALUES = {  # of each moment, in values
    "Sample": 3 * (4 * 6 + 7) * 8 * 2,
    "Decode": 7 * 2 * 32 * 48,
    "Encode": 5 * 2 * 32 * 48,
}


@pytest.mark.parametrize(
    ("offload", "fold", "storage", "prompt", "folding", "steady"),
    [
        # everything lies there all the time
        ("none", True, None, 21_060_211, None, 21_060_211),
        ("none", False, None, 21_060_211, None, 21_060_211),
        ("none", True, "fp8", 21_030_111, None, 21_030_111),
        # the encoders leave before the transformer comes; folded modulations visit it two at a time, and stay out
        ("phase", True, None, 21_000_000, 800_211, 211),
        ("phase", False, None, 21_000_000, None, 60_211),
        ("phase", True, "fp8", 21_000_000, 400_111, 111),
        ("phase", False, "fp8", 21_000_000, None, 30_111),
        # two layers, or two blocks with their modulations, at a time
        ("block", True, None, 301_000_000, 800_011, 4_011),
        ("block", False, None, 301_000_000, 800_011, 4_011),
        ("block", True, "fp8", 301_000_000, 400_011, 2_011),
    ],
)
def test_memory_holds_what_lies_on_the_device_at_each_moment(
    offload: mf.models.offload.Offload, fold: bool, storage: str | None, prompt: int, folding: int | None, steady: int
) -> None:
    planned = Plan(MODEL, (SAMPLE, DECODE, ENCODE))
    found = memory(planned, offload=offload, fold=fold, storage=storage)
    want = {"encoding the prompt": prompt} | ({"folding modulations": folding} if folding else {})
    want |= {f"{r.name} {r.out}": steady + 2 * VALUES[r.name] for r in planned.rows}
    assert found is not None and found.moments == want
    assert all(type(size) is int for size in found.moments.values())
    assert found.peak == max(want.values()) and want[found.worst] == found.peak


def test_blocks_beside_which_modulations_are_small_need_no_room_for_folding() -> None:
    small = replace(MODEL, footprint=replace(FOOTPRINT, modulation_pair=4_000))
    found = memory(Plan(small, (SAMPLE,)), offload="block")
    assert found is not None and "folding modulations" not in found.moments


def test_a_model_that_is_loaded_is_counted_as_it_is() -> None:
    stored = replace(MODEL, version="1")
    found = memory(Plan(stored, (SAMPLE,)), storage="fp8", value_bytes=0)
    assert found is not None and found.peak == 21_060_211
    other = memory(Plan(MODEL, (SAMPLE,)), storage="int4", value_bytes=0)
    assert other is not None and other.peak == 21_060_211


def values(*rows: PlannedStage, value_bytes: int = 4, model: ModelInfo = MODEL) -> list[int]:
    """Bytes of values at the moments of these rows."""
    found = memory(Plan(model, rows), offload="phase", fold=False, value_bytes=value_bytes)
    assert found is not None
    return [size - 60_211 for name, size in found.moments.items() if name != "encoding the prompt"]


def test_values_are_those_of_a_forward_of_both_branches_or_of_the_autoencoder() -> None:
    forward = VALUES["Sample"]
    assert values(SAMPLE) == [4 * forward] and values(SAMPLE, value_bytes=2) == [2 * forward]
    assert values(row("Sample", LATENTS, nfe=4, negative=True)) == [8 * forward]
    assert values(row("Sample", LATENTS, nfe=4, tokens=10)) == [4 * 3 * (10 + 7) * 8 * 2]
    assert values(row("Upscale", mf.Pixels(2, 64, 96), spec=PIXELS)) == []  # neither
    assert values(row("Reinject", LATENTS, spec=LATENTS)) == []
    assert values(row("Refine", LATENTS, spec=LATENTS, nfe=1)) == [4 * forward]


def test_stages_of_one_name_and_size_are_one_moment_the_larger() -> None:
    small, large = (row("Sample", LATENTS, nfe=1, tokens=n) for n in (5, 20))
    assert values(small, large) == values(large, small) == values(large)


def test_tiles_add_three_rows_of_them_in_float32() -> None:
    """Tiles of 10 tokens of 3 x 2 x 2 values, four of them in a row: 40 x 12 values, three rows, two pictures."""
    tiled = row("Refine", LATENTS, spec=LATENTS, nfe=4, tokens=10, parts=4)
    whole = row("Refine", LATENTS, spec=LATENTS, nfe=4, tokens=10)
    for size in (2, 4):
        (found,), (plain,) = values(tiled, value_bytes=size), values(whole, value_bytes=size)
        assert found - plain == 3 * 40 * 12 * 2 * 4
    wide = replace(MODEL, space=replace(SPACE, patch=4))
    assert values(tiled, model=wide)[0] - values(whole, model=wide)[0] == 3 * 40 * 48 * 2 * 4
    both = replace(tiled, work=replace(tiled.work, negative=True))
    assert values(both) == [2 * value for value in values(tiled)]

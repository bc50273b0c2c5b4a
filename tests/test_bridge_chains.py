"""Everything that stages can be given works on bridged pipelines too: caches, transitions, sweeps, plans, pipelines."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

import mrflow as mf
from mrflow.caches import DMD, Cache, DBCache, SeaCache, Spectrum, TaylorSeer, TeaCache, ToMA
from mrflow.caches.clock import Evaluation, Rule
from mrflow.errors import PlanError
from tests.parity.test_bridge import PROMPTS, UP, native, pipes
from tests.parity.test_flux import relative
from tests.test_bridge import state
from tests.test_tokens import Packs

__all__ = ["pipes"]  # the fixture
pytestmark = pytest.mark.filterwarnings("ignore")
Pipes = Callable[[str], Any]
CACHED = ["dev", "qwen", "sd3", "klein base", "klein", "z-image", "krea2", "flux2 dev"]
SIZE = (48, 80)


def cached(cache: Any, steps: int = 5) -> Any:
    return mf.Sample(*SIZE, mf.Shifted(steps), noise=mf.Stream(0), cache=cache) >> mf.Decode()


@pytest.mark.parametrize("name", CACHED)
def test_a_cache_that_leaves_nothing_out_changes_nothing(name: str, pipes: Pipes) -> None:
    pipe = pipes(name)
    model = mf.from_diffusers(pipe)
    plain = mf.run(cached(None, 3), model, PROMPTS, seed=[1, 2]).pixels
    before = state(pipe)  # now that the networks have made what they keep
    none = mf.run(cached(DBCache(0.0, front=1, warmup=0), 3), model, PROMPTS, seed=[1, 2])
    assert relative(none.pixels, plain) < 1e-5
    assert state(pipe) == before


@pytest.mark.parametrize("name", ["dev", "qwen", "klein base", "krea2", "flux2 dev", "z-image", "sd3"])
def test_latents_are_packed_once_where_the_transformer_takes_tokens(
    name: str, pipes: Pipes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bits are those of packing in every step. Z-Image and SD3 pack inside, so their latents stay as they are."""
    model, chain = mf.from_diffusers(pipes(name)), mf.Sample(*SIZE, mf.Shifted(3))
    packs = Packs(monkeypatch)
    latents, made = packs.of(chain, model, PROMPTS)
    monkeypatch.setattr(mf.Euler, "pointwise", False)
    want, each = packs.of(chain, model, PROMPTS)
    inside = name in ("z-image", "sd3")
    assert torch.equal(latents, want)
    assert made == (0, 0) == each if inside else made == (1, 1) and each[0] >= 3, (made, each)


@pytest.mark.parametrize(
    ("name", "cache"),
    [
        *((name, TaylorSeer(2)) for name in CACHED),
        ("sd3", DBCache(9.0, front=1, warmup=1)),
        ("klein base", DBCache(9.0, front=2, warmup=1)),
        ("z-image", DBCache(9.0, front=1, warmup=2, order=1)),
        ("dev", Spectrum(warmup=2)),
        ("klein", SeaCache(9.0, of="latents")),
        ("z-image", SeaCache(9.0)),
        ("sd3", DMD(9.0, front=1, warmup=4)),
    ],
    ids=str,
)
def test_caches_leave_out_what_they_plan_and_items_are_independent(name: str, cache: Any, pipes: Pipes) -> None:
    model = mf.from_diffusers(pipes(name))
    both = mf.run(cached(cache), model, PROMPTS, seed=[1, 2])
    alone = mf.run(cached(cache), model, PROMPTS[1], seed=2)
    assert alone.nfe < mf.plan(cached(None), model.info).nfe
    assert relative(both.pixels[1:], alone.pixels) < 1e-3
    assert "computed" in alone.stages[0].notes[0]


@pytest.mark.parametrize("name", ["krea2", "krea2 turbo", "z-image", "flux2 dev"])
def test_zero_leaves_every_bit_and_planned_forwards_are_those_that_run(name: str, pipes: Pipes) -> None:
    pipe = pipes(name)
    model = mf.from_diffusers(pipe)
    plain = mf.run(cached(None, 4), model, PROMPTS[0], seed=1).pixels
    for zero in (DBCache(0.0, front=1, warmup=0), TeaCache(0.0, coefficients=(1.0, 0.0)), SeaCache(0.0)):
        assert torch.equal(mf.run(cached(zero, 4), model, PROMPTS[0], seed=1).pixels, plain), zero
    ran: list[int] = []
    last = getattr(pipe.transformer, model.family.lists[-1])[-1]
    hook = last.register_forward_hook(lambda *_: ran.append(1))
    try:
        result = mf.run(cached(TaylorSeer(2)), model, PROMPTS[0], seed=1)
    finally:
        hook.remove()
    assert len(ran) == result.nfe == result.plan.nfe < mf.plan(cached(None), model.info).nfe
    assert not torch.equal(result.pixels, mf.run(cached(None), model, PROMPTS[0], seed=1).pixels)


@dataclass(frozen=True)
class Watching(Cache):
    """Computes the first picture of a batch once, the others always; keeps what it looked at."""

    seen: list[torch.Tensor] = field(default_factory=list)
    opened_rules: list[int] = field(default_factory=list)

    def rule(self, info: mf.ModelInfo, levels: Sequence[float]) -> Rule:
        self.opened_rules.append(number := len(self.opened_rules))

        def due(look: Evaluation) -> bool:
            self.seen.append(look.modulated_input().clone())
            return look.index == 0 or number > 0

        return due


@pytest.mark.parametrize("name", ["dev", "qwen", "sd3", "klein base", "z-image", "krea2"])
def test_the_modulated_input_is_what_the_first_attention_is_given(name: str, pipes: Pipes) -> None:
    """Of the image: where one sequence holds both streams, of its part."""
    pipe, watching, given = pipes(name), Watching(), list[torch.Tensor]()
    model = mf.from_diffusers(pipe)
    block = getattr(pipe.transformer, model.family.lists[0])[0]
    query = next(module for path, module in block.named_modules() if path.endswith("to_q"))
    x = torch.randn(1, model.info.space.channels, 4, 6, generator=torch.Generator().manual_seed(0))
    options = mf.FieldOptions(sigmas=(0.7,), cache=watching)
    hook = query.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0]))
    try:
        model.field(model.condition(PROMPTS[:1]), options)(x, 0.7)
    finally:
        hook.remove()
    (seen,), (want,) = watching.seen, given
    image = want[:, : seen.shape[1]] if model.family.image_first else want[:, want.shape[1] - seen.shape[1] :]
    assert seen.std() > 0.1 and relative(seen, image) < 1e-5


@pytest.mark.parametrize("name", ["dev", "qwen", "sd3", "klein base", "z-image", "krea2"])
def test_what_is_computed_beside_a_cached_picture_is_its_own(name: str, pipes: Pipes) -> None:
    """The first picture is left out, the second computed: with its own text, mask and modulations."""
    model = mf.from_diffusers(pipes(name))
    cond, sigmas = model.condition(PROMPTS), (0.9, 0.4)
    x = torch.randn(2, model.info.space.channels, 4, 6, generator=torch.Generator().manual_seed(0))
    plain, cached = (model.field(cond, mf.FieldOptions(sigmas=sigmas, cache=c)) for c in (None, Watching()))
    (_, want), (_, got) = ([field(x, sigma) for sigma in sigmas] for field in (plain, cached))
    assert relative(got[1], want[1]) < 1e-5 < 1e-4 < relative(got[0], want[0])


@pytest.mark.parametrize(
    "cache", [TaylorSeer(2), DBCache(0.3, front=1, warmup=1, order=1), TeaCache(0.3), SeaCache(0.2)], ids=str
)
@pytest.mark.parametrize("name", ["dev", "qwen"])
def test_caches_agree_with_those_in_our_own_transformers(name: str, cache: Any, pipes: Pipes) -> None:
    pipe = pipes(name)
    own, bridged = mf.load(pipe.config._name_or_path, device="cpu"), mf.from_diffusers(pipe)
    ours, theirs = (mf.run(cached(cache), model, PROMPTS, seed=[1, 2]) for model in (own, bridged))
    assert theirs.nfe == ours.nfe
    assert relative(theirs.pixels, ours.pixels) < 5e-3  # group norms differ in the third digit, see the parity tests


def test_what_a_bridge_cannot_do_says_so(pipes: Pipes, tmp_path: Path) -> None:
    model = mf.from_diffusers(pipes("qwen"))
    for stage, words in (
        (mf.Sample(32, 32, mf.Shifted(2), cache=ToMA(every=1, skip=0)), "works inside mrflow's own blocks"),
        (mf.Sample(32, 32, mf.Shifted(2), lora=mf.Lora("x.safetensors")), "pipe.load_lora_weights"),
        (mf.SampleRegions(64, 64), "draws on whole grids only"),
        (mf.Sample(32, 32, mf.FlowMap(2), policy=mf.PiFlow("x")), "takes no pi-Flow adapter"),
    ):
        with pytest.raises(PlanError, match=words):
            mf.run(stage >> mf.Decode(), model, "a cat")


@pytest.mark.parametrize("name", ["dev", "schnell", "klein"])
def test_regions_run_where_positions_are_free(name: str, pipes: Pipes) -> None:
    pipe = pipes(name)
    model = mf.from_diffusers(pipe)
    size = (128, 128) if name.startswith("klein") else (64, 64)
    chain = mf.recipes.ralu(size=size, steps=(1, 2, 2))
    result = mf.run(chain, model, PROMPTS, seed=[1, 2])
    assert result.nfe == mf.plan(chain, model.info).nfe
    alone = mf.run(chain, model, PROMPTS[1], seed=2)
    assert relative(result.pixels[1:], alone.pixels) < 1e-3
    if name != "klein":
        own = mf.load(pipe.config._name_or_path, device="cpu")
        assert relative(alone.pixels, mf.run(chain, own, PROMPTS[1], seed=2).pixels) < 5e-3


@pytest.mark.parametrize("name", ["dev", "klein"])
def test_tiles_run_where_positions_are_free(name: str, pipes: Pipes) -> None:
    """The same tiles as of mrflow's own network; and what each tile is told of its place is not nothing."""
    pipe = pipes(name)
    model = mf.from_diffusers(pipe)
    side = 2 * model.info.space.multiple
    low, size = (2 * side, 2 * side), (4 * side, 4 * side)
    tiled, local = (
        mf.recipes.paper(UP, low=low, size=size, steps=1, sigma=0.5, tiles=mf.Tiles(2 * side, side, where))  # type: ignore[arg-type]
        for where in ("global", "local")
    )
    result = mf.run(tiled, model, PROMPTS[1], seed=2)
    assert result.nfe == mf.plan(tiled, model.info).nfe == 1 + 9
    assert relative(result.pixels, mf.run(local, model, PROMPTS[1], seed=2).pixels) > 1e-5
    if name == "dev":
        own = mf.load(pipe.config._name_or_path, device="cpu")
        assert relative(result.pixels, mf.run(tiled, own, PROMPTS[1], seed=2).pixels) < 5e-3


@pytest.mark.parametrize("name", ["qwen", "sd3", "klein"])
def test_transitions_and_sweeps(name: str, pipes: Pipes, tmp_path: Path) -> None:
    model = mf.from_diffusers(pipes(name), text_tokens=16, upscaler=UP)
    low, size = (32, 48), (64, 96)
    chains = {
        "speed": mf.recipes.speed(sizes=(low, size), steps=(1, 2)),
        "selflift": mf.recipes.selflift(low=low, size=size, steps=(2, 1)),
        "lift": mf.recipes.lift(low=low, size=size, steps=(2, 1)),
        "paper": mf.recipes.paper(low=low, size=size, steps=2),
    }
    done = mf.run_sweep(mf.Sweep(chains, ["a cat"], model=model.info.name), model, tmp_path)
    assert (done.made, done.failed) == (4, 0)


@pytest.mark.parametrize("name", ["dev", "z-image"])
def test_a_chain_with_the_manners_of_a_pipeline(name: str, pipes: Pipes) -> None:
    model = mf.from_diffusers(pipes(name), text_tokens=16, upscaler=UP)
    chain = mf.recipes.paper(low=(32, 48), size=(64, 96), steps=2)
    pipe = mf.to_diffusers(chain, model)
    seen: list[tuple[int, float]] = []

    def look(own: Any, step: int, time: torch.Tensor, given: dict[str, Any]) -> dict[str, Any]:
        assert own is pipe
        seen.append((step, float(given["latents"].std())))
        return given

    generators = [torch.Generator().manual_seed(s) for s in (3, 4)]
    out = pipe("a cat", num_images_per_prompt=2, generator=generators, callback_on_step_end=look, output_type="pt")
    want = mf.run(chain, model, ["a cat", "a cat"], seed=[3, 4])
    assert torch.equal(out.images, want.pixels)  # type: ignore[union-attr]  # pyright: ignore
    assert [step for step, _ in seen] == [0, 1, 2]
    assert len(pipe("a cat", generator=generators[0]).images) == 1  # type: ignore[union-attr]  # pyright: ignore
    array = pipe("a cat", generator=generators[0], output_type="np", return_dict=False)[0]  # type: ignore[index]  # pyright: ignore
    assert array.shape == (1, 64, 96, 3)
    latents = pipe("a cat", generator=generators[0], output_type="latent").images  # type: ignore[union-attr]  # pyright: ignore
    assert relative(model.decode(latents), want.pixels[:1]) < 1e-4
    one = pipe(["a cat", "a dog"], generator=torch.Generator().manual_seed(7), output_type="pt").images  # type: ignore[union-attr]  # pyright: ignore
    assert torch.equal(one, mf.run(chain, model, ["a cat", "a dog"], seed=[7, 8]).pixels)
    for words, more in (
        ("height=32 was asked for, but the chain makes 64x96", {"height": 32}),
        ("num_inference_steps=9 was asked for, but the chain samples in 2", {"num_inference_steps": 9}),
        ("guidance_scale=7 was asked for", {"guidance_scale": 7.0}),
        ("output_type must be", {"output_type": "gif"}),
        ("num_images_per_prompt must be", {"num_images_per_prompt": 0}),
        ("2 generators were given for 1 pictures", {"generator": generators}),
        ("a callback can be given latents", {"callback_on_step_end_tensor_inputs": ["prompt_embeds"]}),
    ):
        with pytest.raises(PlanError, match=words):
            pipe("a cat", **more)  # type: ignore[arg-type]  # pyright: ignore
    with pytest.raises(PlanError, match="a pipeline makes pictures from prompts"):
        mf.to_diffusers(mf.recipes.enlarge((64, 64)), model)


def test_to_diffusers_needs_no_diffusers_pipeline() -> None:
    pipe = mf.to_diffusers(mf.recipes.native(size=(64, 64), steps=2), mf.load("pocket", device="cpu"))
    assert pipe("a big red circle", generator=torch.Generator().manual_seed(0)).images[0].size == (64, 64)  # type: ignore[union-attr]  # pyright: ignore


def test_official_presets_by_name(pipes: Pipes) -> None:
    from mrflow.bridge import PRESETS, preset

    assert {"flux1-dev", "qwen-image", "flux2-klein-base", "flux2-klein", "z-image"} == set(PRESETS)
    model = mf.from_diffusers(pipes("klein"), upscaler=UP)
    chain = preset(model.info, low=(32, 48), size=(64, 96))
    assert mf.run(chain, model, "a cat").nfe == 5
    assert native(1) is not None


@dataclass(frozen=True)
class Uneven(mf.caches.Cache):
    """Leaves out every second evaluation: for one picture the even ones, for another the odd ones."""

    def rule(self, info: mf.ModelInfo, levels: Sequence[float]) -> mf.caches.Rule:
        side: list[int] = []

        def due(look: mf.caches.Evaluation) -> bool:
            if not side:
                side.append(int(float(look.modulated_input().float().std()) * 1e4) % 2)
            return look.index % 2 == side[0]

        return due


@pytest.mark.parametrize("name", ["dev", "qwen", "sd3", "klein", "z-image"])
def test_pictures_of_a_batch_are_left_out_one_by_one(name: str, pipes: Pipes) -> None:
    model = mf.from_diffusers(pipes(name))
    seeds, prompts = [1, 2, 3, 4], [PROMPTS[0], PROMPTS[1]] * 2
    both = mf.run(cached(Uneven(), 3), model, prompts, seed=seeds).pixels
    for i, seed in enumerate(seeds):
        assert relative(both[i : i + 1], mf.run(cached(Uneven(), 3), model, prompts[i], seed=seed).pixels) < 1e-3

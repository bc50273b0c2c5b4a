"""Caches in stages and round models: the same bits where nothing is left out, kept apart where something is."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, cast

import pytest
import torch
from torch import Tensor

import mrflow as mf
from mrflow.caches import (
    DMD,
    L2P,
    Cache,
    Cached,
    DBCache,
    Evaluation,
    MagCache,
    Rule,
    SeaCache,
    Spectrum,
    TaylorSeer,
    TeaCache,
    memory,
)
from mrflow.caches.calibrate import Calibration
from mrflow.cli.plan import report
from mrflow.models.block_runner import BlockRunner
from mrflow.records.chains import decode_chain, encode_chain, fingerprint
from mrflow.records.replay import inspect_file
from tests.parity.test_flux import relative
from tests.tiny import write_flux_repo, write_qwen_repo

RATIOS = (1.0, 0.97, 0.98, 0.99, 0.98, 0.97)
LINE = (1.0, 0.0)
NONE: list[Cache] = [
    TeaCache(0.0, coefficients=LINE),
    MagCache(0.0, ratios=RATIOS),
    DBCache(0.0, front=1, back=1, warmup=0),
    DBCache(0.0, front=2, warmup=0, order=1),
    TaylorSeer(1),
    TaylorSeer(1, of="velocity"),
    Spectrum(1, 0, warmup=1),
    SeaCache(0.0),
    DMD(0.0, front=1, warmup=0),
    L2P(((),) * 3),
]
SOME: list[Cache] = [
    TeaCache(0.5, coefficients=LINE),
    MagCache(0.2, ratios=RATIOS),
    DBCache(0.45, front=1, warmup=1),
    DBCache(0.45, front=1, back=1, warmup=1),
    DBCache(0.45, front=1, warmup=1, order=1),
    TaylorSeer(2),
    TaylorSeer(3, order=2, of="velocity"),
    L2P(((), (), (-1.0, 2.0), (), (-0.5, 1.5), ())),
    Spectrum(warmup=3),
    SeaCache(0.3),
    SeaCache(0.4, of="latents", power=3.0, order=1, limit=2),
    Spectrum(warmup=3, mix=0.5, of="velocity"),
    DMD(0.45, front=1, warmup=4),
]
LARGE = ["flux", "flux bfloat16", "qwen", "qwen bfloat16"]
PROMPTS = {"pocket": ["a big red circle at the left", "the big blue word CAT"], "large": ["a cat", "a longer tale"]}


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], mf.Backbone]:
    """Models by name, each loaded once."""
    made: dict[str, mf.Backbone] = {}

    def get(name: str) -> mf.Backbone:
        if name not in made:
            kind, _, dtype = name.partition(" ")
            chosen = torch.bfloat16 if dtype else torch.float32
            if kind == "pocket":
                made[name] = mf.load("pocket", device="cpu", dtype=chosen)
            else:
                folder = tmp_path_factory.mktemp(kind)
                (write_flux_repo if kind == "flux" else write_qwen_repo)(folder / "r")
                made[name] = mf.load(folder / "r", device="cpu", dtype=chosen)
        return made[name]

    return get


def sample(cache: Cache | None, steps: int = 6, **more: Any) -> mf.Sample:
    return mf.Sample(64, 48, mf.Shifted(steps), cache=cache, **more)


def made(chain: Any, model: mf.Backbone, prompts: Sequence[str] = ("a cat",), seed: int = 1) -> mf.Result:
    return mf.run(chain, model, list(prompts), seed=[seed + i for i in range(len(prompts))])


def psnr(a: Tensor, b: Tensor) -> float:
    return float(-10 * (a - b).square().mean().log10())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["pocket", "pocket bfloat16", *LARGE])
def test_nothing_left_out_is_no_cache_to_the_bit(name: str, models: Callable[[str], mf.Backbone]) -> None:
    """In float32 and bfloat16, in both branches of a guidance, for two prompts at once."""
    model = models(name)
    prompts = PROMPTS["pocket"] if "pocket" in name else ["a cat", "a dog"]
    guidance = mf.CFG(3.0, packed=False)
    want = made(sample(None, 3, guidance=guidance), model, prompts)
    for cache in NONE:
        got = made(sample(cache, 3, guidance=guidance), model, prompts)
        assert torch.equal(got.data, want.data), cache
        assert got.stages[0].nfe == want.stages[0].nfe
        assert got.stages[0].flops == pytest.approx(want.stages[0].flops)


@pytest.fixture(scope="module")
def bare(models: Callable[[str], mf.Backbone]) -> Callable[[str], mf.Result]:
    """Pictures without a cache, by model, each made once."""
    found: dict[str, mf.Result] = {}

    def get(name: str) -> mf.Result:
        if name not in found:
            found[name] = made(sample(None), models(name))
        return found[name]

    return get


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["pocket", "flux", "qwen bfloat16"])
@pytest.mark.parametrize("cache", SOME, ids=str)
def test_something_left_out_is_another_picture_near_it(
    name: str,
    cache: Cache,
    models: Callable[[str], mf.Backbone],
    bare: Callable[[str], mf.Result],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Counted on the blocks themselves: what the record says is what ran."""
    model, whole = models(name), bare(name)
    ran: list[int] = []
    run = BlockRunner.run

    def counting(self: BlockRunner, *args: Any) -> tuple[Tensor, Tensor]:
        ran.append(max(0, args[-1] - args[-2]))
        return run(self, *args)

    monkeypatch.setattr(BlockRunner, "run", counting)
    result = made(sample(cache), model)
    stage = result.stages[0]
    assert bool(torch.isfinite(result.data).all())
    if name == "pocket":  # a network that was trained
        assert 1e-4 < relative(result.data, whole.data) < 0.8
    assert stage.notes[-1] == f"{type(cache).__name__} computed {stage.nfe} of {whole.nfe} forwards"
    a = model.info.architecture
    assert a is not None
    count = a.double_blocks + a.single_blocks
    start, stop = cache.span(count)
    kept = count - max(0, stop - start)
    assert sum(ran) == stage.nfe * count + (whole.nfe - stage.nfe) * kept
    if kept < count:
        assert stage.flops == pytest.approx(whole.stages[0].flops * sum(ran) / (whole.nfe * count))
    if not result.plan.work.estimated:
        assert (stage.nfe, stage.flops) == (result.plan.nfe, pytest.approx(result.plan.work.flops))


def test_a_cached_model_and_a_cached_stage_are_the_same(models: Callable[[str], mf.Backbone]) -> None:
    model = models("pocket")
    cache = DBCache(0.3, front=1, warmup=1, order=1)
    for whole in (cache(model), Cached(model, cache)):
        assert isinstance(whole, mf.Backbone)
        a = made(sample(None) >> mf.Decode(), whole)
        b = made(sample(cache) >> mf.Decode(), model)
        assert torch.equal(a.pixels, b.pixels)
        assert (a.nfe, a.stages[0].notes) == (b.nfe, b.stages[0].notes)
        assert a.plan.work == b.plan.work
        assert whole.upscaler is model.upscaler


def test_only_one_stage_of_a_chain_is_cached(models: Callable[[str], mf.Backbone]) -> None:
    """The low-resolution stage of MrFlow; the refinement takes its own two forwards as ever."""
    model = models("pocket")
    paper = mf.recipes.paper(low=(64, 64), size=(128, 128), steps=9)
    cached = mf.Sample(64, 64, mf.Shifted(9), cache=TaylorSeer(3)) >> paper[1:]
    result = made(cached, model)
    assert [s.nfe for s in result.stages] == [10, 0, 0, 0, 0, 2, 0]  # 0, 1, 2, 5, 8 of 9, in two branches
    assert [bool(s.notes) for s in result.stages] == [True, *[False] * 6]
    assert result.plan.nfe == 12
    refined = paper[:5] >> mf.Refine(mf.DirectSigma(4), cache=TaylorSeer(9, warmup=1)) >> mf.Decode()
    stages = made(refined, model).stages
    assert (stages[0].nfe, stages[5].nfe) == (18, 2)
    assert stages[5].notes == ("TaylorSeer computed 2 of 8 forwards",)


def test_branches_of_a_guidance_are_kept_apart(models: Callable[[str], mf.Backbone]) -> None:
    """Asked in turns, each branch gives what it gives when it is asked alone."""
    model = models("pocket")
    cond, negative = model.condition(["a big red circle at the left"]), model.condition([""])
    levels = mf.Shifted(9)(1.0, 16, model.info)[:-1]
    g = torch.Generator().manual_seed(0)
    start, drift = torch.randn(2, 1, 16, 8, 8, generator=g)
    xs = [start + 0.1 * i * drift for i in range(9)]
    for cache in SOME[::2]:
        whole = cache(model)
        with torch.inference_mode():
            alone = [
                [f(x, s) for x, s in zip(xs, levels, strict=True)] for f in fields(whole, [cond, negative], levels)
            ]
            one, other = fields(whole, [cond, negative], levels)
            turns = [(one(x, s), other(x, s)) for x, s in zip(xs, levels, strict=True)]
        for (a, b), c, d in zip(turns, *alone, strict=True):
            assert torch.equal(a, c)
            assert torch.equal(b, d)


def fields(model: Cached, conds: Sequence[mf.Condition], levels: Sequence[float]) -> list[mf.Velocity]:
    return [model.field(cond, mf.FieldOptions(sigmas=tuple(levels))) for cond in conds]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["pocket", "flux", "qwen"])
@pytest.mark.parametrize(
    "cache",
    [
        TeaCache(0.2, coefficients=LINE),
        DBCache(0.3, front=1, back=1, warmup=1),
        SeaCache(0.2),
        SeaCache(0.3, of="latents"),
    ],
    ids=str,
)
def test_a_picture_does_not_depend_on_its_batch(
    name: str, cache: Cache, models: Callable[[str], mf.Backbone], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor do its decisions, where pictures need different ones: of prompts of different lengths too."""
    model = models(name)
    prompts = [*PROMPTS["pocket" if name == "pocket" else "large"], ""]
    ran: list[tuple[int, int]] = []
    monkeypatch.setattr(
        memory, "add_forwards", lambda cache, asked, computed, forwards, tokens: ran.append((asked, computed))
    )
    stage = sample(cache, guidance=mf.Distilled())
    whole = made(stage, model, prompts)
    together, alone = sum(c for _, c in ran), 0
    for i, prompt in enumerate(prompts):
        ran.clear()
        one = made(stage, model, [prompt], seed=1 + i)
        alone += sum(c for _, c in ran)
        assert relative(whole.data[i : i + 1], one.data) < 1e-4
    assert together == alone


def test_nothing_leaks_between_runs_sizes_and_prompts(models: Callable[[str], mf.Backbone]) -> None:
    model = models("pocket")
    for cache in SOME[2:6]:
        whole = cache(model)
        first = made(sample(None), whole).data
        made(mf.Sample(96, 64, mf.Shifted(4)), whole, ["the big blue word CAT"])
        made(sample(None, 5), whole, seed=9)
        assert torch.equal(made(sample(None), whole).data, first)


@pytest.mark.parametrize("solver", [mf.Euler(), mf.Heun(), mf.AB3(), mf.StochasticEuler(0.5)])
@pytest.mark.parametrize("guidance", [None, mf.Distilled(), mf.Interval(mf.CFG(3.0), 0.3, 0.8)])
def test_the_plan_counts_a_fixed_cadence_exactly(
    solver: mf.Solver, guidance: mf.Guidance | None, models: Callable[[str], mf.Backbone]
) -> None:
    model = models("pocket")
    fixed = DBCache(1.0, front=2, warmup=2, limit=2), DMD(1.0, front=2, warmup=4), DBCache(0.0, front=2)
    for cache in (TaylorSeer(3), MagCache(0.2), Spectrum(2, 1, warmup=2), *fixed):
        chain = sample(cache, 7, solver=solver, guidance=guidance)
        result = made(chain, model)
        planned = result.plan.work
        assert not planned.estimated
        assert result.nfe == planned.nfe
        assert result.stages[0].flops == pytest.approx(planned.flops)
        points = result.plan.rows[0].evaluations
        asked = (guidance or mf.guidance.own_guidance(model.info)).evals(points)
        assert result.stages[0].notes == (f"{type(cache).__name__} computed {planned.nfe} of {asked} forwards",)


def test_a_plan_says_where_it_estimates() -> None:
    chain = mf.Sample(512, 512, cache=TeaCache(0.25)) >> mf.Decode()
    planned = mf.plan(chain, mf.FLUX)
    assert planned.work.estimated
    assert planned.nfe == 8  # 12 / 1.5
    text = str(planned).splitlines()
    assert "  ~8  " in text[1]
    assert text[-1] == "~ an estimate: the picture decides what its cache leaves out; a run counts it"
    stages = cast("list[dict[str, object]]", report(planned)["stages"])
    assert [s.get("estimated") for s in stages] == [True, None]
    exact = mf.plan(mf.Sample(512, 512, cache=MagCache()), mf.FLUX)
    assert "~" not in str(exact)
    assert exact.nfe < 12
    front = mf.plan(mf.Sample(512, 512, cache=DBCache(1.0, front=19, warmup=4)), mf.FLUX)
    assert front.nfe == 4
    whole = mf.plan(mf.Sample(512, 512), mf.FLUX).work.flops
    assert front.work.flops == pytest.approx(whole * (4 + 8 * 19 / 57) / 12)


def test_records_carry_the_cache_and_replay(models: Callable[[str], mf.Backbone], tmp_path: Path) -> None:
    model = models("pocket")
    for cache in (*SOME, TeaCache(0.25), DBCache(limit=3, most=5)):
        chain = sample(cache) >> mf.Decode()
        assert decode_chain(encode_chain(chain)) == chain
    result = made(sample(DBCache(0.3, front=1, warmup=1)) >> mf.Decode(), model)
    [path] = result.save(tmp_path / "a.png")
    record = mf.read_record(path)
    stages = cast("list[dict[str, object]]", record["stages"])
    assert stages[0]["notes"] == [f"DBCache computed {result.nfe} of 12 forwards"]
    assert any("DBCache computed" in line for line in inspect_file(path))
    assert torch.equal(mf.replay(path, model=model).pixels, result.pixels)


def test_results_of_stages_are_told_apart(models: Callable[[str], mf.Backbone]) -> None:
    model, store = models("pocket"), mf.StageCache()
    one, other = DBCache(0.3, front=1, warmup=1), DBCache(0.2, front=1, warmup=1)
    bare = mf.run(sample(None), model, "a cat", cache=store)
    assert len({fingerprint(sample(c)) for c in (None, one, other)}) == 3
    versions = {model.info.version, one(model).info.version, other(model).info.version}
    assert len(versions) == 3
    cached = mf.run(sample(None), one(model), "a cat", cache=store)
    assert not cached.stages[0].cached
    assert not torch.equal(cached.data, bare.data)
    again = mf.run(sample(None), one(model), "a cat", cache=store)
    assert again.stages[0].cached
    assert (again.nfe, again.stages[0].notes) == (0, ())


@dataclass(frozen=True)
class EveryOther(Cache):
    """One of a user's own."""

    offset: int = 0

    def rule(self, info: mf.ModelInfo, levels: Sequence[float]) -> Rule:
        def due(look: Evaluation) -> bool:
            return look.index % 2 == self.offset

        return due


def test_a_cache_of_ones_own(models: Callable[[str], mf.Backbone], tmp_path: Path) -> None:
    model = models("pocket")
    result = made(sample(EveryOther(), guidance=mf.Distilled()) >> mf.Decode(), model)
    assert (result.nfe, result.plan.nfe) == (3, 3)
    late = made(sample(EveryOther(1), guidance=mf.Distilled()), model)
    assert (late.nfe, late.plan.nfe) == (4, 4)  # the first is computed whatever the rule says
    [path] = result.save(tmp_path / "own.png")
    assert torch.equal(mf.replay(path, model=model, types=[EveryOther]).pixels, result.pixels)
    assert "EveryOther-" in EveryOther()(model).info.version


def test_what_cannot_be_cached_is_refused_before_any_work(models: Callable[[str], mf.Backbone]) -> None:
    model, toy = models("pocket"), mf.toy()
    with pytest.raises(
        mf.PlanError, match=r"TeaCache knows no coefficients for flux1-schnell; fit them with TeaCache\."
    ):
        mf.plan(sample(TeaCache(0.2)), mf.SCHNELL)
    with pytest.raises(mf.PlanError, match=r"MagCache knows no ratios for qwen-image; measure them with MagCache\."):
        mf.plan(sample(MagCache(0.2)), mf.QWEN)
    with pytest.raises(mf.PlanError, match=r"stage 1 of 1, Sample\(...\): toy cannot be cached: its network cannot be"):
        mf.run(sample(TaylorSeer()), toy)
    with pytest.raises(mf.PlanError, match="toy cannot be cached"):
        TaylorSeer()(toy)
    with pytest.raises(mf.PlanError, match="toy cannot be cached"):
        TeaCache.calibrate(0.1, toy, ["a"])
    with pytest.raises(
        mf.PlanError, match=r"cache must be a Cache such as TeaCache\(0.25\), got .*make one: TeaCache\("
    ):
        mf.plan(sample(cast("Cache", TeaCache)), mf.FLUX)
    whole = TaylorSeer()(model)
    for again in (lambda: TaylorSeer()(whole), lambda: mf.run(sample(TaylorSeer()), whole)):
        with pytest.raises(mf.PlanError, match=r"pocket is cached already, by TaylorSeer\("):
            again()
    noisy = mf.State(mf.Latents(1, 8, 8, model.info.space, 0.3), torch.zeros(1, 16, 8, 8))
    with pytest.raises(mf.PlanError, match="pocket is cached already"):
        mf.run(mf.Refine(cache=TaylorSeer()), whole, start=noisy)


@pytest.mark.slow
def test_pictures_get_worse_with_the_threshold(models: Callable[[str], mf.Backbone]) -> None:
    """PSNR to the picture without a cache, of the model's own recipe: high at first, and falling."""
    model = models("pocket")
    low = model.info.low
    prompts = PROMPTS["pocket"]

    def picture(cache: Cache | None) -> mf.Result:
        return made(mf.Sample(*low, mf.Shifted(12), cache=cache) >> mf.Decode(), model, prompts)

    bare = picture(None)
    for make in (
        TeaCache,
        MagCache,
        lambda t: DBCache(2 * t, front=1, warmup=2),
        lambda t: DBCache(t, front=1, warmup=2, order=1),
    ):
        results = [picture(make(t)) for t in (0.05, 0.15, 0.4)]
        quality = [psnr(r.pixels, bare.pixels) for r in results]
        forwards = [r.nfe for r in results]
        assert forwards == sorted(forwards, reverse=True) and forwards[0] > forwards[-1]
        assert quality[0] > 38 and quality[-1] > 20
        assert quality[0] > quality[-1]
        assert all(b < a + 1 for a, b in pairwise(quality))


def test_calibrated(models: Callable[[str], mf.Backbone]) -> None:
    model = models("pocket")
    settings: dict[str, Any] = dict(size=(64, 64), schedule=mf.Shifted(8), seed=3)
    tea = TeaCache.calibrate(0.2, model, PROMPTS["pocket"], degree=2, **settings)
    assert tea.coefficients is not None and len(tea.coefficients) == 3
    mag = MagCache.calibrate(0.2, model, PROMPTS["pocket"], limit=2, **settings)
    assert mag.ratios is not None and len(mag.ratios) == 8 and mag.ratios[0] == 1.0
    assert (mag.limit, mag.retention) == (2, 0.2)
    assert all(0.5 < r < 1.5 for r in mag.ratios)
    line = L2P.calibrate(3, model, PROMPTS["pocket"], warmup=2, history=2, **settings)
    assert [len(row) for row in line.rows] == [0, 0, 2, 2, 0, 2, 2, 0]
    for cache in (tea, mag, line):
        result = made(mf.Sample(64, 64, mf.Shifted(8), cache=cache), model)
        assert result.nfe < 16
        assert decode_chain(encode_chain(mf.Chain((sample(cache),)))) == mf.Chain((sample(cache),))
    with pytest.raises(mf.PlanError, match="at least one prompt"):
        MagCache.calibrate(0.2, model, [], **settings)


@pytest.mark.parametrize("of", ["output", "velocity"])
def test_inner_products_are_those_of_the_features(
    of: Literal["output", "velocity"], models: Callable[[str], mf.Backbone], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen at the network's last layer: what goes in, or what comes out."""
    seen: list[Tensor] = []
    head = BlockRunner.head

    def watched(self: BlockRunner, img: Tensor, table: Tensor) -> Tensor:
        out = head(self, img, table)
        seen.append((img if of == "output" else out).double().flatten())
        return out

    monkeypatch.setattr(BlockRunner, "head", watched)
    settings: dict[str, Any] = dict(size=(64, 48), schedule=mf.Shifted(4), guidance=mf.Distilled(), seed=1)
    [gram] = Calibration(models("pocket"), ["a cat"], **settings).inner_products(of)
    features = torch.stack(seen)
    assert torch.from_numpy(gram).allclose(features @ features.T, rtol=1e-9)


def test_l2p_is_nearer_than_the_curve_that_it_replaces(models: Callable[[str], mf.Backbone]) -> None:
    """On prompts and a seed that it was not fitted to, at the same evaluations: least squares against a line."""
    model = models("pocket")
    settings: dict[str, Any] = dict(size=(64, 64), schedule=mf.Shifted(12))
    line = L2P.calibrate(3, model, PROMPTS["pocket"], **settings)
    prompts = ["a small green square", "the big white word DOG"]

    def drawn(cache: Cache | None) -> mf.Result:
        return made(mf.Sample(64, 64, mf.Shifted(12), cache=cache), model, prompts, seed=7)

    whole, fitted, curve = drawn(None), drawn(line), drawn(TaylorSeer(3))
    assert fitted.nfe == curve.nfe < whole.nfe
    assert psnr(fitted.data, whole.data) > psnr(curve.data, whole.data)

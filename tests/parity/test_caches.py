"""Caches against diffusers' hooks on tiny random FLUX and Qwen-Image pipelines: decisions and pictures."""

import copy
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from einops import rearrange
from torch import Tensor

import mrflow as mf
from mrflow.caches import (
    Cache,
    DBCache,
    Evaluation,
    Extrapolation,
    MagCache,
    Rule,
    SeaCache,
    TaylorSeer,
    TeaCache,
    memory,
)
from mrflow.caches.calibrate import RecordingModel, RecordingStep, Track
from mrflow.caches.clock import Feature
from mrflow.caches.magcache import RATIOS
from mrflow.caches.teacache import COEFFICIENTS
from tests.parity.test_flux import relative
from tests.tiny import write_flux_repo, write_qwen_repo

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]
STEPS = 14
SEED = 5


@dataclass(frozen=True)
class At(Cache):
    """Computed at these evaluations; a feature is extrapolated over the others by the published series."""

    steps: tuple[int, ...]
    order: int
    of: Feature

    def feature(self) -> Feature:
        return self.of

    def extrapolation(self) -> Extrapolation:
        return Extrapolation(self.order, "taylor")

    def rule(self, info: mf.ModelInfo, levels: Sequence[float]) -> Rule:
        def due(look: Evaluation) -> bool:
            return look.index in self.steps

        return due


class Pair:
    """A tiny repository as diffusers' pipeline and as our model; `bare` are their pictures without a cache."""

    def __init__(self, kind: str, folder: Path) -> None:
        from diffusers import FluxPipeline, QwenImagePipeline

        self.kind = kind
        (write_flux_repo if kind == "flux" else write_qwen_repo)(folder)
        pipeline: Any = FluxPipeline if kind == "flux" else QwenImagePipeline
        self.pipe = pipeline.from_pretrained(folder)
        self.pipe.set_progress_bar_config(disable=True)
        self.net = self.pipe.transformer
        self.model = mf.load(folder, device="cpu")
        self.bare, self.bare_ran = self.theirs(None)

    def theirs(self, config: Any) -> tuple[Tensor, list[bool]]:
        """A picture by diffusers with a cache, and for each forward of the transformer whether its last block ran."""
        net = self.pipe.transformer = copy.deepcopy(self.net)
        ran: list[bool] = []
        last = (net.single_transformer_blocks if self.kind == "flux" else net.transformer_blocks)[-1]
        last.attn.register_forward_hook(lambda *_: ran.__setitem__(-1, True))
        if isinstance(config, TeaReenacted):
            config.apply(net)
        elif config is not None:
            net.enable_cache(config)
            net.cache_context = partial(located, net.cache_context, self.pipe.scheduler, Counter())
        net.register_forward_pre_hook(lambda *_: ran.append(False))
        flux: dict[str, Any] = dict(guidance_scale=3.5)
        qwen: dict[str, Any] = dict(negative_prompt=[" "], true_cfg_scale=4.0)
        made = self.pipe(
            prompt=["a cat"],
            height=64,
            width=64,
            num_inference_steps=STEPS,
            generator=[torch.Generator().manual_seed(SEED)],
            output_type="pt",
            **(flux if self.kind == "flux" else qwen),
        )
        return made.images, ran

    def ours(self, cache: Cache, monkeypatch: pytest.MonkeyPatch) -> tuple[Tensor, list[bool]]:
        """The same by us: a stage with a cache."""
        ran: list[bool] = []

        def seen(name: str | None, asked: int, computed: int, forwards: float, *, tokens: int) -> None:
            ran.append(bool(computed))

        monkeypatch.setattr(memory, "add_forwards", seen)
        chain = mf.Sample(64, 64, mf.Shifted(STEPS), noise=mf.Stream(0), cache=cache) >> mf.Decode()
        return mf.run(chain, self.model, "a cat", seed=SEED).pixels, ran


@pytest.fixture(scope="module", params=["flux", "qwen"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return Pair(request.param, tmp_path_factory.mktemp(request.param) / "r")


def first_block(threshold: float) -> Callable[[str], tuple[Any, Cache]]:
    def make(kind: str) -> tuple[Any, Cache]:
        from diffusers.hooks import FirstBlockCacheConfig

        return FirstBlockCacheConfig(threshold=threshold), DBCache(threshold, front=1, warmup=0)

    return make


def mag(threshold: float, limit: int, retention: float) -> Callable[[str], tuple[Any, Cache]]:
    def make(kind: str) -> tuple[Any, Cache]:
        from diffusers.hooks import MagCacheConfig
        from diffusers.hooks.mag_cache import FLUX_MAG_RATIOS

        config = MagCacheConfig(
            threshold=threshold,
            max_skip_steps=limit,
            retention_ratio=retention,
            num_inference_steps=STEPS,
            mag_ratios=FLUX_MAG_RATIOS,
        )
        return config, MagCache(threshold, limit=limit, retention=retention, ratios=RATIOS["flux1-dev"])

    return make


def taylor(interval: int, warmup: int, order: int, *, lite: bool) -> Callable[[str], tuple[Any, Cache]]:
    """Diffusers counts its interval from another step than the published code: `At` says its steps one by one."""

    def make(kind: str) -> tuple[Any, Cache]:
        from diffusers.hooks import TaylorSeerCacheConfig

        last = r"single_transformer_blocks\.2" if kind == "flux" else r"transformer_blocks\.1"
        others = [r"transformer_blocks\.[01]", r"single_transformer_blocks\.[01]"]
        if kind == "qwen":
            others = [r"transformer_blocks\.0"]
        config = TaylorSeerCacheConfig(
            cache_interval=interval,
            disable_cache_before_step=warmup,
            max_order=order,
            taylor_factors_dtype=torch.float32,
            use_lite_mode=lite,
            skip_predict_identifiers=None if lite else others,
            cache_identifiers=None if lite else [last],
        )
        if lite and interval == 2:
            return config, TaylorSeer(interval, warmup=warmup, order=order, of="velocity", series="taylor")
        steps = (s for s in range(STEPS) if s < warmup or (s - warmup - 1) % interval == 0)
        return config, At(tuple(steps), order, "velocity" if lite else "output")

    return make


def located(context: Any, scheduler: Any, calls: Counter[str], name: str) -> Any:
    """A cache's context with the step and its level, which the pipelines leave out and SeaCache's hook needs."""
    calls[name] += 1
    step = calls[name] - 1
    return context(name, step_index=step, sigma=float(scheduler.sigmas[step]), num_inference_steps=STEPS)


def unpacked(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """What the hook shall filter, as (channels, frames, height, width): the noisy latents."""
    return list(rearrange(kwargs["hidden_states"], "b (h w) (c p q) -> b c 1 (h p) (w q)", h=4, p=2, q=2))


def modulated(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """As `unpacked`: what the first block's attention is about to see of the image."""
    block, time = module.transformer_blocks[0], kwargs["timestep"]
    if hasattr(module, "x_embedder"):
        x, guidance = module.x_embedder(kwargs["hidden_states"]), kwargs["guidance"]
        temb = module.time_text_embed(time * 1000, guidance * 1000, kwargs["pooled_projections"])
        modulated = block.norm1(x, emb=temb)[0]
    else:
        x = module.img_in(kwargs["hidden_states"])
        temb = module.time_text_embed(time, x)
        modulated = block._modulate(block.img_norm1(x), block.img_mod(temb).chunk(2, -1)[0])[0]
    return list(rearrange(modulated, "b (h w) c -> b c 1 h w", h=4))


def sea(
    threshold: float, *, power: float, order: int, limit: int | None, seen: Any
) -> Callable[[str], tuple[Any, Cache]]:
    def make(kind: str) -> tuple[Any, Cache]:
        from diffusers.hooks.sea_cache import SeaCacheConfig

        config = SeaCacheConfig(
            threshold=threshold,
            residual_order=order,
            retention_steps=2,
            cache_end_steps=1,
            max_consecutive_cached=limit or 0,
            power_exp=power,
            raw_vision_callback=seen,
        )
        of: Any = "latents" if seen is unpacked else "input"
        return config, SeaCache(threshold, of=of, power=power, order=order, first=2, limit=limit)

    return make


CASES = {
    "sea": sea(0.25, power=3.0, order=1, limit=2, seen=unpacked),
    "sea, far": sea(0.6, power=3.0, order=1, limit=None, seen=unpacked),
    "sea, input": sea(0.3, power=2.0, order=0, limit=None, seen=modulated),
    "sea, input, far": sea(0.5, power=2.0, order=1, limit=4, seen=modulated),
    "first block, low": first_block(0.45),
    "first block, middle": first_block(0.5),
    "first block, high": first_block(0.7),
    "mag": mag(0.06, 3, 0.2),
    "mag, far": mag(0.3, 5, 0.1),
    "mag, one at a time": mag(0.3, 1, 0.4),
    "taylor lite": taylor(2, 3, 1, lite=True),
    "taylor lite, far": taylor(5, 3, 1, lite=True),
    "taylor, order 0": taylor(4, 2, 0, lite=False),
    "taylor, order 1": taylor(5, 3, 1, lite=False),
    "taylor, order 2": taylor(3, 3, 2, lite=False),
}


@pytest.mark.parametrize("case", CASES)
def test_decisions_and_pictures_are_theirs(case: str, pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    config, cache = CASES[case](pair.kind)
    want, theirs_ran = pair.theirs(config)
    got, ours_ran = pair.ours(cache, monkeypatch)
    hold(pair, want, theirs_ran, got, ours_ran)


def hold(pair: Pair, want: Tensor, theirs_ran: list[bool], got: Tensor, ours_ran: list[bool]) -> None:
    """The same decisions, some of either kind, and a picture that they change."""
    assert pair.bare_ran == [True] * len(theirs_ran)
    assert ours_ran == theirs_ran
    assert len(set(theirs_ran)) == 2
    assert relative(got, want) < 1e-4 < relative(want, pair.bare)


class TeaReenacted:
    """TeaCache on a transformer of diffusers: its blocks hand their input on while the equations say so.

    Branches take turns, as the pipelines call them.
    """

    def __init__(self, threshold: float, coefficients: Sequence[float], branches: int) -> None:
        self.threshold, self.polynomial = threshold, np.poly1d(coefficients)
        self.branches, self.calls = branches, 0
        self.memory: list[dict[str, Any]] = [{"sum": 0.0} for _ in range(branches)]

    def apply(self, net: Any) -> None:
        """Put it into a network."""
        blocks = [*net.transformer_blocks, *getattr(net, "single_transformer_blocks", [])]
        for i, block in enumerate(blocks):
            block.forward = partial(self._block, block, block.forward, i == 0, i == len(blocks) - 1)

    def _block(self, block: Any, forward: Any, first: bool, last: bool, *args: Any, **kwargs: Any) -> Any:
        state = self.memory[self.calls % self.branches]
        x = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        text = kwargs["encoder_hidden_states"] if "encoder_hidden_states" in kwargs else args[1]
        if first:
            self._decide(state, self._modulated_input(block, x, kwargs["temb"] if "temb" in kwargs else args[2]))
            state["in"] = x
        out = forward(*args, **kwargs) if state["compute"] else (text, x)
        if last:
            if state["compute"]:
                state["residual"] = out[1] - state["in"]
            else:
                out = (text, state["in"] + state["residual"])
            self.calls += 1
        return out

    def _modulated_input(self, block: Any, x: Tensor, temb: Tensor) -> Tensor:
        if hasattr(block, "norm1"):
            return block.norm1(x, emb=temb)[0]
        return block._modulate(block.img_norm1(x), block.img_mod(temb).chunk(2, -1)[0])[0]

    def _decide(self, state: dict[str, Any], seen: Tensor) -> None:
        step = self.calls // self.branches
        if step in (0, STEPS - 1):
            state["compute"], state["sum"] = True, 0.0
        else:
            change = ((seen - state["modulated_input"]).abs().mean() / state["modulated_input"].abs().mean()).item()
            state["sum"] += abs(self.polynomial(change))
            state["compute"] = state["sum"] >= self.threshold
            if state["compute"]:
                state["sum"] = 0.0
        state["modulated_input"] = seen


@pytest.mark.parametrize("threshold", [0.5, 1.0])
def test_teacache_is_its_equations_on_their_network(
    threshold: float, pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the polynomials that either model is published with."""
    coefficients = COEFFICIENTS["flux1-dev" if pair.kind == "flux" else "qwen-image"]
    want, theirs_ran = pair.theirs(TeaReenacted(threshold, coefficients, 1 if pair.kind == "flux" else 2))
    got, ours_ran = pair.ours(TeaCache(threshold), monkeypatch)
    print(pair.kind, "".join("01"[x] for x in theirs_ran), "".join("01"[x] for x in ours_ran))
    hold(pair, want, theirs_ran, got, ours_ran)


def test_ratios_are_measured_as_theirs(pair: Pair, capsys: pytest.CaptureFixture[str]) -> None:
    """Diffusers prints them after a run, a list for each branch; numbers of both are rounded alike."""
    from diffusers.hooks import MagCacheConfig

    pair.theirs(MagCacheConfig(calibrate=True, num_inference_steps=STEPS))
    want = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("[1.0")]
    tracks: list[Track] = []
    watched = RecordingModel(pair.model, partial(RecordingStep, tracks=tracks))
    mf.run(mf.Sample(64, 64, mf.Shifted(STEPS), noise=mf.Stream(0)), watched, "a cat", seed=SEED)
    got = [[1.0, *(step.ratio for step in track)] for track in tracks]
    assert len(want) == len(got) == (1 if pair.kind == "flux" else 2)
    for ours, theirs in zip(got, want, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)

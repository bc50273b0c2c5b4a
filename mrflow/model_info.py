"""Facts about a model, without weights: what its latents are, how its noise levels shift, its sizes, what it can.

Facts hold no tensors: they compare, hash and print. The published models' stand at the end; defaults that change
numbers live here.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol, runtime_checkable

from mrflow._checks import is_number, require
from mrflow.errors import PlanError
from mrflow.flow import Velocity
from mrflow.protocols.pieces import StepFactory

Offload = Literal["none", "phase", "block"]
"""Where weights are while they are not used; `mrflow.models.offload` says how."""


@dataclass(frozen=True)
class LatentSpace:
    """Where latents live: two models whose latents have one shape and two meanings differ in `name`.

    `downscale` is pixels per latent cell, `patch` is latent cells per token, `whole` tokens come together: per side.
    """

    name: str
    channels: int = 16
    downscale: int = 8
    patch: int = 2
    whole: int = 1

    @property
    def multiple(self) -> int:
        """What a picture's sides must be a multiple of, in pixels."""
        return self.downscale * self.patch * self.whole


@dataclass(frozen=True)
class ByStep:
    """A second line for mu, that of `at` steps, where the first is that of `full` steps; mu is linear in the steps.

    Above `until` tokens the first line holds alone (FLUX.2, diffusers `compute_empirical_mu`).
    """

    low: float
    high: float
    at: int = 10
    full: int = 200
    until: int = 4300


@dataclass(frozen=True)
class Shift:
    """A model's resolution-dependent timestep shift: `mu` is a line through (low_tokens, low) and (high_tokens, high).

    Not clamped at either end, as in the reference (diffusers `calculate_shift`). `terminal` stretches the schedule so
    that its last level before 0 is that value (Qwen-Image: 0.02). `kind` is the curve that applies mu. `last` is the
    last level before 0 of the even grid that is shifted (None: 1 / steps; Stable Diffusion 3: 0.003). `by_step` makes
    mu depend on the number of steps too.
    """

    low: float
    high: float
    low_tokens: int = 256
    high_tokens: int = 4096
    terminal: float | None = None
    kind: Literal["exponential", "linear"] = "exponential"
    last: float | None = None
    by_step: ByStep | None = None

    def __post_init__(self) -> None:
        """Refuse what is no such line or curve.

        Raises:
            PlanError: naming the first of it.
        """
        for name, value in (("low", self.low), ("high", self.high)):
            require(is_number(value), f"a shift's {name}", "a finite number", value)
        require(
            self.low_tokens != self.high_tokens,
            "a shift's high_tokens",
            f"other than {self.low_tokens}",
            self.low_tokens,
        )
        require(self.kind in ("exponential", "linear"), "a shift's kind", "exponential or linear", self.kind)
        for name, end in (("terminal", self.terminal), ("last", self.last)):
            inside = end is None or (is_number(end) and 0 < end < 1)
            require(inside, f"a shift's {name}", "above 0 and below 1", end)

    def mu(self, tokens: int, *, steps: int | None = None) -> float:
        """The shift at this many image tokens, and steps where it depends on them (None: many)."""
        over, span, few = tokens - self.low_tokens, self.high_tokens - self.low_tokens, self.by_step
        mu = self.low + (self.high - self.low) / span * over
        if few is None or steps is None or tokens > few.until:
            return mu
        other = few.low + (few.high - few.low) / span * over
        return mu + (other - mu) * (few.full - steps) / (few.full - few.at)

    @staticmethod
    def fixed(factor: float) -> "Shift":
        """The static shift s -> f s / (1 + (f - 1) s), whatever the resolution."""
        require(is_number(factor) and factor > 0, "a shift factor", "above 0", factor)
        return Shift(math.log(factor), math.log(factor))


@dataclass(frozen=True)
class Architecture:
    """Sizes of a transformer, for counting its work without building it."""

    hidden: int
    double_blocks: int
    single_blocks: int
    context: int
    text_tokens: int
    parameters: int
    mlp_ratio: float = 4.0


@dataclass(frozen=True)
class Footprint:
    """Bytes of a model's weights, by what moves together; `pair` is the most that two neighbours take.

    `rest` is the transformer without its blocks and its modulation linears; `text` the encoders without their layers.
    Then values alive at once while it computes, at the most: of a forward per token and channel of its width, of the
    autoencoder per pixel. FLUX's autoencoder holds 649 and 769 per pixel on a CPU; on CUDA, where group norms know no
    channels-last layout, the copies between both layouts are added.
    """

    rest: int
    modulation: int
    modulation_pair: int
    blocks: int
    block_pair: int
    autoencoder: int
    text: int = 0
    text_layers: int = 0
    text_pair: int = 0
    forward_values: float = 22.0
    encode_values: float = 777.0
    decode_values: float = 961.0

    @property
    def total(self) -> int:
        """All parts together."""
        return self.rest + self.modulation + self.blocks + self.autoencoder + self.text + self.text_layers


@dataclass(frozen=True)
class Capabilities:
    """What a model's field can be asked for beside its velocity. What a chain needs of the rest, `plan` refuses.

    `positions`: tokens that lie on no grid. `cache`: its network can be taken apart. `lora`: adapters that are on in
    one stage. `policy`: pi-Flow adapters. `together`: several conditions in one pass. `attention`: two conditions mixed
    inside attention. `zero`: the field at sigma 0.
    `lora_advice` is what to do instead where adapters are put on in another way.
    """

    positions: bool = False
    cache: bool = False
    lora: bool = False
    policy: bool = False
    together: bool = False
    attention: bool = False
    zero: bool = False
    lora_advice: str = "a backbone of your own says Capabilities(lora=True) and serves options.loras"


EVERYTHING = Capabilities(positions=True, cache=True, lora=True, policy=True, together=True, attention=True)


@dataclass(frozen=True)
class Forecast:
    """What a cache will compute of `asked` evaluations of one branch; a cached one still computes `kept` of the blocks.

    `exact` is false where the picture decides.
    """

    asked: int
    computed: int
    kept: float
    exact: bool

    @property
    def forwards(self) -> float:
        """The work in whole forwards."""
        return self.computed + (self.asked - self.computed) * self.kept


@runtime_checkable
class CacheLike(Protocol):
    """A way to leave out evaluations, as models and plans see it; `mrflow.caches.Cache` is the base class."""

    def check(self, info: "ModelInfo") -> None:
        """Raise PlanError where this model cannot be cached so."""
        ...

    def field(
        self, open_field: Callable[[StepFactory], Velocity], sigmas: Sequence[float], info: "ModelInfo"
    ) -> Velocity:
        """A model's field with a fresh memory; `open_field` opens it around a step, `sigmas` are its evaluations'."""
        ...

    def forecast(self, info: "ModelInfo", sigmas: Sequence[float], branch: Sequence[float]) -> Forecast:
        """What it will do with a branch that is asked at the levels `branch` of an integration over `sigmas`."""
        ...

    def share(self, info: "ModelInfo", tokens: int) -> float:
        """What a computed evaluation costs, as a part of one without the cache."""
        ...


@dataclass(frozen=True)
class ModelInfo:
    """Facts about a model, without weights.

    `cfg` is the scale of true classifier-free guidance the model is used with (1: none), `guidance` the value its
    distilled guidance embedding is given (None: it has none); `rescale` says that its guidance keeps the norm of the
    conditional velocity, `negative` is the prompt of the other branch. `size` and `low` are the picture sizes, as
    (height, width), that its recipes use when none are said; `native_steps` and `staged_steps` are their steps, `sigma`
    the noise level that refinement begins at. `upscale` is the scale of the super-resolution net its recipe uses when
    none is named (None: there is none), `upscale_flops` its operations per pixel that comes in.
    `encode` and `decode` are operations of the autoencoder as (linear, quadratic) in the pixels of the picture.
    `version` tells one set of weights from another. `footprint` is what it needs of memory: as loaded, or in bfloat16.
    `capabilities` is what its fields can be asked for, `cache` the cache that all of them have, if any. `files` are
    those that its weights and tokenizers came from, where they did not come with mrflow. `sides` are those of the
    squares, in pixels, that it was trained on, where it draws well at no others.
    """

    name: str
    space: LatentSpace
    shift: Shift
    cfg: float = 1.0
    rescale: bool = False
    guidance: float | None = None
    negative: str = ""
    size: tuple[int, int] = (1024, 1024)
    low: tuple[int, int] = (512, 512)
    native_steps: int = 50
    staged_steps: int = 12
    sigma: float = 0.12
    architecture: Architecture | None = None
    upscale: int | None = None
    upscale_flops: float = 0.0
    encode: tuple[float, float] = (0.0, 0.0)
    decode: tuple[float, float] = (0.0, 0.0)
    version: str = ""
    footprint: Footprint | None = None
    capabilities: Capabilities = Capabilities()
    cache: CacheLike | None = None
    files: tuple[str, ...] = field(default=(), repr=False, compare=False)
    sides: tuple[int, ...] = field(default=(), repr=False, compare=False)

    def require(self, needs: Capabilities) -> None:
        """Refuse what a chain needs and this model cannot.

        Raises:
            PlanError: naming the first of it, and what to do.
        """
        can = self.capabilities
        if needs.positions and not can.positions:
            raise PlanError(
                f"{self.name} draws on whole grids only; a backbone of your own says Capabilities(positions=True) and "
                "serves options.positions"
            )
        if needs.cache and not can.cache:
            raise PlanError(
                f"{self.name} cannot be cached: its network cannot be taken apart; a backbone of your own says "
                "Capabilities(cache=True) and hands its pieces to options.cache"
            )
        if needs.lora and not can.lora:
            raise PlanError(f"{self.name} takes no LoRA; {can.lora_advice}")
        if needs.policy and not can.policy:
            raise PlanError(f"{self.name} takes no pi-Flow adapter; load FLUX.1 or Qwen-Image, without a cache")
        if needs.attention and not can.attention:
            raise PlanError(
                f"{self.name} lets no guidance into its attention; use CFG(scale), or load FLUX.1, Qwen-Image, Z-Image "
                "or pocket with mrflow.load"
            )
        if needs.together and not can.together:
            raise PlanError(f"{self.name} takes one condition at a time; ask for a field each")
        if needs.zero and not can.zero:
            raise PlanError(
                f"{self.name} cannot be asked for its field at sigma 0, where it was hardly trained; leave out "
                "zero=True of the solver"
            )

    def tokens(self, height: int, width: int) -> int:
        """Image tokens of a picture of this many pixels."""
        unit = self.space.downscale * self.space.patch
        return (height // unit) * (width // unit)


# Autoencoder operations as (linear, quadratic) in the pixels, fitted to counts on the meta device at 512 x 512 and
# 1024 x 1024 in TFLOP: FLUX encode 1.118, 4.883, decode 2.515, 10.47; Qwen-Image 0.636, 2.852, 1.100, 4.710.
_FLUX_ENCODE, _FLUX_DECODE = (4.134e6, 0.498), (9.464e6, 0.497)
_QWEN_ENCODE, _QWEN_DECODE = (2.328e6, 0.373), (4.098e6, 0.376)
# RRDBNet x2 (RealESRGAN_x2plus), 2.350 TFLOP for a 512 x 512 picture.
_RRDB_X2 = 8.965e6
# FLUX.1 in bfloat16: parameters x 2, counted on the meta device. Text: CLIP-L and T5-XXL, whose 24 layers may visit.
_FLUX_FOOTPRINT = Footprint(
    rest=2 * 45_244_480,
    modulation=2 * 3_247_448_064,
    modulation_pair=2 * 113_283_072,
    blocks=2 * 8_608_715_776,
    block_pair=2 * 453_096_448,
    autoencoder=2 * 83_819_683,
    text=2 * 254_660_864,
    text_layers=2 * 4_630_710_272,
    text_pair=2 * 385_894_400,
)
FLUX = ModelInfo(
    "flux1-dev",
    LatentSpace("flux1"),
    Shift(0.5, 1.15),
    guidance=3.5,
    architecture=Architecture(3072, 19, 38, 4096, 512, 11_901_408_320),
    upscale=2,
    upscale_flops=_RRDB_X2,
    encode=_FLUX_ENCODE,
    decode=_FLUX_DECODE,
    footprint=_FLUX_FOOTPRINT,
    capabilities=EVERYTHING,
)
SCHNELL = ModelInfo(
    "flux1-schnell",
    LatentSpace("flux1"),
    Shift.fixed(1.0),
    architecture=Architecture(3072, 19, 38, 4096, 256, 11_891_178_560),
    upscale=2,
    upscale_flops=_RRDB_X2,
    encode=_FLUX_ENCODE,
    decode=_FLUX_DECODE,
    footprint=replace(_FLUX_FOOTPRINT, rest=2 * 35_014_720),
    capabilities=EVERYTHING,
)


def flux_facts(*, guidance: bool, curve: Shift | None) -> ModelInfo:
    """Published facts of the FLUX.1 that a transformer is: dev has a guidance embedding, schnell none and no shift.

    Without an embedding but with a shift that depends on the size it is a dev whose distillation was undone.
    """
    if guidance:
        return FLUX
    undone = curve is not None and curve.low != curve.high
    return replace(FLUX, name="flux1-de-distilled", guidance=None) if undone else SCHNELL


# Qwen-Image in bfloat16: parameters x 2. Text: Qwen2.5-VL's language model, without vision tower and head.
_QWEN_FOOTPRINT = Footprint(
    rest=2 * 21_642_816,
    modulation=2 * 6_815_864_832,
    modulation_pair=2 * 113_283_072,
    blocks=2 * 13_592_893_440,
    block_pair=2 * 453_096_448,
    autoencoder=2 * 44_599_603,
    text=2 * 545_000_960,
    text_layers=2 * 6_525_618_176,
    text_pair=2 * 466_115_584,
    encode_values=587.0,
    decode_values=676.0,
)
QWEN = ModelInfo(
    "qwen-image",
    LatentSpace("qwen-image"),
    Shift(0.5, 0.9, 256, 8192, terminal=0.02),
    cfg=4.0,
    rescale=True,
    negative=" ",
    architecture=Architecture(3072, 60, 0, 3584, 50, 20_430_401_088),
    upscale=2,
    upscale_flops=_RRDB_X2,
    encode=_QWEN_ENCODE,
    decode=_QWEN_DECODE,
    footprint=_QWEN_FOOTPRINT,
    capabilities=EVERYTHING,
)

"""How conditions become one velocity field: distilled guidance, classifier-free guidance, and where it applies.

Each branch has a field of its own, so a cache that lives in a field never mixes the conditional and the unconditional.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated

import torch
from einops import rearrange, repeat
from torch import Tensor

from mrflow import flow
from mrflow._checks import Bound, Checked, check_number, check_whole, is_number, require
from mrflow.backbone import Backbone, Condition, FieldOptions
from mrflow.display.notes import note
from mrflow.errors import PlanError
from mrflow.flow import Velocity
from mrflow.machine.failures import is_out_of_memory
from mrflow.model_info import Capabilities, ModelInfo
from mrflow.protocols.tokens import CombinedField, TokenVelocity, on_tokens

MAX_SCALE = 1000.0  # beyond, float32 keeps less than five digits of a velocity, float16 none


def check_scale(name: str, value: object) -> None:
    """Refuse a scale of guidance that is no finite number from 0 to `MAX_SCALE`.

    Raises:
        PlanError: naming it.
    """
    check_number(name, value, 0)
    require(is_number(value, 0, MAX_SCALE), name, f"at most {MAX_SCALE:g}", value)


Scale = Annotated[float, Bound(check_scale)]


class Guidance(Checked, ABC):
    """A way to guide. Write your own: a frozen dataclass with `passes` and `field`."""

    @property
    @abstractmethod
    def passes(self) -> int:
        """The most passes of the network that one evaluation of the field takes; above 1 a negative is needed."""

    @abstractmethod
    def field(
        self, model: Backbone, cond: Condition, negative: Condition | None, options: FieldOptions = FieldOptions()
    ) -> Velocity:
        """A fresh guided velocity field for one integration; each field of `model` is asked for with `options`."""

    def evals(self, points: Sequence[float]) -> int:
        """Exact passes of the network for evaluations at these noise levels (a solver's `points`)."""
        return self.passes * len(points)

    def branches(self, points: Sequence[float]) -> tuple[tuple[float, ...], ...]:
        """The levels at which each field of a model is asked, of evaluations at these: what caches are planned by."""
        return (tuple(points),) * self.passes

    @property
    def needs(self) -> Capabilities:
        """What a model must be able to do for it."""
        return Capabilities()


@dataclass(frozen=True)
class Distilled(Guidance):
    """The conditional field alone; `value` goes to the model's guidance embedding (None: the model's own value)."""

    value: Annotated[float | None, Bound(check_scale, name="guidance")] = None

    @property
    def passes(self) -> int:
        return 1

    def field(
        self, model: Backbone, cond: Condition, negative: Condition | None, options: FieldOptions = FieldOptions()
    ) -> Velocity:
        if self.value is not None and model.info.guidance is None:
            raise PlanError(
                f"{model.info.name} has no guidance embedding, so Distilled({self.value:g}) would change nothing; "
                "use Distilled() or CFG(scale)"
            )
        return model.field(cond, replace(options, guidance=self.value))


Mix = Callable[[Tensor, float, Tensor, Tensor], Tensor]
"""(x, sigma, conditional velocity, unconditional velocity) -> the guided velocity."""


class TwoBranches(Guidance):
    """Guidance by the conditional and the unconditional velocity; at scale 1 the conditional alone, in one pass.

    Write your own: a frozen dataclass with `scale` and `packed` among its fields, and `mix`.
    """

    scale: Scale
    packed: bool

    @property
    def passes(self) -> int:
        return 1 if self.scale == 1.0 else 2

    @abstractmethod
    def mix(self, info: ModelInfo) -> Mix:
        """How both become one, for one integration; what it remembers dies with it."""

    def token_mix(self, info: ModelInfo, tokens: TokenVelocity) -> Mix | None:
        """`mix` of packed latents, to the bit. None where it cannot: sums over a picture are rounded by their order."""
        return None

    def field(
        self, model: Backbone, cond: Condition, negative: Condition | None, options: FieldOptions = FieldOptions()
    ) -> Velocity:
        if self.scale == 1.0:
            return model.field(cond, options)
        return _TwoBranchField(self, model, cond, _other(cond, negative, self), options)


class _TwoBranchField:
    """The mixture of both velocities: from one pass where the model can and memory allows, else from a field each."""

    def __init__(
        self, guidance: TwoBranches, model: Backbone, cond: Condition, other: Condition, options: FieldOptions
    ) -> None:
        self.guidance, self.model, self.conds, self.options = guidance, model, (cond, other), options
        packed = guidance.packed and model.info.capabilities.together and options.cache is None
        self.joint = model.field(cond, replace(options, beside=(other,))) if packed else None
        self.apart: tuple[Velocity, ...] = () if packed else self._apart()
        self.mixed = self._with(guidance.mix(model.info), self.joint, self.apart, lambda field: field)

    def __call__(self, x: Tensor, sigma: float) -> Tensor:
        """Velocities of latents (b, c, height, width)."""
        return self.mixed(x, sigma)

    def on_tokens(self, height: int, width: int) -> TokenVelocity | None:
        """As `TokenField`."""
        fields: tuple[Velocity, ...] = self.apart if self.joint is None else (self.joint,)
        found = [tokens for field in fields if (tokens := on_tokens(field, height, width)) is not None]
        if len(found) < len(fields) or (mix := self.guidance.token_mix(self.model.info, found[0])) is None:
            return None

        def view(field: Velocity) -> Velocity:
            tokens = on_tokens(field, height, width)
            return found[0].around(field) if tokens is None else tokens.ask

        asks = tuple(tokens.ask for tokens in found)
        joint, apart = (None, asks) if self.joint is None else (asks[0], ())
        return replace(found[0], ask=self._with(mix, joint, apart, view))

    def _with(
        self, mix: Mix, joint: Velocity | None, both: Sequence[Velocity], view: Callable[[Velocity], Velocity]
    ) -> Velocity:
        """`mix` of both velocities, of one pass or of a field each; `view` is how fields are asked that come later."""
        apart = list(both)

        def velocity(x: Tensor, sigma: float) -> Tensor:
            if joint is not None and not apart:
                try:
                    both = joint(x, sigma).chunk(2)
                except (MemoryError, RuntimeError) as error:
                    if not is_out_of_memory(error):
                        raise
                else:
                    return mix(x, sigma, *both)
                note("both branches of the guidance do not fit into memory at once; they take turns from here on")
            if not apart:
                apart.extend(view(field) for field in self._apart())
            return mix(x, sigma, *(field(x, sigma) for field in apart))

        return velocity

    def _apart(self) -> tuple[Velocity, ...]:
        return tuple(self.model.field(cond, self.options) for cond in self.conds)


@dataclass(frozen=True)
class CFG(TwoBranches):
    """Classifier-free guidance u + scale (c - u) (Ho & Salimans 2022, arXiv 2207.12598); at scale 1, c in one pass.

    `rescale` is Qwen-Image's: m ||c|| / ||m|| with m = u + scale (c - u), norms over each token's latent cells (patch x
    patch of all channels), as in diffusers `QwenImagePipeline`, without an epsilon. `packed`: both branches in one pass
    over the network, where the model can; two passes when memory runs out.
    """

    scale: Scale
    rescale: bool = field(default=False, kw_only=True)
    packed: bool = field(default=True, kw_only=True)

    def mix(self, info: ModelInfo) -> Mix:
        """The formula above."""
        patch = info.space.patch

        def mixed(x: Tensor, sigma: float, c: Tensor, u: Tensor) -> Tensor:
            m = torch.lerp(u, c, self.scale)
            if not self.rescale:
                return m
            ratio = token_norm(c, patch) / token_norm(m, patch)
            return m * repeat(ratio, "b 1 h w -> b 1 (h p) (w q)", p=patch, q=patch)

        return mixed

    def token_mix(self, info: ModelInfo, tokens: TokenVelocity) -> Mix | None:
        """The formula above; norms are of the same tokens, and add their values in the order of `token_norm`."""
        patch = info.space.patch
        if self.rescale and tokens.patch != patch:
            return None

        def length(v: Tensor) -> Tensor:
            if tokens.channels_last:
                v = rearrange(v, "b n (p q c) -> b n (c p q)", p=patch, q=patch)
            return v.square().sum(-1, keepdim=True).sqrt()

        def mixed(x: Tensor, sigma: float, c: Tensor, u: Tensor) -> Tensor:
            m = torch.lerp(u, c, self.scale)
            if not self.rescale:
                return m
            return m * (length(c) / length(m))

        return mixed


@dataclass(frozen=True)
class APG(TwoBranches):
    """Adaptive projected guidance (Sadat et al. 2024, arXiv 2410.02416, alg. 1), on clean estimates D = x - sigma v.

    D = D_c + (scale - 1) (orthogonal + eta parallel), the parts of d = D_c - D_u across and along D_c, whose norms are
    those of whole pictures. `momentum` comes first: d is d + momentum times that sum of the evaluation before. Then
    `threshold` shortens d to that norm (None: it does not; norms grow with the picture, the paper takes 15 for SDXL).
    The defaults are the paper's; momentum 0, eta 1 and no threshold are `CFG(scale)`.
    """

    scale: Scale
    momentum: Annotated[float, Bound(check_number, -1.0, 1.0)] = field(default=-0.5, kw_only=True)
    eta: Annotated[float, Bound(check_number, 0.0, 10.0)] = field(default=0.0, kw_only=True)
    threshold: Annotated[float | None, Bound(check_number, 0.0)] = field(default=None, kw_only=True)
    packed: bool = field(default=True, kw_only=True)

    def mix(self, info: ModelInfo) -> Mix:
        """The formula above; the momentum is this integration's."""
        before: list[Tensor] = []

        def mixed(x: Tensor, sigma: float, c: Tensor, u: Tensor) -> Tensor:
            d = sigma * (u - c)  # D_c - D_u
            if self.momentum:
                d = torch.add(d, before.pop(), alpha=self.momentum) if before else d
                before.append(d)
            if self.threshold is not None:
                d = d * (self.threshold / _inner(d, d).sqrt()).clamp(max=1.0)
            clean = flow.denoised(x, c, sigma)
            along = _inner(d, clean) / _inner(clean, clean).clamp(min=torch.finfo(d.dtype).tiny) * clean
            return torch.add(c, d + (self.eta - 1.0) * along, alpha=-(self.scale - 1.0) / sigma)

        return mixed


@dataclass(frozen=True)
class CFGZero(TwoBranches):
    """CFG-Zero* (Fan et al. 2025, arXiv 2503.18886): s u + scale (c - s u), s = <c, u> / ||u||^2 of each picture.

    The paper's optimised scale s corrects the length of u. Its zero-init leaves the state as it is in the first `zero`
    evaluations of an integration from sigma 1, which take no pass. `star=False` is s = 1; with zero=0 that is
    `CFG(scale)`.
    """

    scale: Scale
    zero: Annotated[int, Bound(check_whole, 0, 1000)] = field(default=1, kw_only=True)
    star: bool = field(default=True, kw_only=True)
    packed: bool = field(default=True, kw_only=True)

    def mix(self, info: ModelInfo) -> Mix:
        """The formula above, without the zeros."""

        def mixed(x: Tensor, sigma: float, c: Tensor, u: Tensor) -> Tensor:
            if self.star:
                u = _inner(c, u) / _inner(u, u).clamp(min=torch.finfo(u.dtype).tiny) * u
            return torch.lerp(u, c, self.scale)

        return mixed

    def field(
        self, model: Backbone, cond: Condition, negative: Condition | None, options: FieldOptions = FieldOptions()
    ) -> Velocity:
        inner, seen = super().field(model, cond, negative, options), list[float]()

        def guided(x: Tensor, sigma: float) -> Tensor:
            seen.append(sigma)
            return torch.zeros_like(x) if len(seen) <= self._zeros(seen) else inner(x, sigma)

        return guided

    def evals(self, points: Sequence[float]) -> int:
        return self.passes * len(points[self._zeros(points) :])

    def branches(self, points: Sequence[float]) -> tuple[tuple[float, ...], ...]:
        return (tuple(points[self._zeros(points) :]),) * self.passes

    def _zeros(self, points: Sequence[float]) -> int:
        return self.zero if points and points[0] == 1.0 else 0


@dataclass(frozen=True)
class TCFG(TwoBranches):
    """Tangential damping (Kwon et al. 2025, arXiv 2503.18137): u without what both branches do not share.

    u' + scale (c - u') with u' = u + damping (p - u), p the projection of u on the first right singular vector of the
    matrix of rows c and u, for each picture. The paper's damping is 1; 0 is `CFG(scale)`.
    """

    scale: Scale
    damping: Annotated[float, Bound(check_number, 0.0, 1.0)] = field(default=1.0, kw_only=True)
    packed: bool = field(default=True, kw_only=True)

    def mix(self, info: ModelInfo) -> Mix:
        """The formula above; the vector is c and u weighted by the first eigenvector of their inner products."""

        def mixed(x: Tensor, sigma: float, c: Tensor, u: Tensor) -> Tensor:
            if self.damping:
                rows = torch.stack([c, u], 1).flatten(2)
                first = torch.linalg.eigh(rows @ rows.mT).eigenvectors[..., -1]
                shared = (first[:, :, None] * rows).sum(1).view_as(u)
                p = _inner(u, shared) / _inner(shared, shared).clamp(min=torch.finfo(u.dtype).tiny) * shared
                u = torch.lerp(u, p, self.damping)
            return torch.lerp(u, c, self.scale)

        return mixed


def _inner(a: Tensor, b: Tensor) -> Tensor:
    """The inner product of each picture, (batch, 1, 1, 1)."""
    return (a * b).flatten(1).sum(1)[:, None, None, None]


@dataclass(frozen=True)
class NAG(Guidance):
    """Normalised attention guidance (Chen et al. 2025, arXiv 2505.21179), for models without a second branch.

    One image, a text stream for the prompt and one for the negative. In every attention an image token has z under the
    one and z' under the other, over all heads, and goes on with alpha n + (1 - alpha) z (eq. 10), where
    e = z + (scale - 1) (z - z') and n = min(r, tau) / r e with r = |e|_1 / |z|_1 (eqs. 8 and 9). `scale` is 1 plus the
    paper's phi; at 1 it is the prompt's field, in one pass. An evaluation costs two passes. `tau` and `alpha` are the
    published code's for FLUX. The distilled guidance of a model stays as it is; caches cannot be beside it.
    """

    scale: Scale
    tau: Annotated[float, Bound(check_number, 1.0, 1000.0)] = field(default=2.5, kw_only=True)
    alpha: Annotated[float, Bound(check_number, 0.0, 1.0)] = field(default=0.25, kw_only=True)

    @property
    def passes(self) -> int:
        return 1 if self.scale == 1.0 else 2

    @property
    def needs(self) -> Capabilities:
        return Capabilities(attention=self.scale != 1.0)

    def mix(self, z: Tensor, other: Tensor) -> Tensor:
        """The formula above for outputs (b, heads, n, channels), in float32, given back in their dtype."""
        one = z.float()
        e = torch.lerp(other.float(), one, self.scale)
        r = _length(e) / _length(one).clamp(min=torch.finfo(torch.float32).tiny)
        return torch.lerp(one, e * (self.tau / r).clamp(max=1.0), self.alpha).to(z.dtype)

    def field(
        self, model: Backbone, cond: Condition, negative: Condition | None, options: FieldOptions = FieldOptions()
    ) -> Velocity:
        if self.scale == 1.0:
            return model.field(cond, options)
        both = model.field(cond, replace(options, beside=(_other(cond, negative, self),), attention=self.mix))
        return CombinedField(_first_half, (both,))


def _first_half(both: Velocity) -> Velocity:
    """A field over twice the batch as one of its first half."""
    return lambda x, sigma: both(x, sigma)[: len(x)]


def _length(z: Tensor) -> Tensor:
    """The L1 norm of each token over all heads: (b, 1, n, 1)."""
    return z.abs().sum((1, 3), keepdim=True)


@dataclass(frozen=True)
class Interval(Guidance):
    """`inner` where low < sigma <= high, the conditional alone elsewhere (Kynkäänniemi et al., arXiv 2404.07724)."""

    inner: Guidance
    low: float
    high: float

    def __post_init__(self) -> None:
        for name, value in (("low", self.low), ("high", self.high)):
            check_number(name, value)
        if not 0.0 <= self.low < self.high <= 1.0:
            raise PlanError(f"an interval must lie in 0 <= low < high <= 1, got low {self.low!r}, high {self.high!r}")

    @property
    def passes(self) -> int:
        return self.inner.passes

    @property
    def needs(self) -> Capabilities:
        return self.inner.needs

    def field(
        self, model: Backbone, cond: Condition, negative: Condition | None, options: FieldOptions = FieldOptions()
    ) -> Velocity:
        inside, outside = self.inner.field(model, cond, negative, options), model.field(cond, options)

        def combine(inside: Velocity, outside: Velocity) -> Velocity:
            return lambda x, sigma: inside(x, sigma) if self._holds(sigma) else outside(x, sigma)

        return CombinedField(combine, (inside, outside))

    def evals(self, points: Sequence[float]) -> int:
        inside = [sigma for sigma in points if self._holds(sigma)]
        return self.inner.evals(inside) + len(points) - len(inside)

    def branches(self, points: Sequence[float]) -> tuple[tuple[float, ...], ...]:
        inside = tuple(sigma for sigma in points if self._holds(sigma))
        return (*self.inner.branches(inside), tuple(sigma for sigma in points if not self._holds(sigma)))

    def _holds(self, sigma: float) -> bool:
        return self.low < sigma <= self.high


def token_norm(v: Tensor, patch: int) -> Tensor:
    """The Euclidean norm of every token of (batch, channels, height, width), as (batch, 1, rows, columns)."""
    return rearrange(v, "b c (h p) (w q) -> b 1 h w (c p q)", p=patch, q=patch).square().sum(-1).sqrt()


def _other(cond: Condition, negative: Condition | None, guidance: Guidance) -> Condition:
    """The negative, an item for each of the condition's."""
    if negative is None:
        raise PlanError(f"{guidance!r} needs a negative; encode one (the empty prompt will do), or use scale 1")
    return negative.repeat(cond.batch)


def own_guidance(model: ModelInfo) -> Guidance:
    """What a stage with `guidance=None` uses: the guidance that the model is published with."""
    if model.cfg == 1.0:
        return Distilled()
    return CFG(model.cfg, rescale=model.rescale)

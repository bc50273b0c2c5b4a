"""The laws of caches, of what they decide and of what a small transformer gives with them."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from mrflow.caches import Cache, Evaluation
from mrflow.display.notes import Tally, tally_work
from mrflow.flow import Velocity
from mrflow.model_info import FLUX, Architecture, ModelInfo
from mrflow.models.block_runner import BlockRunner
from mrflow.models.fields import step
from mrflow.models.flux.field import FluxField
from mrflow.models.flux.transformer import Flux, FluxParams
from mrflow.models.layers import Merge
from mrflow.protocols.pieces import Pieces, StepFactory
from mrflow.testing.laws import Laws, demand
from mrflow.testing.of_slots import ALONE, POINTS

SIZES = FluxParams(
    context=8, pooled=8, hidden=32, heads=2, axes=(4, 6, 6), double_blocks=3, single_blocks=3, guidance=False
)


CACHE_LAWS = Laws("cache", "the contract of `mrflow.caches.Cache`")


def check_cache(cache: Cache, *, info: ModelInfo = FLUX) -> None:
    """Hold a cache to the laws of caches in `LAWS`: its rule, span and forecast for a model with these facts.

    Then what it does with a small random transformer of FLUX's architecture, of six blocks, along five sigmas.

    Raises:
        LawBroken: naming the law. PlanError: the cache refuses the model.
    """
    cache.check(info)
    CACHE_LAWS.hold(cache, info=info)


def _rule(cache: Cache, info: ModelInfo) -> list[bool] | None:
    """What a fresh rule decides along `POINTS` without a picture; None where it must see one."""
    forecast = cache.forecast(info, POINTS, POINTS)
    if not forecast.exact:
        return None
    rule = cache.rule(info, POINTS)
    return [bool(rule(Evaluation(i, i, len(POINTS), sigma))) for i, sigma in enumerate(POINTS)]


@CACHE_LAWS.law("fresh rule", "rule() = rule()")
def _fresh_rule(cache: Cache, info: ModelInfo) -> None:
    """Each picture, branch and integration has a rule of its own."""
    one = _rule(cache, info)
    demand(one == _rule(cache, info), "a second rule decides differently; what it remembers must lie in the rule")


@CACHE_LAWS.law("span", "0 <= start <= stop <= n")
def _span(cache: Cache, info: ModelInfo) -> None:
    """It leaves out blocks that there are."""
    a = info.architecture
    blocks = a.double_blocks + a.single_blocks if a else 57
    start, stop = cache.span(blocks)
    demand(0 <= start <= stop <= blocks, f"its span of {blocks} blocks is from {start} to {stop}")


@CACHE_LAWS.law("forecast", "1 <= computed <= asked, share > 0")
def _forecast(cache: Cache, info: ModelInfo) -> None:
    """It computes what its forecast says, at least once, for a cost above 0."""
    f = cache.forecast(info, POINTS, POINTS)
    demand(f.asked == len(POINTS) and 1 <= f.computed <= f.asked, f"it forecasts {f.computed} of {f.asked} evaluations")
    decided = _rule(cache, info)
    if decided is not None:
        computed = sum(decided) + (not decided[0])
        demand(f.computed == computed, f"it forecasts {f.computed} evaluations, and its rule computes {computed}")
    share = cache.share(info, 256)
    demand(0 < share <= 1.5, f"a computed evaluation costs {share:g} of a whole one")


class _Counted(BlockRunner):
    """Pieces that count the blocks they run, times pictures."""

    blocks = 0

    def run(
        self, img: Tensor, txt: Tensor, cos: Tensor, sin: Tensor, table: Tensor, start: int, stop: int
    ) -> tuple[Tensor, Tensor]:
        """Both streams after the blocks from `start` to before `stop`."""
        self.blocks += len(img) * max(0, stop - start)
        return super().run(img, txt, cos, sin, table, start, stop)

    def merged(
        self,
        img: Tensor,
        txt: Tensor,
        cos: Tensor,
        sin: Tensor,
        table: Tensor,
        merge: Callable[[str, int], Merge | None],
    ) -> tuple[Tensor, Tensor]:
        """Both streams after all blocks, merged."""
        self.blocks += len(img) * self.count
        return super().merged(img, txt, cos, sin, table, merge)


@dataclass(frozen=True)
class _Look:
    """One evaluation: where, what came out, the blocks that were run, and what the cache counted."""

    x: Tensor
    sigma: float
    v: Tensor
    blocks: int
    tally: Tally


class _Network:
    """A small random transformer, two pictures that are not square, and a model's facts with its sizes."""

    def __init__(self, info: ModelInfo) -> None:
        g = torch.Generator().manual_seed(0)
        self.net = Flux(SIZES).eval().requires_grad_(requires_grad=False)
        for weight in self.net.parameters():
            scale = weight[0].numel() ** -0.5 if weight.ndim > 1 else 0.3
            weight.copy_(scale * torch.randn(weight.shape, generator=g))
        self.text, self.pooled = torch.randn(2, 3, 8, generator=g), torch.randn(2, 8, generator=g)
        self.x = torch.randn(2, 16, 8, 12, generator=g)
        own = Architecture(SIZES.hidden, SIZES.double_blocks, SIZES.single_blocks, 8, 3, 0)
        self.info = replace(info, architecture=own)

    def field(self, step_of: StepFactory, pieces: Pieces, items: slice) -> Velocity:
        """The network's velocity, with the step that is made of its pieces."""
        return FluxField(self.net, self.text[items], self.pooled[items], None, sigmas=POINTS, step=step_of(pieces))

    def bare(self, look: _Look, items: slice) -> Tensor:
        """Without a cache, where an evaluation was."""
        pieces = BlockRunner(self.net)
        with torch.inference_mode():
            return self.field(lambda _: partial(step, self.net), pieces, items)(look.x, look.sigma)

    def looks(self, cache: Cache, x: Tensor, items: slice = slice(None)) -> list[_Look]:
        """An integration in Euler steps from x with a cache."""
        pieces, x, out = _Counted(self.net), x[items], list[_Look]()
        field = cache.field(lambda factory: self.field(factory, pieces, items), POINTS, self.info)
        with torch.inference_mode():
            for sigma, to in zip(POINTS, (*POINTS[1:], 0.0), strict=True):
                before = pieces.blocks
                with tally_work() as tally:
                    v = field(x, sigma)
                out.append(_Look(x, sigma, v, pieces.blocks - before, tally))
                x = x + (to - sigma) * v
        return out


ONE = slice(0, 1)
BLOCKS = SIZES.double_blocks + SIZES.single_blocks


@CACHE_LAWS.law("computed", "blocks run = all, share = 1 => v = v_network")
def _computed(cache: Cache, info: ModelInfo) -> None:
    """What is computed is the network's own, to the bit; a threshold of 0 leaves nothing out."""
    n = _Network(info)
    for what in (cache, *_never(cache)):
        whole = what.share(n.info, 24) == 1.0
        for look in n.looks(what, n.x, ONE):
            demand(look.blocks == BLOCKS or what is cache, f"{what!r} has threshold 0 and leaves out blocks")
            if look.blocks == BLOCKS and whole and not torch.equal(look.v, n.bare(look, ONE)):
                error = float((look.v - n.bare(look, ONE)).abs().max())
                demand(
                    kept=False, text=f"{what!r} computes all blocks at sigma {look.sigma:g} and is off by {error:.2g}"
                )


def _never(cache: Cache) -> list[Cache]:
    """The cache with a threshold of 0, where it has one and another."""
    fields = [field.name for field in dataclasses.fields(cache)] if dataclasses.is_dataclass(cache) else list[str]()
    if "threshold" not in fields or getattr(cache, "threshold") == 0:  # noqa: B009  (not every cache has it)
        return []
    return [replace(cache, threshold=0.0)]  # type: ignore[type-var]


@CACHE_LAWS.law("fresh memory", "field() = field()")
def _fresh_memory(cache: Cache, info: ModelInfo) -> None:
    """Each integration has a memory of its own."""
    n = _Network(info)
    one = n.looks(cache, n.x, ONE)
    n.looks(cache, -n.x, ONE)
    again = [n.looks(cache, n.x, ONE) for _ in range(2)]
    same = all(torch.equal(a.v, b.v) for more in again for a, b in zip(one, more, strict=True))
    demand(same, "a second integration gives something else; what it remembers must lie in the step that it opens")


@CACHE_LAWS.law(
    "counted", "blocks run / blocks = computed + kept (asked - computed)", "what `plan` counts: `mrflow.Plan.nfe`"
)
def _counted(cache: Cache, info: ModelInfo) -> None:
    """The network does the work that is forecast, and what is counted was computed."""
    n = _Network(info)
    looks, f = n.looks(cache, n.x, ONE), cache.forecast(n.info, POINTS, POINTS)
    made = sum(look.blocks for look in looks) / BLOCKS
    said = f.computed + f.kept * (f.asked - f.computed)
    if f.exact:
        demand(abs(made - said) < 1e-9, f"the work of {made:g} whole evaluations is done, and {said:g} are forecast")
    asked, computed = (sum(getattr(look.tally, name) for look in looks) for name in ("asked", "computed"))
    whole = sum(look.blocks == BLOCKS for look in looks)
    text = f"{whole} of {len(POINTS)} evaluations are computed, and it counts {computed} of {asked}"
    demand((asked, computed) == (len(POINTS), whole), text)


@CACHE_LAWS.law("items", "v(x)_i = v(x_i)", ALONE)
def _cache_items(cache: Cache, info: ModelInfo) -> None:
    """Each picture of a batch decides for itself."""
    n = _Network(info)
    both = n.looks(cache, n.x)
    for i in range(2):
        for a, b in zip(n.looks(cache, n.x, slice(i, i + 1)), both, strict=True):
            error = float((a.v - b.v[i : i + 1]).abs().max() / b.v.abs().max())
            demand(error < 1e-3, f"picture {i} alone differs from picture {i} of a batch by {error:.2g} of the largest")

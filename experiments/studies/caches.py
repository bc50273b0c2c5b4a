"""What do caches save in native sampling, how near do they stay, and does each beat fewer steps?

Of 50 steps and of 12. PSNR is to the picture of 50 steps without a cache, of the same caption and noise. A cache earns
its place where it is nearer than fewer steps at the same forwards. `L2P`, fitted to prompts first, is in the figure
of all methods at equal speeds, `make figure`.
"""

from experiments.studies.common import METRICS, MODEL, captions, native
from mrflow.caches import DMD, Cache, DBCache, MagCache, SeaCache, Spectrum, TaylorSeer, TeaCache
from mrflow.sweep import Psnr, Sweep

OF_50: tuple[Cache, ...] = (
    TeaCache(0.1),
    TeaCache(0.25),
    MagCache(0.06),
    SeaCache(0.15),
    SeaCache(0.3),
    TaylorSeer(3),
    TaylorSeer(6),
    TaylorSeer(6, order=0),
    Spectrum(),
    Spectrum(mix=0.5),
    DBCache(1.0, front=1, warmup=4, limit=2, order=1),
    DBCache(1.0, front=1, warmup=4, limit=5, order=1),
    DMD(1.0, front=1, warmup=4, limit=2),
    DMD(1.0, front=1, warmup=4, limit=5),
)
OF_12: tuple[Cache, ...] = (
    TeaCache(0.1),
    MagCache(0.15),
    SeaCache(0.15),
    TaylorSeer(2),
    TaylorSeer(2, order=0),
    TaylorSeer(2, of="velocity"),
    Spectrum(warmup=4),
    DBCache(0.2, front=1, warmup=2),
)
chains = {
    "native 50": native(50),
    **{f"50: {cache!r}": native(50, cache=cache) for cache in OF_50},
    **{f"12: {cache!r}": native(12, cache=cache) for cache in OF_12},
    **{f"native {steps}": native(steps) for steps in (24, 18, 14, 12, 10, 8, 6)},
}
METRICS = (*METRICS, Psnr())
sweep = Sweep(chains, captions(), model=MODEL, metrics=METRICS, seeds=(0,))

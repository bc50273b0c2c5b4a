"""Do native and staged pictures of one seed share their composition when their noise is nested?

With noise of its own, the low-resolution stage draws another picture than native sampling of that seed. `Nested` begins
it with the block means of the native noise instead. PSNR, SSIM and the coarse spectrum to the native picture of the
same seed say how far the pictures agree.
"""

from dataclasses import dataclass, replace

from torch import Tensor

import mrflow as mf
from experiments.studies.common import METRICS, MODEL, captions, native, paper
from mrflow.sweep import Psnr, Ssim, Sweep


@dataclass(frozen=True)
class Another(mf.Stage[mf.Pixels, mf.Pixels]):
    """The native picture of another seed instead: what two pictures of one caption have in common."""

    def plan(self, spec: mf.Pixels, model: mf.ModelInfo) -> mf.Pixels:
        """The same size."""
        return spec

    def apply(self, state: mf.State[mf.Pixels], out: mf.Pixels, ctx: mf.Context) -> Tensor:
        """Native sampling of this prompt with other noise."""
        other = native(50)
        seeds = tuple(seed + 1000 for seed in ctx.seeds)
        start = mf.State(mf.Start(len(seeds)), state.data.new_empty(len(seeds), 0))
        return replace(ctx, seeds=seeds).through(other, start).data


chains = {
    "native 50": native(50),
    "own noise": paper(12),
    "nested noise": paper(12, noise=mf.Nested(2)),
    "another seed": native(50) >> Another(),
}
METRICS = (*METRICS, Psnr(), Ssim())
sweep = Sweep(chains, captions(), model=MODEL, metrics=METRICS, seeds=(0,))

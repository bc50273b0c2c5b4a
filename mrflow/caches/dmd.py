"""DMD: what the middle blocks add is forecast as a sum of exponentials, by dynamic mode decomposition."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from mrflow._checks import check_whole, is_number, require
from mrflow.caches.dbcache import DualBlock
from mrflow.caches.extrapolate import Gram, lagrange_weights

LEAST = 4  # snapshots: a pair of complex exponentials takes three pairs of neighbours (cache-dit#1053)


@dataclass(frozen=True)
class DMD(DualBlock):
    """DBCache with the forecast of cache-dit's DMD calibrator (cache-dit#1053); no relation to distribution matching.

    The newest computed features at equal distances, at most `history` of them, are taken as states of a linear system,
    x_{n+1} = A x_n. Its modes and their factors l per distance are found by exact dynamic mode decomposition (Schmid,
    J. Fluid Mech. 656 (2010), 5; Tu et al., arXiv 1312.0041, algorithm 2), where singular values below `tolerance`
    times the largest are left out. A distance k later, which need not be whole, the feature is sum_i b_i l_i^k phi_i:
    exact for sums of fewer than `history` exponentials. With fewer than four features at equal distances it is a
    straight line through the newest two.

    The published ridge of 1e-8 on singular values is left out: it means something else for every scale of features.
    `DMD(1.0, warmup=4, limit=3)` computes every fourth evaluation, whatever the picture. The other fields are those of
    `DBCache`. The memory holds `history` features a branch.
    """

    history: int = field(default=6, kw_only=True)
    tolerance: float = field(default=1e-4, kw_only=True)

    def extrapolation(self) -> "Modes":
        """Of what the blocks between added."""
        return Modes(self.history, self.tolerance)


@dataclass(frozen=True)
class Modes:
    """Weights of the features in the forecast that the modes of the features themselves make."""

    keep: int
    tolerance: float

    def __post_init__(self) -> None:
        check_whole("history", self.keep, LEAST)
        require(is_number(self.tolerance) and 0 < self.tolerance < 1, "tolerance", "between 0 and 1", self.tolerance)

    def weights(self, steps: Sequence[int], at: int, *, total: int = 0, gram: Gram | None = None) -> tuple[float, ...]:
        """Of the features at equal distances; a straight line where they are too few, the newest where it diverges."""
        gap = steps[-1] - steps[-2] if len(steps) > 1 else 0
        even = 1
        while even < len(steps) and steps[-even] - steps[-even - 1] == gap:
            even += 1
        if gram is None or even < LEAST:
            newest = lagrange_weights(steps[-2:], at)
        else:
            found = modes(gram()[-even:, -even:], (at - steps[-1]) / gap, self.tolerance)
            newest = tuple(map(float, found)) if np.isfinite(found).all() else (1.0,)
        return (*[0.0] * (len(steps) - len(newest)), *newest)


def modes(gram: NDArray[np.float64], ahead: float, tolerance: float) -> NDArray[np.float64]:
    """Weights (n,) of n snapshots at equal distances in their forecast `ahead` distances after the newest.

    `gram`: their inner products (n, n). They fix the snapshots up to a rotation, under which the method is the same;
    so everything below is small matrices, whose columns are the snapshots in an orthonormal frame of their span.
    """
    values, frame = np.linalg.eigh(gram)
    states = np.sqrt(values.clip(min=0))[:, None] * frame.T
    u, s, vh = np.linalg.svd(states[:, :-1], full_matrices=False)
    rank = int((s > tolerance * s[0]).sum())
    if rank == 0:  # nothing but zeros
        return np.array([*[0.0] * (len(gram) - 1), 1.0])
    back = vh[:rank].T / s[:rank]  # (n - 1, rank)
    factors, vectors = np.linalg.eig(u[:, :rank].T @ states[:, 1:] @ back)
    mixed = np.concatenate((np.zeros((1, rank)), back @ vectors))  # (n, rank): each mode as a sum of snapshots
    amplitudes = np.linalg.lstsq(states @ mixed, states[:, -1].astype(complex), rcond=None)[0]
    with np.errstate(over="ignore", invalid="ignore"):  # a mode that diverges is seen by the caller
        found: NDArray[np.float64] = (mixed @ (factors.astype(complex) ** ahead * amplitudes)).real
    return found

"""Muon for many small matrices: those of one shape are orthogonalised together in one batch.

Momentum, then the Newton-Schulz iteration of Jordan et al. 2024 (https://kellerjordan.github.io/posts/muon/), scaled to
AdamW's update size by 0.2 sqrt(max(rows, columns)) (Liu et al. 2025, arXiv 2502.16982). torch.optim.Muon iterates in
bfloat16, one matrix at a time; here float32 is the default, for processors without it.
"""

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor

A, B, C = 3.4445, -4.7750, 2.0315


def orthogonalised(g: Tensor, *, steps: int = 5, dtype: torch.dtype = torch.float32) -> Tensor:
    """The nearest semi-orthogonal matrices, roughly: (n, rows, columns), iterated in `dtype`, given in that of `g`."""
    x: Tensor = g.transpose(1, 2) if g.shape[1] > g.shape[2] else g
    x = (x / (x.flatten(1).norm(dim=1)[:, None, None] + 1e-7)).to(dtype)
    for _ in range(steps):
        xx = x @ x.transpose(1, 2)
        x = A * x + (B * xx + C * xx @ xx) @ x
    return (x.transpose(1, 2) if g.shape[1] > g.shape[2] else x).to(g.dtype)


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov momentum and decoupled weight decay; `dtype` is that of the iteration."""

    def __init__(
        self,
        params: Iterable[Tensor],
        *,
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.01,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.dtype = dtype
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every matrix."""
        for group in self.param_groups:
            shapes: dict[torch.Size, list[Tensor]] = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    shapes[p.shape].append(p)
            for shape, params in shapes.items():
                updates: list[Tensor] = []
                for p in params:
                    assert p.grad is not None
                    buffer = self.state[p].setdefault("momentum", torch.zeros_like(p))
                    buffer.lerp_(p.grad, 1 - group["momentum"])
                    updates.append(p.grad.lerp(buffer, group["momentum"]))
                scale = 0.2 * max(shape) ** 0.5 * group["lr"]
                for p, update in zip(params, orthogonalised(torch.stack(updates), dtype=self.dtype), strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update, alpha=scale)

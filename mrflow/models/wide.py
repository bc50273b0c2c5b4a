"""bfloat16 weights on processors that have no bfloat16 instructions: everything between them is float32."""

import threading
from typing import cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from mrflow.cost import WIDE_BLOCK, WIDE_ROWS
from mrflow.machine import hardware
from mrflow.models.blocks import Transformer

BLOCK, ROWS = WIDE_BLOCK, WIDE_ROWS
FEW = 4  # rows of bfloat16 up to which the product waits for the weights, of which float32 is twice as much to read
_kept = threading.local()


class WideLinear(nn.Linear):
    """A linear whose inputs and weights are made float32 for the product, a block of rows at a time.

    The result is rounded to the dtype of the input, once: no less exact than a product in bfloat16. A few vectors that
    are bfloat16 themselves, as modulations start from, are multiplied as they lie, summed in float32.
    """

    def forward(self, input: Float[Tensor, "*b i"]) -> Float[Tensor, "*b o"]:
        """As `nn.Linear`."""
        weight, bias = self.weight, cast("Tensor | None", self.bias)
        if input.dtype == weight.dtype and input.numel() <= FEW * self.in_features:
            return F.linear(input, weight, bias)
        x, added = input.float(), None if bias is None else bias.float()
        if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
            return F.linear(x, weight.float(), added).to(input.dtype)
        rows = max(ROWS, BLOCK // self.in_features)
        if self.out_features <= rows:
            return F.linear(x, _float32(weight), added).to(input.dtype)
        flat, out = x.flatten(0, -2), x.new_empty((x.numel() // self.in_features, self.out_features))
        for at in range(0, self.out_features, rows):
            some, to = _float32(weight[at : at + rows]).t(), out[:, at : at + rows]
            if added is None:
                torch.mm(flat, some, out=to)
            else:
                torch.addmm(added[at : at + rows], flat, some, out=to)
        return out.view(*x.shape[:-1], -1).to(input.dtype)


def _float32(matrix: Float[Tensor, "o i"]) -> Float[Tensor, "o i"]:
    """Its values where the thread's last ones were: fresh pages for each product would cost more than the cast."""
    kept = cast("Tensor | None", getattr(_kept, "values", None))
    if kept is None or kept.numel() < matrix.numel() or kept.device != matrix.device:
        with torch.inference_mode(mode=False):  # or it could be written in this mode alone
            kept = _kept.values = torch.empty(matrix.numel(), device=matrix.device)
    return kept[: matrix.numel()].view(matrix.shape).copy_(matrix)


def widen(net: Transformer) -> None:
    """Have a bfloat16 network on a CPU work in float32 where its processor needs that; weights stay as they lie."""
    if hardware.has_bfloat16():
        return
    for module in net.modules():
        if type(module) is nn.Linear and module.weight.dtype == torch.bfloat16:
            module.__class__ = WideLinear
            net.wide = True


def widen_autoencoder(vae: nn.Module) -> None:
    """Make a bfloat16 autoencoder float32 where its processor needs that: it is small, and nearly all convolutions."""
    if not hardware.has_bfloat16() and any(p.dtype == torch.bfloat16 for p in vae.parameters()):
        vae.float()

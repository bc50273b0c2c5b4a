"""bfloat16 weights on processors that have no bfloat16 instructions: products are made in float32."""

from typing import cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

ROWS = 2048  # of a matrix that are float32 at a time


class WideLinear(nn.Linear):
    """A linear whose inputs and weights are made float32 for the product, a block of rows at a time.

    The result is rounded to the dtype of the input, once: no less exact than a product in bfloat16.
    """

    def forward(self, input: Float[Tensor, "*b i"]) -> Float[Tensor, "*b o"]:
        """As `nn.Linear`."""
        x = input.float()
        parts = self.weight.split(ROWS), self.bias.split(ROWS)
        blocks = [F.linear(x, w.float(), b.float()).to(input.dtype) for w, b in zip(*parts, strict=True)]
        return blocks[0] if len(blocks) == 1 else torch.cat(blocks, -1)


def has_bfloat16() -> bool:
    """Whether this processor's bfloat16 products are not emulated value by value."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def widened(net: nn.Module) -> None:
    """Have a network's bfloat16 linears on a CPU work in float32 where its processor needs that; weights stay."""
    if has_bfloat16():
        return
    for module in net.modules():
        if (
            type(module) is nn.Linear
            and cast(object, module.bias) is not None
            and module.weight.dtype == torch.bfloat16
        ):
            module.__class__ = WideLinear

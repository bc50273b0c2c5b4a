"""bfloat16 weights on processors that have no bfloat16 instructions: everything between them is float32."""

from typing import cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from mrflow.models.blocks import Transformer

ROWS = 2048  # of a matrix that are float32 at a time


class WideLinear(nn.Linear):
    """A linear whose inputs and weights are made float32 for the product, a block of rows at a time.

    The result is rounded to the dtype of the input, once: no less exact than a product in bfloat16.
    """

    def forward(self, input: Float[Tensor, "*b i"]) -> Float[Tensor, "*b o"]:
        """As `nn.Linear`."""
        x, bias, blocks = input.float(), cast("Tensor | None", self.bias), list[Tensor]()
        for at in range(0, self.out_features, ROWS):
            some = slice(at, at + ROWS)
            added = None if bias is None else bias[some].float()
            blocks.append(F.linear(x, self.weight[some].float(), added).to(input.dtype))
        return blocks[0] if len(blocks) == 1 else torch.cat(blocks, -1)


def has_bfloat16() -> bool:
    """Whether this processor's bfloat16 products are not emulated value by value."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def widen(net: Transformer) -> None:
    """Have a bfloat16 network on a CPU work in float32 where its processor needs that; weights stay as they lie."""
    if has_bfloat16():
        return
    for module in net.modules():
        if type(module) is nn.Linear and module.weight.dtype == torch.bfloat16:
            module.__class__ = WideLinear
            net.wide = True

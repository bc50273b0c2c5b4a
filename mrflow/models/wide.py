"""bfloat16 weights on processors that have no bfloat16 instructions: products are made in float32."""

from typing import cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from mrflow.models.blocks import Transformer
from mrflow.models.layers import attention

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


def wide_attention(
    q: Float[Tensor, "b h n d"], k: Float[Tensor, "b h m d"], v: Float[Tensor, "b h m d"]
) -> Float[Tensor, "b h n d"]:
    """Attention whose products are float32, rounded to the dtype of `q` once."""
    return attention(q.float(), k.float(), v.float()).to(q.dtype)


def has_bfloat16() -> bool:
    """Whether this processor's bfloat16 products are not emulated value by value."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def widened(net: Transformer) -> None:
    """Have bfloat16 linears and attention on a CPU work in float32 where its processor needs that; weights stay."""
    if has_bfloat16():
        return
    if net.dtype == torch.bfloat16 and net.attention is attention:
        net.attention = wide_attention
    for module in net.modules():
        if (
            type(module) is nn.Linear
            and cast(object, module.bias) is not None
            and module.weight.dtype == torch.bfloat16
        ):
            module.__class__ = WideLinear

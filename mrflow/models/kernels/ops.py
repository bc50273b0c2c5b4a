"""The kernels as torch operators, with what they give on the meta device: tracing and counting need no GPU."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.library import custom_op

from mrflow.models.kl import ChannelNorm, norm_silu
from mrflow.models.layers import EPS, PLAIN, QKV, Ops, Rope


def _kernels() -> Any:  # noqa: ANN401
    from mrflow.models.kernels import triton_code  # triton is only where torch for a GPU is

    return triton_code


@custom_op("mrflow::norm", mutates_args=())
def _norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """`layers.modulated`."""
    return _kernels().norm(x, shift, scale)


@_norm.register_fake
def _(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@custom_op("mrflow::gated", mutates_args=())
def _gated(x: Tensor, gate: Tensor, change: Tensor) -> Tensor:
    """`layers.gated`."""
    return _kernels().any_gated(x, gate, change, None, None)[0]


@_gated.register_fake
def _(x: Tensor, gate: Tensor, change: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@custom_op("mrflow::gated_norm", mutates_args=())
def _gated_norm(x: Tensor, gate: Tensor, change: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """`layers.gated_norm`."""
    return _kernels().any_gated(x, gate, change, shift, scale)


@_gated_norm.register_fake
def _(x: Tensor, gate: Tensor, change: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape)


@custom_op("mrflow::turned", mutates_args=("out",))
def _turned(
    x: Tensor,
    scale: Tensor,
    cos: Tensor,
    sin: Tensor,
    out: Tensor,
    first: int,
    row: int,
    eps: float,
    *,
    late: bool = False,
) -> None:
    """Normed and turned heads into `out` from token `first` on; their first row of the tables is `row`."""
    _kernels().turned(x, scale, cos, sin, out, first=first, row=row, eps=eps, late=late)


@_turned.register_fake
def _(*args: object, late: bool = False) -> None:
    return None


@custom_op("mrflow::gelu_beside", mutates_args=())
def _gelu_beside(out: Tensor, inner: Tensor) -> Tensor:
    """`layers.gelu_beside`."""
    return _kernels().beside(out, inner)


@_gelu_beside.register_fake
def _(out: Tensor, inner: Tensor) -> Tensor:
    return out.new_empty((*out.shape[:-1], out.shape[-1] + inner.shape[-1]))


@custom_op("mrflow::rms_scaled", mutates_args=())
def _rms_scaled(x: Tensor, weight: Tensor, scale: Tensor, eps: float) -> Tensor:
    """`layers.rms_scaled`."""
    return _kernels().any_rms(x, weight, scale, None, eps)


@_rms_scaled.register_fake
def _(x: Tensor, weight: Tensor, scale: Tensor, eps: float) -> Tensor:
    return x.new_empty(x.shape)


@custom_op("mrflow::rms_gated", mutates_args=())
def _rms_gated(x: Tensor, gate: Tensor, change: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`layers.rms_gated`."""
    return _kernels().any_rms(change, weight, gate, x, eps)


@_rms_gated.register_fake
def _(x: Tensor, gate: Tensor, change: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x.new_empty(x.shape)


def _joint_heads(
    streams: Sequence[QKV], rope: Rope, eps: float = EPS, *, late: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """`layers.joint_heads`: every stream's queries and keys are written where all lie."""
    b, _, heads, head = streams[0].k.shape
    queries, keys = (sum(x.shape[1] for x in side) for side in zip(*((s.q, s.k) for s in streams), strict=True))
    q, k = (streams[0].q.new_empty((b, n, heads, head)) for n in (queries, keys))
    q_at = k_at = 0
    for s in streams:
        end = k_at + s.k.shape[1]
        _turned(s.q, s.q_scale, *rope, q, q_at, end - s.q.shape[1], eps, late=late)
        _turned(s.k, s.k_scale, *rope, k, k_at, k_at, eps, late=late)
        q_at, k_at = q_at + s.q.shape[1], end
    return q, k, streams[0].v if len(streams) == 1 else torch.cat([s.v for s in streams], 1)


def _linear_gelu(layer: nn.Module, x: Tensor) -> Tensor:
    """`layers.linear_gelu` as one product, whose epilogue is GELU; it is rounded once, after it.

    torch's own function: of the tanh form on CUDA, of the erf form on a CPU, where nobody calls it. Linears of other
    kinds (in 8 bits, with adapters) work as defined.
    """
    if type(layer) is not nn.Linear or x.dtype != layer.weight.dtype:
        return PLAIN.linear_gelu(layer, x)
    addmm = torch._addmm_activation  # pyright: ignore[reportPrivateImportUsage]
    flat = addmm(layer.bias, x.flatten(0, -2), layer.weight.t(), use_gelu=True)
    return flat.view(*x.shape[:-1], -1)


@custom_op("mrflow::group_moments", mutates_args=())
def _group_moments(x: Tensor, groups: int) -> Tensor:
    """Mean and variance (b, groups, 2) of pixels (b, c, h, w) whose channels lie last, float32."""
    return _kernels().group_moments(x, groups)


@_group_moments.register_fake
def _(x: Tensor, groups: int) -> Tensor:
    return x.new_empty((x.shape[0], groups, 2), dtype=torch.float32)


@custom_op("mrflow::group_norm_silu", mutates_args=())
def _group_norm_silu(x: Tensor, moments: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """SiLU of `torch.nn.GroupNorm` with these moments."""
    return _kernels().group_norm_silu(x, moments, weight, bias, eps)


@_group_norm_silu.register_fake
def _(x: Tensor, moments: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return torch.empty_like(x)


@custom_op("mrflow::channel_norm_silu", mutates_args=())
def _channel_norm_silu(x: Tensor, gamma: Tensor) -> Tensor:
    """SiLU of `kl.ChannelNorm`."""
    return _kernels().channel_norm_silu(x, gamma)


@_channel_norm_silu.register_fake
def _(x: Tensor, gamma: Tensor) -> Tensor:
    return torch.empty_like(x)


def fused_norm_silu(norm: nn.Module, x: Tensor) -> Tensor:
    """`kl.norm_silu` of pixels whose channels lie last, without a copy to another layout and back.

    Norms of other kinds, layouts and dtypes work as defined, as do groups that are no power of two wide.
    """
    last = x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)
    if last and type(norm) is nn.GroupNorm and x.dtype == norm.weight.dtype:
        width, groups = norm.num_channels, norm.num_groups
        if width & (width - 1) == 0 and groups & (groups - 1) == 0:
            return _group_norm_silu(x, _group_moments(x, groups), norm.weight, norm.bias, norm.eps)
    if last and type(norm) is ChannelNorm and x.dtype == norm.gamma.dtype:
        return _channel_norm_silu(x, norm.gamma)
    return norm_silu(norm, x)


FUSED = Ops(_norm, _gated, _gated_norm, _joint_heads, _gelu_beside, _rms_scaled, _rms_gated, _linear_gelu)

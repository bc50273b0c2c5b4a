"""The kernels. Each computes in float32 and rounds where its definition in `layers` rounds; rows are tokens.

Needs triton: import it through `kernels.fused_kernels`. Tensors may be views whose last axis is dense.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mrflow.models.layers import EPS

# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc, untyped-decorator"
# pyright: basic

HEADS = 8  # heads that one program turns
COLUMNS = 2048  # values of a row that one program puts beside each other
TILE = 4096  # values of pixels and channels that a program of an autoencoder's norm has before it at once
SOME = 16  # tiles whose moments one program finds
PARTS = 64  # programs whose moments are put together at once


@triton.jit
def _normed(v, ok, width, eps: tl.constexpr, like):
    mean = tl.sum(v, 0) / width
    centred = tl.where(ok, v - mean, 0.0)
    normed = centred * tl.rsqrt(tl.sum(centred * centred, 0) / width + eps)
    return normed.to(like).to(tl.float32)


@triton.jit
def norm_kernel(x, shift, scale, out, n, width, xb, xn, shift_b, scale_b, eps: tl.constexpr, block: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    b, i = row // n, row % n
    at = tl.arange(0, block)
    ok = at < width
    v = tl.load(x + b * xb + i * xn + at, mask=ok, other=0.0).to(tl.float32)
    y = _normed(v, ok, width, eps, out.dtype.element_ty)
    a = tl.load(shift + b * shift_b + at, mask=ok, other=0.0).to(tl.float32)
    s = tl.load(scale + b * scale_b + at, mask=ok, other=0.0).to(tl.float32)
    tl.store(out + row * width + at, (a + y * s).to(out.dtype.element_ty), mask=ok)


@triton.jit
def gated_kernel(
    x, gate, change, shift, scale, out, normed, n, width, xb, xn, cb, cn, gate_b, shift_b, scale_b,
    eps: tl.constexpr, norm: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    b, i = row // n, row % n
    at = tl.arange(0, block)
    ok = at < width
    v = tl.load(x + b * xb + i * xn + at, mask=ok, other=0.0).to(tl.float32)
    g = tl.load(gate + b * gate_b + at, mask=ok, other=0.0).to(tl.float32)
    c = tl.load(change + b * cb + i * cn + at, mask=ok, other=0.0).to(tl.float32)
    rounded = (v + g * c).to(out.dtype.element_ty)
    tl.store(out + row * width + at, rounded, mask=ok)
    if norm:
        y = _normed(rounded.to(tl.float32), ok, width, eps, out.dtype.element_ty)
        a = tl.load(shift + b * shift_b + at, mask=ok, other=0.0).to(tl.float32)
        s = tl.load(scale + b * scale_b + at, mask=ok, other=0.0).to(tl.float32)
        tl.store(normed + row * width + at, (a + y * s).to(out.dtype.element_ty), mask=ok)


@triton.jit
def rms_kernel(
    x, weight, factor, past, out, n, width, xb, xn, factor_b, pb, pn,
    eps: tl.constexpr, add: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    b, i = row // n, row % n
    at = tl.arange(0, block)
    ok = at < width
    v = tl.load(x + b * xb + i * xn + at, mask=ok, other=0.0).to(tl.float32)
    w = tl.load(weight + at, mask=ok, other=0.0).to(tl.float32)
    f = tl.load(factor + b * factor_b + at, mask=ok, other=0.0).to(tl.float32)
    y = (v * tl.rsqrt(tl.sum(v * v, 0) / width + eps)).to(out.dtype.element_ty).to(tl.float32)
    y = (y * w).to(out.dtype.element_ty).to(tl.float32) * f
    if add:
        y += tl.load(past + b * pb + i * pn + at, mask=ok, other=0.0).to(tl.float32)
    tl.store(out + row * width + at, y.to(out.dtype.element_ty), mask=ok)


@triton.jit
def heads_kernel(
    x, scale, cos, sin, out, n, heads, head, first, xb, xn, xh, ob, table_b, row0,
    eps: tl.constexpr, late: tl.constexpr, some: tl.constexpr, half: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    b, i = row // n, row % n
    h = tl.program_id(1) * some + tl.arange(0, some)
    d, pair = tl.arange(0, 2 * half), tl.arange(0, half)
    ok = (h[:, None] < heads) & (d[None, :] < head)
    v = tl.load(x + b * xb + i * xn + h[:, None] * xh + d[None, :], mask=ok, other=0.0).to(tl.float32)
    w = tl.load(scale + d, mask=d < head, other=0.0).to(tl.float32)
    y = v * tl.rsqrt(tl.sum(v * v, 1) / head + eps)[:, None]
    if late:
        y = y.to(out.dtype.element_ty).to(tl.float32)
    y = (y * w[None, :]).to(out.dtype.element_ty).to(tl.float32)
    table = b * table_b + (row0 + i) * (head // 2) + pair
    c = tl.load(cos + table, mask=pair < head // 2, other=0.0)[None, :]
    s = tl.load(sin + table, mask=pair < head // 2, other=0.0)[None, :]
    even, odd = tl.split(tl.reshape(y, (some, half, 2)))
    turned = tl.reshape(tl.join(even * c - odd * s, odd * c + even * s), (some, 2 * half))
    to = out + b * ob + ((first + i) * heads + h[:, None]) * head + d[None, :]
    tl.store(to, turned.to(out.dtype.element_ty), mask=ok)


@triton.jit
def beside_kernel(seen, inner, out, n, left, right, sb, sn, ib, inn, block: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    b, i = row // n, row % n
    at = tl.program_id(1) * block + tl.arange(0, block)
    here = at < left
    a = tl.load(seen + b * sb + i * sn + at, mask=here, other=0.0).to(tl.float32)
    there = (at >= left) & (at < left + right)
    v = tl.load(inner + b * ib + i * inn + at - left, mask=there, other=0.0).to(tl.float32)
    # 2 sqrt(2 / pi), since (1 + tanh(u)) / 2 = sigmoid(2 u)
    gelu = v * tl.sigmoid(1.5957691216057308 * (v + 0.044715 * v * v * v))
    tl.store(out + row * (left + right) + at, tl.where(here, a, gelu).to(out.dtype.element_ty), mask=here | there)


@triton.jit
def moments_kernel(
    x, parts, pixels, width: tl.constexpr, groups: tl.constexpr, rows: tl.constexpr, some: tl.constexpr,
):  # fmt: skip
    """Count, mean and sum of squared distances of each group in `some` tiles of `rows` pixels (Chan et al. 1979)."""
    part, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    row, channel = tl.arange(0, rows), tl.arange(0, width)
    n = tl.zeros((groups,), tl.float32)
    mean, apart = tl.zeros((groups,), tl.float32), tl.zeros((groups,), tl.float32)
    for tile in range(0, some):
        first = (part * some + tile) * rows
        ok = first + row < pixels
        at = (b * pixels + first + row)[:, None] * width + channel[None, :]
        v = tl.load(x + at, mask=ok[:, None], other=0.0).to(tl.float32)
        here = tl.minimum(tl.maximum(pixels - first, 0), rows).to(tl.float32) * (width // groups)
        each = tl.reshape(tl.sum(v, 0), (groups, width // groups))
        own = tl.sum(each, 1) / tl.maximum(here, 1.0)
        wide = tl.reshape(tl.broadcast_to(own[:, None], (groups, width // groups)), (width,))
        far = tl.where(ok[:, None], v - wide[None, :], 0.0)
        spread = tl.sum(tl.reshape(tl.sum(far * far, 0), (groups, width // groups)), 1)
        both = tl.maximum(n + here, 1.0)
        step = own - mean
        apart += spread + step * step * n * here / both
        mean += step * here / both
        n += here
    to = parts + ((b * tl.num_programs(0) + part) * 3) * groups + tl.arange(0, groups)
    tl.store(to, n)
    tl.store(to + groups, mean)
    tl.store(to + 2 * groups, apart)


@triton.jit
def together_kernel(parts, moments, count, groups: tl.constexpr, some: tl.constexpr):
    """Mean and variance of each group, of the parts that `moments_kernel` found: the mean, then distances to it."""
    b, group = tl.program_id(0).to(tl.int64), tl.arange(0, groups)
    n, mean = tl.zeros((groups,), tl.float32), tl.zeros((groups,), tl.float32)
    apart = tl.zeros((groups,), tl.float32)
    for first in range(0, count, some):
        part = first + tl.arange(0, some)
        at, ok = parts + (b * count + part)[:, None] * 3 * groups + group[None, :], (part < count)[:, None]
        here = tl.load(at, mask=ok, other=0.0)
        n += tl.sum(here, 0)
        mean += tl.sum(here * tl.load(at + groups, mask=ok, other=0.0), 0)
    mean /= n
    for first in range(0, count, some):
        part = first + tl.arange(0, some)
        at, ok = parts + (b * count + part)[:, None] * 3 * groups + group[None, :], (part < count)[:, None]
        far = tl.load(at + groups, mask=ok, other=0.0) - mean[None, :]
        apart += tl.sum(tl.load(at + 2 * groups, mask=ok, other=0.0) + tl.load(at, mask=ok, other=0.0) * far * far, 0)
    to = moments + (b * groups + group) * 2
    tl.store(to, mean)
    tl.store(to + 1, apart / n)


@triton.jit
def group_silu_kernel(
    x, moments, weight, bias, out, pixels, width: tl.constexpr, groups: tl.constexpr, eps: tl.constexpr,
    rows: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(1).to(tl.int64)
    row, channel = tl.program_id(0) * rows + tl.arange(0, rows), tl.arange(0, width)
    at, ok = (b * pixels + row)[:, None] * width + channel[None, :], (row < pixels)[:, None]
    own = moments + (b * groups + channel // (width // groups)) * 2
    factor = tl.rsqrt(tl.load(own + 1) + eps) * tl.load(weight + channel).to(tl.float32)
    v = tl.load(x + at, mask=ok, other=0.0).to(tl.float32) - tl.load(own)[None, :]
    y = v * factor[None, :] + tl.load(bias + channel).to(tl.float32)[None, :]
    y = y.to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + at, (y * tl.sigmoid(y)).to(out.dtype.element_ty), mask=ok)


@triton.jit
def channel_silu_kernel(x, gamma, out, pixels, width, root, rows: tl.constexpr, block: tl.constexpr):
    row, channel = tl.program_id(0).to(tl.int64) * rows + tl.arange(0, rows), tl.arange(0, block)
    at, ok = row[:, None] * width + channel[None, :], (row < pixels)[:, None] & (channel < width)[None, :]
    v = tl.load(x + at, mask=ok, other=0.0).to(tl.float32)
    length = tl.maximum(tl.sqrt(tl.sum(v * v, 1)), 1e-12)
    y = (v / length[:, None]).to(out.dtype.element_ty).to(tl.float32)
    y = (y * root).to(out.dtype.element_ty).to(tl.float32)
    y *= tl.load(gamma + channel, mask=channel < width, other=0.0).to(tl.float32)[None, :]
    y = y.to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + at, (y * tl.sigmoid(y)).to(out.dtype.element_ty), mask=ok)


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _step(vector: Tensor) -> int:
    """From one item's vector to the next one's; one vector serves all."""
    return 0 if vector.shape[0] == 1 else vector.stride(0)


def norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """`layers.modulated`."""
    x, shift, scale = _rows(x), _rows(shift), _rows(scale)
    b, n, width = x.shape
    out = torch.empty((b, n, width), dtype=x.dtype, device=x.device)
    norm_kernel[(b * n,)](
        x, shift, scale, out, n, width, x.stride(0), x.stride(1), _step(shift), _step(scale),
        eps=EPS, block=triton.next_power_of_2(width), num_warps=8,
    )  # fmt: skip
    return out


def any_gated(
    x: Tensor, gate: Tensor, change: Tensor, shift: Tensor | None, scale: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`layers.gated_norm`, or `layers.gated` and an empty tensor."""
    x, gate, change = _rows(x), _rows(gate), _rows(change)
    b, n, width = x.shape
    out = torch.empty((b, n, width), dtype=x.dtype, device=x.device)
    both = shift is not None and scale is not None
    normed = torch.empty_like(out) if both else out.new_empty(0)
    moved, factor = (_rows(shift), _rows(scale)) if shift is not None and scale is not None else (gate, gate)
    gated_kernel[(b * n,)](
        x, gate, change, moved, factor, out, normed, n, width, x.stride(0), x.stride(1), change.stride(0),
        change.stride(1), _step(gate), _step(moved), _step(factor),
        eps=EPS, norm=both, block=triton.next_power_of_2(width), num_warps=8,
    )  # fmt: skip
    return out, normed


def any_rms(x: Tensor, weight: Tensor, factor: Tensor, past: Tensor | None, eps: float) -> Tensor:
    """`layers.rms_scaled`, or with the stream of the past `layers.rms_gated`."""
    x, weight, factor = _rows(x), weight.contiguous(), _rows(factor)
    stream = x if past is None else _rows(past)
    b, n, width = x.shape
    out = torch.empty((b, n, width), dtype=x.dtype, device=x.device)
    rms_kernel[(b * n,)](
        x, weight, factor, stream, out, n, width, x.stride(0), x.stride(1), _step(factor), stream.stride(0),
        stream.stride(1), eps=eps, add=past is not None, block=triton.next_power_of_2(width), num_warps=8,
    )  # fmt: skip
    return out


def turned(
    x: Tensor, scale: Tensor, cos: Tensor, sin: Tensor, out: Tensor, *, first: int, row: int, eps: float, late: bool
) -> None:
    """Normed and turned heads (b, n, heads, head) into `out` from token `first` on; their tables begin at `row`."""
    x, scale, cos, sin = _rows(x), _rows(scale), cos.contiguous(), sin.contiguous()
    b, n, heads, head = x.shape
    heads_kernel[(b * n, triton.cdiv(heads, HEADS))](
        x, scale, cos, sin, out, n, heads, head, first, x.stride(0), x.stride(1), x.stride(2), out.stride(0),
        0 if cos.ndim == 2 or cos.shape[0] == 1 else cos.stride(0), row,
        eps=eps, late=late, some=HEADS, half=triton.next_power_of_2(head) // 2, num_warps=4,
    )  # fmt: skip


def beside(seen: Tensor, inner: Tensor) -> Tensor:
    """`layers.gelu_beside`."""
    seen, inner = _rows(seen), _rows(inner)
    b, n, left = seen.shape
    right = inner.shape[-1]
    out = torch.empty((b, n, left + right), dtype=seen.dtype, device=seen.device)
    beside_kernel[(b * n, triton.cdiv(left + right, COLUMNS))](
        seen, inner, out, n, left, right, seen.stride(0), seen.stride(1), inner.stride(0), inner.stride(1),
        block=COLUMNS, num_warps=4,
    )  # fmt: skip
    return out


def group_moments(x: Tensor, groups: int) -> Tensor:
    """Mean and variance (b, groups, 2) of pixels (b, c, h, w) whose channels lie last; c and groups powers of two."""
    b, width, h, w = x.shape
    rows = max(1, TILE // width)
    count = triton.cdiv(h * w, rows * SOME)
    parts = torch.empty((b, count, 3, groups), dtype=torch.float32, device=x.device)
    moments = torch.empty((b, groups, 2), dtype=torch.float32, device=x.device)
    moments_kernel[(count, b)](x, parts, h * w, width=width, groups=groups, rows=rows, some=SOME, num_warps=8)
    together_kernel[(b,)](parts, moments, count, groups=groups, some=PARTS, num_warps=4)
    return moments


def group_norm_silu(x: Tensor, moments: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """SiLU of a group norm with these moments."""
    b, width, h, w = x.shape
    rows, out = max(1, TILE // width), torch.empty_like(x)
    group_silu_kernel[(triton.cdiv(h * w, rows), b)](
        x, moments, weight, bias, out, h * w, width=width, groups=moments.shape[1], eps=eps, rows=rows, num_warps=8
    )
    return out


def channel_norm_silu(x: Tensor, gamma: Tensor) -> Tensor:
    """SiLU of `kl.ChannelNorm`."""
    b, width, h, w = x.shape
    block, out = triton.next_power_of_2(width), torch.empty_like(x)
    rows = max(1, TILE // 2 // block)
    channel_silu_kernel[(triton.cdiv(b * h * w, rows),)](
        x, gamma, out, b * h * w, width, width**0.5, rows=rows, block=block, num_warps=8
    )
    return out

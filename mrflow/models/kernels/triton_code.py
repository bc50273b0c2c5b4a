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

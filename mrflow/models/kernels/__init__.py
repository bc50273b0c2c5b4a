"""What blocks do between matrix products as one kernel each, on a GPU; `layers` holds the definitions."""

from functools import lru_cache
from importlib.util import find_spec
from types import FunctionType
from typing import Any

import torch
from torch import nn

from mrflow.display.notes import note
from mrflow.models.kl import ChannelNorm, NormSilu, norm_silu
from mrflow.models.layers import PLAIN, QKV, Ops, Rope

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def compile_kernels(backend: Any) -> Ops:  # noqa: ANN401
    """The definitions compiled, for all blocks, resolutions and prompts of one model.

    Matrix products and attention stay as they are, so that no graph depends on how many tokens there are. Functions are
    copied, since what was compiled is counted by code, and another model's tensors are laid out differently.
    """

    def own(f: Any) -> Any:  # noqa: ANN401
        copy = FunctionType(f.__code__.replace(), f.__globals__, f.__name__, f.__defaults__, f.__closure__)
        copy.__kwdefaults__ = f.__kwdefaults__
        return torch.compile(copy, backend=backend, dynamic=True, fullgraph=True)

    return PLAIN._replace(**{name: own(f) for name, f in PLAIN._asdict().items() if name != "linear_gelu"})


def fused_kernels(device: torch.device) -> tuple[Ops, NormSilu]:
    """The kernels, where they work on this device and give what their definitions give; else the definitions.

    Of a transformer's blocks, and of an autoencoder's norms that SiLU follows.
    """
    if device.type != "cuda" or find_spec("triton") is None:
        return PLAIN, norm_silu
    found = _try(device)
    if isinstance(found, str):
        note(f"blocks run without fused kernels: {found}")
        return PLAIN, norm_silu
    return found


@lru_cache
def _try(device: torch.device) -> tuple[Ops, NormSilu] | str:
    """The kernels, or why they cannot be used on a device, tried once."""
    from mrflow.models.kernels.ops import FUSED, fused_norm_silu  # registered where there is a GPU for them

    try:
        found = errors(FUSED, device, torch.bfloat16, norms=fused_norm_silu)
    except Exception as error:  # a compiler or driver of which we know nothing
        return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
    wrong = [name for name, error in found.items() if error > 1]
    return f"{wrong[0]} differs" if wrong else (FUSED, fused_norm_silu)


@torch.no_grad()
def errors(
    ops: Ops,
    device: torch.device,
    dtype: torch.dtype,
    *,
    norms: NormSilu = norm_silu,
    width: int = 96,
    heads: int = 3,
    seed: int = 0,
) -> dict[str, float]:
    """The largest difference of each function from its definition, as a multiple of the dtype's tolerance.

    Both are given the same values, views and several items among them.
    """
    g = torch.Generator().manual_seed(seed)

    def some(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=g).to(device, dtype)

    def differ(got: torch.Tensor, want: torch.Tensor) -> float:
        if got.shape != want.shape or got.dtype != want.dtype:
            return float("inf")
        spread = want.float().abs().max()
        return float((got.float() - want.float()).abs().max() / spread) / TOLERANCE[dtype]

    head, found = width // heads, dict[str, float]()
    x, change, weight = some(2, 7, width), some(2, 7, 2 * width)[..., width:], 1 + 0.1 * some(width)
    for items in (1, 2):
        shift, scale, gate = (v.unsqueeze(1) for v in some(items, 3, width).unbind(1))
        cases = {
            "norm": ("norm", (x, shift, scale)),
            "norm of some tokens": ("norm", (x[:, 2:], shift, scale)),
            "gated": ("gated", (x, gate, change)),
            "gated_norm": ("gated_norm", (x, gate, change, shift, scale)),
            "rms_scaled": ("rms_scaled", (x[:, 2:], weight, scale, 1e-5)),
            "rms_gated": ("rms_gated", (x, gate, change, weight, 1e-5)),
        }
        for name, (which, given) in cases.items():
            got, want = (getattr(o, which)(*given) for o in (ops, PLAIN))
            pairs = zip(got, want, strict=True) if isinstance(got, tuple) else ((got, want),)
            found[f"{name}, {items}"] = max(differ(*pair) for pair in pairs)
    if (device.type, dtype) != ("cpu", torch.float32):  # there GELU is the erf form, 5e-4 from the tanh form
        layer = nn.Linear(2 * width, 3 * width, device=device, dtype=dtype).requires_grad_(False)  # noqa: FBT003
        layer.weight.copy_(some(3 * width, 2 * width) / width**0.5)
        layer.bias.copy_(some(3 * width))
        rows = some(2, 7, 3 * width)[..., : 2 * width]
        found["linear_gelu"] = differ(ops.linear_gelu(layer, rows), PLAIN.linear_gelu(layer, rows))
    inner = some(2, 7, 5 * width)[..., width:]
    found["gelu_beside"] = differ(ops.gelu_beside(change, inner), PLAIN.gelu_beside(change, inner))

    def stream(n: int, queries: int, *, size: float = 1.0) -> QKV:
        q, k, v = (t.unflatten(-1, (heads, head)) for t in (size * some(2, n, 3 * width)).chunk(3, -1))
        return QKV(q[:, n - queries :], k, v, 1 + 0.1 * some(head), 1 + 0.1 * some(head))

    pixels = some(2, 23, 29, 64).permute(0, 3, 1, 2) + 1  # channels last, more than a tile, of a mean beside zero
    kinds = {"groups": nn.GroupNorm(8, 64, 1e-6), "channels": ChannelNorm(64)}
    for name, module in kinds.items():
        for p in module.to(device, dtype).requires_grad_(False).parameters():  # noqa: FBT003
            p.copy_(some(p.numel()).view(p.shape))
        found[f"norm_silu, {name}"] = differ(norms(module, pixels), norm_silu(module, pixels))
    for name, streams, each, late in (
        ("one stream", [stream(7, 7)], (), False),
        ("few queries", [stream(7, 4)], (), False),
        ("two streams", [stream(3, 3), stream(4, 4)], (), False),
        ("tables of each item", [stream(7, 7)], (2,), False),
        ("small values, scales late", [stream(7, 7, size=1e-3)], (), True),
    ):
        turn = 3 * torch.randn((*each, 7, head // 2), generator=g).to(device)
        rope = Rope(turn.cos(), turn.sin())
        pairs = zip(*(o.joint_heads(streams, rope, 1e-5, late=late) for o in (ops, PLAIN)), strict=True)
        found[f"joint_heads, {name}"] = max(differ(*pair) for pair in pairs)
    return found

"""8-bit floating-point weights: reading the community's files, and keeping weights so while computing in more bits.

Two kinds of file exist: plain casts, whose values are the weights, and scaled ones, where weight = value x scale. The
older convention marks itself with a tensor `scaled_fp8` and names scales `<layer>.scale_weight`, the newer names them
`<layer>.weight_scale` and lists the quantised layers, by `<layer>.comfy_quant` or in the header's
`_quantization_metadata`. In one file some layers may be scaled, others plain casts.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from mrflow.checkpoints.blueprint import blueprint
from mrflow.checkpoints.configs import parse_config
from mrflow.checkpoints.names import ends
from mrflow.checkpoints.safetensors import Entry, Header, map_tensor, some
from mrflow.display.notes import note
from mrflow.errors import PlanError, WeightsError

FP8_MAX = 448.0  # the largest float8_e4m3fn
SCALES = (".scale_weight", ".weight_scale")
ACTIVATIONS = (".scale_input", ".input_scale")  # fixed scales of inputs, which are found for each token here
MARKS = ("scaled_fp8", ".comfy_quant")
REFUSED = {
    ".absmax": "bitsandbytes 4-bit or 8-bit",
    ".quant_map": "bitsandbytes 4-bit",
    ".qweight": "GPTQ, AWQ or SVDQuant",
    ".weight_scale_2": "NVFP4",
}
FORMATS = ("float8_e4m3fn", "float8_e5m2")


def with_scales(header: Header) -> Header:
    """The same checkpoint with every 8-bit weight's scale beside it, and without the tensors that say so.

    Wider weights are multiplied with their scales where the file says that these layers are scaled, as ComfyUI does;
    else what stands there is the weight, the scale is left out, and a note says so.

    Raises:
        WeightsError: another quantisation, or an 8-bit weight that should have a scale has none: one that the file
            lists as quantised, or any in a file that has scales and no list.
    """
    listed = _listed(header)
    _refuse_quantised(header, listed)
    tensors, marked = dict(header.tensors), False
    scales: dict[str, Entry] = {}
    for name in header.tensors:
        if name.endswith(SCALES):
            weight = name.rpartition(".")[0] + ".weight"
            if weight in scales:
                raise WeightsError(f"{header.path}: {weight} has two scales, one of them {name}")
            scales[weight] = tensors.pop(name)
        elif name.endswith((*ACTIVATIONS, *MARKS)):
            marked |= name.endswith(MARKS)
            del tensors[name]
    whole = not listed and "_quantization_metadata" not in header.metadata and (marked or bool(scales))
    lost = [name for name in scales if name not in tensors]
    if lost:
        raise WeightsError(f"{header.path} has scales of {len(lost)} weights that it does not have: {some(lost)}")
    older = any(name.endswith("scaled_fp8") for name in header.tensors)
    idle = {n: None for n in scales if tensors[n].dtype.itemsize > 1 and n not in listed and not older}
    if idle:
        note(
            f"{header.path} has scales for {len(idle)} weights of more than 8 bits, and nothing in it says that they "
            f"are scaled ({some(list(idle))}): the weights are taken as they are"
        )
    bare = [n for n, e in tensors.items() if (whole or n in listed) and _wants_scale(n, e) and n not in scales]
    if bare:
        raise WeightsError(
            f"{header.path} is scaled fp8, but {len(bare)} of its weights have no scale: {some(bare)}; the file is "
            "incomplete"
        )
    files: dict[Path, Any] = {}
    for name, scale in scales.items():
        if scale.shape not in ((), (1,), tensors[name].shape[:1], (*tensors[name].shape[:1], 1)):
            raise WeightsError(f"{header.path}: the scale of {name} has shape {scale.shape}, expected one value")
        if not scale.dtype.is_floating_point or scale.dtype.itemsize == 1:
            raise WeightsError(f"{header.path}: the scale of {name} is {scale.dtype}, expected float32")
        if not bool((map_tensor(scale, files).float().abs() < torch.finfo(torch.float32).max / FP8_MAX).all()):
            raise WeightsError(f"{header.path}: the scale of {name} is NaN, infinite or beyond what numbers hold")
        if name not in idle:
            tensors[name] = replace(tensors[name], scale=scale)
    return replace(header, tensors=tensors)


def _refuse_quantised(header: Header, listed: Mapping[str, str]) -> None:
    """Refuse what is neither plain nor scaled fp8; `listed` are the layers that the file says are quantised."""
    how = "use a bfloat16 or fp8 file"
    for ending, what in REFUSED.items():
        if found := [name for name in header.tensors if name.endswith(ending)]:
            raise WeightsError(f"{header.path} is quantised ({what}: {some(found)}); {how}")
    if str(header.metadata.get("model_class", "")).startswith("Nunchaku"):
        raise WeightsError(f"{header.path} is quantised (Nunchaku); {how}")
    for name, kind in listed.items():
        if kind not in FORMATS:
            raise WeightsError(f"{header.path}: {name} is quantised as {kind!r}; {how}")
    for name, entry in header.tensors.items():
        if entry.dtype == torch.uint8 and not name.endswith((*SCALES, *ACTIVATIONS, *MARKS)):
            raise WeightsError(f"{header.path}: {name} is quantised to packed bytes; {how}")


def _wants_scale(name: str, entry: Entry) -> bool:
    return entry.dtype.itemsize == 1 and entry.dtype.is_floating_point and len(entry.shape) == 2


def _listed(header: Header) -> dict[str, Any]:
    """The format of each weight that the file says is quantised, layer by layer; other 8-bit values are plain casts.

    Layers are named with the file's own prefix, whichever part of the file this is.
    """
    out: dict[str, Any] = {}
    try:
        table: Any = parse_config(header.metadata.get("_quantization_metadata", "{}"), header.path)
        layers = {str(k): dict(v).get("format") for k, v in table.get("layers", {}).items()}
        for name, entry in header.tensors.items():
            if name.endswith(".comfy_quant"):
                if math.prod(entry.shape) * entry.dtype.itemsize > 1 << 16:
                    raise ValueError(f"{name} is no text of 64 KiB")
                said = bytes(map_tensor(entry, {}).view(torch.uint8).flatten().tolist())
                kind, layer = parse_config(said, header.path).get("format"), name.removesuffix(".comfy_quant")
                if layers.get(layer) in (None, *FORMATS):
                    layers[layer] = kind
    except (ValueError, TypeError, AttributeError, RecursionError):
        raise WeightsError(f"{header.path}: what it says of its quantised layers cannot be read") from None
    behind = {end: kind for layer, kind in layers.items() for end in ends(layer)}
    for name in header.tensors:
        stem = name.removesuffix(".weight")
        if stem != name:
            found = (layers[end] for end in ends(stem) if end in layers)
            if (kind := next(found, behind.get(stem))) is not None:
                out[name] = kind
    return out


class Fp8Linear(nn.Module):
    """A linear whose weight is stored as float8_e4m3fn with one scale a row; products are in the input's dtype."""

    def __init__(self, width: int, out: int, *, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out, width, dtype=torch.float8_e4m3fn), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(out), requires_grad=False) if bias else None
        self.register_buffer("scale", torch.ones(out), persistent=False)
        self.scale: Tensor

    def forward(self, x: Float[Tensor, "*b i"]) -> Float[Tensor, "*b o"]:
        """(x w') scale + bias."""
        out = F.linear(x, self.weight.to(x.dtype))
        if self.bias is None:
            return out * self.scale.to(x.dtype)
        return torch.addcmul(self.bias.to(x.dtype), out, self.scale.to(x.dtype))

    def take(self, parts: Sequence[tuple[Tensor, Tensor | None]], device: torch.device | str) -> None:
        """Fill the weight from (values, scale) of its rows: 8-bit values are kept as they are, others are rounded."""
        weights: list[Tensor] = []
        scales: list[Tensor] = []
        for values, scale in parts:
            if values.dtype == torch.float8_e4m3fn:
                own = torch.ones(()) if scale is None else scale.float().reshape(-1)
                weights.append(values.to(device))
                scales.append(own.to(device).expand(len(values)))
                continue
            exact = values.to(device).float() * (1.0 if scale is None else scale.to(device).float().reshape(-1, 1))
            row = (exact.abs().amax(1) / FP8_MAX).clamp(min=torch.finfo(torch.float32).tiny)
            weights.append((exact / row[:, None]).to(torch.float8_e4m3fn))
            scales.append(row)
        self.weight = nn.Parameter(torch.cat([w.view(torch.uint8) for w in weights]).view(weights[0].dtype), False)  # noqa: FBT003
        self.scale = torch.cat(scales)


class Fp8Product(Fp8Linear):
    """An 8-bit linear whose inputs are rounded to 8 bits too, with one scale a token, so that the product is in 8 bits.

    Only devices with such products gain by it; elsewhere the same numbers are multiplied as float32.
    """

    def forward(self, x: Float[Tensor, "*b i"]) -> Float[Tensor, "*b o"]:
        """(x' w') row scale column scale + bias, in bfloat16; sums are float32."""
        rows = x.reshape(-1, x.shape[-1])
        values, scale = rounded_rows(rows)
        if x.device.type == "cuda":
            out = torch._scaled_mm(  # pyright: ignore[reportPrivateImportUsage]
                values, self.weight.t(), scale_a=scale, scale_b=self.scale[None], bias=self.bias, out_dtype=x.dtype
            )
        else:
            out = F.linear(values.float(), self.weight.float()) * scale * self.scale
            out = (out if self.bias is None else out + self.bias.float()).to(x.dtype)
        product: Tensor = out.unflatten(0, x.shape[:-1])
        return product


def rounded_rows(x: Float[Tensor, "n i"]) -> tuple[Float[Tensor, "n i"], Float[Tensor, "n 1"]]:
    """Rows as float8_e4m3fn, and the float32 scales that they are to be multiplied with: largest magnitude / 448."""
    wide = x.float()
    scale = (wide.abs().amax(1, keepdim=True) / FP8_MAX).clamp(min=torch.finfo(torch.float32).tiny)
    return (wide / scale).to(torch.float8_e4m3fn), scale


FIT = 16  # sides of an 8-bit product are multiples of it


def multiply_fp8(net: nn.Module, without: Iterable[nn.Module]) -> None:
    """Have 8-bit linears multiply in 8 bits, but for those in `without` and those whose sides do not fit."""
    left = set(without)
    for module in net.modules():
        if type(module) is Fp8Linear and module not in left and not any(side % FIT for side in module.weight.shape):
            module.__class__ = Fp8Product


def check_fp8(device: torch.device, dtype: torch.dtype) -> None:
    """Refuse devices and dtypes for which there are no products in 8 bits.

    Raises:
        PlanError: it says which there are.
    """
    instead = "use storage='fp8', which keeps the weights in 8 bits and computes in dtype"
    if dtype != torch.bfloat16:
        raise PlanError(f"compute='fp8' gives bfloat16, not {str(dtype).removeprefix('torch.')}; dtype=torch.bfloat16")
    if device.type == "cuda":
        if (found := torch.cuda.get_device_capability(device)) < (8, 9):
            raise PlanError(
                f"compute='fp8' needs a GPU of compute capability 8.9 or newer (Ada, Hopper), this one has "
                f"{found[0]}.{found[1]}; {instead}"
            )
    elif device.type != "cpu":
        raise PlanError(f"compute='fp8' is for CUDA, and imitated on a CPU, not for {device.type}; {instead}")


def store_fp8(module: nn.Module) -> None:
    """Put an `Fp8Linear` in the place of every linear of a module that was built on the meta device."""
    for name, child in list(module.named_children()):
        if isinstance(child, nn.Linear):
            bias = cast("Tensor | None", child.bias) is not None
            with blueprint():
                setattr(module, name, Fp8Linear(child.in_features, child.out_features, bias=bias))
        else:
            store_fp8(child)

"""Tells one set of weights from another, wherever they lie: on a device, offloaded, quantised, with adapters."""

import hashlib
import json
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from mrflow.display.notes import note

SAMPLES = 8  # values read of each tensor


def version_of(parts: Mapping[str, nn.Module], *facts: object) -> str:
    """Twelve hex digits that change with any part's class, config, names, shapes, dtypes, sampled values or adapters.

    Of every parameter and buffer, 8 evenly spaced values are read; a change that misses all of them is not seen. Where
    a tensor lies does not matter: values that an offload hook keeps are read from there.
    """
    digest, read, lost = hashlib.sha256(repr(facts).encode()), dict[torch.device, list[Tensor]](), 0
    for part, module in parts.items():
        digest.update(f"{part} {type(unwrap(module)).__name__} {_config_of(module)}\n".encode())
        digest.update(repr(adapters(module)).encode())
        for name, whole in _values(module):
            for tensor in _plain(whole):
                digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
                if tensor.device.type == "meta":
                    lost += 1
                elif tensor.numel():
                    read.setdefault(tensor.device, []).append(sample_bytes(tensor))
    # One transfer a device; what lies on the same device in the same order gives the same bytes.
    order = [t.cpu() for device in sorted(read, key=str) for t in torch.cat(read[device]).split(1 << 20)]
    for piece in order:
        digest.update(piece.numpy().tobytes())
    if lost:
        note(f"{lost} tensors of the pipeline are kept where they cannot be read; its version tells only their shapes")
    return digest.hexdigest()[:12]


def sample_bytes(tensor: Tensor) -> Tensor:
    """Some values of a tensor, as bytes."""
    flat = tensor.detach().flatten()
    some = flat[:: max(1, flat.numel() // SAMPLES)][:SAMPLES]
    return some.contiguous().view(torch.uint8)


def _plain(tensor: Tensor) -> Iterator[Tensor]:
    """The ordinary tensors that a tensor is made of: itself, or those inside a quantised one."""
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is None:
        yield tensor.detach().as_subclass(Tensor)
        return
    for name in cast("tuple[list[str], object]", flatten())[0]:
        yield from _plain(getattr(tensor, name))


def _values(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers by name; those that accelerate took away come from where its hook keeps them."""
    for prefix, inner in unwrap(module).named_modules():
        own = {**inner._parameters, **inner._buffers}
        kept = weights_map(inner)
        for name, tensor in own.items():
            if tensor is None or name in inner._non_persistent_buffers_set:
                continue
            if tensor.device.type == "meta" and kept is not None and name in kept:
                tensor = kept[name]
            yield f"{prefix}.{name}", tensor


def weights_map(module: nn.Module) -> Mapping[str, Tensor] | None:
    """What an accelerate hook holds of a module's own tensors."""
    hook = getattr(module, "_hf_hook", None)
    for each in getattr(hook, "hooks", (hook,)):
        held = getattr(each, "weights_map", None)
        if held is not None:
            names = (*module._parameters, *module._buffers)
            return {name: held[name] for name in names if _holds(held, name)}
    return None


def _holds(held: Any, name: str) -> bool:  # noqa: ANN401
    try:
        held[name]
    except KeyError:
        return False
    return True


def unwrap(module: nn.Module) -> nn.Module:
    """The module inside torch.compile's wrapper."""
    inner = getattr(module, "_orig_mod", module)
    return inner if isinstance(inner, nn.Module) else module


def _config_of(module: nn.Module) -> str:
    """A part's config as text, without private entries such as where it was loaded from."""
    config: Any = getattr(module, "config", None) or {}
    entries: dict[str, Any] = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    return json.dumps({k: v for k, v in entries.items() if not k.startswith("_")}, sort_keys=True, default=str)


def adapters(module: nn.Module) -> list[object]:
    """Which adapters (LoRA) are there, active, merged, and how strongly; empty without any."""
    if not getattr(module, "peft_config", None):
        return []
    found: list[object] = [sorted(getattr(module, "peft_config", {}))]
    for name, inner in module.named_modules():
        scaling = getattr(inner, "scaling", None)
        if isinstance(scaling, dict) and hasattr(inner, "active_adapters"):
            state = [getattr(inner, key, None) for key in ("active_adapters", "merged_adapters", "disable_adapters")]
            found.append((name, sorted(cast("dict[str, float]", scaling).items()), state))
    return found


class Watch:
    """Tells cheaply whether parts may have changed since it last looked: other objects, adapters, or writes in place.

    A write through `.data` leaves no trace; a fused LoRA is told by what the pipeline says of it.
    """

    def __init__(self) -> None:
        self._tensors: Sequence[weakref.ref[nn.Parameter]] = ()
        self._parts: tuple[int, ...] = ()

    def __call__(self, parts: Mapping[str, nn.Module], *facts: object) -> tuple[object, ...]:
        """A value that differs from the last one where something changed."""
        ids = tuple(id(part) for part in parts.values())
        state = repr([adapters(part) for part in parts.values()])
        if ids != self._parts:
            found = [weakref.ref(t) for part in parts.values() for t in part.parameters()]
            self._parts, self._tensors = ids, found
        alive = [t for t in (ref() for ref in self._tensors) if t is not None and not t.is_inference()]
        return ids, state, sum(t._version for t in alive), facts

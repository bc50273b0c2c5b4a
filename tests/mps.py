"""A stand-in for Apple's GPU, on any machine: computes on the CPU, and refuses float64 as that device does."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

MPS = torch.device("mps")


class OnMps(Tensor):
    """A tensor that says it lies on the device."""


class Mps(TorchFunctionMode):
    """Inside, `mps` names a device that is there.

    What is made on it, sent to it or computed from what lies on it lies on it too, until it is sent to the CPU.

    Raises:
        TypeError: a tensor of float64 on the device, in the words of torch.
        RuntimeError: a tensor there is computed with one on the CPU.
    """

    def __init__(self) -> None:
        super().__init__()
        self.computed = 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        with torch._C.DisableTorchFunctionSubclass():
            if name == "__get__" and func == Tensor.device.__get__:
                return MPS if isinstance(args[0], OnMps) else func(*args)
            given, sent = list(leaves((args, kwargs))), None
            refuse_mixed(name, [v for v in given if isinstance(v, Tensor)])
            devices = [v for v in given if isinstance(v, torch.device) or v in ("mps", "cpu")]
            if devices:
                sent = torch.device(devices[0]).type
            elif name == "cpu" or name in ("numpy", "tolist", "item"):
                sent = "cpu"
            elif name in ("to", "type_as") and any(isinstance(v, Tensor) for v in given[1:]):
                sent = "mps" if isinstance(given[1], OnMps) else "cpu"
            elif any(isinstance(v, OnMps) for v in given):
                sent = "mps"
            out = func(*mapped(plain, args), **mapped(plain, kwargs))
        if sent != "mps":
            return mapped(lambda v: v.as_subclass(Tensor) if isinstance(v, OnMps) else v, out)
        self.computed += 1
        return mapped(there, out)


# what takes tensors of two devices: what sends, what asks for a shape or type, what reads or writes at places
MIXED = {"to", "type_as", "copy_", "view_as", "expand_as", "reshape_as", "__getitem__", "__setitem__", "is_same_size"}


def refuse_mixed(name: str, tensors: list[Tensor]) -> None:
    """Both devices in one computation; a number of the CPU, without axes, may be computed with anything."""
    if name in MIXED and isinstance(tensors[0], OnMps):
        return
    there, here = (any(isinstance(t, OnMps) == on and (t.ndim or on) for t in tensors) for on in (True, False))
    if there and here and name not in MIXED - {"__getitem__"}:
        raise RuntimeError(f"Expected all tensors to be on the same device, but {name} got tensors of mps:0 and of cpu")


def plain(value: Any) -> Any:
    """The device that computes."""
    if isinstance(value, torch.device) and value.type == "mps":
        return torch.device("cpu")
    return "cpu" if isinstance(value, str) and value == "mps" else value


def there(value: Any) -> Any:
    """A tensor as one of the device."""
    if not isinstance(value, Tensor):
        return value
    if value.dtype in (torch.float64, torch.complex128):
        raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64")
    return value.as_subclass(OnMps)


def move(model: Any) -> None:
    """A model whose networks lie there: what its attributes hold."""
    model._device = MPS
    for module in [m for held in vars(model).values() for m in modules(held)]:
        for kept in (module._parameters, module._buffers):
            kept.update({name: there(tensor) for name, tensor in kept.items()})


def modules(held: object) -> Iterable[nn.Module]:
    """The networks of an attribute: it is one, or has one, as an upscaler does."""
    inside = [held, *vars(held).values()] if hasattr(held, "__dict__") else []
    nets = [net for net in inside if isinstance(net, nn.Module)]
    return [m for net in nets for m in net.modules()]


def leaves(value: Any) -> Iterable[Any]:
    """Everything in nested arguments that is no container."""
    if isinstance(value, dict):
        value = tuple(value.values())
    if isinstance(value, list | tuple):
        for each in value:
            yield from leaves(each)
    elif isinstance(value, Tensor | torch.device | str):
        yield value


def mapped(change: Callable[[Any], Any], value: Any) -> Any:
    """Nested arguments, changed one by one."""
    if isinstance(value, dict):
        return {k: mapped(change, v) for k, v in value.items()}
    if type(value) in (list, tuple):
        return type(value)(mapped(change, v) for v in value)
    if isinstance(value, tuple):  # of torch's own kinds, such as what linalg gives
        changed = [mapped(change, v) for v in value]
        return value if all(a is b for a, b in zip(changed, value, strict=True)) else type(value)(changed)
    return change(value)

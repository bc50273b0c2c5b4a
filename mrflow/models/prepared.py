"""Networks whose checkpoints are checked before a weight is read: what all families do alike.

A family says how its network is built and where its parameters lie; the rest is here.
"""

from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, TypeVar

import torch
from torch import nn

from mrflow.checkpoints.blueprint import blueprint
from mrflow.checkpoints.safetensors import CheckedNetwork, Header, Layout, check_layout, compute_dtype, open_checkpoint
from mrflow.errors import PlanError, WeightsError
from mrflow.models.blocks import Transformer
from mrflow.models.fp8 import store_fp8, with_scales
from mrflow.models.headers import part

T = TypeVar("T", bound=Transformer)
V = TypeVar("V", bound=nn.Module)


def network_header(where: str | Path | Header, what: str) -> Header:
    """The header of the network `what` ("a FLUX transformer") in a file, folder or header, in its own names.

    Raises:
        WeightsError: it holds none.
    """
    return with_scales(part(where if isinstance(where, Header) else open_checkpoint(where), what))


@contextmanager
def sizes_of(header: Header) -> Generator[None]:
    """Inside, sizes are made of a header: those that cannot be are the file's fault.

    Raises:
        WeightsError: naming the file.
    """
    try:
        yield
    except WeightsError:
        raise
    except (PlanError, TypeError, ValueError) as error:
        raise WeightsError(f"{header.path}: {error}") from None


def prepare_transformer(
    header: Header,
    build: Callable[..., T],
    layout: Callable[[T], Layout],
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    storage: Literal["fp8"] | None = None,
    fuse: bool | None = None,
    apart: bool = True,
    blocks: Callable[[T], Iterable[nn.Module]] = lambda net: net.stack(),
) -> CheckedNetwork[T]:
    """A transformer of `build(split=)` for a header; names and shapes are checked now, `read` reads the weights.

    `dtype=None` is the file's; `storage="fp8"` keeps the matrices of `blocks` in 8 bits. `fuse` joins projections that
    the file keeps `apart`, which copies them; by default they stay apart, and all weights mapped, where nothing else
    needs a copy either.

    Raises:
        WeightsError: anything in the file is missing, left over or of a wrong shape.
    """
    dtype = dtype or compute_dtype(header)
    if fuse is None:
        unchanged = all(entry.dtype == dtype for entry in header.tensors.values())
        fuse = not (unchanged and storage is None and torch.device(device).type == "cpu")
    with blueprint():
        net = build(split=apart and not (fuse or storage))
    if storage == "fp8":
        for block in blocks(net):
            store_fp8(block)
    where = layout(net)
    check_layout(net, header, where, dtype=dtype)
    return CheckedNetwork(net, header, where, dtype, device, cast=dtype)


def prepare_autoencoder(
    header: Header,
    build: Callable[[], V],
    layout: Callable[[V], Layout],
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> CheckedNetwork[V]:
    """An autoencoder for a header; names and shapes are checked now. `dtype=None` keeps the file's.

    Raises:
        WeightsError: anything in the file is missing, left over or of a wrong shape.
    """
    with blueprint():
        net = build()
    where = layout(net)
    check_layout(net, header, where, dtype=dtype)
    return CheckedNetwork(net, header, where, dtype or compute_dtype(header), device, cast=dtype)

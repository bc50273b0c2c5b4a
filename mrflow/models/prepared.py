"""Networks whose checkpoints are checked before a weight is read: what all families do alike.

A family says, once for each network, how it is published; the rest is here.
"""

import re
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import torch
from torch import nn

from mrflow.checkpoints.blueprint import blueprint
from mrflow.checkpoints.safetensors import CheckedNetwork, Header, Layout, check_layout, compute_dtype, open_checkpoint
from mrflow.errors import PlanError, WeightsError
from mrflow.models.blocks import Transformer
from mrflow.models.fp8 import store_fp8, with_scales
from mrflow.models.headers import Names, part

T = TypeVar("T", bound=Transformer)
N = TypeVar("N", bound=nn.Module)


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


@dataclass(frozen=True)
class Published(Generic[N]):
    """How a network is published, and with that how its checkpoints are opened.

    `what` is what errors call it ("a FLUX autoencoder"). `names` are those of the layout that a header has, `sizes`
    what `build` makes a network of, `layout` where its parameters lie; tensors whose whole name is `unread` are of no
    use here. `framed` says that tensors may have a time axis, the third, that the network has not: then the last slice.
    """

    what: str
    names: Callable[[Header], Names]
    sizes: Callable[[Header, Names], Any]
    build: Callable[..., N]
    layout: Callable[[N, Names], Layout]
    unread: str = "(?!)"
    framed: bool = False

    def prepare(
        self, where: str | Path | Header, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
    ) -> CheckedNetwork[N]:
        """The network of a file, folder or header; names and shapes are checked now, `read` reads the weights.

        `dtype=None` keeps the file's.

        Raises:
            WeightsError: it is no such network, or anything in it is missing, left over or of a wrong shape.
        """
        header, names, sizes = self._open(where)
        with blueprint():
            net = self.build(sizes)
        return self._check(net, header, names, dtype, device)

    def place(self, net: N, header: Header, names: Names) -> Layout:
        """Where every parameter lies in a file."""
        layout = self.layout(net, names)
        if not self.framed:
            return layout
        rank = {name: len(entry.shape) for name, entry in header.tensors.items()}
        return {
            name: replace(layout[name], frame=rank.get(layout[name].names[0]) == tensor.ndim + 1)
            for name, tensor in net.state_dict().items()
        }

    def _open(self, where: str | Path | Header) -> tuple[Header, Names, Any]:
        header = with_scales(part(where if isinstance(where, Header) else open_checkpoint(where), self.what))
        read = {name: entry for name, entry in header.tensors.items() if not re.fullmatch(self.unread, name)}
        names = self.names(header := replace(header, tensors=read))
        return header, names, self.sizes(header, names)

    def _check(
        self, net: N, header: Header, names: Names, dtype: torch.dtype | None, device: torch.device | str
    ) -> CheckedNetwork[N]:
        layout = self.place(net, header, names)
        check_layout(net, header, layout, dtype=dtype)
        return CheckedNetwork(net, header, layout, dtype or compute_dtype(header), device, cast=dtype)


@dataclass(frozen=True)
class PublishedTransformer(Published[T]):
    """A transformer: it may keep projections apart that `build(sizes, split=)` joins, and matrices in 8 bits.

    `joined` is such a projection, which a layout that keeps it apart gives several names; `narrow` are the modules
    whose matrices may have 8 bits.
    """

    joined: str = ""
    narrow: Callable[[T], Iterable[nn.Module]] = lambda net: net.stack()

    def prepare(
        self,
        where: str | Path | Header,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        storage: Literal["fp8"] | None = None,
        fuse: bool | None = None,
    ) -> CheckedNetwork[T]:
        """As of every network; `storage="fp8"` keeps matrices in 8 bits.

        `fuse` joins projections that the file keeps apart, which copies them; by default they stay apart, and all
        weights mapped, where nothing else needs a copy either.
        """
        header, names, sizes = self._open(where)
        dtype = dtype or compute_dtype(header)
        if fuse is None:
            unchanged = all(entry.dtype == dtype for entry in header.tensors.values())
            fuse = not (unchanged and storage is None and torch.device(device).type == "cpu")
        with blueprint():
            net = self.build(sizes, split=len(names(self.joined)) > 1 and not (fuse or storage))
        if storage == "fp8":
            for block in self.narrow(net):
                store_fp8(block)
        return self._check(net, header, names, dtype, device)

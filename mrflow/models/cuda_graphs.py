"""A step replayed as a CUDA graph: at low resolution a fast GPU waits for launches, not for arithmetic."""

import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mrflow.display.notes import note

Function = Callable[..., Tensor]
Capture = Callable[[Function, tuple[Tensor, ...]], tuple[Callable[[], None], Tensor]]


class GraphPool:
    """What all graphs of a model share: memory for what lives during a replay, one lock, and how many are kept.

    A replay's output is copied before another one begins, so graphs may use the same memory in any order. Beyond `most`
    graphs the one that was replayed longest ago is dropped.
    """

    def __init__(self, *, most: int = 16, capture: Capture | None = None) -> None:
        self.most, self.capture = most, capture or self._capture
        self.lock = threading.RLock()
        self.handle: Any = None  # torch's own kind of number
        self.kept: OrderedDict[tuple[int, object], CudaGraph] = OrderedDict()

    def use(self, owner: "CudaGraph", which: object) -> None:
        """A graph of `owner` is the newest now; the oldest goes."""
        self.kept[id(owner), which] = owner
        self.kept.move_to_end((id(owner), which))
        while len(self.kept) > self.most:
            (_, old), other = self.kept.popitem(last=False)
            other.forget(old)

    def _capture(self, f: Function, inputs: tuple[Tensor, ...]) -> tuple[Callable[[], None], Tensor]:
        """Record f(*inputs) as a CUDA graph; gives what replays it, and the tensor that then holds the output."""
        if self.handle is None:
            self.handle = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.handle):
            output = f(*inputs)
        return graph.replay, output


@dataclass
class _Recording:
    inputs: tuple[Tensor, ...]
    replay: Callable[[], None]
    output: Tensor


class CudaGraph:
    """f, whose calls are replayed from a graph per shapes of its tensors.

    A shape's first call runs f itself (a chain's single refinement step is not worth a recording), the second records
    it and holds the replay against f once; where they disagree, or recording fails, f goes on running itself. What f
    gives must depend on its arguments and on weights that stay where they are. One thread at a time is served of all
    that share a `pool`.
    """

    def __init__(self, f: Function, pool: GraphPool | None = None) -> None:
        self.f, self.pool = f, pool or GraphPool()
        self.seen: set[object] = set()
        self.recorded: dict[object, _Recording | None] = {}

    def __call__(self, *inputs: Tensor, key: object = None) -> Tensor:
        """f(*inputs, key=key), without a key where that is None; it tells apart what shapes do not."""
        which = (key, *((t.shape, t.dtype) for t in inputs))
        f = self.f if key is None else partial(self.f, key=key)
        with self.pool.lock:
            if which not in self.seen:
                self.seen.add(which)
                return f(*inputs)
            if which not in self.recorded:
                self.recorded[which], output = self._record(f, inputs)
                if self.recorded[which] is not None:
                    self.pool.use(self, which)
                return output
            recorded = self.recorded[which]
            if recorded is None:
                return f(*inputs)
            self.pool.use(self, which)
            return self._replay(recorded, inputs)

    def forget(self, which: object) -> None:
        """Drop a shape's graph; when the shape comes back, it is new."""
        del self.recorded[which]
        self.seen.discard(which)

    def _replay(self, recorded: _Recording, inputs: tuple[Tensor, ...]) -> Tensor:
        for own, given in zip(recorded.inputs, inputs, strict=True):
            own.copy_(given)
        recorded.replay()
        return recorded.output.clone()

    def _record(self, f: Function, inputs: tuple[Tensor, ...]) -> tuple[_Recording | None, Tensor]:
        """A recording that was held against f, or None; and f's own output."""
        want = f(*inputs)
        try:
            own = tuple(t.clone() for t in inputs)
            recorded = _Recording(own, *self.pool.capture(f, own))
            got = self._replay(recorded, inputs)
        except RuntimeError as error:
            note(f"steps run one kernel at a time: recording a CUDA graph failed ({str(error).splitlines()[0]})")
            return None, want
        if not torch.allclose(got.float(), want.float(), rtol=1e-2, atol=1e-2 * float(want.float().abs().max())):
            note("steps run one kernel at a time: a CUDA graph did not give what the step itself gives")
            return None, want
        return recorded, want

"""Upscalers whose weights lie in a file: found, told by their content, read once."""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from mrflow.errors import MrflowError, WeightsError
from mrflow.protocols.upscaler import Upscaler
from mrflow.records.files import locate
from mrflow.upscalers.nets import RRDBParams
from mrflow.upscalers.network import NetworkFacts, OneFile, OpenedNetwork, Precision
from mrflow.upscalers.spandrel import Spandrel
from mrflow.upscalers.weights import network, read_state, recognise, rename


@dataclass(frozen=True)
class Checkpoint(OneFile):
    """RRDBNet or SRVGGNetCompact from a file that BasicSR, Real-ESRGAN or ESRGAN wrote: any naming, any size.

    Settings are those of `Network`.

    Raises:
        WeightsError: the file is missing, unsafe, broken, or holds another kind of network.
    """

    @property
    def network(self) -> OpenedNetwork:
        """The network, read once for all upscalers of the same file."""
        return _own(self.path, self.sha256)


@lru_cache(maxsize=16)
def _own(path: str, sha256: str) -> OpenedNetwork:
    state = read_state(Path(path))
    net = network(state, Path(path))
    if net is None:
        names = ", ".join(list(state)[:3])
        raise WeightsError(
            f"{path} holds neither RRDBNet nor SRVGGNetCompact (its tensors: {names}, ...): "
            "try Spandrel(path), which knows forty more architectures, or BasicSR(options, weights)"
        )
    params = net.params
    if params.channels != 3:
        raise WeightsError(f"{path} works on {params.channels} channels; an upscaler needs 3 (red, green, blue)")
    facts = NetworkFacts(
        scale=params.scale,
        multiple=params.unshuffle if isinstance(params, RRDBParams) else 1,
        reach=params.reach,
        values=params.values,
        flops=params.flops,
        half=("float16", "bfloat16"),
    )
    return OpenedNetwork(net, facts)


def load_upscaler(path: str | Path, *, tile: int | None = None, dtype: Precision | None = None) -> Upscaler:
    """The upscaler that a checkpoint holds: mrflow's own network where it is one of them, else spandrel's.

    Raises:
        WeightsError: the file is missing, unsafe or broken, or it holds a network that nothing here knows.
    """
    where, _ = locate(str(path), "")
    if recognise(rename(read_state(where))) is None:
        return Spandrel(str(where), tile=tile, dtype=dtype)
    try:
        return Checkpoint(str(where), tile=tile, dtype=dtype)
    except WeightsError as misfit:  # a relative, such as ESRGAN+, that spandrel may know
        try:
            return Spandrel(str(where), tile=tile, dtype=dtype)
        except MrflowError:
            raise misfit from None

"""Any architecture that spandrel knows (extra `[spandrel]`)."""

import math
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn

from mrflow.errors import PlanError, WeightsError
from mrflow.upscalers.network import NetworkFacts, OneFile, OpenedNetwork, Precision
from mrflow.upscalers.torchvision_shim import use_shim
from mrflow.upscalers.weights import read_state


@dataclass(frozen=True)
class Spandrel(OneFile):
    """A super-resolution network from a file, its architecture told by spandrel (its README lists about forty).

    What spandrel says of a network is obeyed: scale, rules for sizes, which half precisions are safe, whether it may be
    tiled. The file is read by mrflow's own safe reader, never by TorchScript.

    Raises:
        PlanError: spandrel is not installed, or the network makes no larger or better pictures of pictures.
        WeightsError: the file is missing, unsafe or broken, or spandrel does not know what it holds.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        half = self.network.facts.half
        if self.dtype not in (None, "float32", *half):
            safe = f"; {', '.join(half)} would work" if half else ""
            name = Path(self.path).name
            raise PlanError(f"spandrel says that the network of {name} is not safe in {self.dtype}{safe}")

    @property
    def network(self) -> OpenedNetwork:
        """The network, read once for all upscalers of the same file."""
        return _open(self.path, self.sha256)


def spandrel() -> Any:  # noqa: ANN401
    """The package.

    Raises:
        PlanError: it is not installed.
    """
    try:
        with use_shim():
            import spandrel as package  # type: ignore  # pyright: ignore
    except ImportError as error:
        raise PlanError(
            f"this network needs spandrel, which cannot be imported ({error}): pip install 'mrflow[spandrel]'"
        ) from None
    return cast(Any, package)


@lru_cache(maxsize=16)
def _open(path: str, sha256: str) -> OpenedNetwork:
    state = read_state(Path(path))
    package = spandrel()
    try:
        found = package.ModelLoader().load_from_state_dict(package.canonicalize_state_dict(dict(state)))
    except package.UnsupportedModelError:
        names = ", ".join(list(state)[:3])
        raise WeightsError(
            f"{path} holds a network that spandrel {package.__version__} does not know (its tensors: {names}, ...)"
        ) from None
    except Exception as error:
        raise WeightsError(f"{path} cannot be made into a network by spandrel: {error}") from error
    what = found.architecture.name
    if not isinstance(found, package.ImageModelDescriptor):
        raise PlanError(f"{path} ({what}) fills masked parts of a picture; an upscaler takes a picture alone")
    if found.input_channels != 3 or found.output_channels != 3:
        raise PlanError(
            f"{path} ({what}) takes {found.input_channels} channels and gives {found.output_channels}; "
            "an upscaler needs 3 and 3 (red, green, blue)"
        )
    rules = found.size_requirements
    safe: tuple[tuple[bool, Precision], ...] = (
        (found.supports_half, "float16"),
        (found.supports_bfloat16, "bfloat16"),
    )
    facts = NetworkFacts(
        scale=found.scale,
        multiple=rules.multiple_of,
        minimum=max(1, math.ceil(rules.minimum / rules.multiple_of) * rules.multiple_of),
        square=rules.square,
        tiles=found.tiling == package.ModelTiling.SUPPORTED,
        half=tuple(name for ok, name in safe if ok),
    )
    run = found._call_fn

    def call(net: nn.Module, x: Tensor) -> Tensor:
        out: Tensor = run(net, x)
        return out

    net = found.model.eval().requires_grad_(False)  # noqa: FBT003
    return OpenedNetwork(net, facts, call, single=True)

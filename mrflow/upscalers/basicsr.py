"""Networks of BasicSR's registry, from an option file and a checkpoint (extra `[basicsr]`)."""

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, cast

import torch

from mrflow._checks import check_whole, is_whole
from mrflow.checkpoints.safetensors import some
from mrflow.errors import PlanError, ResourceError, WeightsError
from mrflow.records.files import FileNamed
from mrflow.upscalers.network import Network, NetworkFacts, OpenedNetwork, Precision, check_settings
from mrflow.upscalers.torchvision_shim import use_shim
from mrflow.upscalers.weights import misfits, read_state


@dataclass(frozen=True)
class BasicSR(FileNamed, Network):
    """Any network registered in basicsr's `ARCH_REGISTRY`, yours too, as an option file's `network_g` describes it.

    `options` is a BasicSR option file (YAML) with `scale` and `network_g`; `weights` a checkpoint that BasicSR wrote,
    by default the file that its `path: pretrain_network_g` names. `param_key_g` there chooses among `params` and
    `params_ema`. BasicSR keeps no rules for sizes: pictures are padded to multiples of `multiple` (4, and the options'
    `window_size` by default). A network of your own must be registered before: call `basicsr_package()`, then import
    its module.

    Raises:
        PlanError: basicsr is not installed, or the options name no network that it knows or do not fit it.
        WeightsError: a file is missing, unsafe or broken, or the weights do not fit the network.
    """

    files: ClassVar[Mapping[str, str]] = {"options": "options_sha256", "weights": "weights_sha256"}
    options: str
    weights: str = ""
    multiple: int | None = None
    options_sha256: str = ""
    weights_sha256: str = ""
    tile: int | None = None
    dtype: Precision | None = None

    def __post_init__(self) -> None:
        check_settings(self.tile, self.dtype)
        if self.multiple is not None:
            check_whole("an upscaler's multiple", self.multiple, 1, 1024)
        where = self.find_file("options", self.options)
        self.find_file("weights", self.weights or _pretrained(where))
        _ = self.network

    @property
    def network(self) -> OpenedNetwork:
        """The network, read once."""
        return _open(self.options, self.weights, self.options_sha256, self.weights_sha256, self.multiple)


def basicsr_package() -> Any:  # noqa: ANN401
    """The package, imported past what newer torchvisions took away (`torchvision_shim`).

    After this, `import basicsr` works everywhere in the process: to register a network of your own, call this first.

    Raises:
        PlanError: it is not installed, or cannot be imported.
    """
    try:
        with use_shim(), warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # it is from 2022, and so are the names it imports
            import basicsr  # type: ignore  # pyright: ignore
    except ImportError as error:
        raise PlanError(
            f"this network needs basicsr, which cannot be imported ({error}): pip install 'mrflow[basicsr]'"
        ) from None
    return cast(Any, basicsr)


def _read_options(path: Path) -> dict[str, Any]:
    import yaml  # type: ignore[import-untyped]

    try:
        value: object = yaml.safe_load(path.read_text("utf-8"))
    except OSError as error:
        raise ResourceError(f"{path} cannot be read: {error.strerror or error}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise PlanError(f"{path} is not an option file in YAML: {error}") from None
    options = cast("dict[str, Any]", value) if isinstance(value, dict) else {}
    network = options.get("network_g")
    if not isinstance(network, dict) or not isinstance(cast("dict[str, Any]", network).get("type"), str):
        raise PlanError(f"{path} has no network_g with a type; a BasicSR option file has")
    return options


def _pretrained(path: Path) -> str:
    paths = _read_options(path).get("path")
    found = cast("dict[str, Any]", paths).get("pretrain_network_g") if isinstance(paths, dict) else None
    if not isinstance(found, str):
        raise PlanError(f"{path} names no weights (path: pretrain_network_g); give them, BasicSR(options, weights)")
    beside = path.parent / found
    return str(beside if beside.is_file() else found)


@lru_cache(maxsize=16)
def _open(options: str, weights: str, options_sha256: str, weights_sha256: str, multiple: int | None) -> OpenedNetwork:
    table = _read_options(Path(options))
    settings = dict(cast("dict[str, Any]", table["network_g"]))
    kind = str(settings.pop("type"))
    scale = table.get("scale", settings.get("scale", settings.get("upscale", settings.get("upscale_factor"))))
    if not is_whole(scale, 1, 16):
        raise PlanError(f"{options} must give the scale, a whole number from 1 to 16, got {scale!r}")
    basicsr_package()
    from basicsr.utils.registry import ARCH_REGISTRY  # type: ignore  # pyright: ignore

    registry = cast(Any, ARCH_REGISTRY)
    name = next((n for n in (kind, f"{kind}_basicsr") if n in registry), None)
    if name is None:
        raise PlanError(
            f"{options}: basicsr has no network {kind!r}; it has {', '.join(sorted(registry.keys()))}. Register your "
            "own with ARCH_REGISTRY before, after basicsr_package()"
        )
    try:
        net = registry.get(name)(**settings)
    except (TypeError, ValueError, AssertionError, KeyError) as error:
        raise PlanError(f"{options}: network_g does not fit {kind}: {error}") from None
    paths = table.get("path")
    key = cast("dict[str, Any]", paths).get("param_key_g") if isinstance(paths, dict) else None
    state = read_state(Path(weights), first=str(key) if key else None)
    if problems := misfits(state, net):
        raise WeightsError(f"{weights} does not fit {kind}: {len(problems)} problems: {some(problems)}")
    net.load_state_dict(state)
    net = net.to(torch.float32).eval().requires_grad_(False)  # noqa: FBT003
    window = settings.get("window_size", 1)
    own = math.lcm(4, window) if isinstance(window, int) and window > 0 else 4
    return OpenedNetwork(net, NetworkFacts(scale=scale, multiple=multiple or own))

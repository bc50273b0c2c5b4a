"""What large models share as backbones: phases of memory, folding, compiling, graphs, the autoencoder in tiles."""

import copy
import math
import re
import threading
from abc import abstractmethod
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any, ClassVar, Protocol, TypeVar, cast, runtime_checkable

import torch
from torch import Tensor, nn

from mrflow.backbone import Condition
from mrflow.checkpoints.adapters import Lora, PiFlow
from mrflow.checkpoints.hub import located_folder
from mrflow.checkpoints.safetensors import Header, compute_dtype, mapped_files
from mrflow.display.notes import note
from mrflow.errors import PlanError
from mrflow.machine.failures import is_out_of_memory
from mrflow.model_info import Architecture, Footprint, LatentSpace, ModelInfo, Shift
from mrflow.models import lora, piflow
from mrflow.models.block_runner import BlockRunner
from mrflow.models.blocks import Transformer
from mrflow.models.cuda_graphs import CudaGraph, GraphPool
from mrflow.models.fields import step as whole_step
from mrflow.models.fp8 import multiply_fp8
from mrflow.models.kernels import compile_kernels, fused_kernels
from mrflow.models.kl import KLAutoencoder, channels_last
from mrflow.models.offload import (
    BlockOffloader,
    Ledger,
    OffloadManager,
    Phase,
    RuntimeOptions,
    WeightGroup,
    module_tensors,
    watch,
)
from mrflow.models.piflow import Policies
from mrflow.models.transformer_model import TransformerModel
from mrflow.models.wide import widen, widen_autoencoder
from mrflow.protocols.upscaler import Upscaler
from mrflow.tiling import in_tiles

_ADAPTING = threading.RLock()  # adapters are read once, whichever thread asks first
TILE = 64  # latent cells a side, where the autoencoder works in tiles
DIRECT = RuntimeOptions()


@runtime_checkable
class Autoencoder(Protocol):
    """Pictures in [0, 1] to normalised latents and back."""

    @property
    def params(self) -> Any: ...  # noqa: ANN401
    def moments(self, pixels: Tensor) -> Tensor: ...
    def posterior(self, moments: Tensor, noise: Tensor | None = None) -> Tensor: ...
    def decode(self, latents: Tensor) -> Tensor: ...


@runtime_checkable
class TextEncoder(Protocol):
    """Networks that encode prompts."""

    def modules(self) -> list[nn.Module]: ...
    def layers(self) -> list[nn.Module]: ...


Text = TypeVar("Text")
Model = TypeVar("Model", bound="LatentModel")


class LatentModel(TransformerModel):
    """A transformer, an autoencoder and perhaps text encoders. A family adds `condition` and `make_field`.

    `step` is one evaluation of its network: from tokens, text, rotations and modulations to the velocity's tokens.
    """

    step: ClassVar[Callable[..., Tensor]] = staticmethod(whole_step)

    def __init__(
        self,
        *,
        flow: Transformer,
        vae: nn.Module,
        text: object | None,
        info: ModelInfo,
        device: torch.device,
        runtime: RuntimeOptions = DIRECT,
        upscaler: Upscaler | None = None,
    ) -> None:
        assert isinstance(vae, Autoencoder)
        self._net: Transformer = flow
        self._vae: Autoencoder = vae
        self._words = text
        self._info, self._device, self._runtime, self._upscaler = info, device, runtime, upscaler
        self.ledger = Ledger()
        for module in (flow, vae):
            module.eval().requires_grad_(False)  # noqa: FBT003
        if device.type == "cpu":
            widen_autoencoder(vae)
        channels_last(vae)
        files = mapped_files((flow, vae, *(text.modules() if isinstance(text, TextEncoder) else ())))
        if not runtime.compile:
            layers = text.layers() if isinstance(text, TextEncoder) else ()
            watch((*flow.stack(), *flow.modulators(), *layers), files)
        self._offload = OffloadManager(self._phases(flow, vae), moving=runtime.offload != "none", files=files)
        if runtime.compute == "fp8":
            multiply_fp8(flow, flow.modulators())
        if device.type == "cpu":
            widen(flow)
        if runtime.kernels:
            flow.ops, norms = fused_kernels(device)
            if isinstance(vae, KLAutoencoder):  # a family's own may be another network
                vae.use(norms)
        if runtime.compile:
            flow.ops = compile_kernels("inductor" if runtime.compile is True else runtime.compile)
        self._graphs = runtime.graphs and device.type == "cuda" and runtime.offload == "none"
        self._adapted = dict[object, LatentModel]()
        self._policies: dict[object, Policies] = {}
        self._wire()

    def _wire(self) -> None:
        """What runs the network: whole, and in pieces."""
        net, step = self._net, type(self).step
        pool = GraphPool() if self._graphs else None
        self._step: Callable[..., Tensor] = partial(step, net) if pool is None else CudaGraph(partial(step, net), pool)
        self._pieces = BlockRunner(net, graphs=pool)

    def with_loras(self: "Model", loras: Sequence[Lora]) -> "Model":
        """The same model with these adapters on top: all weights are shared, and none is changed.

        The last two sets that were asked for are kept, on the device.

        Raises:
            WeightsError: a file is missing, holds no LoRA, or does not fit.
        """
        key = (lora.key_of(loras), tuple(each.skip_text for each in loras))
        with _ADAPTING:
            if (known := self._adapted.get(key)) is not None:
                return cast("Model", known)
            net = self._net
            changed = lora.changes(net, loras, self._info.name)
            self._check_changes(changed)
            own = lora.adapt(net, changed, dtype=net.dtype, device=self._device)
            other = self._variant(own, lora.mark_of(loras))
            while len(self._adapted) > 1:
                self._adapted.pop(next(iter(self._adapted)))
            self._adapted[key] = other
            return other

    @abstractmethod
    def conditioning_vector(self, cond: Condition, sigma: float, *, guidance: float | None = None) -> Tensor:
        """What every modulation starts from at a level: (b, width)."""

    def policies(self, adapter: PiFlow, loras: Sequence[Lora]) -> Policies:
        """The same model with a pi-Flow adapter, and perhaps LoRAs, on top; the last one that was asked for is kept.

        Raises:
            WeightsError: a file is missing or does not fit.
        """
        file, digest = located_folder(adapter.path, adapter.sha256)
        key = ("pi-Flow", digest, lora.key_of(loras))
        with _ADAPTING:
            if (known := self._policies.get(key)) is not None:
                return known
            net = self._net
            head = piflow.read_head(file, net, device=self._device)
            low = piflow.lora_of(file)
            changed = lora.changes(net, (*loras, *([low] if low else [])), self._info.name, beside=head.names)
            self._check_changes({**changed, **head.modules})
            wrapped = {p: c for p, c in changed.items() if p not in head.modules}
            whole = lora.adapt(net, wrapped, dtype=net.dtype, device=self._device)
            mark = f"+piflow-{digest[:12]}{lora.mark_of(loras)}"
            other = self._variant(lora.graft(whole, head.modules), mark)
            made = piflow.Policies(other, head)
            self._policies.clear()
            self._policies[key] = made
            return made

    def _variant(self: "Model", net: Transformer, mark: str) -> "Model":
        """This model with another network, which shares its weights; `mark` is added to the version."""
        if self._device.type == "cpu":
            widen(net)
        other = copy.copy(self)
        other._net = net
        other._info = replace(self._info, version=self._info.version + mark)
        other._adapted, other._policies = {}, {}
        other._wire()
        return other

    def _check_changes(self, changed: Mapping[str, object]) -> None:
        """Refuse adapters of what this model cannot change."""

    def _phases(self, flow: nn.Module, vae: nn.Module) -> dict[str, Phase]:
        """Text encoders are one phase, transformer and autoencoder the other."""
        runtime = self._runtime

        def part(*modules: nn.Module, without: Sequence[nn.Module] = (), pin: bool = False) -> WeightGroup:
            return WeightGroup(modules, self._device, self.ledger, without=without, pin=pin)

        def streamed(modules: Sequence[nn.Module], without: Sequence[nn.Module] = ()) -> BlockOffloader:
            return BlockOffloader([(m, part(m, without=without, pin=True)) for m in modules], self._device)

        modulators = list(self._net.modulators())
        apart: list[nn.Module] = []
        offloaders: list[BlockOffloader] = []
        if runtime.offload == "block" or (runtime.offload == "phase" and runtime.fold):
            offloaders.append(streamed(modulators))
            apart += modulators
        if runtime.offload == "block":
            offloaders.append(streamed(self._net.stack(), without=modulators))
            apart += self._net.stack()
        phases = {"main": Phase([part(flow, vae, without=apart)], offloaders)}
        if isinstance(self._words, TextEncoder):
            layers = self._words.layers() if runtime.offload == "block" else []
            rest = part(*self._words.modules(), without=layers)
            phases["text"] = Phase([rest], [streamed(layers)] if layers else [])
        return phases

    @property
    def upscaler(self) -> Upscaler | None:
        """The super-resolution net it was given, if any."""
        return self._upscaler

    def _encoder(self, kind: type[Text]) -> Text:
        """The text encoders, or PlanError where there are none."""
        if not isinstance(self._words, kind):
            raise PlanError(
                f"{self._info.name} was loaded without text encoders: say where they are, load(..., text=folder), or "
                "give encoded prompts, run(..., condition=Condition.load(file))"
            )
        return self._words

    def encode(self, pixels: Tensor, noise: Tensor | None = None) -> Tensor:
        """Latents of the posterior's mode, or a sample of it."""
        x = pixels.contiguous(memory_format=torch.channels_last)
        moments = self._in_tiles(self._vae.moments, x, down=self._vae.params.downscale)
        return self._vae.posterior(moments, noise).contiguous()

    def decode(self, latents: Tensor) -> Tensor:
        """Pixels, clamped."""
        x = latents.contiguous(memory_format=torch.channels_last)
        out = self._in_tiles(self._vae.decode, x, up=self._vae.params.downscale)
        return out.clamp_(0, 1).contiguous()

    def _in_tiles(self, f: Callable[[Tensor], Tensor], x: Tensor, *, up: int = 1, down: int = 1) -> Tensor:
        """f(x), whole or in tiles; in tiles too when the whole does not fit into memory. `down`: x is pixels."""
        tile = self._runtime.tile
        with self._offload.using("main"):
            if tile is None:
                try:
                    return f(x)
                except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is a RuntimeError
                    if not is_out_of_memory(error) or max(x.shape[-2:]) <= TILE * down:
                        raise
                # Outside the handler, where what the failed call had made is free again.
                tile = TILE
                h, w = (side * up for side in x.shape[-2:])
                note(f"the autoencoder ran out of memory at {h}x{w}; it works in tiles of {TILE * up * down} pixels")
                if self._device.type == "cuda":
                    torch.cuda.empty_cache()
            overlap = max(8, tile // 4 // 8 * 8)
            return in_tiles(f, x, tile=tile * down, overlap=overlap * down, up=up, down=down)


def encoded_once(prompts: Sequence[str], encode: Callable[[list[str]], dict[str, Tensor]]) -> dict[str, Tensor]:
    """What `encode` gives for each prompt, with equal prompts encoded once."""
    different = list(dict.fromkeys(prompts))
    tensors = encode(different)
    if len(different) == len(prompts):
        return tensors
    rows = [different.index(prompt) for prompt in prompts]
    return {name: tensor[rows] for name, tensor in tensors.items()}


def footprint(flow: Transformer, vae: nn.Module, text: object | None, **values: float) -> Footprint:
    """Bytes of each part as loaded, for predictions of memory; `values` are those of `Footprint`."""
    modulators = [bytes_of(m) for m in flow.modulators()]
    inside = {id(t) for m in flow.modulators() for t in module_tensors(m)}
    blocks = [bytes_of(block, without=inside) for block in flow.stack()]
    layers, whole_text = list[int](), 0
    if isinstance(text, TextBytes):
        layers, whole_text = list(text.layers), text.whole
    elif isinstance(text, TextEncoder):
        layers = [bytes_of(layer) for layer in text.layers()]
        whole_text = sum(bytes_of(m) for m in text.modules())
    return Footprint(
        rest=bytes_of(flow) - sum(modulators) - sum(blocks),
        modulation=sum(modulators),
        modulation_pair=largest_pair(modulators),
        blocks=sum(blocks),
        block_pair=largest_pair(blocks),
        autoencoder=bytes_of(vae),
        text=whole_text - sum(layers),
        text_layers=sum(layers),
        text_pair=largest_pair(layers),
        **values,
    )


def latent_facts(base: ModelInfo, vae: Autoencoder, curve: Shift | None) -> ModelInfo:
    """The facts of a published model with the latents of this autoencoder, and the curve where one is given."""
    space = LatentSpace(base.space.name, vae.params.latent, vae.params.downscale)
    return replace(base, space=space, shift=curve or base.shift)


def own_facts(
    base: ModelInfo,
    net: Transformer,
    vae: Any,  # noqa: ANN401
    text: object | None,
    *,
    curve: Shift | None,
    parameters: int,
    text_tokens: int | None = None,
    **values: float,
) -> ModelInfo:
    """The facts of a published model with the sizes of these parts, and the curve and text's length where given.

    `parameters` are the transformer's, `values` those of `Footprint`.
    """
    assert base.architecture is not None
    p: Any = net.params
    double = getattr(p, "double_blocks", 0)
    tokens = text_tokens or base.architecture.text_tokens
    return replace(
        latent_facts(base, vae, curve),
        architecture=Architecture(
            p.hidden, double, len(net.stack()) - double, p.context, tokens, parameters, p.mlp_ratio
        ),
        footprint=footprint(net, vae, text, **values),
    )


@dataclass(frozen=True)
class TextBytes:
    """Bytes of text encoders that are not built: of all, and of each layer of the largest."""

    whole: int
    layers: tuple[int, ...]


def text_bytes(headers: Sequence[Header], layer: str) -> TextBytes:
    """What text encoders will take, from their headers; the layers are those of the last, `{layer}.0.` and so on."""
    whole, layers = 0, dict[int, int]()
    for header in headers:
        kept = compute_dtype(header).itemsize
        for name, entry in header.tensors.items():
            size = math.prod(entry.shape) * kept
            whole += size
            found = re.search(rf"(?:^|\.){layer}\.(\d+)\.", name)
            if found and header is headers[-1]:
                layers[int(found[1])] = layers.get(int(found[1]), 0) + size
    return TextBytes(whole, tuple(layers[i] for i in sorted(layers)))


def largest_pair(sizes: Sequence[int]) -> int:
    """The most that two neighbours take together."""
    return max((a + b for a, b in pairwise((*sizes, 0))), default=0)


def bytes_of(module: nn.Module, *, without: Container[int] = ()) -> int:
    """Bytes of parameters and buffers, each counted once; `without` are ids of tensors to leave out."""
    return sum(t.nbytes for t in {id(t): t for t in module_tensors(module) if id(t) not in without}.values())


def count_parameters(module: nn.Module) -> int:
    """Parameters."""
    return sum(p.numel() for p in module.parameters())

"""FLUX.1 as a backbone: text encoders, transformer and autoencoder behind the four methods that stages use."""

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mrflow.backbone import Condition
from mrflow.errors import PlanError, WeightsError
from mrflow.flow import Velocity
from mrflow.models.field import FluxField, Step, step
from mrflow.models.flux import Flux
from mrflow.models.graphs import Graphed
from mrflow.models.memory import Conveyor, Ledger, Part, Phase, Residency, Ways, tensors_of
from mrflow.models.tiling import tiled
from mrflow.models.vae_flux import VaeFlux
from mrflow.notes import note
from mrflow.spec import FLUX, SCHNELL, Architecture, Footprint, LatentSpace, ModelInfo, Shift
from mrflow.upscalers import Upscaler

if TYPE_CHECKING:
    from mrflow.models.text import ClipT5

TILE = 64  # latent cells a side, where the autoencoder works in tiles
DIRECT = Ways()
CPU_OUT_OF_MEMORY = ("not enough memory", "can't allocate memory")


class Flux1:
    """FLUX.1-dev, -schnell, or a model of their architecture. Build it with `mrflow.load`."""

    def __init__(
        self,
        *,
        flow: Flux,
        vae: VaeFlux,
        text: "ClipT5 | None",
        info: ModelInfo,
        device: torch.device,
        ways: Ways = DIRECT,
        upscaler: Upscaler | None = None,
    ) -> None:
        self._flow, self._vae, self._text = flow.eval(), vae.eval(), text
        self._info, self._device, self._ways, self._upscaler = info, device, ways, upscaler
        self.ledger = Ledger()
        for module in (flow, vae):
            module.requires_grad_(False)  # noqa: FBT003
        for p in vae.parameters():
            if p.ndim == 4 and p.shape[-1] > 1:
                p.data = p.data.contiguous(memory_format=torch.channels_last)
        self._residency = Residency(self._phases(), moving=ways.offload != "none")
        if ways.compile:
            backend: Any = "inductor" if ways.compile is True else ways.compile
            for block in (*flow.double_blocks, *flow.single_blocks):
                block.compile(backend=backend, dynamic=False)
        graphs = ways.graphs and device.type == "cuda" and ways.offload == "none"
        self._step: Step = Graphed(partial(step, flow)) if graphs else partial(step, flow)

    def _phases(self) -> dict[str, Phase]:
        """Text encoders are one phase, transformer and autoencoder the other."""
        flow, ways = self._flow, self._ways

        def part(*modules: nn.Module, without: Sequence[nn.Module] = (), pin: bool = False) -> Part:
            return Part(modules, self._device, self.ledger, without=without, pin=pin)

        def conveyor(modules: Sequence[nn.Module], without: Sequence[nn.Module] = ()) -> Conveyor:
            return Conveyor([(m, part(m, without=without, pin=True)) for m in modules], self._device)

        blocks = [*flow.double_blocks, *flow.single_blocks]
        modulators = list(flow.modulators())
        apart: list[nn.Module] = []
        conveyors: list[Conveyor] = []
        if ways.offload == "block" or (ways.offload == "phase" and ways.fold):
            conveyors.append(conveyor(modulators))
            apart += modulators
        if ways.offload == "block":
            conveyors.append(conveyor(blocks, without=modulators))
            apart += blocks
        phases = {"main": Phase([part(flow, self._vae, without=apart)], conveyors)}
        if self._text is not None:
            layers = self._text.layers() if ways.offload == "block" else []
            rest = part(*self._text.modules(), without=layers)
            phases["text"] = Phase([rest], [conveyor(layers)] if layers else [])
        return phases

    @property
    def info(self) -> ModelInfo:
        """Facts, with the version of these weights."""
        return self._info

    @property
    def device(self) -> torch.device:
        """Where latents and pixels live."""
        return self._device

    @property
    def upscaler(self) -> Upscaler | None:
        """The super-resolution net it was given, if any."""
        return self._upscaler

    takes_levels = True

    @property
    def transformer(self) -> Flux:
        """The network itself: `embed`, `blocks`, `head` and `attention` are open to wrappers."""
        return self._flow

    def condition(self, prompts: Sequence[str]) -> Condition:
        """T5 states (b, text tokens, context) and CLIP's pooled vector (b, pooled); equal prompts are encoded once."""
        if self._text is None:
            raise PlanError(
                f"{self._info.name} was loaded without text encoders: say where they are, load(..., text=folder), or "
                "give encoded prompts, run(..., condition=Condition.load(file))"
            )
        assert self._info.architecture is not None
        different = list(dict.fromkeys(prompts))
        with self._residency.using("text"):
            context, pooled = self._text(different, length=self._info.architecture.text_tokens)
        if len(different) < len(prompts):
            rows = torch.tensor([different.index(p) for p in prompts], device=context.device)
            context, pooled = context[rows], pooled[rows]
        return Condition({"context": context, "pooled": pooled})

    def field(
        self, cond: Condition, *, guidance: float | None = None, levels: Sequence[float] | None = None
    ) -> Velocity:
        """The velocity of the flow; with `levels`, the sigmas it will be asked for, their modulations come first."""
        p = self._flow.params
        if guidance is not None and not p.guidance:
            raise PlanError(f"{self._info.name} has no guidance embedding; use CFG(scale)")
        context, pooled = self._checked(cond)
        value = self._info.guidance if guidance is None else guidance
        strength = None if value is None else torch.full((cond.batch,), value, device=self._device)
        announced = (levels or ()) if self._ways.fold else None
        using = partial(self._residency.using, "main")
        return FluxField(self._flow, context, pooled, strength, levels=announced, step=self._step, using=using)

    def _checked(self, cond: Condition) -> tuple[Tensor, Tensor]:
        """The condition's tensors on the device, if they are of this model's sizes."""
        p = self._flow.params
        names = set(cond.tensors)
        if not {"context", "pooled"} <= names:
            raise PlanError(f"{self._info.name} needs a condition with context and pooled, got {sorted(names)}")
        context, pooled = cond["context"], cond["pooled"]
        if (
            context.ndim != 3
            or context.shape[-1] != p.context
            or context.shape[1] == 0
            or pooled.shape[1:] != (p.pooled,)
        ):
            raise PlanError(
                f"{self._info.name} needs context (batch, tokens, {p.context}) and pooled (batch, {p.pooled}), got "
                f"{tuple(context.shape)} and {tuple(pooled.shape)}; was the prompt encoded for another model?"
            )
        return context.to(self._device), pooled.to(self._device)

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
        tile = self._ways.tile
        with self._residency.using("main"):
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
            return tiled(f, x, tile=tile * down, overlap=overlap * down, up=up, down=down)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out, on a GPU or a CPU."""
    full = isinstance(error, MemoryError | torch.OutOfMemoryError)
    return full or any(words in str(error) for words in CPU_OUT_OF_MEMORY)


def flux1_info(
    flow: Flux, vae: VaeFlux, text: "ClipT5 | None", scheduler: Mapping[str, Any], *, version: str, path: object
) -> ModelInfo:
    """Facts of a loaded model: FLUX.1-dev's or -schnell's, told apart by the guidance embedding, with its own sizes."""
    p = flow.params
    base = FLUX if p.guidance else SCHNELL
    if p.in_channels != 4 * vae.params.latent or p.out_channels != p.in_channels:
        raise WeightsError(
            f"{path} takes {p.in_channels} channels a token and gives {p.out_channels}, its autoencoder has "
            f"{4 * vae.params.latent}: models with an image condition (Fill, Canny, Depth) are not supported"
        )
    assert base.architecture is not None
    architecture = Architecture(
        p.hidden, p.double_blocks, p.single_blocks, p.context, base.architecture.text_tokens, count(flow), p.mlp_ratio
    )
    return replace(
        base,
        space=LatentSpace("flux1", vae.params.latent, vae.params.downscale),
        shift=shift_of(scheduler, path) or base.shift,
        architecture=architecture,
        footprint=footprint(flow, vae, text),
        version=version,
    )


def footprint(flow: Flux, vae: nn.Module, text: "ClipT5 | None") -> Footprint:
    """Bytes of each part as loaded, for predictions of memory."""
    modulators = [bytes_of(m) for m in flow.modulators()]
    inside = {id(t) for m in flow.modulators() for t in tensors_of(m)}
    blocks = [bytes_of(block, without=inside) for block in (*flow.double_blocks, *flow.single_blocks)]
    layers = [bytes_of(layer) for layer in text.layers()] if text is not None else []
    whole_text = sum(bytes_of(m) for m in text.modules()) if text is not None else 0
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
    )


def largest_pair(sizes: Sequence[int]) -> int:
    """The most that two neighbours take together."""
    return max((a + b for a, b in pairwise((*sizes, 0))), default=0)


def bytes_of(module: nn.Module, *, without: Container[int] = ()) -> int:
    """Bytes of parameters and buffers, each counted once; `without` are ids of tensors to leave out."""
    return sum(t.nbytes for t in {id(t): t for t in tensors_of(module) if id(t) not in without}.values())


def count(module: nn.Module) -> int:
    """Parameters."""
    return sum(p.numel() for p in module.parameters())


def shift_of(scheduler: Mapping[str, Any], path: object) -> Shift | None:
    """The timestep shift that a repository's scheduler_config.json states."""
    if not scheduler:
        return None
    try:
        if scheduler.get("use_dynamic_shifting"):
            return Shift(
                float(scheduler["base_shift"]),
                float(scheduler["max_shift"]),
                int(scheduler["base_image_seq_len"]),
                int(scheduler["max_image_seq_len"]),
            )
        return Shift.fixed(float(scheduler.get("shift", 1.0)))
    except (KeyError, TypeError, ValueError, PlanError) as error:
        raise WeightsError(f"{path}: its scheduler_config.json cannot be used: {error}") from None

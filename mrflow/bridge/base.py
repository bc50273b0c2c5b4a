"""What bridged pipelines share: where their parts run, the autoencoder, the facts, and that nothing is left changed."""

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from importlib import import_module
from itertools import count
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor, nn

from mrflow._checks import is_number
from mrflow.backbone import Condition, FieldOptions, Positions, join_parts, split_parts
from mrflow.bridge.blocks import BlockNames, open_forward
from mrflow.bridge.facts import check_encoders
from mrflow.bridge.version import Watch, version_of
from mrflow.display.notes import note
from mrflow.errors import MrflowError, PlanError
from mrflow.flow import Velocity
from mrflow.machine.failures import name_stage, passes, words_of
from mrflow.model_info import Capabilities, ModelInfo
from mrflow.models.encoders import check_prompt
from mrflow.models.latent_model import encoded_once
from mrflow.protocols.pieces import StepFactory
from mrflow.protocols.upscaler import Upscaler

Pipeline: TypeAlias = Any
Network: TypeAlias = Any

# Tokenizers are not safe to share between threads, nor are hooks that move weights: both take turns.
_TURN = threading.RLock()
_FIELDS = count()
# These read the step from the pipeline's own loop, which does not run here.
STEPPING_CACHES = ("PyramidAttentionBroadcastConfig", "FasterCacheConfig")


BRIDGED = Capabilities(
    cache=True,
    lora_advice="it is a diffusers pipeline: load the LoRA into it, pipe.load_lora_weights(...), or load the model "
    "with mrflow.load",
)


class Bridged(ABC):
    """A diffusers pipeline as a backbone. It holds the pipeline, copies nothing, and changes nothing in it.

    Parts are called as the pipeline calls them, so that hooks, quantisation, attention processors and adapters work. A
    subclass adds one family: `condition`, `make_field`, `encode`, `decode` and facts.
    """

    accepts: ClassVar[tuple[str, ...]]
    words: ClassVar[tuple[str, ...]] = ("text_encoder", "tokenizer")
    more_words: ClassVar[tuple[str, ...]] = ()  # a pipeline may lack these
    networks: ClassVar[tuple[str, ...]] = ("transformer", "vae", "text_encoder")
    family: ClassVar[BlockNames]
    can: ClassVar[Capabilities] = BRIDGED

    def __init__(
        self,
        pipe: Pipeline,
        *,
        guidance: float | None = None,
        text_tokens: int | None = None,
        upscaler: Upscaler | None = None,
    ) -> None:
        self.pipe = pipe
        self._guidance, self._text_tokens, self._upscaler = guidance, text_tokens, upscaler
        self._watch = Watch()
        self._known: tuple[tuple[object, ...], ModelInfo | None] = ((), None)
        for name, what in (("transformer", "a transformer"), ("vae", "a VAE"), ("scheduler", "a scheduler")):
            if getattr(pipe, name, None) is None:
                raise PlanError(f"{type(pipe).__name__} was made without {what}; load it whole, or set pipe.{name}")
        try:
            self.check_parts()
            check_encoders(pipe, self.words + self.more_words, self.widths())
            self.check_present()
            self.normal()
            self.facts()
            _ = self.device
        except MrflowError:
            raise
        except Exception as error:  # parts may be of any class
            lent = self.lent("transformer", "vae", "scheduler")
            why = f"{type(error).__name__}: {words_of(error)}"
            raise PlanError(f"{type(pipe).__name__} lends parts that are not its family's ({lent}): {why}") from error

    @abstractmethod
    def check_parts(self) -> None:
        """Raise PlanError for a transformer or autoencoder that is not of this family."""

    def check_present(self) -> None:
        """Refuse networks whose weights were never loaded, but those that accelerate's hooks bring.

        Raises:
            PlanError: naming the first of them.
        """
        for name, part in self.parts.items():
            brought = any(hasattr(m, "_hf_hook") for m in part.modules())
            if any(p.is_meta for p in part.parameters()) and not brought:
                raise PlanError(f"{type(self.pipe).__name__}'s {name} is on the meta device, without weights: load it")

    def normal(self) -> object:
        """What the configuration of the autoencoder says of how latents are normalised, if it is that which says it.

        Raises:
            PlanError: it says numbers that cannot be.
        """
        return None

    def widths(self) -> dict[str, int]:
        """How wide the transformer needs the states of each text encoder, where that is one number."""
        return {}

    def lent(self, *names: str) -> str:
        """Parts by name and class, in words."""
        return ", ".join(f"{name} {type(getattr(self.pipe, name)).__name__}" for name in names)

    @abstractmethod
    def facts(self) -> ModelInfo:
        """Facts, without version; read from the parts as they are now."""

    @abstractmethod
    def encode_words(self, prompts: list[str]) -> dict[str, Tensor]:
        """Named tensors for prompts, from the pipeline's own text encoders."""

    @abstractmethod
    def make_field(self, cond: Condition, options: FieldOptions, step: StepFactory | None) -> Velocity:
        """The velocity of the flow. `step` is given the blocks and gives the step that is taken in their place."""

    def begin(
        self,
        cond: Condition,
        options: FieldOptions,
        step: StepFactory | None,
        needs: Mapping[str, int],
        *,
        advice: str = "CFG(scale)",
    ) -> tuple[Callable[..., Any], Callable[[], Any], bool]:
        """What a field of a model without guidance embedding begins with: network, branch, and whether it has hooks.

        Raises:
            PlanError: the condition lacks what it `needs`, or guidance is asked for; `advice` names what to use.
        """
        net = self.network(step)
        check_condition(self.info, cond, needs)
        if options.guidance is not None:
            raise PlanError(f"{self.info.name} has no guidance embedding; use {advice}")
        return net, self.branch(), has_hooks(self.pipe.transformer)

    def network(self, step: StepFactory | None) -> Callable[..., Any]:
        """The transformer's forward, with a cache's step in the place of its blocks where one is given."""
        return self.pipe.transformer if step is None else open_forward(self.pipe.transformer, self.family, step)

    def check(self, options: FieldOptions) -> None:
        """Refuse what the pipeline cannot do; adapters are its own business.

        Raises:
            PlanError: naming the first of it.
        """
        self.info.require(options.needs)

    def field(self, cond: Condition, options: FieldOptions = FieldOptions()) -> Velocity:
        """The velocity of the flow.

        Raises:
            PlanError: the pipeline cannot do what is asked.
        """
        self.check(options)
        cond = self.suited(cond)
        if options.cache is not None:
            return options.cache.field(partial(self.make_field, cond, options), options.sigmas, self.info)
        return self.make_field(cond, options, None)

    def suited(self, cond: Condition) -> Condition:
        """The condition in the transformer's dtype: encoders may compute in another, and so may a saved condition."""
        dtype = self.pipe.transformer.dtype
        if not dtype.is_floating_point or dtype.itemsize == 1:
            return cond
        return Condition({k: t.to(dtype) if t.is_floating_point() else t for k, t in cond.tensors.items()})

    @abstractmethod
    def encode(self, pixels: Tensor, noise: Tensor | None = None) -> Tensor:
        """Pixels in [0, 1] to latents."""

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Latents to pixels."""

    @property
    def info(self) -> ModelInfo:
        """Facts and the version of the weights, made anew when the pipeline's parts, adapters or levels changed."""
        parts, scheduler = self.parts, self.pipe.scheduler
        # A fused LoRA is written through `.data`, which the watch cannot see; the pipeline counts what it fused.
        fused = repr((getattr(self.pipe, "_merged_adapters", None), getattr(self.pipe, "num_fused_loras", None)))
        now = self._watch(parts, fused, repr(dict(scheduler.config)), getattr(scheduler, "shift", None))
        seen, info = self._known
        if info is None or seen != now:
            with outside_inference():
                version = f"diffusers-{version_of(parts, *self.identity())}/{self.dtype_name}"
            info = replace(self.facts(), version=version, capabilities=self.can)
            self._known = (now, info)
        return info

    def identity(self) -> tuple[object, ...]:
        """What besides weights makes the pictures."""
        return (type(self).__name__, self._guidance, self._text_tokens)

    @property
    def parts(self) -> dict[str, nn.Module]:
        """The networks that make pictures, by name."""
        found = {name: getattr(self.pipe, name, None) for name in self.networks}
        return {name: part for name, part in found.items() if isinstance(part, nn.Module)}

    @property
    def dtype_name(self) -> str:
        """The transformer's dtype in words."""
        return str(self.pipe.transformer.dtype).removeprefix("torch.")

    @property
    def device(self) -> torch.device:
        """Where the pipeline computes: with offload hooks, where they bring the weights."""
        return torch.device(self.pipe._execution_device)

    @property
    def upscaler(self) -> Upscaler | None:
        """The super-resolution net it was given, if any."""
        return self._upscaler

    def condition(self, prompts: Sequence[str]) -> Condition:
        """Prompts encoded by the pipeline's own text encoders; equal prompts once.

        Raises:
            PlanError: the pipeline has no text encoder or tokenizer. PromptError: a prompt is no text.
            MrflowError: they cannot encode; it names them and what they raised.
        """
        for name in self.words:
            if getattr(self.pipe, name, None) is None:
                raise PlanError(
                    f"{type(self.pipe).__name__} was loaded without {name}: load it whole, or give encoded prompts, "
                    "run(..., condition=Condition.load(file))"
                )

        for prompt in prompts:
            check_prompt(prompt)

        def encode(different: list[str]) -> dict[str, Tensor]:
            with _TURN, outside_inference():
                self.rest()
                try:
                    return self.encode_words(different)
                except Exception as error:  # parts may be of any class
                    if isinstance(error, MrflowError) or passes(error):
                        raise
                    raise name_stage(error, f"{type(self.pipe).__name__}'s {self.lent(*self.words)}") from error

        return Condition(encoded_once(prompts, encode))

    def tell_lost(self, tokenizer: Any, texts: Sequence[str], limit: int) -> None:  # noqa: ANN401
        """Note prompts of more tokens than the model sees; what is behind is cut, as the pipeline does."""
        for text in texts:
            found = len(tokenizer(text)["input_ids"])
            if found > limit:
                note(f"a prompt of {found} tokens is cut to {limit}: the end of {text[:40]!r}... is not seen")

    def rest(self) -> None:
        """Send weights that visit the device (model offload) back, so that the next part finds it free."""
        for hook in getattr(self.pipe, "_all_hooks", ()):
            hook.offload()

    @contextmanager
    def working(self, *, moved: bool) -> Generator[None]:
        """While a part computes: not in inference mode, where what a part keeps for later would be marked for good.

        `moved` says that hooks bring weights, so that threads take turns.
        """
        with _TURN if moved else nullcontext(), outside_inference():
            yield

    def branch(self) -> Callable[[], Any]:
        """For one field: a context to call the transformer in, so that a cache switched on in it keeps branches apart.

        Raises:
            PlanError: the cache follows the pipeline's own loop.
        """
        net = self.pipe.transformer
        if not getattr(net, "is_cache_enabled", False):
            return nullcontext
        kind = type(getattr(net, "_cache_config", None)).__name__
        if kind in STEPPING_CACHES:
            raise PlanError(f"the transformer's cache ({kind}) follows the pipeline's own loop; disable_cache() first")
        net._reset_stateful_cache()
        name = f"mrflow-{next(_FIELDS)}"
        return lambda: net.cache_context(name)


class KLBridged(Bridged):
    """A family whose autoencoder is diffusers' AutoencoderKL: latent = (z - shift_factor) x scaling_factor."""

    def encode(self, pixels: Tensor, noise: Tensor | None = None) -> Tensor:
        """Latents of the posterior's mode, or a sample of it: mean + std noise."""
        scale, shift = self.normal()
        z = posterior(self, pixels, noise)
        return (z - shift) * scale

    def decode(self, latents: Tensor) -> Tensor:
        """Pixels, clamped."""
        scale, shift = self.normal()
        return decode_pixels(self, latents / scale + shift)

    def normal(self) -> tuple[float, float]:
        """scaling_factor, above 0, and shift_factor, 0 where there is none."""
        config = self.pipe.vae.config
        scale, shift = config.scaling_factor, config.get("shift_factor") or 0.0
        if not (is_number(scale, 1e-6, 1e6) and is_number(shift, -1e6, 1e6)):
            raise PlanError(
                f"the autoencoder's config must have a scaling_factor above 0 and a finite shift_factor, got {scale!r} "
                f"and {shift!r}"
            )
        return float(scale), float(shift)


def posterior(model: Bridged, pixels: Tensor, noise: Tensor | None, *, frame: bool = False) -> Tensor:
    """The autoencoder's own latents of pixels in [0, 1], float32; `frame` adds the time axis of a video model."""
    vae = model.pipe.vae
    with model.working(moved=frame or has_hooks(vae)):  # a video model keeps frames of the past in itself
        x = (2 * keepable(pixels) - 1).to(home(vae), vae.dtype)
        out = vae.encode(x[:, :, None] if frame else x)
        if (found := getattr(out, "latent_dist", None)) is None:  # AutoencoderTiny: latents without a distribution
            z: Tensor = out.latents.float()
            return (z[:, :, 0] if frame else z).to(model.device)
        mean, std = found.mean.float(), found.std.float()
        mean, std = (mean[:, :, 0], std[:, :, 0]) if frame else (mean, std)
        z = mean if noise is None else mean + std * keepable(noise).to(mean.device)
        return z.to(model.device)


def decode_pixels(model: Bridged, z: Tensor, *, frame: bool = False) -> Tensor:
    """Pixels in [0, 1] of the autoencoder's own latents."""
    vae = model.pipe.vae
    with model.working(moved=frame or has_hooks(vae)):
        x = keepable(z).to(home(vae), vae.dtype)
        out = vae.decode(x[:, :, None] if frame else x, return_dict=False)[0]
        pixels: Tensor = (out[:, :, 0] if frame else out).float()
        return (0.5 * pixels + 0.5).clamp(0, 1).to(model.device)


@contextmanager
def outside_inference() -> Generator[None]:
    """Without gradients, but not in inference mode."""
    with torch.inference_mode(False), torch.no_grad():  # noqa: FBT003
        yield


def keepable(x: Tensor) -> Tensor:
    """A tensor that modules may keep: one made in inference mode is copied."""
    return x.clone() if x.is_inference() else x


def home(module: Network) -> torch.device:
    """The device that a part's inputs must be on, hooks considered."""
    found: torch.device = import_module("diffusers.utils.torch_utils").get_module_execution_device(module)
    return found


def has_hooks(module: Network) -> bool:
    """Whether calling a part moves weights."""
    return any(hasattr(m, "_hf_hook") or hasattr(m, "_diffusers_hook") for m in module.modules())


def thousandths(sigma: float, batch: int, device: torch.device) -> Tensor:
    """A noise level as diffusers' scheduler gives it to a pipeline: 1000 sigma, rounded to float32 before and after."""
    return torch.full((batch,), sigma, dtype=torch.float32, device=device) * 1000


def check_condition(info: ModelInfo, cond: Condition, needs: Mapping[str, int]) -> Condition:
    """The condition, if it has these tensors; `needs` are their last axes (0: any)."""
    if not set(needs) <= set(cond.tensors):
        raise PlanError(f"{info.name} needs a condition with {', '.join(needs)}, got {sorted(cond.tensors)}")
    for name, width in needs.items():
        if width and cond[name].shape[-1] != width:
            raise PlanError(
                f"{info.name} needs {name} of width {width}, got {tuple(cond[name].shape)}; was the prompt encoded for "
                "another model?"
            )
    return cond


def in_parts(
    one: Callable[[Tensor, float, int, int, int], Tensor], positions: Positions | None, batch: int
) -> Callable[[Tensor, float, int, int], Tensor]:
    """A velocity of h x w tokens (batch, h w, d) from that of each part of them, `one(part, sigma, h, w, number)`."""

    def velocity(tokens: Tensor, sigma: float, h: int, w: int) -> Tensor:
        check_batch(tokens, batch)
        parts = enumerate(split_parts(positions, tokens))
        return join_parts([one(part, sigma, h, part.shape[1] // h, i) for i, part in parts])

    return velocity


def check_batch(x: Tensor, batch: int) -> None:
    """Refuse latents and a condition of different batches."""
    if x.shape[0] != batch:
        raise PlanError(f"latents for {x.shape[0]} pictures met a condition for {batch}")

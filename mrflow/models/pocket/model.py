"""`pocket`, the embedded default model: a FLUX-architecture flow transformer small enough for a laptop's processor.

It knows a small world (mrflow/scenes) and comes with everything in one file of half-precision weights: text encoder,
transformer, autoencoder and x2 super-resolution net. The model card is beside it.
"""

import copy
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from mrflow.backbone import Condition, FieldOptions
from mrflow.checkpoints.adapters import Lora
from mrflow.checkpoints.blueprint import blueprint
from mrflow.checkpoints.lora import read_adapter
from mrflow.checkpoints.safetensors import Header, check_layout, fill_module, read_header
from mrflow.errors import PlanError, WeightsError
from mrflow.flow import Velocity
from mrflow.model_info import EVERYTHING, Architecture, Footprint, LatentSpace, ModelInfo, Shift
from mrflow.models import lora
from mrflow.models.block_runner import BlockRunner
from mrflow.models.encoders import check_prompt
from mrflow.models.fields import step as flux_step
from mrflow.models.flux.field import FluxField
from mrflow.models.flux.transformer import Flux, FluxParams
from mrflow.models.headers import layout_by_name
from mrflow.models.kl import channels_last
from mrflow.models.pocket.networks import CompactSR, PocketAutoencoder, PocketTextEncoder, tokenise
from mrflow.models.transformer_model import TransformerModel, repeat, side_by_side
from mrflow.protocols.pieces import StepFactory
from mrflow.protocols.upscaler import Upscaler
from mrflow.scenes import grammar, hard
from mrflow.scenes.grammar import COLOURS, EXPRESSIONS, LETTERS, NUMBERS, PLACES, SHAPES, TEXTURES, plural

log = logging.getLogger(__name__)

WIDTH, HEAD, TEXT_LENGTH = 192, 64, 12
VOCABULARY: tuple[str, ...] = (
    "",
    *SHAPES,
    *(plural(shape) for shape in SHAPES),
    *COLOURS,
    *NUMBERS,
    *PLACES,
    "above",
    "below",
    "big",
    "small",
    "medium",
    "coarse",
    "fine",
    *EXPRESSIONS,
    "face",
    "word",
    *TEXTURES,
    *LETTERS,
)
"""The words of versions 1 to 3; a later version's tokens begin with these."""
WORDS, LONG_TEXT = (*VOCABULARY, *hard.VOCABULARY), 40  # of pocket-4
FOOTPRINT = Footprint(
    rest=889_600,
    modulation=6_077_184,
    modulation_pair=1_778_688,
    blocks=15_988_224,
    block_pair=7_107_584,
    autoencoder=7_423_104 + 769_152,  # and the super-resolution net
    text=3_628_800,
    encode_values=21.0,
    decode_values=12.75,
)
BASE = ModelInfo(
    "pocket",
    LatentSpace("pocket"),
    Shift(0.7, 1.4, 256, 1024),
    cfg=2.0,
    size=(512, 512),
    low=(256, 256),
    architecture=Architecture(WIDTH, 2, 5, WIDTH, TEXT_LENGTH, 5_738_752),
    upscale=2,
    upscale_flops=95_904,
    encode=(32_704, 0),
    decode=(51_136, 0),
    footprint=FOOTPRINT,
    capabilities=replace(EVERYTHING, policy=False),
    sides=(128, 256, 512),
)
"""The facts of a file of this width that says nothing else of itself and knows `VOCABULARY` alone."""
SMALL = replace(
    BASE,
    sides=(64, 128, 256),
    shift=Shift(0.0, 0.7, 64, 256),
    size=(256, 256),
    low=(128, 128),
    architecture=Architecture(128, 2, 5, 128, TEXT_LENGTH, 2_572_288),
    footprint=replace(
        FOOTPRINT,
        rest=462_080,
        modulation=2_707_968,
        modulation_pair=792_576,
        blocks=7_119_104,
        block_pair=3_165_184,
        text=1_632_768,
    ),
)
"""The facts of a narrower model of half the sizes; none such is embedded, but it trains in minutes."""
BY_WIDTH = {128: SMALL, WIDTH: BASE}


def with_metadata(known: ModelInfo, said: Mapping[str, str], words: int, length: int) -> ModelInfo:
    """Facts with what a file's metadata say, and a text encoder of so many words and tokens."""
    assert known.architecture is not None and known.footprint is not None
    more = (words - len(VOCABULARY) + length - TEXT_LENGTH) * known.architecture.context * 4
    large, small = (int(said.get(name, 0)) for name in ("size", "low"))
    return replace(
        known,
        cfg=float(said.get("cfg", known.cfg)),
        architecture=replace(known.architecture, text_tokens=length),
        footprint=replace(known.footprint, text=known.footprint.text + more),
        size=(large, large) if large else known.size,
        low=(small, small) if small else known.low,
        sides=tuple(map(int, said["sides"].split())) if "sides" in said else known.sides,
    )


SAID = {"cfg": "2", "size": "128", "low": "64", "sides": "64 128 256"}
POCKET = with_metadata(BASE, SAID, len(WORDS), LONG_TEXT)
"""The facts of the newest version, as its file says them."""


def pocket_params(width: int = WIDTH, head: int = HEAD) -> FluxParams:
    """Sizes of the transformer at a width, with heads of so many channels: a quarter of them does not turn."""
    return FluxParams(
        in_channels=64,
        out_channels=64,
        context=width,
        pooled=width,
        hidden=width,
        heads=width // head,
        axes=(head // 4, 3 * head // 8, 3 * head // 8),
        double_blocks=2,
        single_blocks=5,
        guidance=False,
    )


def dtype_mark(dtype: torch.dtype) -> str:
    """What a dtype other than float32 adds to a version."""
    return "" if dtype == torch.float32 else f"/{dtype}".replace("torch.", "")


class PocketSR(Upscaler):
    """The model's own x2 net: pictures of this world, enlarged."""

    def __init__(self, net: CompactSR, version: str) -> None:
        self.net, self.version = net, version

    @property
    def scale(self) -> int:
        """Twice each side."""
        return 2

    @property
    def flops_per_pixel(self) -> float:
        """As the facts of planning say."""
        return POCKET.upscale_flops

    def __call__(self, pixels: Tensor) -> Tensor:
        """Enlarge; not clamped."""
        out: Tensor = self.net(pixels)
        return out


class Pocket(TransformerModel):
    """The embedded model as a backbone. Build it with `mrflow.load("pocket")`."""

    def __init__(
        self,
        *,
        text: PocketTextEncoder,
        flow: Flux,
        autoencoder: PocketAutoencoder,
        sr: CompactSR,
        version: str,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        info: ModelInfo = POCKET,
    ) -> None:
        self._text = text.to(device).eval()
        self.transformer = flow.to(device, dtype).eval()
        self._autoencoder = channels_last(autoencoder.to(device).eval())
        self._device = device
        self._adapted: dict[object, Pocket] = {}
        self._info = replace(info, version=version + dtype_mark(dtype))
        self._sr = PocketSR(channels_last(sr.to(device).eval()), version)

    @property
    def upscaler(self) -> Upscaler:
        """Its own x2 net."""
        return self._sr

    def condition(self, prompts: Sequence[str]) -> Condition:
        """Encode captions. Words outside the vocabulary are left out, with a warning that names them.

        Known words in an order that no caption of its world has are warned of too: they draw badly.
        """
        for prompt in prompts:
            check_prompt(prompt)
        words, length = self._text.tokens.num_embeddings, len(self._text.places)
        read = hard.parse_hard if words > len(VOCABULARY) else grammar.parse_caption
        ids, lost = tokenise(prompts, WORDS[:words], length)
        for prompt, words in dict(zip(prompts, lost, strict=True)).items():
            if words:
                log.warning("pocket does not know %s in %r; %s", ", ".join(map(repr, words[:8])), prompt[:80], ADVICE)
            elif prompt.strip() and (why := _outside(prompt, read)):
                log.warning("pocket knows the words of %r, but no such caption: %s; %s", prompt[:80], why, ADVICE)
        context, pooled = self._text(ids.to(self._device))
        return Condition({"context": context, "pooled": pooled})

    def with_loras(self, loras: Sequence[Lora]) -> "Pocket":
        """The same model with these adapters on top: all weights are shared, and none is changed.

        Raises:
            WeightsError: a file is missing, holds no LoRA, or does not fit.
        """
        key = lora.key_of(loras)
        known = self._adapted.get(key)
        if known is None:
            say_other_teacher(loras, self._info.version)
            changed = lora.changes(self.transformer, loras, "pocket")
            flow = lora.adapt(self.transformer, changed, dtype=self.transformer.dtype, device=self._device)
            known = self.with_flow(flow, lora.mark_of(loras))
            if len(self._adapted) > 3:
                self._adapted.clear()
            self._adapted[key] = known
        return known

    def with_flow(self, flow: Flux, mark: str) -> "Pocket":
        """This model with another transformer, which it runs as it is; `mark` is added to the version."""
        other = copy.copy(self)
        other.transformer, other._adapted = flow, {}
        other._info = replace(self._info, version=self._info.version + mark)
        return other

    def make_field(self, cond: Condition, options: FieldOptions, step: StepFactory | None) -> Velocity:
        """The velocity of the flow for these captions; conditions beside are a larger batch."""
        if options.guidance is not None:
            raise PlanError("pocket has no guidance embedding; use CFG(scale)")
        if options.beside:
            cond = side_by_side(cond, options.beside)
        own = partial(flux_step, self.transformer) if step is None else step(BlockRunner(self.transformer))
        field = FluxField(
            self.transformer,
            cond["context"],
            cond["pooled"],
            None,
            sigmas=options.sigmas,
            step=own,
            positions=options.positions,
        )
        return repeat(field, 1 + len(options.beside))

    def encode(self, pixels: Tensor, noise: Tensor | None = None) -> Tensor:
        """Latents of the posterior's mode, or a sample of it."""
        out: Tensor = self._autoencoder.encode(pixels.contiguous(memory_format=torch.channels_last), noise)
        return out.contiguous()

    def decode(self, latents: Tensor) -> Tensor:
        """Pixels, clamped."""
        out: Tensor = self._autoencoder.decode(latents.contiguous(memory_format=torch.channels_last))
        return out.clamp(0, 1).contiguous()


QUERY_SCALE = "double_blocks.0.img_attn.norm.query_norm.scale"


def _outside(prompt: str, read: Callable[[str], object]) -> str:
    """Why a prompt is no caption that `read` knows; empty where it is one."""
    try:
        read(prompt)
    except grammar.CaptionError as error:
        return str(error).rpartition(": ")[2]
    return ""


ADVICE = "it draws captions such as 'a big red circle at the left on coarse dots' or 'the big blue word CAT'"


VERSIONS = ("pocket-4",)
SHIPPED: dict[str, Path] = {name: Path(__file__).parent / f"{name}.safetensors" for name in VERSIONS}
"""The versions that come with mrflow, newest first: `mrflow.load` takes their names; "pocket" is the newest."""
NEWEST, WEIGHTS = next(iter(SHIPPED.items()))


def embedded_file(name: str, weights: str = "") -> Path | None:
    """The file of an embedded model by its name, or None if there is none: "pocket", or one of its versions.

    `weights` is the version that a record names; "pocket" is then the file that made it, if it still comes along.
    """
    if name == "pocket":
        return SHIPPED.get(weights.partition("+")[0], WEIGHTS)
    return SHIPPED.get(name)


def params_of(header: Header) -> FluxParams:
    """The sizes of the transformer in a file of this architecture.

    Raises:
        WeightsError: the file has no transformer, or none of a width that a pocket has.
    """
    entries = [header.tensors.get(f"flow.{name}") for name in ("img_in.weight", QUERY_SCALE)]
    width, head = (entry.shape[0] if entry is not None and entry.shape else 0 for entry in entries)
    if width not in BY_WIDTH or not head or width % head or head % 16:
        known = " and ".join(map(str, BY_WIDTH))
        raise WeightsError(
            f"{header.path.name}: flow of width {width} with heads of {head}; pocket's widths are {known}"
        )
    return pocket_params(width, head)


def facts(header: Header) -> ModelInfo:
    """The facts of a file of this architecture, without its version: what it is used with, it says itself.

    Raises:
        WeightsError: as `params_of`.
    """
    return with_metadata(BY_WIDTH[params_of(header).hidden], header.metadata, *text_sizes(header))


def text_sizes(header: Header) -> tuple[int, int]:
    """How many of `WORDS` a file's text encoder knows, and how many tokens it reads.

    Raises:
        WeightsError: it has no such encoder, or one of more words than there are.
    """
    entries = [header.tensors.get(f"text.{name}") for name in ("tokens.weight", "places")]
    words, length = (entry.shape[0] if entry is not None and entry.shape else 0 for entry in entries)
    if not (0 < words <= len(WORDS) and length):
        raise WeightsError(
            f"{header.path.name}: a text encoder of {words} words and {length} tokens; pocket has at most {len(WORDS)}"
        )
    return words, length


def say_other_teacher(loras: Sequence[Lora], version: str) -> None:
    """Warn of adapters whose file names other weights of pocket as its teacher's."""
    for each in loras:
        header = read_adapter(each.path, each.sha256)[0].header
        teacher = header.metadata.get("teacher", "")
        name = teacher.partition("+")[0]
        if name in SHIPPED and not version.startswith(teacher):
            advice = f"load that model, mrflow.load({name!r}), or its own student"
            log.warning("%s was taught by %s, and this is %s: %s", header.path.name, teacher, version, advice)


class PocketNetworks(nn.ModuleDict):
    """The parts of the model, under the names that its file gives them."""


def open_pocket(path: Path) -> Header:
    """The header of pocket's file, with that of NAME-autoencoder.safetensors beside it for a version that is in two.

    Raises:
        WeightsError: a file is broken, or the two are of different versions.
    """
    header = read_header(path)
    beside = path.with_name(f"{path.stem}-autoencoder.safetensors")
    if any(name.startswith("autoencoder.") for name in header.tensors) or not beside.is_file():
        return header
    more = read_header(beside)
    mine, other = (each.metadata.get("version", "") for each in (header, more))
    if mine != other:
        raise WeightsError(f"{beside.name} belongs to {other or 'no version'}, and {path.name} is {mine or 'of none'}")
    return replace(header, tensors={**header.tensors, **more.tensors})


def load_pocket(
    path: Path = WEIGHTS,
    *,
    device: torch.device | None = None,
    dtype: torch.dtype = torch.float32,
    loras: Sequence[Lora] = (),
    on_facts: Callable[[ModelInfo], object] | None = None,
) -> Pocket:
    """The model from its file, or its two; adapters are merged into its weights.

    Raises:
        WeightsError: the file is missing, broken, or lacks a tensor.
    """
    header = open_pocket(path)
    params, (words, length) = params_of(header), text_sizes(header)
    with blueprint():
        text, flow, autoencoder, sr = (
            PocketTextEncoder(vocabulary=words, length=length, width=params.hidden),
            Flux(params),
            PocketAutoencoder(),
            CompactSR(),
        )
    whole = PocketNetworks({"text": text, "flow": flow, "autoencoder": autoencoder, "sr": sr})
    layout = layout_by_name(whole, lambda name: (name,))
    check_layout(whole, header, layout, dtype=torch.float32)
    changes = lora.changes(flow, loras, "pocket")
    files = sorted({entry.file for entry in header.tensors.values()})
    version = header.metadata.get("version", "")
    info = replace(
        facts(header), version=version + lora.mark_of(loras),
        files=() if path.parent == Path(__file__).parent else tuple(map(str, files)),
    )  # fmt: skip
    if on_facts is not None:
        on_facts(replace(info, version=info.version + dtype_mark(dtype)))
    fill_module(whole, header, layout, dtype=torch.float32)
    say_other_teacher(loras, version)
    lora.merge(flow, changes)
    return Pocket(
        text=text,
        flow=flow,
        autoencoder=autoencoder,
        sr=sr,
        version=info.version,
        device=device or torch.device("cpu"),
        dtype=dtype,
        info=info,
    )

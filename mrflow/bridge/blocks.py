"""A bridged transformer's blocks in the hands of a cache, without touching the transformer.

The blocks' lists are replaced in a shallow copy: all other modules, and every weight, are the pipeline's own. The
copy's forward embeds, comes to the first list, and finds there a single module that hands both streams to a step, which
decides which of the blocks run.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mrflow.bridge.version import unwrap
from mrflow.errors import PlanError
from mrflow.models.lora import graft
from mrflow.protocols.pieces import StepFactory, TransformerStep

Call = Mapping[str, Any]


@dataclass(frozen=True)
class BlockNames:
    """How a family's blocks are called: `lists` of blocks, in order, and the arguments that have a row an item.

    `joined` says that later lists work on one sequence, text first. `single` are the arguments of blocks that all work
    on one sequence, in which they are given behind it; `image_first` says how it lies. `modulated_input` is
    the image stream as the first block's modulated norm sees it.
    """

    lists: tuple[str, ...]
    batched: tuple[str, ...]
    modulated_input: Callable[[Any, Tensor, Call], Tensor]
    joined: bool = False
    single: tuple[str, ...] = ()
    image_first: bool = False


class BridgedPieces:
    """The blocks of one transformer; `given` are the arguments of the call that is under way."""

    def __init__(self, net: Any, family: BlockNames) -> None:  # noqa: ANN401
        self.family = family
        self.blocks = [(name, block) for name in family.lists for block in getattr(net, name)]
        self.given: dict[str, Call] = {}
        self.image = 0  # tokens of the image, where only one sequence comes

    @property
    def count(self) -> int:
        """Blocks."""
        return len(self.blocks)

    def embed(self, tokens: Tensor) -> Tensor:
        """Embedded already."""
        return tokens

    def modulated_input(self, img: Tensor, table: Tensor) -> Tensor:
        """The image stream as the first block's modulated norm sees it."""
        name, block = self.blocks[0]
        return self.family.modulated_input(block, img, self._rows(name, table))

    def run(
        self, img: Tensor, txt: Tensor, cos: Tensor, sin: Tensor, table: Tensor, start: int, stop: int
    ) -> tuple[Tensor, Tensor]:
        """Both streams after some blocks; `table` holds the rows of the items among those that were given."""
        for name, block in self.blocks[start:stop]:
            given, words = self._rows(name, table), txt.shape[1]
            if self.family.single:
                img, txt = self.split(block(self.whole(img, txt), **given))
            elif self.family.joined and name != self.family.lists[0]:
                whole = block(hidden_states=torch.cat((txt, img), 1), encoder_hidden_states=None, **given)
                txt, img = whole[:, :words], whole[:, words:]
            else:
                after, img = block(hidden_states=img, encoder_hidden_states=txt, **given)
                txt = txt if after is None else after
        return img, txt

    def whole(self, img: Tensor, txt: Tensor) -> Tensor:
        """The one sequence of both."""
        return torch.cat((img, txt) if self.family.image_first else (txt, img), 1)

    def split(self, whole: Tensor) -> tuple[Tensor, Tensor]:
        """Image and text of the one sequence."""
        if self.family.image_first:
            return whole[:, : self.image], whole[:, self.image :]
        text = whole.shape[1] - self.image
        return whole[:, text:], whole[:, :text]

    def head(self, img: Tensor, table: Tensor) -> Tensor:
        """The rest of the forward comes behind."""
        return img

    def _rows(self, name: str, table: Tensor) -> dict[str, Any]:
        """A call's arguments for some items."""
        out = dict(self.given[name])
        for key in self.family.batched:
            value = out.get(key)
            if isinstance(value, Tensor) and len(value) > 1:
                out[key] = value[table]
        return out


class Held(nn.Module):
    """In the place of a list of blocks that runs later: keeps the call's arguments, gives the streams back."""

    def __init__(self, pieces: BridgedPieces, name: str) -> None:
        super().__init__()
        self.pieces, self.name, self.words = pieces, name, 0

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, **given: Any) -> tuple[Tensor, Tensor]:  # noqa: ANN401
        """As they came."""
        self.pieces.given[self.name], self.words = given, encoder_hidden_states.shape[1]
        return encoder_hidden_states, hidden_states


class Stack(nn.Module):
    """In the place of all blocks: a step decides which of them run."""

    def __init__(self, pieces: BridgedPieces, step: TransformerStep, before: Held | None = None) -> None:
        super().__init__()
        self.pieces, self.step = pieces, step
        self.before = [before]  # in a list, so that it is no submodule

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        *rest: Any,  # noqa: ANN401
        **given: Any,  # noqa: ANN401
    ) -> Any:  # noqa: ANN401
        """What the last block would have given."""
        lists, held = self.pieces.family.lists, self.before[0]
        none = hidden_states.new_empty(0)
        table = torch.arange(len(hidden_states), device=hidden_states.device)
        if names := self.pieces.family.single:  # called by position
            self.pieces.given[lists[0]] = dict(zip(names, (encoder_hidden_states, *rest), strict=False))
            img, txt = self.pieces.split(hidden_states)
            # The step gives the image alone, and the rest of the forward wants no more than that.
            return self.pieces.whole(self.step(img, txt, none, none, table), txt)
        if held is not None:
            self.pieces.given[lists[1]] = given
            txt, img = hidden_states[:, : held.words], hidden_states[:, held.words :]
            return torch.cat((txt, self.step(img, txt, none, none, table)), 1)
        for name in lists:
            self.pieces.given[name] = given
        assert encoder_hidden_states is not None
        return encoder_hidden_states, self.step(hidden_states, encoder_hidden_states, none, none, table)


class OpenedForward:
    """A transformer's forward with a step in the place of its blocks."""

    def __init__(self, inner: Any, copy: Any, pieces: BridgedPieces) -> None:  # noqa: ANN401
        self.inner, self.copy, self.pieces = inner, copy, pieces

    def __call__(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        """What the transformer gives."""
        hook = getattr(self.inner, "_hf_hook", None)
        if hook is None:
            return self.copy(*args, **kwargs)
        # accelerate's wrapper belongs to the original; its hook brings the weights, which are shared.
        args, kwargs = hook.pre_forward(self.inner, *args, **kwargs)
        return hook.post_forward(self.inner, type(self.inner).forward(self.copy, *args, **kwargs))


def open_forward(net: Any, family: BlockNames, factory: StepFactory) -> OpenedForward:  # noqa: ANN401
    """A transformer's forward with a step in the place of its blocks. `net` is left as it is.

    Raises:
        PlanError: something else has taken over the transformer's forward: group offloading, or diffusers' own cache.
    """
    inner: Any = unwrap(net)
    if hasattr(inner, "_diffusers_hook"):
        raise PlanError(
            "the transformer's forward is in the hands of a diffusers hook (group offloading or its own cache): switch "
            "that off to use a cache of mrflow's"
        )
    pieces = BridgedPieces(inner, family)
    step = factory(pieces)
    first, *later = family.lists
    if family.joined and later:
        held = Held(pieces, first)
        new: dict[str, nn.Module] = {first: nn.ModuleList([held]), later[0]: nn.ModuleList([Stack(pieces, step, held)])}
    else:
        new = {first: nn.ModuleList([Stack(pieces, step)])}
        new |= {name: nn.ModuleList() for name in later}
    return OpenedForward(inner, graft(inner, new), pieces)


def first_of(block: Any, img: Tensor, given: Call) -> Tensor:  # noqa: ANN401
    """FLUX.1 and Stable Diffusion 3: the adaptive norm gives the modulated stream first."""
    out: Tensor = block.norm1(img, emb=given["temb"])[0]
    return out


def qwen_modulated_input(block: Any, img: Tensor, given: Call) -> Tensor:  # noqa: ANN401
    """Qwen-Image: shift and scale are the first two of six."""
    shift, scale = block.img_mod(given["temb"]).chunk(6, -1)[:2]
    out: Tensor = block.img_norm1(img) * (1 + scale[:, None]) + shift[:, None]
    return out


def flux2_modulated_input(block: Any, img: Tensor, given: Call) -> Tensor:  # noqa: ANN401
    """FLUX.2: one modulation serves all blocks."""
    modulation = given["temb_mod_img"]
    shift, scale = (modulation if modulation.ndim == 3 else modulation[:, None]).chunk(6, -1)[:2]
    out: Tensor = block.norm1(img) * (1 + scale) + shift
    return out


def z_image_modulated_input(block: Any, img: Tensor, given: Call) -> Tensor:  # noqa: ANN401
    """Z-Image: scale alone."""
    scale = block.adaLN_modulation(given["adaln_input"])[:, None].chunk(4, -1)[0]
    out: Tensor = block.attention_norm1(img) * (1 + scale)
    return out


def krea2_modulated_input(block: Any, img: Tensor, given: Call) -> Tensor:  # noqa: ANN401
    """Krea-2: a shared modulation and the block's own table, scale before shift."""
    scale, shift = (given["temb"].unflatten(-1, (6, -1)) + block.scale_shift_table).unbind(-2)[:2]
    out: Tensor = block.norm1(img) * (1 + scale) + shift
    return out


FLUX = BlockNames(("transformer_blocks", "single_transformer_blocks"), ("temb",), first_of)
QWEN = BlockNames(("transformer_blocks",), ("temb", "encoder_hidden_states_mask"), qwen_modulated_input)
SD3 = BlockNames(("transformer_blocks",), ("temb",), first_of)
FLUX2 = BlockNames(
    ("transformer_blocks", "single_transformer_blocks"),
    ("temb_mod_img", "temb_mod_txt", "temb_mod"),
    flux2_modulated_input,
    joined=True,
)
Z_IMAGE = BlockNames(
    ("layers",),
    ("attn_mask", "freqs_cis", "adaln_input"),
    z_image_modulated_input,
    # mask, rotations, level, and what editing models add
    single=("attn_mask", "freqs_cis", "adaln_input", "noise_mask", "adaln_noisy", "adaln_clean"),
    image_first=True,
)
KREA2 = BlockNames(
    ("transformer_blocks",),
    ("temb", "attention_mask"),
    krea2_modulated_input,
    single=("temb", "image_rotary_emb", "attention_mask"),
)

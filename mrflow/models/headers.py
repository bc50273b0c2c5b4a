"""What a checkpoint is and which sizes it has, off the names and shapes of its header.

Every family asks the same way: `part` finds the network by its marks behind whatever wrappers, `shape` and
`count_numbered` read sizes, `config_of` and `agree` hold a configuration against them.
"""

import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any, NoReturn

from torch import Tensor, nn

from mrflow.checkpoints.configs import Config, parse_config, read_config
from mrflow.checkpoints.names import PARTS, before
from mrflow.checkpoints.safetensors import Header, Layout, Source
from mrflow.errors import WeightsError
from mrflow.models.family import marks
from mrflow.records.files import spelled

Names = Callable[[str], tuple[str, ...]]
"""For a native name, the name or names (parts of a fused matrix) in another layout."""
PART = re.compile(r"\.parts\.(\d+)\.")

# A two-stream block's attention is named alike in FLUX and Qwen-Image.
ATTENTION = {
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "img_attn.norm.query_norm": ("attn.norm_q",),
    "img_attn.norm.key_norm": ("attn.norm_k",),
    "txt_attn.norm.query_norm": ("attn.norm_added_q",),
    "txt_attn.norm.key_norm": ("attn.norm_added_k",),
    "img_attn.proj": ("attn.to_out.0",),
    "txt_attn.proj": ("attn.to_add_out",),
}
# Relatives of families, known before them, whose marks they have too.
RELATIVES = {
    "distilled_guidance_layer.in_proj.weight": "a Chroma transformer",
    "double_stream_modulation_img.lin.weight": "a FLUX.2 transformer",
    "double_stream_modulation_img.linear.weight": "a FLUX.2 transformer",
    # A shard need not hold the first of them.
    "distilled_guidance_layer.layers.0.in_layer.weight": "a Chroma transformer",
    "distilled_guidance_layer.layers.0.linear_1.weight": "a Chroma transformer",
    "double_stream_modulation_txt.lin.weight": "a FLUX.2 transformer",
    "double_stream_modulation_txt.linear.weight": "a FLUX.2 transformer",
    "single_stream_modulation.lin.weight": "a FLUX.2 transformer",
    "single_stream_modulation.linear.weight": "a FLUX.2 transformer",
    "controlnet_x_embedder.weight": "a ControlNet",
    "controlnet_blocks.0.weight": "a ControlNet",
    "redux_up.weight": "FLUX.1 Redux's image encoder",
    "txt_in.text_norm.weight": "a Qwen-Image-2.1 transformer",
    "time_text_embed.addition_t_embedding.weight": "a Qwen-Image-Layered transformer",
    "text_fusion.projector.weight": "a Krea-2 transformer",
    "txtfusion.projector.weight": "a Krea-2 transformer",
}
# What else is known by its names, where no family claims it.
STRANGERS = {
    "double_blocks.0.img_attn_qkv.weight": "a HunyuanVideo transformer",
    "joint_blocks.0.x_block.attn.qkv.weight": "a Stable Diffusion 3 transformer",
    "pos_embed.proj.weight": "a Stable Diffusion 3 or PixArt transformer",
    "noise_refiner.0.attention.qkv.weight": "a Lumina transformer",
    "patch_embedding.weight": "a Wan transformer",
    "input_blocks.0.0.weight": "a Stable Diffusion U-Net",
    "down_blocks.0.resnets.0.conv1.weight": "a Stable Diffusion U-Net",
}
SR = {"conv_first.weight": "a super-resolution net"}


def one_part(name: str, tensor: Tensor, names: Names) -> Source | None:
    """Where a projection that is kept apart lies: one of the tensors that its fused name stands for."""
    part = PART.search(name)
    if part is None:
        return None
    whole = names(name[: part.start()] + "." + name[part.end() :])
    return Source((whole[int(part[1])],), (tensor.shape[0],))


def _even(parts: int, rows: int) -> tuple[int, ...]:
    """The rows of a matrix shared out evenly among the parts that it is kept in."""
    return (rows // parts,) * parts


def transformer_layout(
    net: nn.Module,
    names: Names,
    split: Callable[[int, int], tuple[int, ...]] = _even,
) -> Layout:
    """Where every parameter of a transformer lies.

    `split` gives the rows of each part of a fused matrix, from their number and all rows. A last modulation that the
    network has as (shift, scale), not `scale_first`, is (scale, shift) in diffusers' files (`norm_out`).
    """
    layout: dict[str, Source] = {}
    for name, tensor in net.state_dict().items():
        if (apart := one_part(name, tensor, names)) is not None:
            layout[name] = apart
            continue
        parts = names(name)
        swap = "norm_out" in parts[0] and not net.get_submodule("final_layer").scale_first
        layout[name] = Source(parts, split(len(parts), tensor.shape[0]), swap=swap)
    return layout


def layout_by_name(net: nn.Module, names: Names) -> Layout:
    """Where every parameter of a network lies whose file keeps each in a tensor of its own."""
    return {name: Source(names(name), (len(tensor),)) for name, tensor in net.state_dict().items()}


def count_numbered(header: Header, names: Names, template: str) -> int:
    """How many there are of a numbered tensor, from 0 on."""
    n = 0
    while names(template.format(n))[0] in header.tensors:
        n += 1
    return n


def shape(header: Header, name: str, rank: int) -> tuple[int, ...]:
    """The shape of a tensor that must be there, with this many axes."""
    entry = header.tensors.get(name)
    if entry is None:
        raise WeightsError(f"{header.path}: {name} is missing")
    if len(entry.shape) != rank:
        raise WeightsError(f"{header.path}: {name} has shape {entry.shape}, expected {rank} axes")
    return entry.shape


def config_of(header: Header, name: str) -> Config:
    """The config.json beside a checkpoint, or the one in its metadata; empty if there is none of this class.

    Raises:
        WeightsError: it cannot be used.
    """
    beside = spelled(header.path.parent, "config.json")
    if beside.is_file() and (config := read_config(beside)).get("_class_name") == name:
        return config
    with suppress(WeightsError):  # other programs keep other things there
        inside = parse_config(header.metadata.get("config", "{}"), f"{header.path}: the config in its metadata")
        if inside.get("_class_name") == name:
            return inside
    return Config({}, header.path)


def axes_of(
    header: Header, config: Config, head: int, usual: tuple[int, ...], *, key: str = "axes_dims_rope"
) -> tuple[int, ...]:
    """A head's channels for each axis: of the config, else the `usual` ones of heads of 128 channels."""
    if key not in config and head != 128:
        raise WeightsError(f"{header.path}: heads of {head} channels, but no config.json says their {key}")
    return config.wholes(key, usual, most=8)


def agree(header: Header, config: Mapping[str, Any], sizes: Mapping[str, Any]) -> None:
    """Refuse a config that contradicts the shapes."""
    other = {key: value for key, value in sizes.items() if config.get(key, value) != value}
    wrong = [f"{key} {str(config[key])[:80]} (weights: {value})" for key, value in other.items()]
    if wrong:
        raise WeightsError(f"{header.path}: its config does not belong to its weights: {', '.join(wrong)}")


def as_published(header: Header, config: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Refuse a config of a network that computes otherwise, in what no shape tells, than the published one does."""
    other = {key: value for key, value in settings.items() if config.get(key, value) != value}
    wrong = [f"{key} {str(config[key])[:80]} ({value} is supported)" for key, value in other.items()]
    if wrong:
        raise WeightsError(f"{header.path}: its config is of another network: {', '.join(wrong)}")


def kind(header: Header) -> str | None:
    """What a checkpoint is, as far as its keys tell."""
    return _first_of(header, RELATIVES) or _first_of(header, dict(marks()) | STRANGERS | SR)


def _first_of(header: Header, marks: Mapping[str, str]) -> str | None:
    return next(
        (what for mark, what in marks.items() if any(before(n, mark) is not None for n in header.tensors)), None
    )


def looks_like(header: Header, wanted: str) -> bool:
    """Whether a checkpoint's keys are those of `wanted`, which a family knows, and of no relative of it."""
    relative = "transformer" in wanted and _first_of(header, RELATIVES)
    return not relative and any(before(n, mark) is not None for mark in _marks_of(wanted) for n in header.tensors)


def _marks_of(wanted: str) -> list[str]:
    """The marks of one kind of network, the longest first."""
    return sorted((mark for mark, what in marks() if what == wanted), key=len, reverse=True)


def part(header: Header, wanted: str) -> Header:
    """The network `wanted` of a checkpoint by its own names: without wrappers, and without a file's other networks.

    Raises:
        WeightsError: the checkpoint does not hold it, or holds it twice.
    """
    if not looks_like(header, wanted):
        refuse_kind(header, wanted)
    found = {name: prefix for mark in reversed(_marks_of(wanted)) for name in header.tensors
             if (prefix := before(name, mark)) is not None}  # fmt: skip
    prefixes = sorted(set(found.values()))
    if len(prefixes) > 1:
        raise WeightsError(
            f"{header.path} holds {wanted} {len(prefixes)} times, behind {', '.join(map(repr, prefixes))}: save one"
        )
    (prefix,) = prefixes
    if not prefix:
        return header
    own = {name.removeprefix(prefix): entry for name, entry in header.tensors.items() if name.startswith(prefix)}
    outer = prefix.partition(".")[0] if prefix.startswith("module.") else ""
    rest = {
        name: entry
        for name, entry in header.tensors.items()
        if not name.startswith(prefix) and not name.removeprefix(f"{outer}.").startswith(OTHERS)
    }
    return replace(header, tensors=own | rest)


# What the names of a file's other networks begin with.
OTHERS = tuple(f"{word}." for word in (*PARTS, "model.diffusion_model", "model_ema"))


def refuse_kind(header: Header, wanted: str) -> NoReturn:
    """Say what a checkpoint is instead of what it was taken for."""
    what, first = kind(header), next(iter(header.tensors), "nothing")
    found = f"it looks like {what}" if what else f"its {len(header.tensors)} tensors begin with {first}"
    raise WeightsError(f"{header.path} is not {wanted}: {found}")

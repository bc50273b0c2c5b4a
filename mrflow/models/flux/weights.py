"""Which tensors of a published checkpoint the parameters of our models are, and their sizes, read off the shapes.

Native names are Black Forest Labs'. A `Names` gives, for a native name, the name or names (parts of a fused matrix) in
another layout; from it follow the sizes, the loading and the saving. A layout is recognised by its keys. The file is
long because names, sizes, loading and saving of one layout are only understood side by side.
"""

import json
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NoReturn

import torch
from torch import Tensor

from mrflow.checkpoints.blueprint import blueprint
from mrflow.checkpoints.configs import Config, parse_config, read_config
from mrflow.checkpoints.names import PARTS, before
from mrflow.checkpoints.safetensors import (
    Header,
    Layout,
    Prepared,
    Source,
    check_layout,
    compute_dtype,
    exported,
    open_checkpoint,
    save_file,
)
from mrflow.errors import PlanError, WeightsError
from mrflow.models.family import marks
from mrflow.models.flux.transformer import Flux, FluxParams
from mrflow.models.flux.vae import VaeFlux, VaeParams
from mrflow.models.fp8 import described, store_fp8
from mrflow.models.layers import SplitLinear

Names = Callable[[str], tuple[str, ...]]
PART = re.compile(r"\.parts\.(\d+)\.")

# diffusers 0.42.1 `loaders/single_file_utils.py`
EMBEDDERS = {
    f"{bfl}.{a}": (f"time_text_embed.{diffusers}.{b}",)
    for bfl, diffusers in (
        ("time_in", "timestep_embedder"),
        ("vector_in", "text_embedder"),
        ("guidance_in", "guidance_embedder"),
    )
    for a, b in (("in_layer", "linear_1"), ("out_layer", "linear_2"))
}
TOP = EMBEDDERS | {
    "img_in": ("x_embedder",),
    "txt_in": ("context_embedder",),
    "final_layer.linear": ("proj_out",),
    "final_layer.adaLN_modulation.1": ("norm_out.linear",),
}
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
DOUBLE = ATTENTION | {
    "img_mod.lin": ("norm1.linear",),
    "txt_mod.lin": ("norm1_context.linear",),
    "img_mlp.0": ("ff.net.0.proj",),
    "img_mlp.2": ("ff.net.2",),
    "txt_mlp.0": ("ff_context.net.0.proj",),
    "txt_mlp.2": ("ff_context.net.2",),
}
SINGLE = {
    "modulation.lin": ("norm.linear",),
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2": ("proj_out",),
    "norm.query_norm": ("attn.norm_q",),
    "norm.key_norm": ("attn.norm_k",),
}
VAE_RULES = (
    (r"\.down\.(\d+)\.block\.", r".down_blocks.\1.resnets."),
    (r"\.up\.(\d+)\.block\.", r".up_blocks.\1.resnets."),
    (r"\.down\.(\d+)\.downsample\.", r".down_blocks.\1.downsamplers.0."),
    (r"\.up\.(\d+)\.upsample\.", r".up_blocks.\1.upsamplers.0."),
    (r"\.mid\.block_1\.", r".mid_block.resnets.0."),
    (r"\.mid\.block_2\.", r".mid_block.resnets.1."),
    (r"\.mid\.attn_1\.norm\.", r".mid_block.attentions.0.group_norm."),
    (r"\.mid\.attn_1\.proj_out\.", r".mid_block.attentions.0.to_out.0."),
    (r"\.mid\.attn_1\.([qkv])\.", r".mid_block.attentions.0.to_\1."),
    (r"\.nin_shortcut\.", r".conv_shortcut."),
    (r"coder\.norm_out\.", r"coder.conv_norm_out."),
)
# Relatives, known before what they descend from, whose marks they have too.
RELATIVES = {
    "distilled_guidance_layer.in_proj.weight": "a Chroma transformer",
    "double_stream_modulation_img.lin.weight": "a FLUX.2 transformer",
    "double_stream_modulation_img.linear.weight": "a FLUX.2 transformer",
    "controlnet_x_embedder.weight": "a ControlNet",
    "controlnet_blocks.0.weight": "a ControlNet",
    "redux_up.weight": "FLUX.1 Redux's image encoder",
    "txt_in.text_norm.weight": "a Qwen-Image-2.1 transformer",
    "time_text_embed.addition_t_embedding.weight": "a Qwen-Image-Layered transformer",
    "text_fusion.projector.weight": "a Krea-2 transformer",
    "txtfusion.projector.weight": "a Krea-2 transformer",
    "double_blocks.0.img_attn_qkv.weight": "a HunyuanVideo transformer",
    "joint_blocks.0.x_block.attn.qkv.weight": "a Stable Diffusion 3 transformer",
    "pos_embed.proj.weight": "a Stable Diffusion 3 or PixArt transformer",
    "all_x_embedder.2-1.weight": "a Z-Image transformer",
    "noise_refiner.0.attention.qkv.weight": "a Lumina or Z-Image transformer",
    "patch_embedding.weight": "a Wan transformer",
    "input_blocks.0.0.weight": "a Stable Diffusion U-Net",
    "down_blocks.0.resnets.0.conv1.weight": "a Stable Diffusion U-Net",
}
# What else checkpoints are known by, behind whatever wrappers put before their names; families know their own.
OTHER_MARKS = {
    "text_model.embeddings.token_embedding.weight": "a CLIP text encoder",
    "embeddings.token_embedding.weight": "a CLIP text encoder",
    "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": "a T5 encoder",
    "model.layers.0.self_attn.q_proj.weight": "a Qwen2.5-VL text encoder",
    "model.language_model.layers.0.self_attn.q_proj.weight": "a Qwen2.5-VL text encoder",
    "language_model.model.layers.0.self_attn.q_proj.weight": "a Qwen2.5-VL text encoder",
    "language_model.layers.0.self_attn.q_proj.weight": "a Qwen2.5-VL text encoder",
    "layers.0.self_attn.q_proj.weight": "a Qwen2.5-VL text encoder",
    "conv_first.weight": "a super-resolution net",
}


def load_flux(
    where: str | Path | Header,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    storage: Literal["fp8"] | None = None,
    fuse: bool | None = None,
) -> Flux:
    """`prepare_flux`, and read the weights at once."""
    return prepare_flux(where, dtype=dtype, device=device, storage=storage, fuse=fuse).read()


def prepare_flux(
    where: str | Path | Header,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    storage: Literal["fp8"] | None = None,
    fuse: bool | None = None,
) -> Prepared[Flux]:
    """A FLUX transformer from a file, folder or header, in BFL's or diffusers' layout; `dtype=None` is the file's.

    Names and shapes are checked now; `read` of what is given back reads the weights.

    `storage="fp8"` keeps the blocks' matrices in 8 bits. `fuse` joins projections that the file keeps apart, which
    copies them; unless said, they stay apart, and all weights mapped, where nothing else needs a copy either.

    Raises:
        WeightsError: it is no FLUX transformer, or anything in it is missing, left over or of a wrong shape.
    """
    header = described(part(where if isinstance(where, Header) else open_checkpoint(where), "a FLUX transformer"))
    names = flux_names(header)
    params = flux_params(header, names)
    dtype = dtype or compute_dtype(header)
    apart = len(names("double_blocks.0.img_attn.qkv.weight")) > 1
    unchanged = all(entry.dtype == dtype for entry in header.tensors.values())
    if fuse is None:
        fuse = not (unchanged and storage is None and torch.device(device).type == "cpu")
    with blueprint():
        flux = Flux(params, split=apart and not (fuse or storage))
    flux.final_layer.scale_first = apart and not (fuse or storage)
    if storage == "fp8":
        store_fp8(flux.double_blocks)
        store_fp8(flux.single_blocks)
    layout = flux_layout(flux, names)
    check_layout(flux, header, layout, dtype=dtype)
    return Prepared(flux, header, layout, dtype, device, cast=dtype)


def save_flux(flux: Flux, path: Path) -> None:
    """Write a transformer in BFL's layout; what shapes do not tell (axes, theta) goes into the file's metadata."""
    config = {"_class_name": FLUX_CLASS, "axes_dims_rope": flux.params.axes, "theta": flux.params.theta}
    state = whole_state(flux)
    same = {name: Source((name,), (len(tensor),)) for name, tensor in state.items()}
    save_file(exported(state, same), path, metadata={"config": json.dumps(config)})


def whole_state(flux: Flux) -> dict[str, Tensor]:
    """Native names and fused matrices, also where the transformer keeps projections apart."""
    state = {name: tensor for name, tensor in flux.state_dict().items() if PART.search(name) is None}
    if flux.final_layer.scale_first:
        for name in (f"final_layer.adaLN_modulation.1.{leaf}" for leaf in ("weight", "bias")):
            state[name] = torch.cat(tuple(reversed(state[name].chunk(2))))
    for name, module in flux.named_modules():
        if isinstance(module, SplitLinear):
            for leaf in ("weight", "bias"):
                state[f"{name}.{leaf}"] = torch.cat([getattr(part, leaf) for part in module.parts])
    return state


def load_vae_flux(
    where: str | Path | Header, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> VaeFlux:
    """`prepare_vae_flux`, and read the weights at once."""
    return prepare_vae_flux(where, dtype=dtype, device=device).read()


def prepare_vae_flux(
    where: str | Path | Header, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> Prepared[VaeFlux]:
    """A FLUX autoencoder from a file, folder or header, in BFL's or diffusers' layout; `dtype=None` keeps the file's.

    Names and shapes are checked now; `read` of what is given back reads the weights.

    Raises:
        WeightsError: it is no such autoencoder, or anything in it is missing, left over or of a wrong shape.
    """
    header = described(part(where if isinstance(where, Header) else open_checkpoint(where), "a FLUX autoencoder"))
    names = vae_names(header)
    params = vae_params(header, names)
    with blueprint():
        vae = VaeFlux(params)
    layout = vae_layout(vae, names)
    check_layout(vae, header, layout, dtype=dtype)
    return Prepared(vae, header, layout, dtype or compute_dtype(header), device, cast=dtype)


def save_vae_flux(vae: VaeFlux, path: Path) -> None:
    """Write an autoencoder in BFL's layout; scale, shift and groups go into the file's metadata."""
    p = vae.params
    config = {
        "_class_name": VAE_CLASS,
        "scaling_factor": p.scale,
        "shift_factor": p.shift,
        "norm_num_groups": p.groups,
    }
    save_file(exported(vae.state_dict(), vae_layout(vae, bfl(""))), path, metadata={"config": json.dumps(config)})


FLUX_CLASS, VAE_CLASS = "FluxTransformer2DModel", "AutoencoderKL"


def bfl(prefix: str) -> Names:
    """Native names, after a prefix (all-in-one files have one)."""
    return lambda name: (prefix + name,)


def flux_diffusers(name: str) -> tuple[str, ...]:
    """diffusers' names of a native FLUX parameter: q, k, v (and a single block's MLP input) are apart there."""
    stem, _, leaf = name.rpartition(".")
    kind, _, rest = stem.partition(".")
    if kind in ("double_blocks", "single_blocks"):
        index, _, rest = rest.partition(".")
        where = "transformer_blocks" if kind == "double_blocks" else "single_transformer_blocks"
        targets = tuple(f"{where}.{index}.{t}" for t in (DOUBLE if kind == "double_blocks" else SINGLE)[rest])
    else:
        targets = TOP[stem]
    return tuple(f"{t}.{'weight' if leaf == 'scale' else leaf}" for t in targets)


def vae_diffusers(levels: int) -> Names:
    """diffusers' names of a native autoencoder parameter; it counts the decoder's levels in the other direction."""

    def names(name: str) -> tuple[str, ...]:
        name = re.sub(r"\.up\.(\d+)\.", lambda m: f".up.{levels - 1 - int(m[1])}.", name)
        for pattern, replacement in VAE_RULES:
            name = re.sub(pattern, replacement, name)
        return (name,)

    return names


def flux_names(header: Header) -> Names:
    """The layout of a FLUX transformer, recognised by its keys."""
    if "double_blocks.0.img_attn.qkv.weight" in header.tensors:
        return bfl("")
    if "single_transformer_blocks.0.norm.linear.weight" in header.tensors:
        return flux_diffusers
    refuse(header, "a FLUX transformer")


def vae_names(header: Header) -> Names:
    """The layout of a FLUX autoencoder, recognised by its keys."""
    if "decoder.up.0.block.0.conv1.weight" in header.tensors:
        return bfl("")
    if "decoder.up_blocks.0.resnets.0.conv1.weight" in header.tensors:
        return vae_diffusers(count(header, vae_diffusers(0), "encoder.down.{}.block.0.conv1.weight"))
    refuse(header, "a FLUX autoencoder")


def flux_layout(flux: Flux, names: Names) -> Layout:
    """Where every parameter of the transformer lies: fused rows are q, k, v, then the MLP's.

    diffusers' last modulation is (scale, shift), native is (shift, scale).
    """
    layout: dict[str, Source] = {}
    for name, tensor in flux.state_dict().items():
        if (apart := one_part(name, tensor, names)) is not None:
            layout[name] = apart
            continue
        parts, rows, d = names(name), tensor.shape[0], flux.params.hidden
        split = (rows,) if len(parts) == 1 else (d, d, d, rows - 3 * d)[: len(parts)]
        layout[name] = Source(parts, split, swap="norm_out" in parts[0] and not flux.final_layer.scale_first)
    return layout


def one_part(name: str, tensor: Tensor, names: Names) -> Source | None:
    """Where a projection that is kept apart lies: one of the tensors that its fused name stands for."""
    part = PART.search(name)
    if part is None:
        return None
    whole = names(name[: part.start()] + "." + name[part.end() :])
    return Source((whole[int(part[1])],), (tensor.shape[0],))


def vae_layout(vae: VaeFlux, names: Names) -> Layout:
    """Where every parameter of the autoencoder lies; diffusers keeps the attention's 1x1 convolutions as matrices."""
    return {
        name: Source(names(name), (tensor.shape[0],), squeeze=".to_" in names(name)[0])
        for name, tensor in vae.state_dict().items()
    }


def flux_params(header: Header, names: Names) -> FluxParams:
    """Sizes of a FLUX transformer; the rotary axes are in no shape: of a config, or FLUX.1's for heads of 128."""
    hidden, in_channels = shape(header, names("img_in.weight")[0], 2)
    (head,) = shape(header, names("double_blocks.0.img_attn.norm.query_norm.scale")[0], 1)
    mlp, _ = shape(header, names("double_blocks.0.img_mlp.0.weight")[0], 2)
    if not hidden or not head:
        raise WeightsError(f"{header.path} has a transformer of width {hidden} with heads of {head}")
    heads = hidden // head
    counts = (
        count(header, names, "double_blocks.{}.img_mod.lin.weight"),
        count(header, names, "single_blocks.{}.modulation.lin.weight"),
    )
    context, pooled = (shape(header, names(n)[0], 2)[1] for n in ("txt_in.weight", "vector_in.in_layer.weight"))
    guidance = names("guidance_in.in_layer.weight")[0] in header.tensors
    config = config_of(header, FLUX_CLASS)
    agree(
        header,
        config,
        {
            "attention_head_dim": head,
            "num_attention_heads": heads,
            "num_layers": counts[0],
            "num_single_layers": counts[1],
            "in_channels": in_channels,
            "joint_attention_dim": context,
            "pooled_projection_dim": pooled,
            "guidance_embeds": guidance,
        },
    )
    axes = axes_of(header, config, head, FluxParams.axes)
    try:
        return FluxParams(
            in_channels=in_channels,
            out_channels=shape(header, names("final_layer.linear.weight")[0], 2)[0],
            context=context,
            pooled=pooled,
            hidden=hidden,
            heads=heads,
            axes=axes,
            mlp_ratio=mlp / hidden,
            double_blocks=counts[0],
            single_blocks=counts[1],
            guidance=guidance,
            theta=config.number("theta", FluxParams.theta, low=1),
        )
    except WeightsError:
        raise
    except (PlanError, TypeError, ValueError) as error:
        raise WeightsError(f"{header.path}: {error}") from None


def vae_params(header: Header, names: Names) -> VaeParams:
    """Sizes of a FLUX autoencoder; scale, shift and groups are of a config, or FLUX.1's for 16 channels."""
    levels = count(header, names, "encoder.down.{}.block.0.conv1.weight")
    channels = [shape(header, names(f"encoder.down.{i}.block.0.conv1.weight")[0], 4)[0] for i in range(levels)]
    latent = shape(header, names("decoder.conv_in.weight")[0], 4)[1]
    config = config_of(header, VAE_CLASS)
    if latent != 16 and not {"scaling_factor", "shift_factor"} <= set(config):
        raise WeightsError(f"{header.path}: {latent} latent channels, but no config.json says their scale and shift")
    agree(header, config, {"latent_channels": latent, "block_out_channels": channels})
    try:
        return VaeParams(
            channels=tuple(channels),
            latent=latent,
            blocks=count(header, names, "encoder.down.0.block.{}.conv1.weight"),
            scale=config.number("scaling_factor", VaeParams.scale, low=1e-6),
            shift=config.number("shift_factor", VaeParams.shift),
            groups=config.whole("norm_num_groups", VaeParams.groups, high=4096),
        )
    except WeightsError:
        raise
    except (PlanError, TypeError, ValueError) as error:
        raise WeightsError(f"{header.path}: {error}") from None


def count(header: Header, names: Names, template: str) -> int:
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
    beside = header.path.parent / "config.json"
    if beside.is_file() and (config := read_config(beside)).get("_class_name") == name:
        return config
    with suppress(WeightsError):  # other programs keep other things there
        inside = parse_config(header.metadata.get("config", "{}"), f"{header.path}: the config in its metadata")
        if inside.get("_class_name") == name:
            return inside
    return Config({}, header.path)


def axes_of(header: Header, config: Config, head: int, usual: tuple[int, ...]) -> tuple[int, ...]:
    """A head's channels for each axis: of the config, else the `usual` ones of heads of 128 channels."""
    if "axes_dims_rope" not in config and head != 128:
        raise WeightsError(f"{header.path}: heads of {head} channels, but no config.json says their axes_dims_rope")
    return config.wholes("axes_dims_rope", usual, most=8)


def agree(header: Header, config: Mapping[str, Any], sizes: Mapping[str, Any]) -> None:
    """Refuse a config that contradicts the shapes."""
    other = {key: value for key, value in sizes.items() if config.get(key, value) != value}
    wrong = [f"{key} {str(config[key])[:80]} (weights: {value})" for key, value in other.items()]
    if wrong:
        raise WeightsError(f"{header.path}: its config does not belong to its weights: {', '.join(wrong)}")


def all_marks() -> dict[str, str]:
    """Tensor names that tell what a checkpoint is: those of families, then of what stands beside them."""
    return dict(marks()) | OTHER_MARKS


def kind(header: Header) -> str | None:
    """What a checkpoint is, as far as its keys tell."""
    return _first_of(header, RELATIVES) or _first_of(header, all_marks())


def _first_of(header: Header, marks: Mapping[str, str]) -> str | None:
    return next(
        (what for mark, what in marks.items() if any(before(n, mark) is not None for n in header.tensors)), None
    )


def looks_like(header: Header, wanted: str) -> bool:
    """Whether a checkpoint's keys are those of `wanted`, one of the values of `all_marks`, and of no relative of it."""
    relative = "transformer" in wanted and _first_of(header, RELATIVES)
    return not relative and bool(
        _first_of(header, {mark: what for mark, what in all_marks().items() if what == wanted})
    )


def part(header: Header, wanted: str) -> Header:
    """The network `wanted` of a checkpoint by its own names: without wrappers, and without a file's other networks.

    Raises:
        WeightsError: the checkpoint does not hold it, or holds it twice.
    """
    if not looks_like(header, wanted):
        refuse(header, wanted)
    own_marks = sorted((mark for mark, what in all_marks().items() if what == wanted), key=len, reverse=True)
    found = {name: prefix for mark in reversed(own_marks) for name in header.tensors
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


def refuse(header: Header, wanted: str) -> NoReturn:
    """Say what a checkpoint is instead of what it was taken for."""
    what, first = kind(header), next(iter(header.tensors), "nothing")
    found = f"it looks like {what}" if what else f"its {len(header.tensors)} tensors begin with {first}"
    raise WeightsError(f"{header.path} is not {wanted}: {found}")

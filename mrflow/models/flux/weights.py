"""Which tensors of a published checkpoint the parameters of our models are, and their sizes, read off the shapes.

Native names are Black Forest Labs'. A `Names` gives, for a native name, the name or names (parts of a fused matrix) in
another layout; from it follow the sizes, the loading and the saving. A layout is recognised by its keys. The file is
long because names, sizes, loading and saving of one layout are only understood side by side.
"""

import json
import re
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from mrflow.checkpoints.safetensors import Header, Layout, Source, save_file, to_layout
from mrflow.errors import WeightsError
from mrflow.models.flux.transformer import Flux, FluxParams
from mrflow.models.flux.vae import VaeFlux, VaeParams
from mrflow.models.headers import (
    ATTENTION,
    PART,
    Names,
    agree,
    as_published,
    axes_of,
    config_of,
    count_numbered,
    refuse_kind,
    shape,
    transformer_layout,
)
from mrflow.models.layers import SplitLinear
from mrflow.models.prepared import Published, PublishedTransformer, sizes_of

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


def load_flux(
    where: str | Path | Header,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    storage: Literal["fp8"] | None = None,
    fuse: bool | None = None,
) -> Flux:
    """A FLUX transformer of a file, folder or header, in BFL's or diffusers' layout, its weights read at once.

    Raises:
        WeightsError: it is none, or anything in it is missing, left over or of a wrong shape.
    """
    return FLUX_TRANSFORMER.prepare(where, dtype=dtype, device=device, storage=storage, fuse=fuse).read()


def save_flux(flux: Flux, path: Path) -> None:
    """Write a transformer in BFL's layout; what shapes do not tell (axes, theta) goes into the file's metadata."""
    config = {"_class_name": FLUX_CLASS, "axes_dims_rope": flux.params.axes, "theta": flux.params.theta}
    state = whole_state(flux)
    same = {name: Source((name,), (len(tensor),)) for name, tensor in state.items()}
    save_file(to_layout(state, same), path, metadata={"config": json.dumps(config)})


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
    refuse_kind(header, "a FLUX transformer")


def vae_names(header: Header) -> Names:
    """The layout of a FLUX autoencoder, recognised by its keys."""
    if "decoder.up.0.block.0.conv1.weight" in header.tensors:
        return bfl("")
    if "decoder.up_blocks.0.resnets.0.conv1.weight" in header.tensors:
        return vae_diffusers(count_numbered(header, vae_diffusers(0), "encoder.down.{}.block.0.conv1.weight"))
    refuse_kind(header, "a FLUX autoencoder")


def flux_layout(flux: Flux, names: Names) -> Layout:
    """Where every parameter of the transformer lies: fused rows are q, k, v, then the MLP's.

    diffusers' last modulation is (scale, shift), native is (shift, scale).
    """
    d = flux.params.hidden

    def split(parts: int, rows: int) -> tuple[int, ...]:
        return (rows,) if parts == 1 else (d, d, d, rows - 3 * d)[:parts]

    return transformer_layout(flux, names, split=split)


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
        count_numbered(header, names, "double_blocks.{}.img_mod.lin.weight"),
        count_numbered(header, names, "single_blocks.{}.modulation.lin.weight"),
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
    as_published(header, config, {"patch_size": 1})
    axes = axes_of(header, config, head, FluxParams.axes)
    with sizes_of(header):
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


# Of diffusers' AutoencoderKL, as FLUX.1's and Z-Image's are published.
VAE_SETTINGS = {
    "act_fn": "silu", "mid_block_add_attention": True, "use_quant_conv": False, "use_post_quant_conv": False,
    "in_channels": 3, "out_channels": 3,
}  # fmt: skip


def vae_params(header: Header, names: Names) -> VaeParams:
    """Sizes of a FLUX autoencoder; scale, shift and groups are of a config, or FLUX.1's for 16 channels."""
    levels = count_numbered(header, names, "encoder.down.{}.block.0.conv1.weight")
    if not levels:
        raise WeightsError(
            f"{header.path} has no encoder of images, which stages after the first need: take the whole one"
        )
    channels = [shape(header, names(f"encoder.down.{i}.block.0.conv1.weight")[0], 4)[0] for i in range(levels)]
    latent = shape(header, names("decoder.conv_in.weight")[0], 4)[1]
    config = config_of(header, VAE_CLASS)
    if latent != 16 and not {"scaling_factor", "shift_factor"} <= set(config):
        raise WeightsError(f"{header.path}: {latent} latent channels, but no config.json says their scale and shift")
    agree(header, config, {"latent_channels": latent, "block_out_channels": channels})
    as_published(header, config, VAE_SETTINGS)
    with sizes_of(header):
        return VaeParams(
            channels=tuple(channels),
            latent=latent,
            blocks=count_numbered(header, names, "encoder.down.0.block.{}.conv1.weight"),
            scale=config.number("scaling_factor", VaeParams.scale, low=1e-6),
            shift=config.number("shift_factor", VaeParams.shift),
            groups=config.whole("norm_num_groups", VaeParams.groups, high=4096),
        )


FLUX_TRANSFORMER = PublishedTransformer(
    "a FLUX transformer", flux_names, flux_params, Flux, flux_layout, joined="double_blocks.0.img_attn.qkv.weight"
)
FLUX_AUTOENCODER = Published("a FLUX autoencoder", vae_names, vae_params, VaeFlux, vae_layout)

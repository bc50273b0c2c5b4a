"""Which tensors of Z-Image's published checkpoints the parameters of our model are, and sizes off the shapes.

Two layouts are published: single files, whose names ours follow, and diffusers'.
"""

import re

from mrflow.checkpoints.safetensors import Header
from mrflow.errors import WeightsError
from mrflow.models.headers import (
    Names,
    agree,
    as_published,
    axes_of,
    config_of,
    count_numbered,
    shape,
    transformer_layout,
)
from mrflow.models.prepared import PublishedTransformer, sizes_of
from mrflow.models.zimage.transformer import ZImage, ZImageParams

CLASS = "ZImageTransformer2DModel"
OWN = "x_embedder.weight"  # a name of the single files that diffusers' layout changes
# Ours to the single files': norms and the level's embedding are the modules of all families.
COMMON = (
    (r"^t_embedder\.in_layer\.", "t_embedder.mlp.0."),
    (r"^t_embedder\.out_layer\.", "t_embedder.mlp.2."),
    (r"\.scale$", ".weight"),
)
# Those to diffusers' (diffusers 0.42.1 `loaders/single_file_utils.py`).
DIFFUSERS = (
    (r"^(x_embedder|final_layer)\.", r"all_\1.2-1."),
    (r"\.attention\.([qk])_norm\.", r".attention.norm_\1."),
    (r"\.attention\.out\.", r".attention.to_out.0."),
)


def single_file(name: str) -> tuple[str, ...]:
    """The single files' names of a native parameter."""
    for pattern, replacement in COMMON:
        name = re.sub(pattern, replacement, name)
    return (name,)


def zimage_diffusers(name: str) -> tuple[str, ...]:
    """diffusers' names of a native parameter: q, k, v are apart there."""
    (name,) = single_file(name)
    for pattern, replacement in DIFFUSERS:
        name = re.sub(pattern, replacement, name)
    if ".attention.qkv." in name:
        return tuple(name.replace(".qkv.", f".to_{part}.") for part in "qkv")
    return (name,)


def zimage_names(header: Header) -> Names:
    """The layout of a Z-Image transformer, recognised by its keys."""
    return single_file if OWN in header.tensors else zimage_diffusers


# Of diffusers' ZImageTransformer2DModel, as published: what no shape tells.
SETTINGS = {"all_patch_size": [2], "all_f_patch_size": [1], "norm_eps": 1e-5, "qk_norm": True, "t_scale": 1000.0}


def zimage_params(header: Header, names: Names) -> ZImageParams:
    """Sizes of a Z-Image transformer; the rotary axes are of a config, or the published ones for heads of 128.

    Raises:
        WeightsError: a tensor is missing, the config says otherwise, or it is a model of another kind.
    """
    hidden, in_channels = shape(header, names("x_embedder.weight")[0], 2)
    (head,) = shape(header, names("layers.0.attention.q_norm.scale")[0], 1)
    inner, _ = shape(header, names("layers.0.feed_forward.w1.weight")[0], 2)
    if not hidden or not head or not inner:
        raise WeightsError(f"{header.path} has a transformer of width {hidden} with heads of {head}")
    if "siglip_pad_token" in header.tensors:
        raise WeightsError(f"{header.path} takes images as a condition (Z-Image-Omni, -Edit): not supported")
    time, _ = shape(header, names("t_embedder.in_layer.weight")[0], 2)
    level, _ = shape(header, names("t_embedder.out_layer.weight")[0], 2)
    context = shape(header, names("cap_embedder.1.weight")[0], 2)[1]
    layers, refiners = (
        count_numbered(header, names, f"{kind}.{{}}.feed_forward.w1.weight") for kind in ("layers", "noise_refiner")
    )
    config = config_of(header, CLASS)
    sizes = {"dim": hidden, "n_heads": hidden // head, "n_layers": layers, "n_refiner_layers": refiners}
    agree(header, config, sizes | {"cap_feat_dim": context, "in_channels": in_channels // 4})
    as_published(header, config, SETTINGS | {"n_kv_heads": hidden // head})
    axes = axes_of(header, config, head, ZImageParams.axes, key="axes_dims")
    with sizes_of(header):
        return ZImageParams(
            in_channels=in_channels,
            out_channels=shape(header, names("final_layer.linear.weight")[0], 2)[0],
            context=context,
            hidden=hidden,
            heads=hidden // head,
            axes=axes,
            mlp_ratio=1.5 * inner / hidden,
            layers=layers,
            refiners=refiners,
            theta=config.number("rope_theta", ZImageParams.theta, low=1),
            level=level,
            time=time,
        )


ZIMAGE_TRANSFORMER = PublishedTransformer(
    "a Z-Image transformer", zimage_names, zimage_params, ZImage, transformer_layout,
    unread=r"norm_final\.weight",  # in some single files, and used by none
    joined="layers.0.attention.qkv.weight", narrow=lambda net: (*net.context_refiner, *net.stack()),
)  # fmt: skip

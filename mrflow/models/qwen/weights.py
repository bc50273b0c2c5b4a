"""Which tensors of Qwen-Image's published checkpoints the parameters of our models are, and sizes off the shapes.

The transformer is published under diffusers' names alone; the autoencoder under diffusers' and under Wan's.
"""

import copy
import re
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from mrflow.checkpoints.safetensors import CheckedNetwork, Header, assemble, fill_module, save_file
from mrflow.display.notes import note
from mrflow.errors import ResourceError, WeightsError
from mrflow.models.blocks import tables
from mrflow.models.folded import FoldedLinear
from mrflow.models.fp8 import Fp8Linear
from mrflow.models.headers import (
    ATTENTION,
    Names,
    agree,
    as_published,
    axes_of,
    config_of,
    count_numbered,
    layout_by_name,
    shape,
    transformer_layout,
)
from mrflow.models.prepared import Published, PublishedTransformer, sizes_of
from mrflow.models.qwen.transformer import QwenImage, QwenParams
from mrflow.models.qwen.vae import QwenVaeParams, VaeQwen

CLASS, VAE_CLASS = "QwenImageTransformer2DModel", "AutoencoderKLQwenImage"
TOP = {
    "img_in": ("img_in",),
    "txt_norm": ("txt_norm",),
    "txt_in": ("txt_in",),
    "time_in.in_layer": ("time_text_embed.timestep_embedder.linear_1",),
    "time_in.out_layer": ("time_text_embed.timestep_embedder.linear_2",),
    "final_layer.linear": ("proj_out",),
    "final_layer.adaLN_modulation.1": ("norm_out.linear",),
}
BLOCK = ATTENTION | {
    "img_mod.lin": ("img_mod.1",),
    "txt_mod.lin": ("txt_mod.1",),
    "img_mlp.0": ("img_mlp.net.0.proj",),
    "img_mlp.2": ("img_mlp.net.2",),
    "txt_mlp.0": ("txt_mlp.net.0.proj",),
    "txt_mlp.2": ("txt_mlp.net.2",),
}
# Same keys, another forward (diffusers config): Qwen-Image-Edit-2511, -Layered.
OTHER = ("zero_cond_t", "use_additional_t_cond", "use_layer3d_rope")


def read_folded(
    prepared: CheckedNetwork[QwenImage], sigmas: Sequence[float], *, device: torch.device, keep: Path | None = None
) -> tuple[QwenImage, dict[float, Tensor]]:
    """All weights but those of modulations, and the modulations of these levels, which are made once and kept.

    Each linear is read, serves all levels and is let go; where `keep` holds the tables already, none is read.
    """
    net = prepared.net
    names = {id(m): n for n, m in net.named_modules()}
    linears = [names[id(m)] for m in net.modulators()]
    gone = {f"{name}.{leaf}" for name in linears for leaf in ("weight", "bias")}
    fill_module(net, prepared.header, prepared.layout, dtype=prepared.dtype, device=prepared.device, skip=gone)
    for name in linears:
        owner, _, leaf = name.rpartition(".")
        old = net.get_submodule(name)
        assert isinstance(old, nn.Linear | Fp8Linear)
        setattr(net.get_submodule(owner), leaf, FoldedLinear(*reversed(old.weight.shape)))
    known = kept_tables(keep)
    if set(sigmas) <= set(known):
        return net, known

    def linear(name: str) -> nn.Module:
        parts = (assemble(prepared.header, prepared.layout[f"{name}.{leaf}"], {}, dtype=prepared.dtype, device=device)
                 for leaf in ("weight", "bias"))  # fmt: skip
        return Given(*parts)

    with torch.inference_mode():
        here = next(net.time_in.parameters()).device == device  # a copy, elsewhere in memory, may round differently
        embedder = net.time_in if here else copy.deepcopy(net.time_in).to(device)
        vectors = [net.conditioning_vector(torch.full((1,), sigma, device=device), embedder) for sigma in sigmas]
        first = net.final_layer.scale_first
        made = tables((linear(name) for name in linears), vectors, net.params.hidden, scale_first=first)
    out = {sigma: table.cpu() for sigma, table in zip(sigmas, made, strict=True)}
    if keep is not None:
        try:
            keep.parent.mkdir(parents=True, exist_ok=True)
            save_file({repr(sigma): table for sigma, table in out.items()}, keep)
        except (OSError, ResourceError) as error:
            note(f"modulations could not be kept for the next time: {error}; $MRFLOW_CACHE names another folder")
    return net, out


def kept_tables(path: Path | None) -> dict[float, Tensor]:
    """Modulations that were kept, by level; none where there is no file or a broken one."""
    if path is None or not path.is_file():
        return {}
    try:
        return {float(name): table for name, table in load_file(path).items()}
    except (OSError, SafetensorError, ValueError):
        return {}


class Given(nn.Module):
    """A linear of tensors that are there already."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.weight, self.bias = weight, bias

    def forward(self, x: Tensor) -> Tensor:
        """x w' + b."""
        return F.linear(x, self.weight, self.bias)


def qwen_names(name: str) -> tuple[str, ...]:
    """Published names of a native parameter: q, k, v are apart there."""
    stem, _, leaf = name.rpartition(".")
    kind, _, rest = stem.partition(".")
    if kind == "double_blocks":
        index, _, rest = rest.partition(".")
        targets = tuple(f"transformer_blocks.{index}.{t}" for t in BLOCK[rest])
    else:
        targets = TOP[stem]
    return tuple(f"{t}.{'weight' if leaf == 'scale' else leaf}" for t in targets)


def qwen_params(header: Header, names: Names) -> QwenParams:
    """Sizes of a Qwen-Image transformer; the rotary axes are of a config, or the published ones for heads of 128."""
    hidden, in_channels = shape(header, names("img_in.weight")[0], 2)
    (head,) = shape(header, names("double_blocks.0.img_attn.norm.query_norm.scale")[0], 1)
    mlp, _ = shape(header, names("double_blocks.0.img_mlp.0.weight")[0], 2)
    if not hidden or not head:
        raise WeightsError(f"{header.path} has a transformer of width {hidden} with heads of {head}")
    blocks = count_numbered(header, names, "double_blocks.{}.img_mod.lin.weight")
    context = shape(header, names("txt_in.weight")[0], 2)[1]
    config = config_of(header, CLASS)
    if odd := [flag for flag in OTHER if config.get(flag)]:
        raise WeightsError(f"{header.path}: its config sets {odd[0]}: another model than Qwen-Image, not supported")
    sizes = {"attention_head_dim": head, "num_attention_heads": hidden // head, "num_layers": blocks}
    agree(header, config, sizes | {"in_channels": in_channels, "joint_attention_dim": context})
    as_published(header, config, {"patch_size": 2})
    axes = axes_of(header, config, head, QwenParams.axes)
    with sizes_of(header):
        return QwenParams(
            in_channels=in_channels,
            out_channels=shape(header, names("final_layer.linear.weight")[0], 2)[0],
            context=context,
            hidden=hidden,
            heads=hidden // head,
            axes=axes,
            mlp_ratio=mlp / hidden,
            double_blocks=blocks,
        )


WAN_RULES = (
    (r"^quant_conv\.", "conv1."),
    (r"^post_quant_conv\.", "conv2."),
    (r"coder\.conv_in\.", "coder.conv1."),
    (r"coder\.norm_out\.", "coder.head.0."),
    (r"coder\.conv_out\.", "coder.head.2."),
    (r"\.mid_block\.resnets\.0\.", ".middle.0."),
    (r"\.mid_block\.attentions\.0\.", ".middle.1."),
    (r"\.mid_block\.resnets\.1\.", ".middle.2."),
    (r"\.down_blocks\.", ".downsamples."),
    (r"(samples\.\d+|middle\.[02])\.norm1\.", r"\1.residual.0."),
    (r"(samples\.\d+|middle\.[02])\.conv1\.", r"\1.residual.2."),
    (r"(samples\.\d+|middle\.[02])\.norm2\.", r"\1.residual.3."),
    (r"(samples\.\d+|middle\.[02])\.conv2\.", r"\1.residual.6."),
    (r"\.conv_shortcut\.", ".shortcut."),
)


def same(name: str) -> tuple[str, ...]:
    """diffusers' names are the native ones."""
    return (name,)


def wan(name: str) -> tuple[str, ...]:
    """Wan's names of a native autoencoder parameter; it counts residual blocks and changes of size in one row."""
    name = re.sub(r"\.up_blocks\.(\d)\.resnets\.(\d)\.", lambda m: f".upsamples.{4 * int(m[1]) + int(m[2])}.", name)
    name = re.sub(r"\.up_blocks\.(\d)\.upsamplers\.0\.", lambda m: f".upsamples.{4 * int(m[1]) + 3}.", name)
    for pattern, replacement in WAN_RULES:
        name = re.sub(pattern, replacement, name)
    return (name,)


def qwen_vae_params(header: Header, names: Names) -> QwenVaeParams:
    """Sizes of the autoencoder; mean and std of the latents are of a config, or the published ones for 16 channels."""
    channels: list[int] = []
    width, residuals, index = 0, 0, 0
    while True:
        if (conv := names(f"encoder.down_blocks.{index}.conv1.weight")[0]) in header.tensors:
            width, residuals = shape(header, conv, 5)[0], residuals + 1
        elif names(f"encoder.down_blocks.{index}.resample.1.weight")[0] in header.tensors:
            channels.append(width)
        else:
            break
        index += 1
    channels.append(width)
    latent = shape(header, names("post_quant_conv.weight")[0], 5)[0]
    config = config_of(header, VAE_CLASS)
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if latent != 16 and (mean is None or std is None):
        raise WeightsError(f"{header.path}: {latent} latent channels, but no config.json says their mean and std")
    agree(header, config, {"z_dim": latent, "base_dim": channels[0]})
    as_published(header, config, {"attn_scales": [], "input_channels": 3})
    with sizes_of(header):
        return QwenVaeParams(
            channels=tuple(channels),
            latent=latent,
            blocks=residuals // len(channels),
            mean=config.numbers("latents_mean", QwenVaeParams.mean, count=latent),
            std=config.numbers("latents_std", QwenVaeParams.std, count=latent),
        )


QWEN_TRANSFORMER = PublishedTransformer(
    "a Qwen-Image transformer", lambda header: qwen_names, qwen_params, QwenImage, transformer_layout,
    joined="double_blocks.0.img_attn.qkv.weight",
)  # fmt: skip
QWEN_AUTOENCODER = Published(
    "a Qwen-Image autoencoder",
    lambda header: wan if "decoder.middle.0.residual.0.gamma" in header.tensors else same,
    qwen_vae_params, VaeQwen, layout_by_name,
    unread=r".*\.time_conv\..*", framed=True,  # what only video needs
)  # fmt: skip

"""LoRA files in every published layout, of one and the same set of low-rank changes."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from mrflow.models.flux.transformer import FluxParams

Low = tuple[Tensor, Tensor]  # down (rank, in), up (out, rank)


def flux_linears(p: FluxParams) -> dict[str, tuple[int, int]]:
    """Some linears of a FLUX transformer, of every kind, by their native names: (out, in)."""
    d, mlp = p.hidden, p.mlp
    return {
        "double_blocks.0.img_attn.qkv": (3 * d, d),
        "double_blocks.1.txt_attn.qkv": (3 * d, d),
        "double_blocks.0.txt_attn.proj": (d, d),
        "double_blocks.1.img_mlp.0": (mlp, d),
        "double_blocks.0.txt_mlp.2": (d, mlp),
        "double_blocks.1.img_mod.lin": (6 * d, d),
        "single_blocks.0.linear1": (3 * d + mlp, d),
        "single_blocks.2.linear2": (d, d + mlp),
        "single_blocks.1.modulation.lin": (3 * d, d),
        "img_in": (d, p.in_channels),
        "txt_in": (d, p.context),
        "time_in.in_layer": (d, 256),
        "vector_in.out_layer": (d, d),
        "guidance_in.in_layer": (d, 256),
        "final_layer.linear": (p.out_channels, d),
        "final_layer.adaLN_modulation.1": (2 * d, d),
    }


def low_rank(sizes: dict[str, tuple[int, int]], *, rank: int = 3, seed: int = 0) -> dict[str, Low]:
    """Random matrices for each linear."""
    g = torch.Generator().manual_seed(seed)
    return {
        name: (torch.randn(rank, i, generator=g) / i**0.5, torch.randn(o, rank, generator=g) / rank)
        for name, (o, i) in sizes.items()
    }


DIFFUSERS = {
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "txt_attn.proj": ("attn.to_add_out",),
    "img_mlp.0": ("ff.net.0.proj",),
    "txt_mlp.2": ("ff_context.net.2",),
    "img_mod.lin": ("norm1.linear",),
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2": ("proj_out",),
    "modulation.lin": ("norm.linear",),
    "img_in": ("x_embedder",),
    "txt_in": ("context_embedder",),
    "time_in.in_layer": ("time_text_embed.timestep_embedder.linear_1",),
    "vector_in.out_layer": ("time_text_embed.text_embedder.linear_2",),
    "guidance_in.in_layer": ("time_text_embed.guidance_embedder.linear_1",),
    "final_layer.linear": ("proj_out",),
    "final_layer.adaLN_modulation.1": ("norm_out.linear",),
}


def diffusers_names(changes: dict[str, Low], hidden: int) -> dict[str, Low]:
    """The same changes by diffusers' names: q, k, v apart, and the last modulation as (scale, shift)."""
    out: dict[str, Low] = {}
    for name, (down, up) in changes.items():
        kind, _, rest = name.partition(".")
        index, _, leaf = rest.partition(".")
        folder = {"double_blocks": "transformer_blocks", "single_blocks": "single_transformer_blocks"}.get(kind)
        parts = DIFFUSERS[leaf if folder else name]
        rows = [len(up)] if len(parts) == 1 else [hidden] * 3 + [len(up) - 3 * hidden] * (len(parts) - 3)
        for part, piece in zip(parts, up.split(rows), strict=True):
            if part == "norm_out.linear":
                piece = torch.cat(tuple(reversed(piece.chunk(2))))
            out[f"{folder}.{index}.{part}" if folder else part] = (down, piece)
    return out


def dotted(down: str, up: str, prefix: str, *, scale: float = 1.0) -> Callable[[str, Low], dict[str, Tensor]]:
    """Two tensors a linear; `scale` is divided out of what is written, as an alpha in metadata puts it back."""
    return lambda name, low: {f"{prefix}{name}{down}": low[0], f"{prefix}{name}{up}": low[1] / scale}


def kohya(prefix: str, *, alpha: float) -> Callable[[str, Low], dict[str, Tensor]]:
    """Underscores, and an alpha beside each pair."""

    def tensors(name: str, low: Low) -> dict[str, Tensor]:
        stem, rank = prefix + name.replace(".", "_"), len(low[0])
        return {
            f"{stem}.lora_down.weight": low[0],
            f"{stem}.lora_up.weight": low[1] * rank / alpha,
            f"{stem}.alpha": torch.tensor(alpha),
        }

    return tensors


PEFT = {
    "lora_adapter_metadata": json.dumps(
        {
            "transformer.r": 3,
            "transformer.lora_alpha": 6.0,
            "transformer.target_modules": sorted({part for parts in DIFFUSERS.values() for part in parts}),
        }
    )
}
# name -> (native or diffusers names, how a pair is written, metadata)
LAYOUTS: dict[str, tuple[bool, Callable[[str, Low], dict[str, Tensor]], dict[str, str]]] = {
    "peft": (True, dotted(".lora_A.weight", ".lora_B.weight", "transformer."), {}),
    "peft with alpha": (True, dotted(".lora_A.weight", ".lora_B.weight", "transformer.", scale=2.0), PEFT),
    "peft with names": (True, dotted(".lora_A.default.weight", ".lora_B.default.weight", "base_model.model."), {}),
    "diffusers before peft": (True, dotted(".lora.down.weight", ".lora.up.weight", "transformer."), {}),
    "bare": (True, dotted(".lora_A.weight", ".lora_B.weight", ""), {}),
    "sd-scripts": (False, kohya("lora_unet_", alpha=1.5), {}),
    "onetrainer": (True, kohya("lora_transformer_", alpha=4.0), {}),
    "comfyui": (False, dotted(".lora_down.weight", ".lora_up.weight", "diffusion_model."), {}),
    "comfyui, A and B": (False, dotted(".lora_A.weight", ".lora_B.weight", "diffusion_model."), {}),
    "black forest labs": (False, dotted(".lora_A.weight", ".lora_B.weight", ""), {}),
    "fal": (False, dotted(".lora_A.weight", ".lora_B.weight", "base_model.model."), {}),
}


def write_lora(path: Path, changes: dict[str, Low], *, layout: str = "peft", hidden: int = 32) -> Path:
    """A file in one of the layouts."""
    theirs, tensors, metadata = LAYOUTS[layout]
    found = diffusers_names(changes, hidden) if theirs else changes
    state: dict[str, Tensor] = {}
    for name, low in found.items():
        state |= tensors(name, low)
    save_file({k: t.clone().contiguous() for k, t in state.items()}, path, metadata=metadata or None)
    return path

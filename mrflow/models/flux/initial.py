"""Values that a FLUX transformer begins training with."""

from collections.abc import Iterator

import torch
from torch import nn

from mrflow.models.flux.transformer import Flux
from mrflow.models.layers import QKNorm


def reset(flux: Flux, generator: torch.Generator) -> None:
    """Values to train from: modulation and output zero (every block is the identity), embeddings of level and
    guidance normal with deviation 0.02, the rest Xavier-uniform, each part of a fused linear by itself."""
    d = flux.params.hidden
    modules: Iterator[tuple[str, nn.Module]] = flux.named_modules()
    for name, module in modules:
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)
            if "mod" in name or name.startswith("final_layer"):
                nn.init.zeros_(module.weight)
            elif name.startswith(("time_in", "guidance_in")):
                nn.init.normal_(module.weight, std=0.02, generator=generator)
            else:
                fused = name.endswith(("qkv", "linear1"))
                rest = module.out_features - 3 * d
                parts = [part for part in (d, d, d, rest) if part] if fused else [module.out_features]
                for part in torch.split(module.weight, parts):
                    nn.init.xavier_uniform_(part, generator=generator)
        elif isinstance(module, QKNorm):
            nn.init.ones_(module.query_norm.scale)
            nn.init.ones_(module.key_norm.scale)

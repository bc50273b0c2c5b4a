"""Chains that a table of methods is read by: what is lost where nothing is sampled, and the least that samples.

Without them a table cannot say whether its world is hard (one unguided forward may solve it), nor whether a loss comes
from sampling or from the networks that pictures are sent through.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import cast

from mrflow import recipes
from mrflow._checks import check_sides
from mrflow.guidance import CFG, Guidance
from mrflow.model_info import ModelInfo
from mrflow.spec import Pixels, Start
from mrflow.stage import AnyChain, Chain, plan
from mrflow.stages import Decode, Encode, Reinject, Truth, Upscale

StagedChain = Chain[Start, Pixels]


def controls(
    info: ModelInfo,
    *,
    low: tuple[int, int] | None = None,
    size: tuple[int, int] | None = None,
    staged: StagedChain | None = None,
    beside: Mapping[str, StagedChain] = MappingProxyType({}),
) -> dict[str, StagedChain]:
    """Control rows by label, ready to be put `beside` a sweep's chains; `low` and `size` default to the model's own.

    A chain that stands there already, or twice among these, is given once, as a sweep needs it.

    For the embedded model, whose captions have a true scene: the truth, its autoencoder, and the staged path of the
    truth (rendered at `low`, autoencoder, super-resolution, autoencoder) alone and with the end of `staged` (from
    `Reinject` on; default: `recipes.paper`). For every model: one forward without guidance, and native sampling for
    what `staged` costs, with guidance and, where that is true classifier-free guidance, without it and with the more
    steps that this pays for.

    Raises:
        PlanError: a size does not fit the model.
    """
    low, size = check_sides("low", low, info.low), check_sides("size", size, info.size)
    staged = staged or recipes.paper(low=low, size=size)
    out: dict[str, StagedChain] = {}
    if info.space.name == "pocket":
        path = Truth(*low) >> Encode() >> Decode() >> Upscale(size=size) >> Encode()
        stages = tuple(staged)
        start = next((i for i, stage in enumerate(stages) if isinstance(stage, Reinject)), None)
        out["truth"] = Chain((Truth(*size),))
        out["truth, autoencoder"] = Truth(*size) >> Encode() >> Decode()
        out["truth, staged path"] = path >> Decode()
        if start is not None:
            out["truth, staged path, refined"] = cast(StagedChain, AnyChain((*path, *stages[start:])))
    plain: Guidance | None = CFG(1.0) if info.cfg != 1 else None
    out["1 forward, unguided" if plain else "1 forward"] = recipes.native(size=size, steps=1, guidance=plain)
    for name, guidance in {"": None, ", unguided": plain}.items():
        if name and guidance is None:
            continue
        steps = affordable(staged, info, size=size, guidance=guidance)
        chain = recipes.native(size=size, steps=steps, guidance=guidance)
        out[f"native {steps}{name} (same cost)"] = chain
    first: dict[StagedChain, str] = {}
    for label, chain in out.items():
        first.setdefault(chain, label)
    return {label: chain for chain, label in first.items() if chain not in beside.values()}


def affordable(chain: StagedChain, info: ModelInfo, *, size: tuple[int, int], guidance: Guidance | None = None) -> int:
    """How many steps of native sampling cost at most what a chain costs, in planned operations; at least 1."""
    whole = plan(chain, info).work.flops
    one, two = (plan(recipes.native(size=size, steps=n, guidance=guidance), info).work.flops for n in (1, 2))
    return max(1, int((whole - one) / (two - one) + 1e-6) + 1) if two > one else 1

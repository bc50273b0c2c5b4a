"""Names of tensors behind what training programs wrap around a network: compilers, parallel wrappers, averages.

A wrapper leaves a word before every name (`module.`, `model.diffusion_model.`), or, if it wraps single layers, inside
them (`blocks.0._orig_mod.proj.weight`). Words that only wrappers use are taken out wherever they are; others are taken
off the front, in any order, and only as far as what is behind them is known.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

T = TypeVar("T")
# torch.compile, FullyShardedDataParallel, activation checkpointing, Lightning.
INSIDE = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module")
# How many models an average is of (torch's AveragedModel, ema_pytorch): no weights.
COUNTERS = ("n_averaged", "num_updates", "initted", "step")
# What stands before a network's own names.
WRAPPERS = frozenset({
    "module", "model", "transformer", "diffusion_model", "pipe", "pipeline", "student", "dit", "unet", "net", "network",
    "base_model", "model_ema", "ema_model", "ema", "online_model", "averaged_model", "denoiser", "backbone",
    "generator", "netG", "net_g", "params", "params_ema", "state_dict", "wrapped", "_model",
})  # fmt: skip
# And, in a file of several networks, before each.
PARTS = frozenset({
    "vae", "first_stage_model", "autoencoder", "text_encoder", "text_encoder_2", "text_encoders", "cond_stage_model",
    "conditioner", "clip_l", "t5xxl", "qwen25_7b", "text_model_wrapper",
})  # fmt: skip


def plain(tensors: Mapping[str, T]) -> dict[str, T]:
    """The same tensors without the words that wrappers leave inside names, and without averages' counters.

    Raises:
        ValueError: two names become one.
    """
    out: dict[str, T] = {}
    for name, tensor in tensors.items():
        new = name
        if any(word in name for word in INSIDE):
            new = ".".join(piece for piece in name.split(".") if piece not in INSIDE)
        elif name in COUNTERS or name.endswith(".n_averaged"):
            continue
        if new in out:
            raise ValueError(f"{new} is there twice, once as {name}")
        out[new] = tensor
    return out


def wraps(prefix: str, words: frozenset[str] = WRAPPERS | PARTS) -> bool:
    """Whether what stands before a name is made of wrappers' words alone; nothing is such too."""
    return not prefix or (prefix.endswith(".") and set(prefix[:-1].split(".")) <= words)


def ends(name: str) -> list[str]:
    """A name, and what is left of it without each number of wrappers' words before it."""
    found = (name.split(".", k) for k in range(name.count(".") + 1))
    return [parts[-1] for parts in found if set(parts[:-1]) <= WRAPPERS | PARTS]


def before(name: str, mark: str) -> str | None:
    """What wrappers put before `mark` to make `name`; None where it is another name."""
    if not name.endswith(mark):
        return None
    prefix = name.removesuffix(mark)
    return prefix if wraps(prefix) else None


def bare(name: str, known: Callable[[str], bool], *, also: Iterable[str] = ()) -> str | None:
    """A name as far unwrapped as it takes to be known; `also` are other beginnings that may be taken off."""
    if known(name):
        return name
    word, dot, rest = name.partition(".")
    behind = [rest] if dot and word in WRAPPERS else []
    behind += [name.removeprefix(start) for start in also if name.startswith(start)]
    found = (bare(each, known, also=also) for each in behind)
    return next((each for each in found if each is not None), None)


def common_wrapper(names: Iterable[str]) -> str:
    """The wrapper's word, with its dot, that all names begin with; empty where there is none."""
    words = {name.partition(".")[0] if "." in name else "" for name in names}
    word = next(iter(words)) if len(words) == 1 else ""
    return f"{word}." if word in WRAPPERS else ""

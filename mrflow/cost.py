"""What a chain costs, counted without weights. One multiply-add is two floating-point operations.

Only matrix products, attention and convolutions count. For a transformer of width d over S tokens (image and text),
each block of either kind costs 24 d^2 S in its linears and 4 d S^2 in attention: FLUX.1-dev 12.909e9 S + 700,416 S^2.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from mrflow.checkpoints.adapters import Lora, flops_per_token
from mrflow.errors import PlanError
from mrflow.guidance import Guidance, own_guidance
from mrflow.machine import hardware
from mrflow.model_info import CacheLike, ModelInfo, Offload
from mrflow.schedules import Sigmas
from mrflow.solvers import Solver
from mrflow.spec import Latents, Pixels, check_size
from mrflow.stage import AnyChain, Plan, Work, plan


def forward_flops(model: ModelInfo, tokens: int) -> float:
    """Operations of one forward of one item at this many image tokens; 0 where the architecture is not known.

    Text counts in every block. What a last block leaves out of it is not taken off (2.5 % of pocket at 128 px, 0.1 % of
    FLUX.1-dev at 1024 px), nor are the modulations added.
    """
    a = model.architecture
    if a is None:
        return 0.0
    s, blocks = tokens + a.text_tokens, a.double_blocks + a.single_blocks
    linear = (8 + 4 * a.mlp_ratio) * a.hidden**2 * blocks * s
    ends = 2 * a.hidden * (2 * model.space.channels * model.space.patch**2 * tokens + a.context * a.text_tokens)
    return linear + 4 * a.hidden * blocks * s**2 + ends


def evaluated_sigmas(chain: AnyChain, model: ModelInfo) -> tuple[float, ...]:
    """Every noise level at which a chain's own stages ask a model for its field, without repeats."""
    return tuple(dict.fromkeys(sigma for row in plan(chain, model).rows for sigma in row.evaluations))


def decode_flops(model: ModelInfo, height: int, width: int) -> float:
    """Operations of decoding one picture of this size in pixels."""
    linear, square = model.decode
    return linear * height * width + square * (height * width) ** 2


def encode_flops(model: ModelInfo, height: int, width: int) -> float:
    """Operations of encoding one picture of this size in pixels."""
    linear, square = model.encode
    return linear * height * width + square * (height * width) ** 2


def sampling_work(
    model: ModelInfo,
    out: Latents,
    sigmas: Sigmas,
    solver: Solver,
    guidance: Guidance | None,
    cache: CacheLike | None = None,
    lora: Sequence[Lora] = (),
) -> Work:
    """The forwards of one integration: what the solver evaluates, times the passes of the guidance there.

    A cache (the stage's, or the model's own) leaves some out: exactly where its rule goes by the step alone, else as it
    estimates, and then the work is marked so. Forwards are those that are computed; their operations include what a
    cached one still computes. Adapters count as if they lay on every token, which holds for all but modulations.

    Raises:
        PlanError: the model cannot do what the guidance needs, or the cache cannot be beside it.
    """
    chosen = guidance or own_guidance(model)
    points, one = solver.points(sigmas), forward_flops(model, out.tokens)
    if lora and model.architecture is not None:
        one += flops_per_token(lora) * (out.tokens + model.architecture.text_tokens)
    whole = out.batch * one
    cache = cache or model.cache
    model.require(chosen.needs)
    if cache is not None and chosen.needs.attention:
        raise PlanError(f"{chosen!r} works inside attention, which {cache!r} leaves out; take one of them")
    if cache is None:
        nfe = chosen.evals(points)
        return Work(nfe=nfe, flops=nfe * whole, negative=chosen.passes > 1, estimated=solver.estimated)

    parts = [cache.forecast(model, points, branch) for branch in chosen.branches(points)]
    return Work(
        nfe=sum(part.computed for part in parts),
        flops=sum(part.forwards for part in parts) * whole * cache.share(model, out.tokens),
        negative=chosen.passes > 1,
        estimated=not all(part.exact for part in parts),
    )


def half(size: tuple[int, int], model: ModelInfo) -> tuple[int, int]:
    """The low-resolution size of a ladder of two: half of each side.

    Raises:
        PlanError: half a side is no whole number of tokens; the nearest size that works is offered.
    """
    check_size(*size, model.space)
    step = 2 * model.space.multiple
    if size[0] % step or size[1] % step:
        near = tuple(max(step, step * round(side / step)) for side in size)
        raise PlanError(
            f"half of {size[0]}x{size[1]} is not a multiple of {model.space.multiple}; "
            f"try {near[0]}x{near[1]}, or say the low size too"
        )
    return size[0] // 2, size[1] // 2


H200 = ("H200, bf16", 790e12, 4.3e12)  # sustained FLOP/s of a dense product, bytes/s of its memory


def floor_seconds(planned: Plan, *, flops: float = H200[1], bandwidth: float = H200[2]) -> float:
    """The least time a plan takes on a device: each forward is bound by arithmetic or by reading the weights once."""
    a = planned.model.architecture
    weights = 2 * a.parameters if a else 0
    total = 0.0
    for row in planned.rows:
        total += max(row.work.flops / flops, row.work.nfe * weights / bandwidth)
    return total


ROWS = 3  # rows of tiles alive at once: measured
# On processors without bfloat16: values of a matrix that are float32 at a time (4 MiB), but rows of it at the least.
WIDE_BLOCK, WIDE_ROWS = 1 << 20, 256


@dataclass(frozen=True)
class Memory:
    """Predicted bytes on the device at the worst moment, by what is happening then."""

    moments: Mapping[str, int]

    @property
    def peak(self) -> int:
        """The most."""
        return max(self.moments.values())

    @property
    def worst(self) -> str:
        """What happens then."""
        return max(self.moments, key=lambda name: self.moments[name])


def memory(
    planned: Plan,
    *,
    offload: Offload = "none",
    storage: str | None = None,
    fold: bool = True,
    value_bytes: int = 2,
    device: str = "cuda",
) -> Memory | None:
    """What a plan needs on the device: weights that are there, and values alive at once; None where sizes are unknown.

    For a model that is not loaded, weights are counted in bfloat16, and `storage="fp8"` halves its blocks. Attention is
    taken to keep no table of scores, convolutions no workspace: a GPU's libraries may take more. Values of two bytes
    (`value_bytes`) are bfloat16: on `device="cpu"`, where this processor has no instructions for it, transformers keep
    theirs in float32, and a part of a matrix too; autoencoders are float32 (`mrflow.models.wide`).
    """
    info = planned.model
    f, a = info.footprint, info.architecture
    if f is None or a is None:
        return None
    if storage == "fp8" and not info.version:
        f = replace(
            f,
            blocks=f.blocks // 2,
            block_pair=f.block_pair // 2,
            modulation=f.modulation // 2,
            modulation_pair=f.modulation_pair // 2,
        )
    text = f.text + (f.text_pair if offload == "block" else f.text_layers)
    wide = value_bytes == 2 and device == "cpu" and not hardware.has_bfloat16()
    steady = f.rest + f.autoencoder * (2 if wide else 1) + (f.block_pair if offload == "block" else f.blocks)
    folding = 0
    if offload == "none" or (offload == "phase" and not fold):
        steady += f.modulation
    elif offload == "phase":
        folding = f.modulation_pair
    else:
        folding = max(0, f.modulation_pair - f.block_pair)
    beside = text if offload == "none" else 0
    largest = int((3 + a.mlp_ratio) * a.hidden**2)  # what a single block's first product is, all parts joined
    cast = 4 * min(largest, max(WIDE_BLOCK, int(WIDE_ROWS * (1 + a.mlp_ratio) * a.hidden))) if wide else 0
    moments = {"encoding the prompt": text + (steady if offload == "none" else 0)}
    if folding:
        moments["folding modulations"] = steady + folding + beside
    for row in planned.rows:
        values, size, more = 0.0, 4 if wide else value_bytes, 0
        pixels = next((s for s in (row.out, row.spec) if isinstance(s, Pixels)), None)
        if row.work.nfe and isinstance(row.out, Latents):
            more = cast
            values = f.forward_values * ((row.tokens or row.out.tokens) + a.text_tokens) * a.hidden * row.out.batch
            if row.parts > 1:  # tiles lie in a row as float32: what is given and comes back, in parts and whole
                cells = row.tokens * row.parts * info.space.channels * info.space.patch**2
                values += ROWS * cells * row.out.batch * 4 / size
            values *= 2 if row.work.negative else 1  # both branches of the guidance in one pass
        elif pixels is not None and isinstance(row.spec, Latents) != isinstance(row.out, Latents):
            per_pixel = f.encode_values if isinstance(row.out, Latents) else f.decode_values
            values = per_pixel * pixels.batch * pixels.height * pixels.width
        if values:
            name = f"{row.name} {row.out}"
            moments[name] = max(moments.get(name, 0), steady + beside + more + int(values * size))
    return Memory(moments)

"""What a pipeline's parts say of themselves: the schedule its scheduler runs, and sizes."""

from collections.abc import Mapping, Sequence, Sized
from typing import Any, TypeAlias

from torch import nn

from mrflow.bridge.version import unwrap
from mrflow.checkpoints.blueprint import blueprint
from mrflow.errors import PlanError
from mrflow.model_info import FLUX, Shift
from mrflow.models.scheduler import FLOW, curve_of


def bridged_shift(scheduler: Any, *, own_grid: bool = False) -> Shift:  # noqa: ANN401
    """The curve of noise levels that a flow-matching scheduler gives; it is read, never run.

    As `set_timesteps` does: with dynamic shifting the line of the config, else the factor that `set_shift` may have
    changed. `own_grid` says that the pipeline leaves the even grid to the scheduler, which ends it at `sigma_min`.

    Raises:
        PlanError: another kind of scheduler, or one set to levels that are not such a curve.
    """
    kind = type(scheduler)
    name = FLOW if FLOW in {c.__name__ for c in kind.__mro__} else kind.__name__
    static = float(scheduler.shift) if name == FLOW else None
    last = float(scheduler.sigma_min) if own_grid else None
    return curve_of(getattr(scheduler, "config", {}), "the pipeline's scheduler", name=name, shift=static, last=last)


def check_encoders(pipe: Any, words: Sequence[str], widths: Mapping[str, int]) -> None:  # noqa: ANN401
    """Hold text encoders against their tokenizers and the transformer; `words` names both in turns, none is run.

    `widths` says how wide the states of an encoder must be. Parts that are missing, or say neither, are left out.

    Raises:
        PlanError: a tokenizer knows more tokens than its encoder, or an encoder's states are of another width.
    """
    advice = (
        "if two folders of the pipeline were exchanged (text_encoder and text_encoder_2, tokenizer and tokenizer_2), "
        "put them back, else load it whole from its repository"
    )
    for encoder, tokenizer in zip(words[::2], words[1::2], strict=True):
        net, reader = getattr(pipe, encoder, None), getattr(pipe, tokenizer, None)
        reader = getattr(reader, "tokenizer", reader)
        if net is None or not hasattr(net, "get_input_embeddings"):
            continue
        who, rows = f"{encoder} ({type(net).__name__})", int(net.get_input_embeddings().weight.shape[0])
        if isinstance(reader, Sized) and len(reader) > rows:
            raise PlanError(
                f"{type(pipe).__name__}: {tokenizer} ({type(reader).__name__}) knows {len(reader)} tokens, {who} has "
                f"{rows}, so they are not of one model: {advice}"
            )
        width = int(net.config.get_text_config().hidden_size)
        if width != widths.get(encoder, width):
            raise PlanError(
                f"{type(pipe).__name__}: {who} gives states of width {width}, the transformer takes {widths[encoder]}: "
                f"{advice}"
            )


def parameters_of(module: nn.Module) -> int:
    """How many parameters a network has; of a quantised one, as many as its config makes."""
    net: Any = unwrap(module)
    if all(p.is_floating_point() and type(p) is nn.Parameter for p in net.parameters()):
        return sum(p.numel() for p in net.parameters())
    with blueprint():
        return sum(p.numel() for p in type(net).from_config(dict(net.config)).parameters())


Flops: TypeAlias = tuple[float, float]
PUBLISHED = (128, 256, 512, 512)  # channels of the autoencoders whose operations spec.py states


def vae_flops(vae: Any) -> tuple[Flops, Flops]:  # noqa: ANN401
    """Operations of encoding and decoding: FLUX's autoencoder's, where the sizes are its; others are not counted."""
    if tuple(vae.config.get("block_out_channels", ())) != PUBLISHED:
        return (0.0, 0.0), (0.0, 0.0)
    return FLUX.encode, FLUX.decode


def downscale(vae: Any) -> int:  # noqa: ANN401
    """Pixels per latent cell of an AutoencoderKL."""
    return int(2 ** (len(vae.config.block_out_channels) - 1))

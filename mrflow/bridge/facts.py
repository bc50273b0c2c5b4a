"""What a pipeline's parts say of themselves: the schedule its scheduler runs, and sizes."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypeAlias

import torch
from torch import nn

from mrflow.bridge.version import unwrapped
from mrflow.errors import PlanError
from mrflow.spec import FLUX, Shift

FLOW = "FlowMatchEulerDiscreteScheduler"
OTHER_LEVELS = {
    "use_karras_sigmas": "Karras levels: switch it off and pass schedule=mrflow.Karras(steps)",
    "use_exponential_sigmas": "exponentially spaced levels: switch it off and pass schedule=mrflow.Explicit(levels)",
    "use_beta_sigmas": "beta-spaced levels: switch it off and pass schedule=mrflow.Beta(steps)",
    "stochastic_sampling": "fresh noise in every step: switch it off and pass solver=mrflow.StochasticEuler(churn)",
    "invert_sigmas": "levels that count from clean to noise, which no bridged family uses",
}


def shift_of(scheduler: Any, *, own_grid: bool = False) -> Shift:  # noqa: ANN401
    """The curve of noise levels that a flow-matching scheduler gives; it is read, never run.

    As `set_timesteps` does: with dynamic shifting the line of the config, else the factor that `set_shift` may have
    changed. `own_grid` says that the pipeline leaves the even grid to the scheduler, which ends it at `sigma_min`.

    Raises:
        PlanError: another kind of scheduler, or one set to levels that are not such a curve.
    """
    config: Mapping[str, Any] = getattr(scheduler, "config", {})
    name = type(scheduler).__name__
    if FLOW not in {c.__name__ for c in type(scheduler).__mro__}:
        raise PlanError(
            f"the pipeline's scheduler is {name}, whose levels mrflow does not know; give it "
            f"{FLOW}.from_config(pipe.scheduler.config) (mrflow takes only the levels from it, and steps itself)"
        )
    for flag, meaning in OTHER_LEVELS.items():
        if config.get(flag):
            raise PlanError(f"the pipeline's scheduler has {flag}=True, {meaning}")
    terminal = config.get("shift_terminal") or None
    last = float(scheduler.sigma_min) if own_grid else None
    try:
        if config.get("use_dynamic_shifting"):
            return Shift(
                float(config["base_shift"]),
                float(config["max_shift"]),
                int(config["base_image_seq_len"]),
                int(config["max_image_seq_len"]),
                terminal=terminal,
                kind=config.get("time_shift_type", "exponential"),
                last=last,
            )
        return replace(Shift.fixed(float(scheduler.shift)), terminal=terminal, last=last)
    except (KeyError, TypeError, ValueError) as error:
        raise PlanError(f"the config of the pipeline's scheduler cannot be used: {error!r}") from None


def parameters(module: nn.Module) -> int:
    """How many parameters a network has; of a quantised one, as many as its config makes."""
    net: Any = unwrapped(module)
    if all(p.is_floating_point() and type(p) is nn.Parameter for p in net.parameters()):
        return sum(p.numel() for p in net.parameters())
    with torch.device("meta"):
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

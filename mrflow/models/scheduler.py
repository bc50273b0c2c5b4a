"""The curve of noise levels that a diffusers scheduler's configuration states: read, never run."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

from mrflow.checkpoints.configs import Config
from mrflow.errors import PlanError, WeightsError
from mrflow.model_info import Shift

FLOW = "FlowMatchEulerDiscreteScheduler"
# Solvers that share one table of flow levels (`use_flow_sigmas`); the levels alone are taken from them.
MULTISTEP = ("UniPCMultistepScheduler", "DPMSolverMultistepScheduler", "DEISMultistepScheduler", "SASolverScheduler")
# What FLUX's pipelines take where a configuration, as theirs, has no such settings (diffusers `calculate_shift`).
LINE = {"base_shift": 0.5, "max_shift": 1.15, "base_image_seq_len": 256, "max_image_seq_len": 4096}
OTHER_LEVELS = {
    "use_karras_sigmas": "Karras levels: switch it off and pass schedule=mrflow.Karras(steps)",
    "use_exponential_sigmas": "exponentially spaced levels: switch it off and pass schedule=mrflow.Explicit(levels)",
    "use_beta_sigmas": "beta-spaced levels: switch it off and pass schedule=mrflow.Beta(steps)",
    "use_lu_lambdas": "levels even in half the log-SNR: switch it off and pass schedule=mrflow.Explicit(levels)",
    "stochastic_sampling": "fresh noise in every step: switch it off and pass solver=mrflow.StochasticEuler(churn)",
    "invert_sigmas": "levels that count from clean to noise, which no model here uses",
}


def curve_of(
    config: Mapping[str, Any], what: str, *, name: str = "", shift: float | None = None, last: float | None = None
) -> Shift:
    """The curve of levels of diffusers' `set_timesteps(sigmas=even)` for a configuration.

    `what` begins the errors; `name` is the scheduler's class, by default the one that the configuration states; `shift`
    overrides the static factor; `last` is where the even grid ends before 0 (`Shift.last`).

    Raises:
        PlanError: another class, or a switch whose levels are no such curve.
    """
    name = name or str(config.get("_class_name") or FLOW)
    try:
        return _curve(Config(config, f"{what} cannot be used"), what, name, shift, last)
    except (WeightsError, PlanError) as error:
        raise PlanError(str(error)) from None
    except (TypeError, ValueError, OverflowError) as error:
        raise PlanError(f"{what} cannot be used: {error!r}") from None


def _curve(config: Config, what: str, name: str, shift: float | None, last: float | None) -> Shift:
    flow = name in MULTISTEP and config.flag("use_flow_sigmas")
    if name != FLOW and not flow:
        raise PlanError(
            f"{what} is {name}, whose levels mrflow does not know; give it {FLOW}.from_config(scheduler.config) "
            "(mrflow takes only the levels from it, and steps itself)"
        )
    for flag, meaning in OTHER_LEVELS.items():
        if config.flag(flag):
            raise PlanError(f"{what} has {flag}=True, {meaning}")
    if flow and str(way := config.get("algorithm_type", "")).startswith("sde-"):
        raise PlanError(f"{what} has algorithm_type={way!r}, {OTHER_LEVELS['stochastic_sampling']}")
    if flow and config.get("final_sigmas_type", "zero") != "zero":
        raise PlanError(f"{what} has final_sigmas_type={config['final_sigmas_type']!r}; a schedule here ends at 0")
    if (count := config.get("num_train_timesteps", 1000)) != 1000:
        raise PlanError(f"{what} has num_train_timesteps={count!r}; the models here were trained on 1000")
    line = Config(LINE | dict(config), config.where) if flow else config
    try:
        terminal = line.number("shift_terminal", 0.0, low=0, high=1) or None
        if config.flag("use_dynamic_shifting"):
            return Shift(
                line.number("base_shift", low=-100, high=100),
                line.number("max_shift", low=-100, high=100),
                line.whole("base_image_seq_len"),
                line.whole("max_image_seq_len"),
                terminal=terminal,
                kind=cast("Any", line.word("time_shift_type", "exponential", ("exponential", "linear"))),
                last=last,
            )
        factor = line.number("flow_shift" if flow else "shift", 1.0) if shift is None else shift
        return replace(Shift.fixed(float(factor)), terminal=terminal, last=last)
    except PlanError as error:
        raise PlanError(f"{config.where}: {error}") from None


def shift_of(scheduler: Mapping[str, Any], path: object) -> Shift | None:
    """The curve of levels that a repository's scheduler_config.json states; None where it has none.

    Raises:
        WeightsError: it states levels that mrflow does not have.
    """
    try:
        return curve_of(scheduler, f"{path}: the scheduler of scheduler_config.json") if scheduler else None
    except PlanError as error:
        raise WeightsError(str(error)) from None

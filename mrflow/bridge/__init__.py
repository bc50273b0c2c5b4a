"""Models that diffusers loads as backbones, and chains that look like its pipelines. Needs the extra `[diffusers]`."""

from typing import Any

from mrflow._checks import check_whole, require
from mrflow.bridge.base import Bridged as Bridged
from mrflow.bridge.flux import BridgedFlux as BridgedFlux
from mrflow.bridge.flux import Control as Control
from mrflow.bridge.flux2 import BridgedFlux2 as BridgedFlux2
from mrflow.bridge.flux2 import BridgedFlux2Dev as BridgedFlux2Dev
from mrflow.bridge.krea2 import BridgedKrea2 as BridgedKrea2
from mrflow.bridge.pipeline import ChainPipeline as ChainPipeline
from mrflow.bridge.pipeline import to_diffusers as to_diffusers
from mrflow.bridge.presets import PRESETS as PRESETS
from mrflow.bridge.presets import Preset as Preset
from mrflow.bridge.presets import preset as preset
from mrflow.bridge.qwen import BridgedQwen as BridgedQwen
from mrflow.bridge.qwen21 import BridgedQwen21 as BridgedQwen21
from mrflow.bridge.sd3 import BridgedSD3 as BridgedSD3
from mrflow.bridge.zimage import BridgedZImage as BridgedZImage
from mrflow.errors import PlanError
from mrflow.guidance import check_scale
from mrflow.protocols.upscaler import Upscaler

MAX_TOKENS = 4096  # far more than any of these text encoders is trained for
FAMILIES: tuple[type[Bridged], ...] = (
    BridgedFlux,
    BridgedQwen,
    BridgedQwen21,
    BridgedSD3,
    BridgedFlux2,
    BridgedFlux2Dev,
    BridgedKrea2,
    BridgedZImage,
)


def from_diffusers(
    pipe: Any,  # noqa: ANN401
    *,
    guidance: float | None = None,
    text_tokens: int | None = None,
    control: Control | None = None,
    upscaler: Upscaler | None = None,
) -> Bridged:
    """A diffusers pipeline as a backbone: its own parts, called as it calls them, and left as they were found.

    No weights are copied. Dtype, device, quantisation, offload hooks, attention processors and adapters are the
    pipeline's and may change later; `info.version` then changes with them.

    Args:
        pipe: a pipeline of FLUX.1 (with a ControlNet too), Qwen-Image, Qwen-Image-2.1, Stable Diffusion 3, FLUX.2,
            Krea-2 or Z-Image.
        guidance: the value of a distilled guidance embedding, or the scale of classifier-free guidance (1: none),
            where it is not the pipeline's default: 3.5 for Stable Diffusion 3.5 Large, 1 for its Turbo.
        text_tokens: how many tokens of a prompt are seen; None is the family's own.
        control: what the ControlNet of a FluxControlNetPipeline follows.
        upscaler: what `Upscale()` uses when none is named.

    Raises:
        PlanError: not a pipeline, one of another family or another kind of model, a missing part, or a scheduler whose
            levels are not a flow's; before any work.
    """
    names = {c.__name__ for c in type(pipe).__mro__ if c.__module__.split(".")[0] == "diffusers"}
    if "DiffusionPipeline" not in names:
        raise PlanError(
            f"from_diffusers takes a pipeline object that diffusers loaded, got {type(pipe).__name__}; a hub id, "
            "folder or file goes to mrflow.load"
        )
    if guidance is not None:
        check_scale("guidance", guidance)
    if text_tokens is not None:
        check_whole("text_tokens", text_tokens, 1, MAX_TOKENS)
    require(control is None or isinstance(control, Control), "control", "a Control(pixels)", control)
    require(upscaler is None or isinstance(upscaler, Upscaler), "upscaler", "an upscaler, as Lanczos(2)", upscaler)
    for family in FAMILIES:
        if names & set(family.accepts):
            if family is BridgedFlux:
                return BridgedFlux(pipe, guidance=guidance, text_tokens=text_tokens, control=control, upscaler=upscaler)
            if control is not None:
                raise PlanError(f"control= is for FLUX.1 with a ControlNet, not for {type(pipe).__name__}")
            return family(pipe, guidance=guidance, text_tokens=text_tokens, upscaler=upscaler)
    raise PlanError(refusal(pipe))


def refusal(pipe: Any) -> str:  # noqa: ANN401
    """Why a pipeline cannot be bridged."""
    known = ", ".join(family.accepts[0] for family in FAMILIES)
    name, scheduler = type(pipe).__name__, getattr(pipe, "scheduler", None)
    predicts = getattr(scheduler, "config", {}).get("prediction_type")
    if predicts in ("epsilon", "v_prediction", "sample"):
        return (
            f"{name} predicts {predicts} on a diffusion schedule ({type(scheduler).__name__}); mrflow integrates "
            f"rectified flows. Bridged are {known}"
        )
    return f"{name} is of no family that is bridged; these are: {known}"

"""The settings that the official MrFlow scripts use for each family, and the chain that they run.

Source: Xingyu-Zheng/MrFlow at 108837b. What its FLUX.2 and Z-Image examples pass as a noise level goes through the
model's timestep shift before it is used, so the level that noise is injected at is another one.
"""

from dataclasses import dataclass

from mrflow import recipes
from mrflow.errors import PlanError
from mrflow.model_info import ModelInfo
from mrflow.noise import Stream
from mrflow.protocols.upscaler import Upscaler
from mrflow.schedules import DirectSigma, Shifted, shift, shift_linear
from mrflow.spec import Pixels, Start
from mrflow.stage import Chain
from mrflow.stages import Decode, Encode, Refine, Reinject, Sample, Upscale


@dataclass(frozen=True)
class Preset:
    """Low-resolution steps and the level noise is injected at; one refinement step.

    `shifted`: the level is given before the model's shift, at the large picture's tokens and one step. `sampled`: the
    posterior is sampled, before the injected noise is drawn; otherwise its mode is taken.
    """

    steps: int
    sigma: float
    shifted: bool = False
    sampled: bool = True

    def level(self, model: ModelInfo, size: tuple[int, int]) -> float:
        """The noise level that refinement begins at."""
        if not self.shifted:
            return self.sigma
        mu = model.shift.mu(model.tokens(*size), steps=1)
        return (shift if model.shift.kind == "exponential" else shift_linear)(self.sigma, mu)


# Z-Image: strength 0.11 of 9 steps leaves the last one, which begins at the ninth level of the even grid, 1/9.
PRESETS: dict[str, Preset] = {
    "flux1-dev": Preset(12, 0.12),
    "qwen-image": Preset(12, 0.12),
    "flux2-klein-base": Preset(12, 0.12, shifted=True, sampled=False),
    "flux2-klein": Preset(4, 0.25, shifted=True, sampled=False),
    "z-image": Preset(9, 1 / 9, shifted=True),
}


def preset(
    model: ModelInfo,
    upscaler: Upscaler | None = None,
    *,
    low: tuple[int, int] = (512, 512),
    size: tuple[int, int] = (1024, 1024),
    steps: int | None = None,
    sigma: float | None = None,
) -> Chain[Start, Pixels]:
    """The chain of the official script for this model's family; `steps` and `sigma` replace the preset's.

    Raises:
        PlanError: there is no official script for this family.
    """
    known = PRESETS.get(model.name)
    if known is None:
        raise PlanError(f"there is no official MrFlow preset for {model.name}, only for {', '.join(PRESETS)}")
    count = known.steps if steps is None else steps
    level = known.level(model, size) if sigma is None else sigma
    if known.sampled:
        return recipes.official(upscaler, low=low, size=size, steps=count, sigma=level)
    return (
        Sample(*low, Shifted(count), noise=Stream(0))
        >> Decode()
        >> Upscale(upscaler, size)
        >> Encode()
        >> Reinject(level, noise=Stream(1))
        >> Refine(DirectSigma(1))
        >> Decode()
    )

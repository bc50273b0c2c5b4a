"""The caption itself, drawn exactly: what the embedded model is taught, and the best that it could give."""

import random
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from mrflow.errors import PlanError
from mrflow.model_info import ModelInfo
from mrflow.scenes.hard import draw_scene
from mrflow.scenes.looks import look_of, restyle
from mrflow.scenes.render import render
from mrflow.spec import Pixels, Start, State
from mrflow.stage import Context, Stage


@dataclass(frozen=True)
class Truth(Stage[Start, Pixels]):
    """The scene of each prompt, rendered; what the prompt leaves open is drawn from its seed, alike at every size.

    No network is asked. Sent through parts of a chain (`mrflow.sweep.controls`), it shows what they keep. `look` names
    another way to draw (`mrflow.scenes.looks`), which fine-tunes are taught.

    Raises:
        PlanError: the picture is not square, there is no such look, or the model is not the embedded one. MrflowError:
            a prompt is none of its captions; the text says where reading stopped.
    """

    scope: ClassVar[str] = "Truth"
    height: int
    width: int
    look: str = ""

    def plan(self, spec: Start, model: ModelInfo) -> Pixels:
        """Pixels of the size asked for."""
        if model.space.name != "pocket":
            raise PlanError(f"only captions of the embedded model have a true scene, not those of {model.name}")
        if self.height != self.width or self.height < 1:
            raise PlanError(f"scenes are square, got {self.height}x{self.width}")
        if self.look:
            look_of(self.look)
        return Pixels(spec.batch, self.height, self.width)

    def apply(self, state: State[Start], out: Pixels, ctx: Context) -> Tensor:
        """Render, float32 in [0, 1]."""
        scenes = [draw_scene(prompt, random.Random(seed)) for prompt, seed in zip(ctx.prompts, ctx.seeds, strict=True)]
        pixels = np.stack([render(restyle(scene, self.look), out.height) for scene in scenes])
        return torch.from_numpy(pixels).permute(0, 3, 1, 2).to(ctx.model.device, torch.float32) / 255

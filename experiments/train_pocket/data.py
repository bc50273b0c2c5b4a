"""Pictures for training the embedded model: rendered once, kept as bytes."""

import random

import numpy as np
import torch
from torch import Tensor

from mrflow.scenes.grammar import World, held_out, sample_scene
from mrflow.scenes.render import render


def pictures(world: World, count: int, size: int, seed: int) -> tuple[Tensor, list[str]]:
    """`count` renders as uint8 (count, 3, size, size), and their captions; none is held out."""
    rng = random.Random(seed)
    out = torch.empty(count, 3, size, size, dtype=torch.uint8)
    captions = []
    for i in range(count):
        scene = sample_scene(world, rng)
        while held_out(scene.caption):
            scene = sample_scene(world, rng)
        out[i] = torch.from_numpy(np.array(render(scene, size))).permute(2, 0, 1)
        captions.append(scene.caption)
    return out, captions

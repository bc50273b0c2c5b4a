"""Pictures for training the embedded model, and pictures of how it goes."""

import logging
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mrflow.io import to_images
from mrflow.scenes.grammar import FULL, POCKET_1, Scene, World, held_out, sample_scene
from mrflow.scenes.render import render

WORLDS = {"pocket-1": POCKET_1, "full": FULL}


def rendered(scenes: Sequence[Scene], size: int) -> Tensor:
    """Renders as uint8 (n, 3, size, size)."""
    out = torch.empty(len(scenes), 3, size, size, dtype=torch.uint8)
    for place, scene in zip(out, scenes, strict=True):
        place.copy_(torch.from_numpy(np.array(render(scene, size))).permute(2, 0, 1))
    return out


def pictures(world: World, count: int, size: int, seed: int, *, held: bool = False) -> tuple[Tensor, list[str]]:
    """`count` renders as uint8 (count, 3, size, size), and their captions: none held out, or, if `held`, all.

    A seed gives the same scenes at every size.
    """
    rng = random.Random(seed)
    scenes = []
    for _ in range(count):
        scene = sample_scene(world, rng)
        while held_out(scene.caption) != held:
            scene = sample_scene(world, rng)
        scenes.append(scene)
    return rendered(scenes, size), [scene.caption for scene in scenes]


def unit(images: Tensor) -> Tensor:
    """uint8 to float in [0, 1]."""
    return images.float() / 255


def grid(rows: list[Tensor]) -> Image.Image:
    """One picture of rows of pictures; each row is (b, 3, h, w) in [0, 1]."""
    strips = [np.concatenate([np.asarray(image) for image in to_images(row)], 1) for row in rows]
    out = Image.new("RGB", (max(s.shape[1] for s in strips), sum(s.shape[0] for s in strips)))
    top = 0
    for strip in strips:
        out.paste(Image.fromarray(strip), (0, top))
        top += strip.shape[0]
    return out


def start_log(folder: Path) -> None:
    """Say what happens on stderr, and keep it in the folder's train.log."""
    folder.mkdir(parents=True, exist_ok=True)
    handlers: list[logging.Handler] = [logging.StreamHandler(), logging.FileHandler(folder / "train.log")]
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", handlers=handlers)

"""Pictures for training the embedded model, and pictures of how it goes."""

import logging
import math
import os
import random
import tempfile
from collections.abc import Generator, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from mrflow.checkpoints.safetensors import Header
from mrflow.errors import ResourceError
from mrflow.records.pictures import to_images
from mrflow.scenes.grammar import FULL, Scene, World, held_out
from mrflow.scenes.hard import HARD, HardWorld, sample
from mrflow.scenes.render import render

POCKET_1 = World(
    shapes=("circle", "square", "triangle", "cross"),
    colours=("red", "green", "blue", "black"),
    max_count=4,
    letters="ACEHLNOTX",
    word_lengths=(2, 3, 4),
    letter_sizes=("big",),
    textures=("stripes", "dots", "checks"),
    densities=("coarse", "medium"),
    jitter=0.006,
    kinds=(("object", 1.0), ("pair", 1.0), ("count", 0.7), ("face", 0.6), ("word", 1.7)),
)
WORLDS = {"pocket-1": POCKET_1, "full": FULL}
KEPT = replace(  # what of the hard world the autoencoder keeps at 128 px; of letters only those of 13 %
    HARD,
    kinds={"objects": 1.5, "sign": 3.5, "faces": 0.7, "grid": 1.5, "texture": 0.6},
    letters={"13%": 1.0},
    faces={"20%": 1.0},
    grids={"4x4": 1.0, "5x5": 1.0, "6x6": 1.0},
    periods={"1/16": 1.0},
    plain=0.1,
)
HARD_WORLDS: dict[str, World | HardWorld] = {**WORLDS, "hard": HARD, "kept": KEPT}


def rendered(scenes: Sequence[Scene], size: int, pool: Executor | None = None) -> Tensor:
    """Renders as uint8 (n, 3, size, size); with the processes of a pool, which write into memory that is shared."""
    shape = (len(scenes), 3, size, size)
    if pool is None:
        out = np.empty(shape, np.uint8)
        _render_into(out, 0, scenes)
        return torch.from_numpy(out)
    with _room(math.prod(shape)) as name:
        out = np.memmap(name, np.uint8, "r+", shape=shape)
        starts = range(0, len(scenes), 64)
        jobs = [pool.submit(_render_shared, name, shape, i, scenes[i : i + 64]) for i in starts]
        for job in jobs:
            job.result()
        return torch.from_numpy(out)  # the memory lives as long as this does, its name does not


def tensors_of(header: Header) -> dict[str, Tensor]:
    """All tensors of a version, from its file or its two, as they are stored."""
    files = sorted({entry.file for entry in header.tensors.values()})
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


@contextmanager
def _room(size: int) -> Generator[str]:
    """The name of a file of so many bytes: in memory if they fit there, else in the folder for temporary files.

    Raises:
        ResourceError: they fit nowhere.
    """
    folders = [folder for folder in (Path("/dev/shm"), Path(tempfile.gettempdir())) if folder.is_dir()]
    for folder in folders:
        with tempfile.NamedTemporaryFile(dir=folder) as file:
            try:
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(file.fileno(), 0, size)
                else:
                    file.truncate(size)
            except OSError:
                continue
            yield file.name
            return
    raise ResourceError(
        f"{size / 1e9:.1f} GB of renders fit neither into memory nor into {folders[-1]}; make room, name another "
        "folder in TMPDIR, or take --workers 0"
    )


def _render_into(out: NDArray[np.uint8], first: int, scenes: Sequence[Scene]) -> None:
    for i, scene in enumerate(scenes, first):
        out[i] = render(scene, out.shape[-1]).transpose(2, 0, 1)


def _render_shared(name: str, shape: tuple[int, ...], first: int, scenes: Sequence[Scene]) -> None:
    _render_into(np.memmap(name, np.uint8, "r+", shape=shape), first, scenes)


def pictures(
    world: World | HardWorld, count: int, size: int, seed: int, *, held: bool = False, pool: Executor | None = None
) -> tuple[Tensor, list[str]]:
    """`count` renders as uint8 (count, 3, size, size), and their captions: none held out, or, if `held`, all.

    A seed gives the same scenes at every size.
    """
    rng = random.Random(seed)
    scenes: list[Scene] = []
    for _ in range(count):
        scene = sample(world, rng)
        while held_out(scene.caption) != held:
            scene = sample(world, rng)
        scenes.append(scene)
    return rendered(scenes, size, pool), [scene.caption for scene in scenes]


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

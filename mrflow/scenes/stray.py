"""How much of a picture is paint that its caption does not have: flecks, halos, a thing in a wrong colour.

The scorer reads what is drawn and shrugs at how; this looks at how. A scene is made of few colours, and antialiasing
mixes only those that meet: any tone of the ground with a thing, ink with a face. What is far from all these mixtures is
stray.
"""

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from mrflow.scenes.grammar import COLOURS, SKIN, parse_caption
from mrflow.scenes.letters import Array, length
from mrflow.scenes.reading import find_tint, scorable
from mrflow.scenes.render import INK, TEXTURE

FAR = 0.15  # RGB distance to the nearest mixture beyond which a pixel is stray; autoencoders shift colours by 0.05
TONES = 9  # of the ground, between its tint and its texture's colour


def stray(pixels: Array | Tensor, caption: str) -> float:
    """Per cent of the pixels of a picture, float (3, side, side) in [0, 1], that no mixture of its paints explains.

    0 for what the renderer draws; 100 where there is no pale ground.

    Raises:
        CaptionError: the caption is outside the grammar. PlanError: the picture cannot be scored.
    """
    return 100 * float(stray_mask(pixels, caption).mean())


def stray_mask(pixels: Array | Tensor, caption: str) -> NDArray[np.bool_]:
    """Which pixels are stray, (side, side)."""
    scene, image = parse_caption(caption), scorable(pixels)
    tint = find_tint(image)
    if tint is None:
        return np.ones(image.shape[:2], bool)
    tones = np.linspace(1, TEXTURE, TONES, dtype=np.float32)[:, None] * tint
    colours = [o.colour for o in scene.objects] + [w.colour for w in scene.words]
    things = [np.array(COLOURS[colour], np.float32) for colour in colours]
    ends = [(tones[0], tones[-1])]
    if scene.faces:
        skin, ink = np.array(SKIN, np.float32), np.array(INK, np.float32)
        things.append(skin)
        ends.append((skin, ink))
    ends += [(tone, thing) for thing in things for tone in tones]
    out = np.ones(image.shape[:2], bool)
    for start, end in ends:
        rest = image[out]
        out[out] = _distance(rest, start, end) > FAR
    return out


def _distance(points: Array, start: Array, end: Array) -> Array:
    """Of points (n, 3) to the line between two."""
    way = end - start
    along = np.clip((points - start) @ way / max(float(way @ way), 1e-12), 0, 1)
    return length((points - start - along[:, None] * way).astype(np.float32))

"""Linear previews: a pixel of each latent cell, fitted to a model by least squares."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from mrflow.backbone import Backbone
from mrflow.errors import PlanError
from mrflow.protocols.decoder import Decoder


@dataclass(frozen=True)
class LinearDecoder(Decoder):
    """Each latent cell to one pixel by a linear map: a preview that costs nothing.

    `weight` has a row of factors for each of red, green and blue, `bias` their values at latents of 0. `linear_decoder`
    fits one to a model.
    """

    space: str
    weight: tuple[tuple[float, ...], tuple[float, ...], tuple[float, ...]]
    bias: tuple[float, float, float]

    @property
    def scale(self) -> int:
        """One pixel a cell."""
        return 1

    def __post_init__(self) -> None:
        rows = tuple(tuple(float(v) for v in row) for row in self.weight)
        if len(rows) != 3 or len(self.bias) != 3 or len({len(row) for row in rows}) != 1 or not rows[0]:
            raise PlanError("a linear decoder has three rows of factors, one a colour, and three values of bias")
        object.__setattr__(self, "weight", rows)
        object.__setattr__(self, "bias", tuple(float(v) for v in self.bias))

    def __call__(self, latents: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 3 h w"]:
        """The map, cell by cell.

        Raises:
            PlanError: the latents have another number of channels.
        """
        if latents.shape[1] != len(self.weight[0]):
            raise PlanError(f"the decoder takes {len(self.weight[0])} latent channels, got {latents.shape[1]}")
        weight, bias = (torch.tensor(v, dtype=latents.dtype, device=latents.device) for v in (self.weight, self.bias))
        return F.conv2d(latents, weight[:, :, None, None], bias)


def linear_decoder(model: Backbone, pixels: Float[Tensor, "b 3 h w"]) -> LinearDecoder:
    """The linear preview that fits a model's autoencoder best on these images, in [0, 1], by least squares.

    Each cell's latents, and 1, against the mean colour of the pixels it stands for. Images should be of the kind that
    the model draws: a few hundred cells a channel are enough.

    Raises:
        PlanError: there are fewer cells than unknowns.
    """
    with torch.inference_mode():
        latents = model.encode(pixels.to(model.device)).cpu().double()
    colours = F.avg_pool2d(pixels.cpu().double(), model.info.space.downscale)
    cells = latents.permute(0, 2, 3, 1).flatten(0, 2)
    unknown = torch.cat((cells, torch.ones(len(cells), 1, dtype=cells.dtype)), 1)
    if len(unknown) < unknown.shape[1]:
        raise PlanError(f"{len(unknown)} latent cells cannot fit {unknown.shape[1]} numbers a colour: give more images")
    found = torch.linalg.lstsq(unknown, colours.permute(0, 2, 3, 1).flatten(0, 2), driver="gelsd").solution
    rows = [tuple(row) for row in found.T.tolist()]
    red, green, blue = (row[:-1] for row in rows)
    return LinearDecoder(model.info.space.name, (red, green, blue), (rows[0][-1], rows[1][-1], rows[2][-1]))


POCKET_PREVIEW = LinearDecoder(
    "pocket",
    (
        (0.0011, 0.0058, -0.0021, 0.0297, -0.0179, -0.0316, -0.0263, 0.0178,
         0.0220, -0.0271, -0.0182, 0.0301, -0.0478, -0.0188, -0.0004, -0.0042),
        (0.0101, -0.0158, -0.0077, 0.0330, -0.0561, 0.0025, -0.0272, 0.0244,
         0.0174, -0.0200, -0.0071, 0.0051, -0.0199, -0.0239, 0.0189, -0.0179),
        (-0.0386, -0.0203, -0.0494, 0.0591, -0.0124, 0.0038, -0.0074, 0.0330,
         0.0325, 0.0065, 0.0428, -0.0047, -0.0044, -0.0466, -0.0013, -0.0523),
    ),
    (0.8652, 0.8395, 0.8298),
)  # fmt: skip
"""The preview of pocket: fitted to 160 scenes of its two worlds by `linear_decoder`."""

"""Numbers for each picture of a sweep: small objects, each with its range and source. Yours is one class more.

They see the picture as it is saved (8 bits a channel), so that a sweep which was resumed gives the same numbers.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from mrflow import metrics as numbers
from mrflow._checks import check_path
from mrflow.backbone import Backbone
from mrflow.errors import PlanError, WeightsError
from mrflow.scenes.fidelity import fidelity
from mrflow.scenes.grammar import CaptionError
from mrflow.scenes.legible import hard_score
from mrflow.scenes.score import score
from mrflow.scenes.stray import stray
from mrflow.sweep.aims import Aim, Scale, as_scale, own
from mrflow.upscalers.weights import read_state


@dataclass(frozen=True)
class Measured:
    """What a metric may look at: one picture (3, h, w) in [0, 1], where it came from, and the reference's, if any.

    `latents` are the last clean latents before the refining step, (c, y, x), where the chain has such.
    """

    pixels: Tensor
    prompt: str
    seed: int
    tags: Mapping[str, str]
    model: Backbone
    reference: Tensor | None = None
    latents: Tensor | None = None


class Metric(ABC):
    """Numbers for one picture. A number that does not apply is left out, never set to 0.

    `aims` says for reports which values of each number are good, and as a `Scale` also its range and unit; parts of a
    name (`a.b` of `a`) share what it says.
    """

    aims: ClassVar[Mapping[str, Aim | Scale]] = {}
    needs_reference: ClassVar[bool] = False
    needs_latents: ClassVar[bool] = False

    @abstractmethod
    def __call__(self, made: Measured) -> Mapping[str, float]:
        """Numbers by name."""


@dataclass(frozen=True)
class SceneScore(Metric):
    """How well a picture shows its caption of the embedded model's world, in [0, 1]: `score`, and one a category.

    Read exactly from the pixels (mrflow/scenes/score.py). A caption outside the grammar has no score, nor has a picture
    that is not square or has a side below 64.
    """

    aims: ClassVar[Mapping[str, Aim | Scale]] = own("score")

    def __call__(self, made: Measured) -> Mapping[str, float]:
        """`score`, `score.alignment`, `score.text` and so on, as far as the caption speaks of them."""
        try:
            found = score(made.pixels, made.prompt).as_dict()
        except (CaptionError, PlanError):
            return {}
        return {"score" if name == "overall" else f"score.{name}": value for name, value in found.items()}


@dataclass(frozen=True)
class Fidelity(Metric):
    """How near a picture is to the best exact rendering of its caption (pocket's world), on continuous scales.

    Places, tints and whatever else the caption leaves open are first fitted to the picture (mrflow/scenes/fidelity.py),
    so that none of it counts as an error. It has no number where `SceneScore` has none.
    """

    aims: ClassVar[Mapping[str, Aim | Scale]] = own("fit")

    def __call__(self, made: Measured) -> Mapping[str, float]:
        """`fit.psnr` and so on, by the names of `mrflow.scenes.fidelity.measure`."""
        try:
            found = fidelity(made.pixels, made.prompt)
        except (CaptionError, PlanError):
            return {}
        return {f"fit.{name}": value for name, value in found.items()}


@dataclass(frozen=True)
class Stray(Metric):
    """Per cent of the pixels that no mixture of the caption's colours explains, such as flecks and halos; 0 to 100.

    It tells apart pictures that `SceneScore` reads alike (mrflow/scenes/stray.py), and has no number where that has
    none.
    """

    aims: ClassVar[Mapping[str, Aim | Scale]] = own("stray")

    def __call__(self, made: Measured) -> Mapping[str, float]:
        """`stray`; lower is cleaner."""
        try:
            return {"stray": stray(made.pixels, made.prompt)}
        except (CaptionError, PlanError):
            return {}


@dataclass(frozen=True)
class Legible(Metric):
    """Which parts of what a caption names can be read in the picture, for captions of the hard world; from 0 to 1.

    The exact reader of `mrflow/scenes/legible.py`: letters among 26, expressions among 5, cells, weaves. There is no
    number for prompts of other grammars. `look` names another way to draw (`mrflow.scenes.looks`).
    """

    aims: ClassVar[Mapping[str, Aim | Scale]] = own("legible")
    look: str = ""

    def __call__(self, made: Measured) -> Mapping[str, float]:
        """`legible`, and `legible.letters` and so on, as far as the caption speaks of them."""
        try:
            found = hard_score(made.pixels, made.prompt, look=self.look)
        except CaptionError:
            return {}
        return {"legible" if name == "overall" else f"legible.{name}": value for name, value in found.items()}


@dataclass(frozen=True)
class Psnr(Metric):
    """Peak signal-to-noise ratio to the reference chain's picture of the same prompt and draw, in dB.

    It means something only for chains that stay on the reference's path (caches); staged ones compose anew.
    """

    aims: ClassVar[Mapping[str, Aim | Scale]] = own("psnr")
    needs_reference: ClassVar[bool] = True

    def __call__(self, made: Measured) -> Mapping[str, float]:
        """`psnr`, at most 100 (equal pictures)."""
        if made.reference is None or made.reference.shape != made.pixels.shape:
            return {}
        return {"psnr": min(100.0, float(numbers.psnr(made.pixels[None], made.reference[None])))}


@dataclass(frozen=True)
class Ssim(Metric):
    """Structural similarity to the reference chain's picture (Wang et al. 2004); at most 1. As for `Psnr`."""

    aims: ClassVar[Mapping[str, Aim | Scale]] = own("ssim")
    needs_reference: ClassVar[bool] = True

    def __call__(self, made: Measured) -> Mapping[str, float]:
        """`ssim`."""
        if made.reference is None or made.reference.shape != made.pixels.shape:
            return {}
        return {"ssim": float(numbers.ssim(made.pixels[None], made.reference[None]))}


@dataclass(frozen=True)
class PowerRatios(Metric):
    """Power in rings of spatial frequency over the reference's: 1 is as much detail, lower is lost, higher is noise."""

    aims: ClassVar[Mapping[str, Aim | Scale]] = own("spectrum")
    bands: int = 4
    needs_reference: ClassVar[bool] = True

    def __call__(self, made: Measured) -> Mapping[str, float]:
        """`spectrum.1` (coarse) to `spectrum.<bands>` (fine)."""
        if made.reference is None or made.reference.shape != made.pixels.shape:
            return {}
        ratio = numbers.power_ratio(made.pixels[None], made.reference[None], bands=self.bands)[0]
        return {f"spectrum.{i + 1}": float(value) for i, value in enumerate(ratio)}


@dataclass(frozen=True)
class Sharpness(Metric):
    """Variance of the Laplacian of the luma, 0 and up; higher is sharper, or noisier."""

    aims: ClassVar[Mapping[str, Aim | Scale]] = own("sharpness")

    def __call__(self, made: Measured) -> Mapping[str, float]:
        """`sharpness`."""
        return {"sharpness": float(numbers.sharpness(made.pixels[None]))}


@dataclass(frozen=True)
class RoundTrip(Metric):
    """The autoencoder's round-trip energy of the latents that are refined; 0 and up, lower is nearer to a picture's."""

    aims: ClassVar[Mapping[str, Aim | Scale]] = own("round_trip")
    needs_latents: ClassVar[bool] = True

    def __call__(self, made: Measured) -> Mapping[str, float]:
        """`round_trip`."""
        if made.latents is None:
            return {}
        latents = made.latents[None].to(made.model.device)
        return {"round_trip": float(numbers.round_trip_energy(made.model, latents))}


CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class ClipScore(Metric):
    """100 x the cosine of picture and prompt in CLIP's space, at least 0 (Hessel et al. 2021, without their 2.5).

    `folder` holds a CLIP model as transformers saves it, with its tokenizer.

    Raises:
        WeightsError: there is no such model.
    """

    aims: ClassVar[Mapping[str, Aim | Scale]] = own("clip")
    folder: str

    @cached_property
    def _parts(self) -> tuple[Any, Any]:
        from transformers import AutoTokenizer, CLIPModel

        if not check_path("the folder", self.folder).is_dir():
            raise WeightsError(
                f"there is no CLIP model in {self.folder}: give the folder that transformers saved it in"
            )
        try:
            model = CLIPModel.from_pretrained(self.folder, local_files_only=True).eval()
            return model, AutoTokenizer.from_pretrained(self.folder, local_files_only=True)
        except (OSError, ValueError) as error:
            raise WeightsError(f"{self.folder} is no CLIP model that transformers can load: {error}") from None

    def __call__(self, made: Measured) -> Mapping[str, float]:
        """`clip`."""
        model, tokenizer = self._parts
        side = int(model.config.vision_config.image_size)
        x = torch.nn.functional.interpolate(
            made.pixels[None].cpu(), (side, side), mode="bicubic", antialias=True, align_corners=False
        ).clamp(0, 1)
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (CLIP_MEAN, CLIP_STD))
        words = tokenizer([made.prompt], truncation=True, return_tensors="pt")
        with torch.inference_mode():
            out = model(pixel_values=(x - mean) / std, input_ids=words.input_ids, attention_mask=words.attention_mask)
        cosine = torch.nn.functional.cosine_similarity(out.image_embeds, out.text_embeds)
        return {"clip": max(0.0, 100 * float(cosine))}


@dataclass(frozen=True)
class ReadText(Metric):
    """How much of the wanted text an OCR reads: 1 - edits / characters, in [0, 1], and whether it is exact.

    `ocr` is your function from a picture (3, h, w) in [0, 1] to text; the wanted text is the prompt's tag `text`.
    """

    aims: ClassVar[Mapping[str, Aim | Scale]] = own("text")

    ocr: Callable[[Tensor], str] = field(compare=False)

    def __call__(self, made: Measured) -> Mapping[str, float]:
        """`text`, `text.exact`; nothing where the prompt wants no text."""
        wanted = made.tags.get("text")
        if not wanted:
            return {}
        read = self.ocr(made.pixels)
        edits = edit_distance(wanted, read)
        return {"text": max(0.0, 1 - edits / len(wanted)), "text.exact": float(edits == 0)}


def edit_distance(a: str, b: str) -> int:
    """How many letters must be put in, taken out or changed to make one text of the other (Levenshtein)."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        last, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            last, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, last + (x != y))
    return row[-1]


@dataclass(frozen=True)
class Lpips(Metric):
    """Learned perceptual distance to the reference chain's picture, AlexNet version 0.1; 0 and up, lower is nearer.

    `alexnet` is torchvision's AlexNet checkpoint, `linear` the five linear layers that LPIPS publishes (Zhang et al.
    2018, arXiv 1801.03924, equation 1).

    Raises:
        WeightsError: a file is missing, or lacks a tensor.
    """

    aims: ClassVar[Mapping[str, Aim | Scale]] = own("lpips")

    alexnet: str
    linear: str
    needs_reference: ClassVar[bool] = True

    @cached_property
    def _weights(self) -> tuple[list[tuple[Tensor, Tensor]], list[Tensor]]:
        net, heads = (read_state(check_path("the file", name)) for name in (self.alexnet, self.linear))
        try:
            convs = [(net[f"features.{i}.weight"], net[f"features.{i}.bias"]) for i in (0, 3, 6, 8, 10)]
            lins = [heads[f"lin{i}.model.1.weight"] for i in range(5)]
        except KeyError as error:
            raise WeightsError(
                f"{self.alexnet} and {self.linear} lack {error}: are they AlexNet and LPIPS 0.1?"
            ) from None
        return convs, lins

    def features(self, pixels: Tensor) -> list[Tensor]:
        """AlexNet's activations after each of its five rectifiers, of (1, 3, h, w) in [0, 1]."""
        functional = torch.nn.functional
        shift = pixels.new_tensor([-0.030, -0.088, -0.188]).view(3, 1, 1)
        scale = pixels.new_tensor([0.458, 0.448, 0.450]).view(3, 1, 1)
        x, out = (2 * pixels - 1 - shift) / scale, list[Tensor]()
        for i, (weight, bias) in enumerate(self._weights[0]):
            x = functional.max_pool2d(x, 3, 2) if i in (1, 2) else x
            stride, padding = (4, 2) if i == 0 else (1, 2 if i == 1 else 1)
            x = functional.relu(functional.conv2d(x, weight.float(), bias.float(), stride=stride, padding=padding))
            out.append(x)
        return out

    def __call__(self, made: Measured) -> Mapping[str, float]:
        """`lpips`."""
        if made.reference is None or made.reference.shape != made.pixels.shape:
            return {}
        if min(made.pixels.shape[-2:]) < 64:
            raise PlanError(f"LPIPS needs sides of at least 64 pixels, got {tuple(made.pixels.shape[-2:])}")
        return {"lpips": self.distance(made.pixels[None], made.reference[None])}

    def distance(self, pixels: Tensor, reference: Tensor) -> float:
        """Of two pictures (1, 3, h, w) in [0, 1], sides of at least 64 pixels."""
        total = 0.0
        for a, b, weight in zip(self.features(pixels), self.features(reference), self._weights[1], strict=True):
            a, b = (f / (f.square().sum(1, keepdim=True).sqrt() + 1e-10) for f in (a, b))
            total += float(torch.nn.functional.conv2d((a - b).square(), weight.float()).mean())
        return total


def scales_of(metrics: Iterable[Metric]) -> dict[str, Scale]:
    """What all of them say of their numbers.

    Raises:
        PlanError: a metric names an aim that there is not.
    """
    return {name: as_scale(said) for metric in metrics for name, said in metric.aims.items()}


def needs_of(metrics: Sequence[Metric]) -> tuple[bool, bool]:
    """Whether any of them needs the reference's picture, and whether any needs latents."""
    return any(m.needs_reference for m in metrics), any(m.needs_latents for m in metrics)

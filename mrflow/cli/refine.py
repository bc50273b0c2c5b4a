"""The verb refine: pictures that exist, enlarged by a model or by an upscaler alone."""

import json
from functools import partial
from pathlib import Path

import typer
from rich.console import Console

from mrflow._checks import check_whole
from mrflow.cli.chains import enlargement
from mrflow.cli.drawing import draw
from mrflow.cli.options import SR_WORDS, option_of, refuse
from mrflow.cli.parsing import (
    blaming,
    check_enlargement,
    free_path,
    is_embedded,
    load_model,
    pairs_of,
    refinement,
    save_free,
    upscaler,
    without_upscaler,
)
from mrflow.cli.verbs import RefineOptions
from mrflow.errors import PlanError, RecordError
from mrflow.model_info import ModelInfo
from mrflow.models.pocket.model import embedded_file
from mrflow.protocols.upscaler import LatentUpscaler, Upscaler, apply_upscaler, passes_to, scale_of
from mrflow.records.images import decode_image, image_bytes
from mrflow.records.pictures import png, read_image, record_in, to_images
from mrflow.spec import MAX_SIDE
from mrflow.stage import AnyChain
from mrflow.stages import Crop
from mrflow.stages.upscale import resize

PHOTOGRAPHS = (
    "pocket knows only its own world of shapes, faces and words; it makes mud of a photograph. "
    "To enlarge one without a model: --sr-only --sr FILE"
)


def refine(err: Console, asked: RefineOptions) -> None:
    """Enlarge a picture, and draw its details."""
    sr, model, drawing = asked.sr, asked.model, asked.drawing
    if asked.sr_only:
        said = {"sigma": asked.sigma, "refine_steps": asked.refine_steps, **vars(asked.slots)}
        idle = [option_of(name) for name, value in {**said, "negative": drawing.negative}.items() if value is not None]
        idle += [option for option, value in (("--prompt", asked.prompt), ("--crop", asked.crop)) if value]
        refuse(bool(idle), ", ".join(idle), "beside --sr-only, which asks no model")
        for path in _enlarge(asked.photo, asked.scale, sr, drawing.out, drawing.force):
            typer.echo(json.dumps({"paths": [str(path)]}) if drawing.as_json else path)
        return
    if sr in (None, "own") and not is_embedded(model):
        raise without_upscaler(model)
    if asked.refine_steps is not None:
        check_whole("--refine-steps", asked.refine_steps, 1, 1000)
    net = upscaler(sr)
    if isinstance(net, str | LatentUpscaler):
        raise PlanError(f"--sr {sr} enlarges latents; refining a picture goes over pixels")
    pairs, data = pairs_of([asked.prompt], drawing), image_bytes(asked.photo)
    if is_embedded(model) and not _own(data, asked.photo):
        err.print(PHOTOGRAPHS)
    pixels = decode_image(data, asked.photo)

    def make(info: ModelInfo) -> tuple[AnyChain, None]:
        height, width = pixels.shape[-2:]
        part, size = refinement(height, width, asked.scale, info, crop=asked.crop)
        steps = asked.refine_steps
        chain = enlargement(size, net, info, sigma=asked.sigma, refine_steps=steps, **vars(asked.slots))
        return (chain if part == (height, width) else Crop(*part) >> chain), None

    name = Path(f"{asked.photo.stem}-refined.png")
    draw(err, make, partial(load_model, model, asked.loading), pairs, drawing, start=pixels, name=name)


def _own(data: bytes, photo: Path) -> bool:
    """Whether an embedded model drew a picture, as its record says."""
    try:
        return bool(embedded_file(str(record_in(data, photo).get("model", ""))))
    except RecordError:
        return False


def _enlarge(photo: Path, scale: float, sr: str | None, out: Path | None, force: bool) -> list[Path]:
    """Enlarge a picture by an upscaler alone, and write it."""
    net = None if sr == "own" else upscaler(sr)
    if not isinstance(net, Upscaler):
        raise PlanError(f"--sr-only needs an upscaler of pixels: --sr {SR_WORDS}")
    check_enlargement(scale)
    pixels = read_image(photo)
    height, width = (round(side * scale) for side in pixels.shape[-2:])
    if max(height, width) > MAX_SIDE:
        raise PlanError(f"{height}x{width} is beyond {MAX_SIDE} pixels a side; take a smaller --scale")
    with blaming(type(net).__name__):  # once at least: a network of scale 1 may restore
        passes = max(1, passes_to((height, width), pixels.shape[-2], pixels.shape[-1], scale_of(net)))
    default = Path(f"{photo.stem}-enlarged.png")
    target = free_path(out, default, 1, force)
    with blaming(type(net).__name__):
        for _ in range(passes):
            pixels = apply_upscaler(net, pixels)
    image = png(to_images(resize(pixels, height, width).clamp(0, 1))[0])
    return save_free(lambda path: {path: image}, target, out, default, 1, force)

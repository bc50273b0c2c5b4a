"""What a run made, and the files and records of its pictures."""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from mrflow import __version__
from mrflow._checks import check_path
from mrflow.display import html
from mrflow.display.notes import counted
from mrflow.errors import PlanError, RecordError
from mrflow.guidance import CFG, Distilled, own_guidance
from mrflow.machine.hardware import machine
from mrflow.records.chains import encode_chain
from mrflow.records.expressions import expression
from mrflow.records.files import check_writable
from mrflow.records.pictures import FORMAT, Images, batch_paths, png, to_images, write_animation
from mrflow.records.publish import publish
from mrflow.solvers import Euler
from mrflow.spec import Pixels, Spec, Start
from mrflow.stage import AnyChain, Plan


@dataclass(frozen=True)
class StageRecord:
    """What one stage did. `data` is its tensor where the run was asked to keep it; `nfe` counts forwards a picture.

    With a cache, `nfe` and `flops` are what was computed (a batch's mean, rounded up), and `notes` say so. `seconds`
    are on the wall; `device_seconds`, on CUDA alone, between the stage's first and last moment in the device's queue.
    """

    name: str
    spec: Spec
    seconds: float
    nfe: int
    flops: float
    cached: bool
    data: Tensor | None
    notes: tuple[str, ...] = ()
    device_seconds: float | None = None


@dataclass(frozen=True)
class PathStep:
    """Where sampling stood after a step of stage `stage` (from 0): at `sigma`, with the clean `estimate` there."""

    stage: int
    sigma: float
    estimate: Tensor


@dataclass(frozen=True)
class Result:
    """What a run made. Notebooks show its pictures and what each stage cost.

    `path` holds the steps of every sampling stage where the run was asked to keep them (`keep="path"`).
    """

    data: Tensor
    spec: Spec
    stages: tuple[StageRecord, ...]
    plan: Plan
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    negative: str
    chain: AnyChain
    condition_seconds: float
    peak_bytes: int
    notes: tuple[str, ...] = ()
    path: tuple[PathStep, ...] = ()
    decode: Callable[[Tensor], Tensor] | None = field(default=None, compare=False)  # of the model, with `path` alone

    def __repr__(self) -> str:
        items = counted(len(self.seeds), "item")
        return f"Result({items}, {self.spec}, NFE {self.nfe}, {self.seconds:.3g} s)"

    def _repr_html_(self) -> str:
        """For notebooks: the strip of pictures, then the stages with their costs."""
        lines = [(i, s.name, s.spec, f"{s.seconds:.3f} s", s.nfe or None) for i, s in enumerate(self.stages, 1)]
        costs = html.html_table(("", "stage", "gives", "time", "NFE"), lines, caption=repr(self))
        data = self._repr_png_()
        return costs if data is None else f"{html.picture(data, '; '.join(self.prompts))}{costs}"

    def _repr_png_(self) -> bytes | None:
        """The strip of pictures; None where the chain ended in something else."""
        return self.images._repr_png_() if isinstance(self.spec, Pixels) else None

    @property
    def seconds(self) -> float:
        """Wall time from prompt to the last stage's tensor."""
        return self.condition_seconds + sum(stage.seconds for stage in self.stages)

    @property
    def nfe(self) -> int:
        """Network forwards for one picture."""
        return sum(stage.nfe for stage in self.stages)

    @property
    def pixels(self) -> Tensor:
        """float32 (batch, 3, height, width) in [0, 1]."""
        if not isinstance(self.spec, Pixels):
            raise PlanError(f"the chain ended in {self.spec}; put Decode() at its end to get pixels")
        return self.data

    @cached_property
    def images(self) -> Images:
        """PIL pictures, 8 bits a channel; notebooks show the list as a strip."""
        return to_images(self.pixels)

    def frames(self, item: int = 0) -> Images:
        """The sampling path of picture `item`: the decoded clean estimate of every step and every stage's pixels.

        Each has the size of the last one, enlarged without smoothing; what repeats the frame before it is left out.
        Of a run with `keep="path"`; stages that sample no whole latents (regions) show their pixels alone.

        Raises:
            PlanError: the run did not keep its path, or there is no such picture.
        """
        if self.decode is None:
            raise PlanError('this result did not keep its path; run(..., keep="path") does')
        if not 0 <= item < len(self.seeds):
            raise PlanError(f"there is no picture {item}: the run made {len(self.seeds)}, counted from 0")
        found = Images()
        for index, stage in enumerate(self.stages):
            latents = [step.estimate[item : item + 1] for step in self.path if step.stage == index]
            with torch.inference_mode():
                found += [to_images(self.decode(x))[0] for x in latents if x.ndim == 4]
            if isinstance(stage.spec, Pixels) and stage.data is not None:
                found += to_images(stage.data[item : item + 1])
        size = found[-1].size if found else (0, 0)
        sized = [image if image.size == size else image.resize(size, Image.Resampling.NEAREST) for image in found]
        return Images(b for a, b in zip([None, *sized], sized, strict=False) if a is None or a.tobytes() != b.tobytes())

    def animate(self, path: str | Path, item: int = 0, *, milliseconds: int = 120) -> Path:
        """Write the `frames` of picture `item` as GIF, WebP or animated PNG, by the ending of `path`; the path.

        Raises:
            PlanError: as `frames`; the ending is another. ResourceError: it cannot be written.
        """
        write_animation(check_path("the file", path), self.frames(item), milliseconds=milliseconds)
        return Path(path)

    def record(self, item: int = 0) -> dict[str, object]:
        """Everything needed to make picture `item` again, and what it cost: plain data, written into the PNG."""
        return make_record(self, item)

    def save(self, path: str | Path) -> list[Path]:
        """Write PNGs with their records: `path`, or `path` with -0, -1, ... before its ending for a batch."""
        publish(files := result_files(self, check_path("the file", path)), force=True)
        return list(files)


def result_files(result: Result, path: Path, paths: Sequence[Path] = ()) -> dict[Path, bytes]:
    """A result's pictures as PNGs with their records, by the names that they are to have: `paths`, or those of `path`.

    Raises:
        PlanError: the name is no PNG's. ResourceError: the folder takes no file.
    """
    if path.suffix.lower() != ".png":
        raise PlanError(f"{path.name} should end in .png: only a PNG keeps every bit and the record")
    paths = paths or batch_paths(path, len(result.seeds))
    check_writable(path)
    files: dict[Path, bytes] = {}
    for item, (each, image) in enumerate(zip(paths, result.images, strict=True)):
        try:
            files[each] = png(image, make_record(result, item), infotext(result, item))
        except RecordError as error:
            told = {"format": FORMAT, "unreplayable": str(error)[:1000]}
            files[each] = png(image, told, infotext(result, item))
    return files


def infotext(result: Result, item: int = 0) -> str:
    """How picture `item` was made, in the form of AUTOMATIC1111's web UI, which other programs read.

    Prompt, negative prompt, and one line of settings: steps, sampler and guidance of the first stage that samples, and
    what is reinjected as `Denoising strength`. It is for people and other programs; mrflow reads its own record.
    """
    info, chain = result.plan.model, tuple(result.chain)
    sampled = [(stage, row) for stage, row in zip(chain, result.plan.rows, strict=True) if row.sigmas]
    height, width = result.spec.shape[-2:]
    told: dict[str, object] = {}
    if sampled:
        stage, row = sampled[0]
        told |= {"Steps": len(row.sigmas) - 1, "Sampler": type(getattr(stage, "solver", Euler())).__name__}
        told["Schedule type"] = type(getattr(stage, "schedule", None)).__name__
        guidance = getattr(stage, "guidance", None) or own_guidance(info)
        if isinstance(guidance, CFG):
            told["CFG scale"] = f"{guidance.scale:g}"
        elif isinstance(guidance, Distilled) and (value := guidance.value or info.guidance) is not None:
            told["Distilled CFG Scale"] = f"{value:g}"
    told |= {"Seed": result.seeds[item], "Size": f"{width}x{height}", "Model": info.name}
    strengths = [s for stage in chain if isinstance(s := getattr(stage, "sigma", None), float)]
    if strengths:
        told["Denoising strength"] = f"{strengths[0]:g}"
    told["Version"] = f"mrflow {__version__}"
    settings = ", ".join(f"{key}: {_quote(str(value))}" for key, value in told.items())
    negative = [f"Negative prompt: {result.negative}"] if result.negative and result.plan.work.negative else []
    return "\n".join([result.prompts[item], *negative, settings])


def _quote(value: str) -> str:
    return json.dumps(value, ensure_ascii=False) if re.search(r'[,:\n"]', value) else value


def make_record(result: Result, item: int = 0) -> dict[str, object]:
    """Plain data that makes picture `item` of a result again, and what each stage of its batch cost."""
    info = result.plan.model
    record: dict[str, object] = {
        "format": FORMAT,
        "mrflow": __version__,
        "torch": torch.__version__,
        "model": info.name,
        "weights": info.version,
        "machine": machine(result.data.device),
        "guidance": expression(own_guidance(info)),
        "shift": expression(info.shift),
        "prompt": result.prompts[item],
        "negative": result.negative,
        "seed": result.seeds[item],
        "size": list(result.spec.shape[-2:]),
        "chain": encode_chain(result.chain),
        "stages": [
            {"name": s.name, "out": str(s.spec), "seconds": round(s.seconds, 6), "nfe": s.nfe, "cached": s.cached}
            | ({"sigmas": [round(sigma, 6) for sigma in row.sigmas]} if row.sigmas else {})
            | ({"notes": list(s.notes)} if s.notes else {})
            | ({"device_seconds": round(s.device_seconds, 6)} if s.device_seconds is not None else {})
            for s, row in zip(result.stages, result.plan.rows, strict=True)
        ],
        "batch": len(result.seeds),
        "condition_seconds": round(result.condition_seconds, 6),
        "peak_bytes": result.peak_bytes,
    }
    if result.notes:
        record["notes"] = list(result.notes)
    if not isinstance(result.plan.rows[0].spec, Start):
        record["start"] = str(result.plan.rows[0].spec)
    return record

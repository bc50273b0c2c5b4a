"""What the training of every part shares: rates, averaged weights, a log, drawn grids, checkpoints it goes on from."""

import json
import logging
import math
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file, save
from torch import Tensor, nn

from mrflow.errors import PlanError
from mrflow.records.pictures import write_bytes, write_png, writing

log = logging.getLogger("train_pocket")
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Run:
    """Where and how a recipe is run.

    `scale` multiplies every count of steps and pictures (0.001 is a trial), `batch` every batch, `every` is the number
    of seconds between checkpoints and `grid` that of steps between grids. `pool` are processes that render. A piece of
    the run ends after so many `minutes`. `bf16` is for processors that multiply matrices of bfloat16 faster.
    """

    folder: Path
    device: torch.device = CPU
    scale: float = 1.0
    batch: float = 1.0
    every: float = 180.0
    grid: int = 2000
    pool: Executor | None = None
    minutes: float = math.inf
    bf16: bool = False

    def __post_init__(self) -> None:
        """Refuse what is no scale, batch or time.

        Raises:
            PlanError: one of them is out of range.
        """
        for name, fine in (
            ("scale", 0 < self.scale < math.inf),
            ("batch", 0 < self.batch < math.inf),
            ("every", self.every >= 0),
            ("minutes", self.minutes > 0),
        ):
            if not fine:
                raise PlanError(f"--{name} {getattr(self, name)} is out of range")

    def count(self, number: int, least: int = 1) -> int:
        """A number of steps or pictures, scaled."""
        return max(least, round(self.scale * number))

    def items(self, number: int) -> int:
        """The size of a batch, scaled."""
        return max(1, round(self.batch * number))

    def autocast(self) -> AbstractContextManager[Any]:
        """bfloat16 on CUDA; float32 on a processor, unless `bf16`."""
        on = self.device.type == "cuda" or self.bf16
        return torch.autocast(self.device.type, torch.bfloat16) if on else nullcontext()


def keep_settings(run: Run, recipe: object) -> None:
    """Write down in the folder what its files are made with; `recipe` is anything that JSON can say.

    Raises:
        PlanError: it was begun with something else, which would be mixed up.
    """
    path = run.folder / "settings.json"
    text = json.dumps({"scale": run.scale, "batch": run.batch, "recipe": recipe}, indent=1) + "\n"
    if path.exists() and path.read_text() != text:
        raise PlanError(f"{run.folder} was begun with another scale, batch or recipe ({path}); take another --out")
    run.folder.mkdir(parents=True, exist_ok=True)
    write_bytes(path, text.encode())


def cosine(progress: float) -> float:
    """From 1 to 0.02 along half a cosine; `progress` is 0 to 1."""
    return 0.02 + 0.49 * (1 + math.cos(math.pi * progress))


def flat_then_linear(tail: float) -> Callable[[float], float]:
    """1, then in the last `tail` of the steps a line down to 0.02."""

    def factor(progress: float) -> float:
        return 0.02 + 0.98 * min(1.0, (1 - progress) / tail)

    return factor


class PieceOver(Exception):
    """The minutes of this piece are over; the same command goes on from its checkpoint."""


class Loop:
    """The steps of one part. `for step in loop:` computes a loss and gives it to `loop.learn`.

    A checkpoint holds the weights, their average, the optimisers and the states of the random numbers, so on a
    processor an interrupted training ends at the same weights as one that was not. When all steps are done, `finish`
    writes the averaged weights to NAME.safetensors; a part whose file is there is done.

    Args:
        weights: what is trained and averaged, by name.
        optimisers: stepped by `learn`; their rates are the highest, multiplied by `factor(progress)` and by a warm-up.
        decay: of the running average of the weights; it is shorter in the first steps.
        clip: whether gradients are clipped to a norm of 1.
        keep: other modules and optimisers that checkpoints hold.
        draw: makes the grid; called with the averaged weights in place.
    """

    def __init__(
        self,
        name: str,
        run: Run,
        weights: Mapping[str, Tensor],
        optimisers: Sequence[torch.optim.Optimizer],
        steps: int,
        *,
        factor: Callable[[float], float],
        warmup: int = 100,
        decay: float = 0.99,
        clip: bool = True,
        keep: Mapping[str, nn.Module | torch.optim.Optimizer] | None = None,
        draw: Callable[[], Image.Image] | None = None,
    ) -> None:
        self.name, self.run, self.steps, self.factor, self.warmup = name, run, steps, factor, warmup
        self.weights = {key: p.detach() for key, p in weights.items()}  # the same memory, without gradients
        self.average = {key: p.clone() for key, p in self.weights.items()}
        self.optimisers, self.decay, self.draw = tuple(optimisers), decay, draw
        self.clip = list(weights.values()) if clip else []
        self.kept = {**(keep or {}), **{f"optimiser {i}": o for i, o in enumerate(self.optimisers)}}
        self.rates = [[group["lr"] for group in o.param_groups] for o in self.optimisers]
        self.step, self.seconds = 0, 0.0
        self.running: dict[str, Tensor] = {}  # where they were computed: reading one waits for the device
        self.seen: dict[str, int] = {}
        self.checkpoint = run.folder / f"{name}.pt"
        if self.checkpoint.exists():
            self._resume()

    @property
    def progress(self) -> float:
        """The share of the steps that are done."""
        return self.step / self.steps

    def __iter__(self) -> Iterator[int]:
        began, saved = time.monotonic() - self.seconds, time.monotonic()
        end = time.monotonic() + 60 * self.run.minutes
        while self.step < self.steps:
            scale = min(1.0, (self.step + 1) / self.warmup) * self.factor(self.progress)
            for optimiser, rates in zip(self.optimisers, self.rates, strict=True):
                for group, rate in zip(optimiser.param_groups, rates, strict=True):
                    group["lr"] = rate * scale
            yield self.step
            self.step += 1
            weight = 1 - min(self.decay, (self.step + 1) / (self.step + 10))
            torch._foreach_lerp_(list(self.average.values()), list(self.weights.values()), weight)  # pyright: ignore
            self.seconds = time.monotonic() - began
            if self.step % 100 == 0:
                losses = "  ".join(f"{key} {value.item():.4f}" for key, value in self.running.items())
                log.info("%s step %d  %.0f s  %s  seen %s", self.name, self.step, self.seconds, losses, self.seen)
            if self.draw is not None and (self.step % self.run.grid == 0 or self.step == self.steps):
                place = self.run.folder / "grids" / f"{self.name}-{self.step:06d}.png"
                place.parent.mkdir(parents=True, exist_ok=True)
                with self.averaged():
                    write_png(place, self.draw())
            over = time.monotonic() > end and self.step < self.steps
            if over or time.monotonic() - saved > self.run.every:
                self.save()
                saved = time.monotonic()
            if over:
                raise PieceOver(f"{self.name}: {self.step} of {self.steps} steps done")

    def learn(self, loss: Tensor, name: str = "loss", items: int = 1) -> None:
        """Take one step down this loss, which `items` pictures gave; `name` is what the log calls it."""
        for optimiser in self.optimisers:
            optimiser.zero_grad()
        loss.backward()
        if self.clip:
            torch.nn.utils.clip_grad_norm_(self.clip, 1.0)
        for optimiser in self.optimisers:
            optimiser.step()
        self.running[name] = torch.lerp(self.running.get(name, loss.detach()), loss.detach(), 0.02)
        self.seen[name] = self.seen.get(name, 0) + items

    @contextmanager
    def averaged(self) -> Generator[None]:
        """Put the averaged weights in place, for drawing."""
        own = {key: p.clone() for key, p in self.weights.items()}
        try:
            for key, p in self.weights.items():
                p.copy_(self.average[key])
            with torch.inference_mode():
                yield
        finally:
            for key, p in self.weights.items():
                p.copy_(own[key])

    def save(self) -> None:
        """Write the checkpoint, whole or not at all."""
        state: dict[str, Any] = {"weights": self.weights, "average": self.average}
        state |= {"kept": {key: one.state_dict() for key, one in self.kept.items()}}
        state |= {"step": self.step, "seconds": self.seconds, "running": self.running, "seen": self.seen}
        state |= {"random": torch.get_rng_state()}
        if self.run.device.type == "cuda":
            state["cuda"] = torch.cuda.get_rng_state(self.run.device)
        save_whole(state, self.checkpoint)

    def _resume(self) -> None:
        state = torch.load(self.checkpoint, weights_only=True, map_location="cpu")
        for mine, kept in ((self.weights, state["weights"]), (self.average, state["average"])):
            for key, p in mine.items():
                p.copy_(kept[key])
        for key, one in self.kept.items():
            one.load_state_dict(state["kept"][key])
        self.step, self.seconds = state["step"], state["seconds"]
        self.running = {key: value.to(self.run.device) for key, value in state["running"].items()}
        self.seen = state["seen"]
        torch.set_rng_state(state["random"])
        if "cuda" in state and self.run.device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda"], self.run.device)
        log.info("%s goes on at step %d of %d", self.name, self.step, self.steps)

    def finish(self, more: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Write the averaged weights, and `more` tensors that are not trained, to the part's file; gives them."""
        done = {key: t.float().cpu().contiguous() for key, t in {**self.average, **(more or {})}.items()}
        facts = {"steps": str(self.step), "seconds": f"{self.seconds:.0f}", "seen": str(self.seen)}
        self.save()
        write_bytes(part_file(self.run, self.name), save(done, metadata=facts))
        log.info("%s done: %d steps in %.0f s, seen %s", self.name, self.step, self.seconds, self.seen)
        return done


def save_whole(value: object, path: Path) -> None:
    """torch.save, whole or not at all, into a folder that is made where it is not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with writing(path) as file:
        torch.save(value, file)


def part_file(run: Run, name: str) -> Path:
    """Where a part's finished weights are."""
    return run.folder / f"{name}.safetensors"


def finished(run: Run, name: str) -> dict[str, Tensor] | None:
    """A part's weights, if it is done."""
    path = part_file(run, name)
    return load_file(path) if path.exists() else None

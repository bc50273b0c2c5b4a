"""Makes rows: what is missing of some prompts and draws, in batches, each committed as soon as it is there.

`Maker.make` needs nothing of the process around it: every engine calls it in its workers.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mrflow.backbone import Backbone, Condition
from mrflow.cache import StageCache
from mrflow.errors import MrflowError, ResourceError, is_out_of_memory
from mrflow.io import make_record, png, to_images
from mrflow.runner import Result, run
from mrflow.sheet import warm_up
from mrflow.spec import Latents, Pixels
from mrflow.sweep.grid import Prompt, Sweep, fingerprints, row_key, seed_of, versions
from mrflow.sweep.metrics import Measured, Metric, named
from mrflow.sweep.store import MAX_TRIES, Row, Store

if TYPE_CHECKING:
    from mrflow.stage import AnyChain

Pair = tuple[Prompt, int]  # and the number of the draw
CACHE_BYTES = 1 << 30


class Remembered:
    """A model that encodes the same prompts once."""

    def __init__(self, model: Backbone, *, most: int = 64) -> None:
        self._model, self._most = model, most
        self._known: dict[tuple[str, ...], Condition] = {}

    def __getattr__(self, name: str) -> object:
        return getattr(self._model, name)

    def condition(self, prompts: Sequence[str]) -> Condition:
        """The model's own, from memory where these were asked for before."""
        key = tuple(prompts)
        if key not in self._known:
            while len(self._known) >= self._most:
                del self._known[next(iter(self._known))]
            self._known[key] = self._model.condition(prompts)
        return self._known[key]


class Maker:
    """Makes rows with one model into one folder."""

    def __init__(self, sweep: Sweep, model: Backbone, store: Store, *, warm: bool = True) -> None:
        self.sweep, self.store = sweep, store
        self.model = cast(Backbone, Remembered(model))
        self.prints = {label: fingerprints(chain) for label, chain in sweep.chains.items()}
        self.plans = sweep.plans(model.info)
        self.negative = sweep.negative_for(model.info)
        self.made_by = versions()
        self._cache = StageCache(max_bytes=CACHE_BYTES)
        self._took: dict[tuple[str, Pair], tuple[float, int, float]] = {}
        self._warm = set[tuple[object, ...]]() if warm else None
        # The reference first: the others are held against its pictures.
        self.labels = sorted(sweep.chains, key=lambda label: label != sweep.reference)
        self.needs_reference, self.needs_latents = named(sweep.metrics)

    def key(self, label: str, pair: Pair) -> str:
        """The row's key."""
        prompt, draw = pair
        info, seed = self.model.info, seed_of(prompt.text, draw)
        return row_key(self.prints[label][-1], info.name, info.version, prompt.text, self.negative, seed, self.made_by)

    def missing(self, pairs: Sequence[Pair], *, retry: bool = False) -> Iterator[tuple[str, Pair]]:
        """Rows that are not there, or (with `retry`) failed."""
        for pair in pairs:
            for label in self.labels:
                row = self.store.get(self.key(label, pair))
                if row is None or (retry and not row.done):
                    yield label, pair

    def refresh(self, pairs: Sequence[Pair]) -> int:
        """Give rows that are there the labels, tags and metrics that the sweep has now; how many changed.

        New metrics are computed on the saved pictures; those that need latents only come with new rows.
        """
        changed = 0
        asked = [m for m in self.sweep.metrics if not m.needs_latents]
        for pair in pairs:
            for label in self.labels:
                row = self.store.get(self.key(label, pair))
                if row is None or not row.done or row.picture is None:
                    continue
                prompt, _ = pair
                new = [m for m in asked if repr(m) not in row.measured]
                if row.chain == label and dict(row.tags) == dict(prompt.tags) and not new:
                    continue
                metrics = dict(row.metrics)
                if new:
                    with Image.open(self.store.folder / row.picture) as image:
                        pixels = _pixels(image)
                    reference = self._reference(label, pair) if self.needs_reference else None
                    metrics |= self._numbers(
                        new, Measured(pixels, prompt.text, row.seed, prompt.tags, self.model, reference)
                    )
                measured = sorted({*row.measured, *(repr(m) for m in new)})
                self.store.commit(replace(row, chain=label, tags=dict(prompt.tags), metrics=metrics, measured=measured))
                changed += 1
        return changed

    def _numbers(self, metrics: Sequence[Metric], measured: Measured) -> dict[str, float]:
        out: dict[str, float] = {}
        for metric in metrics:
            found = metric(measured)
            out |= {name: float(value) for name, value in found.items() if np.isfinite(value)}
        return out

    def make(
        self, pairs: Sequence[Pair], *, retry: bool = False, on_row: Callable[[Row], None] | None = None
    ) -> list[Row]:
        """Make what is missing of these pairs, chain by chain, a batch each; committed as it comes.

        Raises:
            ResourceError: the folder does not take a row. Rows that fail otherwise are committed as failed.
        """
        rows: list[Row] = []
        for label in self.labels:
            todo: list[tuple[Pair, str, int]] = []
            for _, pair in (found for found in self.missing(pairs, retry=retry) if found[0] == label):
                key = self.key(label, pair)
                tries = self.store.claim(key)
                if tries is not None:
                    todo.append((pair, key, tries))
            try:
                for row in self._batch(label, todo):
                    self.store.commit(row)
                    rows.append(row)
                    if on_row is not None:
                        on_row(row)
            finally:
                self.store.release([key for _, key, _ in todo])
        return rows

    def _batch(self, label: str, todo: Sequence[tuple[Pair, str, int]]) -> Iterator[Row]:
        poison = [each for each in todo if each[2] >= MAX_TRIES]
        for pair, key, tries in poison:
            yield self._failed(label, pair, key, f"the process died {tries} times while this row was made", tries)
        todo = [each for each in todo if each[2] < MAX_TRIES]
        if not todo:
            return
        # A row that took its process down is made alone, so that it takes no other with it.
        calm = [each for each in todo if each[2] == 0]
        for group in ([calm] if calm else []) + [[each] for each in todo if each[2]]:
            try:
                yield from self._made(label, group)
                continue
            except ResourceError as error:
                if not is_out_of_memory(error) and "memory" not in str(error):
                    raise
                reason: BaseException = error
            except Exception as error:
                reason = error
            if len(group) == 1:
                (pair, key, tries) = group[0]
                yield self._failed(label, pair, key, _say(reason), tries + 1)
                continue
            for each in group:  # one by one: only the row that fails is lost
                try:
                    yield from self._made(label, [each])
                except Exception as error:
                    if isinstance(error, ResourceError) and "memory" not in str(error):
                        raise
                    yield self._failed(label, each[0], each[1], _say(error), each[2] + 1)

    def _made(self, label: str, group: Sequence[tuple[Pair, str, int]]) -> list[Row]:
        chain, pairs = self.sweep.chains[label], tuple(pair for pair, _, _ in group)
        self._warm_up(label, chain, len(pairs))
        keep = self.needs_latents or self.sweep.pictures == "stages"
        result = run(
            chain,
            self.model,
            [prompt.text for prompt, _ in pairs],
            seed=[seed_of(prompt.text, draw) for prompt, draw in pairs],
            negative=self.negative,
            keep=keep,
            cache=self._cache,
        )
        took = self._true_cost(label, pairs, result)
        images = result.images
        rows: list[Row] = []
        for i, (pair, key, tries) in enumerate(group):
            picture = self.store.write_picture(self.store.picture_path(key), png(images[i], make_record(result, i)))
            rows.append(self._row(label, pair, key, tries, result, i, images[i], took, picture))
        return rows

    def _row(
        self,
        label: str,
        pair: Pair,
        key: str,
        tries: int,
        result: Result,
        item: int,
        image: Image.Image,
        took: Sequence[tuple[float, int, float]],
        picture: str,
    ) -> Row:
        prompt, draw = pair
        batch = len(result.seeds)
        stages = [
            {
                "name": s.name,
                "out": str(s.spec),
                "seconds": seconds / batch,
                "nfe": nfe,
                "flops": flops / batch,
                "cached": s.cached,
            }
            for s, (seconds, nfe, flops) in zip(result.stages, took, strict=True)
        ]
        measured = Measured(
            _pixels(image),
            prompt.text,
            result.seeds[item],
            prompt.tags,
            self.model,
            self._reference(label, pair) if self.needs_reference else None,
            self._latents(result, item) if self.needs_latents else None,
        )
        return Row(
            key=key,
            status="done",
            chain=label,
            model=self.model.info.name,
            weights=self.model.info.version,
            prompt=prompt.text,
            negative=self.negative,
            seed=result.seeds[item],
            draw=draw,
            tags=dict(prompt.tags),
            tries=tries + 1,
            seconds=(result.condition_seconds + sum(t[0] for t in took)) / batch,
            nfe=sum(t[1] for t in took),
            flops=sum(t[2] for t in took) / batch,
            peak_bytes=result.peak_bytes,
            stages=stages,
            metrics=self._numbers(self.sweep.metrics, measured),
            measured=sorted(repr(m) for m in self.sweep.metrics),
            picture=picture,
            stage_pictures=self._stage_pictures(result, item, key) if self.sweep.pictures == "stages" else (),
            versions=self.made_by,
            device=str(self.model.device),
            batch=batch,
            time=datetime.now(UTC).isoformat(timespec="seconds"),
        )

    def _failed(self, label: str, pair: Pair, key: str, error: str, tries: int) -> Row:
        prompt, draw = pair
        return Row(
            key=key,
            status="failed",
            chain=label,
            model=self.model.info.name,
            weights=self.model.info.version,
            prompt=prompt.text,
            negative=self.negative,
            seed=seed_of(prompt.text, draw),
            draw=draw,
            tags=dict(prompt.tags),
            error=error,
            tries=tries,
            versions=self.made_by,
            device=str(self.model.device),
            time=datetime.now(UTC).isoformat(timespec="seconds"),
        )

    def _true_cost(self, label: str, pairs: tuple[Pair, ...], result: Result) -> list[tuple[float, int, float]]:
        """Seconds, forwards and operations of each stage: for one that came from memory, those when it was made."""
        out: list[tuple[float, int, float]] = []
        for mark, stage in zip(self.prints[label], result.stages, strict=True):
            mine = (stage.seconds, stage.nfe, stage.flops)
            if not stage.cached:
                for pair in pairs:
                    self._took[mark, pair] = (stage.seconds / len(pairs), stage.nfe, stage.flops / len(pairs))
            elif all((mark, pair) in self._took for pair in pairs):  # perhaps made in other batches
                seconds, nfe, flops = zip(*(self._took[mark, pair] for pair in pairs), strict=True)
                mine = (sum(seconds), max(nfe), sum(flops))
            out.append(mine)
        return out

    def _warm_up(self, label: str, chain: "AnyChain", batch: int) -> None:
        """First calls at a shape are slow: they are made before anything is timed."""
        shapes = (batch, *(str(row.out.shape) for row in self.plans[label].rows))
        if self._warm is not None and shapes not in self._warm:
            self._warm.add(shapes)
            warm_up((chain,), self.model, batch)

    def _reference(self, label: str, pair: Pair) -> Tensor | None:
        if label == self.sweep.reference:
            return None
        path = self.store.picture_path(self.key(self.sweep.reference, pair))
        if not path.is_file():
            return None
        with Image.open(path) as image:
            return _pixels(image)

    def _latents(self, result: Result, item: int) -> Tensor | None:
        """The last clean latents that a stage was given to noise: before Reinject, or before the last Decode."""
        names = [s.name for s in result.stages]
        last = names.index("Reinject") if "Reinject" in names else len(names) - 1
        for stage in reversed(result.stages[:last]):
            if stage.data is not None and isinstance(stage.spec, Latents) and stage.spec.sigma == 0:
                return stage.data[item]
        return None

    def _stage_pictures(self, result: Result, item: int, key: str) -> list[list[str]]:
        out: list[list[str]] = []
        for number, stage in enumerate(result.stages[:-1], 1):
            if stage.data is not None and isinstance(stage.spec, Pixels):
                path = self.store.picture_path(key, f"-{number}-{stage.name}")
                image = to_images(stage.data[item : item + 1])[0]
                out.append([stage.name, self.store.write_picture(path, png(image))])
        return out


def _pixels(image: Image.Image) -> Tensor:
    """(3, h, w) in [0, 1] of a saved picture."""
    array = np.asarray(image.convert("RGB"), dtype=np.float32) / np.float32(255)
    return torch.from_numpy(array.copy()).permute(2, 0, 1).contiguous()


def _say(error: BaseException) -> str:
    text = str(error).strip() or "no text"
    return text if isinstance(error, MrflowError) else f"{type(error).__name__}: {text}"

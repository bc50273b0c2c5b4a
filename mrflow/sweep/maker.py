"""Makes rows: what is missing of some prompts and draws, in batches, each committed as soon as it is there.

`Maker.make` needs nothing of the process around it: every engine calls it in its workers.
"""

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mrflow.backbone import Backbone, Condition, Wrapper
from mrflow.display.sheet import warm_up
from mrflow.errors import DeviceLostError, MrflowError, PlanError, ResourceError
from mrflow.machine.failures import is_out_of_memory, passes, words_of
from mrflow.machine.forks import check_process
from mrflow.machine.hardware import machine
from mrflow.records.files import beneath
from mrflow.records.images import read_image
from mrflow.records.pictures import png, to_images
from mrflow.records.stage_cache import StageCache
from mrflow.result import Result, make_record
from mrflow.runner import run
from mrflow.spec import Latents, Pixels
from mrflow.stage import AnyChain
from mrflow.sweep.failures import is_device_lost
from mrflow.sweep.grid import Prompt, Sweep, fingerprints, row_key, seed_of, versions, weights
from mrflow.sweep.leases import Claim, LeaseLostError
from mrflow.sweep.limits import RowTimeoutError, time_limit
from mrflow.sweep.metrics import Measured, Metric, needs_of
from mrflow.sweep.rows import LARGEST, MOST, Cause, Row, sha256_of
from mrflow.sweep.store import MAX_TRIES, Store

Pair = tuple[Prompt, int]  # and the number of the draw
Held = tuple[Pair, Claim]
CACHE_BYTES = 1 << 30
HUNG = "it hung for longer than"  # how the text of a metric begins that is measured again only with `retry`


class Remembering(Wrapper):
    """A model that encodes the same prompts once."""

    def __init__(self, model: Backbone, *, most: int = 64) -> None:
        super().__init__(model)
        self._most = most
        self._known: dict[tuple[str, ...], Condition] = {}

    def condition(self, prompts: Sequence[str]) -> Condition:
        """The model's own, from memory where these were asked for before."""
        key = tuple(prompts)
        if key not in self._known:
            while len(self._known) >= self._most:
                del self._known[next(iter(self._known))]
            self._known[key] = self.model.condition(prompts)
        return self._known[key]


class Maker:
    """Makes rows with one model into one folder."""

    def __init__(
        self, sweep: Sweep, model: Backbone, store: Store, *, warm: bool = True, row_timeout: float | None = None
    ) -> None:
        check_process(model.device)
        self.sweep, self.store, self.row_timeout = sweep, store, row_timeout
        self.again: dict[str, str] = {}
        self.stayed = 0  # rows that failed before and are left so
        self._stale: dict[str, tuple[str, Pair]] = {}
        self._slow, self._retry = set[tuple[str, str]](), False  # metrics that took too long here, with their rows
        self.model = Remembering(model)
        self.prints = {label: fingerprints(chain) for label, chain in sweep.chains.items()}
        self.plans = sweep.plans(model.info)
        self.negative = sweep.negative_for(model.info)
        self.weights = weights(model.info)
        self.made_by, self.machine = versions(), machine(model.device)
        self._given = sorted(repr(m) for m in sweep.metrics if not m.needs_latents)  # as `Row.measured` names them
        self._cache = StageCache(max_bytes=CACHE_BYTES)
        self._took: dict[tuple[str, Pair], tuple[float, int, float]] = {}
        self._warm = set[tuple[object, ...]]() if warm else None
        # The reference first: the others are held against its pictures.
        self.labels = sorted(sweep.chains, key=lambda label: label != sweep.reference)
        self.needs_reference, self.needs_latents = needs_of(sweep.metrics)

    def key(self, label: str, pair: Pair) -> str:
        """The row's key."""
        prompt, draw = pair
        info, seed = self.model.info, seed_of(prompt.text, draw)
        return row_key(self.prints[label][-1], info.name, self.weights, prompt.text, self.negative, seed, self.made_by)

    def survey(self, pairs: Sequence[Pair], *, retry: bool = False) -> list[int]:
        """How many rows each pair lacks; each row is read once, and only where it changed since it was found right.

        What failed because a process died, and with `retry` all that failed, is to be made again: `again` holds when
        those rows were written, so that each is tried once more and not for ever. `stayed` counts other failed ones.

        Raises:
            PlanError: something else has the place of a row that is to be made, see `Store.check_places`.
        """
        out: list[int] = []
        self._retry = retry
        for pair in pairs:
            lacking, tags = 0, sorted(pair[0].tags.items())
            for label in self.labels:
                key = self.key(label, pair)
                seen = self.store.look(key, f"{label!r} {tags} {self._given}")
                if seen is not None and self.store.index.holds(seen):
                    continue
                row = self.store.get(key)
                if row is not None and not row.done and (retry or row.cause == "death"):
                    self.again[key] = row.time
                if self._is_wanted(key, row):
                    self.store.check_places(key)
                    lacking += 1
                self.stayed += row is not None and not row.done and key not in self.again
                if row is not None and self._is_outdated(row, label, pair):
                    self._stale[key] = (label, pair)
                elif row is not None and row.done:
                    self.store.settle(row, seen)
            out.append(lacking)
        return out

    def lacking(self, pairs: Sequence[Pair]) -> list[int]:
        """How many rows each pair lacks now."""
        return [sum(1 for _ in self._missing([pair])) for pair in pairs]

    def rows(self, pairs: Sequence[Pair]) -> Iterator[Row | None]:
        """What has become of every row: None where it is still to be made."""
        for pair in pairs:
            for label in self.labels:
                key = self.key(label, pair)
                row = self.store.get(key)
                yield None if self._is_wanted(key, row) else row

    def _missing(self, pairs: Sequence[Pair], labels: Sequence[str] | None = None) -> Iterator[tuple[Pair, str]]:
        for pair in pairs:
            for label in self.labels if labels is None else labels:
                key = self.key(label, pair)
                if self._is_wanted(key, self.store.get(key)):
                    yield pair, key

    def _is_wanted(self, key: str, row: Row | None) -> bool:
        return row is None or (not row.done and self.again.get(key) == row.time)

    def _is_outdated(self, row: Row, label: str, pair: Pair) -> bool:
        return row.done and (
            row.chain != label or dict(row.tags) != dict(pair[0].tags) or bool(self._unmeasured(row, label))
        )

    def _unmeasured(self, row: Row, label: str) -> list[Metric]:
        """Metrics that a row may still get from its picture; those that need latents only come with new rows."""
        return [m for m in self.sweep.metrics if not m.needs_latents and repr(m) not in row.measured]

    def refresh(self, pairs: Sequence[Pair] = (), *, on_row: Callable[[Row], None] | None = None) -> int:
        """Give rows that are there the labels, tags and metrics that the sweep has now; how many changed.

        Looks at what `survey` and `make` found to be behind, and at `pairs`; `on_row` hears of each as it is then. New
        metrics are computed on the saved pictures; those that need latents only come with new rows.
        """
        behind = self._stale | {self.key(label, pair): (label, pair) for pair in pairs for label in self.labels}
        self._stale = {}
        changed = 0
        for key, (label, pair) in behind.items():
            row = self.store.get(key)
            if row is None or not self._is_outdated(row, label, pair):
                continue
            prompt, _ = pair
            new = [metric for metric in self._unmeasured(row, label) if not self._is_given_up(row, metric)]
            kept = {name: text for name, text in row.unmeasured.items() if name in map(repr, self.sweep.metrics)}
            now = replace(row, chain=label, tags=dict(prompt.tags), unmeasured=kept)
            pixels = reference = None
            try:
                pixels = self._picture(row) if new else None
                reference = self._reference(label, pair) if new and self.needs_reference else None
            except MrflowError as error:
                now = replace(now, unmeasured=dict(now.unmeasured) | {repr(metric): _say(error) for metric in new})
                pixels = None
            if pixels is not None:
                looked = Measured(pixels, prompt.text, row.seed, prompt.tags, self.model, reference)
                now = self._measure(now, new, looked)
            if now != row:
                self.store.commit(now)
                changed += 1
            if on_row is not None:
                on_row(now)
        return changed

    def _is_given_up(self, row: Row, metric: Metric) -> bool:
        """Whether a metric took too long for a row: in this run, or so that its process had to end for it."""
        name = repr(metric)
        return (row.key, name) in self._slow or (not self._retry and row.unmeasured.get(name, "").startswith(HUNG))

    def _measure(self, row: Row, metrics: Sequence[Metric], made: Measured) -> Row:
        """A row with these metrics' numbers, or what kept it from them; one that lacks its reference waits."""
        numbers, names, errors = dict(row.metrics), set(row.measured), dict(row.unmeasured)

        def now() -> Row:
            return replace(row, metrics=numbers, measured=sorted(names), unmeasured=errors)

        for metric in metrics:
            name = repr(metric)
            errors.pop(name, None)
            if metric.needs_reference and made.reference is None and row.chain != self.sweep.reference:
                continue

            def stuck(name: str = name) -> None:
                errors[name] = f"{HUNG} {self.row_timeout:g} s (--row-timeout) and could not be interrupted"
                self.store.commit(now())
                self.store.release([row.key])
                self.store.leases.abandon()

            try:
                with time_limit(self.row_timeout, stuck):
                    found = metric(made)
                    new = {part: float(value) for part, value in found.items() if abs(value) <= LARGEST}
                if len(numbers | new) > MOST:
                    raise PlanError(f"with it the metrics give {len(numbers | new)} numbers a picture, {MOST} at most")
                numbers |= new
                names.add(name)
            except RowTimeoutError:
                errors[name] = f"it took longer than {self.row_timeout:g} s (--row-timeout)"
                self._slow.add((row.key, name))
            except BaseException as error:
                if passes(error) or is_device_lost(error):
                    raise
                errors[name] = _say(error)
        return now()

    def make(
        self, pairs: Sequence[Pair], *, calm: bool = False, on_row: Callable[[Row], None] | None = None
    ) -> list[Row]:
        """Make what is missing of these pairs, chain by chain, a batch each; committed as it comes.

        With `calm`, rows that a process died with are left for later.

        Raises:
            ResourceError: the folder does not take a row. DeviceLostError: nothing can be computed any more.

        Rows that fail otherwise are committed as failed.
        """
        rows: list[Row] = []
        for label in self.labels:
            todo: list[Held] = []
            for pair, key in self._missing(pairs, [label]):
                claim = self.store.claim(key, calm=calm, wanted=lambda row, key=key: self._is_wanted(key, row))  # type: ignore[misc]
                if claim is not None:
                    todo.append((pair, claim))
            try:
                for row in self._batch(label, todo):
                    try:
                        self.store.commit(row)
                    except LeaseLostError:
                        continue
                    rows.append(row)
                    if row.done and len(row.measured) < len(self.sweep.metrics):
                        self._stale[row.key] = (label, next(p for p, c in todo if c.key == row.key))
                    if on_row is not None:
                        on_row(row)
            except DeviceLostError:
                self.store.leases.abandon()
                raise
            finally:
                self.store.release([claim.key for _, claim in todo])
        return rows

    def _batch(self, label: str, todo: Sequence[Held]) -> Iterator[Row]:
        for pair, claim in todo:
            if claim.deaths >= MAX_TRIES:
                said = f"the process died {claim.deaths} times while this row was made"
                yield self._failure(label, pair, claim, said, "death")
        todo = [each for each in todo if each[1].deaths < MAX_TRIES]
        # A row that a process died with is made alone, so that it takes no other with it.
        calm = [each for each in todo if not each[1].suspect]
        for group in ([calm] if calm else []) + [[each] for each in todo if each[1].suspect]:
            made, reason = self._try_group(label, group)
            yield from made
            if reason is not None and len(group) == 1:
                yield self._failure(label, *group[0], *reason)
            elif reason is not None:
                for each in group:  # one by one: only the row that fails is lost
                    made, alone = self._try_group(label, [each])
                    yield from made
                    if alone is not None:
                        yield self._failure(label, *each, *alone)

    def _try_group(self, label: str, group: Sequence[Held]) -> tuple[list[Row], tuple[str, Cause] | None]:
        """The rows of a group, or why they could not be made.

        Raises:
            DeviceLostError: the device is gone. ResourceError: the folder does not take files.
        """
        try:
            return self._make_group(label, group), None
        except RowTimeoutError:
            return [], (f"it took longer than {self.row_timeout:g} s (--row-timeout)", "timeout")
        except Exception as error:
            if is_device_lost(error):
                raise DeviceLostError(
                    f"the device is lost, which takes a new process: {_say(error)}. Nothing was written off; run the "
                    "same command again"
                ) from error
            if isinstance(error, ResourceError) and not (is_out_of_memory(error) or "memory" in words_of(error)):
                raise
            return [], (_say(error), "error")

    def _make_group(self, label: str, group: Sequence[Held]) -> list[Row]:
        chain, pairs = self.sweep.chains[label], tuple(pair for pair, _ in group)
        with self._with_limit(label, group):
            self._warm_up(label, chain, len(pairs), pairs[0][0].text)
        self.store.leases.doing([c.key for _, c in group], "alone" if len(group) == 1 else "together")
        keep = self.needs_latents or self.sweep.pictures == "stages"
        rows: list[Row] = []
        with self._with_limit(label, group):  # of each metric it is measured for itself
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
            images, timed = result.images, group[0][1].key
        for i, (pair, claim) in enumerate(group):
            data = png(images[i], make_record(result, i))
            try:
                picture = self.store.write_picture(self.store.picture_path(claim.key), data)
                rows.append(self._row(label, pair, claim, result, i, images[i], took, picture, data, timed))
            except LeaseLostError:
                continue
        return rows

    @contextmanager
    def _with_limit(self, label: str, group: Sequence[Held]) -> Generator[None]:
        """Within the time that rows may take."""

        def stuck() -> None:
            """What cannot be interrupted ends with its process: alone it is written off, else it is made alone next,
            also where it hung before it was said to be computed, in the warm-up.
            """
            if len(group) == 1:
                said = f"it hung for longer than {self.row_timeout:g} s (--row-timeout) and could not be interrupted"
                self.store.commit(self._failure(label, *group[0], said, "timeout"))
                self.store.release([group[0][1].key])
            else:
                self.store.leases.doing([claim.key for _, claim in group], "together")
            self.store.leases.abandon()

        with time_limit(None if self.row_timeout is None else self.row_timeout * len(group), stuck):
            yield

    def _row(
        self,
        label: str,
        pair: Pair,
        claim: Claim,
        result: Result,
        item: int,
        image: Image.Image,
        took: Sequence[tuple[float, int, float]],
        picture: str,
        data: bytes,
        timed: str,
    ) -> Row:
        prompt, _ = pair
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
        row = replace(
            self._begun(label, pair, claim),
            status="done",
            seed=result.seeds[item],
            tries=claim.tries + 1,
            seconds=(result.condition_seconds + sum(t[0] for t in took)) / batch,
            nfe=sum(t[1] for t in took),
            flops=sum(t[2] for t in took) / batch,
            peak_bytes=result.peak_bytes,
            stages=stages,
            picture=picture,
            picture_bytes=len(data),
            picture_sha256=sha256_of(data),
            stage_pictures=self._stage_pictures(result, item, claim.key) if self.sweep.pictures == "stages" else (),
            batch=batch,
            timed=timed,
        )
        return self._measure(row, self.sweep.metrics, measured)

    def _failure(self, label: str, pair: Pair, claim: Claim, error: str, cause: Cause) -> Row:
        begun = self._begun(label, pair, claim)
        return replace(begun, error=error, cause=cause, tries=claim.tries + (cause != "death"))

    def _begun(self, label: str, pair: Pair, claim: Claim) -> Row:
        """What a row says however it ends."""
        prompt, draw = pair
        return Row(
            key=claim.key,
            status="failed",
            chain=label,
            model=self.model.info.name,
            weights=self.weights,
            prompt=prompt.text,
            negative=self.negative,
            seed=seed_of(prompt.text, draw),
            draw=draw,
            tags=dict(prompt.tags),
            versions=self.made_by,
            device=str(self.model.device),
            machine=self.machine,
            time=datetime.now(UTC).isoformat(timespec="microseconds"),
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

    def _warm_up(self, label: str, chain: AnyChain, batch: int, prompt: str) -> None:
        """First calls at a shape are slow: they are made before anything is timed."""
        shapes = (batch, *(str(row.out.shape) for row in self.plans[label].rows))
        if self._warm is not None and shapes not in self._warm:
            self._warm.add(shapes)
            warm_up((chain,), self.model, batch, prompt)

    def _reference(self, label: str, pair: Pair) -> Tensor | None:
        if label == self.sweep.reference:
            return None
        row = self.store.get(self.key(self.sweep.reference, pair))
        return None if row is None else self._picture(row)

    def _picture(self, row: Row) -> Tensor | None:
        """A row's picture as it was saved, under the limits of images from outside; None where there is none."""
        path = None if row.picture is None else beneath(self.store.folder, row.picture)
        if path is None:
            return None
        return read_image(path)[0]

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
    text = words_of(error) or "no text"
    return text if isinstance(error, MrflowError) else f"{type(error).__name__}: {text}"

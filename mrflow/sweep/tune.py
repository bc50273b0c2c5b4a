"""The cheapest chains that are good enough: a search over settings, each drawn as rows of an ordinary sweep's folder.

The plan decides what is worth drawing: a chain that costs more than one that is known to be good enough cannot win.
What is drawn is drawn on a part of the prompts first, and given up when even the upper end of its interval is below the
floor. Optuna (extra `[tune]`) proposes; the same seed proposes the same.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

from mrflow import recipes, schedules, solvers
from mrflow._checks import check_whole
from mrflow.backbone import Backbone
from mrflow.errors import PlanError
from mrflow.guidance import Guidance
from mrflow.model_info import ModelInfo
from mrflow.protocols.upscaler import Upscaler
from mrflow.records.expressions import expression
from mrflow.records.pictures import write_bytes
from mrflow.schedules import Schedule
from mrflow.solvers import Solver
from mrflow.spec import Pixels, Start
from mrflow.stage import Chain, Plan, human, plan
from mrflow.sweep.aims import Scale, as_scale, scale_for
from mrflow.sweep.grid import Prompt, Sweep
from mrflow.sweep.local import manifest
from mrflow.sweep.maker import Maker
from mrflow.sweep.metrics import Metric
from mrflow.sweep.rows import Row
from mrflow.sweep.statistics import ConfidenceInterval, interval, is_share, pareto, values
from mrflow.sweep.store import Store
from mrflow.upscalers import Interpolate, Lanczos

StagedChain = Chain[Start, Pixels]


@dataclass(frozen=True)
class Space:
    """What is tried. Each choice has a name; `lows` are fractions of the full size for the first stage, 1 is native."""

    steps: tuple[int, int] = (2, 30)
    refine_steps: tuple[int, int] = (1, 3)
    sigma: tuple[float, float] = (0.04, 0.5)
    lows: Sequence[float] = (0.5, 1.0)
    schedules: Mapping[str, Callable[[int], Schedule]] = field(
        default_factory=lambda: {"shifted": schedules.Shifted, "linear": schedules.Linear}
    )
    solvers: Mapping[str, Solver] = field(
        default_factory=lambda: {"euler": solvers.Euler(), "ab2": solvers.AB2(), "dpmpp2m": solvers.DPMpp2M()}
    )
    upscalers: Mapping[str, Upscaler | None] = field(
        default_factory=lambda: {"own": None, "lanczos": Lanczos(2), "bicubic": Interpolate(2, "bicubic")}
    )
    guidances: Mapping[str, Guidance | None] = field(default_factory=lambda: {"own": None})

    def chain(self, choose: "Chooser", info: ModelInfo) -> StagedChain:
        """A chain from what `choose` says."""
        steps = choose.whole("steps", *self.steps)
        schedule = self.schedules[choose.one("schedule", list(self.schedules))](steps)
        solver = self.solvers[choose.one("solver", list(self.solvers))]
        guidance = self.guidances[choose.one("guidance", list(self.guidances))]
        low = float(choose.one("low", [str(x) for x in self.lows]))
        if low >= 1:
            return recipes.native(size=info.size, schedule=schedule, solver=solver, guidance=guidance)
        small = _fraction(info, low)
        upscaler = self.upscalers[choose.one("upscaler", list(self.upscalers))]
        return recipes.paper(
            upscaler,
            low=small,
            size=info.size,
            sigma=round(choose.real("sigma", *self.sigma), 3),
            refine_steps=choose.whole("refine_steps", *self.refine_steps),
            schedule=schedule,
            solver=solver,
            guidance=guidance,
        )


def _fraction(info: ModelInfo, part: float) -> tuple[int, int]:
    m = info.space.multiple
    height, width = (max(m, round(side * part / m) * m) for side in info.size)
    return height, width


class Chooser:
    """What a search asks for values."""

    def whole(self, name: str, low: int, high: int) -> int:
        """A whole number in [low, high]."""
        raise NotImplementedError

    def real(self, name: str, low: float, high: float) -> float:
        """A number in [low, high], its logarithm even."""
        raise NotImplementedError

    def one(self, name: str, names: Sequence[str]) -> str:
        """One of several names."""
        raise NotImplementedError


class _Trial(Chooser):
    """Optuna's trial as a chooser."""

    def __init__(self, trial: Any) -> None:  # noqa: ANN401
        self._trial = trial

    def whole(self, name: str, low: int, high: int) -> int:
        return int(self._trial.suggest_int(name, low, high, log=low > 0))

    def real(self, name: str, low: float, high: float) -> float:
        return float(self._trial.suggest_float(name, low, high, log=low > 0))

    def one(self, name: str, names: Sequence[str]) -> str:
        return str(self._trial.suggest_categorical(name, list(names))) if len(names) > 1 else names[0]


@dataclass(frozen=True)
class Tune:
    """What is good enough: `metric`, one of the numbers that `metrics` give, must reach `floor` on the mean.

    `higher=False` for numbers of which less is better.

    Raises:
        PlanError: there are no metrics, or the floor lies outside the range that they say of this number.
    """

    prompts: Sequence[str | Prompt]
    metrics: Sequence[Metric]
    metric: str
    floor: float
    seeds: Sequence[int] = (0,)
    space: Space = field(default_factory=Space)
    model: str = "pocket"
    higher: bool = True

    def __post_init__(self) -> None:
        if not math.isfinite(self.floor):
            raise PlanError(f"the floor must be a number, got {self.floor!r}")
        if not self.metrics:
            raise PlanError("tuning needs metrics, such as metrics=[SceneScore()], metric='score'")
        self._check_scale(scale_for(self.metric, {k: as_scale(v) for m in self.metrics for k, v in m.aims.items()}))

    def _check_scale(self, known: Scale) -> None:
        low, high = known.low, known.high
        if (low is not None and self.floor < low) or (high is not None and self.floor > high):
            ends = (f"at least {low:g}" if low is not None else "", f"at most {high:g}" if high is not None else "")
            raise PlanError(
                f"floor must be {' and '.join(end for end in ends if end)}, the range of {self.metric!r}, "
                f"got {self.floor:g}"
            )
        if known.aim in ("higher", "lower") and self.higher != (known.aim == "higher"):
            raise PlanError(f"{known.aim} values of {self.metric!r} are better; say higher={known.aim == 'higher'}")

    @property
    def bound(self) -> str:
        """`>=`, or `<=` where less is better."""
        return ">=" if self.higher else "<="


@dataclass(frozen=True)
class Trial:
    """One chain of the search. `quality` is None where it was not drawn (`why` says so) or has no such number."""

    label: str
    chain: StagedChain
    flops: float
    quality: ConfidenceInterval | None
    seconds: float | None
    why: str = ""

    def good(self, floor: float, *, higher: bool) -> bool:
        """Whether it was drawn on all prompts and reaches the floor."""
        if self.quality is None or self.why:
            return False
        return self.quality.mean >= floor if higher else self.quality.mean <= floor


@dataclass(frozen=True)
class TuneResult:
    """What a search found: everything tried, the cheapest that is good enough, and the front, cheapest first."""

    tried: Sequence[Trial]
    best: Trial | None
    front: Sequence[Trial]


def tune(
    asked: Tune,
    model: Backbone,
    folder: str | Path,
    *,
    trials: int = 40,
    batch: int = 4,
    seed: int = 0,
    on_tried: Callable[[int, Trial], None] | None = None,
    on_drawing: Callable[[str, int, int], None] | None = None,
) -> TuneResult:
    """Search. Rows are kept in `folder`, so the same search again draws nothing twice.

    The native chain of 50 steps is drawn first: it is the reference, and number 1 of `trials` + 1. `on_tried` is given
    each number with what was found, also of chains that were not drawn; `on_drawing` is given label, pictures that are
    done and pictures in all, while one is.

    Raises:
        PlanError: optuna is not installed, no prompt has the metric, or the number of trials makes no sense.
        ResourceError: the folder cannot be written.
    """
    check_whole("trials", trials, 1, 100_000)
    optuna = _optuna()
    info, higher = model.info, asked.higher
    reference = recipes.native(size=info.size, steps=info.native_steps)
    tried: list[Trial] = []
    cheapest = math.inf
    seen: dict[str, Trial] = {}

    draw = partial(_draw, asked, model, Path(folder), reference, batch, on_drawing)

    def tell(one: Trial) -> None:
        tried.append(one)
        if on_tried is not None:
            on_tried(len(tried), one)

    def consider(trial: Any) -> float:  # noqa: ANN401
        nonlocal cheapest
        chain = asked.space.chain(_Trial(trial), info)
        try:
            planned = plan(chain, info)
        except PlanError as error:
            tell(Trial(_label(trial.params), chain, math.inf, None, None, str(error)))
            raise optuna.TrialPruned from None
        label = _label(trial.params)
        cost = planned.work.flops
        effort = math.log(max(1.0, cost))
        if label in seen:
            one = seen[label]
        elif cost >= cheapest:
            one = Trial(label, chain, cost, None, None, "costs more than one that is good enough")
        else:
            one = draw(label, chain, planned)
        seen[label] = one
        tell(one)
        if one.good(asked.floor, higher=higher):
            cheapest = min(cheapest, cost)
        if one.quality is None:
            return effort + 1.0
        short = asked.floor - one.quality.mean if higher else one.quality.mean - asked.floor
        return effort + 20 * max(0.0, short) / max(abs(asked.floor), 1e-9)

    first = draw("native 50", reference, plan(reference, info))
    if first.quality is None:
        raise PlanError(f"no native picture has the number {asked.metric!r}; do the prompts fit the metric?")
    tell(first)
    if first.good(asked.floor, higher=higher):
        cheapest = first.flops
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed, n_startup_trials=max(8, trials // 4)))
    study.optimize(consider, n_trials=trials)
    whole = {t.label: t for t in tried if t.quality is not None and not t.why}
    sign = 1 if higher else -1
    names = pareto({n: (t.flops, sign * cast(ConfidenceInterval, t.quality).mean) for n, t in whole.items()})
    good = [t for t in whole.values() if t.good(asked.floor, higher=higher)]
    best = min(good, key=lambda t: t.flops, default=None)
    return TuneResult(tried, best, [whole[n] for n in names])


def _draw(
    asked: Tune,
    model: Backbone,
    folder: Path,
    reference: StagedChain,
    batch: int,
    on_drawing: Callable[[str, int, int], None] | None,
    label: str,
    chain: StagedChain,
    planned: Plan,
) -> Trial:
    """A chain's pictures and their numbers; after a quarter of the pairs no more where it cannot reach the floor."""
    chains = {"native 50": reference, label: chain}
    sweep = Sweep(chains, asked.prompts, seeds=asked.seeds, metrics=asked.metrics, reference="native 50")
    store = Store(folder)
    maker = Maker(sweep, model, store)
    store.open(manifest(sweep, model))
    pairs = sweep.pairs
    quarter = max(1, len(pairs) // 4)
    found: ConfidenceInterval | None = None
    rows: list[Row] = []
    with store.holding():
        for part in (pairs[:quarter], pairs):
            for start in range(0, len(part), batch):
                if on_drawing is not None:
                    on_drawing(label, start, len(pairs))
                maker.make(part[start : start + batch])
            rows = [r for pair in part if (r := store.get(maker.key(label, pair))) is not None]
            numbers = values(rows, asked.metric)
            found = interval(numbers, draws=2000, share=is_share(asked.metric)) if numbers else None
            if found is not None and part is not pairs and _hopeless(found, asked):
                return Trial(label, chain, planned.work.flops, found, _seconds(rows), "below the floor early")
    return Trial(label, chain, planned.work.flops, found, _seconds(rows))


def _optuna() -> Any:  # noqa: ANN401
    try:
        import optuna  # type: ignore[import-not-found,unused-ignore]  # pyright: ignore
    except ImportError as error:
        raise PlanError(f"tuning needs optuna, which is not here ({error}): pip install 'mrflow[tune]'") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def _hopeless(found: ConfidenceInterval, asked: Tune) -> bool:
    if found.units < 4:
        return False
    return found.high < asked.floor if asked.higher else found.low > asked.floor


def _seconds(rows: Sequence[Row]) -> float | None:
    times = [r.seconds for r in rows if r.done]
    return sum(times) / len(times) if times else None


def _label(params: Mapping[str, Any]) -> str:
    """A label from what was chosen."""
    return ", ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in sorted(params.items()))


def front_file(found: TuneResult, asked: Tune) -> str:
    """A Python file with the chains of the front that are good enough, each ready for `mrflow run file.py:name`."""
    bound = "at least" if asked.higher else "at most"
    lines = [
        f'"""Chains found by tuning for {asked.metric} of {bound} {asked.floor:g}, cheapest first."""',
        "",
        "import mrflow as mf",
        "",
    ]
    names: list[str] = []
    good = [one for one in found.front if one.good(asked.floor, higher=asked.higher)]
    for number, one in enumerate(good):
        name = f"front_{number}"
        names.append(name)
        cost = f"{one.flops:.3g} FLOP" + (f", {one.seconds:.3f} s" if one.seconds is not None else "")
        lines += [f"# {one.label}: {asked.metric} {one.quality}, {cost}", f"{name} = ("]
        lines += [f"    {'>> ' if i else ''}{expression(stage, 'mf.')}" for i, stage in enumerate(one.chain)]
        lines += [")"]
    labels = ", ".join(f"{one.label!r}: {name}" for one, name in zip(good, names, strict=True))
    return "\n".join([*lines, f"chains = {{{labels}}}", ""])


def write_front(found: TuneResult, asked: Tune, path: Path) -> None:
    """Write `front_file`."""
    write_bytes(path, front_file(found, asked).encode("utf-8"))


def outcome(found: TuneResult, asked: Tune) -> dict[str, object]:
    """What a search found, as plain data: the front with what each chain costs and reaches, and the best of it."""

    def row(one: Trial) -> dict[str, object]:
        quality = one.quality
        ends = {} if quality is None else {"mean": quality.mean, "low": quality.low, "high": quality.high}
        good = one.good(asked.floor, higher=asked.higher)
        return {"label": one.label, "flops": one.flops, "seconds": one.seconds, asked.metric: ends, "good": good}

    best = None if found.best is None else found.best.label
    return {"tried": len(found.tried), "floor": asked.floor, "best": best, "front": [row(one) for one in found.front]}


def lines(found: TuneResult, asked: Tune) -> Iterable[str]:
    """The front for people: * the cheapest that is good enough, - what is not good enough."""
    for one in found.front:
        best = found.best is not None and one.label == found.best.label
        mark = "*" if best else (" " if one.good(asked.floor, higher=asked.higher) else "-")
        took = "" if one.seconds is None else f"{one.seconds:8.3f} s"
        yield f"{mark} {asked.metric} {one.quality!s:<24} {human(one.flops, 'FLOP'):>12} {took}  {one.label}"
    if found.best is None:
        wanted = f"{asked.metric} {asked.bound} {asked.floor:g}"
        yield f"no chain that was tried reaches {wanted}: move the floor or widen the space"

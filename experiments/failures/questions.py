"""The chains of each question. `Setting` says at which sizes, and in how many steps."""

import json
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import cast

import mrflow as mf
from mrflow.model_info import ModelInfo
from mrflow.records.files import write_bytes
from mrflow.stage import AnyChain
from mrflow.sweep.control_rows import affordable, controls

Chain = mf.Chain[mf.Start, mf.Pixels]
Chains = dict[str, Chain]
SIGMAS = (0.05, 0.2, 0.3, 0.4, 0.5)  # beside the paper's, which `staged` has
TRUTHS = ("truth", "truth, autoencoder", "truth, staged path")  # of the control rows
SPEEDS = (4, 8, 12, 20)
REGIONS = ((7, 8, 9), (5, 6, 7), (4, 5, 6), (3, 4, 5), (2, 3, 5), (2, 2, 3), (1, 2, 3), (1, 1, 2), (1, 1, 1))  # of RALU


@dataclass(frozen=True)
class Setting:
    """The sides of the low and the high stage, the steps of native sampling, and those of the staged low stage."""

    low: int
    size: int
    steps: int
    few: int
    students: bool = False  # whether the model is the one that the embedded student was taught by

    @property
    def whole(self) -> tuple[int, int]:
        """Height and width of a picture."""
        return self.size, self.size

    @property
    def small(self) -> tuple[int, int]:
        """Height and width in the low stage."""
        return self.low, self.low

    def native(self, steps: int, **more: object) -> Chain:
        """Plain sampling."""
        return mf.recipes.native(size=self.whole, steps=steps, **more)  # type: ignore[arg-type]

    def staged(self, upscaler: mf.Upscaler | None = None, **more: object) -> Chain:
        """The paper's chain."""
        settings = {"low": self.small, "size": self.whole, "steps": self.few} | more
        return mf.recipes.paper(upscaler, **settings)  # type: ignore[arg-type]

    @property
    def rung(self) -> int:
        """A larger first side, three quarters of the picture's, in whole tokens."""
        return self.size * 3 // 4 // 16 * 16


def failure_map(s: Setting, info: ModelInfo) -> Chains:
    """Native and staged sampling, one forward, the truth through the paths; staged sampling's settings, and rivals."""
    a, b = max(1, s.few * 2 // 3), max(1, s.few // 3)
    rows = controls(info, low=s.small, size=s.whole)
    return {
        **_base(s),
        **{label: chain for label, chain in rows.items() if label in TRUTHS},
        **{f"sigma {sigma:g}": s.staged(sigma=sigma) for sigma in SIGMAS},
        **{f"{n} refining steps": s.staged(refine_steps=n) for n in (2, 4)},
        "Lanczos": s.staged(mf.Lanczos()),
        "latents enlarged": mf.recipes.latent(low=s.small, size=s.whole, steps=s.few),
        f"low stage {s.rung} px": s.staged(low=(s.rung, s.rung)),
        "lift": mf.recipes.lift(low=s.small, size=s.whole, steps=(a, b)),
        "SelfLift": mf.recipes.selflift(low=s.small, size=s.whole, steps=(a, b)),
        "SPEED": mf.recipes.speed(sizes=(s.small, s.whole), steps=(a, b)),
        "RALU": mf.recipes.ralu(size=s.whole, shift=2.0),
        **{f"native {n}": s.native(n) for n in sorted({affordable(s.staged(), info, size=s.whole), s.few})},
    }


def error_budget(s: Setting, info: ModelInfo) -> Chains:
    """Staged sampling with the truth put in later and later: each difference is what one stage loses."""
    end = cast("tuple[mf.Stage[mf.Pixels, mf.Pixels], ...]", tuple(s.staged())[3:])  # from Encode() on
    truth, large = mf.Truth(*s.small), mf.Truth(*s.whole)
    enlarged = mf.Upscale(size=s.whole)
    return {
        "staged": s.staged(),
        "true latents": _then(truth >> mf.Encode() >> mf.Decode() >> enlarged, end),
        "true low picture": _then(truth >> enlarged, end),
        "true picture": _then(large, end),
        "no refinement": large >> mf.Encode() >> mf.Decode(),
        "truth": Chain((large,)),
    }


LOSSES = {  # what is lost between two rows of `error_budget`, the later minus the earlier
    "low-resolution sampling": ("true latents", "staged"),
    "low-resolution autoencoder": ("true low picture", "true latents"),
    "low resolution and super-resolution": ("true picture", "true low picture"),
    "refinement": ("no refinement", "true picture"),
    "autoencoder": ("truth", "no refinement"),
}


def mends(s: Setting, info: ModelInfo) -> Chains:
    """What could win back what staged sampling loses, each with its cost."""
    out = _base(s)
    for sigma in (0.2, 0.3, 0.4, 0.5, 0.6):
        for steps in (1, 2, 4):
            out[f"sigma {sigma:g}, {steps} refining"] = s.staged(sigma=sigma, refine_steps=steps)
    sides = sorted({s.rung, s.size * 5 // 8 // 16 * 16})
    for side in sides:
        out[f"low stage {side} px"] = s.staged(low=(side, side))
        out[f"low stage {side} px, sigma 0.3, 2 refining"] = s.staged(low=(side, side), sigma=0.3, refine_steps=2)
    for n in (s.few // 2, s.few * 3 // 4):
        three = max(1, n // 4), max(1, n // 2), max(1, n // 2)
        out[f"RALU {n}"] = mf.recipes.ralu(size=s.whole, steps=three, shift=2.0)
        out[f"native {n}"] = s.native(n)
    return out


def frontier(s: Setting, info: ModelInfo) -> Chains:
    """Every method at equal planned cost, 4, 8, 12 and 20 times below native sampling, as far as it goes.

    Those that must see the model are added by `fitted`.
    """
    return _at_speeds(s, info, _families(s))


def slots(s: Setting, info: ModelInfo) -> Chains:
    """Fewer steps with another solver, guidance or schedule, at the speeds of `frontier`."""
    return _at_speeds(s, info, {PLAIN: _families(s)[PLAIN]} | _exchanged(s, info))


def _at_speeds(s: Setting, info: ModelInfo, families: Mapping[str, Chains]) -> Chains:
    """Native sampling, and of each family the dearest chain that is near enough to each speed."""
    out: Chains = {"native": s.native(s.steps)}
    whole = mf.plan(out["native"], info).work.flops
    for label, family in families.items():
        costs = {name: mf.plan(chain, info).work.flops for name, chain in family.items()}
        for speed in SPEEDS:
            fit = {name: cost for name, cost in costs.items() if _near(cost * speed / whole)}
            if fit:
                best = max(fit, key=lambda name: fit[name])
                out[f"{label}, {speed}x"] = family[best]
    return out


def _near(share: float) -> bool:
    """Whether a cost is near enough to what a speed allows: the speed is from 0.95 to 1.25 of the wanted one."""
    return 0.8 <= share <= 1.05


def _families(s: Setting) -> dict[str, Chains]:
    """The operating points of each method, of which `frontier` takes those of the wanted cost."""
    counts = range(1, s.steps + 1)
    halves = [(a, b) for a in counts for b in (1, 2, 3, 4, 6, 8)]

    def cached(make: Callable[[float], mf.caches.Cache], values: tuple[float, ...]) -> Chains:
        return {f"{v:g}": s.native(s.steps, cache=make(v)) for v in values}

    thirds = [tuple(max(1, round(n * part)) for part in (0.4, 0.25, 0.35)) for n in counts if n > 2]
    c, three = mf.caches, cast("list[tuple[int, int, int]]", list(dict.fromkeys(thirds)))
    thresholds = tuple(round(0.05 * 1.4**i, 3) for i in range(26))
    out = {
        "fewer steps": {str(n): s.native(n) for n in counts},
        "fewer steps, unguided": {str(n): s.native(n, guidance=mf.CFG(1.0)) for n in counts},
        "staged": {f"{n}": s.staged(steps=n) for n in counts},
        "lift": {f"{a} {b}": mf.recipes.lift(low=s.small, size=s.whole, steps=(a, b)) for a, b in halves},
        "SelfLift": {f"{a} {b}": mf.recipes.selflift(low=s.small, size=s.whole, steps=(a, b)) for a, b in halves},
        "SPEED": {f"{a} {b}": mf.recipes.speed(sizes=(s.small, s.whole), steps=(a, b)) for a, b in halves},
        "staged, latents": {str(n): mf.recipes.latent(low=s.small, size=s.whole, steps=n) for n in counts},
        "RALU": {f"{n}": mf.recipes.ralu(size=s.whole, steps=n, shift=2.0) for n in REGIONS},
        "JiT": {f"{n}": mf.recipes.jit(size=s.whole, steps=n) for n in three},
        "Fresco": {f"{n}": mf.recipes.fresco(size=s.whole, steps=n) for n in three},
        "TaylorSeer": cached(lambda v: c.TaylorSeer(int(v)), tuple(range(2, s.steps))),
        "Spectrum": cached(lambda v: c.Spectrum(growth=v), (0.1, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0)),
        "DMD": cached(lambda v: c.DMD(1.0, front=1, warmup=4, limit=int(v)), tuple(range(1, s.steps))),
        "MagCache": cached(lambda v: c.MagCache(v, limit=s.steps), thresholds),
        "ToMA": cached(lambda v: c.ToMA(v, every=1, skip=1), (0.25, 0.5, 0.75)),
    }
    if s.students:
        student = mf.students.POCKET_4
        out["student"] = {str(n): mf.recipes.few(student, size=s.whole, steps=n) for n in (8, 6, 4, 3, 2, 1)}
        out["student, then staged"] = {
            str(n): mf.recipes.stacked(student, low=s.small, size=s.whole, steps=n) for n in (8, 6, 4, 3, 2, 1)
        }
    return out


SOLVERS: dict[str, mf.Solver] = {
    "UniPC": mf.UniPC(),
    "DEIS": mf.DEIS(),
    "RES 2m": mf.RES2M(),
    "RES 2s": mf.RES2S(),
    "RES 3s": mf.RES3S(),
    "SA-Solver": mf.SASolver(),
}
GUIDANCE: dict[str, Callable[[float], mf.Guidance]] = {
    "APG": mf.APG,
    "CFG-Zero*": mf.CFGZero,
    "TCFG": mf.TCFG,
    "NAG": lambda scale: mf.NAG(5.0),  # the published scale; that of CFG means something else
}
SCHEDULES = ("beta", "sgm_uniform", "linear_quadratic", "kl_optimal", "bong_tangent")
"""Of ComfyUI and RES4LYF; "simple" is `Shifted` up to its table."""
FOUND, PLAIN = "found sigmas", "fewer steps"


def _exchanged(s: Setting, info: ModelInfo) -> dict[str, Chains]:
    """Fewer steps with one thing exchanged, but for the sigmas that must be found with the model."""
    counts = range(2, s.steps + 1)
    out = {name: {str(n): s.native(n, solver=solver) for n in counts} for name, solver in SOLVERS.items()}
    for name, guide in GUIDANCE.items():
        out[name] = {str(n): s.native(n, guidance=guide(info.cfg)) for n in counts}
    for name in SCHEDULES:
        schedules = {n: mf.ComfyUI(name, n) for n in counts}  # type: ignore[arg-type]  # pyright: ignore
        out[name] = {str(n): s.native(n, schedule=schedule) for n, schedule in schedules.items()}
    return out


def fitted(s: Setting, model: mf.Backbone, captions: list[str], file: Path, wanted: Collection[str]) -> Chains:
    """What must see the model: L2P's weights, sigmas, thresholds of caches that go by the picture, at each speed.

    `wanted` are labels of `FITTED`. A threshold is one with which the captions cost what the speed allows,
    by counted operations. All is found once and
    kept in the file, so that a run resumes with the same chains.
    """
    whole = mf.plan(s.native(s.steps), model.info).work.flops
    known = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    out: Chains = {}

    def once(label: str, find: Callable[[], object]) -> object:
        if label not in known:
            known[label] = find()
            write_bytes(file, json.dumps(known).encode())
        return known[label]

    def share(chain: Chain, speed: int) -> float:
        made = mf.run(chain, model, captions, seed=list(range(len(captions))))
        return sum(stage.flops for stage in made.stages) / len(captions) * speed / whole

    def threshold(make: Callable[[float], mf.caches.Cache], speed: int) -> float | None:
        low, high = 0.01, 20.0
        for _ in range(8):
            middle = round(math.sqrt(low * high), 4)
            found = share(s.native(s.steps, cache=make(middle)), speed)
            if _near(found):
                return middle
            low, high = (middle, high) if found > 1 else (low, middle)
        return None

    def weights(interval: int) -> object:
        return mf.caches.L2P.calibrate(interval, model, captions, size=s.whole, schedule=mf.Shifted(s.steps)).rows

    def sigmas(steps: int) -> object:
        return mf.schedules.optimise(model, steps, captions, size=s.whole).sigmas

    for speed in SPEEDS:
        fewer = {n: mf.plan(s.native(n), model.info).work.flops * speed / whole for n in range(1, s.steps + 1)}
        few = [n for n, cost in fewer.items() if _near(cost)]
        if few and f"{FOUND}, {speed}x" in wanted:
            levels = cast("list[float]", once(f"{FOUND}, {speed}x", partial(sigmas, few[-1])))
            out[f"{FOUND}, {speed}x"] = s.native(few[-1], schedule=mf.Explicit(tuple(levels)))
        plain = {n: s.native(s.steps, cache=mf.caches.TaylorSeer(n)) for n in range(2, s.steps)}
        fit = [n for n, chain in plain.items() if _near(mf.plan(chain, model.info).work.flops * speed / whole)]
        if fit and f"L2P, {speed}x" in wanted:
            found = once(f"L2P, {speed}x", partial(weights, fit[0]))
            rows = tuple(tuple(row) for row in cast("list[list[float]]", found))
            out[f"L2P, {speed}x"] = s.native(s.steps, cache=mf.caches.L2P(rows))
        for name, make in BY_PICTURE.items():
            if f"{name}, {speed}x" not in wanted:
                continue
            value = once(f"{name}, {speed}x", partial(threshold, make, speed))
            if value is not None:
                out[f"{name}, {speed}x"] = s.native(s.steps, cache=make(cast(float, value)))
    return out


BY_PICTURE: dict[str, Callable[[float], mf.caches.Cache]] = {
    "DBCache": lambda v: mf.caches.DBCache(v, front=1, warmup=2),
    "DBTaylor": lambda v: mf.caches.DBCache(v, front=1, warmup=2, order=1),
    "TeaCache": mf.caches.TeaCache,
    "SeaCache": mf.caches.SeaCache,
}
"""Caches by threshold whose cost no plan knows."""
FITTED = {
    "frontier": tuple(f"{name}, {speed}x" for name in ("L2P", *BY_PICTURE) for speed in SPEEDS),
    "slots": tuple(f"{FOUND}, {speed}x" for speed in SPEEDS),
}
"""Labels of the chains that must see the model, by question."""


def _base(s: Setting) -> Chains:
    return {"native": s.native(s.steps), "staged": s.staged(), "one forward": s.native(1, guidance=mf.CFG(1.0))}


def _then(head: mf.Chain[mf.Start, mf.Pixels] | mf.Stage[mf.Start, mf.Pixels], tail: tuple[object, ...]) -> Chain:
    stages = tuple(head) if isinstance(head, mf.Chain) else (head,)
    return cast(Chain, AnyChain((*stages, *cast("tuple[mf.Stage[mf.Pixels, mf.Pixels], ...]", tail))))


QUESTIONS: Mapping[str, Callable[[Setting, ModelInfo], Chains]] = {
    "map": failure_map,
    "budget": error_budget,
    "mends": mends,
    "frontier": frontier,
    "slots": slots,
}
